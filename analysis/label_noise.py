"""Which labels are wrong, and how many? Confident learning from predictions out of sample."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.evaluate import mean_probability
from analysis.page.tables import percent
from analysis.runs import Groups, values_of
from analysis.uncertainty import Family, Interval, share_interval

SUREST = (0.25, 0.05)  # shares of each class: of the estimate, and of its lower end


def thresholds(labels: np.ndarray, probabilities: np.ndarray, surest: float = 0.0) -> np.ndarray:
    """Returns how probable each class must be to be confident, float [K]; inf without images.

    The mean probability that images of a class give to it (Northcutt, Jiang and Chuang 2021), or
    the quantile that the `surest` share of them reaches.
    """
    own = pd.Series(probabilities[np.arange(len(labels)), labels]).groupby(labels)
    values = own.quantile(1 - surest) if surest else own.mean()
    return values.reindex(range(probabilities.shape[1])).fillna(np.inf).to_numpy()


def confident_classes(probabilities: np.ndarray, least: np.ndarray) -> np.ndarray:
    """Returns the most probable of the classes that reach their threshold, int [N]; -1 for none."""
    reached = np.where(probabilities >= least - 1e-6, probabilities, -1.0)
    return np.where(reached.max(axis=1) >= 0, reached.argmax(axis=1), -1)


@dataclass(frozen=True)
class Share:
    """An estimated share of wrong labels in 0..1, and its 95 % interval."""

    value: float
    interval: Interval


UNKNOWN = Share(math.nan, (math.nan, math.nan))


def wrong_share(
    labels: np.ndarray, probabilities: np.ndarray, clusters: np.ndarray | None = None
) -> Share:
    """Estimates the share of wrong labels [N] from probabilities out of sample [N, K].

    The value is that of the confident joint of the surest quarter of each class, among which a
    model's own errors are rarest. The upper end is that of the usual joint, which counts such
    errors as wrong labels; the lower end is the least of all, the surest twentieth among them.
    Intervals are over images, or over clusters of them.
    """
    shares = []
    for surest in (0.0, *SUREST):
        confident = confident_classes(probabilities, thresholds(labels, probabilities, surest))
        shares.append(contradicted(labels, confident, probabilities.shape[1], clusters))
    usual, sure, _ = shares
    low = min(share.interval[0] for share in shares)
    return Share(min(usual.value, sure.value), (low, usual.interval[1]))


def contradicted(
    labels: np.ndarray, confident: np.ndarray, classes: int, clusters: np.ndarray | None = None
) -> Share:
    """Returns the share of labels that the confident joint, scaled to the classes, contradicts.

    Classes without a confident image count as the rest do.
    """
    sure = confident >= 0
    wrong = sure & (confident != labels)
    images, known, against = (
        np.bincount(labels, weight, classes) for weight in (np.ones(len(labels)), sure, wrong)
    )
    rest = against.sum() / max(known.sum(), 1)
    rate = np.divide(against, known, out=np.full(classes, rest), where=known > 0)
    value = float((images * rate).sum() / len(labels))
    # What each image adds to the error of the value, to first order; images of a cluster together.
    weight = images / np.maximum(known, 1)
    parts = sure * weight[labels] * (wrong - rate[labels]) + rate[labels] - value
    _, variance = Family({"": parts[None]}, clusters).of_images(parts, 0)
    most = len(np.unique(clusters[sure])) if clusters is not None else int(sure.sum())
    low, high = share_interval(value, variance, most, most=most)
    return Share(value, (low if value else 0.0, high))


# --- all models together --------------------------------------------------------------------------


@dataclass(frozen=True)
class Votes:
    """What the models say of the labels of one part."""

    part: str
    labels: np.ndarray  # int [N]
    suspects: pd.DataFrame  # see `contradictions`
    wrong: Share
    voters: list[str]
    silent: dict[str, str]  # models that do not vote, and why


def contradictions(groups: Groups, part: str = "test") -> Votes:
    """Returns the images of a part that the models together contradict, the surest first.

    A model is the mean probability over its seeds. It votes if its balanced accuracy is at least
    halfway from chance to the best model's; where no model is halfway from chance to 1, none does.
    `suspects` are the images whose confident class, by the mean of the voting models, is not their
    label: id, part, label, likely, models_agree (voting models of which `likely` is the confident
    class, too), models, seeds_agree (seeds that predict it), seeds, confidence (probability of
    `likely`) and margin (that of the label minus that of `likely`; least first).
    """
    voting, silent = _voters(groups, part)
    first = next(iter(groups.values()))[0]
    data, names = getattr(first, part), np.array(first.class_names, object)
    ids, labels, own, total = data["ids"], data["labels"], [], np.zeros(data["logits"].shape)
    for own_runs in voting.values():
        probabilities = mean_probability(own_runs, part)
        own.append(confident_classes(probabilities, thresholds(labels, probabilities)))
        total += probabilities / len(voting)
    likely = confident_classes(total, thresholds(labels, total)) if voting else labels
    rows = np.flatnonzero((likely >= 0) & (likely != labels))
    chosen, runs = likely[rows], [run for runs in voting.values() for run in runs]
    agreeing = sum((confident[rows] == chosen for confident in own), np.zeros(len(rows), int))
    seeds = sum(
        (getattr(run, part)["logits"][rows].argmax(axis=1) == chosen for run in runs),
        np.zeros(len(rows), int),
    )
    columns = {
        "id": ids[rows],
        "part": part,
        "label": names[labels[rows]],
        "likely": names[chosen],
        "models_agree": agreeing,
        "models": len(voting),
        "seeds_agree": seeds,
        "seeds": len(runs),
        "confidence": total[rows, chosen],
        "margin": total[rows, labels[rows]] - total[rows, chosen],
    }
    suspects = pd.DataFrame(columns).sort_values("margin", kind="stable", ignore_index=True)
    wrong = wrong_share(labels, total, data.get("groups")) if voting else UNKNOWN
    return Votes(part, labels, suspects, wrong, list(voting), silent)


def _voters(groups: Groups, part: str) -> tuple[Groups, dict[str, str]]:
    """Returns the models that vote, and why others do not."""
    data = getattr(next(iter(groups.values()))[0], part)
    same = {
        label: [run for run in runs if np.array_equal(getattr(run, part)["ids"], data["ids"])]
        for label, runs in groups.items()
    }
    silent = {label: "other images" for label, runs in same.items() if not runs}
    level = {
        label: values_of(runs, "balanced_accuracy", part).mean()
        for label, runs in same.items()
        if runs
    }
    best, chance = max(level.values()), 1 / len(np.unique(data["labels"]))
    least = (chance + (best if best >= (1 + chance) / 2 else 1)) / 2
    silent |= {
        label: f"balanced accuracy {percent(value, 1)} %, below {percent(least, 1)} %"
        for label, value in level.items()
        if value < least
    }
    return {label: runs for label, runs in same.items() if label not in silent}, silent
