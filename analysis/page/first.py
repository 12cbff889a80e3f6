"""The first screen: what was compared on which data, and the few figures that decide."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import pandas as pd

from analysis import tuning
from analysis.compare import Comparison
from analysis.criterion import TITLES
from analysis.page.section import Section
from analysis.page.tables import NONE, decimal, percent, scaled

WIDTH, MARGIN = 200, 6  # of a drawn interval, in units of its own


@dataclass(frozen=True)
class Column:
    """A heading, what stands below it, the term that explains it, and the chapter about it."""

    title: str
    note: str
    term: str
    chapter: str = ""


@dataclass(frozen=True)
class Cell:
    """Text, a smaller line below it, and the number to sort by."""

    text: str
    below: str = ""
    value: float = math.nan


@dataclass(frozen=True)
class Interval:
    """A dot and its whiskers in a drawing of `WIDTH`, and the same in words."""

    low: float
    mean: float
    high: float
    words: str


@dataclass
class Row:
    """A model, what is to be known of its runs, and a cell for each column after the first."""

    label: str
    rank: str
    runs: str
    state: str
    interval: Interval | None
    cells: list[Cell]


@dataclass
class Summary:
    """The table of the first screen; `scale` are the ends of its drawn intervals, in percent.

    `note` stands below it.
    """

    columns: list[Column] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    scale: tuple[str, str] = ("", "")
    note: str = ""


def facts(comparison: Comparison) -> list[tuple[str, str]]:
    """Returns what a reader must know of the experiment: date, data, seeds, device."""
    runs = comparison.runs
    if not runs:
        return []
    dataset, config = runs[0].dataset, runs[0].config["data"]
    newest = max((run.path / "summary.json").stat().st_mtime for run in runs)
    date = datetime.fromtimestamp(newest)
    source, path = config.get("source", ""), config.get("path", "")
    name = Path(path).name if path else ""
    parts = ("train", "validation", "test")
    sizes = {part: sum(dataset["counts"].get(part, {}).values()) for part in parts}
    images = ", ".join(f"{sizes[part]:,} {part}" for part in parts)
    if folds := comparison.folds:
        whole, *rest = (sizes[part] / folds for part in ("test", "train", "validation"))
        images = "{:,} in {} folds of {:,.0f}; of the others {:,.0f} train, {:,.0f} validation"
        images = images.format(sizes["test"], folds, whole, *rest)
    seeds = sorted({run.seed for run in runs})
    devices = sorted({str(run.cost["device"]) for run in runs})
    return [
        ("Newest run", f"{date.day} {date:%B %Y}"),
        ("Data", " · ".join(dict.fromkeys(filter(None, (name, source))))),
        ("Images", images),
        ("Classes", f"{len(dataset['class_names']):,}"),
        ("Fingerprint", dataset["fingerprint"][:12]),
        ("Seeds", ", ".join(map(str, seeds))),
        ("Device", "; ".join(devices)),
    ]


def measured(sections: Iterable[Section], key: str) -> tuple[dict[str, float], str]:
    """Returns {model: number} of the first chapter whose data has that key, and its title."""
    for section in sections:
        by_model = {
            model: numbers[key]
            for model, numbers in section.data.items()
            if isinstance(numbers, dict) and isinstance(numbers.get(key), int | float)
        }
        if by_model:
            return by_model, section.title
    return {}, ""


def summary(comparison: Comparison, sections: list[Section]) -> Summary:
    """Returns the table of the first screen; a figure that nobody measured has no column."""
    table = comparison.table
    if table.empty:
        return Summary()
    titles = {section.title for section in sections}

    def chapter(title: str) -> str:
        return title if title in titles else ""

    title = TITLES[comparison.criterion]
    title = title[0].upper() + title[1:]
    columns = [Column(title, "test, %", "95 % interval", chapter("Accuracy"))]
    cells = [[Cell(percent(x), value=x) for x in table.score]]
    if len(table) > 1 and table.group.any():
        columns.append(Column("Group", "same letter: tied", "Group", chapter("Pairs of models")))
        cells.append([Cell(letters, value=i) for i, letters in enumerate(table.group)])
    costs = table.multiply_adds_per_image
    columns.append(
        Column("Cost", "multiply-adds, parameters", "Multiply-adds", chapter("Accuracy and cost"))
    )
    parameters = [f"{scaled(x)} params" for x in table.parameters]
    cells.append([Cell(scaled(x), p, x) for x, p in zip(costs, parameters, strict=True)])
    for title, note, term, key, write in (
        ("Latency", "ms per image", "Latency", "milliseconds_at_1", lambda x: f"{x:.3g}"),
        ("Calibration", "ECE, %", "ECE", "", percent),
        ("Robustness", "corrupted images, %", "Robustness", "corrupted", lambda x: percent(x, 1)),
    ):
        found, about = measured(sections, key) if key else ({}, chapter(title))
        values = table.label.map(found).astype(float) if key else table.ece_mean
        if values.notna().any():
            columns.append(Column(title, note, term, about))
            cells.append([Cell(NONE if math.isnan(x) else write(x), value=x) for x in values])
    scale = _scale(table)
    rows = [
        Row(row.label, row.rank, _runs(row), row.state, _interval(row, scale), list(of_row))
        for row, of_row in zip(table.itertuples(), zip(*cells, strict=True), strict=True)
    ]
    if (base := comparison.baseline) is not None:
        blank = [Cell(NONE)] * (len(columns) - 1)
        score = Cell(percent(base.score), value=base.score)
        rows.append(Row(base.label, "", "majority class", "", None, [score, *blank]))
    ends = tuple(decimal(100 * x, 3).rstrip("0").rstrip(".") for x in scale)
    return Summary(columns, rows, ends, tuning.note(comparison))


def _runs(row) -> str:
    """Says how many seeds stand behind a row."""
    if row.planned > row.seeds:
        return f"{row.seeds} of {row.planned} seeds"
    return "1 seed" if row.seeds == 1 else f"{row.seeds} seeds"


def _scale(table: pd.DataFrame) -> tuple[float, float]:
    """Returns round ends of an axis that holds every interval."""
    ends = table[["score", "ci95_low", "ci95_high"]].to_numpy(float)
    low, high = min(ends[ends == ends]), max(ends[ends == ends])
    if high - low < 1e-3:  # equal models of one class
        low, high = low - 0.01, high + 0.01
    step = 10 ** math.floor(math.log10(high - low))
    return math.floor(low / step) * step, math.ceil(high / step - 1e-9) * step


def _interval(row, scale: tuple[float, float]) -> Interval | None:
    if pd.isna(row.ci95_low):
        return None

    def place(value: float) -> float:
        share = (value - scale[0]) / (scale[1] - scale[0])
        return round(MARGIN + share * (WIDTH - 2 * MARGIN), 1)

    words = f"{percent(row.ci95_low)} to {percent(row.ci95_high)}"
    return Interval(*map(place, (row.ci95_low, row.score, row.ci95_high)), words)
