"""What the monitor compares: a window of a log, and the model's answers to validation images."""

import difflib
import unicodedata
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import pandas as pd

from analysis.answer_log import AnswerLog
from analysis.confidence import softmax
from analysis.evaluate import temperature_of
from analysis.forward import cache_dir_of, load_images
from analysis.predict import Predictor, predictor_of
from analysis.review import table_rows
from analysis.runs import FinishedRun
from deploy.drift import LEAST, LEAST_CORRECTED, Sample, Test, compare_samples
from errors import UserError

BATCH = 128  # images at once
NAMED = 10  # mistakes in one message
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet would run what begins so


@dataclass(frozen=True)
class Window:
    """Answers of one version of a model, each image once, oldest first; features are set apart."""

    table: pd.DataFrame  # time, label, confidence, image, name, source, correction
    sample: Sample
    repeated: int  # answers to an image that has a later one
    versions: pd.DataFrame  # all that answered in this time: see `AnswerLog.versions`


@dataclass(frozen=True)
class Finding:
    """A window beside the validation images, and what the tests say."""

    run: FinishedRun
    version: str  # of the model
    file: Path  # of the model
    window: Window
    reference: Sample
    lack: str  # of the reference: "" or what could not be had
    tests: list[Test]
    rate: float  # of false alarms

    @property
    def untested(self) -> dict[str, str]:
        """Tests that could not be made, and why."""
        corrected = np.isfinite(self.window.sample.correct).sum()
        few = f"{corrected} corrected images, {LEAST_CORRECTED} are needed"
        reasons = {"features": self.lack, "accuracy": few}
        made = {test.name for test in self.tests}
        return {name: why for name, why in reasons.items() if name not in made}


def examine(
    run: FinishedRun, predictor: Predictor, window: Window, rate: float, data_path: str = ""
) -> Finding:
    """Compares a window with the model's answers to the validation images of its run.

    Raises UserError where `data_path` is given and does not hold these images.
    """
    reference, lack = reference_of(run, predictor, data_path)
    tests = compare_samples(reference, window.sample, rate)
    return Finding(run, predictor.version, predictor.file, window, reference, lack, tests, rate)


def check_origin(predictor: Predictor, run: FinishedRun) -> None:
    """Raises a UserError if a model is not that of a run, nor an export of it."""
    own, facts = predictor_of(run), predictor.facts
    if facts.get("run_version", predictor.version) == own.version:
        return
    # Fitted on another processor, numbers may differ in their last digits.
    numbers, others = _fitted(own.facts), _fitted(facts)
    alike = len(numbers) == len(others) and np.allclose(numbers, others, 1e-6, 0)
    if facts["class_names"] != run.class_names or facts.get("run") != run.name or not alike:
        raise UserError(
            f"{predictor.file} is not of {run.path}: as RUN, give the run that it was exported from"
        )


def _fitted(facts: dict) -> list[float]:
    thresholds = [entry["confidence"] for entry in facts["review_thresholds"]]
    return [facts["temperature"], *(np.inf if t is None else t for t in thresholds)]


def read_window(
    log: AnswerLog, predictor: Predictor, since: float = 0, until: float = np.inf, last: int = 0
) -> Window:
    """Returns the window of a log that is of this model; raises UserError where it is too small."""
    versions, version = log.versions(since, until), predictor.version
    answers = log.read(version, since, until, last)
    table = answers.drop_duplicates("image", keep="last").reset_index(drop=True)
    if len(table) < LEAST:
        found = [f"{v.version} ({v.model}, {v.answers:,} answers)" for v in versions.itertuples()]
        raise UserError(
            f"{log.path} holds {len(table)} images that version {version} of {predictor.file} "
            f"answered in this time, and {LEAST} are needed; its versions: "
            f"{', '.join(found) or 'none'}. Choose another time, or the model with --model"
        )
    if last:  # what else answered since its first one
        versions = log.versions(table.time.min(), until)
        versions.loc[versions.version == version, "answers"] = len(answers)
    names = predictor.facts["class_names"]
    classes = pd.Index(names).get_indexer(table.label)
    if (classes < 0).any():
        raise UserError(f"{log.path} holds a class {table.label[classes < 0].iloc[0]!r} not of RUN")
    correct = np.where(table.correction == "", np.nan, table.correction == table.label)
    features = np.stack(table.pop("features"))
    sample = Sample(classes, table.confidence.to_numpy(), features, correct)
    return Window(table, sample, len(answers) - len(table), versions)


