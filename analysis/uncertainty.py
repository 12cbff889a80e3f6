"""How sure can we be? Intervals, paired differences and corrections, on arrays of right and wrong.

Two things are drawn at random in a comparison: the seeds of training and the test images. Each
function says over which of them its interval speaks. Correctness is a bool array [S, N]: seed by
image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as mcnemar_test
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

LEVEL = 0.95
RESAMPLES = 9999  # of a bootstrap
BOOTSTRAP_SEED = 0

Interval = tuple[float, float]
UNKNOWN: Interval = (math.nan, math.nan)

# --- one model ------------------------------------------------------------------------------------


def seed_interval(
    values: np.ndarray, how: str = "t", low: float = 0.0, high: float = 1.0
) -> Interval:
    """Returns the 95 % interval of the mean over seeds: where other seeds would move it.

    Args:
      values: [S], one per seed; fewer than two, or seeds that agree exactly, give NaN: there is no
        scatter to estimate it from.
      how: "t" assumes that seeds scatter normally; "bootstrap" (percentile, seeded) does not, but
        is too narrow for fewer than about ten seeds.
      low: the least possible value, where the interval is cut.
      high: likewise the largest.
    """
    values = np.asarray(values, float)
    if len(values) < 2 or np.ptp(values) == 0:
        return UNKNOWN
    if how == "t":
        found = stats.t.interval(LEVEL, len(values) - 1, values.mean(), stats.sem(values))
    else:
        found = stats.bootstrap(
            (values,),
            np.mean,
            confidence_level=LEVEL,
            n_resamples=RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(BOOTSTRAP_SEED),
        ).confidence_interval
    return max(low, float(found[0])), min(high, float(found[1]))


def wilson(right: float, count: float) -> Interval:
    """Returns the 95 % interval of a share (Wilson 1927); (0, 1) where nothing was counted."""
    if not count:
        return 0.0, 1.0
    low, high = proportion_confint(right, count, 1 - LEVEL, method="wilson")
    return float(low), float(high)


def image_interval(correct: np.ndarray) -> Interval:
    """Returns the 95 % interval of accuracy over test images, for these very trained models.

    Wilson's score interval. With several seeds the images are the units: their number is replaced
    by the effective number, at which a proportion would scatter as the mean over seeds does.

    Args:
      correct: bool [S, N].
    """
    images = np.asarray(correct, float).mean(axis=0)  # [N]
    mean, count = images.mean(), len(images)
    variance = images.var() / count
    effective = mean * (1 - mean) / variance if variance > 0 else count
    return wilson(mean * effective, effective)


# --- two models -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Accuracy of one model minus another's, on the same images and, pairwise, the same seeds.

    Attributes:
      mean: the difference, -1 to 1.
      over_images: interval for these trained models on other images.
      over_seeds: interval for other seeds on these images; NaN for one seed.
      over_both: interval for other seeds and other images; NaN for one seed.
      p_both: two-sided p-value of no difference, over seeds and images; NaN for one seed.
      only_first: images that only the first model gets right, mean over seeds; likewise
      only_second.
      p_mcnemar: exact McNemar test for these trained models; see `mcnemar`.
      seeds: how many pairs.
    """

    mean: float
    over_images: Interval
    over_seeds: Interval
    over_both: Interval
    p_both: float
    only_first: float
    only_second: float
    p_mcnemar: float
    seeds: int

    @property
    def p(self) -> float:
        """The p-value that decides: over seeds and images where there are several seeds."""
        return self.p_mcnemar if math.isnan(self.p_both) else self.p_both


def paired_difference(first: np.ndarray, second: np.ndarray) -> Difference:
    """Compares two models image by image and seed by seed.

    Args:
      first: bool [S, N], right or wrong.
      second: likewise, on the same images.
    """
    difference = np.asarray(first, float) - np.asarray(second, float)  # [S, N]
    seeds, images = difference.shape
    mean = float(difference.mean())
    by_image = difference.mean(axis=0)
    half = stats.norm.ppf((1 + LEVEL) / 2) * by_image.std(ddof=1) / math.sqrt(images)
    over_both, p_both = crossed(difference)
    return Difference(
        mean=mean,
        over_images=(max(-1.0, mean - half), min(1.0, mean + half)),
        over_seeds=seed_interval(difference.mean(axis=1), low=-1.0),
        over_both=over_both,
        p_both=p_both,
        only_first=float((difference > 0).sum(axis=1).mean()),
        only_second=float((difference < 0).sum(axis=1).mean()),
        p_mcnemar=mcnemar(first, second),
        seeds=seeds,
    )


