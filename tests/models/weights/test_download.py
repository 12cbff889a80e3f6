"""Files are fetched once, whole, as published; without a network the message says what to do."""

import errno
import hashlib
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from errors import UserError
from models.weights import download
from models.weights.download import digest, hub_file, url_file, weights_folder

CONTENT = np.random.default_rng(0).bytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MD5 = hashlib.md5(CONTENT).hexdigest()
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_FILE = f"/timm/tiny/resolve/{COMMIT}/model.safetensors"


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT at /a/model.h5 and, in the manner of the Hugging Face Hub, at HUB_FILE."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests = []  # (method, path, value of Range)
        self.content = CONTENT
        self.cuts = []  # after how many bytes the next answers are cut
        self.ranges = True

    @property
    def gets(self) -> list[str | None]:
        """The Range of every GET."""
        return [given for method, _, given in self.requests if method == "GET"]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers GET and HEAD, with Range as the server is set to."""

    def do_GET(self):
        self.server.requests.append((self.command, self.path, self.headers["Range"]))
        if self.path not in ("/a/model.h5", HUB_FILE):
            if "resolve" in self.path:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.end_headers()
            else:
                self.send_error(404)
            return
        content, start = self.server.content, 0
        if self.headers["Range"] and self.server.ranges:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if start and start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            end = len(content) - 1
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            cut = self.server.cuts.pop(0) if self.server.cuts else len(content)
            self.wfile.write(content[start:][:cut])

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def closed(monkeypatch) -> str:
    """The address of a port that nobody listens on; it is not tried again and again."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits {seconds} s"))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder of weights, and an environment that names no proxy and no hub."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ARCHCOMPARE_WEIGHTS", str(tmp_path / "weights"))
    download._digest_of.cache_clear()  # as in a new process
    return tmp_path / "weights"


def test_the_folder(monkeypatch, folder):
    assert weights_folder() == folder
    monkeypatch.setenv("ARCHCOMPARE_WEIGHTS", "~/elsewhere")
    assert weights_folder() == Path.home() / "elsewhere"
    monkeypatch.delenv("ARCHCOMPARE_WEIGHTS")
    assert weights_folder() == Path.home() / ".cache/archcompare/weights"


def test_the_hub_library_is_imported_only_when_needed():
    """Importing it takes longer than most commands."""
    script = "import sys, models.weights.download; sys.exit(bool({'huggingface_hub', 'requests'} & set(sys.modules)))"
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", script], cwd=root).returncode == 0


# ------------------------------------------------------------------------------------------- URL


def test_a_file_is_fetched_once_and_verified(server, folder):
    path = url_file(f"{server.url}/a/model.h5", sha256=SHA256.upper(), md5=MD5)
    assert path == folder / server.url.removeprefix("http://").replace(":", "_") / "a/model.h5"
    assert path.read_bytes() == CONTENT
    assert digest(path, "sha256") == SHA256 and digest(path, "md5") == MD5
    assert url_file(f"{server.url}/a/model.h5", md5=MD5) == path
    assert server.gets == [None]
    assert {file.name for file in path.parent.iterdir()} == {"model.h5", "model.h5.lock"}


def test_a_finished_file_is_hashed_once_a_process(server, monkeypatch):
    hashed = []
    original = download.digest
    monkeypatch.setattr(
        download, "digest", lambda path, name: hashed.append(name) or original(path, name)
    )
    for _ in range(3):
        url_file(f"{server.url}/a/model.h5", sha256=SHA256)
    assert hashed == ["sha256"]
    download._digest_of.cache_clear()
    url_file(f"{server.url}/a/model.h5", sha256=SHA256)
    assert hashed == ["sha256", "sha256"]


def test_a_cut_transfer_goes_on_where_it_stopped(server, folder):
    first, second = server.cuts = [15 * 2**16, 5 * 2**16]
    for _ in range(2):
        with pytest.raises(UserError, match="more expected"):
            url_file(f"{server.url}/a/model.h5", sha256=SHA256)
        assert not list(folder.rglob("model.h5"))
    assert url_file(f"{server.url}/a/model.h5", sha256=SHA256).read_bytes() == CONTENT
    assert server.gets == [None, f"bytes={first}-", f"bytes={first + second}-"]


def test_a_server_that_ignores_ranges(server):
    server.cuts, server.ranges = [1_000_000], False
    with pytest.raises(UserError, match="more expected"):
        url_file(f"{server.url}/a/model.h5", sha256=SHA256)
    assert url_file(f"{server.url}/a/model.h5", sha256=SHA256).read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_fetched_anew(server, folder):
    part = folder / server.url.removeprefix("http://").replace(":", "_") / "a/model.h5.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT + b"more")
    assert url_file(f"{server.url}/a/model.h5", sha256=SHA256).read_bytes() == CONTENT


