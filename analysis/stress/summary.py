"""What right and wrong answers under corruption and attack amount to: tables and a conclusion."""

import numpy as np
import pandas as pd
from scipy import stats

from analysis.page.tables import percent, percents, points
from analysis.stress.attacks import ATTACKS
from analysis.stress.corruptions import CORRUPTIONS, spoken
from analysis.uncertainty import Interval, image_interval

SHOWN_EPSILON = 2  # of attacks in the table, in grey levels of 255

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
            low, high = image_interval(right)
            rows.append((model, *condition, right.mean(), low, high, *reversed(right.shape)))
    columns = ["model", "corruption", "severity", "accuracy", "ci95_low", "ci95_high"]
    return pd.DataFrame(rows, columns=[*columns, "images", "seeds"])


def summarise(table: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Returns a row per model; mCE (Hendrycks & Dietterich 2019) is NaN without baseline errors."""
    clean = table[table.corruption == CLEAN[0]].set_index("model")
    corrupted = table[table.corruption.isin(list(CORRUPTIONS))]
    by_corruption = corrupted.groupby(["corruption", "model"], sort=False).accuracy.mean().unstack()
    attacked = table[table.severity == SHOWN_EPSILON].set_index(["corruption", "model"]).accuracy
    mean, errors = by_corruption.mean(), 1 - by_corruption
    ratios = errors.div(errors[baseline].where(errors[baseline] > 0), axis=0)
    columns = {
        "clean": clean.accuracy,
        "ci95_low": clean.ci95_low,
        "ci95_high": clean.ci95_high,
        "corrupted": mean,
        "kept": mean / clean.accuracy.where(clean.accuracy > 0),
        "mce": ratios.mean(skipna=False),
        **{name.lower(): attacked.get(name, np.nan) for name in ATTACKS},
        "worst": by_corruption.idxmin(),
        "worst_accuracy": by_corruption.min(),
    }
    return pd.DataFrame(columns, index=clean.index).reset_index()


def printed(summary: pd.DataFrame) -> pd.DataFrame:
    """Returns the summary as a reader wants it, in percent."""
    return pd.DataFrame(
        {
            "model": row.model,
            "clean acc. %": percent(row.clean, 1),
            "95 % interval": percents(row.ci95_low, row.ci95_high, 1),
            "corrupted acc. %": percent(row.corrupted, 1),
            "kept %": percent(row.kept, 1),
            "mCE %": percent(row.mce, 1),
            f"FGSM {SHOWN_EPSILON}/255 %": percent(row.fgsm, 1),
            f"PGD {SHOWN_EPSILON}/255 %": percent(row.pgd, 1),
            "worst corruption": f"{spoken(row.worst)} ({percent(row.worst_accuracy, 1)})",
        }
        for row in summary.itertuples()
    )


def mean_interval(differences: np.ndarray) -> Interval:
    """Returns the 95 % bootstrap interval of a mean over two images or more, [N]."""
    interval = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=2000,
        batch=100,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def conclude(outcomes: dict[str, Outcomes]) -> str:
    """Returns which model is most accurate under corruption, and whether that is established."""
    shares = {
        model: np.mean([x for (name, _), x in right.items() if name in CORRUPTIONS], axis=(0, 1))
        for model, right in outcomes.items()
    }  # [N], the share of corruptions under which each image is classified rightly
    ranked = sorted(shares, key=lambda model: (-shares[model].mean(), model))
    accuracy = [percent(shares[model].mean(), 1) for model in ranked]
    text = f"{ranked[0]} has the highest accuracy under corruption, {accuracy[0]} %"
    if len(ranked) == 1:
        return f"{text}."
    best, second = (shares[model] for model in ranked[:2])
    if len(best) < 2:
        return f"{text}; these images are too few to tell it from {ranked[1]}."
    low, high = mean_interval(best - second)
    verdict = "established" if low > 0 else "not established"
    return (
        f"{text}; {ranked[1]} follows with {accuracy[1]} %. The difference is "
        f"{verdict} on these images (95 % interval {points(low, 1)} to {points(high, 1)} points, "
        "paired bootstrap over images)."
    )
