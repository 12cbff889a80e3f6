"""What does a trained model say of new photos, and which of its answers should a person look at?

    python -m analysis.predict MODEL PHOTOS... --output=predictions.csv

MODEL is the directory of a complete run, or the weights that `python -m deploy.export` wrote; for
ONNX and StableHLO, deploy.serve answers. PHOTOS are image files, folders, or quoted patterns such
as 'photos/**/*.jpg'. Confidences are probabilities
after temperature scaling; an answer is to be reviewed if its confidence is below the one that
promises --target_accuracy, by the run's validation images. `set95` names the classes, likeliest
first, that hold the true one with 95 % probability; a ; parts them, and " stands around a name that
has one. Photos unlike the training images may get confident wrong answers and wrong sets:
`--log=FILE.sqlite` keeps every answer (no image) for `python -m deploy.monitor`, which notices.
Exit codes: 0 every image was read, 1 some could not be, 2 a mistake.
"""

import csv
import glob
import hashlib
import io
import json
import math
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from operator import itemgetter
from pathlib import Path
from typing import TextIO

import numpy as np
from absl import flags

from analysis.answer_log import Answer, AnswerLog
from analysis.answers import answering
from analysis.confidence import least_probability, sets_of_classes, softmax
from analysis.evaluate import sets_fitted_to, temperature_of, threshold_of
from analysis.runs import FinishedRun, load_run
from data.decoding import MAX_PIXELS, resize, to_rgb
from data.sources import SUFFIXES
from errors import UserError
from experiment.command import arguments, run_command
from experiment.files import plain
from models import Classifier
from models.weights.own import read_own
from training.weights import classifier_from, find_weights

WEIGHTS, CARD = "model.safetensors", "README.md"  # what an export writes
PROGRAMS = (".onnx", ".stablehlo")
TARGETS = (0.9, 0.95, 0.99)  # accuracies that an export knows review thresholds for
RANKS = (("class", "confidence"), ("second", "second_confidence"), ("third", "third_confidence"))
SET_LEVEL = 0.95
COLUMNS = ("path", *(name for pair in RANKS for name in pair), "set95", "review", "error")


