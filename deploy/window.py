"""What the monitor compares: a window of a log, and the model's answers to validation images."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import pandas as pd

from analysis.answer_log import AnswerLog
from analysis.confidence import softmax
from analysis.forward import cache_dir_of, load_images
from analysis.predict import Predictor
from analysis.review import table_rows
from analysis.runs import FinishedRun
from deploy.drift import LEAST, Sample, Test, compare_samples
from errors import UserError

BATCH = 128  # images at once
NAMED = 10  # mistakes in one message


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
    window: Window
    reference: Sample
    lack: str  # of the reference: "" or what could not be had
    tests: list[Test]
    rate: float  # of false alarms


def examine(
    run: FinishedRun, predictor: Predictor, window: Window, rate: float, data_path: str = ""
) -> Finding:
    """Compares a window with the model's answers to the validation images of its run."""
    reference, lack = reference_of(run, predictor, data_path)
    tests = compare_samples(reference, window.sample, rate)
    return Finding(run, predictor.version, window, reference, lack, tests, rate)


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

    They are kept in the cache, so that the next call needs no images.
    """
    labels, fingerprint = run.validation["labels"], run.dataset["fingerprint"][:16]
    file = Path(cache_dir_of(run), "answers", f"{predictor.version}-{fingerprint}.npz")
    answers, lack = _kept(file, len(labels)), ""
    if answers is None:
        try:
            images = load_images(run, "validation", data_path)
            batches = np.array_split(images, -(-len(images) // BATCH))
            parts = [predictor.answer(batch) for batch in batches]
            answers = {k: np.concatenate([p[k] for p in parts]) for k in ("logits", "features")}
            _keep(file, answers)
        except UserError as error:
            answers = {"logits": run.validation["logits"], "features": None}
            lack = f"Without the validation images, features cannot be compared ({error})."
            if predictor.model is None:
                lack += f" The reference is what {run.name} says, not its compiled form."
    logits = answers["logits"]
    probabilities, classes = softmax(logits, predictor.facts["temperature"]), logits.argmax(axis=1)
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


def read_corrections(path: Path, log: AnswerLog, classes: list[str]) -> list[tuple[str, str]]:
    """Returns pairs of hash and class of a table; rows without a label are left out.

    Raises UserError that names each unknown image and class by its line.
    """
    rows = table_rows(path, {"image", "label"}, "a table with the columns image and label")
    rows = [(line, cells["image"], cells["label"]) for line, cells in rows if cells["label"]]
    known = log.known([name for _, name, _ in rows])
    by_name = {**known.groupby("name").image.agg(set), **{i: {i} for i in known.image}}
    pairs, mistakes = {}, []
    for line, name, label in rows:
        images = by_name.get(name, set())
        image = min(images, default="")
        problem = ""
        if label not in classes:
            problem = f"class {label!r} is not one of {', '.join(classes[:20])}"
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


def write_to_label(window: Window, folder: Path) -> Path:
    """Writes to_label.csv: the images without correction, least sure first."""
    table = window.table[window.table.correction == ""].sort_values("confidence", kind="stable")
    table = table.assign(label="", time=table.time.map(when), predicted=table.pop("label"))
    columns = ["image", "name", "time", "predicted", "confidence", "label"]
    try:
        table[columns].round({"confidence": 4}).to_csv(folder / "to_label.csv", index=False)
    except OSError as error:
        raise UserError(f"cannot write to --export={folder}: {error.strerror}") from error
    return folder / "to_label.csv"
