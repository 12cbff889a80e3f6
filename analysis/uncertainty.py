"""How sure can we be? Intervals, paired differences and corrections from bool arrays [S, N].

Such an array says which of N test images each of S seeds classifies correctly.
"""

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as mcnemar_test
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

LEVEL = 0.95

Interval = tuple[float, float]
UNKNOWN: Interval = (math.nan, math.nan)


def seed_interval(values: np.ndarray, how: str = "t", least: float = 0.0) -> Interval:
    """Returns the 95 % interval of the mean over seeds, NaN where values [S] do not vary.

    "t" assumes normal values; "bootstrap" (percentile, seeded) does not, but is too narrow for
    fewer than about ten seeds. The interval is cut to least..1.
    """
    values = np.asarray(values, float)
    if len(values) < 2 or np.ptp(values) == 0:
        return UNKNOWN
    if how == "t":
        ends = stats.t.interval(LEVEL, len(values) - 1, values.mean(), stats.sem(values))
    else:
        options = {"confidence_level": LEVEL, "method": "percentile", "rng": 0}
        ends = stats.bootstrap((values,), np.mean, **options).confidence_interval
    return _cut(*ends, least)


def _cut(low: float, high: float, least: float) -> Interval:
    return max(least, float(low)), min(1.0, float(high))


def wilson(right: float, count: float) -> Interval:
    """Returns the 95 % interval of a share (Wilson 1927); (0, 1) where nothing was counted."""
    if not count:
        return 0.0, 1.0
    low, high = proportion_confint(right, count, 1 - LEVEL, method="wilson")
    return float(low), float(high)


def image_interval(correct: np.ndarray) -> Interval:
    """Returns the 95 % interval of accuracy over test images, for these trained models (Wilson)."""
    images = np.asarray(correct, float).mean(axis=0)  # [N]
    mean, count = images.mean(), len(images)
    variance = images.var() / count
    # A share of that many images would vary as the mean over seeds does.
    effective = mean * (1 - mean) / variance if variance > 0 else count
    return wilson(mean * effective, effective)


def paired_difference(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Compares two models, both bool [S, N], image by image and seed by seed.

    `difference` (first minus second) has intervals for other `seeds_`, other `images_` and `both_`.
    `only_first` counts images that only the first gets right, mean over seeds. `p` decides:
    `p_both`, or for one seed, where that is NaN, `p_mcnemar`.
    """
    difference = np.asarray(first, float) - np.asarray(second, float)  # [S, N]
    seeds, images = difference.shape
    mean = float(difference.mean())
    by_image = difference.mean(axis=0)
    half = stats.norm.ppf((1 + LEVEL) / 2) * by_image.std(ddof=1) / math.sqrt(images)
    both, p_both = crossed(difference)
    p_mcnemar = mcnemar(first, second)
    return {
        "seeds": seeds,
        "difference": mean,
        **ends("both", both),
        **ends("seeds", seed_interval(difference.mean(axis=1), least=-1.0)),
        **ends("images", _cut(mean - half, mean + half, -1.0)),
        "only_first": float((difference > 0).sum(axis=1).mean()),
        "only_second": float((difference < 0).sum(axis=1).mean()),
        "p_mcnemar": p_mcnemar,
        "p_both": p_both,
        "p": p_mcnemar if math.isnan(p_both) else p_both,
    }


def ends(name: str, interval: Interval) -> dict[str, float]:
    """Returns an interval as two columns of a table."""
    return {f"{name}_ci95_low": interval[0], f"{name}_ci95_high": interval[1]}


def crossed(values: np.ndarray) -> tuple[Interval, float]:
    """Returns 95 % interval and p-value of the mean of values [S, N]; NaN for one seed.

    Two-way random-effects analysis of variance: the variance of the mean is (MS_seeds + MS_images
    - MS_rest) / (S N), never below what seeds or images give alone, with the degrees of freedom of
    Satterthwaite (1946).
    """
    seeds, images = values.shape
    if seeds < 2 or images < 2:
        return UNKNOWN, math.nan
    mean = values.mean()
    by_seed, by_image = values.mean(axis=1), values.mean(axis=0)
    rest = values - by_seed[:, None] - by_image[None, :] + mean
    freedom = np.array([seeds - 1, images - 1, (seeds - 1) * (images - 1)])
    of_seeds = images * ((by_seed - mean) ** 2).sum()
    of_images = seeds * ((by_image - mean) ** 2).sum()
    mean_squares = np.array([of_seeds, of_images, (rest**2).sum()]) / freedom
    total = max(mean_squares[0] + mean_squares[1] - mean_squares[2], *mean_squares[:2])
    if total == 0:  # every value is the same
        return (float(mean), float(mean)), float(mean == 0)
    degrees = total**2 / (mean_squares**2 / freedom).sum()
    scale = math.sqrt(total / (seeds * images))
    half = stats.t.ppf((1 + LEVEL) / 2, degrees) * scale
    p = 2 * stats.t.sf(abs(mean) / scale, degrees)
    return _cut(mean - half, mean + half, -1.0), float(p)


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the two-sided p-value of the exact McNemar test; it says nothing of other seeds.

    Of several seeds, it is twice the median p-value, which is valid however the tests depend on
    each other (Vovk and Wang 2020).
    """
    values = []
    for a, b in zip(first, second, strict=True):
        table = [[0, (a & ~b).sum()], [(~a & b).sum(), 0]]  # the test ignores the diagonal
        values.append(float(mcnemar_test(table, exact=True).pvalue))
    return values[0] if len(values) == 1 else min(1.0, 2 * float(np.median(values)))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Returns p-values corrected for their number (Holm 1979); NaN stay NaN."""
    p_values = np.asarray(p_values, float)
    corrected, known = np.full(len(p_values), math.nan), ~np.isnan(p_values)
    if known.any():
        corrected[known] = multipletests(p_values[known], method="holm")[1]
    return corrected


def indistinct(count: int, established: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns (first, last) of the longest stretches of ranks without an established pair (i < j).

    They are the bars of a critical-difference diagram (Demsar 2006) of `count` models.
    """
    stretches = []
    for first in range(count):
        ends = range(first, count)
        last = max(e for e in ends if established.isdisjoint(combinations(range(first, e + 1), 2)))
        if last > first and not (stretches and stretches[-1][1] >= last):
            stretches.append((first, last))
    return stretches


def pareto_front(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Returns the points that no other beats in cost and value, by cost; NaN are left out."""
    costs, values = np.asarray(costs, float), np.asarray(values, float)
    front = []
    for i in np.flatnonzero(~np.isnan(costs + values)):
        better = (costs < costs[i]) & (values >= values[i])
        if not (better | (costs <= costs[i]) & (values > values[i])).any():
            front.append(int(i))
    return sorted(front, key=lambda i: costs[i])
