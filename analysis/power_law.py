"""How error falls with the number of training images: a power law, and how sure one can be of it.

    error(n) = floor + rest (n / largest)^-exponent,  floor, rest, exponent >= 0

Whether there is a floor, few points cannot tell, so both forms are averaged, each as probable as
the other before the data (Hestness et al. 2017, arXiv:1712.00409; Viering and Loog 2021,
arXiv:2103.10948). All of it is Bayesian, on a grid. The noise of the points has three parts. Test
images: they are the same at all sizes. Training: each run draws other numbers. Training images: a
seed's are nested, so that a lucky seed is lucky at neighbouring sizes too; those of two seeds
overlap, and are the same at the full size, where agreement says nothing of other images.

Simulated (260 experiments each; 1 to 5 seeds, 400 to 2,000 test images, laws with and without a
floor, runs that scatter by 5 to 10 % of the error), 95 % intervals held the truth in: error at 100
and 200 % from 5 to 50 %: 95 to 98 %; what twice the images bring: 93 to 97 %; the measured error at
100 %: 93 to 100 %. Of runs that scatter by 30 %: 91 to 96 %.
"""

from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
from scipy import stats

from analysis.uncertainty import LEVEL, Interval

SCATTERS = 0.6 * np.linspace(0, 1, 13) ** 2  # of runs, as a share of the error
CHOICE = (0.0, 0.5, 1.0)  # how much of it comes from the choice of training images
NOISES = list(product(SCATTERS, CHOICE))
EXPONENTS = (0.03, 3.0)  # the least and the highest, equally probable on a logarithmic scale
GRID = 40  # exponents, and floors beside none
LEAST = 3  # sizes that a law can be fitted to
DRAWS = 4000


def interval(draws: np.ndarray, level: float = LEVEL) -> Interval:
    """Returns the central interval of draws [D]."""
    return tuple(np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]).tolist())


class Points:
    """Errors at several sizes, and their noise.

    Attributes:
      sizes: training images, float [J], ascending.
      error: means over seeds and images, float [J].
    """

    def __init__(
        self,
        sizes: np.ndarray,
        values: np.ndarray,
        pool: float,
        clusters: np.ndarray | None = None,
    ):
        """Takes scores of each test image, float [J, S, N].

        `pool` is how many training images all are drawn from; `clusters` int [N] are groups of test
        images.
        """
        self.pool = pool
        self.sizes, values = np.asarray(sizes, float), np.asarray(values, float)
        self.seeds, count = values.shape[1:]
        groups = np.arange(count) if clusters is None else clusters
        member = np.unique(groups, return_inverse=True)[1]
        units, self._count = int(member.max()) + 1, count
        self.error = self.scale = 1 - values.mean(axis=(1, 2))

        def sums(by_image: np.ndarray) -> np.ndarray:
            flat = by_image.reshape(-1, count)
            of_unit = np.stack([np.bincount(member, row, units) for row in flat])
            return of_unit.reshape(*by_image.shape[:-1], units)

        by_image = 1 - values.mean(axis=1) - self.error[:, None]
        size = count / units
        # A unit that all get right and one that all get wrong join them: few errors say little.
        made_up = np.stack([-self.error, 1 - self.error], axis=1) * size
        of_unit = np.concatenate([sums(by_image), made_up], axis=1)
        # Covariance of the errors over test images [J, J], what seeds answer by chance included.
        self.images = of_unit @ of_unit.T / count**2 * (units + 2) / (units + 1)
        self.images += np.eye(len(self.images)) * 0.1 / count**2  # all may answer alike
        own = values - values.mean(axis=1, keepdims=True)
        own = sums(own - own.mean(axis=2, keepdims=True))
        self.chance = (own**2).sum(axis=(1, 2)) / max(1, self.seeds - 1) / count**2  # of one seed
        self.by_seed = 1 - values.mean(axis=2) - self.error[:, None]  # [J, S]

    def _of_runs(self, scatter: float, choice: float, same: float, other: float) -> np.ndarray:
        """Covariance [J, J] over sizes of runs of the same seed, and of others, with these weights.

        A run's training images add their mean effect: it is shared as far as they are.
        """
        ratio = np.minimum.outer(self.sizes, self.sizes) / np.maximum.outer(self.sizes, self.sizes)
        share = np.sqrt(self.sizes / self.pool)
        alike = same * ((1 - choice) * np.eye(len(ratio)) + choice * np.sqrt(ratio))
        alike += other * choice * np.outer(share, share)
        error = scatter * np.maximum(self.scale, 1 / self._count)
        return error[:, None] * alike * error

    def covariance(self, scatter: float, choice: float) -> np.ndarray:
        """Returns the covariance [J, J] of the errors."""
        same = 1 / self.seeds
        return self.images + self._of_runs(scatter, choice, same, 1 - same)

    def seeds_likelihood(self, scatter: float, choice: float) -> float:
        """Returns the log-likelihood of how the seeds differ; 0 of one seed."""
        chance = np.maximum(self.chance, 1 / self._count**2)
        covariance = np.diag(chance) + self._of_runs(scatter, choice, 1, -1)
        squares = np.einsum("js,js->", self.by_seed, np.linalg.solve(covariance, self.by_seed))
        return -0.5 * ((self.seeds - 1) * np.linalg.slogdet(covariance)[1] + squares)

    def scaled(self, law: "Law") -> "Points":
        """Returns points whose runs scatter in proportion to a law, not to their own luck."""
        points = copy(self)
        points.scale = np.array([np.median(law.error(size)) for size in self.sizes])
        return points

    def first(self, count: int) -> "Points":
        """Returns the smallest sizes alone."""
        part = copy(self)
        for name in ("sizes", "error", "scale", "chance", "by_seed"):
            setattr(part, name, getattr(self, name)[:count])
        part.images = self.images[:count, :count]
        return part


