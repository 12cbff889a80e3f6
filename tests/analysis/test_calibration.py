import json
import re

import numpy as np
import pandas as pd
import pytest

from analysis import calibration
from analysis.calibration import calibration_section
from analysis.compare import compare
from analysis.confidence import softmax
from analysis.page.figures import plt
from analysis.runs import load_runs
from tests.analysis.conftest import words
from tests.analysis.fabricate import write_run


def make(workdir):
    comparison = compare(workdir, load_runs(workdir))
    comparison.output.mkdir(exist_ok=True)
    return comparison, calibration_section(comparison)


def rewrite(run_dir, part, logits, labels):
    ids = np.array([f"{part}/{i}" for i in range(len(labels))])
    np.savez(
        run_dir / f"predictions_{part}.npz",
        ids=ids,
        logits=logits.astype(np.float32),
        labels=labels.astype(np.int32),
    )


def drawn(seed, count, scale=3.0, classes=4):
    """Logits and labels of a perfectly calibrated model."""
    random = np.random.default_rng(seed)
    logits = scale * random.normal(size=(count, classes))
    below = softmax(logits).cumsum(axis=1) < random.random((count, 1))
    return logits, below.sum(axis=1).clip(max=classes - 1)


def test_figures_of_the_chapter_are_those_of_the_table(tmp_path, monkeypatch):
    for seed in (0, 1):
        write_run(tmp_path, "cnn", seed, 0.9, count=400)
        write_run(tmp_path, "mlp", seed, 0.7, count=400)
    drawings = []
    monkeypatch.setattr(calibration, "save", lambda figure, path: drawings.append(figure))
    comparison, section = make(tmp_path)
    table, (first, second) = comparison.table, section.tables
    third = section.details[0].table
    assert len(first.columns) <= 8 and len(second.columns) <= 8
    for i, label in enumerate(comparison.groups):
        assert first.rows[i][:2] == [label, f"{100 * table.ece_mean[i]:.2f}"]
        assert second.rows[i][1] == f"{100 * table.answered_mean[i]:.1f}"
        assert second.rows[i][-1] == f"{table.set95_size_mean[i]:.2f}"
        # The diagram tells the same error as the table, not that of pooled seeds.
        assert f"{label}: ECE {100 * table.ece_mean[i]:.1f} %" in words(drawings[0])
    assert [row[0] for row in third.rows] == list(comparison.runs[0].class_names)
    assert "cnn and mlp is off by more than chance" in section.finding
    sets = pd.read_csv(comparison.output / "sets.csv")
    weighted = sets[(sets.model == "mlp") & (sets.level == 0.9)]
    mean = (weighted.coverage * weighted.images).sum() / weighted.images.sum()
    row = list(comparison.groups).index("mlp")
    assert mean == pytest.approx(table.set90_coverage_mean[row])
    assert section.warnings == []
    plt.close("all")


def test_a_calibrated_model_is_called_so_and_harm_is_warned_of(tmp_path):
    for model, known, new in (("good", 1, 1), ("harmed", 0.4, 1), ("mended", 3, 3)):
        run_dir = write_run(tmp_path, model, 0)
        for part, seed, factor in (("validation", 1, known), ("test", 2, new)):
            logits, labels = drawn(seed, 800)
            rewrite(run_dir, part, factor * logits, labels)
    _, section = make(tmp_path)
    rows = {row[0]: row for row in section.tables[0].rows}
    assert {name: row[3] for name, row in rows.items()} == {
        "good": "no", "harmed": "no", "mended": "yes"
    }  # fmt: skip
    (warning,) = section.warnings
    assert "makes harmed worse on test images" in warning
    assert "confidence of mended is off" in section.finding and "that of none" in section.finding


def test_few_images_promise_nothing_and_leave_no_nan(tmp_path):
    run_dir = write_run(tmp_path, "cnn", 0, count=10)
    logits, labels = drawn(0, 10)
    rewrite(run_dir, "test", logits, np.where(labels == 3, 0, labels))  # a class is missing
    _, section = make(tmp_path)
    text = json.dumps([section.finding, [table.rows for table in section.tables]])
    assert "NaN" not in text and "nan" not in text and "inf" not in text
    assert section.tables[1].rows[0][1:] == ["0.0", "–", "–", "–", "–", "–"]
    assert "Everything goes to a person in some seed of: cnn" in section.tables[1].caption


def test_many_models_and_classes_fold(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "SHOWN", 3)
    names = [f"<b>{i}</b> $x_{i}$ é" for i in range(30)]
    for i in range(4):
        write_run(tmp_path, f"model{i}", 0, count=60, classes=names)
    comparison, section = make(tmp_path)
    assert len(section.tables) == 2 and len(section.tables[0].rows) == 4
    _, details = section.details
    assert len(details.lines) == 30 and "The first 3 models" in details.summary
    assert all(len(re.findall(r"model\d ", line)) == 3 for line in details.lines)
    assert all("The first 3 models" in picture.caption for picture in section.pictures)
    assert len(pd.read_csv(comparison.output / "sets.csv")) == 4 * 30 * 2
