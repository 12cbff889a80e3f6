"""What does a trained model say of new photos, and which of its answers should a person look at?

    python -m analysis.predict RUN_DIR PHOTOS... --output=predictions.csv

RUN_DIR is the directory of a complete run, or a folder that `python -m analysis.export` wrote.
PHOTOS are image files, folders, or quoted patterns such as 'photos/**/*.jpg'. The table has a row
an image: the three likeliest classes with their confidences, whether to review the answer, and what
is wrong with a file that cannot be read. Confidences are probabilities after temperature scaling,
fitted on the run's validation images alone; an answer is to be reviewed if its confidence is below
the one that gave --target_accuracy on those images. Photos unlike the training images may get
confident wrong answers.

Exit codes: 0 every image was read, 1 some could not be, 2 a mistake in the command.
"""

import csv
import glob
import os
import sys
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TextIO

import jax.numpy as jnp
import numpy as np
from absl import flags

from analysis import export
from analysis.evaluate import softmax
from analysis.forward import compiled
from analysis.runs import load_run
from data.decoding import resize, to_rgb
from data.sources import SUFFIXES
from errors import UserError
from experiment.command import run_command

RANKS = (("class", "confidence"), ("second", "second_confidence"), ("third", "third_confidence"))
COLUMNS = ("path", *(name for pair in RANKS for name in pair), "review", "error")

# --- which model, which files ---------------------------------------------------------------------


def load_predictor(path: Path, target_accuracy: float = 0.95) -> export.Exported:
    """Returns the classifier of a run directory or of an exported folder.

    Args:
      path: the directory.
      target_accuracy: for which it will have a review threshold.

    Raises:
      UserError: it is neither, it is damaged, or it was exported without that threshold.
    """
    if any((path / name).exists() for name in (export.MODEL, export.WEIGHTS)):
        predictor = export.load(path)
        predictor.threshold(target_accuracy)
        return predictor
    return export.from_run(load_run(path), (target_accuracy,))


def find_images(arguments: Iterable[str], recursive: bool = True) -> list[str]:
    """Returns the paths of images that arguments name, each file once, in their order.

    Args:
      arguments: files, which are taken whatever their ending; folders, of which every file with the
        ending of an image is taken; patterns with *, ?, [...] and ** for any folders.
      recursive: whether folders in folders are searched. Hidden files and folders are not.

    Raises:
      UserError: an argument does not exist, matches nothing or holds no image.
    """
    found: dict[str, str] = {}
    for argument in arguments:
        path = os.path.expanduser(argument)
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not matches:
            what = "matches nothing" if glob.has_magic(path) else "does not exist"
            raise UserError(f"{argument} {what}: give images, folders of images, or a pattern")
        count = 0
        for match in matches:
            for file in _images_at(match, recursive, named=match == path):
                found.setdefault(os.path.realpath(file), file)
                count += 1
        if not count:
            endings = " ".join(sorted(SUFFIXES))
            raise UserError(f"{argument} holds no image, that is no file ending in {endings}")
    return list(found.values())


def _images_at(path: str, recursive: bool, named: bool) -> Iterator[str]:
    if not os.path.isdir(path):
        if named or _is_image(path):
            yield path
        return
    for folder, folders, files in os.walk(path, onerror=_refuse):
        folders[:] = sorted(name for name in folders if recursive and not name.startswith("."))
        yield from (os.path.join(folder, name) for name in sorted(files) if _is_image(name))


def _is_image(path: str) -> bool:
    name = os.path.basename(path)
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES


def _refuse(error: OSError) -> None:
    raise UserError(f"cannot list {error.filename}: {error.strerror}") from error


# --- predictions ----------------------------------------------------------------------------------


