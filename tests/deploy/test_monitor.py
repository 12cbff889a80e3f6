"""The monitor as it is used: photos are answered and logged, then compared with validation."""

import csv
import hashlib
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from analysis.answer_log import Answer, AnswerLog
from analysis.forward import cache_dir_of, load_images
from analysis.predict import predict, predictor_of
from analysis.runs import load_run
from configs import digits
from deploy import drift, monitor
from deploy import window as windows
from deploy.load import load
from deploy.monitor import read_time
from deploy.monitor_page import accuracy_of, described, effect_of, moved, numbers_of, verdict
from deploy.window import (
    check_origin,
    examine,
    read_corrections,
    read_window,
    reference_of,
    write_to_label,
)
from errors import UserError
from experiment.grid import expand
from tests.conftest import ROOT
from train import train_and_evaluate

COUNT = 120  # photos of each kind


@pytest.fixture(scope="module")
def run(cache_dir, tmp_path_factory):
    config = digits.get_config("linear")
    config.seeds = (0,)
    overrides = {"epochs": 3, "runtime.cache_dir": cache_dir, "runtime.tensorboard": False}
    folder = tmp_path_factory.mktemp("work") / "linear" / "seed0"
    train_and_evaluate(expand(config, overrides)[0].config, folder)
    return load_run(folder)


@pytest.fixture(scope="module")
def predictor(run):
    return load(run.path)


@pytest.fixture(scope="module")
def photos(run, tmp_path_factory):
    """Files of test images by kind: as they are, and darker."""
    folder, files = tmp_path_factory.mktemp("photos"), {"same": [], "dark": []}
    images = load_images(run, "test")[:COUNT]
    for kind, factor in (("same", 1), ("dark", 0.4)):
        for i, image in enumerate(images):
            file = folder / f"{kind}{i}.png"
            Image.fromarray((image * factor).astype(np.uint8)).save(file)
            files[kind].append(str(file))
    return files


@pytest.fixture(scope="module")
def logged(predictor, photos, tmp_path_factory):
    """A log of the unchanged photos."""
    path = tmp_path_factory.mktemp("log") / "log.sqlite"
    log = AnswerLog(path)
    broken = path.with_name("broken.png")
    broken.write_bytes(b"no image")
    rows = list(predict(predictor, [*photos["same"], str(broken)], log=log, batch_size=50))
    assert rows[-1]["error"]
    log.close()
    return path, rows[:-1]


@pytest.fixture
def log(logged, tmp_path):
    """A copy of it that a test may change."""
    return AnswerLog(shutil.copy(logged[0], tmp_path / "log.sqlite"))


def test_predict_logs_what_it_answers(logged, predictor, photos, run):
    path, rows = logged
    table = AnswerLog(path).read(predictor.version)
    assert table.name.tolist() == photos["same"] and set(table.source) == {"predict"}
    assert table.label.tolist() == [row["class"] for row in rows]
    np.testing.assert_allclose(table.confidence, [row["confidence"] for row in rows])
    digests = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in photos["same"]]
    assert table.image.tolist() == digests
    images = load_images(run, "test")[:COUNT]
    np.testing.assert_allclose(np.stack(table.features), predictor.answer(images)["features"], atol=1e-4)  # fmt: skip


def test_a_log_that_cannot_be_written_loses_no_prediction(predictor, photos, log, capsys):
    log.write = lambda answers: "the disk is full"
    assert len(list(predict(predictor, photos["same"][:3], log=log))) == 3
    assert "3 answers are not logged: the disk is full" in capsys.readouterr().err


def test_unchanged_photos_raise_no_alarm_and_each_image_counts_once(run, predictor, log, photos):
    list(predict(predictor, photos["same"][:30], log=log))
    other = Answer(time.time(), "f" * 16, "another", "1", 0.5, np.zeros(32), "0" * 64)
    log.write([other])
    found = examine(run, predictor, read_window(log, predictor), 0.05)
    lines = list(described(found))
    assert [test.name for test in found.tests] == ["class mix", "confidence", "features"]
    assert lines[0].startswith("window: 120 images") and lines[-1].startswith(
        "No alarm: class mix,"
    )
    assert "could not be compared" not in lines[-1]
    assert "left out: 30 earlier answers to the same images count once" in lines
    assert f"left out: 1 answers of version {'f' * 16} (another)" in lines


