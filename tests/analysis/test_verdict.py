import json

import numpy as np
import pytest

from analysis import compare, verdict
from analysis.runs import load_runs
from analysis.uncertainty import Family
from configs import base
from tests.analysis.fabricate import write_run
from tests.analysis.simulate import draw, truth


def said(workdir, **changes):
    options = base.get_config().compare
    options.update(changes)
    return compare.compare(workdir, load_runs(workdir), options).recommendation


def answer(path, right, labels, classes=2):
    """Replaces a run's predictions: right or wrong bool [N], on both parts alike."""
    given = np.where(right, labels, (labels + 1) % classes)
    content = {
        "ids": np.array([f"test/{i}.png" for i in range(len(labels))]),
        "labels": labels.astype(np.int32),
        "logits": 4 * np.eye(classes, dtype=np.float32)[given],
    }
    for part in ("test", "validation"):
        np.savez(path / f"predictions_{part}.npz", **content)


def set_costs(workdir, **multiply_adds):
    for model, number in multiply_adds.items():
        for path in workdir.glob(f"{model}/*/summary.json"):
            summary = json.loads(path.read_text())
            summary["cost"] |= {"multiply_adds_per_image": number}
            path.write_text(json.dumps(summary))


def test_in_mid_grid_gap_and_interval_are_of_the_same_runs(tmp_path):
    """Seeds that scatter: the sentence must not set one seed's gap beside another's interval."""
    labels = np.random.default_rng(0).integers(0, 2, 400)
    for model, shares in {"a": (0.95, 0.7, 0.7), "b": (0.9,)}.items():
        for seed, share in enumerate(shares):
            path = write_run(tmp_path, model, seed, count=400, classes=["x", "y"])
            answer(path, np.random.default_rng([seed, ord(model)]).random(400) < share, labels)
    plan = {"runs": [f"{model}/seed{seed}" for model in "ab" for seed in range(3)]}
    (tmp_path / "experiment.json").write_text(json.dumps(plan))
    comparison = compare.compare(tmp_path, load_runs(tmp_path), base.get_config().compare)
    (pair,), text = comparison.pairs.itertuples(), str(comparison.recommendation)
    assert pair.first == "b" and not pair.established
    assert pair.ci95_low < pair.difference < pair.ci95_high
    assert "better than every other" not in text and "ahead" not in text
    assert "Preliminary: of b, 1 of 3 seeds completed; 2 not started." in text
    assert comparison.table.state.tolist() == ["1 of 3 seeds completed; 2 not started", ""]


def test_a_model_whose_seeds_failed_does_not_win(tmp_path):
    write_run(tmp_path, "good", 0, 0.95)
    write_run(tmp_path, "good", 1, status="diverged")
    write_run(tmp_path, "good", 2, status="diverged")
    for seed in range(3):
        write_run(tmp_path, "sound", seed, 0.8)
    result = said(tmp_path)
    assert result.use == "sound"
    assert "good: 1 of 3 seeds completed; 2 diverged. It is not recommended." in result.warnings
    for seed in range(3):
        (tmp_path / f"sound/seed{seed}/summary.json").write_text(json.dumps({"status": "failed"}))
    only = said(tmp_path)
    assert only.use is None and only.sentences[0].startswith("No model can be recommended")
    assert "good is the best on validation images" in only.sentences[1]
    assert "not recommended" not in str(only)
    assert only.warnings[1] == "Not compared, for no seed is complete: sound (3 failed)."


def test_who_lost_seeds_is_not_among_every_other_model(tmp_path):
    for model, accuracy in {"best": 0.97, "next": 0.95, "last": 0.5}.items():
        for seed in range(2):
            write_run(tmp_path, model, seed, accuracy)
    write_run(tmp_path, "best", 2, status="failed")
    (tmp_path / "experiment.json").write_text(
        json.dumps({"runs": ["planned/seed0_lr", "best/seed2"]})
    )
    result = said(tmp_path)
    assert result.use == "next" and "every other without failed seeds" in result.sentences[0]
    assert "Not compared, for no seed is complete: planned (lr) (1 not started)." in result.warnings
    assert result.sentences[2] == "The lost seeds of best may change it: train them again."


