"""The comparison's tables as a reader sees them, in Markdown, LaTeX (booktabs) and CSV."""

import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from analysis.criterion import TITLES

NONE = "–"
UNITS = (("G", 1e9), ("M", 1e6), ("k", 1e3))


def decimal(value: float, digits: int = 3, sign: str = "") -> str:
    """Returns a number with fixed digits."""
    if pd.isna(value) or math.isinf(value):
        return NONE
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # never -0.00


def percent(value: float, digits: int = 2) -> str:
    """Returns a share of 0..1 in percent, without the sign."""
    return decimal(100 * value, digits)


def percents(low: float, high: float, digits: int = 2) -> str:
    """Returns an interval of shares in percent."""
    return NONE if pd.isna(low) else f"{percent(low, digits)} to {percent(high, digits)}"


def points(value: float, digits: int = 2) -> str:
    """Returns a difference of shares in percentage points, with its sign."""
    return decimal(100 * value, digits, "+")


def scaled(value: float) -> str:
    """Returns three digits with k, M or G."""
    if pd.isna(value):
        return NONE
    unit, size = next((u for u in UNITS if value >= u[1]), ("", 1))
    return f"{value / size:.3g} {unit}".strip()


def times(ratio: float) -> str:
    """Returns a ratio with two digits: 1.7, 24, 2,400."""
    return f"{float(f'{ratio:.2g}'):,.10g}"


def count(value: float) -> str:
    """Returns a whole number, "∞" where none is enough."""
    return NONE if pd.isna(value) else "∞" if math.isinf(value) else f"{value:,.0f}"


def chance(value: float) -> str:
    """Returns a probability in whole percent, never as 0 or 100."""
    if 0.01 <= value <= 0.99 or pd.isna(value):
        return percent(value, 0)
    return "< 1" if value < 0.5 else "> 99"


def p_value(value: float) -> str:
    """Returns a p-value with two digits, never as 0."""
    return NONE if pd.isna(value) else "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def intervals(table: pd.DataFrame, name: str, write: Callable[[float], str]) -> list[str]:
    """Returns the 95 % interval called `name` in each row, both ends written by `write`."""
    ends = table[[f"{name}ci95_low", f"{name}ci95_high"]].to_numpy()
    return [NONE if pd.isna(low) else f"{write(low)} to {write(high)}" for low, high in ends]


def printed_table(table: pd.DataFrame, baseline: pd.Series | None = None) -> pd.DataFrame:
    """Returns the table as a reader sees it; columns of leaks and of published figures if any.

    The last row is the `baseline`, which always answers the most frequent class.
    """
    title = f"test {TITLES[table.criterion.iloc[0]]} %"
    lost = zip(table.seeds, table.planned, strict=True)
    columns = {
        "model": table.label,
        "seeds": [f"{n}" if n == planned else f"{n} of {planned}" for n, planned in lost],
        "validation %": table.validation_score.map(percent),
        title: table.score.map(percent),
        "95 % interval": intervals(table, "", percent),
        "group": table.group,
        "test accuracy %": table.test_accuracy_mean.map(percent),
        "balanced accuracy %": table.balanced_accuracy_mean.map(percent),
        "std of seeds": table.test_accuracy_std.map(percent),
        "published %": table.published.map(percent),
        "without leaks %": table.without_leaks.map(percent),
        "without near leaks %": table.without_near_leaks.map(percent),
        "F1": table.macro_f1_mean.map(percent),
        "AUROC": _of_two_classes(table, "auroc"),
        "AP": _of_two_classes(table, "average_precision"),
        "NLL": table.nll_mean.map(decimal),
        "Brier": table.brier_mean.map(decimal),
        "ECE": table.ece_mean.map(percent),
        "params": table.parameters.map(scaled),
        "multiply-adds": table.multiply_adds_per_image.map(scaled),
        "train s": table.seconds.map(scaled),
        "train images/s": table.train_images_per_second.map(scaled),
    }
    used = {"published %": table.published.notna(), "without leaks %": table.leaks}
    used["without near leaks %"] = table.near_leaks
    shown = pd.DataFrame(columns).drop(columns=[name for name in used if not used[name].any()])
    if baseline is None:
        return shown
    row = dict.fromkeys(shown, NONE) | {"model": baseline.label, title: percent(baseline.score)}
    row["test accuracy %"] = percent(baseline.test_accuracy_mean)
    row["balanced accuracy %"] = percent(baseline.balanced_accuracy_mean)
    return pd.concat([shown, pd.DataFrame([row])], ignore_index=True)


def _of_two_classes(table: pd.DataFrame, name: str) -> list[str]:
    """A figure in percent, and its interval where there are two classes."""
    figures = table[f"{name}_mean"].map(percent)
    if f"{name}_ci95_low_mean" not in table:
        return figures.tolist()
    ends = table[[f"{name}_ci95_low_mean", f"{name}_ci95_high_mean"]].to_numpy()
    within = [f" ({percents(*pair)})" if pd.notna(pair[0]) else "" for pair in ends]
    return [f"{figure}{text}" for figure, text in zip(figures, within, strict=True)]


def printed_pairs(pairs: pd.DataFrame) -> pd.DataFrame:
    """Returns the pairs as a reader sees them; differences in percentage points."""
    if pairs.empty:
        return pairs
    columns = {
        "models": pairs["first"] + " − " + pairs["second"],
        "difference": pairs.difference.map(points),
        "95 % interval": intervals(pairs, "", points),
        "p": pairs.p.map(p_value),
        "established": pairs.established.map({True: "yes", False: "no"}),
        "P(better), %": pairs.p_better.map(chance),
        "P(by margin), %": pairs.p_matters.map(chance),
        "seeds needed": pairs.seeds_needed.map(count),
        "images needed": pairs.images_needed.map(count),
        "agreement %": pairs.agreement.map(lambda share: percent(share, 1)),
        "kappa": pairs.kappa.map("{:.2f}".format),
    }
    return pd.DataFrame(columns)


def write_table(table: pd.DataFrame, printed: pd.DataFrame, path: Path) -> None:
    """Writes `path`.csv, and `printed` as `path`.md and `path`.tex; nothing of an empty table."""
    if table.empty:
        return
    table.to_csv(path.with_suffix(".csv"), index=False)
    numbers = len(printed.columns) - 1
    lines = [list(printed), ["---"] + ["---:"] * numbers, *printed.astype(str).values.tolist()]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    markdown = "".join(f"| {' | '.join(line)} |\n" for line in cells)
    path.with_suffix(".md").write_text(markdown, encoding="utf-8")
    latex = printed.to_latex(index=False, escape=True, column_format="l" + "r" * numbers)
    latex = latex.replace("–", "--").replace("−", "$-$")
    path.with_suffix(".tex").write_text(latex, encoding="utf-8")