@dataclass(frozen=True)
class Law:
    """Draws [D] of all that is uncertain of a power law."""

    largest: float  # training images measured
    floor: np.ndarray
    rest: np.ndarray
    exponent: np.ndarray
    noise: list[tuple[float, float]]  # scatter of seeds, and how much of it is choice

    def error(self, images: float) -> np.ndarray:
        """Returns the error with a number of training images, for other seeds and test images."""
        return self.floor + self.rest * (images / self.largest) ** -self.exponent

    @cached_property
    def has_floor(self) -> float:
        """How probable it is that the error stays above one that more images would not lower."""
        return float((self.floor > 0).mean())


def fit(points: Points, draws: int = DRAWS) -> Law:
    """Returns the power law of points."""
    highest = points.error.min() + 3 * np.sqrt(points.images.diagonal().max())
    exponents, ends = np.geomspace(*EXPONENTS, GRID), (0.0, highest)
    for again in (True, False):  # a second, finer grid covers what is probable
        middle = (np.arange(GRID) + 0.5) / GRID * (ends[1] - ends[0]) + ends[0]
        floors = np.append(0.0, middle)
        prior = np.append(0.5, np.full(GRID, 0.5 / GRID * (ends[1] - ends[0]) / highest))
        log, mean, spread = _posterior(points, floors, exponents)
        chance = np.exp(log - log.max()) * prior
        if again:
            low, high = _probable(chance.sum(axis=(0, 2)), np.geomspace(*EXPONENTS, GRID + 1))
            law = _draw(points, chance, mean, spread, (floors, exponents), DRAWS // 10)
            points, exponents = points.scaled(law), np.geomspace(low, high, GRID)
            ends = _probable(chance[..., 1:].sum(axis=(0, 1)), np.linspace(*ends, GRID + 1))
    return _draw(points, chance, mean, spread, (floors, exponents), draws)


def _draw(
    points: Points,
    chance: np.ndarray,
    mean: np.ndarray,
    spread: np.ndarray,
    grid: tuple[np.ndarray, np.ndarray],
    draws: int,
) -> Law:
    """Draws cells [T, C, A] of a grid (floors, exponents), and rest within them."""
    random, shape, chance = np.random.default_rng(0), chance.shape, chance.ravel()
    floors, exponents = grid
    cells = random.choice(chance.size, draws, p=chance / chance.sum())
    which, exponent, floor = np.unravel_index(cells, shape)
    mean, spread = mean.ravel()[cells], spread.ravel()[cells]
    tail = random.random(draws) * stats.norm.sf(-mean / spread)  # of rest >= 0
    rest = np.maximum(0.0, mean + spread * stats.norm.isf(tail))
    noise = [NOISES[i] for i in which]
    return Law(points.sizes[-1], floors[floor], rest, exponents[exponent], noise)


def _probable(chance: np.ndarray, edges: np.ndarray) -> tuple[float, float]:
    """Returns the edges, of [cells + 1], between which probable cells and their neighbours lie."""
    cells = np.flatnonzero(chance > 1e-4 * chance.max())
    return edges[max(cells[0] - 1, 0)], edges[min(cells[-1] + 2, len(edges) - 1)]


def _posterior(points: Points, floors: np.ndarray, exponents: np.ndarray) -> tuple:
    """Returns log-likelihood, and mean and spread of rest, by noise, exponent, floor [T, C, A]."""
    n, error = points.sizes / points.sizes[-1], points.error
    basis, above = n ** -exponents[:, None], error - floors[:, None]  # [C, J], [A, J]
    logs, means, spreads = [], [], []
    for noise in NOISES:
        weight = np.linalg.inv(points.covariance(*noise))
        xx = np.einsum("cj,jk,ck->c", basis, weight, basis)[:, None]
        xy = basis @ weight @ above.T
        yy = np.einsum("aj,jk,ak->a", above, weight, above)
        mean, spread = xy / xx, np.broadcast_to(np.sqrt(1 / xx), xy.shape)
        log = 0.5 * np.linalg.slogdet(weight)[1] - 0.5 * (yy - xy * mean) + np.log(spread)
        logs.append(log + stats.norm.logcdf(mean / spread) + points.seeds_likelihood(*noise))
        means.append(mean)
        spreads.append(spread)
    return np.stack(logs), np.stack(means), np.stack(spreads)


def predict_last(points: Points, draws: int = DRAWS) -> np.ndarray:
    """Returns draws [D] of the error measured at the largest size, as the others predict it.

    Its test images are the same as theirs, so it misses the law in the direction in which they do.
    """
    known = points.first(len(points.sizes) - 1)
    law = fit(known, draws)
    points = points.scaled(law)
    missed = known.error - np.stack([law.error(size) for size in known.sizes], axis=1)  # [D, J-1]
    predicted = law.error(points.sizes[-1])
    left = np.zeros(len(predicted))
    for noise in set(law.noise):
        here = [i for i, other in enumerate(law.noise) if other == noise]
        covariance = points.covariance(*noise)
        shared = np.linalg.solve(covariance[:-1, :-1], covariance[:-1, -1])
        predicted[here] += missed[here] @ shared
        left[here] = covariance[-1, -1] - covariance[-1, :-1] @ shared
    return predicted + np.sqrt(np.maximum(left, 0)) * np.random.default_rng(1).normal(size=draws)