@dataclass(frozen=True)
class Predictor:
    """A trained classifier, and what is known of its input and output."""

    # Of `training.weights.save_weights`, and `temperature`, `review_thresholds` and `sets`; exports
    # made before there were sets have none.
    facts: dict
    file: Path  # it was read from
    answer: Callable[[np.ndarray], dict[str, np.ndarray]]  # as `answers.answering` returns it
    model: Classifier | None = None  # None where only a compiled form of it is known

    @cached_property
    def version(self) -> str:
        """16 hexadecimal digits that change with the weights or with what makes answers of logits.

        They begin the SHA-256 digest of the file, the temperature and the sets.
        """
        with open(self.file, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        fitted = [self.facts.get(key) for key in ("temperature", "sets")]
        digest.update(json.dumps(fitted, sort_keys=True).encode())
        return digest.hexdigest()[:16]

    def threshold(self, target: float) -> float:
        """Returns the confidence below which to review answers, for this accuracy of the others."""
        known = {entry["target"]: entry["confidence"] for entry in self.facts["review_thresholds"]}
        if target not in known:
            raise UserError(
                f"target accuracy {target}: this export knows thresholds for "
                f"{', '.join(map(str, known))}; choose one of them, or give the run directory"
            )
        return math.inf if known[target] is None else known[target]

    def sets(self, logits: np.ndarray) -> np.ndarray | None:
        """Returns which classes are in each image's `set95`, bool [N, K]; None without promise."""
        fitted = self.facts.get("sets")
        return sets_of_classes(logits, fitted, SET_LEVEL) if fitted else None

    def not_promised(self, target: float) -> str:
        """Returns in words which of threshold and sets these validation images cannot give."""
        text = ""
        if self.threshold(target) == math.inf:
            text = f"no confidence promises an accuracy of {target}, so every image is to review; "
        if "sets" not in self.facts:
            text += "this export is older than sets of classes, so set95 is empty; "
        elif least_probability(self.facts["sets"], SET_LEVEL) is None:
            text += f"{self.facts['sets']['images']} validation images are too few for sets of "
            text += "classes, so set95 is empty; "
        return text.removesuffix("; ")


def load_predictor(path: Path, target_accuracy: float = 0.95) -> Predictor:
    """Returns the classifier of a run directory, or of an exported folder or its weights."""
    file = path / WEIGHTS if path.is_dir() else path
    programs = [file] if path.is_file() else sorted(path.glob("model.*"))
    programs = [program for program in programs if program.suffix in PROGRAMS]
    if programs and (path.is_file() or not file.exists()):
        raise UserError(
            f"{programs[0]} is a compiled model, which deploy.serve answers for: give the "
            "directory of its run, or export that with --format=safetensors"
        )
    if path.is_file() and path.suffix != ".safetensors":
        raise UserError(
            f"{path} is no file of weights: give the directory of a run, or what deploy.export "
            f"wrote for it, {WEIGHTS}"
        )
    if not file.is_file():
        if (path / CARD).exists():
            raise UserError(f"{file} is missing: copy the folder again, or export the run again")
        return predictor_of(load_run(path), (target_accuracy,))
    predictor = _read(file)
    predictor.threshold(target_accuracy)
    return predictor


def predictor_of(run: FinishedRun, targets: Sequence[float] = TARGETS) -> Predictor:
    """Returns the classifier of a complete run, with review thresholds for these accuracies."""
    temperature = temperature_of(run)
    thresholds = [threshold_of(run, temperature, goal) for goal in targets]
    fitted = {"temperature": temperature, "review_thresholds": thresholds}
    return _read(find_weights(run.path), plain(fitted | {"sets": sets_fitted_to(run)}))


def _read(file: Path, fitted: dict | None = None) -> Predictor:
    facts = read_own(file) | (fitted or {})
    if "review_thresholds" not in facts:
        raise UserError(
            f"{file} has no temperature and no review thresholds: give the directory of the run, "
            "or export the run again"
        )
    del facts["arrays"]
    model = classifier_from(file, facts)
    return Predictor(facts, file, answering(model), model)


def find_images(photos: Iterable[str], recursive: bool = True) -> list[str]:
    """Returns the paths of images that files, folders and patterns name, each path once, in order.

    A named file counts whatever its ending, and even if it is hidden. What else lies in a folder
    is counted and named on standard error.
    """
    paths: dict[str, str] = {}  # by absolute path
    left_out: list[str] = []
    for argument in photos:
        path, images = os.path.expanduser(argument), []
        named = os.path.exists(path)
        matches = [path] if named else sorted(glob.glob(path, recursive=True))
        if not matches:
            what = "matches nothing" if glob.has_magic(path) else "does not exist"
            raise UserError(f"{argument} {what}: give images, folders of images, or a pattern")
        for match in matches:
            if os.path.isdir(match):
                images += _images_in(match, recursive, left_out)
            elif named or _is_image(match):
                images.append(match)
        if not images:
            endings = " ".join(sorted(SUFFIXES))
            raise UserError(f"{argument} holds no image, that is no file ending in {endings}")
        for image in images:
            paths.setdefault(os.path.abspath(image), image)
    if left_out:
        print(
            f"left out: {len(left_out)} files whose endings are of no image that can be read, such "
            f"as {left_out[0]}",
            file=sys.stderr,
        )
    return list(paths.values())


def _images_in(path: str, recursive: bool, left_out: list[str]) -> Iterator[str]:
    for folder, folders, files in os.walk(path, onerror=_refuse):
        folders[:] = sorted(name for name in folders if recursive and not name.startswith("."))
        for name in sorted(files):
            if _is_image(name):
                yield os.path.join(folder, name)
            elif not name.startswith("."):
                left_out.append(os.path.join(folder, name))


def _is_image(path: str) -> bool:
    name = os.path.basename(path)
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES


def _refuse(error: OSError) -> None:
    raise UserError(f"cannot list {error.filename}: {error.strerror}") from error


def predict(
    predictor: Predictor,
    paths: Sequence[str],
    target_accuracy: float = 0.95,
    batch_size: int = 64,
    log: AnswerLog | None = None,
) -> Iterator[dict[str, str | float]]:
    """Yields a row for each image file, in order, with the keys of COLUMNS and "" for no value.

    Answers are added to the log; where that fails, a line on standard error says so.
    """
    facts, threshold = predictor.facts, predictor.threshold(target_accuracy)
    size, side = max(1, min(batch_size, len(paths))), facts["image_size"]
    decode = partial(_decode, facts)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = pool.map(decode, paths[:size])
        for start in range(0, len(paths), size):
            decoded = list(waiting)
            # The next batch is read while this one is classified.
            waiting = pool.map(decode, paths[start + size : start + 2 * size])
            images = np.zeros((size, side, side, 3), np.uint8)
            for i, (image, _, _) in enumerate(decoded):
                images[i] = image
            logits, features = itemgetter("logits", "features")(predictor.answer(images))
            probabilities, sets = softmax(logits, facts["temperature"]), predictor.sets(logits)
            if log:
                _log(log, predictor, paths[start:], decoded, probabilities, features)
            for i, (path, (_, error, _)) in enumerate(zip(paths[start:], decoded, strict=False)):
                row = probabilities[i]
                sure = not error and row.max() >= threshold
                cells = {"path": path, "review": "no" if sure else "yes", "error": error}
                best = [] if error else np.argsort(-row, kind="stable")
                for (name, confidence), label in zip(RANKS, best, strict=False):
                    cells |= {name: facts["class_names"][label], confidence: float(row[label])}
                if sets is not None and not error:
                    names = [facts["class_names"][label] for label in best if sets[i, label]]
                    cells["set95"] = _joined(names)
                yield dict.fromkeys(COLUMNS, "") | cells


def _joined(names: list[str]) -> str:
    """Returns names as one line of CSV with semicolons: whatever a name holds, it can be read."""
    csv.writer(line := io.StringIO(), delimiter=";").writerow(names)
    return line.getvalue().removesuffix("\r\n")


def _log(
    log: AnswerLog,
    predictor: Predictor,
    paths: Sequence[str],
    decoded: list[tuple],
    probabilities: np.ndarray,
    features: np.ndarray,
) -> None:
    """Adds the answers for images that could be read; says on standard error where it fails."""
    facts, now, answers = predictor.facts, time.time(), []
    columns = zip(paths, decoded, probabilities, features, strict=False)
    for path, (_, error, digest), row, numbers in columns:
        if not error:
            label, model = facts["class_names"][row.argmax()], facts.get("run", facts["model"])
            answers.append(Answer(now, predictor.version, model, label, float(row.max()), numbers,
                                  digest, os.path.abspath(path), "predict"))  # fmt: skip
    if trouble := log.write(answers):
        print(f"{len(answers)} answers are not logged: {trouble}", file=sys.stderr)


def _decode(facts: dict, path: str) -> tuple[np.ndarray | int, str, str]:
    """Returns an image as evaluation sees it, "" and its file's digest; or 0, and why, and ""."""
    try:
        content = Path(path).read_bytes()
        return decode_image(facts, content), "", hashlib.sha256(content).hexdigest()
    except Exception as error:  # noqa: BLE001 - Pillow raises many types on broken files
        return 0, " ".join(str(error).split()) or type(error).__name__, ""


def decode_image(facts: dict, content: bytes) -> np.ndarray:
    """Returns an image file as evaluation sees it: uint8 [S, S, 3]; raises what Pillow raises."""
    data, side = facts["data"], facts["image_size"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata that changes no pixel
        limit = data.get("max_pixels", MAX_PIXELS)
        image, _ = to_rgb(content, tuple(data["background"]), limit, side)
    return np.asarray(resize(image, side, data["resize"], data["interpolation"]))


@contextmanager
def open_output(name: str) -> Iterator[TextIO]:
    """Opens a text file that appears, whole, when all went well; "-" or "" is standard output."""
    # Names of files may be bytes that are no text; they are written as they are.
    options = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    if name in ("", "-"):
        with open(1, "w", closefd=False, **options) as file:
            yield file
        return
    path = Path(name).expanduser().resolve()
    if path.exists() and not path.is_file():
        raise UserError(f"--output={name} is no file; give another name, or - for standard output")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", **options) as file:
            yield file
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write --output={name}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


def write_rows(file: TextIO, rows: Iterable[dict[str, str | float]]) -> Counter:
    """Writes rows as CSV; counts how many "images", to "review", and with an "error" there were."""
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    counts = Counter(images=0, review=0, error=0)
    for row in rows:
        writer.writerow({k: f"{v:.6f}" if isinstance(v, float) else v for k, v in row.items()})
        counts.update(images=1, review=row["review"] == "yes", error=row["error"] != "")
    return counts


def main(argv: list[str]) -> int:
    """Classifies image files into a table; returns 1 if one of them could not be read."""
    usage = "analysis.predict MODEL PHOTOS... [--output=FILE.csv] [--log=FILE.sqlite]"
    model, *photos = arguments(argv, usage, least=2, most=None)
    target, output = TARGET.value, OUTPUT.value
    try:
        with open_output(output) as file:
            predictor = load_predictor(Path(model).expanduser(), target)
            paths = find_images(photos, RECURSIVE.value)
            log = AnswerLog(LOG.value) if LOG.value else None
            counts = write_rows(file, predict(predictor, paths, target, BATCH_SIZE.value, log))
    except BrokenPipeError:  # whoever reads this, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    if reason := predictor.not_promised(target):
        print(reason, file=sys.stderr)
    if log:
        log.close()
        text = f"{log.written} answers of version {predictor.version} added"
        print(f"log: {LOG.value}: {text}", file=sys.stderr)
    print(
        f"{counts['images']} images, {counts['review']} to review, of which {counts['error']} "
        "could not be read" + (f": {output}" if output not in ("", "-") else ""),
        file=sys.stderr,
    )
    return 1 if counts["error"] else 0


if __name__ == "__main__":
    OUTPUT = flags.DEFINE_string("output", "-", "CSV file of the table; - is standard output")
    goal = "Accuracy promised, by the validation images, of the answers that nobody reviews"
    TARGET = flags.DEFINE_float("target_accuracy", 0.95, goal, lower_bound=0, upper_bound=1)
    BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images at once", lower_bound=1)
    LOG = flags.DEFINE_string("log", "", "SQLite file to add the answers to, for deploy.monitor")
    RECURSIVE = flags.DEFINE_bool("recursive", True, "Search folders in folders too")
    run_command(main)
