"""What right and wrong answers under corruption and attack amount to: tables and a conclusion."""

from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy import stats

from analysis.page.tables import percent, percents, points
from analysis.stress.attacks import ATTACKS
from analysis.stress.corruptions import CORRUPTIONS, spoken
from analysis.uncertainty import UNKNOWN, image_interval

SHOWN_EPSILON = 2  # of attacks in the table, in grey levels of 255
LEAST_LOSS = 0.05  # of the baseline's accuracy, for a corruption to count in relative mCE
RESAMPLES = 2000
BOOTSTRAP_SEED = 0

Condition = tuple[str, int]  # corruption and severity, or attack and epsilon
Outcomes = dict[Condition, np.ndarray]  # right or wrong: bool [N] of one run, [S, N] of its seeds
CLEAN: Condition = ("clean", 0)


# --- tables ---------------------------------------------------------------------------------------


def accuracy_table(outcomes: dict[str, Outcomes]) -> pd.DataFrame:
    """Returns a row per model and condition.

    Args:
      outcomes: {model: {condition: bool [S, N]}}.

    Returns:
      model, corruption, severity (0 for clean; epsilon in grey levels for FGSM and PGD), accuracy,
      ci95_low and ci95_high (Wilson, over images), images, seeds. Shares are in 0..1.
    """
    order = ["clean", *CORRUPTIONS, *ATTACKS]
    rows = []
    for model, by_condition in outcomes.items():
        for condition in sorted(by_condition, key=lambda c: (order.index(c[0]), c[1])):
            right = by_condition[condition]
            low, high = image_interval(right)
            rows.append((model, *condition, right.mean(), low, high, *reversed(right.shape)))
    columns = ["model", "corruption", "severity", "accuracy", "ci95_low", "ci95_high"]
    return pd.DataFrame(rows, columns=[*columns, "images", "seeds"])


def by_corruption(table: pd.DataFrame, model: str) -> pd.Series:
    """Returns a model's accuracy by (corruption, severity), clean among them, without attacks."""
    rows = table[(table.model == model) & ~table.corruption.isin(list(ATTACKS))]
    return rows.set_index(["corruption", "severity"]).accuracy