def test_a_full_disk(server, folder, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "replace", mock.Mock(side_effect=full))
    with pytest.raises(UserError, match="No space left on device") as caught:
        url_file(f"{server.url}/a/model.h5", sha256=SHA256)
    assert "Make room there" in str(caught.value) and str(folder) in str(caught.value)


def test_a_wrong_digest(server):
    server.content = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    for names in ({"sha256": SHA256}, {"md5": MD5}):
        with pytest.raises(UserError) as caught:
            url_file(f"{server.url}/a/model.h5", **names)
        ((algorithm, expected),) = names.items()
        actual = hashlib.new(algorithm, server.content).hexdigest()
        assert f"{algorithm} {expected} was expected, it has {actual}" in str(caught.value)
    server.content = CONTENT
    path = url_file(f"{server.url}/a/model.h5", sha256=SHA256)
    assert path.read_bytes() == CONTENT
    assert server.gets == [None] * 3


def test_a_file_that_was_damaged_later_is_moved_aside(server):
    path = url_file(f"{server.url}/a/model.h5", sha256=SHA256)
    path.write_bytes(b"x")
    with pytest.raises(UserError, match=r"model\.h5\.damaged; the next run fetches it anew"):
        url_file(f"{server.url}/a/model.h5", sha256=SHA256)
    assert not path.exists()
    assert url_file(f"{server.url}/a/model.h5", sha256=SHA256).read_bytes() == CONTENT


@pytest.mark.parametrize("name", ["/no/such.h5", "/b.h5"])
def test_a_missing_file(server, name):
    with pytest.raises(UserError, match="404") as caught:
        url_file(f"{server.url}{name}")
    assert f"{server.url}{name}" in str(caught.value)


def test_no_network(closed, folder):
    with pytest.raises(UserError) as caught:
        url_file(f"{closed}/a/model.h5", sha256=SHA256)
    path = folder / closed.removeprefix("http://").replace(":", "_") / "a/model.h5"
    for text in (f"{closed}/a/model.h5", str(path), "family:path"):
        assert text in str(caught.value)
    path.write_bytes(CONTENT)  # as the message says
    assert url_file(f"{closed}/a/model.h5", sha256=SHA256) == path


def test_a_silent_server(monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(UserError, match="timed out"):
            url_file(f"http://127.0.0.1:{silent.getsockname()[1]}/model.h5")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "http://host/", "http://host/../a", "a.h5"])
def test_no_address_of_a_file(url):
    with pytest.raises(UserError, match="give an http or https URL"):
        url_file(url)


def test_a_folder_that_cannot_be_written(server, folder):
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("a file")
    with pytest.raises(UserError, match="ARCHCOMPARE_WEIGHTS"):
        url_file(f"{server.url}/a/model.h5")


def test_only_one_of_many_fetches(server):
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: url_file(f"{server.url}/a/model.h5"), range(8)))
    assert len(set(paths)) == 1 and paths[0].read_bytes() == CONTENT
    assert server.gets == [None]


# ------------------------------------------------------------------------------------------- hub


def fetch(sha256: str = SHA256, filename: str = "model.safetensors") -> Path:
    return hub_file("timm/tiny", filename, COMMIT, sha256)


def test_a_file_of_the_hub(server, folder, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    path = fetch()
    assert path.is_relative_to(folder) and path.read_bytes() == CONTENT
    count = len(server.requests)
    assert fetch() == path
    assert len(server.requests) == count
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")  # no longer needed
    assert fetch() == path


def test_a_cut_transfer_from_the_hub_is_tried_again(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.cuts = [1_000_000]
    assert fetch().read_bytes() == CONTENT
    assert len(server.gets) == 2  # it resumes by chunks of 10 MB


def test_a_damaged_file_of_the_hub_is_fetched_anew(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    fetch().write_bytes(b"x")
    with pytest.raises(UserError, match="fetches it anew"):
        fetch()
    assert fetch().read_bytes() == CONTENT
    with pytest.raises(UserError, match="is not what was published"):
        fetch(sha256="0" * 64)


def test_a_file_put_there_by_hand(folder, monkeypatch, closed):
    monkeypatch.setenv("HF_ENDPOINT", closed)
    with pytest.raises(UserError) as caught:
        fetch()
    path = folder / "timm--tiny" / COMMIT / "model.safetensors"
    for text in (f"{closed}{HUB_FILE}", str(path), "family:path"):
        assert text in str(caught.value)
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert fetch() == path


def test_a_missing_file_of_the_hub(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    with pytest.raises(UserError, match="404"):
        fetch(filename="other.safetensors")
    with pytest.raises(UserError, match="Check the name"):
        hub_file("a/b/c", "model.safetensors", COMMIT)


def test_the_hub_switched_off(server, monkeypatch):
    import huggingface_hub

    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="put the file at"):
        fetch()
    assert server.requests == []
