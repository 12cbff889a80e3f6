"""One page that answers the question: which architecture, by how much, how sure, and what it saw.

    python -m analysis.report WORKDIR [--data=PATH] [--nomodels]

Writes WORKDIR/report/ from whatever runs are complete: index.html, which needs no network, and
every table (CSV, Markdown, LaTeX) and picture (SVG, PNG). Chapters that run the models (heat maps,
robustness, looking inside) are made anew only when their runs or options change; --nomodels leaves
them out.
"""

import base64
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from mimetypes import guess_type
from pathlib import Path

import jinja2
from absl import flags
from ml_collections import ConfigDict

from analysis import ensembles, gradcam, inside, robustness
from analysis.calibration import calibration_section
from analysis.compare import Comparison, compare, write_tables
from analysis.explain import packages
from analysis.page import chapters
from analysis.page.section import Section, Table, remembered
from analysis.page.tables import printed_table
from analysis.runs import load_runs
from errors import UserError
from experiment.command import arguments, output_folder, run_command
from experiment.machine import locked


@dataclass(frozen=True)
class Chapter:
    """A title, and what makes the chapter; those that run models are kept in a file."""

    title: str
    make: Callable[[Comparison], Section | None]  # None: there is nothing to say
    file: str = ""
    options: tuple[str, ...] = ()  # it depends on; left out where the first is 0 or False


def _robustness(c: Comparison) -> Section:
    count, baseline = c.options.robustness_images, c.options.baseline
    return robustness.robustness_section(c.groups, c.output, count, baseline, c.data_path)


def _inside(c: Comparison) -> Section:
    return inside.inspect_section(c.groups, c.output, c.data_path)


CHAPTERS = (  # in the order of the page
    Chapter("Comparison", chapters.overview),
    Chapter("What accuracy costs", chapters.costs),
    Chapter("How they learned", chapters.curves),
    Chapter("From pretrained weights", chapters.transfer),
    Chapter("Classes and what is taken for what", chapters.classes),
    Chapter("Which differences are established", chapters.pairs_of_models),
    Chapter("What the models looked at", gradcam.heat_maps, "gradcam.json", ("gradcam_images",)),
    Chapter("Ensembles", ensembles.ensembles_section),
    Chapter(
        "Averaged weights and mirror images",
        ensembles.averages_section,
        "averages.json",
        ("average_weights",),
    ),
    Chapter("Robustness", _robustness, "robustness.json", ("robustness_images", "baseline")),
    Chapter("Looking inside", _inside, "inspect.json", ("look_inside",)),
    Chapter("How far their confidence can be trusted", calibration_section),
    Chapter("Data", chapters.data),
    Chapter("How to reproduce this", chapters.reproduce),
)


@dataclass(frozen=True)
class Report:
    """The answer as text, the page, and why a run is not complete, by its name."""

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

    `options` is `config.compare`, None for that of the experiment. Chapters that run the models
    are made if `models`; `progress` gets a line before each, and where it raises, a page is left.
    """
    runs = load_runs(workdir)
    if not runs:
        raise UserError(f"{workdir} holds no runs: expected {workdir}/<model>/seed<k>/config.json")
    comparison = compare(workdir, runs, options, data_path)
    reasons = comparison.reasons
    page, sections = comparison.output / "index.html", {chapter.title: None for chapter in CHAPTERS}
    try:
        with locked(output_folder(comparison.output, "report") / ".lock", wait=True):
            write_tables(comparison)
            for slow in (False, True)[: 1 + models]:  # a page before what may take minutes
                for chapter in CHAPTERS:
                    if bool(chapter.file) == slow:
                        sections[chapter.title] = make_section(chapter, comparison, progress)
                text = render(comparison, reasons, sections)
                page.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"cannot write the report to {comparison.output}: {error}") from error
    lines = []
    if comparison.groups:
        lines.append(printed_table(comparison.table).to_string(index=False) + "\n")
    lines.append(str(comparison.recommendation))
    lines += [w for section in sections.values() if section for w in section.warnings]
    lines += [f"not complete: {name}: {reason}" for name, reason in reasons.items()]
    return Report("\n".join(lines), page, reasons)


def make_section(
    chapter: Chapter, comparison: Comparison, progress: Callable[[str], None]
) -> Section | None:
    """Returns a chapter; if one that runs models fails, it says why."""
    if not comparison.groups and chapter.make is not chapters.data:  # an audit needs no runs
        return None
    if not chapter.file:
        return chapter.make(comparison)
    options = {name: comparison.options[name] for name in chapter.options}
    options["packages"] = [name for name in ("lime", "shap") if packages.installed(name)]
    if not options[chapter.options[0]]:
        return None
    progress(f"report: {chapter.title.lower()}")
    path, make = comparison.output / chapter.file, partial(chapter.make, comparison)
    try:
        return remembered(path, comparison.runs, options, make)
    except UserError as error:
        return Section(text=[f"Not made: {error}"])
    except Exception as error:  # noqa: BLE001 - the rest of the page is worth having
        traceback.print_exc()
        return Section(text=[f"Not made: {type(error).__name__}: {error}"])


def render(comparison: Comparison, reasons: dict, sections: dict[str, Section | None]) -> str:
    """Returns index.html: every picture is inside it, every name is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )

    def source(file: str) -> str:
        content = base64.b64encode((comparison.output / file).read_bytes()).decode()
        return f"data:{guess_type(file)[0]};base64,{content}"

    return environment.get_template("report.html.j2").render(
        title=comparison.workdir.resolve().name,
        answer=str(comparison.recommendation),
        reasons=reasons,
        sections=[replace(part, title=title) for title, part in sections.items() if part],
        source=source,
        has_words=has_words,
    )


def has_words(table: Table, column: int) -> bool:
    """Returns whether a column holds words, which are set flush left, and not numbers."""
    return any(not re.match(r"(< |[+-])?\d|–$", row[column]) for row in table.rows)


def main(argv: list[str]) -> int:
    """Writes the report of a workdir; returns 1 if a run in it is not complete."""
    (workdir,) = arguments(argv, "analysis.report WORKDIR [--data=PATH] [--nomodels]")
    path, progress = Path(workdir).expanduser(), partial(print, flush=True)
    report = write_report(path, data_path=DATA.value, models=MODELS.value, progress=progress)
    print(f"{report.text}\n\nreport: {report.page}")
    return 1 if report.not_complete else 0


if __name__ == "__main__":
    DATA = flags.DEFINE_string("data", "", "Where the data lies now, if it was moved")
    MODELS = flags.DEFINE_bool("models", True, "Make the chapters that run the models")
    run_command(main)
