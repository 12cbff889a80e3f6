import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score

from analysis import compare, evaluate, uncertainty
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


def test_table_has_a_row_per_model_and_variant_best_first(tmp_path, options):
    for seed in (0, 1, 2):
        write_run(tmp_path, "cnn", seed, 0.9)
        write_run(tmp_path, "linear", seed, 0.5)
        write_run(tmp_path, "linear", seed, 0.6, variant="l1=0.1")
    write_run(tmp_path, "knn", 0, 0.7)
    groups = groups_in(tmp_path)
    table = compare.make_table(groups, options)
    assert table["model"].tolist() == ["cnn", "knn", "linear", "linear"]
    assert table["variant"].tolist() == ["", "", "l1=0.1", ""]
    assert table["seeds"].tolist() == [3, 1, 3, 3]
    accuracies = [evaluate.evaluate(run)["accuracy"] for run in groups["cnn"]]
    row = table.iloc[0]
    assert row.test_accuracy_mean == pytest.approx(np.mean(accuracies))
    assert row.test_accuracy_std == pytest.approx(np.std(accuracies, ddof=1))
    assert (row.seeds_ci95_low, row.seeds_ci95_high) == uncertainty.seed_interval(accuracies)
    correct = compare.correctness(groups["cnn"])
    assert (row.images_ci95_low, row.images_ci95_high) == uncertainty.image_interval(correct)
    assert row.runs == "cnn/seed0;cnn/seed1;cnn/seed2"
    assert math.isnan(table["test_accuracy_std"][1])
    assert math.isnan(table["train_images_per_second"][1])
    options.seed_interval = "bootstrap"
    other = compare.make_table(groups, options).iloc[0]
    assert (
        other.seeds_ci95_low
        == uncertainty.seed_interval(accuracies, "bootstrap")[0]
        > row.seeds_ci95_low
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
    assert len(lines) == 4 and lines[3].startswith(r"| a\|b |")
    assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1
    stored = pd.read_csv(report / "table.csv")
    assert stored.test_accuracy_mean.tolist() == pytest.approx(
        comparison.table.test_accuracy_mean.tolist()
    )
    for name in ("pairs", "confused", "table"):
        assert all((report / f"{name}.{kind}").stat().st_size for kind in ("csv", "md", "tex"))
    assert len(pd.read_csv(report / "per_class.csv")) == 8


def test_pairs_are_compared_image_by_image_and_seed_by_seed(tmp_path):
    for model, accuracy, seeds in (
        ("a", 0.9, (0, 1, 2, 3)),
        ("b", 0.6, (1, 2, 3, 4)),
        ("c", 0.59, (1, 2, 3, 4)),
    ):
        for seed in seeds:
            write_run(tmp_path, model, seed, accuracy)
    groups = groups_in(tmp_path)
    pairs = compare.make_pairs(groups)
    labels = list(groups)
    assert list(zip(pairs["first"], pairs["second"], strict=True)) == list(
        itertools.combinations(labels, 2)
    )
    assert pairs.seeds.tolist() == [3, 3, 4]
    first = compare.correctness(groups[labels[0]][1:])
    second = compare.correctness(groups[labels[1]][:3])
    expected = uncertainty.paired_difference(first, second)
    row = pairs.iloc[0]
    assert row.difference == pytest.approx(first.mean() - second.mean())
    assert row[list(expected)].tolist() == list(expected.values())
    np.testing.assert_allclose(pairs.p_holm, uncertainty.holm(pairs.p))
    assert pairs.established.tolist() == [True, True, False]
    assert compare.established(groups, pairs) == {(0, 1), (0, 2)}
    choices = [
        [run.test["logits"].argmax(axis=1) for run in runs]
        for runs in (groups["a"][1:], groups[labels[1]][:3])
    ]
    kappa = np.mean([cohen_kappa_score(a, b) for a, b in zip(*choices, strict=True)])
    assert row.kappa == pytest.approx(kappa)
    assert row.agreement == pytest.approx(
        np.mean([(a == b).mean() for a, b in zip(*choices, strict=True)])
    )


def test_models_tested_on_other_images_are_not_paired(tmp_path, options):
    write_run(tmp_path, "a", 0, 0.9)
    path = write_run(tmp_path, "b", 0, 0.6)
    test = predictions(0, 0.6, 200)
    np.savez(path / "predictions_test.npz", **test | {"ids": test["ids"][::-1]})
    groups = groups_in(tmp_path)
    pairs = compare.make_pairs(groups)
    assert pairs.empty
    text = compare.answer(compare.make_table(groups, options), pairs)
    assert "tested on different images" in text
    write_run(tmp_path, "b", 1, 0.6)
    with pytest.raises(UserError, match="tested on different images"):
        groups_in(tmp_path)


def test_published_figures_stand_beside_ours(tmp_path, options):
    write_run(tmp_path, "cnn", 0, 0.9)
    write_run(tmp_path, "mlp", 0, 0.5)
    options.reference = {"cnn": 83.0}
    printed = tables.printed_table(compare.make_table(groups_in(tmp_path), options))
    assert printed["published %"].tolist() == ["83.00", "–"]


def test_accuracy_without_the_images_that_leaked(tmp_path, options):
    write_run(tmp_path, "cnn", 0, 0.8)
    groups = groups_in(tmp_path)
    run = groups["cnn"][0]
    correct = compare.correctness([run])[0]
    leaked, near = np.flatnonzero(correct)[:10], np.flatnonzero(~correct)[:5]
    audit = {
        "leaks": [[f"test/{i}.png", "train/x.png"] for i in leaked],
        "near_leaks": [[f"test/{i}.png", "train/y.png"] for i in near],
    }
    row = compare.make_table(groups, options, audit).iloc[0]
    assert (row.leaks, row.near_leaks) == (10, 15)
    assert row.without_leaks == pytest.approx((correct.sum() - 10) / 190)
    assert row.without_near_leaks == pytest.approx((correct.sum() - 10) / 185)
    plain = compare.make_table(groups, options).iloc[0]
    assert plain.without_leaks == plain.test_accuracy_mean
    assert "without leaks %" not in tables.printed_table(compare.make_table(groups, options))


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


@pytest.mark.parametrize(
    ("accuracies", "seeds", "expected"),
    [
        (
            {"a": 0.9, "b": 0.5},
            3,
            "ahead of every other model by more than chance explains (over seeds",
        ),
        ({"a": 0.8, "b": 0.799}, 3, "No difference from another model is established (over seeds"),
        ({"a": 0.8, "b": 0.799, "c": 0.3}, 3, "is not established (over seeds"),
        ({"a": 0.9, "b": 0.5}, 1, "what another seed would give is unknown"),
        ({"a": 0.9}, 3, "over test images)."),
    ],
)
def test_the_answer_says_how_sure(tmp_path, options, accuracies, seeds, expected):
    for (model, accuracy), seed in itertools.product(accuracies.items(), range(seeds)):
        write_run(tmp_path, model, seed, accuracy)
    groups = groups_in(tmp_path)
    table, pairs = compare.make_table(groups, options), compare.make_pairs(groups)
    text = compare.answer(table, pairs)
    assert expected in text and text.startswith(
        f"{next(iter(groups))} has the highest test accuracy"
    )


def test_options_are_those_of_the_experiment(tmp_path):
    assert compare.read_options(tmp_path).gradcam_images == base.get_config().compare.gradcam_images
    stored = {"reference": {"cnn": 83.0}, "gradcam_images": 2, "of another version": 1}
    (tmp_path / "experiment.json").write_text(json.dumps({"runs": [], "compare": stored}))
    options = compare.read_options(tmp_path)
    assert options.gradcam_images == 2 and options.reference.cnn == 83.0
