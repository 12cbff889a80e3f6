"""A chapter of the report: text, tables and pictures, kept as JSON beside the picture files."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd

from analysis.runs import FinishedRun
from experiment.files import write_json


@dataclass
class Table:
    """Cells as a reader sees them; the first column names the row."""

    columns: list[str]
    rows: list[list[str]]
    caption: str = ""
    name: str = ""  # "configs": any two of its rows can be compared

    def __str__(self) -> str:
        return pd.DataFrame(self.rows, columns=self.columns).to_string(index=False)


def as_table(columns: pd.DataFrame | dict, caption: str = "", name: str = "") -> Table:
    """Returns columns of equal length, whatever their index, as a table of text."""
    if isinstance(columns, dict):
        columns = pd.DataFrame({key: list(values) for key, values in columns.items()})
    return Table(list(columns), columns.astype(str).values.tolist(), caption, name)


@dataclass
class Picture:
    """A file in the report's folder, and what it shows."""

    file: str
    caption: str
    wide: bool = False  # scrolls on a phone instead of shrinking
    pixelated: bool = False  # shows small images without smoothing


@dataclass
class Details:
    """What is folded away until a reader asks: lines, code, a picture or a table."""

    summary: str
    lines: list[str] = field(default_factory=list)
    code: str = ""
    picture: Picture | None = None
    table: Table | None = None


@dataclass
class Matrix:
    """The confusion of one model: mean counts [K][K] by true and predicted class."""

    model: str
    counts: list[list[float]]


@dataclass
class Photo:
    """A misclassified test image; `said` is {model: {predicted class: number of seeds}}."""

    source: str  # a data URI
    file: str
    true: int
    said: dict[str, dict[int, int]]


@dataclass
class Gallery:
    """Confusion matrices, or (true, predicted, images); each cell chooses among photos."""

    classes: list[str]
    matrices: list[Matrix]
    photos: list[Photo]
    note: str = ""
    pairs: list[tuple[int, int, float]] = field(default_factory=list)  # in place of matrices
    small: bool = False  # photos of a few pixels, shown without smoothing


@dataclass
class Section:
    """One chapter of the report, plain text throughout: the page escapes all of it."""

    title: str = ""  # the page has its own titles
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    details: list[Details] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    pictures_first: bool = False  # before the tables
    data: dict = field(default_factory=dict)  # numbers, for readers of the JSON file
    finding: str = ""  # the result in one sentence, visible while the chapter is folded
    gallery: Gallery | None = None
    chart: str = ""  # "pareto": accuracy against every cost, drawn by the page itself


def _part(content: dict):
    """Returns the part of a section that `asdict` turned into `content`, or `content` itself."""
    for kind in (Table, Picture, Details, Matrix, Photo, Gallery, Section):
        if content.keys() == kind.__dataclass_fields__.keys():
            return kind(**content)
    return content


def remembered(
    path: Path, runs: list[FinishedRun], options: dict, make: Callable[[], Section]
) -> Section:
    """Returns the section kept in a JSON file; makes it if a run, option or picture changed."""
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for run in runs:
        digest.update(run.name.encode() + (run.path / "summary.json").read_bytes())
    key = digest.hexdigest()
    try:
        stored = json.loads(path.read_text(encoding="utf-8"), object_hook=_part)
        section = stored["section"]
        pictures = [*section.pictures, *(d.picture for d in section.details if d.picture)]
        if stored["key"] == key and all((path.parent / p.file).exists() for p in pictures):
            return section
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # never made, or by another version
    section = make()
    write_json(path, {"key": key, "section": asdict(section)})
    return section