def corruption_errors(accuracy: pd.Series, baseline: pd.Series) -> pd.DataFrame:
    """Errors under each corruption as shares of a baseline's (Hendrycks & Dietterich 2019).

    Args:
      accuracy: of a model, indexed by (corruption, severity), clean among them, no attacks.
      baseline: likewise of the baseline.

    Returns:
      A row per corruption: `error`, summed over severities and divided by the baseline's, and
      `relative`, likewise with the error on clean images taken off each. NaN where the baseline
      makes no error, or where corruption costs it less than LEAST_LOSS on average: a ratio to
      almost nothing says nothing. The means are mCE and relative mCE.
    """
    rows = {}
    for name in accuracy.drop(CLEAN).index.unique(0):
        ours, theirs = (1 - series[name] for series in (accuracy, baseline))
        added, theirs_added = accuracy[CLEAN] - accuracy[name], baseline[CLEAN] - baseline[name]
        costly = theirs_added.mean() >= LEAST_LOSS
        rows[name] = {
            "error": ours.sum() / theirs.sum() if theirs.sum() > 0 else np.nan,
            "relative": added.sum() / theirs_added.sum() if costly else np.nan,
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def summarise(table: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Returns a row per model from the rows of `accuracy_table`.

    Columns: model, clean, ci95_low, ci95_high, corrupted (mean over corruptions and severities),
    kept (corrupted / clean), mce, relative_mce (over the corruptions that cost the baseline
    LEAST_LOSS), fgsm, pgd (at SHOWN_EPSILON), worst (corruption) and worst_accuracy. Shares are in
    0..1.
    """
    rows = []
    for model, found in table.groupby("model", sort=False):
        accuracy = found.set_index(["corruption", "severity"]).accuracy
        clean = found[found.corruption == CLEAN[0]].iloc[0]
        plain = by_corruption(table, model)
        means = plain.drop(CLEAN).groupby(level=0, sort=False).mean()
        errors = corruption_errors(plain, by_corruption(table, baseline))
        rows.append(
            {
                "model": model,
                "clean": clean.accuracy,
                "ci95_low": clean.ci95_low,
                "ci95_high": clean.ci95_high,
                "corrupted": means.mean(),
                "kept": means.mean() / clean.accuracy if clean.accuracy else np.nan,
                "mce": errors.error.mean(skipna=False),
                "relative_mce": errors.relative.mean(),
                "fgsm": accuracy.get(("FGSM", SHOWN_EPSILON), np.nan),
                "pgd": accuracy.get(("PGD", SHOWN_EPSILON), np.nan),
                "worst": means.idxmin(),
                "worst_accuracy": means.min(),
            }
        )
    return pd.DataFrame(rows)


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
            "relative mCE %": percent(row.relative_mce, 1),
            f"FGSM {SHOWN_EPSILON}/255 %": percent(row.fgsm, 1),
            f"PGD {SHOWN_EPSILON}/255 %": percent(row.pgd, 1),
            "worst corruption": f"{spoken(row.worst)} ({percent(row.worst_accuracy, 1)})",
        }
        for row in summary.itertuples()
    )


# --- words ----------------------------------------------------------------------------------------


def kept(clean: np.ndarray, corrupted: np.ndarray, axis: int = -1) -> np.ndarray:
    """Returns the share of clean accuracy that is left; NaN where nothing was right."""
    whole = clean.mean(axis=axis)
    return corrupted.mean(axis=axis) / np.where(whole > 0, whole, np.nan)


def left_over(clean: np.ndarray, corrupted: np.ndarray, axis: int = -1) -> np.ndarray:
    """Returns the accuracy under corruption."""
    return corrupted.mean(axis=axis)


def difference_interval(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], statistic: Callable
) -> tuple[float, float]:
    """Returns the 95 % interval of one model's statistic minus another's, over images.

    A paired bootstrap: both are measured on the same resampled images; NaN for a single one.

    Args:
      first: float [N] of each image: right when clean, and share right when corrupted.
      second: likewise.
      statistic: `kept` or `left_over`.
    """
    if len(first[0]) < 2:
        return UNKNOWN
    found = stats.bootstrap(
        (*first, *second),
        lambda a, b, c, d, axis: statistic(a, b, axis) - statistic(c, d, axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=100,
        method="percentile",
        rng=np.random.default_rng(BOOTSTRAP_SEED),
    ).confidence_interval
    return float(found.low), float(found.high)


def conclude(outcomes: dict[str, Outcomes], statistic: Callable, what: str) -> str:
    """Returns which model has the highest statistic, and whether the images establish it."""
    by_image = {
        model: (
            found[CLEAN].mean(axis=0),
            np.mean([x for (name, _), x in found.items() if name in CORRUPTIONS], axis=(0, 1)),
        )
        for model, found in outcomes.items()
    }
    values = {model: float(statistic(*pair)) for model, pair in by_image.items()}
    ranked = sorted(values, key=lambda model: (-np.nan_to_num(values[model]), model))
    text = f"{ranked[0]} {what}, {percent(values[ranked[0]], 1)} %"
    if len(ranked) == 1:
        return text + "."
    best, second = ranked[:2]
    low, high = difference_interval(by_image[best], by_image[second], statistic)
    if np.isnan(low):  # a resample without a right answer has no share to keep
        return f"{text}; these images are too few to tell it from {second}."
    verdict = "established" if low > 0 else "not established"
    return (
        f"{text}; {second} follows with {percent(values[second], 1)} %. The difference is "
        f"{verdict} on these images (95 % interval {points(low, 1)} to {points(high, 1)} points, "
        "paired bootstrap over images)."
    )
