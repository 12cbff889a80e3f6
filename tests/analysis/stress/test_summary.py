import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

from analysis.stress.attacks import EPSILONS
from analysis.stress.charts import draw_accuracies
from analysis.stress.corruptions import CORRUPTIONS
from analysis.stress.summary import (
    CLEAN,
    FEWEST_ERRORS,
    accuracy_table,
    conclude,
    printed,
    shares,
    summarise,
)
from analysis.uncertainty import Family


def outcomes(clean, **corruptions):
    """Outcomes of one seed on ten images, of which a tenth a point is right."""
    values = {CLEAN: clean}
    for name, series in corruptions.items():
        values |= {(name, i): value for i, value in enumerate(series, start=1)}
    return {condition: np.arange(10)[None] < value for condition, value in values.items()}


def summary_of(by_model, baseline):
    return summarise(accuracy_table(by_model), Family(shares(by_model)), baseline)


def drawn(effects, seeds, images, scatter, draw, conditions=5):
    """Outcomes of models on the same images: an image's difficulty, a seed's luck, and the rest."""
    levels = np.linspace(1.5, 0.2, conditions)[:, None]
    image = draw.normal(size=images)
    by_model = {}
    for label, effect in effects.items():
        luck = scatter * draw.normal(size=(seeds, 1, 1)) + effect
        rest = draw.normal(size=(seeds, 1, images)) + draw.normal(size=(seeds, conditions, images))
        right = levels + luck + image + rest > 0  # [S, C, N]
        by_model[label] = {("jpeg", c + 1): right[:, c] for c in range(conditions)}
    return by_model


# --- the conclusion -------------------------------------------------------------------------------


@pytest.mark.parametrize("scatter", [0.0, 0.15])  # of seeds, in deviations: 0 or about 3 points
def test_equal_models_are_seldom_told_apart(scatter):
    draw, wrong = np.random.default_rng(0), 0
    for _ in range(400):
        family = Family(shares(drawn(dict.fromkeys("abcde", 0.0), 3, 128, scatter, draw)))
        claimed = "its lead over" in conclude(family)
        assert not claimed or family.pairs.established.any()
        wrong += family.pairs.established.any()  # what letters and table speak of, too
    assert wrong <= 0.06 * 400


def test_a_better_model_is_found():
    draw, found = np.random.default_rng(1), 0
    for _ in range(40):
        effects = {"steady": 0.8, "a": 0.0, "b": 0.0}
        text = conclude(Family(shares(drawn(effects, 3, 128, 0.1, draw))))
        found += text.startswith("steady has") and "over a and b is established" in text.replace(
            "b and a", "a and b"
        )
    assert found >= 36


def test_the_conclusion_names_who_is_behind_and_who_is_near():
    draw = np.random.default_rng(2)
    effects = {"best": 0.6, "near": 0.6, "far": -1.0}
    family = Family(shares(drawn(effects, 3, 200, 0.05, draw)))
    text, first = conclude(family), max(family.mean, key=family.mean.get)
    other = {"best": "near", "near": "best"}[first]
    low, high = family.interval(first)
    assert text == (
        f"{first} has the highest accuracy under corruption, {100 * family.mean[first]:.1f} % "
        f"(95 % interval {100 * low:.1f} to {100 * high:.1f}); its lead over far is established, "
        f"that over {other} is not."
    )
    assert conclude(Family({"a": np.full((2, 9), 0.5)})).startswith("a has the highest")


def test_many_models_are_counted():
    draw = np.random.default_rng(3)
    effects = {f"m{i:02d}": -0.02 * (i > 0) for i in range(12)}
    text = conclude(Family(shares(drawn(effects, 2, 60, 0.0, draw))))
    assert text.endswith("but no lead over another model is established.")
    effects = {"best": 2.0} | {f"m{i:02d}": -0.5 for i in range(12)}
    text = conclude(Family(shares(drawn(effects, 2, 200, 0.0, draw))))
    assert "and 7 others is established" in text and len(text) < 220


# --- numbers --------------------------------------------------------------------------------------


