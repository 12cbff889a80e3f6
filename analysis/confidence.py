"""What is a model's confidence worth? Temperature, review thresholds and sets of classes.

`clusters` [N] numbers groups of images that belong together, None where every image stands alone.
Images of one group may all agree, so a group never counts for more than one image.
"""

import math

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import betainc
from scipy.stats import binom, gamma

BINS = 15  # of confidence, in the calibration error
PRIOR = 0.5  # standard deviation of log(temperature) around 0: 95 % within 0.37 to 2.7
LEAST_GAIN = 3.32  # nats over all validation images: half the 99 % point of chi-squared
TARGET, RISK = 0.95, 0.1  # promised accuracy, and how often chance may break the promise
STEPS = 20  # thresholds tested: 5 %, 10 % ... 100 % of the images are answered
LEVELS = (0.9, 0.95)  # of sets of classes
ROUNDING = 1e-6  # by which a batch of another size may move a probability


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Returns probabilities float64 [N, K] of logits [N, K] divided by a temperature."""
    scaled = logits.astype(np.float64) / temperature  # changed in place: it may be large
    scaled -= scaled.max(axis=1, keepdims=True)
    np.exp(scaled, out=scaled)
    scaled /= scaled.sum(axis=1, keepdims=True)
    return scaled


def losses(labels: np.ndarray, logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Returns the negative log-likelihood of each label in nats: float64 [N]."""
    return _losses(*_below_highest(labels, logits), temperature)


