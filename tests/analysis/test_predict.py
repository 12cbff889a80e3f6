import csv
import io
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy.special import betaincinv

from analysis import predict as command
from analysis.answers import answering
from analysis.confidence import fit_temperature, softmax
from analysis.predict import COLUMNS, find_images, load_predictor, open_output, predict, write_rows
from analysis.runs import load_run
from configs import digits
from errors import UserError
from experiment.grid import expand
from models import create_model
from tests.conftest import ROOT
from train import train_and_evaluate

NAMES = ["Haus, groß", 'say "x"', "été | 1"]  # commas, quotes, spaces, letters beyond ASCII
TARGET = 0.95


def photo(seed: int, label: int) -> Image.Image:
    """A noisy photo of random size, brighter in the channel of its class; some are transparent."""
    draw = np.random.default_rng(seed)
    height, width = draw.integers(9, 20, 2)
    pixels = draw.integers(0, 200, (height, width, 4), dtype=np.uint8)
    pixels[..., label] += 55
    return Image.fromarray(pixels if seed % 3 else pixels[..., :3])


@pytest.fixture(scope="module")
def moved(cache_dir, tmp_path_factory):
    """A run directory and its photos after both were moved away from where the run knew them."""
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    for label, name in enumerate(NAMES):
        (first / "data" / name).mkdir(parents=True)
        for i in range(20):
            photo(100 * label + i, label).save(first / "data" / name / f"{i}.png")
    overrides = {
        "epochs": 3,
        "runtime.cache_dir": cache_dir,
        "runtime.tensorboard": False,
        "data.source": "folder",
        "data.path": str(first / "data"),
        "data.resize": "crop",
        "data.interpolation": "lanczos",
        "data.background": (1, 200, 3),
    }
    config = digits.get_config("linear")
    config.seeds = (0,)
    train_and_evaluate(expand(config, overrides)[0].config, first / "run")
    shutil.move(first / "run", second / "my run")
    shutil.move(first / "data", second / "photos")
    shutil.rmtree(first)
    return second / "my run", second / "photos"


@pytest.fixture(scope="module")
def predictor(moved):
    return load_predictor(moved[0], TARGET)


@pytest.fixture(scope="module")
def files(moved):
    """The photos of the run's test part."""
    return [str(moved[1] / name) for name in load_run(moved[0]).test["ids"]]


# --- predictions ----------------------------------------------------------------------------------


def test_files_give_the_classes_and_probabilities_that_the_run_saved(moved, predictor, files):
    run = load_run(moved[0])
    rows = list(predict(predictor, files, TARGET))
    powers = np.exp(run.test["logits"].astype(float) / predictor.facts["temperature"])
    expected = powers / powers.sum(axis=1, keepdims=True)
    order = np.argsort(-expected, axis=1)
    assert [row["path"] for row in rows] == files
    for rank, name in enumerate(("class", "second", "third")):
        assert [row[name] for row in rows] == [NAMES[label] for label in order[:, rank]]
        column = "confidence" if name == "class" else f"{name}_confidence"
        found = [row[column] for row in rows]
        np.testing.assert_allclose(found, np.sort(expected, axis=1)[:, -1 - rank], atol=1e-6)
    assert {row["error"] for row in rows} == {""}
    assert len({row["class"] for row in rows}) == 3  # or else the comparison would say little


def test_confidences_are_scaled_by_the_temperature_of_validation_images(moved, predictor):
    known = load_run(moved[0]).validation
    assert predictor.facts["temperature"] == fit_temperature(known["logits"], known["labels"])


def test_size_of_batches_does_not_matter(predictor, files):
    whole = list(predict(predictor, files, TARGET, batch_size=64))
    for size in (1, 4):
        parts = list(predict(predictor, files, TARGET, batch_size=size))
        assert [(r["path"], r["class"]) for r in parts] == [(r["path"], r["class"]) for r in whole]
        np.testing.assert_allclose(
            [row["confidence"] for row in parts], [row["confidence"] for row in whole], atol=1e-5
        )
    assert list(predict(predictor, [], TARGET)) == []


