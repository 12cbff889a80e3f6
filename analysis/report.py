"""One page that answers the question: which architecture, by how much, how sure, and what it saw.

    python -m analysis.report WORKDIR [--data=PATH] [--nomodels]

Writes WORKDIR/report/: index.html, one file that asks no network for anything, and beside it every
table (CSV, Markdown, LaTeX) and picture (SVG, PNG). All of it comes from run directories, so it can
be made of whatever is complete. Chapters that run the models (heat maps, robustness, looking
inside) are kept and made anew only when their runs or options change; --nomodels leaves them out.
"""

import base64
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jinja2
import pandas as pd
from absl import flags
from ml_collections import ConfigDict

from analysis import compare
from analysis.page import chapters
from analysis.page.section import Section, Table, remembered
from analysis.page.tables import printed_table
from analysis.runs import FinishedRun, load_runs, read_audit, read_plan
from errors import UserError
from experiment.command import run_command

TYPES = {".png": "image/png", ".svg": "image/svg+xml"}


@dataclass(frozen=True)
class Report:
    """What `write_report` made: the table as text, the page, and the runs that are not complete."""

    text: str
    page: Path
    not_complete: dict[str, str]


def write_report(
    workdir: Path,
    options: ConfigDict | None = None,
    *,
    data_path: str = "",
    models: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Writes WORKDIR/report: tables, pictures and the self-contained index.html.

    Args:
      workdir: of an experiment, finished or not.
      options: `config.compare`; None for what the experiment was started with.
      data_path: where the data lies now, "" for where the runs found it.
      models: whether chapters that run the models are made.
      progress: told of each chapter that takes long; what it raises ends the work, with a page.

    Raises:
      UserError: there is no run under the workdir, or the report cannot be written.
    """
    runs = load_runs(workdir)
    if not runs:
        raise UserError(f"{workdir} holds no runs: expected {workdir}/<model>/seed<k>/config.json")
    options = options or compare.read_options(workdir)
    reasons = incomplete(workdir, runs)
    runs = [run for run in runs if run.name not in reasons]
    groups, audit = compare.group_runs(runs), read_audit(workdir)
    table, pairs = compare.make_table(groups, options, audit), compare.make_pairs(groups)
    output = workdir / "report"
    try:
        output.mkdir(exist_ok=True)
        compare.write_tables(groups, table, pairs, output)
        sections = make_sections(workdir, groups, table, pairs, options, audit, data_path)
        title, page = workdir.resolve().name, output / "index.html"
        text = render(title, compare.answer(table, pairs), reasons, sections, output)
        page.write_text(text, encoding="utf-8")  # before what may take minutes
        if models and groups:
            sections[-3:-3] = look_through_models(groups, options, output, data_path, progress)
            text = render(title, compare.answer(table, pairs), reasons, sections, output)
            page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the report to {output}: {error}") from error
    lines = [printed_table(table).to_string(index=False) + "\n"] if len(table) else []
    lines.append(compare.answer(table, pairs))
    lines += [warning for section in sections for warning in section.warnings]
    lines += [f"not complete: {name}: {reason}" for name, reason in reasons.items()]
    return Report("\n".join(lines), page, reasons)


def incomplete(workdir: Path, runs: list[FinishedRun]) -> dict[str, str]:
    """Returns {run: why} for every run that exists or was planned, and cannot be counted."""
    reasons = {name: "not started" for name in read_plan(workdir).get("runs", [])}
    for run in runs:
        reasons.pop(run.name, None)
        if run.status != "complete":
            error = run.summary.get("error", "").strip().split("\n")[0]
            reasons[run.name] = f"{run.status}: {error}" if error else run.status
            continue
        try:
            _ = run.test, run.validation, run.dataset, run.environment
        except UserError as error:
            reasons[run.name] = f"damaged: {error}"
    return reasons


def make_sections(
    workdir: Path,
    groups: compare.Groups,
    table: pd.DataFrame,
    pairs: pd.DataFrame,
    options: ConfigDict,
    audit: dict | None,
    data_path: str,
) -> list[Section]:
    """Returns the chapters that need no model, of which the last three follow those that do."""
    output = workdir / "report"
    sections = []
    if groups:
        sections = [
            chapters.overview(groups, table, options),
            chapters.costs(groups, table, output),
            chapters.curves(groups, output),
            chapters.transfer(groups),
            chapters.classes(groups, output, data_path),
            chapters.pairs_of_models(groups, table, pairs, output),
            chapters.calibration(groups, table, output),
        ]
    data = chapters.data(audit, workdir / "audit", groups, output) if audit else Section("Data")
    runs = [run for group in groups.values() for run in group]
    end = chapters.reproduce(runs, groups, workdir) if runs else Section("How to reproduce this")
    return [section for section in [*sections, data, end] if section]


def look_through_models(
    groups: compare.Groups,
    options: ConfigDict,
    output: Path,
    data_path: str,
    progress: Callable[[str], None],
) -> list[Section]:
    """Returns the chapters that load models and images: heat maps, robustness, looking inside.

    One that cannot be made, because the images are gone for instance, says why.
    """
    from analysis.gradcam import gradcam_section  # these load JAX, which takes a second
    from analysis.inside import inspect_section
    from analysis.robustness import robustness_section

    heat, noise = options.gradcam_images, options.robustness_images
    planned: dict[str, tuple[str, dict, Callable[[], Section]]] = {}
    if heat:
        planned["gradcam"] = (
            "What the models looked at",
            {"images": heat},
            lambda: gradcam_section(groups, output, heat, data_path),
        )
    if noise:
        planned["robustness"] = (
            "Robustness",
            {"images": noise, "baseline": options.baseline},
            lambda: robustness_section(groups, output, noise, options.baseline, data_path),
        )
    if options.look_inside:
        planned["inspect"] = (
            "Looking inside",
            {},
            lambda: inspect_section(groups, output, data_path),
        )
    sections, runs = [], [run for group in groups.values() for run in group]
    for name, (title, settings, make) in planned.items():
        progress(f"report: {title.lower()}")
        try:
            sections.append(remembered(name, output, runs, settings, make))
        except UserError as error:
            sections.append(Section(title, [f"Not made: {error}"]))
        except Exception as error:  # noqa: BLE001 - the rest of the page is worth having
            traceback.print_exc()
            sections.append(Section(title, [f"Not made: {type(error).__name__}: {error}"]))
    return sections


def render(
    title: str, answer: str, reasons: dict[str, str], sections: list[Section], output: Path
) -> str:
    """Returns index.html: every picture is inside it, every name is escaped.

    Args:
      title: of the page.
      answer: the comparison in a sentence.
      reasons: why a run is not complete, by its name.
      sections: in order.
      output: folder that the pictures' paths are relative to.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )

    def source(file: str) -> str:
        content = base64.b64encode((output / file).read_bytes()).decode()
        return f"data:{TYPES[Path(file).suffix]};base64,{content}"

    return environment.get_template("report.html.j2").render(
        title=title,
        answer=answer,
        reasons=reasons,
        sections=sections,
        source=source,
        has_words=has_words,
    )


def has_words(table: Table, column: int) -> bool:
    """Says whether a column holds words rather than numbers, and is set flush left."""
    return any(not re.match(r"(< |[+-])?\d|–$", row[column]) for row in table.rows)


def main(argv: list[str]) -> int:
    """Writes the report of a workdir; returns 1 if a run in it is not complete."""
    if len(argv) != 2:
        raise UserError("usage: python -m analysis.report WORKDIR [--data=PATH] [--nomodels]")
    report = write_report(
        Path(argv[1]).expanduser(),
        data_path=DATA.value,
        models=MODELS.value,
        progress=lambda text: print(text, flush=True),
    )
    print(f"{report.text}\n\nreport: {report.page}")
    return 1 if report.not_complete else 0


if __name__ == "__main__":
    DATA = flags.DEFINE_string("data", "", "Where the data lies now, if it was moved")
    MODELS = flags.DEFINE_bool("models", True, "Make the chapters that run the models")
    run_command(main)
