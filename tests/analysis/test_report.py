import itertools
import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest

from analysis import report
from analysis.page.figures import plt
from configs import base
from errors import UserError
from experiment.machine import locked
from tests.analysis.fabricate import CLASSES, write_run
from tests.analysis.page.conftest import give_photos
from train import train_and_evaluate

SLOW = sum(bool(chapter.file) for chapter in report.CHAPTERS)  # chapters that run the models


def make(workdir):
    return report.write_report(workdir, models=False)


def test_page_is_self_contained_and_escapes_names(tmp_path):
    write_run(tmp_path, "cnn", 0)
    write_run(tmp_path, "mlp", 0, status="failed")
    audit = tmp_path / "audit"
    audit.mkdir()
    path = "train/o'brien <img src=x onerror=alert(1)>.png"
    findings = {
        "images": 4, "class_names": CLASSES, "counts": {"train": dict.fromkeys(CLASSES, 1)}, "leaks": [[path, path]],
        "label_conflicts": [], "unreadable": [path], "near_leaks": [], "not_images": [], "exact_duplicates": [],
        "near_duplicates": [], "near_duplicates_checked": True, "distinct_sizes": 1, "modes": {}, "value_range": [0, 1],
    }  # fmt: skip
    (audit / "audit.json").write_text(json.dumps(findings))
    plt.figure().savefig(audit / "contact_sheet.png")
    page = make(tmp_path).page.read_text(encoding="utf-8")
    assert page.count("<script>") == 1  # our own
    assert "<img src=x" not in page and "<b>lost" not in page
    assert "o&#39;brien &lt;img" in page and "&lt;script&gt;alert" in page
    sources = re.findall(r"""(?:src|href)=["']([^"']*)""", page)
    assert sum(text.startswith("data:image/") for text in sources) >= 6
    assert all(text.startswith(("data:", "#")) for text in sources)
    assert not re.search(r"url\(|@import|fetch\(|https?://", re.sub(r"base64,[^\"]*", "", page))
    assert "mlp/seed0" in page and "failed: &lt;b&gt;lost" in page
    assert "No photos can be shown" in page  # and why
    assert "data that is gone" in page


def test_what_is_missing_is_listed_not_dropped(tmp_path):
    write_run(tmp_path, "cnn", 0)
    write_run(tmp_path, "cnn", 1, status="diverged")
    write_run(tmp_path, "cnn", 2, status="")
    plan = {"command": [], "runs": ["cnn/seed0", "cnn/seed1", "cnn/seed2", "mlp/seed0"]}
    (tmp_path / "experiment.json").write_text(json.dumps(plan))
    made = make(tmp_path)
    assert made.not_complete == {
        "cnn/seed1": "diverged: <b>lost</b>",
        "cnn/seed2": "not finished",
        "mlp/seed0": "not started",
    }
    assert pd.read_csv(tmp_path / "report" / "table.csv")["seeds"].tolist() == [1]
    shutil.rmtree(tmp_path / "cnn" / "seed0")
    assert "No run is complete yet" in make(tmp_path).page.read_text()


def test_a_damaged_run_and_a_failing_chapter_spoil_nothing_else(tmp_path, monkeypatch):
    write_run(tmp_path, "cnn", 0)
    damaged = write_run(tmp_path, "mlp", 0)
    (damaged / "predictions_test.npz").write_bytes(b"half")

    def fail(*arguments):
        raise MemoryError("too <large>")

    monkeypatch.setattr("analysis.inside.inspect_section", fail)
    made = report.write_report(tmp_path)
    assert "damaged" in made.not_complete["mlp/seed0"]
    page = made.page.read_text()
    assert "Not made: MemoryError: too &lt;large&gt;" in page
    assert (
        page.count("Not made") == SLOW - 1
    )  # for the others there are no data; costs stand anyway