def test_the_command_finds_dark_photos_and_writes_the_page(run, predictor, photos, tmp_path):
    path = tmp_path / "log.sqlite"
    list(predict(predictor, photos["dark"], log=AnswerLog(path)))
    table = tmp_path / "corrections.csv"
    labels = [run.class_names[i] for i in run.test["labels"][:20]]
    names = [f"{name},{label}" for name, label in zip(photos["dark"], labels, strict=False)]
    table.write_text("\n".join(["image,label", *names]))
    done = subprocess.run(
        [sys.executable, "-m", "deploy.monitor", run.path, path, f"--corrections={table}", "--since=1h",
         f"--export={tmp_path}", f"--output={tmp_path / 'page'}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "corrections: 20 images" in done.stdout and "Alarm by" in done.stdout
    assert "Of 20 corrected images" in done.stdout and ": ALARM" in done.stdout
    page = (tmp_path / "page" / "index.html").read_text()
    assert "Alarm by" in page and page.count("data:image/svg+xml;base64") == 4
    assert "src=\"http" not in page and "href=\"http" not in page  # fmt: skip
    content = json.loads((tmp_path / "page" / "monitor.json").read_text())
    assert {t["name"]: t["alarm"] for t in content["tests"]}["features"] and content["alarm"]
    assert content["verdict"] in done.stdout and content["rate"] == 0.05
    assert content["corrections"]["images"] == 20 and content["not_tested"] == {}
    assert content["window"]["first"] <= content["window"]["last"] <= content["made"]
    assert sum(row["window"] for row in content["classes"]) == pytest.approx(1)
    assert "source predict" in done.stdout and "source serve" not in done.stdout
    rows = list(csv.DictReader((tmp_path / "to_label.csv").read_text().splitlines()))
    confidences = [float(row["confidence"]) for row in rows]
    assert len(rows) == COUNT - 20 and confidences == sorted(confidences)
    assert not {row["name"] for row in rows} & set(photos["dark"][:20])


def test_the_reference_is_kept_and_without_images_or_it_features_are_left_out(
    run, predictor, log, monkeypatch
):
    first, lack = reference_of(run, predictor)
    assert lack == "" and first.features.shape == (len(first), 32)
    np.testing.assert_array_equal(first.classes, run.validation["logits"].argmax(axis=1))

    def gone(*_):
        raise UserError("the data are gone")

    monkeypatch.setattr(windows, "load_images", gone)
    again, lack = reference_of(run, predictor)
    assert lack == "" and (again.features == first.features).all()
    (file,) = Path(cache_dir_of(run), "answers").glob(f"{predictor.version}-*.npz")
    file.write_bytes(b"damaged")
    found = examine(run, predictor, read_window(log, predictor), 0.05)
    assert [test.name for test in found.tests] == ["class mix", "confidence"]
    assert "the data are gone" in found.lack and found.lack in list(described(found))
    assert "; features could not be compared." in verdict(found)
    numbers = numbers_of(found)
    assert numbers["not_tested"]["features"] == found.lack and not numbers["alarm"]
    assert numbers["not_tested"]["accuracy"].startswith("0 corrected images")
    with pytest.raises(UserError, match="--data=elsewhere cannot be used: the data are gone"):
        reference_of(run, predictor, "elsewhere")
    np.testing.assert_allclose(found.reference.confidence, first.confidence, atol=1e-5)
    file.unlink()


def test_the_classes_that_moved_come_first(run, predictor, log):
    found = examine(run, predictor, read_window(log, predictor), 0.05)
    found.window.sample.classes[:60] = 7
    table = moved(found)
    assert table["class"][0] == run.class_names[7] and table.z[0] > 5
    assert table.validation.sum() == pytest.approx(1) == table.window.sum()


def test_a_filled_in_list_is_taken_back(run, predictor, log, tmp_path):
    file = write_to_label(read_window(log, predictor), tmp_path)
    rows = list(csv.DictReader(file.read_text().splitlines()))
    for row in rows[:4]:
        row["label"] = "3"
    with open(file, "w", newline="") as out:
        csv.DictWriter(out, rows[0], delimiter=";").writerows([dict(zip(rows[0], rows[0], strict=True)), *rows])  # fmt: skip
    pairs = read_corrections(file, log, run.class_names)
    assert pairs == [(row["image"], "3") for row in rows[:4]] and log.correct(pairs) == 4
    left = write_to_label(read_window(log, predictor), tmp_path)
    assert len(left.read_text().splitlines()) == 1 + COUNT - 4


def test_capitals_of_classes_may_differ_and_near_names_are_asked_for(
    predictor, log, photos, tmp_path
):
    table = tmp_path / "corrections.csv"
    write = lambda label: table.write_text(f"image,label\n{photos['same'][0]},{label}\n")  # noqa: E731
    write("SEA")
    assert [label for _, label in read_corrections(table, log, ["sea", "street"])] == ["sea"]
    for label, classes, question in (
        ("streat", ["sea", "street"], "did you mean 'street'"),
        ("SEA", ["sea", "Sea"], "did you mean 'sea' or 'Sea'"),
    ):
        write(label)
        with pytest.raises(UserError, match=question):
            read_corrections(table, log, classes)
    table.write_text("image,label\nx,sea\n", encoding="utf-16")
    with pytest.raises(UserError, match="save it as CSV UTF-8"):
        read_corrections(table, log, ["sea"])
    with pytest.raises(UserError, match=r"nofile\.csv does not exist"):
        read_corrections(tmp_path / "nofile.csv", log, ["sea"])


def test_a_name_is_no_formula_in_a_spreadsheet(predictor, log, tmp_path):
    name = '=HYPERLINK("http://x")'
    log.write([Answer(time.time(), predictor.version, "m", "1", 0.0, np.zeros(32), "a" * 64, name)])
    file = write_to_label(read_window(log, predictor), tmp_path)
    first = next(csv.DictReader(file.read_text().splitlines()))
    assert first["name"] == f"'{name}" and first["source"] == "serve"
    with open(file, "w", newline="") as out:
        csv.writer(out).writerows([["image", "label"], [first["name"], "3"]])
    assert read_corrections(file, log, ["3"]) == [("a" * 64, "3")]


def test_a_model_of_another_run_is_refused(run, predictor, tmp_path):
    """Its answers would be compared with what RUN says."""
    check_origin(predictor, run)
    facts = predictor_of(run).facts | {"run": run.name, "run_version": predictor.version}
    exported = replace(
        predictor, facts=facts, file=Path(shutil.copy(run.path / "config.json", tmp_path))
    )
    assert exported.version != predictor.version
    check_origin(exported, run)
    facts["run_version"] = "0" * 16  # fitted elsewhere: the same but for the last digits
    facts["temperature"] *= 1 + 1e-9
    check_origin(exported, run)
    facts["temperature"] *= 1.1
    with pytest.raises(UserError, match=r"config\.json is not of .*seed0: as RUN, give"):
        check_origin(exported, run)


def test_few_corrections_say_nothing_and_effects_have_their_direction(
    run, predictor, log, tmp_path
):
    table = log.read(predictor.version)
    log.correct([(table.image[0], run.class_names[0])])
    found = examine(run, predictor, read_window(log, predictor), 0.05)
    assert "1 corrected image of 10" in accuracy_of(found.reference, found.window.sample)
    texts = [effect_of(drift.Test("accuracy", 20, 1.0, lost, 0.1)) for lost in (0.016, -0.016)]
    assert texts[0].startswith("1.6 points less than") and texts[1].startswith(
        "1.6 points more than"
    )


def test_mistakes_in_corrections_are_named_by_line_and_none_is_taken(run, predictor, log, photos, tmp_path):  # fmt: skip
    good, table = photos["same"][0], tmp_path / "corrections.csv"
    again = Answer(time.time(), predictor.version, "linear", "1", 0.5, np.zeros(32), "1" * 64, good)
    log.write([again])
    second = photos["same"][1]
    lines = [f"{second},0", "absent.png,0", f"{second},cat", f"{second},1", f"{good},0", "x,"]
    table.write_text("\n".join(["image,label", *lines]))
    with pytest.raises(UserError) as error:
        read_corrections(table, log, run.class_names)
    text = str(error.value)
    assert (
        "line 3: no image 'absent.png'" in text and "line 4: class 'cat' is not one of 0," in text
    )
    assert f"line 5: {second} is 0 in an earlier line, and 1 here" in text
    assert "line 6: 2 images are called" in text and "line 7" not in text
    table.write_text("file,label\na,b\n")
    with pytest.raises(UserError, match="without the columns image"):
        read_corrections(table, log, run.class_names)


def test_a_window_without_enough_images_names_the_versions_that_are_there(predictor, log):
    log.write([Answer(1.0, "f" * 16, "another", "1", 0.5, np.zeros(32), "0" * 64)])
    with pytest.raises(
        UserError, match=r"0 images .* 20 are needed; its versions: ffffffffffffffff"
    ):
        read_window(log, predictor, until=100)
    with pytest.raises(UserError, match="19 images"):
        read_window(log, predictor, last=19)
    log.write([Answer(1.0, predictor.version, "m", "1", 0.5, np.zeros(32), "1" * 64)])
    assert log.versions().answers.tolist() == [1, COUNT + 1]
    versions = read_window(log, predictor, last=30).versions  # of its time, not of the whole log
    assert versions[["version", "answers"]].values.tolist() == [[predictor.version, 30]]


def test_a_page_never_lies_among_other_results(run, tmp_path):
    with pytest.raises(UserError, match="--output=.*seed0 is the directory of a run"):
        monitor._folder(run.path, "--output")
    (tmp_path / "index.html").write_text("a report")
    with pytest.raises(UserError, match="holds another page"):
        monitor._folder(tmp_path, "--output")


def test_what_nobody_foresaw_is_no_alarm(monkeypatch):
    monkeypatch.setattr(monitor, "main", lambda argv: 1 // 0)
    assert monitor.guarded([]) == 2


def test_times_are_read():
    assert read_time("2026-11-26", "since", 0) == 1795651200
    assert read_time("2026-11-26T01:00+01:00", "since", 0) == 1795651200
    assert read_time("1.5h", "since", 6000) == 600 and read_time("7d", "since", 604800) == 0
    with pytest.raises(UserError, match="--until='yesterday' is no time"):
        read_time("yesterday", "until", 0)
