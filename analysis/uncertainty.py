"""How sure can we be? One model of the uncertainty over seeds and images, for a family of models.

A model's mean over its seeds would be another one with other seeds, and on other images. The first
variance is estimated from a few seeds only, so it is pooled over the models; the second from all
images, or groups of images that belong together. An interval takes each with its own quantile:
half^2 = q_seeds^2 V_seeds + q_images^2 V_images (Banerjee 1960), which holds for any ratio of both.
Differences of all pairs hold at once: the quantiles are Tukey's (studentized range).
"""

import math
from collections.abc import Collection, Mapping, Sequence
from functools import cache, cached_property
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

LEVEL = 0.95
# At which the quantiles of the studentized range are computed; between them, p is interpolated.
TAILS = (0.9, 0.5, 0.2, 0.05, 0.01, 1e-3, 1e-5)

Interval = tuple[float, float]


def wilson(right: float, count: float, level: float = LEVEL) -> Interval:
    """Returns the interval of a share (Wilson 1927); (0, 1) where nothing was counted."""
    if not count:
        return 0.0, 1.0
    low, high = proportion_confint(right, count, 1 - level, method="wilson")
    return float(low), float(high)


def image_interval(correct: np.ndarray) -> Interval:
    """Returns the 95 % interval of accuracy over test images, for these trained models [S, N]."""
    images = np.asarray(correct, float).mean(axis=0)  # [N]
    return share_interval(images.mean(), images.var() / len(images), len(images))


def share_interval(
    mean: float, variance: float, count: float, level: float = LEVEL, most: float = math.inf
) -> Interval:
    """Returns Wilson's interval at as many images as would vary that much, but at `most` so many.

    Without variance it is that of `count` images.
    """
    mean = min(1.0, max(0.0, mean))
    inside = mean * (1 - mean)
    effective = min(inside / variance if inside > 0 and variance > 0 else count, most)
    return wilson(mean * effective, effective, level)


def _even_count(weights: np.ndarray) -> float:
    return float(weights.sum() ** 2 / (weights**2).sum())


@cache
def quantile(models: int, freedom: float, tail: float) -> float:
    """Returns the two-sided quantile of the largest of all pairs' differences (Tukey 1953)."""
    freedom = math.inf if freedom > 1000 else freedom
    if models == 2:
        return float(stats.t.isf(tail / 2, freedom))
    return float(stats.studentized_range.isf(tail, models, freedom)) / math.sqrt(2)


