"""The server: its answers, what it refuses, how it ends; over real sockets."""

import base64
import hashlib
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image

from analysis.answer_log import AnswerLog
from analysis.confidence import softmax
from analysis.predict import decode_image
from data.decoding import to_rgb
from deploy import serve
from deploy.load import load
from deploy.service.keys import new_key, read_keys
from deploy.service.limits import Buckets, Limits
from deploy.service.run import listen
from errors import UserError
from tests.browser import BROWSER, Browser
from tests.conftest import ROOT, paint
from tests.deploy.serving import CLASSES, fake, running, write_model

TIFF_BOMB = b"II*\0\x08\0\0\0\x02\0\0\x01\x04\0\x01\0\0\0\0\0\0\x40\x01\x01\x04\0\x01\0\0\0\0\0\0\x40\0\0\0\0"


def png(seed: int = 0, size=(40, 30), kind: str = "PNG") -> bytes:
    paint(seed, size).save(file := io.BytesIO(), kind)
    return file.getvalue()


def bomb(side: int = 10_000) -> bytes:
    """A grey PNG of a few kilobytes and very many pixels."""
    Image.new("1", (side, side)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def icon(side: int = 10_000) -> bytes:
    """An ICO that says 64x64 and holds a PNG of very many pixels."""
    inside = bomb(side)
    entry = struct.pack("<4B2H2I", 64, 64, 0, 0, 1, 32, len(inside), 22)
    return struct.pack("<3H", 0, 1, 1) + entry + inside


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("serve") / "tiny")


@pytest.fixture(scope="module")
def predictor(folder):
    return load(folder)


@pytest.fixture(scope="module")
def server(predictor):
    with running(predictor, max_megapixels=1, max_batch=2) as server:
        yield server


@pytest.fixture(scope="module")
def hasty(tmp_path_factory):
    """A server that waits for nobody long."""
    folder = tmp_path_factory.mktemp("hasty")
    with running(fake(folder=folder), header_timeout_s=1.5, body_timeout_s=1.5) as server:
        yield server


def predict(server, *images: bytes, query: str = "", **options):
    files = [("file", (f"{i}.png", image)) for i, image in enumerate(images)]
    return requests.post(
        f"{server.url}/v1/models/m/predict{query}", files=files, **{"timeout": 30} | options
    )