def crossed(values: np.ndarray) -> tuple[Interval, float]:
    """95 % interval and p-value of a mean over seeds and images, both drawn at random.

    The two-way random-effects analysis of variance: the variance of the mean is
    (MS_seeds + MS_images - MS_rest) / (S N), never taken below what seeds or images give alone,
    with the degrees of freedom of Satterthwaite (1946).

    Args:
      values: [S, N]; one seed gives NaN.
    """
    seeds, images = values.shape
    if seeds < 2 or images < 2:
        return UNKNOWN, math.nan
    mean = values.mean()
    by_seed, by_image = values.mean(axis=1), values.mean(axis=0)
    rest = values - by_seed[:, None] - by_image[None, :] + mean
    freedom = np.array([seeds - 1, images - 1, (seeds - 1) * (images - 1)])
    squares = np.array(
        [
            images * ((by_seed - mean) ** 2).sum(),
            seeds * ((by_image - mean) ** 2).sum(),
            (rest**2).sum(),
        ]
    )
    mean_squares = squares / freedom
    combined = mean_squares[0] + mean_squares[1] - mean_squares[2]
    total = max(combined, mean_squares[0], mean_squares[1])
    if total == 0:  # every value is the same
        return (float(mean), float(mean)), float(mean == 0)
    degrees = total**2 / (mean_squares**2 / freedom).sum()
    scale = math.sqrt(total / (seeds * images))
    half = stats.t.ppf((1 + LEVEL) / 2, degrees) * scale
    p = 2 * stats.t.sf(abs(mean) / scale, degrees)
    return (max(-1.0, float(mean - half)), min(1.0, float(mean + half))), float(p)


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Exact McNemar test of equal accuracy on the same images: two-sided p-value.

    It says nothing of other seeds. Of several seeds, each pair is tested, and twice the median
    p-value is returned, which is valid however the tests depend on each other (Vovk and Wang 2020).

    Args:
      first: bool [S, N].
      second: likewise.
    """
    values = [_mcnemar_of_pair(a, b) for a, b in zip(first, second, strict=True)]
    return values[0] if len(values) == 1 else min(1.0, 2 * float(np.median(values)))


def _mcnemar_of_pair(first: np.ndarray, second: np.ndarray) -> float:
    table = [
        [(first & second).sum(), (first & ~second).sum()],
        [(~first & second).sum(), (~first & ~second).sum()],
    ]
    return float(mcnemar_test(table, exact=True).pvalue)


# --- several models -------------------------------------------------------------------------------


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Returns p-values corrected for their number (Holm 1979); NaN stay NaN."""
    p_values = np.asarray(p_values, float)
    corrected, known = np.full(len(p_values), math.nan), ~np.isnan(p_values)
    if known.any():
        corrected[known] = multipletests(p_values[known], method="holm")[1]
    return corrected


def indistinct(count: int, established: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns the longest stretches of a ranking within which no difference is established.

    Args:
      count: of models, numbered by rank.
      established: pairs (i, j), i < j, whose difference is established.

    Returns:
      (first, last) of each stretch of two models or more, as bars of a critical-difference diagram
      (Demsar 2006).
    """
    stretches = []
    for first in range(count):
        last = first
        while last + 1 < count and not any(
            (i, last + 1) in established for i in range(first, last + 1)
        ):
            last += 1
        if last > first and not (stretches and stretches[-1][1] >= last):
            stretches.append((first, last))
    return stretches


def pareto_front(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Returns which points no other point beats: none is at most as costly and at least as good.

    Of points equal in both, all are returned. In the order of cost; NaN are left out.
    """
    points = [(c, -v, i) for i, (c, v) in enumerate(zip(costs, values, strict=True))]
    points = sorted(p for p in points if not (math.isnan(p[0]) or math.isnan(p[1])))
    front: list[tuple] = []
    for point in points:
        if not front or point[1] < front[-1][1] or point[:2] == front[-1][:2]:
            front.append(point)
    return [i for _, _, i in front]
