import json
import math
import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics

from analysis import evaluate
from analysis.runs import load_run
from errors import UserError
from tests.analysis.fabricate import CLASSES, predictions, write_run


@pytest.fixture
def made():
    arrays = predictions(0, 0.7, 500)
    return arrays["labels"], arrays["logits"]


def test_scores_equal_scikit_learns(made):
    labels, logits = made
    ours, predicted = evaluate.scores(labels, logits), logits.argmax(axis=1)
    probabilities = evaluate.softmax(logits)
    theirs = {
        "accuracy": metrics.accuracy_score(labels, predicted),
        "macro_precision": metrics.precision_score(labels, predicted, average="macro"),
        "macro_recall": metrics.recall_score(labels, predicted, average="macro"),
        "macro_f1": metrics.f1_score(labels, predicted, average="macro"),
        "top2": metrics.top_k_accuracy_score(labels, logits, k=2),
        "top3": metrics.top_k_accuracy_score(labels, logits, k=3),
        "nll": metrics.log_loss(labels, probabilities),
        "brier": metrics.brier_score_loss(
            labels, probabilities, labels=range(4), scale_by_half=False
        ),
    }
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-9)
    assert set(ours) == {*theirs, "ece"}  # no top-5 of four classes


def test_classes_equal_scikit_learns_report(made):
    labels, logits = made
    predicted = logits.argmax(axis=1)
    ours = evaluate.per_class(labels, predicted, CLASSES).set_index("class")
    theirs = metrics.classification_report(
        labels, predicted, target_names=CLASSES, output_dict=True
    )
    for name in CLASSES:
        row = ours.loc[name]
        assert row[["precision", "recall", "f1", "support"]].tolist() == pytest.approx(
            [theirs[name][key] for key in ("precision", "recall", "f1-score", "support")]
        )
    assert ours.predicted.sum() == len(labels)


def test_a_class_never_predicted_and_one_without_images():
    labels = np.array([0, 0, 1, 1, 2])
    logits = np.eye(4)[[0, 0, 0, 0, 0]] * 3.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = evaluate.per_class(labels, logits.argmax(axis=1), list("abcd"))
        figures = evaluate.scores(labels, logits)
    assert table.precision.tolist() == [0.4, 0, 0, 0] and table.predicted.tolist() == [5, 0, 0, 0]
    assert figures["macro_recall"] == pytest.approx(1 / 3)  # of the three classes with images


def test_top_k_breaks_ties_as_the_prediction_does():
    labels, logits = np.array([0, 1, 2]), np.zeros((3, 3))
    assert evaluate.top_k_accuracy(labels, logits, 1) == pytest.approx(1 / 3)
    assert evaluate.top_k_accuracy(labels, logits, 2) == pytest.approx(2 / 3)
    assert evaluate.scores(labels, logits)["accuracy"] == pytest.approx(1 / 3)


def test_calibration_error_against_a_plain_loop():
    draw = np.random.default_rng(0)
    probabilities = draw.dirichlet(np.ones(4) * 0.5, size=500)
    labels = draw.integers(0, 4, 500)
    error, confidence = 0.0, probabilities.max(axis=1)
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & ((confidence < low + 1 / 15) | (low > 0.93))
        if inside.any():
            correct = (probabilities.argmax(axis=1) == labels)[inside].mean()
            error += inside.mean() * abs(correct - confidence[inside].mean())
    assert evaluate.calibration_error(probabilities, labels) == pytest.approx(error)
    sure = np.eye(4)[labels]
    assert evaluate.calibration_error(sure, labels) == 0
    assert evaluate.calibration_error(sure, (labels + 1) % 4) == 1
    assert evaluate.reliability(probabilities, labels).images.sum() == 500


def test_confusion_and_its_pairs(made):
    labels, logits = made
    predicted = logits.argmax(axis=1)
    counts = evaluate.confusion(labels, predicted, 4)
    np.testing.assert_array_equal(counts, metrics.confusion_matrix(labels, predicted))
    small = np.array([[9, 5, 0], [1, 9, 0], [2, 0, 8]])
    pairs = evaluate.confused_pairs(small)
    assert pairs.values.tolist() == [[0, 1, 5, 1, 6, 0.75], [2, 0, 2, 0, 2, 0.25]]
    assert evaluate.confused_pairs(np.diag([3, 4])).empty


