import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.proportion import proportion_confint

from analysis import robustness
from analysis.forward import compiled, load_classifier, load_test_images
from analysis.runs import group_runs, load_runs
from analysis.stress.attacks import EPSILONS, fgsm, loss_gradient, pgd
from analysis.stress.charts import draw_accuracies
from analysis.stress.corruptions import CORRUPTIONS, corrupt
from analysis.stress.summary import (
    CLEAN,
    accuracy_table,
    conclude,
    mean_interval,
    printed,
    summarise,
)
from errors import UserError
from models import create_model
from models.classifier import merge_model, split_model
from tests.analysis.fabricate import train_digits
from tests.conftest import ROOT

SIDE = 8
CHEAP = ("contrast", "occlusion")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, cache_dir):
    """Runs of three models on the digits at 8x8 pixels: linear twice, mlp and knn once."""
    folder, size = tmp_path_factory.mktemp("runs"), {"data__image_size": SIDE}
    return train_digits(folder, cache_dir, "linear,mlp,knn", "linear", epochs=4, **size)


@pytest.fixture(scope="module")
def groups(workdir):
    return group_runs(load_runs(workdir))


@pytest.fixture(scope="module")
def section(groups, tmp_path_factory):
    output = tmp_path_factory.mktemp("report")
    made = robustness.robustness_section(groups, output, 50, seeds=2, corruptions=CHEAP)
    return made, output


@pytest.fixture(scope="module")
def two_classes():
    """A linear model, its gradient, mid-grey images that no small step clips, and labels."""
    model, draw = create_model("linear", 2, image_size=SIDE), np.random.default_rng(0)
    _, params, stats = split_model(model)  # a new linear model is all zeros
    params = {path: draw.normal(size=x.shape).astype(np.float32) for path, x in params.items()}
    model = merge_model(model, params, stats)
    images = draw.integers(60, 190, (6, SIDE, SIDE, 3)).astype(np.float32)
    return model, compiled(model, loss_gradient), images, jnp.array([0, 1, 0, 1, 1, 0])


def keys_of(count):
    return jax.random.split(jax.random.key(5), count)


def margins(model, images, labels):
    logits = np.asarray(model(model.preprocess(jnp.asarray(images))))
    rows = np.arange(len(logits))
    return logits[rows, labels] - logits[rows, 1 - labels]


# --- attacks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [1, 8])
def test_fgsm_moves_a_linear_margin_by_the_norm_of_the_weights(two_classes, epsilon):
    model, gradient, images, labels = two_classes
    kernel = next(v for k, v in split_model(model)[1].items() if k.endswith("kernel"))
    weights = np.asarray(kernel, np.float64)  # [pixels, 2]
    assert weights.shape == (SIDE * SIDE * 3, 2) and (weights != 0).all()
    per_level = model.preprocessing.scale / np.tile(model.preprocessing.std, SIDE * SIDE)
    expected = epsilon * np.abs(per_level * (weights[:, 0] - weights[:, 1])).sum()
    attacked = fgsm(gradient, images, labels, epsilon, keys_of(6))
    lost = margins(model, images, labels) - margins(model, attacked, labels)
    np.testing.assert_allclose(lost, expected, rtol=1e-3)


def test_pgd_finds_the_optimum_of_a_linear_model(two_classes):
    _, gradient, images, labels = two_classes
    best = fgsm(gradient, images, labels, 4, keys_of(6))  # the corner of the box, exactly
    np.testing.assert_allclose(pgd(gradient, images, labels, 4, keys_of(6)), best, atol=1e-4)


def test_attacks_stay_within_epsilon_and_valid_pixels(two_classes):
    _, gradient, images, labels = two_classes
    extreme = np.where(images > 120, 254.0, 1.0).astype(np.float32)
    for attack in (fgsm, pgd):
        attacked = np.asarray(attack(gradient, extreme, labels, 4, keys_of(6)))
        assert attacked.min() == 0 and attacked.max() == 255
        assert np.abs(attacked - extreme).max() <= 4


def test_pgds_start_follows_its_keys(two_classes):
    _, gradient, images, labels = two_classes
    starts = [
        np.asarray(pgd(gradient, images, labels, 4, keys, steps=0))
        for keys in (keys_of(6), keys_of(6), keys_of(12)[6:])
    ]
    assert (starts[0] == starts[1]).all() and (starts[0] != starts[2]).any()
    assert np.abs(starts[0] - images).max() <= 4 and np.abs(starts[0] - images).mean() > 1.5


# --- measurement ----------------------------------------------------------------------------------


