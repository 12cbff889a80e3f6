import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score

from analysis import compare, evaluate
from analysis.page import tables
from analysis.runs import load_runs
from configs import base
from errors import UserError
from tests.analysis.fabricate import predictions, write_run


@pytest.fixture
def options():
    return base.get_config().compare


def groups_in(workdir):
    return compare.group_runs(load_runs(workdir))


def compared(workdir, **changes):
    options = base.get_config().compare
    options.update(changes)
    return compare.compare(workdir, load_runs(workdir), options)


def test_table_has_a_row_per_model_and_variant_best_on_validation_first(tmp_path):
    for seed in (0, 1, 2):
        write_run(tmp_path, "cnn", seed, 0.9)
        write_run(tmp_path, "linear", seed, 0.5)
        write_run(tmp_path, "linear", seed, 0.6, variant="l1=0.1")
    write_run(tmp_path, "knn", 0, 0.7)
    comparison = compared(tmp_path)
    groups, table = comparison.groups, comparison.table
    assert table["label"].tolist() == ["cnn", "knn", "linear (l1=0.1)", "linear"]
    assert table["rank"].tolist() == ["1", "2", "3", "4"]
    assert table["seeds"].tolist() == [3, 1, 3, 3]
    accuracies = [evaluate.evaluate(run)["accuracy"] for run in groups["cnn"]]
    row = table.iloc[0]
    assert [row.score, row.test_accuracy_mean] == pytest.approx([np.mean(accuracies)] * 2)
    assert row.test_accuracy_std == pytest.approx(np.std(accuracies, ddof=1))
    validated = [evaluate.evaluate(run)["validation_accuracy"] for run in groups["cnn"]]
    assert row.validation_score == pytest.approx(np.mean(validated))
    assert row.simultaneous_ci95_low < row.ci95_low < row.score < row.ci95_high
    assert row.runs == "cnn/seed0;cnn/seed1;cnn/seed2"
    assert math.isnan(table["test_accuracy_std"][1])
    assert math.isnan(table["train_images_per_second"][1])


def test_validation_ranks_and_the_test_part_does_not(tmp_path):
    """Also among the variants of a sweep."""
    for seed in (0, 1):
        for variant, accuracy in (("x=1", 0.8), ("x=2", 0.7)):
            path = write_run(tmp_path, "cnn", seed, accuracy, variant=variant)
            other = predictions(seed, 0.95 if variant == "x=2" else 0.5, 200)
            np.savez(path / "predictions_test.npz", **other)
    table = compared(tmp_path).table
    assert table.label.tolist() == ["cnn (x=1)", "cnn (x=2)"]
    assert table.score[0] < table.score[1]


def test_equal_models_are_tied(tmp_path):
    for model in ("b", "a", "c"):
        path = write_run(tmp_path, model, 0, 0.8 if model != "c" else 0.3)
        if model != "c":
            for part in ("test", "validation"):
                write_same(path, part)
    comparison = compared(tmp_path)
    assert comparison.table["rank"].tolist() == ["1=", "1=", "3"]
    row = comparison.pairs.iloc[0]
    assert row.difference == 0 and row.ci95_low < 0 < row.ci95_high and not row.established


def write_same(path, part):
    np.savez(
        path / f"predictions_{part}.npz", **predictions(0, 0.8, 200, stream=part == "validation")
    )


def test_tables_to_paste(tmp_path, options):
    write_run(tmp_path, "cnn_deep", 0, 0.9, variant="momentum=0.9, a_b=1%")
    write_run(tmp_path, "a|b", 0, 0.5)
    comparison = compare.compare(tmp_path, load_runs(tmp_path), options)
    compare.write_tables(comparison)
    report = tmp_path / "report"
    text = (report / "table.tex").read_text()
    assert r"cnn\_deep (momentum=0.9, a\_b=1\%)" in text and "\\toprule" in text
    lines = (report / "table.md").read_text().splitlines()
    assert len(lines) == 5 and lines[3].startswith(r"| a\|b |")
    assert lines[4].startswith("| always plain | – |")
    assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1
    stored = pd.read_csv(report / "table.csv")
    assert stored.test_accuracy_mean.tolist() == pytest.approx(
        comparison.table.test_accuracy_mean.tolist()
    )
    for name in ("pairs", "confused", "table"):
        assert all((report / f"{name}.{kind}").stat().st_size for kind in ("csv", "md", "tex"))
    assert len(pd.read_csv(report / "per_class.csv")) == 8


def test_all_seeds_of_a_model_are_compared_whatever_their_numbers(tmp_path):
    """Gap, interval, p and the table are of the same runs."""
    for model, accuracy, seeds in (("a", 0.9, (0, 1, 2, 3)), ("b", 0.6, (1, 2)), ("c", 0.59, (5,))):
        for seed in seeds:
            write_run(tmp_path, model, seed, accuracy)
    comparison = compared(tmp_path)
    groups, pairs = comparison.groups, comparison.pairs
    score = comparison.table.set_index("label").score
    assert list(zip(pairs["first"], pairs["second"], strict=True)) == list(
        itertools.combinations(groups, 2)
    )
    for row in pairs.itertuples():
        assert row.difference == pytest.approx(score[row.first] - score[row.second])
        assert row.ci95_low < row.difference < row.ci95_high
    assert pairs.established.tolist() == [True, True, False]
    assert comparison.table.group.tolist() == ["a", "b", "b"]
    for row in pairs.itertuples():
        both = list(zip(groups[row.first], groups[row.second], strict=False))
        assert row.kappa == pytest.approx(
            np.mean([cohen_kappa_score(a.predicted, b.predicted) for a, b in both])
        )
        assert row.agreement == pytest.approx(
            np.mean([(a.predicted == b.predicted).mean() for a, b in both])
        )


