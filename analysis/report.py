"""One page that answers the question: which architecture, by how much, how sure, and what it saw.

    python -m analysis.report WORKDIR [--data=PATH] [--nomodels] [--reviewed]

Writes WORKDIR/report/ from whatever runs are complete: index.html, which needs no network, and
every table (CSV, Markdown, LaTeX) and picture (SVG, PNG). Chapters that run the models (speed, heat
maps, averaged weights, robustness, looking inside) are made anew only when their runs or options
change; --nomodels leaves them out.
"""

import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from analysis import costs, ensembles, gradcam, inside, labels, latency, robustness, sizes, tuning
from analysis.calibration import calibration_section
from analysis.compare import Comparison, compare, write_tables
from analysis.compression import compression_section
from analysis.explain import packages
from analysis.folds import first_folds
from analysis.page import chapters
from analysis.page.render import render
from analysis.page.section import Section, remembered
from analysis.page.tables import printed_table
from analysis.runs import load_runs
from analysis.teachers import teachers_section
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
    Chapter("Accuracy", chapters.overview),
    Chapter("Accuracy and cost", partial(costs.costs_section, rounds=0)),
    Chapter("Accuracy and cost", costs.costs_section, "costs.json", ("measure_speed",)),
    Chapter("Latency", latency.latency_section),
    Chapter("Learning curves", chapters.curves),
    Chapter("Data size", sizes.sizes_section),
    Chapter("Tuning", tuning.tuning_section),
    Chapter("Pretrained weights", chapters.transfer),
    Chapter("Teachers", teachers_section),
    Chapter("Confusion", chapters.classes),
    Chapter("Pairs of models", chapters.pairs_of_models),
    Chapter("Heat maps", gradcam.heat_maps, "gradcam.json", ("gradcam_images",)),
    Chapter("Ensembles", ensembles.ensembles_section),
    Chapter("Averaging", ensembles.averages_section, "averages.json", ("average_weights",)),
    Chapter("Robustness", _robustness, "robustness.json", ("robustness_images", "baseline")),
    Chapter("Inside the networks", _inside, "inspect.json", ("look_inside",)),
    Chapter("Calibration", calibration_section),
    Chapter("Compression", compression_section),
    Chapter("Label errors", labels.labels_section),
    Chapter("Data", chapters.data),
    Chapter("Reproduce", chapters.reproduce),
)


FIRST_FOLD = (
    "Of the cross-validation, only the models of fold 0 are run, on no other photos than fold 0 "
    "tests: photos that they were not trained on."
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
    reviewed: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Writes WORKDIR/report: tables, pictures and the self-contained index.html.

    `options` is `config.compare`, None for that of the experiment. Chapters that run the models
    are made if `models`; `progress` gets a line before each, and where it raises, a page is left.
    With `reviewed`, everything but those is of the labels as a review corrected them, and goes into
    WORKDIR/reviewed.
    """
    runs = load_runs(workdir)
    if not runs:
        raise UserError(f"{workdir} holds no runs: expected {workdir}/<model>/seed<k>/config.json")
    if reviewed:
        runs, models = labels.with_review(workdir, runs), False
    comparison = compare(workdir, runs, options, data_path)
    if reviewed:
        said = comparison.recommendation
        warnings = ("The labels are those of a review: labels/review.csv.", *said.warnings)
        said = replace(said, warnings=warnings)
        comparison = replace(comparison, folder="reviewed", recommendation=said)
    page, sections = comparison.output / "index.html", {chapter.title: None for chapter in CHAPTERS}
    try:
        with locked(output_folder(comparison.output, "report") / ".lock", wait=True):
            write_tables(comparison)
            for slow in (False, True)[: 1 + models]:  # a page before what may take minutes
                for chapter in CHAPTERS:
                    about_labels = chapter.make is labels.labels_section
                    if bool(chapter.file) == slow and not (reviewed and about_labels):
                        made = make_section(chapter, comparison, progress)
                        sections[chapter.title] = made or sections[chapter.title]
                parts = [replace(part, title=title) for title, part in sections.items() if part]
                text = render(comparison, parts)
                page.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"cannot write the report to {comparison.output}: {error}") from error
    lines = []
    if comparison.groups:
        printed = printed_table(comparison.table, comparison.baseline)
        lines += [printed.to_string(index=False), tuning.note(comparison), ""]
    lines.append(str(comparison.recommendation))
    lines += [w for section in sections.values() if section for w in section.warnings]
    lines += [f"not complete: {name}: {reason}" for name, reason in comparison.reasons.items()]
    return Report("\n".join(lines), page, comparison.reasons)


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
    path, folds = comparison.output / chapter.file, comparison.folds
    comparison = replace(comparison, groups=first_folds(comparison.groups))
    try:
        make = partial(chapter.make, comparison)
        section = remembered(path, comparison.runs, options, make)
        return replace(section, text=[*section.text, FIRST_FOLD]) if folds else section
    except UserError as error:
        return Section(finding=f"Not made: {error}")
    except Exception as error:  # noqa: BLE001 - the rest of the page is worth having
        traceback.print_exc()
        return Section(finding=f"Not made: {type(error).__name__}: {error}")


def main(argv: list[str]) -> int:
    """Writes the report of a workdir; returns 1 if a run in it is not complete."""
    (workdir,) = arguments(argv, "analysis.report WORKDIR [--data=PATH] [--nomodels] [--reviewed]")
    report = write_report(
        Path(workdir).expanduser(),
        data_path=DATA.value,
        models=MODELS.value,
        reviewed=REVIEWED.value,
        progress=partial(print, flush=True),
    )
    print(f"{report.text}\n\nreport: {report.page}")
    return 1 if report.not_complete else 0


if __name__ == "__main__":
    DATA = flags.DEFINE_string("data", "", "Where the data lies now, if it was moved")
    MODELS = flags.DEFINE_bool("models", True, "Make the chapters that run the models")
    REVIEWED = flags.DEFINE_bool("reviewed", False, "Use the labels as reviewed")
    run_command(main)