class Family:
    """Models tested on the same images, and what can be said of all of them at once.

    Attributes:
      mean: of each model over seeds and images.
      freedom: degrees of freedom of the seeds' variance; 0 where every model has one seed, so that
        intervals are over images alone.
      over: what a reader is told that intervals are over, where it is not seeds and images.
    """

    over = ""

    def __init__(
        self,
        values: Mapping[str, np.ndarray],
        clusters: np.ndarray | None = None,
        fixed: Collection[str] = (),
        weights: np.ndarray | None = None,
    ):
        """Takes values float [S, N] of each model; S may differ.

        `clusters` int [N] are groups of images that are not independent, None for none. `fixed` are
        models whose training draws nothing at random, so that their seeds are one. `weights` float
        [N] are how much each image counts in the values, None where all count the same.
        """
        values = {label: np.asarray(v, float) for label, v in values.items()}
        self.mean = {label: float(v.mean()) for label, v in values.items()}
        self.images = next(iter(values.values())).shape[1]
        self._member = np.unique(clusters, return_inverse=True)[1] if clusters is not None else None
        self.units = self.images if clusters is None else int(self._member.max()) + 1
        # Units of equal weight that would be worth as much (Kish 1965): few, where few weigh most.
        weigh = np.ones(self.images) if weights is None else np.asarray(weights, float)
        self._worth = _even_count(self._sums(weigh))
        self._least = None if weights is None else self._least_variances(values, _even_count(weigh))
        self.seeds = {label: len(v) for label, v in values.items()}
        self._by_image = {label: v.mean(axis=0) for label, v in values.items()}
        drawn = {label: v for label, v in values.items() if label not in fixed}
        self._rest = {label: self._rest_of(v) * (label in drawn) for label, v in values.items()}
        self._of_seeds(drawn)

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """A row per pair of models, see `_compare`."""
        return pd.DataFrame([self._compare(*pair) for pair in combinations(self.mean, 2)])

    @cached_property
    def letters(self) -> dict[str, str]:
        """Models that share one cannot be told apart, {label: "ab"}."""
        established = (pair for pair in self.pairs.itertuples() if pair.established)
        return letters(list(self.mean), {(pair.first, pair.second) for pair in established})

    def _of_seeds(self, drawn: dict[str, np.ndarray]) -> None:
        """Estimates the variance of a mean over its seeds: pooled, or a model's own if larger."""
        own = {label: v.mean(axis=1).var(ddof=1) for label, v in drawn.items() if len(v) > 1}
        self.freedom = sum(self.seeds[label] - 1 for label in own)
        total = sum((self.seeds[label] - 1) * variance for label, variance in own.items())
        self.seed_variance = total / self.freedom if self.freedom else 0.0
        self._seeds_part = {
            label: max(own.get(label, 0.0), self.seed_variance) / self.seeds[label]
            for label in drawn
        }

    def _least_variances(self, values: dict[str, np.ndarray], count: float) -> dict[str, float]:
        """The variance over images if all were answered equally well, `count` of equal weight.

        The few images that weigh most may agree by chance, and so vary less than others would.
        """
        least = {}
        for label, of_model in values.items():
            of_one = of_model.var(axis=1).mean()
            shared = of_model.mean(axis=0).var() / of_one if of_one else 1.0  # by the seeds
            least[label] = max(0.0, self.mean[label] * (1 - self.mean[label])) * shared / count
        return least

    @property
    def one_seed(self) -> bool:
        """Whether models whose training is random have one seed each: nothing tells of others."""
        return bool(self._seeds_part) and not self.freedom

    def _sums(self, by_image: np.ndarray) -> np.ndarray:
        """Values [..., N] -> sums over each group of images [..., units]."""
        if self._member is None:
            return by_image
        flat = by_image.reshape(-1, self.images)
        sums = np.stack([np.bincount(self._member, row, self.units) for row in flat])
        return sums.reshape(*by_image.shape[:-1], self.units)

    def _rest_of(self, values: np.ndarray) -> float:
        """The part of the variance over images that the seeds' variance holds as well."""
        if len(values) < 2:
            return 0.0
        sums = self._sums(values - values.mean(axis=1, keepdims=True))
        squares = ((sums - sums.mean(axis=0)) ** 2).sum() / (len(values) - 1)
        return squares / (len(values) * self.images**2) * self.units / max(1, self.units - 1)

    def of_images(self, by_image: np.ndarray, made_up: float) -> tuple[float, float]:
        """Returns mean and variance over images or groups; two units, +/- `made_up`, join them."""
        size = self._made_up_size(by_image)
        sums = np.append(self._sums(by_image), [size * made_up, -size * made_up])
        sizes = np.append(self._sums(np.ones(self.images)), [size, size])
        if not made_up:
            sums, sizes = sums[:-2], sizes[:-2]
        mean = sums.sum() / sizes.sum()
        squares = ((sums - sizes * mean) ** 2).sum() / sizes.sum() ** 2
        return mean, squares * len(sums) / max(1, len(sums) - 1)

    def _made_up_size(self, by_image: np.ndarray) -> float:
        """Images that a made-up unit weighs as much as: from the root of a group to all of it.

        How much depends on how alike the images of a group are (the design effect, Kish 1965).
        """
        size = self.images / self._worth
        if self._member is None:
            return size
        deviations = by_image - by_image.mean()
        alone, together = (deviations**2).sum(), (self._sums(deviations) ** 2).sum()
        alike = together / alone if alone > 0 and self.units > 1 else size
        return float(np.sqrt(size * np.clip(alike, min(1.0, size), size)))

    def interval(self, label: str, level: float = LEVEL) -> Interval:
        """Returns the interval of a model's mean over other seeds and other images."""
        _, images = self.of_images(self._by_image[label], 0)
        # Few seeds may agree by chance; what they answer to single images is known of many.
        seeds = max(self._seeds_part.get(label, 0.0), self._rest[label])
        images = max(0.0, images - self._rest[label])
        tail, z = (1 - level) / 2, stats.norm.isf((1 - level) / 2)
        half = stats.t.isf(tail, max(1, self._worth - 1)) ** 2 * images
        if seeds:
            half += stats.t.isf(tail, self.freedom) ** 2 * seeds
        variance = max(half / z**2, self._least[label] if self._least else 0.0)
        if self.units < 2:  # one group says nothing of others
            variance = max(variance, self.mean[label] * (1 - self.mean[label]))
        return share_interval(self.mean[label], variance, self._worth, level)

    def _variances(self, first: str, second: str) -> tuple[float, float, float]:
        """Difference, and the variances of it over seeds and over images."""
        # The made-up images, one for each model, keep intervals honest where few images differ
        # (Bonett & Price 2012); without them two equal models would have an interval of no width.
        mean, images = self.of_images(self._by_image[first] - self._by_image[second], 1.0)
        seeds = sum(self._seeds_part.get(label, 0.0) for label in (first, second))
        return mean, seeds, max(0.0, images - self._rest[first] - self._rest[second])

    def _compare(self, first: str, second: str) -> dict:
        """A row of `pairs`: the difference and its simultaneous interval, p, both variances."""
        mean, seeds, images = self._variances(first, second)
        squares = [
            quantile(len(self.mean), max(1, self.freedom), tail) ** 2 * seeds * (seeds > 0)
            + quantile(len(self.mean), max(1, self._worth - 1), tail) ** 2 * images
            for tail in TAILS
        ]
        half = math.sqrt(squares[TAILS.index(round(1 - LEVEL, 6))])
        tails = np.log([1, *TAILS])
        p = float(np.exp(np.interp(abs(mean), np.sqrt([0, *squares]), tails)))
        total = seeds + images
        freedom = total**2 / (seeds**2 / max(1, self.freedom) + images**2 / max(1, self._worth - 1))
        return {
            "first": first,
            "second": second,
            "difference": self.mean[first] - self.mean[second],
            "ci95_low": max(-1.0, mean - half),
            "ci95_high": min(1.0, mean + half),
            "p": p,
            "established": abs(mean) > half,
            "variance_seeds": seeds,
            "variance_images": images,
            "freedom": freedom,
        }

    def pair(self, first: str, second: str) -> pd.Series:
        """Returns the row of two models, turned so that the first comes first."""
        return pd.Series(self._compare(first, second))

    def probability(self, pair: pd.Series, margin: float = 0.0) -> float:
        """Returns how probable it is that the first model of a pair is better by over a margin.

        Of a flat prior; not corrected for the number of pairs.
        """
        error = math.sqrt(pair.variance_seeds + pair.variance_images)
        return float(stats.t.cdf((pair.difference - margin) / error, pair.freedom))

    def needed(self, pair: pd.Series, most: int = 100) -> tuple[float, float, float]:
        """Returns what would settle a pair: seeds a model, or images, or times as many of both.

        Each is what establishes the observed difference with a probability of 80 % if it is the
        true one, all else equal; infinity for none up to `most` seeds, or `most` times as many.
        """
        tail = stats.norm.sf(quantile(len(self.mean), math.inf, 1 - LEVEL))
        power = stats.norm.isf(0.2)
        drawn = [label for label in (pair["first"], pair["second"]) if label in self._seeds_part]
        now = max((self.seeds[label] for label in drawn), default=1)
        count = np.arange(1, most + 1)

        def settled(seeds: np.ndarray, images: np.ndarray) -> np.ndarray:
            """Whether it would be, at these multiples of today's numbers."""
            freedom = np.maximum(1, len(self._seeds_part) * (now * seeds - 1))
            variances = pair.variance_seeds / seeds, pair.variance_images / images
            half = stats.t.isf(tail, freedom) ** 2 * variances[0]
            half = half + stats.norm.isf(tail) ** 2 * variances[1]
            return abs(pair.difference) > np.sqrt(half) + power * np.sqrt(sum(variances))

        def least(enough: np.ndarray) -> float:
            return float(count[enough][0]) if enough.any() else math.inf

        times = np.geomspace(1, most, most)
        both = settled(times, times)
        images = settled(np.ones(most), times)
        by_seeds = least(settled(count / now, np.ones(most)) & (count > now)) if drawn else math.inf
        by_images = self.images * times[images][0] if images.any() else math.inf
        return by_seeds, by_images, float(times[both][0]) if both.any() else math.inf