def raw(port: int, *parts: bytes) -> bytes:
    """What the server sends until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        for part in parts:
            time.sleep(0.0 if part else 0.3)
            connection.sendall(part)
        found = b""
        while read := connection.recv(65536):
            found += read
    return found


# --- answers --------------------------------------------------------------------------------------


def test_an_answer_is_that_of_the_model_calibrated_and_complete(server, predictor):
    images = [png(1), png(2, kind="JPEG")]
    answer = predict(server, *images, query="?top=2").json()
    assert (answer["model"], answer["version"]) == ("m", predictor.version)
    assert (answer["target_accuracy"], answer["threshold"]) == (0.95, 0.5)
    pixels = np.stack([decode_image(predictor.facts, image) for image in images])
    logits = predictor.answer(pixels)["logits"]
    for i, row in enumerate(answer["images"]):
        expected, best = softmax(logits, 2.0)[i], np.argsort(-logits[i])
        assert [one["class"] for one in row["top"]] == [CLASSES[k] for k in best[:2]]
        np.testing.assert_allclose(
            [one["confidence"] for one in row["top"]], expected[best[:2]], atol=1e-5
        )
        assert row["set"] == [CLASSES[k] for k in best if predictor.sets(logits)[i, k]]
        assert row["review"] == bool(expected.max() < 0.5)
        assert row["image"] == hashlib.sha256(images[i]).hexdigest()
        assert min(row["decode_ms"], row["queue_ms"], row["inference_ms"]) >= 0


def test_the_target_asked_for_decides_on_review(server):
    strict = predict(server, png(), query="?target=0.99").json()
    assert strict["threshold"] is None and strict["images"][0]["review"]
    unknown = predict(server, png(), query="?target=0.8")
    assert unknown.status_code == 400 and "0.95, 0.99" in unknown.json()["detail"]


def test_what_is_served_is_told(server, predictor):
    found = requests.get(f"{server.url}/v1/models").json()
    (model,) = found["models"]
    assert model["classes"] == CLASSES and model["image_size"] == 16
    assert model["licence"] == "Apache-2.0" and model["version"] == predictor.version
    assert model["image"]["max_pixels"] == 1_000_000  # the server's own limit
    assert model["review_thresholds"][1]["confidence"] is None
    assert found["limits"] == {"max_body_mb": 1, "max_images": 3}
    assert requests.get(f"{server.url}/healthz").json() == {"alive": True}
    assert requests.get(f"{server.url}/readyz").json()["ready"]


@pytest.mark.parametrize("keyed", [False, True])
def test_the_schema_names_bodies_answers_and_keys(tmp_path, keyed):
    keys = read_keys("", new_key("alice")[1]) if keyed else {}
    with running(fake(folder=tmp_path), keys) as server:  # which holds every answer against it
        found = server.gate.app.openapi()
    predict = found["paths"]["/v1/models/{name}/predict"]["post"]
    assert {"image/*", "multipart/form-data"} <= set(predict["requestBody"]["content"])
    content = predict["responses"]["200"]["content"]
    assert content["application/json"]["schema"] == {"$ref": "#/components/schemas/Prediction"}
    assert "image/png" in content and "503" in predict["responses"]
    assert ("security" in predict) == keyed
    assert "security" not in found["paths"]["/healthz"]["get"]
    assert "HTTPValidationError" not in found["components"]["schemas"]


def test_a_heat_map_comes_as_a_picture_alone_or_in_the_answer(server):
    url, headers = (
        f"{server.url}/v1/models/m/predict?explain=gradcam",
        {"Content-Type": "image/png"},
    )
    answer = requests.post(url, png(3), headers=headers).json()["images"][0]
    content = base64.b64decode(answer["heat_map"]["png"])
    assert Image.open(io.BytesIO(content)).size == (16, 16)
    assert answer["heat_map"]["class"] == answer["top"][0]["class"]
    alone = requests.post(url, png(3), headers=headers | {"Accept": "image/png"})
    assert alone.headers["Content-Type"] == "image/png" and alone.content == content
    two = predict(server, png(), png(), query="?explain=gradcam", headers={"Accept": "image/png"})
    assert two.status_code == 400


def test_a_compiled_program_says_why_it_has_no_heat_map(tmp_path):
    with running(fake(folder=tmp_path)) as server:
        refused = predict(server, png(), query="?explain=gradcam")
        assert refused.status_code == 400 and "gradients" in refused.json()["detail"]


def test_metrics_count_what_happened(server):
    def value(name, **labels):
        return server.metrics.registry.get_sample_value(f"archcompare_{name}", labels) or 0

    def images():
        return sum(value("images_total", model="m", **{"class": name}) for name in CLASSES)

    route = {"route": "/v1/models/{name}/predict", "model": "m", "status": "200"}
    before = images(), value("images_unreadable_total", model="m"), value("requests_total", **route)
    assert predict(server, png(), b"broken", png()).status_code == 200
    after = images(), value("images_unreadable_total", model="m"), value("requests_total", **route)
    assert np.subtract(after, before).tolist() == [2, 1, 1]
    text = requests.get(f"{server.url}/metrics")
    assert text.headers["Content-Type"].startswith("text/plain")
    assert 'archcompare_inference_seconds_bucket{le="+Inf",model="m"}' in text.text
    assert 'archcompare_queue_images{model="m"} 0.0' in text.text
    assert "\nprocess_resident_memory_bytes" in text.text and "_created" not in text.text
    assert requests.post(f"{server.url}/v1/models/{'x' * 99}/predict", png()).status_code == 404
    assert "xxx" not in requests.get(f"{server.url}/metrics").text


def test_series_of_what_may_happen_begin_at_0(tmp_path):
    with running(fake(folder=tmp_path)) as server:
        text = requests.get(f"{server.url}/metrics").text
    for name in ("images_unreadable_total{%s}", "images_to_review_total{%s}", "log_failing",
                 "log_failures_total", "pending_bytes", 'images_total{class="dog",%s}'):  # fmt: skip
        series = name.replace("%s", 'model="m"')
        assert f"archcompare_{series} 0.0\n" in text


# --- bad input ------------------------------------------------------------------------------------

BAD = {
    "broken": (png()[:60], "image/png", 422),
    "truncated": (png(size=(300, 300))[:-5000], "image/png", 422),
    "empty": (b"", "image/png", 400),
    "no image": (b"%PDF-1.4 of no use", "image/png", 422),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "image/png", 422),
    "a larger image in an ICO": (icon(), "image/x-icon", 422),
    "text": (b"hello", "text/plain", 415),
    "form": (b"a=b", "application/x-www-form-urlencoded", 415),
    "no boundary": (b"--x", "multipart/form-data", 400),
    "half a form": (b"--x\r\nContent-Dispos", "multipart/form-data; boundary=x", 400),
    "no file": (b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--x--\r\n', "multipart/form-data; boundary=x", 400),
    "huge": (b"\0" * 2**20 + b"\0", "image/png", 413),
    "PNG bomb": (bomb(), "image/png", 422),
    "TIFF bomb": (TIFF_BOMB, "image/tiff", 422),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml", 422),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_body_gets_a_4xx_and_the_next_request_its_answer(server, name):
    body, kind, status = BAD[name]
    refused = requests.post(
        f"{server.url}/v1/models/m/predict", body, headers={"Content-Type": kind}
    )
    assert refused.status_code == status and refused.json()["detail"]
    assert "config." not in refused.text
    assert predict(server, png()).status_code == 200


def test_no_image_starts_ghostscript(server, tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    assert "no image" in predict(server, BAD["EPS"][0]).json()["detail"]
    with pytest.raises(ValueError, match="no image"):
        to_rgb(BAD["EPS"][0], (0, 0, 0))
    assert not (tmp_path / "started").exists()


def test_a_jpeg_beyond_the_limit_is_read_at_a_smaller_size_unless_it_is_far_beyond(server):
    def jpeg(side):
        Image.new("L", (side, side)).save(file := io.BytesIO(), "JPEG", progressive=True)
        return file.getvalue()

    large, far = predict(server, jpeg(1500), jpeg(2100)).json()["images"]  # the limit is 1 million
    assert large["top"] and "over the limit of 4,000,000 pixels" in far["error"]


def test_a_broken_image_among_others_is_an_entry(server):
    answer = predict(server, png(1), b"broken", png(2))
    assert answer.status_code == 200
    assert ["error" in row for row in answer.json()["images"]] == [False, True, False]


def test_too_many_images_and_unknown_models_and_options_are_named(server):
    many = predict(server, *[png()] * 4)
    assert many.status_code == 413 and "at most 3 images" in many.json()["detail"]
    lost = requests.post(f"{server.url}/v1/models/../models/n/predict", png())
    assert lost.status_code == 404
    assert "only m" in requests.post(f"{server.url}/v1/models/n/predict", png()).json()["detail"]
    said = {
        "?top=0": "top: must be greater than or equal to 1", "?top=x": "top: must be a valid integer",
        "?target=nan": "target must be one of 0.95, 0.99", "?explain=lime": "explain: must be 'gradcam'",
        "?topk=3": "no such option: 'topk', only top, target and explain",
    }  # fmt: skip
    for query, text in said.items():
        refused = predict(server, png(), query=query)
        assert 400 <= refused.status_code < 500 and text in refused.json()["detail"]
    wrong = requests.get(f"{server.url}/v1/models/m/predict")
    assert (
        wrong.status_code == 405 and wrong.json()["detail"] == "GET is not for this path, only POST"
    )
    assert "openapi.json" in requests.get(f"{server.url}/nothing").json()["detail"]
    assert predict(server, png(), headers={"Accept": "image/png"}).status_code == 406
    assert (
        "curl" in requests.post(f"{server.url}/v1/models/m/predict", data={"a": 1}).json()["detail"]
    )


NAMES = {
    "../../etc/passwd": "../../etc/passwd", "C:\\x\\..\\y.png": "y.png", "a\0b\udcff.png": "a\0bÿ.png",
    "n" * 400: "n" * 255, "n" * 5000: "",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_file_is_only_repeated(server, name):
    head = b'--x\r\nContent-Disposition: form-data; name="f"; filename="'
    body = (
        head
        + name.replace("\\", "\\\\").encode("utf-8", "surrogateescape")
        + b'"\r\n\r\n'
        + png()
        + b"\r\n--x--\r\n"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = requests.post(f"{server.url}/v1/models/m/predict", body, headers=headers)
    if NAMES[name]:
        assert answer.json()["images"][0]["name"] == NAMES[name]
    else:
        assert answer.status_code == 400


def test_slow_and_endless_senders_are_sent_away(hasty):
    head = b"POST /v1/models/m/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    slow = {
        "nothing at all": (),
        "half a head": (b"POST / HTTP/1.1\r\nHost: x\r\nX-Slow: 1",),
        "half a body": (head + b"Content-Length: 1000\r\n\r\n", b"\x89PNG"),
        "half a chunk": (head + b"Transfer-Encoding: chunked\r\n\r\n", b"100\r\nabc"),
        "a body that nobody asked for": (b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n", b"x"),
        "a head after an answer": (b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", b"", b"GET /heal"),
        "without end": (head + b"Transfer-Encoding: chunked\r\n\r\n", *[b"%x\r\n" % 2**16 + b"\0" * 2**16 + b"\r\n"] * 17),
    }  # fmt: skip
    with ThreadPoolExecutor(8) as pool:
        found = dict(
            zip(slow, pool.map(lambda parts: raw(hasty.port, *parts), slow.values()), strict=True)
        )
    assert found.pop("without end").startswith(b"HTTP/1.1 413")
    first, second = found.pop("a head after an answer").split(b'{"alive":true}')
    assert first.startswith(b"HTTP/1.1 200") and second.startswith(b"HTTP/1.1 408")
    for name, answer in found.items():
        assert answer.startswith(b"HTTP/1.1 408"), (name, answer)
    assert raw(hasty.port, b"\x16\x03\x01 no HTTP at all\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert predict(hasty, png()).status_code == 200


def test_what_follows_a_body_of_two_lengths_is_no_request(server):
    head = b"POST /v1/models/m/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
    ask = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    body, begun = b"0\r\n\r\n", head + b"Transfer-Encoding: chunked\r\n\r\n"
    together, late = (begun + body + ask,), (begun, b"", body + ask)
    # However the body meets the answer, the connection ends with the answer, not with a reset.
    for parts in (together, late, *[(begun, body)] * 100):
        answer = raw(server.port, *parts)
        assert answer.startswith(b"HTTP/1.1 400") and answer.count(b"HTTP/1.1") == 1


def test_a_client_that_never_reads_is_cut_off(hasty):
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", hasty.port))
        mine, kept = connection.getsockname()[1], hasty.server_state.connections
        ports = lambda: {one.client[1] for one in list(kept)}  # noqa: E731
        while mine not in ports():
            time.sleep(0.01)
        connection.setblocking(False)
        with pytest.raises((BlockingIOError, ConnectionError)):
            while True:
                connection.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 50)
        until = time.monotonic() + 20
        while mine in ports() and time.monotonic() < until:
            time.sleep(0.05)
        assert mine not in ports()


def test_a_client_that_leaves_disturbs_nobody(server):
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            b"POST /v1/models/m/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nab"
        )
    assert predict(server, png()).status_code == 200
    while server.gate.pending:
        time.sleep(0.01)


# --- keys and rates -------------------------------------------------------------------------------


def test_only_a_known_key_opens_and_only_its_digest_is_stored(tmp_path, predictor, capsys):
    key, line = new_key("alice")
    assert key not in line and hashlib.sha256(key.encode()).hexdigest() in line
    file = tmp_path / "keys"
    file.write_text(f"# clients\n{line}  # the first\n\n")
    with running(fake(folder=tmp_path), read_keys(str(file), new_key("bob")[1])) as server:
        for path in ("/", "/healthz", "/readyz"):
            head = requests.head(server.url + path)
            assert head.status_code == 200 and not head.content
            assert requests.get(server.url + path).status_code == 200
            assert requests.post(server.url + path, b"0" * 2000).status_code == 413
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
            refused = requests.get(server.url + path)
            assert refused.status_code == 401 and refused.headers["WWW-Authenticate"] == "Bearer"
        for wrong in (key[:-1], key + "x", "", "é", line.split(":")[1]):
            headers = {"X-API-Key": wrong.encode()}
            assert predict(server, png(), headers=headers).status_code == 401
        assert predict(server, png(), headers={"X-API-Key": key}).status_code == 200
        assert predict(server, png(), headers={"Authorization": f"Bearer {key}"}).status_code == 200
    printed = capsys.readouterr().out
    lines = [json.loads(text) for text in printed.splitlines()]
    assert [one["key"] for one in lines if one.get("images")] == ["alice", "alice"]
    assert key not in printed
    assert {"time", "id", "route", "status", "ms", "bytes"} <= set(lines[0])


@pytest.mark.parametrize(
    "text", ["alice:secret", "alice", "a b:" + "0" * 64, "a:" + "0" * 64 + ",a:" + "1" * 64]
)
def test_a_line_that_is_no_key_is_refused_and_not_repeated(tmp_path, text):
    with pytest.raises(UserError, match="ARCHCOMPARE_KEYS") as error:
        read_keys("", text)
    assert "secret" not in str(error.value)
    (tmp_path / "keys").write_text(new_key("alice")[1])
    with pytest.raises(UserError, match="alice has a key in"):
        read_keys(str(tmp_path / "keys"), new_key("alice")[1])
    with pytest.raises(UserError, match="cannot be read"):
        read_keys(str(tmp_path / "none"))


def test_a_bucket_holds_the_burst_and_fills_at_the_rate():
    buckets, draw, now, taken = Buckets(10, 5), np.random.default_rng(0), 0.0, 0
    for _ in range(4000):
        now += draw.exponential(1 / 40)  # four times too many
        wait = buckets.wait("a", now)
        taken += wait == 0
        assert 0 <= wait <= 0.1
    assert 10 * now - 1 <= taken <= 10 * now + 5
    assert buckets.wait("b", now) == 0
    assert Buckets(0, 1).wait("a") == 0


def test_above_its_rate_a_key_is_asked_to_wait(tmp_path):
    with running(fake(folder=tmp_path), rate=0.1, burst=2) as server:
        found = [requests.get(f"{server.url}/v1/models") for _ in range(3)]
        assert [one.status_code for one in found] == [200, 200, 429]
        count = {"route": "/v1/models", "model": "", "status": "429"}
        assert server.metrics.registry.get_sample_value("archcompare_requests_total", count) == 1
        assert 1 <= int(found[2].headers["Retry-After"]) <= 10
        assert requests.get(f"{server.url}/healthz").status_code == 200


def test_without_keys_no_page_of_another_site_is_answered(tmp_path):
    with running(fake(folder=tmp_path), local=True) as server:
        own = f"127.0.0.1:{server.port}"
        for host in (own, "localhost:9", "LOCALHOST", "[::1]:9"):
            assert requests.get(server.url, headers={"Host": host}).status_code == 200
        for host in (
            "evil.example",
            f"evil.example:{server.port}",
            "localhost.evil.example",
            "10.0.0.1",
        ):
            assert requests.get(server.url, headers={"Host": host}).status_code == 421
        for origin, status in ((server.url, 200), ("http://evil.example", 403), ("null", 403),
                               ("http://localhost:3000", 403)):  # fmt: skip
            assert predict(server, png(), headers={"Origin": origin}).status_code == status
    with running(fake(folder=tmp_path)) as server:
        anywhere = {"Host": "photos.example", "Origin": "https://photos.example"}
        assert predict(server, png(), headers=anywhere).status_code == 200


def test_without_keys_only_this_machine_is_answered():
    for host in ("127.0.0.1", "localhost", "::1", "127.8.0.1"):
        serve.check_open(host, {}, False)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""):
        with pytest.raises(UserError, match="--keys_file"):
            serve.check_open(host, {}, False)
        serve.check_open(host, {"a": "0"}, False)
        serve.check_open(host, {}, True)


# --- queue, batches, time -------------------------------------------------------------------------


class Slow:
    """A model that waits until it may answer, and notes the sizes of its batches."""

    def __init__(self, folder):
        self.may, self.sizes = threading.Event(), []
        self.may.set()
        self.mean = fake(folder=folder).answer

    def __call__(self, images):
        self.sizes.append(len(images))
        assert self.may.wait(20)
        return self.mean(images)


def test_requests_that_meet_are_one_batch_and_each_gets_its_own_answer(tmp_path):
    slow = Slow(tmp_path)
    with (
        running(fake(slow, tmp_path), max_batch=8, queue=9) as server,
        ThreadPoolExecutor(9) as pool,
    ):
        slow.sizes.clear()
        slow.may.clear()
        first = pool.submit(predict, server, png(0))
        while not slow.sizes:
            time.sleep(0.01)
        others = [pool.submit(predict, server, png(seed)) for seed in range(1, 9)]
        while len(server.service.workers["m"]._queue) < 8:
            time.sleep(0.01)
        full = predict(server, png())
        assert full.status_code == 503 and full.headers["Retry-After"] == "1"
        assert requests.get(f"{server.url}/healthz").status_code == 200
        slow.may.set()
        answers = [job.result() for job in (first, *others)]
        assert slow.sizes == [1, 8]
        for seed, answer in enumerate(answers):
            (row,) = answer.json()["images"]
            mean = slow.mean(decode_image(fake(folder=tmp_path).facts, png(seed))[None])
            expected = softmax(mean["logits"], 2.0).max()
            assert row["top"][0]["confidence"] == pytest.approx(expected, abs=1e-6)
            assert row["batch"] == (8 if seed else 1)


def test_a_compiled_model_meets_only_the_sizes_it_was_warmed_up_for(tmp_path):
    slow = Slow(tmp_path)
    model = fake(slow, tmp_path)
    object.__setattr__(model, "file", tmp_path / "model.stablehlo")
    model.file.write_bytes(b"fake")
    with running(model, max_batch=6) as server:
        assert slow.sizes == [1, 2, 4, 6]
        assert len(predict(server, png(1), png(2), png(3)).json()["images"]) == 3
        assert set(slow.sizes) <= {1, 2, 4, 6}


def test_an_answer_that_takes_too_long_is_a_504_and_its_place_is_free_again(tmp_path):
    slow = Slow(tmp_path)
    with running(fake(slow, tmp_path), timeout_s=1) as server:
        slow.may.clear()
        assert predict(server, png()).status_code == 504
        slow.may.set()
        for _ in range(100):  # whoever has an answer finds its place free
            assert predict(server, png()).status_code == 200
            assert server.service.workers["m"]._held == 0


def test_a_client_that_leaves_gives_its_place_back(tmp_path):
    slow = Slow(tmp_path)
    with running(fake(slow, tmp_path)) as server:
        slow.may.clear()
        slow.sizes.clear()
        head = b"POST /v1/models/m/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(png()) + png())
            while not slow.sizes:
                time.sleep(0.01)
        worker = server.service.workers["m"]
        assert worker._held == 1
        slow.may.set()
        assert predict(server, png()).status_code == 200
        while worker._held:
            time.sleep(0.01)


def test_an_answer_that_is_no_number_is_an_error_of_its_image_and_not_logged(tmp_path):
    def answer(images):
        found = mean(images)
        found["logits"][images.max(axis=(1, 2, 3)) == 0] = np.nan
        return found

    mean, log = fake(folder=tmp_path).answer, AnswerLog(tmp_path / "log.sqlite")
    with running(fake(answer, tmp_path), log=log) as server:
        Image.new("RGB", (9, 9)).save(black := io.BytesIO(), "PNG")
        lost, found = predict(server, black.getvalue(), png()).json()["images"]
        assert "no number" in lost["error"] and found["top"]
        version = server.service.workers["m"].predictor.version
    assert list(AnswerLog(tmp_path / "log.sqlite").read(version).image) == [found["image"]]


def test_a_model_that_fails_on_a_batch_answers_the_next(tmp_path, capsys):
    def answer(images):
        if images.max() == 0 and len(images) == 1 and state["warm"]:
            raise RuntimeError("out of memory")
        return mean(images)

    state, mean = {"warm": False}, fake(folder=tmp_path).answer
    with running(fake(answer, tmp_path)) as server:
        state["warm"] = True
        Image.new("RGB", (9, 9)).save(black := io.BytesIO(), "PNG")
        failed = predict(server, black.getvalue())
        assert failed.status_code == 500 and "memory" not in failed.text
        assert predict(server, png()).status_code == 200
    assert "out of memory" in capsys.readouterr().err


def test_a_server_that_stops_answers_what_it_took_and_nothing_new(tmp_path):
    slow = Slow(tmp_path)
    with running(fake(slow, tmp_path)) as server, ThreadPoolExecutor(2) as pool:
        slow.may.clear()
        slow.sizes.clear()
        taken = pool.submit(predict, server, png())
        while not slow.sizes:
            time.sleep(0.01)
        server.servers[0].get_loop().call_soon_threadsafe(server.stop)
        while not server.gate.stopping or server.servers[0].is_serving():
            time.sleep(0.01)
        with pytest.raises(requests.ConnectionError):
            predict(server, png())
        assert server.gate.draining
        slow.may.set()
        assert taken.result().status_code == 200


def test_a_server_that_drains_is_not_ready_and_still_answers(tmp_path):
    with running(fake(folder=tmp_path)) as server:
        server.gate.draining = True
        assert requests.get(f"{server.url}/readyz").status_code == 503
        assert requests.get(f"{server.url}/healthz").status_code == 200
        assert predict(server, png()).status_code == 200
        server.gate.draining = False


# --- the command ----------------------------------------------------------------------------------


def test_models_are_named_after_their_folders(tmp_path):
    run, export = tmp_path / "cnn/seed0", tmp_path / "mine"
    for folder in (run, export):
        folder.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    (export / "model.onnx").write_bytes(b"")
    found = serve.named([str(run), str(export), f"b={export / 'model.onnx'}"])
    assert found == {"cnn_seed0": run, "mine": export, "b": export / "model.onnx"}
    assert list(serve.named([str(export / "model.onnx")])) == ["mine"]
    with pytest.raises(UserError, match="two models are called mine"):
        serve.named([str(export), str(export)])
    with pytest.raises(UserError, match="'my model' cannot be the name"):
        serve.named([f"my model={export}"])
    with pytest.raises(UserError, match="give NAME="):
        serve.named([str(tmp_path / "a b")])


def test_limits_that_contradict_each_other_are_refused():
    for limits in (Limits(queue=10, max_images=11), Limits(max_pending_mb=1)):
        with pytest.raises(UserError, match="ever fit|never fit"):
            serve.check_limits(limits)


def test_onnx_runtime_reports_to_nobody(tmp_path, monkeypatch):
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    (tmp_path / "model.onnx").write_bytes(b"broken")
    with pytest.raises(UserError):
        load(tmp_path)
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"


def test_a_model_that_cannot_be_run_ends_the_server(tmp_path, monkeypatch, capsys):
    def broken(images):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(serve, "loaded_from", lambda *given: fake(broken, tmp_path))
    assert serve.serve({"m": tmp_path}, Limits(), {}, "", "127.0.0.1", 0) == 1
    assert "no such kernel" in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(tmp_path):
    with (
        running(fake(folder=tmp_path)) as server,
        pytest.raises(UserError, match=f"--port={server.port}"),
    ):
        listen("127.0.0.1", server.port)


def test_the_command_serves_what_the_environment_names_and_exits_with_0(folder, tmp_path):
    environment = os.environ | {
        "ARCHCOMPARE_PORT": "0",
        "ARCHCOMPARE_MODELS": f"m={folder}",
        "ARCHCOMPARE_MAX_BATCH": "1",
    }
    command = [sys.executable, "-m", "deploy.serve", "--max_images=2"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        stop = threading.Timer(60, process.kill)
        stop.start()
        url = json.loads(process.stdout.readline())["url"]
        while requests.get(f"{url}/readyz").status_code == 503:
            time.sleep(0.05)
        assert requests.get(f"{url}/v1/models").json()["limits"]["max_images"] == 2
        kind = {"Content-Type": "image/png"}
        assert requests.post(f"{url}/v1/models/m/predict", png(), headers=kind).status_code == 200
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate()
        stop.cancel()
    assert process.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["event"] == "stopped"


# --- the page -------------------------------------------------------------------------------------


def test_the_page_holds_all_it_needs(server):
    page = requests.get(server.url)
    assert not re.search(r"""(src|href)=["'](?!data:)""", page.text) and "http" not in page.text
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert page.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is installed")
def test_the_page_classifies_photos_in_a_browser(tmp_path, predictor):
    photos = [tmp_path / "a <b>photo.png", tmp_path / "broken.png"]
    photos[0].write_bytes(png(5, size=(120, 90)))
    photos[1].write_bytes(b"broken")
    key, line = new_key("phone")
    keys = read_keys("", line)
    log = AnswerLog(tmp_path / "log.sqlite")
    with running(predictor, keys, log) as server, Browser(tmp_path / "profile", 420, 800) as page:
        page.call("Page.navigate", url=server.url)
        page.until("document.activeElement.id === 'key'")
        page.keys("a wrong key")
        page.until("document.getElementById('message').textContent.includes('does not know')")
        page.keys(key)
        page.until("!document.getElementById('work').hidden")
        page.choose("#file", photos[0])
        page.until("document.querySelectorAll('.result').length === 1")
        expected = predict(server, photos[0].read_bytes(), headers={"X-API-Key": key}).json()[
            "images"
        ][0]
        assert (
            page.run("document.querySelector('.result h2').textContent")
            == expected["top"][0]["class"]
        )
        cells = page.run(
            "[...document.querySelectorAll('.result td:last-child')].map(x => x.textContent)"
        )
        assert cells == [f"{100 * one['confidence']:.1f} %" for one in expected["top"]]
        assert page.run("!!document.querySelector('.review')") == expected["review"]
        page.until("[...document.querySelectorAll('.result img')].every(image => image.complete)")
        assert page.run(
            "[...document.querySelectorAll('.result img')].map(image => image.naturalWidth)"
        ) == [120, 16]
        assert page.run("document.querySelector('.bar').getBoundingClientRect().width") > 20
        page.choose("#file", *photos)
        page.until("document.querySelectorAll('.result').length === 2")
        assert "could not be read" in page.run(
            "document.querySelectorAll('.result')[1].textContent"
        )
        assert page.run("document.getElementById('message').textContent") == (
            f"2 photos, {int(expected['review'])} for a person to look at, 1 could not be read."
        )
        page.until("document.querySelectorAll('.result')[1].classList.contains('alone')")
        assert "names and answers are logged" in page.run("document.body.textContent")
        page.run("document.querySelector('.result button').click()")
        page.run("document.querySelector('.result select').value = 'dog'")
        page.run("document.querySelector('.result button').click()")
        page.until("document.querySelector('.result').textContent.includes('Noted: it is dog.')")
        assert list(log.read(predictor.version).correction) == ["dog"] * 3
        if folder := os.environ.get("ARCHCOMPARE_PICTURES"):  # to look at
            page.picture(Path(folder) / "page_two.png")
        assert page.run("document.querySelectorAll('.result i, .result b').length") == 0
        assert page.run("document.documentElement.scrollWidth") <= 420
        page.run(
            "{const all = new DataTransfer(); all.items.add(new File(['broken'], 'dropped.png'));"
            "document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: all, bubbles: true}))}"
        )
        page.until("document.querySelector('.result h2').textContent === 'dropped.png'")
        asked = [
            event["params"]["request"]["url"]
            for event in page.events
            if event["method"] == "Network.requestWillBeSent"
        ]
        assert all(url.startswith((server.url, "blob:", "data:", "about:")) for url in asked), asked
        # A refused key and a broken photo are errors of the network; the policy forbids nothing.
        entries = [
            event["params"]["entry"] for event in page.events if event["method"] == "Log.entryAdded"
        ]
        assert {entry["source"] for entry in entries} == {"network"}, entries
        if folder := os.environ.get("ARCHCOMPARE_PICTURES"):  # to look at
            page.picture(Path(folder) / "page.png")


