"""Does one sample of answers differ from another? Tests that keep their false-alarm rate.

A p-value is the share of random divisions of all images, into parts of the two sizes, that differ
at least as much as the samples do. It holds at any size, with ties and rare classes, where images
are independent: twenty photos of one scene are not.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata
from threadpoolctl import threadpool_limits

LEAST, LEAST_CORRECTED = 20, 10  # images that can be compared
MOST = 5000  # images of a sample that are compared: more would only find smaller differences
DIVISIONS, BLOCK = 999, 250  # random divisions; so many at once
FOLDS = 5
RIDGE = 1e-2  # of a feature's variance, added to it
STRATA, IN_STRATUM = 10, 10  # strata of confidence, at most; corrected images in each, at least


@dataclass(frozen=True)
class Sample:
    """Answers to distinct images, oldest first."""

    classes: np.ndarray  # likeliest class, int [N]
    confidence: np.ndarray  # float [N]
    features: np.ndarray | None  # float32 [N, 32]
    correct: np.ndarray  # 1 right, 0 wrong, NaN not known: float [N]

    def __len__(self) -> int:
        return len(self.classes)

    def rows(self, rows: np.ndarray) -> "Sample":
        """Returns the images of these rows."""
        features = None if self.features is None else self.features[rows]
        return Sample(self.classes[rows], self.confidence[rows], features, self.correct[rows])

    def thinned(self) -> "Sample":
        """Returns at most MOST images, evenly spread."""
        return self.rows(np.linspace(0, len(self) - 1, min(len(self), MOST)).round().astype(int))


@dataclass
class Test:
    """The result of one test."""

    name: str
    images: int  # of the window that it looked at
    p: float
    effect: float
    chance: float  # what the effect reaches by chance in 5 of 100 windows
    adjusted: float = 1.0  # p by Holm, over the tests that ran
    alarm: bool = False


def compare_samples(
    reference: Sample, window: Sample, rate: float, divisions: int = DIVISIONS, seed: int = 0
) -> list[Test]:
    """Returns the tests that can be made of two samples: class mix, confidence, features, accuracy.

    Of windows that are like the reference, at most a share `rate` has any alarm (Holm 1979).
    `divisions` is how many there are at least; a small rate takes more.
    """
    divisions = max(divisions, int(np.ceil(20 / rate)))
    with threadpool_limits(1):  # where cores are busy, threads would wait for each other
        tests = _division_tests(reference.thinned(), window.thinned(), divisions, seed)
    if np.isfinite(window.correct).sum() >= LEAST_CORRECTED:
        tests.append(accuracy_test(strata(reference, window), 10 * divisions, seed))
    least = 0.0  # a larger p is never adjusted to less
    for smaller, test in enumerate(sorted(tests, key=lambda test: test.p)):
        least = test.adjusted = max(least, min(1.0, (len(tests) - smaller) * test.p))
        test.alarm = test.adjusted <= rate
    return tests


# --- by random division ---------------------------------------------------------------------------

# A statistic of divisions float32 [N, P], 1 for the window and 0 for the reference in each column:
# returns what decides and the effect that a reader sees, [P] each.
Statistic = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def _division_tests(reference: Sample, window: Sample, divisions: int, seed: int) -> list[Test]:
    def both(name: str) -> np.ndarray:
        return np.concatenate([getattr(reference, name), getattr(window, name)])

    statistics = {
        "class mix": class_mix(both("classes")),
        "confidence": kolmogorov_smirnov(both("confidence")),
    }
    if reference.features is not None and window.features is not None:
        statistics["features"] = two_sample_classifier(both("features"), seed)
    draw, values = np.random.default_rng(seed), {name: [] for name in statistics}
    observed = np.repeat([0, 1], [len(reference), len(window)]).astype(np.float32)[:, None]
    for start in range(0, divisions, BLOCK):
        columns = np.repeat(observed, min(BLOCK, divisions - start), axis=1)
        labels = draw.permuted(columns, axis=0)
        labels = labels if start else np.concatenate([observed, labels], axis=1)
        for name, statistic in statistics.items():
            values[name].append(statistic(labels))
    tests = []
    for name, parts in values.items():
        decides, effect = np.concatenate(parts, axis=1)
        # Equal divisions may differ by rounding.
        p = float((decides >= decides[0] - 1e-6 * abs(decides[0])).mean())
        tests.append(Test(name, len(window), p, *_with_chance(effect)))
    return tests


def _with_chance(effect: np.ndarray) -> tuple[float, float]:
    return float(effect[0]), float(np.quantile(effect[1:], 0.95))


def class_mix(classes: np.ndarray) -> Statistic:
    """Chi-squared of homogeneity of classes [N]; the effect is the total variation, 0..1."""
    hot = np.eye(classes.max() + 1, dtype=np.float32)[:, np.bincount(classes) > 0][classes]
    total = hot.sum(axis=0)[:, None]

    def statistic(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count, size = labels[:, 0].sum(), len(labels)
        found = hot.T @ labels
        squares = ((found - total * count / size) ** 2 / total).sum(axis=0)
        shares = found / count - (total - found) / (size - count)
        return squares, np.abs(shares).sum(axis=0) / 2

    return statistic


def kolmogorov_smirnov(values: np.ndarray) -> Statistic:
    """The largest difference of the two distribution functions of values [N]."""
    order = np.argsort(values)
    last = np.append(np.diff(values[order]) > 0, True)  # of equal values

    def statistic(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count, size = labels[:, 0].sum(), len(labels)
        below = np.cumsum(labels[order], axis=0)[last]
        others = np.flatnonzero(last)[:, None] + 1 - below
        largest = np.abs(below / count - others / (size - count)).max(axis=0)
        return largest, largest

    return statistic


def two_sample_classifier(features: np.ndarray, seed: int = 0) -> Statistic:
    """The AUC with which a classifier tells unseen images of the window from others.

    Lopez-Paz and Oquab 2017, "Revisiting classifier two-sample tests". The classifier is linear
    (Fisher's discriminant, of features [N, D] and their squares, so that a change of spread shows):
    the same few matrices then serve every division.
    """
    scaled = _standard(features.astype(np.float64))
    scaled = np.concatenate([scaled, _standard(scaled**2)], axis=1).astype(np.float32)
    fold = np.random.default_rng(seed).permutation(len(scaled)) % FOLDS
    pieces = []
    for k in range(FOLDS):
        seen, tested = scaled[fold != k], scaled[fold == k]
        centred = seen - seen.mean(axis=0)
        scatter = centred.T @ centred
        scatter += RIDGE * len(seen) * np.eye(len(scatter), dtype=np.float32)
        pieces.append((tested - seen.mean(axis=0), np.linalg.solve(scatter, centred.T)))

    def statistic(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        score, count = np.empty_like(labels), labels[:, 0].sum()
        for k, (tested, solved) in enumerate(pieces):
            score[fold == k] = tested @ (solved @ labels[fold != k])
        ranks = (rankdata(score, axis=0) * labels).sum(axis=0)
        area = (ranks - count * (count + 1) / 2) / (count * (len(labels) - count))
        return area, area

    return statistic


def _standard(values: np.ndarray) -> np.ndarray:
    """Returns columns with mean 0 and standard deviation 1, or 0 where a column is constant."""
    centred = values - values.mean(axis=0)
    spread = centred.std(axis=0)
    return centred / np.where(spread > 1e-6 * np.abs(values).max(axis=0, initial=0), spread, np.inf)


# --- accuracy -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strata:
    """Corrected images and reference images the model is as sure of: counts by stratum, int [S]."""

    images: np.ndarray
    right: np.ndarray
    reference: np.ndarray
    reference_right: np.ndarray

    @property
    def expected(self) -> float:
        """The accuracy of reference images, weighted as the corrected ones are; NaN if none."""
        share = self.reference_right / self.reference.clip(1)
        weight = self.images * (self.reference > 0)
        return (share * weight).sum() / weight.sum() if weight.any() else np.nan


def strata(reference: Sample, window: Sample) -> Strata:
    """Returns the corrected images of a window, and the reference, in strata of confidence."""
    known = window.rows(np.isfinite(window.correct))
    number = int(np.clip(len(known) // IN_STRATUM, 1, STRATA))
    edges = np.quantile(known.confidence, np.linspace(0, 1, number + 1)[1:])
    # Where the least sure were corrected, surer ones of the reference have no counterpart.
    alike = reference.rows(reference.confidence <= edges[-1])
    counts = []
    for sample in (known, alike):
        place = np.searchsorted(edges, sample.confidence)
        counts += [np.bincount(place, minlength=number),
                   np.bincount(place, sample.correct, number).astype(int)]  # fmt: skip
    return Strata(*counts)


def accuracy_test(of: Strata, draws: int, seed: int = 0) -> Test:
    """Tests whether corrected answers are wrong more often than reference ones of the same stratum.

    It does no harm if the least sure answers were corrected first; it does if wrong ones were.
    """
    right, size = of.right + of.reference_right, of.images + of.reference
    draw = np.random.default_rng(seed)
    found = draw.hypergeometric(right, size - right, of.images, (draws, len(size))).sum(axis=1)
    lost = (right * of.images / size).sum() - np.append(of.right.sum(), found)
    lost = lost / of.images.sum()
    p = float((lost >= lost[0] - 1e-9).mean())
    return Test("accuracy", int(of.images.sum()), p, *_with_chance(lost))