def test_broken_images_have_rows_with_their_error_and_disturb_no_other(predictor, files, tmp_path):
    bad = {"cut.png": None, "text.jpg": b"hello", "empty.gif": b"", "absent.png": None}
    with open(files[0], "rb") as file:
        bad["cut.png"] = file.read()[:-60]
    for name, content in bad.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    paths = [str(tmp_path / name) for name in bad]
    mixed = [path for pair in zip(paths, files, strict=False) for path in pair]
    rows = list(predict(predictor, mixed, TARGET, batch_size=3))
    for row in rows[::2]:
        assert row["review"] == "yes" and row["error"] and "\n" not in row["error"]
        assert {row[name] for name in COLUMNS[1:-2]} == {""}
    assert "no image" in rows[2]["error"] and "No such file" in rows[6]["error"]
    alone = predict(predictor, files[:4], TARGET, batch_size=3)
    assert [row["class"] for row in rows[1::2]] == [row["class"] for row in alone]


def test_two_classes_leave_the_third_column_empty(predictor, files):
    model = create_model("linear", 2, image_size=8)
    facts = predictor.facts | {"class_names": ["a", "b"]}
    two = replace(predictor, answer=answering(model), facts=facts)
    row = next(predict(two, files[:1], TARGET))
    assert {row["class"], row["second"]} == {"a", "b"}
    assert row["third"] == row["third_confidence"] == ""
    assert row["confidence"] + row["second_confidence"] == pytest.approx(1)


# --- review ---------------------------------------------------------------------------------------