def test_temperature_finds_the_one_that_spoiled_the_logits():
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(20000, 5)) * 2
    labels = np.array([draw.choice(5, p=p) for p in evaluate.softmax(logits)])
    assert evaluate.fit_temperature(logits, labels) == pytest.approx(1, abs=0.03)
    assert evaluate.fit_temperature(3 * logits, labels) == pytest.approx(3, rel=0.03)
    assert evaluate.fit_temperature(np.zeros((10, 3)), np.zeros(10, int)) == 1
    perfect = np.eye(3)[[0, 1, 2]] * 5
    assert 0.05 <= evaluate.fit_temperature(perfect, np.arange(3)) < 0.2  # as low as helps


def test_coverage_and_threshold_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.8, 0.2], [0.6, 0.4]])
    labels = np.array([0, 1, 1, 0])  # the third is wrong, and as sure as the second
    curve = evaluate.coverage_curve(probabilities, labels)
    assert curve.threshold.tolist() == [0.9, 0.8, 0.6]
    assert curve.coverage.tolist() == [0.25, 0.75, 1]
    assert curve.accuracy.tolist() == pytest.approx([1, 2 / 3, 0.75])
    threshold = evaluate.choose_threshold(probabilities, labels, 1.0)
    assert threshold == {"confidence": 0.9, "accuracy": 1.0, "coverage": 0.25, "target": 1.0}
    every = evaluate.choose_threshold(probabilities, labels, 0.7)
    assert every["confidence"] == 0  # all are answered
    none = evaluate.choose_threshold(probabilities[2:3], labels[2:3], 0.5)
    assert none["confidence"] == math.inf and none["coverage"] == 0


def test_a_run_is_scaled_by_its_validation_images_alone(tmp_path):
    path = write_run(tmp_path, "cnn", 0, count=400)
    run = load_run(path)
    figures = evaluate.evaluate(run)
    temperature = evaluate.fit_temperature(run.validation["logits"], run.validation["labels"])
    assert figures["temperature"] == temperature != 1
    scaled = evaluate.softmax(run.test["logits"] / temperature)
    assert figures["nll_scaled"] == pytest.approx(metrics.log_loss(run.test["labels"], scaled))
    threshold = evaluate.choose_threshold(
        evaluate.softmax(run.validation["logits"], temperature), run.validation["labels"]
    )
    kept = scaled.max(axis=1) >= threshold["confidence"]
    assert figures["answered"] == kept.mean() and 0 < kept.mean() < 1
    right = scaled.argmax(axis=1) == run.test["labels"]
    assert figures["accuracy_answered"] == right[kept].mean()


def test_the_command_writes_what_it_says(tmp_path, monkeypatch, capsys):
    path = write_run(tmp_path, "cnn", 0)
    run = load_run(path)
    evaluate.write(run, tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert stored["test"]["accuracy"] == evaluate.evaluate(run)["accuracy"]
    table = pd.read_csv(tmp_path / "out" / "losses.csv")
    labels = dict(
        zip(run.test["ids"], evaluate.losses(run.test["labels"], run.test["logits"]), strict=True)
    )
    assert table.loss.is_monotonic_decreasing and len(table) == 200
    assert table.loss[0] == pytest.approx(labels[table.id[0]])
    counts = pd.read_csv(tmp_path / "out" / "confusion.csv", index_col=0)
    assert counts.to_numpy().sum() == 200 and list(counts) == CLASSES
    assert "taken for" in evaluate.describe(run)


def test_what_is_no_run_is_named(tmp_path):
    write_run(tmp_path, "cnn", 0, status="failed")
    with pytest.raises(UserError, match="neither a run directory nor a workdir"):
        evaluate.chosen_runs(tmp_path)
    with pytest.raises(UserError, match="not the directory of a complete run"):
        evaluate.chosen_runs(tmp_path / "cnn" / "seed0")
