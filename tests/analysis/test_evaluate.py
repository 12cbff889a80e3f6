import json
import math
import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics

from analysis import confidence, evaluate
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
        "balanced_accuracy": metrics.balanced_accuracy_score(labels, predicted),
        "auroc": metrics.roc_auc_score(labels, probabilities, multi_class="ovr"),
        "average_precision": metrics.average_precision_score(np.eye(4)[labels], probabilities),
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
    unknown = math.nan
    expected = {"precision": [0.4] + 3 * [unknown], "recall": [1, 0, 0, unknown]}
    expected |= {"f1": [4 / 7, 0, 0, unknown], "predicted": [5, 0, 0, 0]}
    for name, values in expected.items():
        np.testing.assert_allclose(table[name], values)
    assert figures["macro_recall"] == pytest.approx(1 / 3)  # of the three classes with images
    assert figures["macro_precision"] == pytest.approx(0.4 / 3)
    assert figures["auroc"] == 0.5  # scores are equal, of the three classes with images
    assert math.isnan(evaluate.scores(labels[:2], logits[:2])["auroc"])  # one kind only


def test_top_k_breaks_ties_as_the_prediction_does():
    labels, logits = np.array([0, 1, 2]), np.zeros((3, 3))
    assert evaluate.top_k_accuracy(labels, logits, 1) == pytest.approx(1 / 3)
    assert evaluate.top_k_accuracy(labels, logits, 2) == pytest.approx(2 / 3)
    assert evaluate.scores(labels, logits)["accuracy"] == pytest.approx(1 / 3)


def test_confusion_and_its_pairs(made):
    labels, logits = made
    predicted = logits.argmax(axis=1)
    counts = evaluate.confusion(labels, predicted, 4)
    np.testing.assert_array_equal(counts, metrics.confusion_matrix(labels, predicted))
    small = np.array([[9, 5, 0], [1, 9, 0], [2, 0, 8]])
    pairs = evaluate.confused_pairs(small)
    assert pairs.values.tolist() == [[0, 1, 5, 1, 6, 0.75], [2, 0, 2, 0, 2, 0.25]]
    assert evaluate.confused_pairs(np.diag([3, 4])).empty


def test_a_run_is_scaled_by_its_validation_images_alone(tmp_path):
    path = write_run(tmp_path, "cnn", 0, count=400)
    run = load_run(path)
    figures = evaluate.evaluate(run)
    temperature = confidence.fit_temperature(run.validation["logits"], run.validation["labels"])
    assert figures["temperature"] == temperature != 1
    scaled = evaluate.softmax(run.test["logits"] / temperature)
    assert figures["nll_scaled"] == pytest.approx(metrics.log_loss(run.test["labels"], scaled))
    threshold = confidence.choose_threshold(
        evaluate.softmax(run.validation["logits"], temperature), run.validation["labels"]
    )
    kept = scaled.max(axis=1) >= threshold["confidence"]
    assert figures["answered"] == kept.mean() and 0 < kept.mean() < 1
    right = scaled.argmax(axis=1) == run.test["labels"]
    assert figures["accuracy_answered"] == right[kept].mean()


def test_sets_of_a_run_and_the_error_that_chance_makes(tmp_path):
    run = load_run(write_run(tmp_path, "cnn", 0, count=400))
    figures, labels = evaluate.evaluate(run), run.test["labels"]
    fitted = confidence.fit_sets(run.validation["logits"], run.validation["labels"])
    assert fitted["images"] == 200
    for level, name in ((0.9, "set90"), (0.95, "set95")):
        least = next(x["least"] for x in fitted["levels"] if x["level"] == level)
        probabilities = evaluate.softmax(run.test["logits"] / fitted["temperature"])
        sets = probabilities >= least * (1 - 1e-6)
        sets[np.arange(400), run.predicted] = True
        assert figures[f"{name}_coverage"] == sets[np.arange(400), labels].mean()
        assert figures[f"{name}_size"] == sets.sum(axis=1).mean()
        assert abs(figures[f"{name}_coverage"] - level) < 0.06
    assert figures["ece"] > 2 * figures["ece_expected"] and figures["ece_excess_p"] < 0.001
    assert figures["ece_scaled"] < figures["ece"]
    change = metrics.log_loss(labels, evaluate.softmax(run.test["logits"] / figures["temperature"]))
    assert figures["nll_scaled"] - figures["nll"] == pytest.approx(change - figures["nll"])
    few = evaluate.evaluate(load_run(write_run(tmp_path, "few", 0, count=30)))
    assert few["threshold"] == math.inf and few["answered"] == 0
    assert math.isnan(few["set95_size"]) and few["set90_size"] >= 1