def test_models_tested_on_other_images_are_not_paired(tmp_path, options):
    write_run(tmp_path, "a", 0, 0.9)
    path = write_run(tmp_path, "b", 0, 0.6)
    test = predictions(0, 0.6, 200)
    np.savez(path / "predictions_test.npz", **test | {"ids": test["ids"][::-1]})
    comparison = compared(tmp_path)
    assert comparison.pairs.empty
    assert "Tested on other images, so not compared: b." in str(comparison.recommendation)
    assert comparison.table.group.tolist() == ["a", ""]
    write_run(tmp_path, "b", 1, 0.6)
    with pytest.raises(UserError, match="tested on different images"):
        compared(tmp_path)


def test_published_figures_stand_beside_ours(tmp_path):
    write_run(tmp_path, "cnn", 0, 0.9)
    write_run(tmp_path, "mlp", 0, 0.5)
    printed = tables.printed_table(compared(tmp_path, reference={"cnn": 83.0}).table)
    assert printed["published %"].tolist() == ["83.00", "–"]


def test_accuracy_without_the_images_that_leaked(tmp_path):
    write_run(tmp_path, "cnn", 0, 0.8)
    groups = groups_in(tmp_path)
    run = groups["cnn"][0]
    correct = compare.correctness([run])[0]
    leaked, near = np.flatnonzero(correct)[:10], np.flatnonzero(~correct)[:5]
    audit = {
        "leaks": [[f"test/{i}.png", "train/x.png"] for i in leaked],
        "near_leaks": [[f"test/{i}.png", "train/y.png"] for i in near],
    }
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "audit.json").write_text(json.dumps(audit))
    row = compared(tmp_path).table.iloc[0]
    assert (row.leaks, row.near_leaks) == (10, 15)
    assert row.without_leaks == pytest.approx((correct.sum() - 10) / 190)
    assert row.without_near_leaks == pytest.approx((correct.sum() - 10) / 185)
    (tmp_path / "audit" / "audit.json").unlink()
    plain = compared(tmp_path).table
    assert plain.without_leaks[0] == plain.test_accuracy_mean[0]
    assert "without leaks %" not in tables.printed_table(plain)


def test_images_that_only_one_model_gets_right(tmp_path):
    for model in ("a", "b", "c"):
        write_run(tmp_path, model, 0, {"a": 0.9, "b": 0.5, "c": 0.4}[model])
    groups = groups_in(tmp_path)
    right = {label: compare.correctness(runs)[0] for label, runs in groups.items()}
    expected = {
        (f"test/{i}.png", next(label for label in right if right[label][i]))
        for i in range(200)
        if sum(right[label][i] for label in right) == 1
    }
    alone = compare.only_one_right(groups)
    assert set(zip(alone["id"], alone["model"], strict=True)) == expected and len(expected) > 20
    run = groups["a"][0]
    names = dict(zip(run.test["ids"], run.test["labels"], strict=True))
    assert all(
        run.class_names[names[i]] == name
        for i, name in zip(alone["id"], alone["class"], strict=True)
    )
    assert compare.only_one_right({"a": groups["a"]}).empty


def test_confused_pairs_from_model_to_model(tmp_path):
    write_run(tmp_path, "a", 0, 0.9)
    write_run(tmp_path, "b", 0, 0.5)
    groups = groups_in(tmp_path)
    table = compare.confused_along(groups)
    assert list(table) == ["pair", "b", "a"]  # the least accurate first
    counts = evaluate.confusion(
        groups["b"][0].test["labels"], groups["b"][0].test["logits"].argmax(axis=1), 4
    )
    names = groups["b"][0].class_names
    for row in table.itertuples():
        i, j = (names.index(name) for name in row.pair.split(" / "))
        assert row.b == counts[i, j] + counts[j, i]
    top = evaluate.confused_pairs(counts).iloc[0]
    assert table.b.max() == top.errors


def test_options_are_those_of_the_experiment(tmp_path):
    assert compare.read_options(tmp_path).gradcam_images == base.get_config().compare.gradcam_images
    stored = {"reference": {"cnn": 83.0}, "gradcam_images": 2, "of another version": 1}
    (tmp_path / "experiment.json").write_text(json.dumps({"runs": [], "compare": stored}))
    options = compare.read_options(tmp_path)
    assert options.gradcam_images == 2 and options.reference.cnn == 83.0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_run_whose_logits_are_not_finite_is_damaged(tmp_path, value):
    for model in ("a", "b"):
        for seed in range(2):
            write_run(tmp_path, model, seed)
    path = tmp_path / "a/seed1/predictions_test.npz"
    arrays = dict(np.load(path))
    arrays["logits"][3, 0] = value
    np.savez(path, **arrays)
    comparison = compare.compare(tmp_path, load_runs(tmp_path), base.get_config().compare)
    assert "the training diverged" in comparison.reasons["a/seed1"]
    assert comparison.table.set_index("label").state["a"] == "1 of 2 seeds completed; 1 damaged"
    assert comparison.recommendation.use == "b"