def test_models_selected_by_several_criteria_are_ranked_by_one(tmp_path):
    """Balanced accuracy of one beside the accuracy of another would rank criteria, not models."""
    labels = (np.arange(400) < 40).astype(int)
    for model, select, shares in (
        ("a", "loss", (0.9, 0.4)),
        ("b", "balanced_accuracy", (0.95, 0.4)),
    ):
        for seed in range(2):
            path = write_run(tmp_path, model, seed, classes=["x", "y"])
            draws = np.random.default_rng([seed, ord(model)]).random(400)
            answer(path, draws < np.where(labels == 0, *shares), labels)
            config = json.loads((path / "config.json").read_text())
            (path / "config.json").write_text(json.dumps(config | {"select": select}))
    table = compare.compare(tmp_path, load_runs(tmp_path)).table
    assert table.criterion.tolist() == ["accuracy"] * 2 and table.label.tolist() == ["b", "a"]
    assert table.validation_score.tolist() == pytest.approx(table.test_accuracy_mean.tolist())


def test_most_models_are_compared_where_one_was_tested_on_other_images(tmp_path):
    for model, accuracy in {"a": 0.6, "b": 0.7}.items():
        for seed in range(2):
            write_run(tmp_path, model, seed, accuracy)
    write_run(tmp_path, "easy", 0, 0.99, count=50)
    result = said(tmp_path)
    assert result.use in "ab"
    assert "Tested on other images, so not compared: easy." in result.warnings


