import itertools
import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as their_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from analysis import uncertainty

DRAWS = 1000


def coverage(draw_interval, truth):
    held = 0
    for seed in range(DRAWS):
        low, high = draw_interval(np.random.default_rng(seed))
        held += low <= truth <= high
    return held / DRAWS


def test_seed_interval_equals_scipys():
    values = np.array([0.8, 0.82, 0.87])
    theirs = stats.t.interval(0.95, 2, loc=values.mean(), scale=stats.sem(values))
    np.testing.assert_allclose(uncertainty.seed_interval(values), theirs)
    assert all(math.isnan(value) for value in uncertainty.seed_interval(values[:1]))
    assert uncertainty.seed_interval(np.array([0.99, 1.0]))[1] == 1.0
    assert all(math.isnan(value) for value in uncertainty.seed_interval(np.array([0.5, 0.5])))


def test_bootstrap_over_seeds_is_seeded_and_within_the_values():
    values = np.random.default_rng(0).normal(0.8, 0.01, 30)
    low, high = uncertainty.seed_interval(values, "bootstrap")
    assert (low, high) == uncertainty.seed_interval(values, "bootstrap")
    assert values.min() < low < values.mean() < high < values.max()
    assert (low, high) == pytest.approx(uncertainty.seed_interval(values), abs=1e-3)


@pytest.mark.parametrize("right", [0, 1, 37, 60])
def test_image_interval_of_one_seed_is_wilsons(right):
    correct = np.arange(60)[None] < right
    theirs = stats.binomtest(right, 60).proportion_ci(method="wilson")
    assert uncertainty.image_interval(correct) == pytest.approx((theirs.low, theirs.high))
    assert uncertainty.image_interval(correct) == pytest.approx(
        proportion_confint(right, 60, method="wilson")
    )
    twice = np.repeat(correct, 3, axis=0)  # seeds that agree add nothing
    assert uncertainty.image_interval(twice) == pytest.approx((theirs.low, theirs.high))


def test_wilson_interval_of_eight_in_ten():
    assert uncertainty.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert uncertainty.wilson(0, 0) == (0, 1)


@pytest.mark.parametrize("accuracy", [0.6, 0.9, 0.97])
def test_image_interval_of_one_seed_covers_the_truth(accuracy):
    share = coverage(
        lambda rng: uncertainty.image_interval(rng.random((1, 500)) < accuracy), accuracy
    )
    assert 0.93 <= share <= 0.97


def test_image_interval_of_several_seeds_covers_the_truth():
    """Images differ in difficulty, so the seeds' mistakes go together."""
    truth = 8 / (8 + 2)

    def draw(rng):
        easy = rng.beta(8, 2, 500)
        return uncertainty.image_interval(rng.random((3, 500)) < easy)

    assert 0.93 <= coverage(draw, truth) <= 0.97


def test_interval_over_seeds_covers_the_truth():
    share = coverage(lambda rng: uncertainty.seed_interval(rng.normal(0.8, 0.01, 4)), 0.8)
    assert 0.93 <= share <= 0.97


def interval(difference, name):
    return difference[f"{name}_ci95_low"], difference[f"{name}_ci95_high"]


def draw_pair(rng, first, second, seeds=4, images=600, seed_scatter=0.01):
    """Two models on images of common difficulty; each seed is a little better or worse."""
    difficulty = rng.normal(0, 0.15, images)

    def model(accuracy):
        chance = accuracy + difficulty[None] + rng.normal(0, seed_scatter, (seeds, 1))
        return rng.random((seeds, images)) < chance

    return model(first), model(second)


def test_paired_interval_over_images_covers_the_truth():
    def draw(rng):
        pair = draw_pair(rng, 0.6, 0.55, seeds=1, seed_scatter=0)
        return interval(uncertainty.paired_difference(*pair), "images")

    assert 0.93 <= coverage(draw, 0.05) <= 0.97


@pytest.mark.parametrize(("seed_scatter", "highest"), [(0.05, 0.97), (0.01, 0.99)])
def test_paired_interval_over_seeds_and_images_covers_the_truth(seed_scatter, highest):
    """It errs to the wide side where the scatter of seeds is as small as the noise in it."""

    def draw(rng):
        pair = draw_pair(rng, 0.6, 0.55, seed_scatter=seed_scatter)
        return interval(uncertainty.paired_difference(*pair), "both")

    assert 0.93 <= coverage(draw, 0.05) <= highest


def test_intervals_that_leave_a_source_of_chance_out_are_too_narrow():
    def draw(rng):
        pair = draw_pair(rng, 0.6, 0.55, seed_scatter=0.05)
        return interval(uncertainty.paired_difference(*pair), "images")

    assert coverage(draw, 0.05) < 0.8


def test_p_value_over_both_errs_at_most_as_often_as_it_says():
    wrong = sum(
        uncertainty.paired_difference(*draw_pair(np.random.default_rng(i), 0.6, 0.6))["p"] < 0.05
        for i in range(DRAWS)
    )
    assert wrong / DRAWS < 0.065