def test_rankings_of_two_classes_equal_scikit_learns_with_ties():
    draw = np.random.default_rng(0)
    for decimals in (0, 1, 9):
        positive = np.arange(60) < 20
        score = np.round(draw.normal(size=60) + positive, decimals)
        values = evaluate.ranking_values(positive, score)
        auroc, average = values["auroc"].mean(), values["average_precision"].mean()
        assert auroc == pytest.approx(metrics.roc_auc_score(positive, score))
        assert average == pytest.approx(metrics.average_precision_score(positive, score))
    assert np.isnan(evaluate.ranking_values(positive, score * 0 + 1)["auroc"]).sum() == 0
    assert np.isnan(evaluate.ranking_values(positive[:20], score[:20])["auroc"]).all()
    labels, logits = np.array([0, 0, 1]), np.array([[2.0, 0], [0, 1], [1, 1]])
    figures = evaluate.scores(labels, logits)
    assert figures["auroc"] == 0.5 and figures["average_precision"] == 0.5


def test_values_of_an_image_are_what_leaving_it_out_changes():
    draw = np.random.default_rng(1)
    positive = np.arange(400) < 120
    score = draw.normal(size=400) + positive
    values = evaluate.ranking_values(positive, score)
    measures = {
        "auroc": metrics.roc_auc_score,
        "average_precision": metrics.average_precision_score,
    }
    for name, measure in measures.items():
        rest = [measure(np.delete(positive, i), np.delete(score, i)) for i in range(400)]
        jackknife = 400 * measure(positive, score) - 399 * np.array(rest)
        assert np.corrcoef(values[name], jackknife)[0, 1] > 0.999
        assert values[name].std() == pytest.approx(jackknife.std(), rel=0.05)


@pytest.mark.parametrize("few, copies", [(20, 1), (200, 1), (200, 4)])
def test_intervals_of_rankings_hold_the_truth(few, copies):
    draw = np.random.default_rng(0)
    truth = {"auroc": 0.9, "average_precision": 0.5983}  # normal scores, a tenth positive
    positive = np.arange(10 * few) % 10 == 0
    clusters = np.arange(10 * few) // 10 // copies if copies > 1 else None
    held = dict.fromkeys(truth, 0)
    for _ in range(150):
        score = draw.normal(size=10 * few) + 1.8124 * positive
        if copies > 1:  # a group holds the same images several times
            score = np.tile(score.reshape(-1, copies, 10)[:, :1], (1, copies, 1)).ravel()
        for name, values in evaluate.ranking_values(positive, score).items():
            low, high = evaluate.ranking_interval(values, positive, clusters)
            held[name] += (low <= truth[name] <= high) / 150
    assert min(held.values()) >= 0.9
    perfect = evaluate.ranking_values(positive, positive * 1.0)["auroc"]
    low, high = evaluate.ranking_interval(perfect, positive, None)
    assert low < 1 == pytest.approx(high)


def test_two_classes_have_intervals_and_one_kind_has_none(tmp_path):
    run = load_run(write_run(tmp_path, "cnn", 0, classes=["a", "b"]))
    figures = evaluate.evaluate(run)
    assert figures["auroc_ci95_low"] < figures["auroc"] < figures["auroc_ci95_high"]
    name = "average_precision"
    assert figures[f"{name}_ci95_low"] < figures[name] < figures[f"{name}_ci95_high"]
    run.test["labels"][:] = 0
    run.__dict__.pop("correct", None)
    assert math.isnan(evaluate.evaluate(run)["auroc_ci95_low"])
    assert "–" in evaluate.describe(run)


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
