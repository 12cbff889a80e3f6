import json
import math
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from analysis import compare, figures
from analysis.runs import load_runs
from errors import UserError

CLASSES = ["plain", "with space", "<script>alert('x')</script>", "été $x_1$"]


def write_run(workdir, model, seed, accuracy=0.8, variant="", status="complete", count=200):
    """Writes a run directory as training does, with random predictions of about that accuracy."""
    draw = np.random.default_rng([seed, int(accuracy * 1000)])
    suffix = f"_{variant}" if variant else ""
    run_dir = workdir / model / f"seed{seed}{suffix}"
    run_dir.mkdir(parents=True)
    labels = draw.integers(0, 4, count).astype(np.int32)
    logits = draw.normal(size=(count, 4)).astype(np.float32)
    right = draw.random(count) < accuracy
    logits[np.arange(count), np.where(right, labels, (labels + 1) % 4)] += 5
    config = {
        "model": {"name": model},
        "seed": seed,
        "variant": variant,
        "data": {"image_size": 8},
    }
    write = lambda name, content: (run_dir / name).write_text(json.dumps(content))  # noqa: E731
    write("config.json", config)
    environment = {
        "command": ["main.py"], "git_commit": None, "git_dirty": None, "python": "3.11", "packages": {},
        "devices": ["cpu"], "device_kind": "cpu",
    }  # fmt: skip
    write("environment.json", environment)
    write("dataset.json", {"class_names": CLASSES, "fingerprint": "0" * 64, "split_seed": 0})
    lines = [
        {"step": s, "epoch": s, "split": "validation", "loss": 1 / s, "accuracy": 1 - 0.5 / s}
        for s in (1, 2, 3)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if status != "complete":
        write("summary.json", {"status": status, "error": "<b>lost</b>"} if status else {})
        return run_dir
    np.savez(run_dir / "predictions_test.npz", ids=np.arange(count), labels=labels, logits=logits)
    cost = {
        "parameters": 10, "flops_per_image": 2e6, "train_images_per_second": None if model == "knn" else 5.0,
        "seconds_to_best": 3.0, "device": "1 x cpu",
    }  # fmt: skip
    measured = {"validation": {"accuracy": accuracy}, "test": {"accuracy": 0.0}}
    write("summary.json", {"status": "complete", "metrics": measured, "cost": cost})
    return run_dir


def test_metrics_equal_scikit_learns(tmp_path):
    write_run(tmp_path, "cnn", 0)
    run = load_runs(tmp_path)[0]
    labels, predicted = run.test["labels"], run.test["logits"].argmax(axis=1)
    ours = compare.run_metrics(run)
    options = {"average": "macro", "zero_division": 0}
    assert ours["test_accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert ours["macro_precision"] == pytest.approx(precision_score(labels, predicted, **options))
    assert ours["macro_recall"] == pytest.approx(recall_score(labels, predicted, **options))
    assert ours["macro_f1"] == pytest.approx(f1_score(labels, predicted, **options))


def test_calibration_error_against_a_plain_loop():
    draw = np.random.default_rng(0)
    probabilities = draw.dirichlet(np.ones(4) * 0.5, size=500)
    labels = draw.integers(0, 4, 500)
    error = 0.0
    for low in np.arange(15) / 15:
        confidence = probabilities.max(axis=1)
        inside = (confidence >= low) & ((confidence < low + 1 / 15) | (low > 0.93))
        if inside.any():
            correct = (probabilities.argmax(axis=1) == labels)[inside].mean()
            error += inside.mean() * abs(correct - confidence[inside].mean())
    assert compare.calibration_error(probabilities, labels) == pytest.approx(error)
    sure = np.eye(4)[labels]
    assert compare.calibration_error(sure, labels) == 0
    assert compare.calibration_error(sure, (labels + 1) % 4) == 1


def test_interval_equals_scipys():
    values = np.array([0.8, 0.82, 0.87])
    theirs = stats.t.interval(0.95, 2, loc=values.mean(), scale=stats.sem(values))
    np.testing.assert_allclose(compare.interval(values), theirs)
    assert all(math.isnan(value) for value in compare.interval(values[:1]))
    assert compare.interval(np.array([0.99, 1.0]))[1] == 1.0


def test_table_has_a_row_per_model_and_variant_best_first(tmp_path):
    for seed in (0, 1, 2):
        write_run(tmp_path, "cnn", seed, 0.9)
        write_run(tmp_path, "linear", seed, 0.5)
        write_run(tmp_path, "linear", seed, 0.6, variant="l1=0.1")
    write_run(tmp_path, "knn", 0, 0.7)
    report = compare.write_report(tmp_path)
    table = pd.read_csv(tmp_path / "report" / "table.csv")
    assert list(table)[:4] == ["model", "seeds", "test_accuracy_mean", "test_accuracy_std"]
    assert table["model"].tolist() == ["cnn", "knn", "linear", "linear"]
    assert table["variant"].fillna("").tolist() == ["", "", "l1=0.1", ""]
    assert table["seeds"].tolist() == [3, 1, 3, 3]
    runs = [run for run in load_runs(tmp_path) if run.model == "cnn"]
    accuracies = [compare.run_metrics(run)["test_accuracy"] for run in runs]
    assert table["test_accuracy_mean"][0] == pytest.approx(np.mean(accuracies))
    assert table["test_accuracy_std"][0] == pytest.approx(np.std(accuracies, ddof=1))
    assert table["runs"][0] == "cnn/seed0;cnn/seed1;cnn/seed2"
    assert math.isnan(table["test_accuracy_std"][1])
    assert math.isnan(table["train_images_per_second"][1])
    assert report.not_complete == {}
    assert "cnn has the highest mean test accuracy" in report.text
    markdown = (tmp_path / "report" / "table.md").read_text().splitlines()
    assert len(markdown) == 6 and "linear (l1=0.1)" in markdown[4]
    assert "\\toprule" in (tmp_path / "report" / "table.tex").read_text()


def test_page_is_self_contained_and_escapes_names(tmp_path):
    write_run(tmp_path, "cnn", 0)
    write_run(tmp_path, "mlp", 0, status="failed")
    audit = tmp_path / "audit"
    audit.mkdir()
    path = "train/o'brien <img src=x onerror=alert(1)>.png"
    found = {
        "images": 4, "class_names": CLASSES, "counts": {"train": dict.fromkeys(CLASSES, 1)}, "leaks": [[path, path]],
        "label_conflicts": [], "unreadable": [path], "near_leaks": [], "not_images": [], "exact_duplicates": [],
        "near_duplicates": [], "near_duplicates_checked": True, "distinct_sizes": 1, "modes": {}, "value_range": [0, 1],
    }  # fmt: skip
    (audit / "audit.json").write_text(json.dumps(found))
    figures.draw_curves({}).savefig(audit / "contact_sheet.png")
    page = compare.write_report(tmp_path).page.read_text(encoding="utf-8")
    assert "<script>" not in page and "<img src=x" not in page and "<b>lost" not in page
    assert "o&#39;brien &lt;img" in page and "&lt;script&gt;alert" in page
    sources = re.findall(r"""(?:src|href)=["']([^"']*)""", page)
    assert len(sources) >= 4 and all(text.startswith("data:image/png;base64,") for text in sources)
    assert "mlp/seed0" in page and "failed: &lt;b&gt;lost" in page


def test_what_is_missing_is_listed_not_dropped(tmp_path):
    write_run(tmp_path, "cnn", 0)
    write_run(tmp_path, "cnn", 1, status="diverged")
    write_run(tmp_path, "cnn", 2, status="")
    plan = {"command": [], "runs": ["cnn/seed0", "cnn/seed1", "cnn/seed2", "mlp/seed0"]}
    (tmp_path / "experiment.json").write_text(json.dumps(plan))
    report = compare.write_report(tmp_path)
    assert report.not_complete == {
        "cnn/seed1": "diverged: <b>lost</b>",
        "cnn/seed2": "not finished",
        "mlp/seed0": "not started",
    }
    assert pd.read_csv(tmp_path / "report" / "table.csv")["seeds"].tolist() == [1]
    shutil.rmtree(tmp_path / "cnn" / "seed0")
    report = compare.write_report(tmp_path)
    assert "No run is complete yet" in report.page.read_text()


def test_an_empty_workdir_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no runs"):
        compare.write_report(tmp_path)


def test_one_class_never_predicted_and_constant_logits(tmp_path):
    run_dir = write_run(tmp_path, "cnn", 0)
    count = 200
    np.savez(
        run_dir / "predictions_test.npz",
        ids=np.arange(count),
        labels=np.zeros(count, np.int32),
        logits=np.zeros((count, 4), np.float32),
    )
    compare.write_report(tmp_path)
    row = pd.read_csv(tmp_path / "report" / "table.csv").iloc[0]
    assert row["test_accuracy_mean"] == 1 and row["macro_recall_mean"] == 0.25
    assert row["ece_mean"] == pytest.approx(0.75)


def test_latex_escapes(tmp_path):
    write_run(tmp_path, "cnn_deep", 0, variant="momentum=0.9, a_b=1%")
    compare.write_report(tmp_path)
    text = (tmp_path / "report" / "table.tex").read_text()
    assert r"cnn\_deep (momentum=0.9, a\_b=1\%)" in text


def test_what_became_of_pretrained_weights_is_told(tmp_path):
    for model, warnings in (("right", []), ("wrong", ["<b> is out of place"])):
        path = write_run(tmp_path, model, 0) / "summary.json"
        summary = json.loads(path.read_text())
        phase = {"name": "head", "train": "last:1", "epochs": 3.0, "stored_features": True}
        summary |= {"weights": "run:x", "phases": [phase], "preflight": {"warnings": warnings}}
        path.write_text(json.dumps(summary))
    write_run(tmp_path, "scratch", 0)
    report = compare.write_report(tmp_path)
    page = report.page.read_text(encoding="utf-8")
    assert "wrong: its pixels do not match its weights.</strong> &lt;b&gt; is out of place" in page
    assert "head (last:1): 3 epochs, on stored features" in page
    assert page.count("DO NOT MATCH") == 1 and page.count("run:x") == 2
    assert "wrong: <b> is out of place" in report.text and "right: " not in report.text
