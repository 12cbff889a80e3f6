"""A part of the report: words, tables and pictures, kept as JSON beside the pictures' files."""

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


@dataclass
class Section:
    """One chapter of the report, plain text throughout: the page escapes all of it."""

    title: str
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
        tables = [Table(**table) for table in content["tables"]]
        pictures = [Picture(**picture) for picture in content["pictures"]]
        details = [
            Details(**item | {"picture": item["picture"] and Picture(**item["picture"])})
            for item in content["details"]
        ]
        parts = {"tables": tables, "pictures": pictures, "details": details}
        return cls(**content | parts)


def remembered(
    name: str,
    output: Path,
    runs: list[FinishedRun],
    options: dict,
    make: Callable[[], Section],
) -> Section:
    """Returns what `make` returned for the same runs and options before, or calls it.

    Sections that run models take minutes; this keeps them in `output/<name>.json`. A run that was
    trained anew, another option, or a picture that is gone makes the section anew.

    Args:
      name: of the JSON file.
      output: the report's folder.
      runs: those the section depends on.
      options: plain values the section depends on.
      make: computes the section and writes its pictures into `output`.
    """
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for run in runs:
        digest.update(run.name.encode() + (run.path / "summary.json").read_bytes())
    key, path = digest.hexdigest(), output / f"{name}.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        section = Section.from_dict(stored["section"])
        pictures = [*section.pictures, *(d.picture for d in section.details if d.picture)]
        if stored["key"] == key and all((output / p.file).exists() for p in pictures):
            return section
    except (OSError, ValueError, KeyError, TypeError):
        pass  # never made, or by another version
    section = make()
    write_json(path, {"key": key, "section": asdict(section)})
    return section
