"""The recommendation in three sentences: what to use, how sure that is, what would change it.

Validation images choose, test images judge. Of the models that none is established to beat on the
test images, the best on validation images leads. Recommended is the cheapest of those that cannot
be told apart from it, that none is established to beat either, that lie within one standard error
of it on validation images (Breiman et al. 1984), and are rather not worse than it by a margin that
matters on the test images. A model of which a seed failed or diverged is not recommended.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pandas as pd

from analysis.criterion import TITLES
from analysis.folds import FoldFamily
from analysis.page.tables import percent, percents, points, times
from analysis.runs import Groups, values_of
from analysis.uncertainty import Family

CHEAPER = 2  # times fewer multiply-adds that are worth a mention
LOST = ("failed", "diverged", "damaged")
SCARCE = 10  # test images of a class that are too few to say much of it
NAMED = 6  # models in a sentence; the others are counted


@dataclass(frozen=True)
class Recommendation:
    """What to do, in words."""

    use: str | None  # label of a model
    sentences: tuple[str, ...]  # what to use, how sure that is, what would change it
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([" ".join(self.sentences), *(f"Note: {text}" for text in self.warnings)])


def listed(names: Iterable[str], most: int = NAMED) -> str:
    """Returns names as a reader lists them, a, b and c; of more than `most`, some are counted."""
    names = list(names)
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} others"]
    return ", ".join(names[:-1]) + " and " * (len(names) > 1) + "".join(names[-1:])


def plural(count: int, noun: str) -> str:
    """Returns a count of things."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def recommend(
    table: pd.DataFrame,
    pairs: pd.DataFrame,
    family: Family,
    baseline: pd.Series,
    groups: Groups,
    criterion: str,
    margin: float,
    absent: Mapping[str, str] = MappingProxyType({}),
) -> Recommendation:
    """Returns the recommendation of a comparison: see the top of this file.

    `family` is the largest, which holds the `baseline` too; `margin` is the difference that
    matters; `absent` are models without a complete seed, and what became of these.
    """
    rows = table.set_index("label", drop=False)
    compared = [label for label in table.label if label in family.mean]
    sound = [label for label in compared if not any(why in rows.state[label] for why in LOST)]
    candidates = sound or compared
    among = pairs[pairs.established] if len(pairs) else pairs
    beaten = {
        pair.second if pair.difference > 0 else pair.first
        for pair in among.itertuples()
        if {pair.first, pair.second} <= set(candidates)
    }
    best = next(label for label in candidates if label not in beaten)
    duels = {label: family.pair(best, label) for label in compared if label != best}
    level = [label for label in candidates if label != best and not duels[label].established]
    costs = rows.multiply_adds_per_image.to_dict()  # NaN where they are not known
    near = [
        label
        for label in level
        if label not in beaten
        and family.probability(duels[label], margin) < 0.5
        and _near(groups, best, label, criterion, margin)
    ]
    cheap = [label for label in near if costs[label] * CHEAPER < costs[best]]
    use = min(cheap, key=costs.get) if cheap else best
    differs = {x: family.pair(use, x).established for x in candidates if x != use}
    level, worse = ([x for x, apart in differs.items() if apart == of] for of in (False, True))
    lost = [label for label in compared if label not in candidates]
    judged = _Judgement(
        rows, family, baseline, criterion, margin, best, use, level, worse, costs, lost
    )
    sentences = judged.what(), judged.how_sure(), judged.what_would_change_it()
    if not sound:
        nothing = "No model can be recommended: seeds of each failed or diverged."
        left = f"Of what is left, {use} is the best on validation images. {sentences[1]}"
        sentences, use = (nothing, left, "Train the lost seeds again first."), None
    return Recommendation(
        use, sentences, judged.warnings(compared, sound, absent, _scarcest(groups, best))
    )


def _scarcest(groups: Groups, label: str) -> tuple[str, int]:
    """The class with fewest test images of those that have some, and how many these are."""
    run = groups[label][0]
    numbers, counts = np.unique(run.test["labels"], return_counts=True)
    return run.class_names[numbers[counts.argmin()]], int(counts.min())


def _near(groups: Groups, best: str, other: str, criterion: str, margin: float) -> bool:
    """Whether a model is within a standard error, or the margin, of the best on validation images.

    Of models validated on different images, the scores alone count.
    """
    of_each = [values_of(groups[label], criterion, "validation") for label in (best, other)]
    ids = [groups[label][0].validation["ids"] for label in (best, other)]
    gap, error = of_each[0].mean() - of_each[1].mean(), 0.0
    if np.array_equal(*ids):
        both, first = {best: of_each[0], other: of_each[1]}, groups[best][0]
        family = FoldFamily(both, first, "validation") if first.folds else Family(both)
        pair = family.pairs.iloc[0]
        error = math.sqrt(pair.variance_seeds + pair.variance_images)
    return gap <= max(error, margin)


