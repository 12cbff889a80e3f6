"""Did it help to learn from a teacher? The report's chapter of students and their teachers."""

from pathlib import Path

import numpy as np

from analysis.compare import Comparison
from analysis.page.section import Section, Table
from analysis.page.tables import NONE, percent, points
from analysis.runs import FinishedRun, load_run, values_of
from analysis.verdict import listed, plural
from errors import UserError
from experiment.fields import flatten
from models.weights.download import digest
from models.weights.own import WEIGHTS

OF_A_RUN = ("variant", "seed", "runtime.", "distill.", "data.train_seed", "data.fold")
LESSON = ["model", "teachers", "softened by", "weight", "teachers are asked", "teachers' test %",
          "teachers' validation %"]  # fmt: skip
EFFECT = ["with a teacher", "without", "difference", "95 % interval", "established"]
TEXT = (
    "A student's loss is (1 - weight) times that of its labels, and weight times temperature^2 "
    "times its distance from the mean probabilities of its teachers, all softened by the "
    "temperature (Hinton et al. 2015). Training seconds include the teachers' answers; "
    "parameters, multiply-adds and speed are the student's own. How a student differs from the "
    "same model without a teacher holds for these teachers: others may teach more, or less."
)


def teachers_section(comparison: Comparison) -> Section | None:
    """From whom students learned, and how they differ from the same model without a teacher.

    A teacher's accuracies are on its own images, and are known while its directory is there.
    """
    groups = comparison.groups
    students = {label: runs for label, runs in groups.items() if runs[0].summary.get("distill")}
    if not students:
        return None
    lessons, effects, warnings, gains = [], [], [], []
    for label, runs in students.items():
        named = _teachers(runs)
        known = {name: run for name, run in map(_run_of, named, named.values()) if run}
        judged = [_validated(run) for run in known.values()]
        lessons.append([
            *_lesson(label, runs, named),
            listed(percent(run.correct.mean()) for run in known.values()) or NONE,
            listed(map(percent, judged)) or NONE,
        ])  # fmt: skip
        without = _without(runs[0], comparison)
        pair = _pair(comparison, label, without)
        effects.append([label, without or NONE, *(pair or [NONE] * 3)])
        if pair:
            apart = "" if pair[2] == "yes" else ", not established"
            gains.append(f"{label} {pair[0]} points ({pair[1]}{apart})")
        own = np.mean([_validated(run) for run in groups[without]]) if without else 0
        if judged and len(known) == len(named) and max(judged) < own:
            warnings.append(
                f"{label}: its teacher is weaker on validation images than the same model without "
                f"a teacher ({percent(max(judged))} against {percent(own)} %): it has little to "
                "teach."
            )
    caption = f"Accuracies are of the teachers, on their own images; {NONE}: no longer there."
    of_pairs = "In percentage points, on the same test images; intervals as for all pairs."
    finding = f"{plural(len(students), 'model')} learned from finished runs"
    finding += f"; with minus without: {listed(gains)}." if gains else "."
    tables = [Table(EFFECT, effects, of_pairs), Table(LESSON, lessons, caption)]
    return Section(text=[TEXT], tables=tables, warnings=warnings, finding=finding)


def _lesson(label: str, runs: list[FinishedRun], named: dict[str, dict]) -> list[str]:
    told = runs[0].summary["distill"]
    stored = all(phase.get("stored_logits") for phase in runs[0].summary["phases"])
    numbers = (f"{told[name]:g}" for name in ("temperature", "weight"))
    return [label, listed(named), *numbers, "once an image and view" if stored else "at each step"]


def _teachers(runs: list[FinishedRun]) -> dict[str, dict]:
    """Returns the teachers of a model, by name and digest, each once."""
    summaries = [single.summary for run in runs for single in run.folds or (run,)]
    every = [teacher for summary in summaries for teacher in summary["distill"]["teachers"]]
    return {f"{teacher['run']} ({teacher['digest'][:8]})": teacher for teacher in every}


def _run_of(name: str, teacher: dict) -> tuple[str, FinishedRun | None]:
    """Returns the name, and the run that taught; None if it is gone, or has other weights now."""
    path = Path(teacher.get("path", ""))
    try:
        if digest(path / WEIGHTS, "sha256") != teacher["digest"]:
            return name, None
        run = load_run(path)
        _ = run.test, run.validation
        return name, run
    except (OSError, UserError):
        return name, None


def _validated(run: FinishedRun) -> float:
    """Returns the accuracy on validation images."""
    return float(values_of([run], "accuracy", "validation").mean())


def _but_for_teachers(run: FinishedRun) -> dict:
    fields = flatten(run.config)
    return {k: v for k, v in fields.items() if not k.startswith(OF_A_RUN) and ".distill." not in k}


def _without(student: FinishedRun, comparison: Comparison) -> str | None:
    """Returns the label of the same model without a teacher, None if there is none."""
    for label, (run, *_) in comparison.groups.items():
        alike = _but_for_teachers(run) == _but_for_teachers(student)
        if alike and not run.summary.get("distill"):
            return label
    return None


def _pair(comparison: Comparison, first: str, second: str | None) -> list[str] | None:
    """Returns the difference of two models, its interval, and whether it is established."""
    for pair in comparison.pairs.itertuples():
        if {pair.first, pair.second} == {first, second}:
            sign = 1 if pair.first == first else -1
            low, high = sorted([sign * pair.ci95_low, sign * pair.ci95_high])
            interval = f"{points(low)} to {points(high)}"
            return [points(sign * pair.difference), interval, "yes" if pair.established else "no"]
    return None