def test_a_stop_between_chapters_leaves_a_page(tmp_path):
    write_run(tmp_path, "cnn", 0)

    def stop(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report.write_report(tmp_path, progress=stop)
    assert "cnn is the only model" in (tmp_path / "report" / "index.html").read_text()


def test_an_empty_workdir_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no runs"):
        make(tmp_path)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_constant_logits_one_class_and_a_class_with_one_image(tmp_path):
    count = 50
    write_run(tmp_path, "good", 0, 0.9, count=count)
    constant = write_run(tmp_path, "constant", 0, count=count)
    for part in ("test", "validation"):
        for run_dir in (constant, tmp_path / "good" / "seed0"):
            path = run_dir / f"predictions_{part}.npz"
            arrays = dict(np.load(path))
            arrays["labels"] = np.where(np.arange(count) == 7, 3, 0).astype(
                np.int32
            )  # one image of class 3
            if run_dir is constant:
                arrays["logits"] = np.zeros((count, 4), np.float32)
            np.savez(path, **arrays)
    made = make(tmp_path)
    table = pd.read_csv(tmp_path / "report" / "table.csv").set_index("model")
    assert (
        table.test_accuracy_mean["constant"] == 0.98 and table.macro_recall_mean["constant"] == 0.5
    )
    assert table.temperature_mean["constant"] == 1 and table.ece_mean["constant"] == pytest.approx(
        0.73
    )
    page = made.page.read_text()
    assert "constant never predicts" in page


def test_one_run_alone(tmp_path):
    write_run(tmp_path, "cnn", 0)
    made = make(tmp_path)
    assert "cnn is the only model" in made.text and made.not_complete == {}
    assert not (tmp_path / "report" / "pairs.csv").exists()


def test_what_became_of_pretrained_weights_is_told(tmp_path):
    for model, warnings in (("right", []), ("wrong", ["<b> is out of place"])):
        path = write_run(tmp_path, model, 0) / "summary.json"
        summary = json.loads(path.read_text())
        phase = {"name": "head", "train": "last:1", "epochs": 3.0, "stored_features": True}
        summary |= {"weights": "run:x", "phases": [phase], "preflight": {"warnings": warnings}}
        path.write_text(json.dumps(summary))
    path = write_run(tmp_path, "scratch", 0) / "summary.json"
    teachers = [{"run": f"big/seed{i}", "digest": "0123456789ab"} for i in (0, 1)]
    told = {"temperature": 4.0, "weight": 0.9, "teachers": teachers}
    phase["stored_logits"] = False
    content = json.loads(path.read_text()) | {"distill": told, "phases": [phase]}
    path.write_text(json.dumps(content))
    made = make(tmp_path)
    page = made.page.read_text(encoding="utf-8")
    assert "big/seed0 (01234567) and big/seed1 (01234567)" in page and "at each step" in page
    assert "wrong: its pixels do not match its weights. &lt;b&gt; is out of place" in page
    assert "head (last:1): 3 epochs, on stored features" in page
    assert page.count("DO NOT MATCH") == 1 and page.count("run:x") == 2
    assert "wrong: its pixels" in made.text and "right: its pixels" not in made.text


def test_eight_models_of_six_classes_are_quick_and_small(tmp_path, monkeypatch):
    """The limits are 30 s and 15 MB; the time is printed, not asserted."""
    give_photos(monkeypatch, side=112, count=3000)  # noise, which no JPEG makes small
    for model, seed in itertools.product("abcdefgh", range(2)):
        accuracy = 0.7 + 0.02 * ord(model) % 0.2
        write_run(tmp_path, model, seed, accuracy, count=3000, classes=[*CLASSES, "e", "f"])
    began = time.monotonic()
    made = make(tmp_path)
    print(f"{time.monotonic() - began:.1f} s, {made.page.stat().st_size / 1e6:.1f} MB")
    assert made.page.stat().st_size < 15e6
    assert len(pd.read_csv(tmp_path / "report" / "pairs.csv")) == 28


def test_chapters_that_run_the_models(tmp_path, digits_run):
    for model in ("linear", "cnn", "knn"):
        config = digits_run(model, epochs=2)
        train_and_evaluate(config, tmp_path / model / "seed0")
    options = base.get_config().compare
    options.robustness_images, options.gradcam_images = 8, 2
    told = []
    made = report.write_report(tmp_path, options, progress=told.append)
    page = made.page.read_text(encoding="utf-8")
    assert len(told) == SLOW
    for title in ("Heat maps", "Robustness", "Inside the networks"):
        assert f">{title}</h2>" in page
    assert "Not made" not in page
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "report").glob("*_*.png")}
    assert before
    report.write_report(tmp_path, options)  # kept, not made again
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_two_processes_make_a_report_one_after_the_other(tmp_path):
    write_run(tmp_path, "cnn", 0)
    (tmp_path / "report").mkdir()
    with ThreadPoolExecutor(1) as pool:
        with locked(tmp_path / "report/.lock"):
            waiting = pool.submit(report.write_report, tmp_path, models=False)
            time.sleep(1)
            assert not waiting.done() and not (tmp_path / "report/index.html").exists()
        assert waiting.result(timeout=60).page.exists()


def test_runs_of_other_data_are_listed_and_not_compared(tmp_path):
    for seed in (0, 1):
        path = write_run(tmp_path, "cnn", seed) / "dataset.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"identity": str(seed)}))
    (tmp_path / "experiment.json").write_text(json.dumps({"runs": [], "identities": ["0"]}))
    made = report.write_report(tmp_path, models=False)
    assert "not those of the experiment" in made.not_complete["cnn/seed1"]
    assert "cnn/seed0" not in made.not_complete