def test_answers_at_the_threshold_pass_and_those_below_are_reviewed(predictor, files):
    confidences = [row["confidence"] for row in predict(predictor, files, TARGET)]
    middle = sorted(confidences)[len(confidences) // 2]
    for confidence in (0.0, middle, math.inf):
        known = [{"target": 0.5, "confidence": confidence if confidence < math.inf else None}]
        facts = predictor.facts | {"review_thresholds": known}
        rows = list(predict(replace(predictor, facts=facts), files, 0.5))
        expected = ["no" if value >= confidence else "yes" for value in confidences]
        assert [row["review"] for row in rows] == expected
        if confidence == middle:
            assert set(expected) == {"yes", "no"}


def test_the_threshold_keeps_its_promise_by_validation_images(moved, predictor, tmp_path):
    run = load_run(shutil.copytree(moved[0], tmp_path / "run"))
    random = np.random.default_rng(0)
    logits = random.normal(size=(600, 3)).astype(np.float32) * 4
    labels = (softmax(logits).cumsum(axis=1) < random.random((600, 1))).sum(axis=1)
    np.savez(
        run.path / "predictions_validation.npz", ids=np.arange(600), labels=labels, logits=logits
    )
    confidence = softmax(logits, fit_temperature(logits, labels)).max(axis=1)
    right = logits.argmax(axis=1) == labels
    for target in (0.9, 0.95):
        least = load_predictor(run.path, target).threshold(target)
        kept = confidence >= least - 1e-9
        low = betaincinv(right[kept].sum(), (~right)[kept].sum() + 1, 0.1)  # Clopper and Pearson
        assert 30 < kept.sum() < 600 and right[kept].mean() > low >= target
    with pytest.raises(UserError, match="thresholds for 0.95"):
        predictor.threshold(0.9)


# --- sets of classes ------------------------------------------------------------------------------


def with_sets(predictor, least, temperature=2.0):
    levels = [{"level": 0.9, "least": None}, {"level": 0.95, "least": least}]
    sets = {"temperature": temperature, "images": 15, "levels": levels}
    names = ["a;b", '"q"', "c, d\ne"]
    return replace(predictor, facts=predictor.facts | {"sets": sets, "class_names": names})


def test_sets_can_be_read_whatever_names_hold(moved, predictor, files, tmp_path):
    made = with_sets(predictor, 0.3)
    rows = list(predict(made, files, TARGET))
    with open_output(str(tmp_path / "t.csv")) as file:
        write_rows(file, rows)
    expected = softmax(load_run(moved[0]).test["logits"], 2.0)
    sizes = set()
    with open(tmp_path / "t.csv", newline="", encoding="utf-8") as file:
        for row, own in zip(csv.DictReader(file), expected, strict=True):
            (names,) = csv.reader(io.StringIO(row["set95"], newline=""), delimiter=";")
            best = np.argsort(-own)
            assert names == [made.facts["class_names"][k] for k in best if own[k] >= 0.3]
            sizes.add(len(names))
    assert len(sizes) > 1


def test_what_cannot_be_promised_is_said(predictor, files):
    silent = with_sets(predictor, 0.3)
    known = [{"target": TARGET, "confidence": 0.5}]
    silent.facts["review_thresholds"] = known
    assert silent.not_promised(TARGET) == ""
    few = with_sets(predictor, None)
    few.facts["review_thresholds"] = [{"target": TARGET, "confidence": None}]
    assert {row["set95"] for row in predict(few, files, TARGET)} == {""}
    assert {row["review"] for row in predict(few, files, TARGET)} == {"yes"}
    told = few.not_promised(TARGET)
    assert "every image is to review" in told and "15 validation images are too few" in told
    del few.facts["sets"]  # as older versions exported
    assert {row["set95"] for row in predict(few, files, TARGET)} == {""}
    assert "older than sets" in few.not_promised(TARGET)


# --- which files ----------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    """Files of all kinds; find_images reads none of them."""
    for name in ("b.PNG", "a.jpg", "notes.txt", "sub/c.webp", "sub/deep/d.tiff", "[1].png",
                 ".hidden.png", "sub/.cache/e.png", "empty/readme"):  # fmt: skip
        path = tmp_path / "t" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "t"


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["."], ["[1].png", "a.jpg", "b.PNG", "sub/c.webp", "sub/deep/d.tiff"]),
        (["*"], ["[1].png", "a.jpg", "b.PNG", "sub/c.webp", "sub/deep/d.tiff"]),
        (["**/*.[wt]*"], ["sub/c.webp", "sub/deep/d.tiff"]),
        (["?.jpg", "sub"], ["a.jpg", "sub/c.webp", "sub/deep/d.tiff"]),
        (["[1].png"], ["[1].png"]),  # a name, although it is also a pattern
        (["notes.txt"], ["notes.txt"]),  # whoever names a file means it
        ([".hidden.png"], [".hidden.png"]),
        (["sub/c.webp", "./sub/../sub/c.webp", "sub", "link.webp"], ["sub/c.webp", "sub/deep/d.tiff", "link.webp"]),
    ],
)  # fmt: skip
def test_files_folders_and_patterns_name_each_image_once(tree, monkeypatch, arguments, expected):
    monkeypatch.chdir(tree)
    if "link.webp" in arguments:
        os.symlink("sub/c.webp", "link.webp")
    assert [os.path.normpath(path) for path in find_images(arguments)] == expected
    assert find_images([str(tree / name) for name in arguments])[0].startswith(str(tree))


def test_what_a_folder_holds_beside_images_is_counted_and_named(tree, capsys):
    (tree / "sub" / "film.mov").write_bytes(b"film")
    find_images([str(tree / "sub")])
    told = capsys.readouterr().err
    assert "left out: 1 files" in told and "film.mov" in told
    find_images([str(tree / "a.jpg")])
    assert not capsys.readouterr().err


def test_folders_in_folders_are_left_out_on_demand(tree):
    found = find_images([str(tree)], recursive=False)
    assert [os.path.basename(path) for path in found] == ["[1].png", "a.jpg", "b.PNG"]


@pytest.mark.parametrize(
    "argument, message",
    [
        ("absent.png", "does not exist"),
        ("*.bmp", "matches nothing"),
        ("empty", "holds no image"),
        ("*.txt", "holds no image"),
    ],
)
def test_arguments_without_images_are_refused_by_name(tree, monkeypatch, argument, message):
    monkeypatch.chdir(tree)
    with pytest.raises(UserError, match=message) as caught:
        find_images(["a.jpg", argument])
    assert argument in str(caught.value)


# --- the table and the command --------------------------------------------------------------------