def test_outcomes_are_those_of_a_plain_loop(groups):
    run = groups["mlp"][0]
    model = load_classifier(run)
    images, labels = load_test_images(run)[:40], run.test["labels"][:40]  # more than a batch
    right = robustness.predict_under({"m": model}, images, labels, ("contrast",))["m"]
    for severity in range(1, 6):
        changed = jnp.asarray(corrupt(images, "contrast", severity))
        expected = np.asarray(model(model.preprocess(changed))).argmax(axis=1) == labels
        assert (right["contrast", severity] == expected).all()
    assert (right[CLEAN] == run.correct[:40]).all()
    table = accuracy_table({"m": {condition: x[None] for condition, x in right.items()}})
    clean = table[table.corruption == "clean"].iloc[0]
    assert clean.severity == 0 and clean.images == 40 and clean.accuracy == right[CLEAN].mean()
    low, high = proportion_confint(right[CLEAN].sum(), 40, method="wilson")
    assert (clean.ci95_low, clean.ci95_high) == (pytest.approx(low), pytest.approx(high))


def test_attacks_hurt_and_pgd_hurts_more_than_fgsm(groups):
    run = groups["mlp"][0]
    images, labels = load_test_images(run)[:100], run.test["labels"][:100]
    right = robustness.predict_under({"m": load_classifier(run)}, images, labels, ())["m"]
    accuracy = {condition: x.mean() for condition, x in right.items()}
    assert accuracy["PGD", 8] < accuracy[CLEAN]
    assert all(accuracy["PGD", e] <= accuracy["FGSM", e] <= accuracy[CLEAN] for e in EPSILONS)


def test_spread_takes_every_class_in_proportion():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [100, 60, 20]))
    rows = robustness.spread(labels, 45)
    assert (np.diff(rows) > 0).all()
    assert np.abs(np.bincount(labels[rows]) - [25, 15, 5]).max() <= 1
    assert robustness.spread(labels, 500).tolist() == list(range(180))


# --- numbers and words ----------------------------------------------------------------------------


def outcomes(clean, **corruptions):
    """Outcomes of one seed on ten images, of which a tenth a point is right."""
    values = {CLEAN: clean}
    for name, series in corruptions.items():
        values |= {(name, i): value for i, value in enumerate(series, start=1)}
    return {condition: np.arange(10)[None] < value for condition, value in values.items()}


def test_summary_by_hand():
    model = outcomes(9, jpeg=[8, 7], contrast=[9, 5], PGD=[6, 5])
    table = accuracy_table({"model": model, "plain": outcomes(6, jpeg=[5, 4], contrast=[6, 2])})
    model, plain = summarise(table, "plain").itertuples()
    assert model.corrupted == pytest.approx((0.75 + 0.7) / 2)
    assert model.kept == pytest.approx(model.corrupted / 0.9)
    assert model.mce == pytest.approx((0.5 / 1.1 + 0.6 / 1.2) / 2) and plain.mce == 1
    assert (model.worst, model.worst_accuracy) == ("contrast", pytest.approx(0.7))
    assert model.pgd == 0.5 and np.isnan(plain.pgd) and np.isnan(model.fgsm)


def test_no_ratio_to_a_baseline_without_errors():
    table = accuracy_table({"a": outcomes(9, contrast=[8]), "b": outcomes(10, contrast=[10])})
    assert printed(summarise(table, "b"))["mCE %"].tolist() == ["–", "–"]


def answers(clean, corrupted, count=200, seed=0):
    draw = np.random.default_rng(seed)
    return {
        CLEAN: draw.random((1, count)) < clean,
        ("jpeg", 1): draw.random((1, count)) < corrupted,
    }


def test_conclusions_say_whether_the_images_establish_them():
    far = {"steady": answers(0.9, 0.85), "brittle": answers(0.9, 0.3, seed=1)}
    text = conclude(far)
    assert text.startswith("steady has the highest accuracy under") and "is established" in text
    near = {"a": answers(0.9, 0.61), "b": answers(0.9, 0.6, seed=1)}
    assert "is not established" in conclude(near)
    alone = conclude({"a": far["steady"]})
    assert alone.startswith("a has the highest") and "follows" not in alone


def test_a_single_image_concludes_nothing():
    single = {"a": answers(1, 1, count=1), "b": answers(1, 0, count=1)}
    assert conclude(single).endswith("these images are too few to tell it from b.")


def test_the_paired_interval_of_a_difference_against_the_normal_one():
    draw = np.random.default_rng(4)
    first, second = (draw.random(400) < share for share in (0.8, 0.6))
    difference = first.astype(float) - second
    half = 1.96 * difference.std() / 20
    expected = difference.mean() + half * np.array([-1, 1])
    np.testing.assert_allclose(mean_interval(difference), expected, atol=0.01)


# --- the chapter and the command ------------------------------------------------------------------


