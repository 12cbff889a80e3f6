"""Cross-validation: the runs of all folds as one, intervals over folds, differences fold by fold.

The score of a fold varies with its test images, its training images and the training itself. But
the folds share most of their training images, so their mean varies more than its standard error
says: Nadeau and Bengio (2003) put (1/J + n_test/n_train) s^2 in place of s^2/J, with J - 1 degrees
of freedom (the corrected resampled t interval). J is the number of folds: seeds are averaged within
a fold, for they share its images, and counting them as J times as many scores would promise more
than these images can tell. n_train counts training images alone, without the validation part. Luck
that a seed has in every fold, by its initial weights, is not seen: it takes several seeds.

An interval is never narrower than that over the images alone, for a few folds may agree by chance.
Differences of all pairs hold at once: Tukey's quantile with J - 1 degrees of freedom.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
from scipy import stats

from analysis.runs import FinishedRun, Groups, by_name, clusters_of
from analysis.uncertainty import LEVEL, Family, Interval, quantile, share_interval

SOURCE = "over folds (corrected resampled t, Nadeau & Bengio 2003)"


@dataclass(frozen=True)
class CrossValidated(FinishedRun):
    """All folds of one model, variant and seed as one run; where it must choose, it is fold 0.

    Test predictions are of all folds in the order of ids, validation predictions fold after fold:
    an image may be among them several times. Both have `fold`, int [N]. Costs are
    means over folds.
    """

    @cached_property
    def test(self) -> dict[str, np.ndarray]:
        """Test predictions of all folds; each image was left out by the fold that tests it."""
        data = self._joined("test")
        order = np.argsort(data["ids"], kind="stable")
        return {key: values[order] for key, values in data.items()}

    @cached_property
    def validation(self) -> dict[str, np.ndarray]:
        """Validation predictions, fold after fold."""
        return self._joined("validation")

    @cached_property
    def dataset(self) -> dict:
        """Content of dataset.json; `counts` are sums over folds."""
        every = [run.dataset["counts"] for run in self.folds]
        counts = {
            part: {name: sum(of[part].get(name, 0) for of in every) for name in by_class}
            for part, by_class in every[0].items()
        }
        return self.folds[0].dataset | {"counts": counts}

    @property
    def cost(self) -> dict:
        """What training one fold cost on average."""
        costs = [run.cost for run in self.folds]
        known = {
            key: [cost.get(key) for cost in costs]
            for key, value in costs[0].items()
            if isinstance(value, int | float)
        }
        means = {key: float(np.mean(v)) for key, v in known.items() if None not in v}
        return costs[0] | means

    @cached_property
    def parts(self) -> list[FinishedRun]:
        """Each fold with its rows of the predictions, as a review may have changed them."""
        parts = []
        for run in self.folds:
            one = replace(run)
            for part in ("test", "validation"):
                data = getattr(self, part)
                rows = data["fold"] == run.fold
                one.__dict__[part] = {key: values[rows] for key, values in data.items()}
            parts.append(one)
        return parts

    def join(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Returns values of each fold's test images, [n, ...] each, in the order of `test`."""
        places = [np.flatnonzero(self.test["fold"] == run.fold) for run in self.folds]
        return np.concatenate(values)[np.argsort(np.concatenate(places))]

    def ratio(self, part: str) -> float:
        """Returns the images of a part for each training image, mean over folds."""
        counts = [run.dataset["counts"] for run in self.folds]
        sizes = [[sum(of[name].values()) for name in (part, "train")] for of in counts]
        return float(np.mean([size / train for size, train in sizes]))

    def _joined(self, part: str) -> dict[str, np.ndarray]:
        stored = [getattr(run, part) for run in self.folds]
        data = {key: np.concatenate([of[key] for of in stored]) for key in stored[0]}
        sizes = [len(of["ids"]) for of in stored]
        return data | {"fold": np.repeat([run.fold for run in self.folds], sizes)}


def _whole(name: str) -> str:
    """Returns the name of a run without its fold: that of its seed."""
    return re.sub(r"/fold\d+_", "/", name)


def merge_folds(runs: list[FinishedRun]) -> list[FinishedRun]:
    """Returns complete runs, the folds of a seed as one; without seeds that lack a fold."""
    merged = [run for run in runs if run.fold is None]
    folds: dict[str, list[FinishedRun]] = {}
    for run in runs:
        if run.fold is not None:
            folds.setdefault(_whole(run.name), []).append(run)
    for name, every in folds.items():
        first, *_ = every = sorted(every, key=lambda run: run.fold)
        if len(every) == first.config["data"]["folds"]:
            known = first.config, first.summary, first.model, first.variant, first.seed
            merged.append(CrossValidated(first.path, name, *known, tuple(every)))
    return sorted(merged, key=by_name)