def predict(
    predictor: export.Exported,
    paths: Sequence[str],
    target_accuracy: float = 0.95,
    batch_size: int = 64,
) -> Iterator[dict[str, str | float]]:
    """Yields a row for each image file, in order, with the keys of COLUMNS.

    Two batches are in memory at a time: one is read by threads while the other is classified.
    Confidences are probabilities in 0..1; cells without a value are "".

    Args:
      predictor: as `load_predictor` returns it.
      paths: of image files; one that cannot be read gets a row with its `error`.
      target_accuracy: answers below its review threshold have `review` "yes".
      batch_size: images classified at once.
    """
    threshold = predictor.threshold(target_accuracy).confidence
    program = compiled(predictor.model, lambda model, images: model(model.preprocess(images)))
    size = min(batch_size, len(paths))
    place = 0
    for decoded in _decoded_batches(predictor, paths, size):
        images = np.zeros((size, predictor.image_size, predictor.image_size, 3), np.uint8)
        for i, result in enumerate(decoded):
            if not isinstance(result, str):
                images[i] = result
        probabilities = softmax(np.asarray(program(jnp.asarray(images))), predictor.temperature)
        for result, row in zip(decoded, probabilities, strict=False):
            cells = (
                {"review": "yes", "error": result}
                if isinstance(result, str)
                else _answer(row, predictor.class_names, threshold)
            )
            yield dict.fromkeys(COLUMNS, "") | {"path": paths[place]} | cells
            place += 1


def _answer(row: np.ndarray, class_names: list[str], threshold: float) -> dict[str, str | float]:
    """Returns the cells of an image with these probabilities [K]."""
    cells: dict[str, str | float] = {}
    best = np.argsort(-row, kind="stable")
    for (name, confidence), label in zip(RANKS, best, strict=False):
        cells |= {name: class_names[label], confidence: float(row[label])}
    return cells | {"review": "no" if row[best[0]] >= threshold else "yes"}


def _decoded_batches(
    predictor: export.Exported, paths: Sequence[str], size: int
) -> Iterator[list[np.ndarray | str]]:
    """Yields lists of images uint8 [S, S, 3], or of what is wrong with them, one list ahead."""
    read = partial(_decode, predictor)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting: deque = deque()
        for start in range(0, len(paths), size or 1):
            waiting.append(pool.map(read, paths[start : start + size]))
            if len(waiting) == 2:
                yield list(waiting.popleft())
        if waiting:
            yield list(waiting.popleft())


def _decode(predictor: export.Exported, path: str) -> np.ndarray | str:
    """Returns an image as training would see it, without augmentation, or why there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata that changes no pixel
            image, _ = to_rgb(Path(path).read_bytes(), predictor.background)
        size, how, interpolation = predictor.image_size, predictor.resize, predictor.interpolation
        return np.asarray(resize(image, size, how, interpolation))
    except Exception as error:  # noqa: BLE001 - Pillow raises many types on broken files
        return " ".join(str(error).split()) or type(error).__name__


# --- the table ------------------------------------------------------------------------------------


@contextmanager
def open_output(name: str) -> Iterator[TextIO]:
    """Opens a text file that appears, whole, when all went well; "-" or "" is standard output.

    Raises:
      UserError: the file cannot be written.
    """
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
    """Writes rows as CSV under the names of their columns; confidences get six digits.

    Returns:
      How many were written ("images"), are to be reviewed ("review"), and had an "error".
    """
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    counts = Counter(images=0, review=0, error=0)
    for row in rows:
        writer.writerow({k: f"{v:.6f}" if isinstance(v, float) else v for k, v in row.items()})
        counts.update(images=1, review=row["review"] == "yes", error=row["error"] != "")
    return counts


def main(argv: list[str]) -> int:
    """Classifies image files into a table; returns 1 if one of them could not be read."""
    if len(argv) < 3:
        raise UserError("usage: python -m analysis.predict RUN_DIR PHOTOS... [--output=FILE.csv]")
    target, output = TARGET.value, OUTPUT.value
    try:
        with open_output(output) as file:
            predictor = load_predictor(Path(argv[1]).expanduser(), target)
            paths = find_images(argv[2:], RECURSIVE.value)
            counts = write_rows(file, predict(predictor, paths, target, BATCH_SIZE.value))
    except BrokenPipeError:  # whoever reads this, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    print(
        f"{counts['images']} images, {counts['review']} to review, of which {counts['error']} "
        "could not be read" + (f": {output}" if output not in ("", "-") else ""),
        file=sys.stderr,
    )
    return 1 if counts["error"] else 0


if __name__ == "__main__":
    OUTPUT = flags.DEFINE_string("output", "-", "CSV file of the table; - is standard output")
    TARGET = flags.DEFINE_float(
        "target_accuracy",
        0.95,
        "Accuracy wanted of answers that nobody reviews; it decides the least confidence, by the "
        "validation images",
        lower_bound=0.0,
        upper_bound=1.0,
    )
    BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images at once", lower_bound=1)
    RECURSIVE = flags.DEFINE_bool("recursive", True, "Search folders in folders too")
    run_command(main)