def test_a_class_of_few_test_images_is_named(tmp_path):
    labels = (np.arange(300) < 1).astype(int)
    for model in "ab":
        for seed in range(2):
            path = write_run(tmp_path, model, seed, classes=["healthy", "sick"])
            answer(path, np.random.default_rng([seed, ord(model)]).random(300) < 0.9, labels)
    for path in tmp_path.glob("*/*/config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"select": "balanced_accuracy"}))
    assert any(
        text.startswith("Only 1 of the test images is “sick”") for text in said(tmp_path).warnings
    )


def test_a_place_of_two_digits_is_not_the_first(tmp_path):
    """Ten models lead on validation and fail on test: what is left is not "the best"."""
    labels = np.random.default_rng(0).integers(0, 2, 300)
    for i in range(11):
        path = write_run(tmp_path, f"m{i:02}", 0, count=300, classes=["x", "y"])
        answer(path, np.arange(300) < (295 - i if i < 10 else 200), labels)
        test = dict(np.load(path / "predictions_test.npz"))
        given = np.where(np.arange(300) < (150 if i < 9 else 290), labels, 1 - labels)
        np.savez(path / "predictions_test.npz", **test | {"logits": 4 * np.eye(2)[given]})
    set_costs(tmp_path, m10=1.0)
    comparison = compare.compare(tmp_path, load_runs(tmp_path), base.get_config().compare)
    assert comparison.table["rank"].tolist()[9:] == ["10", "11"]
    text = comparison.recommendation.sentences[0]
    assert "m09: it is the best on validation images of those that none beats" in text


@pytest.mark.parametrize(("images", "seeds"), [(400, 3), (30, 3), (400, 1)])
def test_equal_models_cannot_be_told_apart_and_the_cheapest_is_used(tmp_path, images, seeds):
    labels = np.random.default_rng(0).integers(0, 2, images)
    answers = draw(np.random.default_rng(1), (seeds,) * 4, images, 0)
    for model, of_seeds in zip(("a", "b", "c", "d"), answers, strict=True):
        for seed, right in enumerate(of_seeds):
            path = write_run(tmp_path, model, seed, count=images, classes=["x", "y"])
            # Equal on validation images, too: only the cost is left to decide.
            answer(path, answers[0][seed] > 0, labels)
            test = dict(np.load(path / "predictions_test.npz"))
            given = np.where(right > 0, labels, 1 - labels)
            test["logits"] = 4 * np.eye(2, dtype=np.float32)[given]
            np.savez(path / "predictions_test.npz", **test)
    set_costs(tmp_path, a=4e6, b=8e6, c=1e5, d=2e6)
    result = said(tmp_path, margin=100.0)
    assert result.use == "c" and "cannot be told apart" in result.sentences[0]
    assert "40 times fewer multiply-adds than a" in result.sentences[0]
    assert ("With one seed" in result.sentences[1]) == (seeds == 1)
    assert "better than every other" not in str(result)


@pytest.mark.parametrize("beaten", [False, True])
def test_the_sentence_says_what_holds_of_the_model_that_it_recommends(tmp_path, beaten):
    """The best ties with both others, of which one is established to be better than the other."""
    labels, rows = np.random.default_rng(0).integers(0, 2, 400), np.arange(400)
    wrong = {"best": rows < 28, "better": rows >= 370, "other": rows >= 358}
    for model, of_model in wrong.items():
        answer(write_run(tmp_path, model, 0, count=400, classes=["x", "y"]), ~of_model, labels)
    set_costs(tmp_path, **{"best": 8e6, "better": 8e6, "other" if beaten else "better": 1e5})
    options = base.get_config().compare
    options.margin = 10.0
    comparison = compare.compare(tmp_path, load_runs(tmp_path), options)
    (pair,) = comparison.pairs[comparison.pairs.established].itertuples()
    assert {pair.first, pair.second} == {"better", "other"}
    text = comparison.recommendation.sentences[0]
    if beaten:  # so it is not recommended, cheap as it is
        assert text.startswith("Use best: it is ") and "better and other cannot be told" in text
    else:
        assert text.startswith("Use better: it cannot be told apart from best on these test images")
        assert text.endswith("; other is worse.")


def test_unbalanced_classes_are_judged_against_the_majority(tmp_path):
    """95 to 5: who always answers the same has the highest accuracy, and no worth."""
    labels = (np.random.default_rng(0).random(600) < 0.05).astype(int)
    right = np.random.default_rng(1).random(600)
    for seed in range(2):
        always = write_run(tmp_path, "always_healthy", seed, classes=["healthy", "sick"])
        answer(always, labels == 0, labels)
        careful = write_run(tmp_path, "careful", seed, classes=["healthy", "sick"])
        answer(careful, right < np.where(labels == 0, 0.93, 0.9), labels)
    by_accuracy = said(tmp_path)
    text = str(by_accuracy)
    assert "not established to be better than always answering “healthy”" in text
    assert "of the test images are “healthy”, so accuracy says little" in text
    if by_accuracy.use == "always_healthy":
        assert "recognises no image of at least one class" in text
    for path in tmp_path.glob("*/*/config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"select": "balanced_accuracy"}))
    balanced = said(tmp_path)
    assert balanced.use == "careful" and "better than every other model" in balanced.sentences[0]
    assert "Its test balanced accuracy is 9" in balanced.sentences[1]
    assert not balanced.warnings


def test_a_hundred_classes_and_a_class_without_test_images(tmp_path):
    names = [f"class {i}" for i in range(100)]
    for model, accuracy in (("a", 0.8), ("b", 0.3)):
        for seed in (0, 1):
            path = write_run(tmp_path, model, seed, accuracy, count=500, classes=names)
            for part in ("test", "validation"):
                arrays = dict(np.load(path / f"predictions_{part}.npz"))
                kept = arrays["labels"] != 7
                stored = {key: value[kept] for key, value in arrays.items()}
                np.savez(path / f"predictions_{part}.npz", **stored)
    result = said(tmp_path)
    assert result.use == "a" and "better than every other model" in result.sentences[0]
    assert "nan" not in str(result)


def test_the_interval_of_the_recommended_model_covers_the_truth():
    """Chosen on validation images, its test score is not the luck of the draw."""
    held = 0
    for i in range(300):
        rng = np.random.default_rng(i)
        answers = draw(rng, (3,) * 10, 600, 0)
        of_all = Family({str(m): values[:, :300] for m, values in enumerate(answers)})
        chosen = max(range(10), key=lambda m: answers[m][:, 300:].mean())
        low, high = of_all.interval(str(chosen))
        held += low <= truth(0) <= high
    assert held / 300 >= 0.93


def test_numbers_and_names_in_sentences():
    assert verdict.listed(["a"]) == "a" and verdict.listed(["a", "b", "c"]) == "a, b and c"
    assert verdict.listed("abcdefgh") == "a, b, c, d, e and 3 others"
    assert [verdict.round_up(n) for n in (7, 99, 101, 2413)] == ["7", "99", "110", "2,500"]