# --- the log of answers, and feedback -------------------------------------------------------------


def test_answers_are_logged_without_images_and_corrected_by_feedback(tmp_path):
    file, model, image = tmp_path / "log.sqlite", fake(folder=tmp_path), png(7)
    with running(model, log=AnswerLog(file)) as server:
        (row,) = predict(server, image).json()["images"]
        url = f"{server.url}/v1/feedback"
        right = {"image": row["image"], "label": "dog"}
        answer = requests.post(url, json=[right, {"image": "0" * 64, "label": "cat"}])
        assert answer.json() == {"received": 2, "known": 1, "unknown": ["0" * 64]}
        assert requests.post(url, json=right).json() == {"received": 1, "known": 1}
        assert requests.post(url, json={"image": "0" * 64, "label": "cat"}).status_code == 404
        for wrong in (
            [],
            {},
            {"image": "0", "label": "cat"},
            right | {"label": "bird"},
            [right, 1],
            right | {"label": "\ud800"},
            right | {"label": [[]]},
            right | {"image": 0},
        ):
            assert requests.post(url, json=wrong).status_code == (400 if wrong == [] else 422)
        for many, status in (([1] * 200_000, 413), ([1] * 1001, 413), ([1] * 999, 422)):
            refused = requests.post(url, json=many)  # short, however long the body is
            assert refused.status_code == status and len(refused.content) < 200
        deep = requests.post(url, "[" * 100_000, headers={"Content-Type": "application/json"})
        assert deep.status_code == 422
        # A page of another site can send this without asking; it must not count.
        assert (
            requests.post(
                url, json.dumps(right), headers={"Content-Type": "text/plain"}
            ).status_code
            == 415
        )
        assert requests.get(f"{server.url}/readyz").json()["log"] == "ok"
    table = AnswerLog(file).read(model.version)
    (logged,) = table.to_dict("records")
    assert (logged["label"], logged["correction"]) == (row["top"][0]["class"], "dog")
    assert logged["image"] == hashlib.sha256(image).hexdigest() and logged["name"] == "0.png"
    assert logged["confidence"] == pytest.approx(row["top"][0]["confidence"], abs=1e-6)
    expected = model.answer(decode_image(model.facts, image)[None])["features"][0]
    np.testing.assert_allclose(logged["features"], expected, rtol=1e-6)
    assert image[:64] not in file.read_bytes()


