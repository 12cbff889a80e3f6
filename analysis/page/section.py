"""A chapter of the report: words, tables and pictures, kept as JSON beside the pictures' files."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from analysis.runs import FinishedRun
from experiment.files import write_json


@dataclass
class Table:
    """Cells as a reader sees them; the first column names the row."""

    columns: list[str]
    rows: list[list[str]]
    caption: str = ""


@dataclass
class Picture:
    """A file in the report's folder, and what it shows."""

    file: str
    caption: str
    wide: bool = False  # scrolls on a phone instead of shrinking
    pixelated: bool = False  # shows small images without smoothing


@dataclass
class Details:
    """What is folded away until a reader asks: lines, or a block of code, or a picture."""

    summary: str
    lines: list[str] = field(default_factory=list)
    code: str = ""
    picture: Picture | None = None

    def __post_init__(self):
        if isinstance(self.picture, dict):  # read from JSON
            self.picture = Picture(**self.picture)


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

    @classmethod
    def from_dict(cls, content: dict) -> "Section":
        """Returns the section that `asdict` turned into `content`."""
        kinds = {"tables": Table, "pictures": Picture, "details": Details}
        parts = {name: [kind(**item) for item in content[name]] for name, kind in kinds.items()}
        return cls(**content | parts)


def remembered(
    path: Path, runs: list[FinishedRun], options: dict, make: Callable[[], Section]
) -> Section:
    """Returns the section kept in a JSON file of the report's folder, or makes and keeps it.

    It is made anew if one of its runs was trained again, one of its options changed, or a picture
    is gone.
    """
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for run in runs:
        digest.update(run.name.encode() + (run.path / "summary.json").read_bytes())
    key = digest.hexdigest()
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        section = Section.from_dict(stored["section"])
        pictures = [*section.pictures, *(d.picture for d in section.details if d.picture)]
        if stored["key"] == key and all((path.parent / p.file).exists() for p in pictures):
            return section
    except (OSError, ValueError, KeyError, TypeError):
        pass  # never made, or by another version
    section = make()
    write_json(path, {"key": key, "section": asdict(section)})
    return section