def first_folds(groups: Groups) -> Groups:
    """Returns the runs of fold 0 where there are folds: what runs models takes them, and theirs."""
    return {label: [*(next(iter(run.folds), run) for run in of)] for label, of in groups.items()}


def single_runs(groups: Groups) -> Groups:
    """Returns the runs of every fold by themselves."""
    return {
        label: [one for run in runs for one in run.folds or (run,)]
        for label, runs in groups.items()
    }


def of_seeds(runs: list[FinishedRun], reasons: dict[str, str]) -> dict[str, str]:
    """Returns `reasons` by seed: one that lacks folds is not complete."""
    alone = {name: why for name, why in reasons.items() if _whole(name) == name}
    folds, lost = {}, {}
    for run in (one for of in single_runs({"": runs}).values() for one in of):
        if run.fold is not None and run.name not in reasons:
            folds[_whole(run.name)] = run.config["data"]["folds"]
            lost.setdefault(_whole(run.name), Counter())["complete"] += 1
    for name in reasons.keys() - alone.keys():
        lost.setdefault(_whole(name), Counter())[reasons[name].partition(":")[0]] += 1
    for name, states in sorted(lost.items()):
        done, total = states.pop("complete", 0), folds.get(name, 0)
        total = max(total, done + states.total())
        if done < total:
            why = ", ".join(f"{number} {state}" for state, number in states.items())
            alone[name] = f"with {done} of {total} folds" + f" ({why})" * bool(why)
    return alone


class FoldFamily(Family):
    """Models cross-validated on the same folds; `variance_seeds` of a pair is that over folds."""

    def __init__(
        self,
        values: Mapping[str, np.ndarray],
        run: CrossValidated,
        part: str = "test",
        weights: np.ndarray | None = None,
    ):
        """Takes values float [S, N] of each model on a part, in the order of that of any `run`."""
        data = getattr(run, part)
        super().__init__(values, clusters_of(data), fixed=values, weights=weights)
        _, fold, sizes = np.unique(data["fold"], return_inverse=True, return_counts=True)
        self.freedom = len(sizes) - 1
        self.over = f"over {len(sizes)} folds"
        self._factor = 1 / len(sizes) + run.ratio(part)
        self._by_fold = {k: np.bincount(fold, v) / sizes for k, v in self._by_image.items()}

    def interval(self, label: str, level: float = LEVEL) -> Interval:
        """Returns the interval of a model's mean over other images to train and to test on."""
        tail, z = (1 - level) / 2, stats.norm.isf((1 - level) / 2)
        folds = self._factor * self._by_fold[label].var(ddof=1)
        _, images = self.of_images(self._by_image[label], 0)
        least = self._least[label] if self._least else 0.0
        variance = max((stats.t.isf(tail, self.freedom) / z) ** 2 * folds, images, least)
        return share_interval(self.mean[label], variance, self._worth, level)

    def _variances(self, first: str, second: str) -> tuple[float, float, float]:
        """Difference, and its variance over folds or over images, whichever interval is wider."""
        mean = self.mean[first] - self.mean[second]
        _, images = self.of_images(self._by_image[first] - self._by_image[second], 1.0)
        difference = self._by_fold[first] - self._by_fold[second]
        folds, tail = self._factor * difference.var(ddof=1), 1 - LEVEL
        wide = quantile(len(self.mean), self.freedom, tail) ** 2 * folds
        if wide > quantile(len(self.mean), max(1, self._worth - 1), tail) ** 2 * images:
            return mean, folds, 0.0
        return mean, 0.0, images

    def needed(self, pair: pd.Series, most: int = 100) -> tuple[float, float, float]:
        """Returns what would settle a pair, see `Family.needed`: of seeds, nothing is known."""
        error = math.sqrt(pair.variance_seeds + pair.variance_images)
        wanted = quantile(len(self.mean), self.freedom, 1 - LEVEL) + stats.norm.isf(0.2)
        times = (wanted * error / abs(pair.difference)) ** 2 if pair.difference else math.inf
        times = max(1.0, times) if times <= most else math.inf
        return math.nan, self.images * times, times


def fold_table(groups: Groups) -> pd.DataFrame:
    """Returns folds.csv: accuracy and number of images by model, seed and fold."""
    columns = ("model", "seed", "fold", "images", "accuracy")
    rows = [
        (label, run.seed, one.fold, len(one.correct), one.correct.mean())
        for label, runs in groups.items()
        for run in runs
        for one in (run.parts if run.folds else ())
    ]
    return pd.DataFrame(rows, columns=columns)