def reference_of(run: FinishedRun, predictor: Predictor, data_path: str = "") -> tuple[Sample, str]:
    """Returns the model's answers to the run's validation images, and "" or what they lack.

    They are kept in the cache, so that the next call needs no images. Without images and it, they
    are what the run said; but where `data_path` is given, that is a UserError.
    """
    labels, fingerprint = run.validation["labels"], run.dataset["fingerprint"][:16]
    file = Path(cache_dir_of(run), "answers", f"{predictor.version}-{fingerprint}.npz")
    answers, lack, temperature = _kept(file, len(labels)), "", predictor.facts["temperature"]
    is_path = run.config["data"]["source"] in ("folder", "npz")
    if data_path and is_path and not Path(data_path).expanduser().exists():
        raise UserError(
            f"--data={data_path} does not exist: say where the images of {run.path} lie"
        )
    if answers is None:
        try:
            images = load_images(run, "validation", data_path)
            batches = np.array_split(images, -(-len(images) // BATCH))
            parts = [predictor.answer(batch) for batch in batches]
            answers = {k: np.concatenate([p[k] for p in parts]) for k in ("logits", "features")}
            _keep(file, answers)
        except UserError as error:
            if data_path:
                raise UserError(f"--data={data_path} cannot be used: {error}") from error
            temperature = temperature_of(run)
            answers = {"logits": run.validation["logits"], "features": None}
            lack = f"Without the validation images, features cannot be compared ({error})."
            if predictor.model is None:
                lack += f" The reference is what {run.name} says, not its compiled form."
    logits = answers["logits"]
    probabilities, classes = softmax(logits, temperature), logits.argmax(axis=1)
    correct = (classes == labels).astype(float)
    return Sample(classes, probabilities.max(axis=1), answers["features"], correct), lack


def _kept(file: Path, count: int) -> dict | None:
    try:
        with np.load(file, allow_pickle=False) as content:
            answers = {key: content[key] for key in ("logits", "features")}
    except (OSError, ValueError, KeyError, BadZipFile):
        return None
    return answers if len(answers["logits"]) == count else None


def _keep(file: Path, answers: dict) -> None:
    """Keeps answers if there is a place for them; the next call works without."""
    half = file.with_suffix(".part.npz")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(half, **answers)
        half.replace(file)
    except OSError:
        half.unlink(missing_ok=True)


def when(seconds: float) -> str:
    """Returns a time as a reader wants it, UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def iso(seconds: float) -> str:
    """Returns a time as programs read it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def read_corrections(path: Path, log: AnswerLog, classes: list[str]) -> list[tuple[str, str]]:
    """Returns pairs of hash and class of a table; rows without a label are left out.

    Classes may differ in capitals, if that leaves one. Raises UserError that names each unknown
    image and class by its line.
    """
    rows = table_rows(path, {"image", "label"}, "a table with the columns image and label")
    rows = [(line, cells["image"], cells["label"]) for line, cells in rows if cells["label"]]
    known = log.known([text for _, name, _ in rows for text in (name, name.removeprefix("'"))])
    by_name = {**known.groupby("name").image.agg(set), **{i: {i} for i in known.image}}
    pairs, mistakes = {}, []
    for line, name, label in rows:
        name = name if name in by_name else name.removeprefix("'")
        label, near = _class_named(label, classes)
        images = by_name.get(name, set())
        image = min(images, default="")
        problem = ""
        if label not in classes:
            problem = f"class {label!r} is not one of {', '.join(classes[:20])}{near}"
        elif len(images) != 1:
            many = f"{len(images)} images are called {name!r}: give the hash"
            problem = many if images else f"no image {name!r} in {log.path}"
        elif pairs.setdefault(image, label) != label:
            problem = f"{name} is {pairs[image]} in an earlier line, and {label} here"
        mistakes += [f"line {line}: {problem}"] if problem else []
    if mistakes:
        more = [f"and {len(mistakes) - NAMED} more"] * (len(mistakes) > NAMED)
        raise UserError("\n  ".join([f"{path}: no correction is taken", *mistakes[:NAMED], *more]))
    return list(pairs.items())


def _class_named(label: str, classes: list[str]) -> tuple[str, str]:
    """Returns the class that a person means, or the label as it is; and a question, or ""."""
    plain: dict[str, list[str]] = {}
    for name in classes:
        plain.setdefault(_plain(name), []).append(name)
    meant = plain.get(_plain(label), [])
    if label in classes or len(meant) == 1:
        return label if label in classes else meant[0], ""
    close = meant or [plain[n][0] for n in difflib.get_close_matches(_plain(label), plain, 1)]
    return label, f": did you mean {' or '.join(map(repr, close))}?" if close else ""


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def write_to_label(window: Window, folder: Path) -> Path:
    """Writes to_label.csv: the images without correction, least sure first.

    A name that a spreadsheet would take for a formula gets a ' in front.
    """
    table = window.table[window.table.correction == ""].sort_values("confidence", kind="stable")
    table = table.assign(label="", time=table.time.map(when), predicted=table.pop("label"))
    table["name"] = [f"'{n}" if n.startswith(FORMULA) else n for n in table.name]
    columns = ["image", "name", "source", "time", "predicted", "confidence", "label"]
    try:
        table[columns].round({"confidence": 4}).to_csv(folder / "to_label.csv", index=False)
    except OSError as error:
        raise UserError(f"cannot write to --export={folder}: {error.strerror}") from error
    return folder / "to_label.csv"
