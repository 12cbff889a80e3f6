"""Verdicts of a person on labels that look wrong: a table, as any spreadsheet writes it."""

import csv
from pathlib import Path

import pandas as pd

from analysis.runs import FinishedRun
from errors import UserError

VERDICTS = ("ok", "wrong", "unclear")
COLUMNS = (  # of suspects.csv
    "id", "part", "label", "likely", "models_agree", "models", "seeds_agree", "seeds",
    "confidence", "verdict", "new_label",
)  # fmt: skip
KEPT = ("id", "label", "verdict", "new_label")
NO_CLASS = "-"  # the new label of a wrong one where no class fits
NAMED = 10  # mistakes in one message


def stored_review(workdir: Path, runs: list[FinishedRun]) -> pd.DataFrame:
    """Returns the review that a workdir keeps, no rows where there is none."""
    path = workdir / "labels" / "review.csv"
    return read_review(path, runs) if path.exists() else pd.DataFrame(columns=KEPT, dtype=str)


def read_review(path: Path, runs: list[FinishedRun]) -> pd.DataFrame:
    """Returns a row per image with a verdict: id, label, verdict, new_label.

    `new_label` is the right class of a wrong label (`likely`, where a row gives none), NO_CLASS
    where no class fits, and "" with another verdict.
    Raises UserError that names each unknown image, class and verdict by its line.
    """
    classes, given = runs[0].class_names, {}
    for run in runs:
        for data in (run.validation, run.test):
            if not given.keys() >= set(data["ids"].tolist()):  # most often all runs have the same
                given |= dict(zip(data["ids"].tolist(), data["labels"].tolist(), strict=True))
    rows, mistakes, lines = {}, [], {}
    for line, cells in table_rows(path, {"id", "verdict"}, "the filled-in suspects.csv"):
        name = cells["id"]
        label = classes[given[name]] if name in given else ""
        row = {key: cells.get(key) or "" for key in KEPT} | {"label": label}
        if row["verdict"] == "wrong":
            row["new_label"] = row["new_label"] or cells.get("likely") or ""
        if problem := _mistake(row, classes, lines.get(name)):
            mistakes.append(f"line {line}: {problem}")
        elif row["verdict"]:
            rows[name], lines[name] = row, line
    if mistakes:
        more = [f"and {len(mistakes) - NAMED} more"] * (len(mistakes) > NAMED)
        raise UserError("\n  ".join([f"{path}:", *mistakes[:NAMED], *more]))
    return pd.DataFrame(rows.values(), columns=KEPT, dtype=str)


def _mistake(row: dict[str, str], classes: list[str], before: int | None) -> str:
    """Returns what is wrong with a row, "" if nothing is; `before` is an earlier line of it."""
    name, verdict, new = row["id"], row["verdict"], row["new_label"]
    if not row["label"]:
        known = "among the test and validation images"
        return f"no image {name!r} {known}" if name or verdict or new else ""
    if not verdict:
        return f"{name} has a new_label but no verdict" if new else ""
    if verdict not in VERDICTS:
        return f"verdict {verdict!r} of {name} is not one of {', '.join(VERDICTS)}"
    if before is not None:
        return f"{name} has a verdict in line {before} already"
    if verdict != "wrong":
        return f"{name} is {verdict} but has the new_label {new!r}" if new else ""
    if new not in (*classes, NO_CLASS):
        return f"class {new!r} of {name} is not one of {', '.join(classes[:20])}"
    return f"{name} is wrong but its new label is the old one, {new}" * (new == row["label"])


def table_rows(path: Path, needed: set[str], what: str) -> list[tuple[int, dict[str, str]]]:
    """Returns the rows of a CSV file, cells stripped, with the number of the line each ends on.

    Raises UserError that asks for `what` where a column that is needed is missing.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # a byte order mark is dropped
            separator = max(",;\t", key=file.readline().count)
            file.seek(0)
            reader = csv.DictReader(file, delimiter=separator)
            missing = needed - set(reader.fieldnames or ())
            if missing:
                raise ValueError(f"without the columns {', '.join(sorted(missing))}")
            return [
                (reader.line_num, {key: (row[key] or "").strip() for key in reader.fieldnames})
                for row in reader
            ]
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: give {what}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not in UTF-8: save it as CSV UTF-8") from error
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: need {what} in UTF-8 ({error})") from error
