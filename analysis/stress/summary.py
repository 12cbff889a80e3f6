"""What right and wrong answers under corruption and attack amount to: tables and a conclusion."""

import numpy as np
import pandas as pd

from analysis.page.tables import percent, percents
from analysis.stress.attacks import ATTACKS
from analysis.stress.corruptions import CORRUPTIONS, spoken
from analysis.uncertainty import Family, ends, image_interval
from analysis.verdict import listed

SHOWN_EPSILON = 2  # of attacks in the table, in grey levels of 255
FEWEST_ERRORS = 30  # of a baseline that the errors of other models are divided by

Condition = tuple[str, int]  # corruption and severity, or attack and epsilon
Outcomes = dict[Condition, np.ndarray]  # right or wrong: bool [N] of one run, [S, N] of its seeds
CLEAN: Condition = ("clean", 0)


def accuracy_table(outcomes: dict[str, Outcomes]) -> pd.DataFrame:
    """Returns accuracy in 0..1 and its interval over images for each model and condition."""
    order = ["clean", *CORRUPTIONS, *ATTACKS]
    rows = []
    for model, by_condition in outcomes.items():
        for condition in sorted(by_condition, key=lambda c: (order.index(c[0]), c[1])):
            right = by_condition[condition]
            row = dict(zip(("model", "corruption", "severity"), (model, *condition), strict=True))
            row |= {"accuracy": right.mean(), **ends("images_", image_interval(right))}
            rows.append(row | dict(zip(("seeds", "images"), right.shape, strict=True)))
    return pd.DataFrame(rows)


def shares(outcomes: dict[str, Outcomes]) -> dict[str, np.ndarray]:
    """Returns the share of corruptions under which each image is classified rightly, [S, N].

    The model with the highest mean comes first.
    """
    each = {
        model: np.mean([x for (name, _), x in right.items() if name in CORRUPTIONS], axis=0)
        for model, right in outcomes.items()
    }
    return {model: each[model] for model in sorted(each, key=lambda m: (-each[m].mean(), m))}


def summarise(table: pd.DataFrame, family: Family, baseline: str) -> pd.DataFrame:
    """Returns a row per model of the `accuracy_table` and the family of its `shares`.

    `errors` is the sum of errors under all corruptions divided by the baseline's, NaN where it has
    too few.
    """
    corrupted = table[table.corruption.isin(list(CORRUPTIONS))]
    by_corruption = corrupted.groupby(["corruption", "model"], sort=False).accuracy.mean().unstack()
    wrong = ((1 - corrupted.accuracy) * corrupted.images).groupby(corrupted.model).sum()
    few = round(wrong[baseline]) < FEWEST_ERRORS
    rows = []
    for model, own in table.groupby("model", sort=False):
        accuracy = own.set_index(["corruption", "severity"])
        pgd = accuracy.accuracy.get(("PGD", SHOWN_EPSILON), np.nan)
        clean, mean, (low, high) = (
            accuracy.accuracy[CLEAN],
            family.mean[model],
            family.interval(model),
        )
        row = {"model": model, "clean": clean, "corrupted": mean}
        row |= {"corrupted_low": low, "corrupted_high": high, "group": family.letters[model]}
        row |= {"kept": mean / clean if clean else np.nan}
        row |= {"errors": np.nan if few else wrong[model] / wrong[baseline], "pgd": pgd}
        row |= {"worst": by_corruption[model].idxmin()}
        rows.append(row | {"worst_accuracy": by_corruption[model].min()})
    return pd.DataFrame(rows)


def printed(summary: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Returns the summary as a reader wants it, in percent."""
    return pd.DataFrame(
        {
            "model": row.model,
            "corrupted acc. %": percent(row.corrupted, 1),
            "95 % interval": percents(row.corrupted_low, row.corrupted_high, 1),
            "group": row.group,
            "kept %": percent(row.kept, 1),
            f"errors, % of {baseline}'s": percent(row.errors, 0),
            f"PGD {SHOWN_EPSILON}/255, at most %": percent(row.pgd, 1),
        }
        for row in summary.itertuples()
    )


def worst_corruptions(summary: pd.DataFrame) -> list[str]:
    """Returns a line per model: the corruption that costs it the most."""
    return [
        f"{row.model}: {spoken(row.worst)}, {percent(row.worst_accuracy, 1)} %"
        for row in summary.itertuples()
    ]


def conclude(family: Family) -> str:
    """Returns which model is most accurate under corruption, and over which others surely."""
    ranked = sorted(family.mean, key=lambda model: (-family.mean[model], model))
    best, accuracy = ranked[0], percent(family.mean[ranked[0]], 1)
    interval = percents(*family.interval(best), 1)
    text = (
        f"{best} has the highest accuracy under corruption, {accuracy} % (95 % interval {interval})"
    )
    if len(ranked) == 1:
        return f"{text}."
    ahead = {
        pair.second if pair.first == best else pair.first
        for pair in family.pairs[family.pairs.established].itertuples()
        if best == (pair.first if pair.difference > 0 else pair.second)
    }
    behind = [model for model in ranked[1:] if model in ahead]
    near = [model for model in ranked[1:] if model not in ahead]
    if not near:
        return f"{text}; its lead over {listed(behind)} is established."
    if not behind:
        return f"{text}, but no lead over another model is established."
    return (
        f"{text}; its lead over {listed(behind)} is established, that over {listed(near)} is not."
    )
