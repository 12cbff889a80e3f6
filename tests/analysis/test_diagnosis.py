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


def diagnose(lines, patience=0):
    config = {"early_stopping_patience": patience, "phase": {}}
    return diagnosis.diagnose(SimpleNamespace(metrics=lines, config=config))


EPOCHS = np.arange(30)
FALLING = 2 * np.exp(-EPOCHS / 5) + 0.1
RISING = 1 + 0.02 * np.abs(EPOCHS - 10)  # lowest in epoch 11, 38 % above it in the end
SETTLED = np.exp(-EPOCHS / 3) + 0.3
SLOW = 2 - 0.03 * EPOCHS


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (curve(FALLING, RISING), "overfits"),
        (curve(FALLING, SETTLED), "stopped improving"),
        (curve(FALLING, SETTLED, 0.7, 0.95), "overfits"),  # without a rise, by the gap
        (curve(FALLING, SETTLED, 0.7, 0.75), "stopped improving"),
        (curve(FALLING, SETTLED, 0.85, 0.75), "stopped improving"),  # dropout in training
        (curve(SLOW, SLOW, 0.5, 0.5), "still improving"),
        (curve(SLOW, SLOW, 0.5, 0.9), "still improving"),
        (curve(np.full(30, 2.3), np.full(30, 2.3), 0.1, 0.1), "stopped improving"),  # never learned
        (curve(1 + EPOCHS, 1 + EPOCHS), "stopped improving"),
        (curve(FALLING, RISING)[:6], "no curve"),
        ([{"split": "validation", "step": 0, "epoch": 0, "loss": 1, "accuracy": 1}], "no curve"),
    ],
)
def test_every_kind_of_curve_is_recognised(lines, expected):
    diagnosed = diagnose(lines)
    assert diagnosed.verdict == expected and diagnosed.sentence.endswith(".")


@pytest.mark.parametrize(
    ("training", "validation", "accuracy", "expected"),
    [
        (FALLING, RISING, 0.9, "overfits"),
        (FALLING, SETTLED, 0.9, "stopped improving"),
        (FALLING, SETTLED, 0.7, "stopped improving"),
        (SLOW, SLOW, 0.5, "still improving"),
    ],
)
def test_noise_seldom_changes_the_verdict(training, validation, accuracy, expected):
    draw, right = np.random.default_rng(0), 0
    for _ in range(50):
        noisy = validation * draw.normal(1, 0.03, len(EPOCHS))
        right += diagnose(curve(training, noisy, accuracy, 0.75)).verdict == expected
    assert right >= 45


def test_a_verdict_has_its_epoch_and_numbers():
    diagnosed = diagnose(
        curve(FALLING, RISING, np.linspace(0.5, 0.79, 30), np.linspace(0.5, 1, 30))
    )
    assert diagnosed.epoch == 11 and diagnosed.last_epoch == 30
    assert diagnosed.training_accuracy == pytest.approx(0.5 + 0.5 * 10 / 29)
    assert diagnosed.validation_accuracy == pytest.approx(0.5 + 0.01 * 10)
    assert diagnosed.late_gap == pytest.approx((0.5 + 0.5 * 26 / 29) - (0.5 + 0.01 * 26))
    # the last 7 of 30 rows have the median of row 26; the lowest of a median of 5 is row 9's
    assert f"{1.32 / 1.02 - 1:.0%} above its lowest" in diagnosed.sentence
    assert "epoch 11 of 30" in diagnosed.sentence


def test_early_stopping_is_no_reason_for_more_epochs():
    falls = np.r_[SLOW[:26], SLOW[25] + np.full(4, 0.001)]
    assert diagnose(curve(SLOW, falls)).verdict == "still improving"
    diagnosed = diagnose(curve(SLOW, falls), patience=4)
    assert diagnosed.verdict != "still improving" and "patience 4" in diagnosed.sentence


def test_phases_are_judged_together_but_end_in_the_last():
    head = curve(SLOW[:15], 3 * SETTLED[:15], phase="head")
    full = curve(FALLING[:15] / 2, 0.6 - 0.02 * EPOCHS[:15], phase="full", first=16)
    assert diagnose(head + full).verdict == "still improving"
    spoiled = curve(FALLING[:15] / 9, 0.95 + 0.1 * EPOCHS[:15], phase="full", first=16)
    diagnosed = diagnose(head + spoiled)
    assert diagnosed.verdict == "overfits" and diagnosed.epoch <= 16


def test_training_metrics_are_weighted_by_steps():
    train = [(100, 1.0, 0.5), (200, 0.5, 0.7), (240, 0.1, 0.9), (480, 0.2, 0.8)]
    lines = [
        {"split": "train", "step": s, "epoch": s / 240, "phase": "all", "loss": x, "accuracy": a}
        for s, x, a in train
    ]
    for place, step in ((3, 240), (5, 480)):
        line = {"split": "validation", "step": step, "epoch": step / 240, "phase": "all"}
        lines.insert(place, {**line, "loss": 0.3, "accuracy": 0.6})
    rows = diagnosis.read_curve(lines)
    np.testing.assert_allclose(rows.train_loss, [(100 + 50 + 4) / 240, 0.2])
    np.testing.assert_allclose(rows.train_accuracy, [(50 + 70 + 36) / 240, 0.8])
    assert rows.epoch.tolist() == [1, 2]


def test_the_table_lists_verdicts_by_seed(tmp_path):
    for seed, validation in enumerate((RISING, SETTLED, RISING)):
        run_dir = write_run(tmp_path, "cnn", seed)
        lines = curve(FALLING, validation, 0.8 + 0.05 * seed, 0.88)
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (write_run(tmp_path, "knn", 0) / "metrics.jsonl").write_text("")
    table = diagnosis.diagnosis_table(group_runs(load_runs(tmp_path)))
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert rows["cnn"]["verdict"] == "overfits (seed 0, 2); stopped improving (seed 1)"
    assert rows["cnn"]["best epoch"] == f"{(11 + 30 + 11) / 3:.1f}"
    assert rows["cnn"]["gap, points"] == "+3.0" and rows["cnn"]["validation acc. %"] == "85.0"
    assert rows["knn"]["verdict"] == "no curve" and set(list(rows["knn"].values())[2:]) == {"–"}