def letters(labels: Sequence[str], established: Collection[tuple[str, str]]) -> dict[str, str]:
    """Returns letters such that two labels share one if and only if they are no such pair.

    The compact letter display of Piepho (2004): insert and absorb.
    """
    place = {label: i for i, label in enumerate(labels)}
    columns = [(1 << len(labels)) - 1]  # sets of labels, as bits
    for first, second in sorted(established, key=lambda pair: (place[pair[0]], place[pair[1]])):
        one, other = 1 << place[first], 1 << place[second]
        split = {part for c in columns if c & one and c & other for part in (c & ~one, c & ~other)}
        kept = {c for c in columns if not (c & one and c & other)}
        new = [c for c in split if not any(c & k == c for k in kept | split - {c})]
        columns = [*kept, *new]
    columns.sort(key=lambda c: [not c >> i & 1 for i in range(len(labels))])
    names = [chr(97 + i) if i < 26 else f"({i + 1})" for i in range(len(columns))]
    return {
        label: "".join(name for name, c in zip(names, columns, strict=True) if c >> i & 1)
        for label, i in place.items()
    }


def ends(name: str, interval: Interval) -> dict[str, float]:
    """Returns an interval as two columns of a table, `name` before their names."""
    return {f"{name}ci95_low": interval[0], f"{name}ci95_high": interval[1]}


def pareto_front(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Returns the points that no other beats in cost and value, by cost; NaN are left out."""
    costs, values = np.asarray(costs, float), np.asarray(values, float)
    front = []
    for i in np.flatnonzero(~np.isnan(costs + values)):
        better = (costs < costs[i]) & (values >= values[i])
        if not (better | (costs <= costs[i]) & (values > values[i])).any():
            front.append(int(i))
    return sorted(front, key=lambda i: costs[i])