def test_the_table_survives_any_name(tmp_path):
    odd = os.fsdecode(b"caf\xe9 \xff.png")  # bytes that are no text
    names = ['a, "b"', "zwei\nZeilen", "été", odd]
    rows = [dict.fromkeys(COLUMNS, "") | {"path": name, "class": name} for name in names]
    rows[0] |= {"confidence": 0.1234567, "review": "yes", "error": "x"}
    with open_output(str(tmp_path / "t.csv")) as file:
        counts = write_rows(file, rows)
    assert counts == {"images": 4, "review": 1, "error": 1}
    text = (tmp_path / "t.csv").read_bytes().decode("utf-8", "surrogateescape")
    read = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [row["class"] for row in read] == [row["path"] for row in read] == names
    assert read[0]["confidence"] == "0.123457" and list(read[0]) == list(COLUMNS)


def test_an_output_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("old")
    with pytest.raises(RuntimeError), open_output(str(path)) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    (tmp_path / "link").symlink_to(path)
    with open_output(str(tmp_path / "link")) as file:
        file.write("new")
    assert path.read_text() == "new" and (tmp_path / "link").is_symlink()


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Returns a function: the exit code of the command with arguments, flags as by default."""

    def run(*arguments, output=None, target=TARGET, log=""):
        flags = {"OUTPUT": output or str(tmp_path / "out.csv"), "TARGET": target,
                 "BATCH_SIZE": 64, "RECURSIVE": True, "LOG": log}  # fmt: skip
        for name, value in flags.items():
            monkeypatch.setattr(command, name, SimpleNamespace(value=value), raising=False)
        return command.main(["predict", *map(str, arguments)])

    return run


def test_mistakes_are_told_before_anything_is_computed(moved, call, tmp_path, monkeypatch):
    run, photos = moved
    monkeypatch.setattr(command, "predict", None)  # calling it would fail
    (tmp_path / "program").mkdir()
    for name in ("model.onnx", "other.stablehlo", "README.md"):
        (tmp_path / "program" / name).write_bytes(b"program")
    for arguments, options, message in (
        ((run,), {}, "usage"),
        ((tmp_path / "absent", photos), {}, "absent is not the directory of a complete run"),
        ((tmp_path / "program", photos), {}, "model.onnx is a compiled model, which deploy.serve"),
        ((tmp_path / "program/other.stablehlo", photos), {}, "export that with --format=safetens"),
        ((tmp_path / "program/README.md", photos), {}, "README.md is no file of weights"),
        ((run, tmp_path / "absent.png"), {}, "absent.png does not exist"),
        ((run, photos), {"output": str(tmp_path / "no/t.csv")}, "cannot write --output="),
        ((run, photos), {"output": str(tmp_path)}, "is no file"),
        ((run, photos), {"output": "/dev/null"}, "is no file"),
        ((run, photos), {"log": str(photos / NAMES[0] / "3.png")}, "no log of answers"),
    ):
        with pytest.raises(UserError, match=message):
            call(*arguments, **options)
    assert list(tmp_path.iterdir()) == [tmp_path / "program"]


def test_command_writes_a_row_an_image_and_says_by_its_exit_code(moved, call, tmp_path, capsys):
    run, photos = moved
    assert call(run, photos, photos / NAMES[0] / "3.png") == 0
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len({row["path"] for row in rows}) == len(rows) == 60
    assert {row["class"] for row in rows} == set(NAMES)
    review = sum(row["review"] == "yes" for row in rows)
    told = capsys.readouterr().err
    assert f"60 images, {review} to review, of which 0" in told
    assert "no confidence promises" in told  # by so few validation images
    (tmp_path / "bad.png").write_bytes(b"bad")
    arguments = [sys.executable, "-m", "analysis.predict", run, photos / NAMES[1], tmp_path]
    arguments.append(f"--log={tmp_path / 'log.sqlite'}")
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True)
    assert result.returncode == 1, result.stderr
    streamed = list(csv.DictReader(io.StringIO(result.stdout.decode(), newline="")))
    assert [r for r in rows if NAMES[1] in r["path"]] == streamed[:-1]
    assert streamed[-1]["path"].endswith("bad.png") and streamed[-1]["error"]
    version = load_predictor(run).version
    assert f"{len(streamed) - 1} answers of version {version} added" in result.stderr.decode()