def test_crossed_interval_excludes_zero_exactly_when_p_is_small():
    for seed in range(30):
        difference = uncertainty.paired_difference(
            *draw_pair(np.random.default_rng(seed), 0.62, 0.58)
        )
        low, high = interval(difference, "both")
        assert (low > 0 or high < 0) == (difference["p_both"] < 0.05)
        assert low < difference["difference"] < high


def test_crossed_mean_squares_equal_an_analysis_of_variance():
    """Against statsmodels' two-way table of the same values."""
    import pandas as pd
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    values = np.random.default_rng(0).normal(0.05, 0.3, (4, 12)) + np.linspace(-0.2, 0.2, 12)
    rows = [
        {"seed": s, "image": i, "value": values[s, i]}
        for s, i in itertools.product(range(4), range(12))
    ]
    table = anova_lm(ols("value ~ C(seed) + C(image)", pd.DataFrame(rows)).fit())
    squares = (table["sum_sq"] / table["df"]).to_numpy()
    total = max(squares[0] + squares[1] - squares[2], squares[0], squares[1])
    degrees = total**2 / (squares**2 / table["df"].to_numpy()).sum()
    half = stats.t.ppf(0.975, degrees) * math.sqrt(total / values.size)
    interval, _ = uncertainty.crossed(values)
    assert interval == pytest.approx((values.mean() - half, values.mean() + half))


def test_equal_and_opposite_models():
    correct = np.random.default_rng(0).random((3, 50)) < 0.7
    same = uncertainty.paired_difference(correct, correct)
    assert (same["difference"], same["p_both"], same["p_mcnemar"]) == (0, 1, 1)
    assert interval(same, "both") == (0, 0)
    opposite = uncertainty.paired_difference(np.ones((3, 50), bool), np.zeros((3, 50), bool))
    assert (opposite["difference"], opposite["p_both"]) == (1, 0)
    assert interval(opposite, "both") == (1, 1)
    assert opposite["p_mcnemar"] < 1e-12


def test_one_seed_decides_by_mcnemar():
    first, second = draw_pair(np.random.default_rng(0), 0.8, 0.6, seeds=1)
    difference = uncertainty.paired_difference(first, second)
    table = [[0, (first & ~second).sum()], [(~first & second).sum(), 0]]
    assert difference["p"] == pytest.approx(their_mcnemar(table, exact=True).pvalue)
    discordant = (first != second).sum()
    assert difference["p"] == pytest.approx(
        stats.binomtest(int((first & ~second).sum()), int(discordant)).pvalue
    )
    assert math.isnan(difference["seeds_ci95_low"]) and math.isnan(difference["both_ci95_low"])
    assert difference["only_first"] - difference["only_second"] == pytest.approx(
        difference["difference"] * first.shape[1]
    )


def test_mcnemar_of_several_seeds_is_twice_the_median():
    first, second = draw_pair(np.random.default_rng(1), 0.62, 0.58, seeds=5)
    each = [uncertainty.mcnemar(a[None], b[None]) for a, b in zip(first, second, strict=True)]
    assert uncertainty.mcnemar(first, second) == pytest.approx(min(1, 2 * sorted(each)[2]))


def test_holm_by_hand_and_against_statsmodels():
    values = [0.01, 0.04, 0.03, 0.005]
    np.testing.assert_allclose(uncertainty.holm(values), [0.03, 0.06, 0.06, 0.02])
    with_gap = uncertainty.holm([0.01, math.nan, 0.04])
    assert math.isnan(with_gap[1])
    np.testing.assert_allclose(with_gap[[0, 2]], multipletests([0.01, 0.04], method="holm")[1])
    assert len(uncertainty.holm([])) == 0


def test_indistinct_stretches():
    every = set(itertools.combinations(range(4), 2))
    assert uncertainty.indistinct(4, every) == []
    assert uncertainty.indistinct(4, set()) == [(0, 3)]
    assert uncertainty.indistinct(4, every - {(0, 1), (1, 2)}) == [(0, 1), (1, 2)]
    assert uncertainty.indistinct(4, {(0, 3)}) == [(0, 2), (1, 3)]
    assert uncertainty.indistinct(1, set()) == []


def test_pareto_front_against_the_definition():
    rng = np.random.default_rng(0)
    costs, values = rng.integers(0, 8, 30).astype(float), rng.integers(0, 8, 30).astype(float)
    front = uncertainty.pareto_front(costs, values)
    for i in range(30):
        beaten = any(
            costs[j] <= costs[i]
            and values[j] >= values[i]
            and (costs[j], values[j]) != (costs[i], values[i])
            for j in range(30)
        )
        assert (i in front) == (not beaten)
    assert uncertainty.pareto_front([1, math.nan, 2], [1, 2, 0.5]) == [0]
