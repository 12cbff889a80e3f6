"""The comparison's tables as a reader wants them, in Markdown, LaTeX (booktabs) and CSV."""

import math
from pathlib import Path

import pandas as pd

NONE = "–"


def percent(value: float, digits: int = 2) -> str:
    """Returns a share of 0..1 in percent, without the sign."""
    return NONE if pd.isna(value) else f"{100 * value:.{digits}f}"


def percents(low: float, high: float, digits: int = 2) -> str:
    """Returns an interval of shares in percent."""
    return NONE if pd.isna(low) else f"{percent(low, digits)} to {percent(high, digits)}"


def points(value: float, digits: int = 2) -> str:
    """Returns a difference of shares in percentage points, with its sign."""
    return NONE if pd.isna(value) else f"{100 * value:+.{digits}f}"


def scaled(value: float) -> str:
    """Returns three digits with k, M or G."""
    if value is None or pd.isna(value):
        return NONE
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def p_value(value: float) -> str:
    """Returns a p-value with two digits, never as 0."""
    if pd.isna(value):
        return NONE
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def decimal(value: float, digits: int = 3) -> str:
    """Returns a number with fixed digits."""
    return NONE if value is None or math.isnan(value) else f"{value:.{digits}f}"


def labels_of(table: pd.DataFrame) -> list[str]:
    """Returns model and variant of each row, as a reader sees them."""
    return [f"{r.model} ({r.variant})" if r.variant else r.model for r in table.itertuples()]


def printed_table(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the table as a reader wants it: percent, rounded, "–" where there is no number.

    The published figures and what leaks change have columns only where there are any.
    """
    rows = []
    for label, row in zip(labels_of(table), table.itertuples(), strict=True):
        cells = {
            "model": label,
            "seeds": str(row.seeds),
            "test acc. %": percent(row.test_accuracy_mean),
            "std": percent(row.test_accuracy_std),
            "95 % over seeds": percents(row.seeds_ci95_low, row.seeds_ci95_high),
            "95 % over images": percents(row.images_ci95_low, row.images_ci95_high),
        }
        if table.published.notna().any():
            cells["published %"] = percent(row.published)
        if table.leaks.any():
            cells["without leaks %"] = percent(row.without_leaks)
        if table.near_leaks.any():
            cells["without near leaks %"] = percent(row.without_near_leaks)
        cells |= {
            "F1": percent(row.macro_f1_mean),
            "NLL": decimal(row.nll_mean),
            "Brier": decimal(row.brier_mean),
            "ECE": percent(row.ece_mean),
            "params": scaled(row.parameters),
            "FLOPs/image": scaled(row.flops_per_image),
            "train s": scaled(row.seconds),
            "train images/s": scaled(row.train_images_per_second),
            "predict images/s": scaled(row.inference_images_per_second),
        }
        rows.append(cells)
    return pd.DataFrame(rows)


def printed_pairs(pairs: pd.DataFrame) -> pd.DataFrame:
    """Returns the pairs as a reader wants them; differences in percentage points."""

    def interval(row, name: str) -> str:
        low, high = getattr(row, f"{name}_ci95_low"), getattr(row, f"{name}_ci95_high")
        return "–" if math.isnan(low) else f"{points(low)} to {points(high)}"

    return pd.DataFrame(
        [
            {
                "models": f"{row.first} − {row.second}",
                "seeds": str(row.seeds),
                "difference": points(row.difference),
                "95 % over seeds and images": interval(row, "both"),
                "p Holm": p_value(row.p_holm),
                "established": "yes" if row.established else "no",
                "95 % over images": interval(row, "images"),
                "95 % over seeds": interval(row, "seeds"),
                "only first right": f"{row.only_first:.0f}",
                "only second right": f"{row.only_second:.0f}",
                "p": p_value(row.p_both),
                "p McNemar": p_value(row.p_mcnemar),
                "agreement %": percent(row.agreement, 1),
                "kappa": f"{row.kappa:.2f}",
            }
            for row in pairs.itertuples()
        ]
    )


def to_markdown(table: pd.DataFrame) -> str:
    """Returns a printed table in GitHub's Markdown."""

    def line(cells: list) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |\n"

    rule = ["---"] + ["---:"] * (len(table.columns) - 1)
    return "".join(map(line, [list(table), rule, *table.values.tolist()]))


def to_latex(table: pd.DataFrame) -> str:
    """Returns a printed table for the booktabs package."""
    columns = "l" + "r" * (len(table.columns) - 1)
    text = table.to_latex(index=False, escape=True, column_format=columns)
    return text.replace("–", "--").replace("−", "$-$")


def write_table(table: pd.DataFrame, printed: pd.DataFrame, path: Path) -> None:
    """Writes `path`.csv with every digit, and what is printed as `path`.md and `path`.tex."""
    table.to_csv(path.with_suffix(".csv"), index=False)
    path.with_suffix(".md").write_text(to_markdown(printed), encoding="utf-8")
    path.with_suffix(".tex").write_text(to_latex(printed), encoding="utf-8")
