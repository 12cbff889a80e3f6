import math

import numpy as np
import pytest
from scipy import stats

from analysis.combine import gains
from analysis.combine.gains import gain_interval
from analysis.uncertainty import image_interval


def test_the_interval_is_that_of_bonett_and_price():
    gain = np.repeat([1.0, -1.0, 0.0], [14, 5, 81])
    low, high = gain_interval(gain)
    forth, back = 15 / 102, 6 / 102  # one image more for, one against
    error = math.sqrt((forth + back - (forth - back) ** 2) / 101)
    half = stats.t.ppf(0.975, 101) * error
    assert (low, high) == (pytest.approx(forth - back - half), pytest.approx(forth - back + half))
    corrected = gain_interval(gain, tests=10)
    assert corrected[0] < low and corrected[1] > high


@pytest.mark.parametrize("clusters", [None, np.repeat(range(10), 4)])
@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_no_interval_of_a_gain_has_zero_width(value, clusters):
    low, high = gain_interval(np.full(40, value), clusters)
    assert -1 <= low <= value <= high <= 1 and high - low > 0.05


@pytest.mark.parametrize(("count", "size"), [(40, 1), (362, 1), (20, 10)])
def test_intervals_of_gains_cover_the_truth(count, size):
    """Three members of latent difficulty, by majority; images of one group share their outcome."""
    draw, replicates = np.random.default_rng(count), 1500
    difficulty = draw.beta(4, 1, (replicates, count, 1))
    right = draw.random((replicates, count, 3)) < difficulty
    gain = (right.sum(axis=2) > 1) - right.mean(axis=2)
    p = stats.beta(4, 1).moment
    truth = 3 * p(2) - 2 * p(3) - p(1)  # E[3 q^2 - 2 q^3 - q]
    clusters = np.repeat(range(count), size) if size > 1 else None
    ends = np.array([gain_interval(np.repeat(row, size), clusters) for row in gain])
    covered = ((ends[:, 0] <= truth) & (truth <= ends[:, 1])).mean()
    assert covered > 0.94


def test_the_interval_of_accuracy_is_wilsons_and_knows_groups():
    def interval(correct, clusters=None):
        none = np.zeros(0)
        row = gains.Row("", "", "", 1.0, correct, none, none, (0.0, 0.0), clusters)
        return tuple(gains.figures([row])[["ci95_low", "ci95_high"]].iloc[0])

    correct = np.random.default_rng(0).random((1, 200)) < 0.8
    assert interval(correct) == pytest.approx(image_interval(correct), abs=2e-3)
    many = np.repeat(correct, 5, axis=1)
    grouped = interval(many, np.repeat(range(200), 5))
    assert grouped == pytest.approx(interval(correct))
    low, high = interval(np.ones((1, 30), bool), np.repeat(range(10), 3))
    assert (low, high) == pytest.approx((10 / (10 + stats.norm.ppf(0.975) ** 2), 1))