@dataclass(frozen=True)
class _Judgement:
    """What was found, and how it is said."""

    rows: pd.DataFrame
    family: Family
    baseline: pd.Series
    criterion: str
    margin: float
    best: str  # on validation images, of those that none beats
    use: str
    level: list[str]  # cannot be told apart from the recommended one
    worse: list[str]  # than that; none is better
    costs: dict[str, float]
    lost: list[str]  # are not recommended, because of failed or diverged seeds

    @property
    def rival(self) -> str | None:
        """The model that the recommended one is compared with."""
        if self.use != self.best:
            return self.best
        return next(iter([*self.level, *self.worse]), None)

    def what(self) -> str:
        """Returns what to use, and why."""
        use, best, others = self.use, self.best, [x for x in self.level if x != self.best]
        if not self.level and not self.worse:
            return f"{use} is the only model " + (
                "without failed or diverged seeds." if self.lost else "to choose."
            )
        if use != best:
            text = f"Use {use}: it cannot be told apart from {listed([best, *others])}"
            text += f" on these test images, and needs {self._times(best)} than {best}"
            text += ", the best on validation images" * (self._rank(best) == 1)
        elif others:
            best = "among the best" if "=" in self.rows["rank"][use] else "the best"
            text = f"Use {use}: it is {best} on validation images"
            if self._rank(use) > 1:
                text += f" of those {self._left()}"
            text += f", but {listed(others)} cannot be told apart from it on these test images"
        else:
            others = "every other model" if not self.lost else "every other without failed seeds"
            text = f"Use {use}: it is better than {others} on these test images"
        if self.worse and self.level:
            is_are = "is" if len(self.worse) == 1 else "are"
            text += f"; {listed(self.worse)} {is_are} worse"
        return f"{text}."

    def _rank(self, label: str) -> int:
        return int(self.rows["rank"][label].rstrip("="))

    def _left(self) -> str:
        """What keeps those that are better on validation images from being recommended."""
        ahead = [label for label in self.rows.index if self._rank(label) < self._rank(self.use)]
        if any(label in self.lost for label in ahead):
            return "without failed seeds"
        if any(label not in self.family.mean for label in ahead):
            return "tested on the same images"
        return "that none beats on the test images"

    def _times(self, than: str) -> str:
        """How many times fewer multiply-adds a prediction takes."""
        if not self.costs[self.use]:
            return "no multiply-adds, fewer"
        return f"{times(self.costs[than] / self.costs[self.use])} times fewer multiply-adds"

    def how_sure(self) -> str:
        """Returns the score and its interval, and the difference from the rival with its own."""
        row, seeds = self.rows.loc[self.use], self.rows.seeds[self.use]
        over = f"{seeds} seeds" if seeds > 1 else "one seed"
        images = plural(self.family.images, "image")
        text = f"Its test {TITLES[self.criterion]} is {percent(row.score, 1)} % (95 % interval "
        text += f"{self.family.over} " * bool(self.family.over)
        text += f"{percents(row.ci95_low, row.ci95_high, 1)}; {over}, {images}"
        in_groups = self.family.units < self.family.images
        text += f" in {plural(self.family.units, 'group')}" * in_groups + ")"
        seeds_of_one = ""
        if self.family.one_seed:
            seeds_of_one = (
                ". With one seed a model, nothing is known of what another seed would give"
            )
        if self.rival is None:
            return f"{text}{seeds_of_one}."
        pair = self.family.pair(self.use, self.rival)
        between = f"{points(pair.ci95_low, 1)} to {points(pair.ci95_high, 1)}"
        text += f"; the difference from {self.rival} is {points(pair.difference, 1)} points "
        text += f"({between}"
        text += ", corrected for all pairs" * (len(self.family.mean) > 3) + ")"
        better = self.family.probability(pair, self.margin)
        worse = 1 - self.family.probability(pair, -self.margin)
        near = 1 - better - worse
        by = f"{100 * self.margin:g} points with a probability of"
        if near >= max(better, worse):
            text += f". They are within {by} {_chance(near)}"
        elif max(better, worse) >= 0.5:
            name = self.use if better > worse else self.rival
            text += f". {name} is better by more than {by} {_chance(max(better, worse))}"
        else:
            text += f". Either may be better by more than {100 * self.margin:g} points: {self.use} "
            text += f"with a probability of {_chance(better)}, {self.rival} of {_chance(worse)}"
        return f"{text}{seeds_of_one}."

    def what_would_change_it(self) -> str:
        """Returns what would settle an open comparison, or which trade a reader could make."""
        if self.rival is None:
            return "Other architectures may do better: train some to compare."
        pair = self.family.pair(self.use, self.rival)
        if not pair.established:
            seeds, images, both = self.family.needed(pair)
            what = "images" if self.family.over else "test images"
            ways = [f"{round_up(images)} {what}"] if math.isfinite(images) else []
            if self.family.units < self.family.images:
                ways = [f"{way}, from more groups," for way in ways]
            if self.family.one_seed:
                return " and then ".join(["More seeds come first", *ways]) + "."
            ways += [f"{seeds:.0f} seeds of each model"] if math.isfinite(seeds) else []
            if not ways and math.isfinite(both):
                ways = [f"{times(both)} times as many seeds and test images"]
            if ways:
                ways = " or ".join(ways)
                return f"It would take {ways} to settle this, if the true difference is this one."
            if self.family.over:
                folds = self.family.freedom + 1
                return f"{folds} folds cannot settle this: it takes more folds, or more images."
            return "So small a difference would take over 100 times the seeds and images to settle."
        cheaper = [x for x in self.worse if self.costs[x] * CHEAPER < self.costs[self.use]]
        if cheaper:
            name = max(cheaper, key=lambda label: self.rows.score[label])
            lost = percent(self.rows.score[self.use] - self.rows.score[name], 1)
            ratio = self.costs[self.use] / self.costs[name] if self.costs[name] else math.inf
            fewer = f"{times(ratio)} times fewer" if math.isfinite(ratio) else "no"
            return (
                f"If cost matters more: {name} needs {fewer} multiply-adds, but its "
                f"{TITLES[self.criterion]} is {lost} points lower."
            )
        mean = self.family.mean
        ahead = [label for label in self.lost if mean[label] > mean[self.use]]
        if ahead:
            return f"The lost seeds of {listed(ahead)} may change it: train them again."
        text = "only other data or architectures would change it."
        known = [self.costs[x] for x in (*self.level, *self.worse)]
        if all(self.costs[self.use] < cost for cost in known):  # NaN is unknown
            return f"It is also the cheapest of them: {text}"
        return text.capitalize()

    def _of_runs(self, compared: list[str], sound: list[str], absent: dict[str, str]) -> list[str]:
        """What became of runs that are not counted."""
        rows, texts = self.rows, []
        for label in compared:
            if label not in sound:
                why = " It is not recommended." * bool(sound)
                texts.append(f"{label}: {rows.state[label]}.{why}")
            elif rows.state[label] and label in (self.use, self.best):
                texts.append(f"Preliminary: of {label}, {rows.state[label]}.")
        if absent:
            named = listed([f"{label} ({why})" for label, why in absent.items()])
            texts.append(f"Not compared, for no seed is complete: {named}.")
        return texts

    def warnings(
        self,
        compared: list[str],
        sound: list[str],
        absent: dict[str, str],
        scarce: tuple[str, int],
    ) -> tuple[str, ...]:
        """Returns what a reader must know before acting."""
        rows, base = self.rows, self.baseline
        texts = self._of_runs(compared, sound, absent)
        first = rows.label.iloc[0]
        beside = first in sound and first != self.best
        if beside and self.family.pair(self.best, first).established:
            texts.append(
                f"{first} is the best on validation images, but {self.best} is better on the test "
                "images: the validation images misled."
            )
        over = self.family.pair(self.use, base.label)
        if not over.established or over.difference < 0:
            worse = "worse" if over.established else "not established to be better"
            texts.append(
                f"{self.use} is {worse} than always answering "
                f"“{base.class_name}” ({TITLES[self.criterion]} {percent(base.score, 1)} %)."
            )
        if rows.least_recall[self.use] == 0:
            texts.append(f"{self.use} recognises no image of at least one class.")
        if self.criterion != "accuracy" and scarce[1] < SCARCE:
            texts.append(
                f"Only {scarce[1]} of the test images {'is' if scarce[1] == 1 else 'are'} "
                f"“{scarce[0]}”, which counts as much as any class: more images of it matter most."
            )
        if self.criterion == "accuracy" and 0.6 < base.test_accuracy_mean < 1:
            digits = 0 if base.test_accuracy_mean < 0.99 else 2
            texts.append(
                f"{percent(base.test_accuracy_mean, digits)} % of the test images are "
                f"“{base.class_name}”, so accuracy says little of the other classes: "
                "config.select=balanced_accuracy compares by balanced accuracy."
            )
        if self.family.units < min(SCARCE, self.family.images):
            groups = plural(self.family.units, "group")
            texts.append(f"The test images are of {groups}, which says little of other groups.")
        elsewhere = [label for label in rows.label if label not in compared]
        if elsewhere:
            texts.append(f"Tested on other images, so not compared: {listed(elsewhere)}.")
        return tuple(texts)


def _chance(probability: float) -> str:
    if probability > 0.99 or probability < 0.01:
        return "over 99 %" if probability > 0.5 else "under 1 %"
    return f"{100 * probability:.0f} %"


def round_up(count: float) -> str:
    """Returns a count rounded up to two digits, with commas between thousands."""
    step = 10 ** max(0, math.floor(math.log10(count)) - 1)
    return f"{math.ceil(count / step) * step:,}"