def test_section_compares_every_model(section, groups):
    made, output = section
    table = pd.read_csv(output / "robustness.csv")
    assert set(table.model) == {"linear", "mlp", "knn"}
    assert set(table.images) == {50}
    assert table.groupby("model").seeds.first().to_dict() == {"linear": 2, "mlp": 1, "knn": 1}
    attacked = table[table.corruption.isin(["FGSM", "PGD"])]
    assert set(attacked.model) == {"linear", "mlp"}
    assert [picture.file for picture in made.pictures] == ["robustness.svg"]
    assert [item.picture.file for item in made.details] == ["corruptions.png"]
    assert all((output / picture.file).stat().st_size > 5000 for picture in made.pictures)
    shown = pd.DataFrame(made.tables[0].rows, columns=made.tables[0].columns).set_index("model")
    assert shown.loc["knn", "FGSM 2/255 %"] == "–" != shown.loc["mlp", "FGSM 2/255 %"]
    clean = table[table.corruption == "clean"].set_index("model").accuracy
    baseline = min(clean.index, key=lambda model: (clean[model], model))
    assert shown.loc[baseline, "mCE %"] == "100.0"
    assert f"that of {baseline}, lower is better" in made.tables[0].caption
    assert "50 test images, spread" in made.tables[0].caption
    assert len(made.text) == 1 and "95 % interval" in made.text[0]


def test_clean_accuracy_is_that_of_the_saved_predictions(section, groups):
    table = pd.read_csv(section[1] / "robustness.csv")
    clean = table[table.corruption == "clean"].set_index("model").accuracy
    for label, runs in groups.items():
        rows = robustness.spread(runs[0].test["labels"], 50)
        right = [run.correct[rows].mean() for run in runs]
        assert clean[label] == pytest.approx(np.mean(right))


def test_a_chosen_baseline_counts_as_all_errors(groups, tmp_path):
    pair = {label: groups[label] for label in ("linear", "mlp")}
    made = robustness.robustness_section(pair, tmp_path, 40, "mlp", corruptions=CHEAP[:1])
    row = next(row for row in made.tables[0].rows if row[0] == "mlp")
    assert row[made.tables[0].columns.index("mCE %")] == "100.0"
    assert "mean over one corruption at 5 severities" in made.tables[0].caption
    with pytest.raises(UserError, match="baseline: 'lineal' is not known.*Did you mean 'linear'"):
        robustness.robustness_section(pair, tmp_path, 40, "lineal", corruptions=CHEAP[:1])


def test_a_baseline_may_be_a_model_with_variants(groups):
    variants = {"mlp (a)": groups["mlp"], "linear (b)": groups["linear"]}
    assert robustness.baseline_labels("mlp", variants) == ["mlp (a)"]
    assert robustness.baseline_labels("linear (b)", variants) == ["linear (b)"]
    assert robustness.baseline_labels("", variants) == ["mlp (a)", "linear (b)"]
    with_cnn = variants | {"cnn": [SimpleNamespace(model="cnn")]}
    assert robustness.baseline_labels("", with_cnn) == ["cnn"]


def test_runs_of_different_test_images_are_refused(groups, tmp_path):
    other = load_runs(groups["mlp"][0].path.parent.parent)[-1]
    other.test["ids"] = other.test["ids"][::-1]
    with pytest.raises(UserError, match="tested on different images"):
        robustness.robustness_section({"mlp": [other], "knn": groups["knn"]}, tmp_path, 10)


def test_command(workdir, tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "analysis.robustness", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)  # noqa: S603

    wrong = run(str(workdir), "--corruptions=contrast,occlusions")
    assert wrong.returncode == 2
    assert "'occlusions' is not known" in wrong.stderr and "'occlusion'?" in wrong.stderr
    fine = run(
        str(workdir / "linear" / "seed0"), "--images=20", "--corruptions=contrast",
        f"--output={tmp_path / 'out'}",
    )  # fmt: skip
    assert fine.returncode == 0, fine.stderr
    assert (
        "clean acc. %" in fine.stdout
        and "linear has the highest accuracy under corruption" in fine.stdout
    )
    assert (tmp_path / "out" / "robustness.csv").exists()


def test_every_corruption_has_a_panel_and_a_row():
    outcomes = {
        "a $x$": {CLEAN: np.ones((2, 4), bool)}
        | {(name, s): np.zeros((2, 4), bool) for name in CORRUPTIONS for s in range(1, 6)}
        | {("FGSM", e): np.zeros((2, 4), bool) for e in EPSILONS},
        "knn": {c: np.ones((1, 4), bool) for c in [CLEAN, *(("jpeg", s) for s in range(1, 6))]},
    }
    axes = [axis for axis in draw_accuracies(outcomes).axes if axis.get_title()]
    assert len(axes) == len(CORRUPTIONS) + 1
    assert axes[0].get_title() == "Gaussian noise"
    last = axes[-1].get_lines()[-1]
    assert last.get_xdata().tolist() == [0, *EPSILONS]
    assert last.get_ydata().tolist() == [100, 0, 0, 0, 0]