def _below_highest(labels: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits minus the highest of each image [N, K], and that of the label [N]."""
    below = logits.astype(np.float64)
    below -= below.max(axis=1, keepdims=True)
    return below, below[np.arange(len(labels)), labels]


def _losses(below: np.ndarray, own: np.ndarray, temperature: float) -> np.ndarray:
    scaled = below / temperature
    return np.log(np.exp(scaled, out=scaled).sum(axis=1)) - own / temperature


def reliability(probabilities: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
    """Returns `images`, mean `confidence`, `accuracy` and lower end of each bin of confidence."""
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    place = _bin(confidence)
    sums = {"images": None, "confidence": confidence, "accuracy": correct}
    table = pd.DataFrame({name: np.bincount(place, of, BINS) for name, of in sums.items()})
    table[["confidence", "accuracy"]] = table[["confidence", "accuracy"]].div(table.images, axis=0)
    return table.assign(low=np.arange(BINS) / BINS)


def _bin(confidence: np.ndarray) -> np.ndarray:
    return np.minimum((confidence * BINS).astype(int), BINS - 1)


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Returns the expected calibration error of the top class (Naeini et al. 2015)."""
    table = reliability(probabilities, labels).dropna()
    return float(((table.confidence - table.accuracy).abs() * table.images).sum() / len(labels))


def error_by_chance(
    probabilities: np.ndarray, error: float, clusters: np.ndarray | None = None
) -> tuple[float, float]:
    """Returns the calibration error that a perfectly calibrated model would have, and a p-value.

    Its answers would be right as often as they are confident, so the right ones in a bin are
    binomial; the mean deviation is de Moivre's. p is the chance of an error as large as `error`,
    by the gamma distribution of equal mean and variance.
    """
    confidence = probabilities.max(axis=1)
    place = _bin(confidence)
    counts = np.bincount(place, minlength=BINS)
    used, share = counts > 0, counts[counts > 0] / len(confidence)
    mean = np.clip(np.bincount(place, confidence, BINS)[used] / counts[used], 0, 1)
    if clusters is not None:
        pairs = np.unique(np.stack([place, clusters], axis=1), axis=0)
        counts = np.bincount(pairs[:, 0], minlength=BINS)
    count = counts[used]
    middle = np.minimum(np.floor(count * mean) + 1, count)
    deviation = 2 * middle * (1 - mean) * binom.pmf(middle, count, mean) / count
    expected = float((share * deviation).sum())
    variance = float((share**2 * (mean * (1 - mean) / count - deviation**2)).sum())
    if variance < 1e-18:  # sure of everything: any error at all is too much
        return expected, float(error <= expected + 1e-9)
    return expected, float(gamma.sf(error, expected**2 / variance, scale=variance / expected))


def fit_temperature(
    logits: np.ndarray, labels: np.ndarray, clusters: np.ndarray | None = None
) -> float:
    """Returns the temperature of least loss (Guo et al. 2017), its logarithm normal a priori.

    It is 1 where that gains no more than chance would (likelihood-ratio test at 1 %), and where
    sharpening would help but there is no error that could show its harm.
    """
    weight = 1.0 if clusters is None else len(np.unique(clusters)) / len(clusters)
    below = _below_highest(labels, logits)

    def loss(log_temperature: float) -> float:
        return weight * _losses(*below, math.exp(log_temperature)).sum()

    def penalised(log_temperature: float) -> float:
        return loss(log_temperature) + 0.5 * (log_temperature / PRIOR) ** 2

    best = float(minimize_scalar(penalised, bounds=(-10, 10), options={"xatol": 1e-4}).x)
    blind = best < 0 and (logits.argmax(axis=1) == labels).all()
    return 1.0 if blind or loss(0.0) - loss(best) < LEAST_GAIN else math.exp(best)


def coverage_curve(probabilities: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
    """Returns `coverage` and `accuracy` at each confidence taken as `threshold`, highest first."""
    correct = pd.Series(probabilities.argmax(axis=1) == labels)
    by_confidence = correct.groupby(probabilities.max(axis=1)).agg(["size", "sum"])
    answered = by_confidence[::-1].cumsum().rename_axis("threshold").reset_index()
    answered["coverage"] = answered["size"] / len(labels)
    answered["accuracy"] = answered["sum"] / answered["size"]
    return answered[["threshold", "coverage", "accuracy"]]


def choose_threshold(
    probabilities: np.ndarray,
    labels: np.ndarray,
    target: float = TARGET,
    clusters: np.ndarray | None = None,
) -> dict:
    """Returns the least `confidence` that promises `target` accuracy to new images (inf if none).

    The promise is broken in at most `RISK` of all draws of these images: thresholds, from the one
    that enough images pass to show it despite one error, are each tested exactly (Clopper and
    Pearson 1934) until one fails (fixed-sequence testing; Angelopoulos et al. 2021). `accuracy`
    and `coverage` are those of the images given.
    """
    confidence = probabilities.max(axis=1)
    wrong = probabilities.argmax(axis=1) != labels
    highest = np.sort(confidence)[::-1]
    chosen = {"confidence": math.inf, "accuracy": math.nan, "coverage": 0.0}
    places = np.ceil(np.arange(1, STEPS + 1) * len(labels) / STEPS).astype(int) - 1
    for threshold in highest[places]:
        answered = confidence >= threshold
        images = int(answered.sum())
        count = images if clusters is None else len(np.unique(clusters[answered]))
        share = float(wrong[answered].mean())
        if _by_luck(count, 1, target) > RISK and images < len(labels):
            continue  # fewer than two errors would decide
        if _by_luck(count, share * count, target) > RISK:
            break
        chosen = {"confidence": float(threshold), "accuracy": 1 - share}
        chosen["coverage"] = images / len(labels)
    if chosen["coverage"] == 1:
        chosen["confidence"] = 0.0
    return chosen | {"target": target, "risk": RISK}


def _by_luck(count: float, errors: float, target: float) -> float:
    """Returns the chance of so few errors in `count` answers of a model that just misses target."""
    if errors >= count:
        return 1.0
    return float(betainc(count - errors, errors + 1, target))


def fit_sets(logits: np.ndarray, labels: np.ndarray, clusters: np.ndarray | None = None) -> dict:
    """Returns what makes sets of classes that hold the true one with 90 and 95 % probability.

    Split conformal prediction with the probability of the true class as its score, which gives the
    smallest sets (Sadinle et al. 2019) and needs no randomness: one half of the images, drawn by
    class with a fixed seed, fits the `temperature`, the other counts. Groups stay whole, and one
    image of each counts (Dunn et al. 2023). `least` is the probability of a class in the set, None
    where the `images` that count are too few for any promise.
    """
    groups = np.arange(len(labels)) if clusters is None else clusters
    shuffled = np.random.default_rng(0).permutation(len(labels))
    _, first = np.unique(groups[shuffled], return_index=True)
    drawn = shuffled[first]  # one image of each group
    counted = drawn[np.lexsort((first, labels[drawn]))][::2]
    rest = ~np.isin(groups, groups[counted])
    own = None if clusters is None else clusters[rest]
    temperature = fit_temperature(logits[rest], labels[rest], own) if rest.any() else 1.0
    probabilities = softmax(logits[counted], temperature)
    true = np.sort(probabilities[np.arange(len(counted)), labels[counted]])[::-1]
    levels = []
    for level in LEVELS:
        place = math.ceil((len(true) + 1) * level - 1e-9)  # 0.9 * 10 may be above 9
        least = float(true[place - 1]) if place <= len(true) else None
        levels.append({"level": level, "least": least})
    return {"temperature": temperature, "images": len(counted), "levels": levels}


def least_probability(fitted: dict, level: float) -> float | None:
    """Returns the `least` of `fit_sets` for a level, None where nothing is promised."""
    return next((x["least"] for x in fitted["levels"] if x["level"] == level), None)


def sets_of_classes(logits: np.ndarray, fitted: dict, level: float) -> np.ndarray | None:
    """Returns which classes are in each image's set, bool [N, K]; None if nothing is promised.

    The likeliest class always is.
    """
    least = least_probability(fitted, level)
    if least is None:
        return None
    probabilities = softmax(logits, fitted["temperature"])
    top = probabilities.max(axis=1, keepdims=True)
    return probabilities >= np.minimum(least, top) * (1 - ROUNDING)