def test_without_a_log_feedback_is_refused(tmp_path):
    with running(fake(folder=tmp_path)) as server:
        refused = requests.post(
            f"{server.url}/v1/feedback", json={"image": "0" * 64, "label": "cat"}
        )
        assert refused.status_code == 409 and "--log" in refused.json()["detail"]


class FullDisk(AnswerLog):
    """SQLite says what it says on a full disk: the file may not grow any more."""

    def _prepare(self, connection):
        super()._prepare(connection)
        connection.execute("PRAGMA max_page_count = 1")


def corrupt(file):
    log = AnswerLog(file)
    log.close()
    content = bytearray(file.read_bytes())
    content[100:] = b"\xa5" * (len(content) - 100)
    file.write_bytes(content)
    return log


@pytest.mark.parametrize("trouble", [FullDisk, corrupt])
def test_a_log_that_fails_stops_nothing_and_is_told_once(tmp_path, capsys, trouble):
    with running(fake(folder=tmp_path), log=trouble(tmp_path / "log.sqlite")) as server:
        for seed in range(60):
            assert predict(server, png(seed), png(seed + 100)).status_code == 200
            if server.service.recorder.trouble:
                break
        server.service.recorder._pool.submit(int).result()  # all is written, or not
        assert requests.get(f"{server.url}/readyz").json() | {"models": 0} == {
            "ready": True, "draining": False, "models": 0, "log": "failing",
        }  # fmt: skip
        failures = server.metrics.registry.get_sample_value("archcompare_log_failures_total")
        assert 0 < failures <= 120
        feedback = {"image": "0" * 64, "label": "cat"}
        server.service.recorder.log.correct = lambda pairs: 1 / 0
        refused = requests.post(f"{server.url}/v1/feedback", json=feedback)
        assert refused.status_code == 503 and refused.json() == {
            "detail": "the log cannot be written now"
        }
    events = [json.loads(line).get("event") for line in capsys.readouterr().out.splitlines()]
    assert events.count("answers are not logged") == 1