def test_an_image_counts_by_the_share_of_corruptions_it_withstands():
    by_model = {"m": outcomes(9, jpeg=[8, 7], contrast=[9, 5], PGD=[0, 0])}
    by_model["better"] = outcomes(9, jpeg=[10, 10])
    values = shares(by_model)
    assert list(values) == ["better", "m"]
    np.testing.assert_allclose(values["m"], [[1] * 5 + [0.75] * 2 + [0.5, 0.25, 0]])


def test_the_table_by_hand():
    right = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
    table = accuracy_table({"m": {("jpeg", 2): right[:1], CLEAN: right}})
    clean, corrupted = table.itertuples()
    assert (clean.corruption, clean.severity, clean.accuracy) == (*CLEAN, 0.625)
    assert (clean.seeds, clean.images, corrupted.seeds) == (2, 4, 1)
    ends = proportion_confint(3, 4, method="wilson")
    found = corrupted.images_ci95_low, corrupted.images_ci95_high
    np.testing.assert_allclose(found, ends)


def test_summary_by_hand():
    by_model = {
        "model": outcomes(9, jpeg=[8, 7], contrast=[9, 5], PGD=[6, 5], pixelate=[4] * 5),
        "plain": outcomes(6, jpeg=[5, 4], contrast=[6, 2], pixelate=[2] * 5),
    }
    model, plain = summary_of(by_model, "plain").itertuples()
    assert model.corrupted == pytest.approx((8 + 7 + 9 + 5 + 4 * 5) / 90)
    assert model.kept == pytest.approx(model.corrupted / 0.9)
    assert model.errors == pytest.approx((2 + 3 + 1 + 5 + 30) / (5 + 6 + 4 + 8 + 40))
    assert plain.errors == 1
    assert (model.worst, model.worst_accuracy) == ("pixelate", pytest.approx(0.4))
    assert model.pgd == 0.5 and np.isnan(plain.pgd)
    assert model.corrupted_low < model.corrupted < model.corrupted_high


def test_one_corruption_that_the_baseline_survives_does_not_blow_up_the_ratio():
    base = {"saturation": [10] * 5, "pixelate": [3] * 5}  # no error, and 35
    other = {"saturation": [8] * 5, "pixelate": [3] * 5}  # 10 errors, and 35
    found = summary_of({"a": outcomes(10, **other), "base": outcomes(10, **base)}, "base")
    assert found.set_index("model").errors["a"] == pytest.approx(45 / 35)


def test_no_ratio_to_a_baseline_with_few_errors():
    few = {"a": outcomes(9, jpeg=[5] * 5), "b": outcomes(10, jpeg=[5] * 4 + [10])}
    assert FEWEST_ERRORS > 5 * 4
    assert printed(summary_of(few, "b"), "b")["errors, % of b's"].tolist() == ["–", "–"]
    none = {"a": outcomes(0, jpeg=[0] * 5), "b": outcomes(10, jpeg=[10] * 5)}
    shown = printed(summary_of(none, "b"), "b")
    assert not shown.astype(str).apply(lambda column: column.str.contains("nan")).any(axis=None)
    assert shown.set_index("model")["kept %"].tolist() == ["–", "100.0"]


def test_every_corruption_has_a_panel():
    right = {
        "a $x$": {CLEAN: np.ones((2, 4), bool)}
        | {(name, s): np.zeros((2, 4), bool) for name in CORRUPTIONS for s in range(1, 6)}
        | {("FGSM", e): np.zeros((1, 4), bool) for e in EPSILONS},  # of the first seed alone
        "knn": {c: np.ones((1, 4), bool) for c in [CLEAN, *(("jpeg", s) for s in range(1, 6))]},
    }
    axes = [axis for axis in draw_accuracies(right).axes if axis.get_title()]
    assert len(axes) == len(CORRUPTIONS) + 1
    assert axes[0].get_title() == "Gaussian noise"
    last = axes[-1].get_lines()[-1]
    assert last.get_xdata().tolist() == [0, *EPSILONS]
    assert last.get_ydata().tolist() == [100, 0, 0, 0, 0]
