import json
from types import SimpleNamespace

import numpy as np
import pytest

from analysis import diagnosis
from analysis.runs import group_runs, load_runs
from tests.analysis.fabricate import write_run


def curve(training, validation, accuracy=0.9, train_accuracy=0.9, phase="all", first=1):
    """Lines as training writes them, one of each split an epoch of 10 steps."""
    spread = lambda value: np.broadcast_to(value, len(validation)).tolist()  # noqa: E731
    rows = zip(training, validation, spread(train_accuracy), spread(accuracy), strict=True)
    lines = []
    for epoch, (t, v, ta, va) in enumerate(rows, start=first):
        where = {"step": 10 * epoch, "epoch": float(epoch), "phase": phase}
        lines.append({**where, "split": "train", "loss": t, "accuracy": ta})
        lines.append({**where, "split": "validation", "loss": v, "accuracy": va})
    return lines


def verdict(lines, patience=0, status="complete"):
    config = {"early_stopping_patience": patience, "phase": {}}
    return diagnosis.diagnose(SimpleNamespace(metrics=lines, config=config, status=status))


EPOCHS = np.arange(30)
FALLING = 2 * np.exp(-EPOCHS / 5) + 0.1
RISING = 1 + 0.02 * np.abs(EPOCHS - 10)  # lowest in epoch 11, 38 % above it in the end
SETTLED = np.exp(-EPOCHS / 3) + 0.3
SLOW = 2 - 0.03 * EPOCHS


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (curve(FALLING, RISING), "overfits"),
        (curve(FALLING, SETTLED), "well fitted"),
        (curve(FALLING, SETTLED, 0.7, 0.95), "overfits"),  # without a rise, by the gap
        (curve(FALLING, SETTLED, 0.7, 0.75), "underfits"),
        (curve(FALLING, SETTLED, 0.85, 0.75), "well fitted"),  # dropout lowers training accuracy
        (curve(SLOW, SLOW, 0.5, 0.5), "still improving"),
        (curve(SLOW, SLOW, 0.5, 0.9), "still improving"),
        (curve(np.full(30, 2.3), np.full(30, 2.3), 0.1, 0.1), "underfits"),  # never learned
        (curve(1 + EPOCHS, 1 + EPOCHS), "diverged"),
        (curve(FALLING, RISING)[:6], "no curve"),
        ([{"split": "validation", "step": 0, "epoch": 0, "loss": 1, "accuracy": 1}], "no curve"),
    ],
)
def test_every_kind_of_curve_is_recognised(lines, expected):
    found = verdict(lines)
    assert found.verdict == expected and found.sentence.endswith(".")


@pytest.mark.parametrize(
    ("training", "validation", "accuracy", "expected"),
    [
        (FALLING, RISING, 0.9, "overfits"),
        (FALLING, SETTLED, 0.9, "well fitted"),
        (SLOW, SLOW, 0.5, "still improving"),
        (FALLING, SETTLED, 0.7, "underfits"),
    ],
)
def test_noise_seldom_changes_the_verdict(training, validation, accuracy, expected):
    draw, right = np.random.default_rng(0), 0
    for _ in range(50):
        noisy = validation * draw.normal(1, 0.03, len(EPOCHS))
        right += verdict(curve(training, noisy, accuracy, 0.75)).verdict == expected
    assert right >= 45


def test_a_verdict_has_its_epoch_and_numbers():
    found = verdict(curve(FALLING, RISING, np.linspace(0.5, 0.79, 30), np.linspace(0.5, 1, 30)))
    assert found.epoch == 11 and found.last_epoch == 30 and found.validation_loss == 1
    assert found.gap == pytest.approx((0.5 + 0.5 * 10 / 29) - (0.5 + 0.01 * 10))
    assert found.late_gap == pytest.approx((0.5 + 0.5 * 26 / 29) - (0.5 + 0.01 * 26))
    # the last 7 of 30 rows have the median of row 26; the lowest of a median of 5 is row 9's
    assert found.rise == pytest.approx(1.32 / 1.02 - 1, abs=0.02)
    assert "from epoch 11 on" in found.sentence and "epoch 11 of 30" in found.sentence


def test_early_stopping_is_no_reason_for_more_epochs():
    falls = np.r_[SLOW[:26], SLOW[25] + np.full(4, 0.001)]
    assert verdict(curve(SLOW, falls)).verdict == "still improving"
    found = verdict(curve(SLOW, falls), patience=4)
    assert found.verdict != "still improving" and "patience 4" in found.sentence


def test_phases_are_judged_together_but_end_in_the_last():
    head = curve(SLOW[:15], 3 * SETTLED[:15], phase="head")
    full = curve(FALLING[:15] / 2, 0.6 - 0.02 * EPOCHS[:15], phase="full", first=16)
    assert verdict(head + full).verdict == "still improving"
    spoiled = curve(FALLING[:15] / 9, 0.95 + 0.1 * EPOCHS[:15], phase="full", first=16)
    found = verdict(head + spoiled)
    assert found.verdict == "overfits" and found.epoch <= 16


def test_training_metrics_are_weighted_by_steps():
    train = [(100, 1.0, 0.5), (200, 0.5, 0.7), (240, 0.1, 0.9), (480, 0.2, 0.8)]
    lines = [
        {"split": "train", "step": s, "epoch": s / 240, "phase": "all", "loss": x, "accuracy": a}
        for s, x, a in train
    ]
    for place, step in ((3, 240), (5, 480)):
        line = {"split": "validation", "step": step, "epoch": step / 240, "phase": "all"}
        lines.insert(place, {**line, "loss": 0.3, "accuracy": 0.6})
    found = diagnosis.read_curve(lines)
    np.testing.assert_allclose(found.train_loss, [(100 + 50 + 4) / 240, 0.2])
    np.testing.assert_allclose(found.train_accuracy, [(50 + 70 + 36) / 240, 0.8])
    assert found.epoch.tolist() == [1, 2]


@pytest.mark.parametrize("loss", [None, float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_has_diverged(loss):
    lines = curve(FALLING, RISING)
    broken = {"split": "train", "step": 305, "epoch": 30.5, "phase": "all", "loss": loss}
    found = verdict([*lines, broken])
    assert found.verdict == "diverged" and found.epoch == 30.5
    assert verdict(lines, status="diverged").verdict == "diverged"


def test_the_table_lists_verdicts_by_seed(tmp_path):
    for seed, validation in enumerate((RISING, SETTLED, RISING)):
        run_dir = write_run(tmp_path, "cnn", seed)
        lines = curve(FALLING, validation, 0.8 + 0.05 * seed, 0.88)
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (write_run(tmp_path, "knn", 0) / "metrics.jsonl").write_text("")
    table = diagnosis.diagnosis_table(group_runs(load_runs(tmp_path)))
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert rows["cnn"]["verdict"] == "overfits (seed 0, 2); well fitted (seed 1)"
    assert rows["cnn"]["best epoch"] == f"{(11 + 30 + 11) / 3:.1f}"
    assert rows["cnn"]["gap, points"] == "+3.0" and rows["cnn"]["validation acc. %"] == "85.0"
    assert rows["knn"]["verdict"] == "no curve" and set(list(rows["knn"].values())[2:]) == {"–"}
