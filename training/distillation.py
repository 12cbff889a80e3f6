"""Distillation (Hinton et al. 2015): a student learns from what finished runs answer.

A teacher sees the very pixels that the student sees, augmented and mixed alike (Beyer et al. 2022),
with its own preprocessing. Where the student sees the same pixels again, its logits are computed
once and kept beside stored features; else it runs within the step. The loss is in `steps.py`.
"""

import functools
import hashlib
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from data.augmentation import crops
from data.identity import read_table
from errors import UserError
from experiment.checks import TAUGHT, check_taught, check_teachers, teachers_of
from experiment.fields import flatten
from experiment.files import read_json, write_json
from input_pipeline import Dataset
from models import MODELS, Classifier
from models.classifier import merge_model, split_model
from models.weights.own import read_own
from training.programs import Outline
from training.record import RunRecord
from training.steps import forward
from training.stored_features import StoredOutputs, logits_megabytes, stored_views
from training.weights import classifier_from, find_weights


@dataclass(frozen=True)
class Teacher:
    """A finished run that teaches."""

    path: Path
    file: Path
    digest: str  # SHA-256 of its file of weights
    facts: dict  # which that file states
    order: tuple[int, ...]  # where it has each of the student's classes

    def model(self) -> Classifier:
        """Returns the network, in evaluation mode."""
        return classifier_from(self.file, self.facts)


def note_teachers(config: ConfigDict, dataset: Dataset, run_dirs: list[Path]) -> dict:
    """Writes `distill.json` of runs with teachers; returns what it adds to their summaries.

    Raises:
      UserError: a run went under way with other teachers, or is its own.
    """
    teachers = find_teachers(config, dataset)
    named = [
        {
            "run": "/".join(teacher.path.resolve().parts[-2:]),
            "model": teacher.facts["model"],
            "path": str(teacher.path),
            "digest": teacher.digest,
        }
        for teacher in teachers
    ]
    for run_dir in run_dirs if teachers else ():
        if run_dir.resolve() in [teacher.path.resolve() for teacher in teachers]:
            raise UserError(f"config.distill.teacher: {run_dir} would be its own teacher")
        check_taught(run_dir)
        write_json(run_dir / TAUGHT, config.distill.to_dict() | {"teachers": named})
    return {"distill": config.distill.to_dict() | {"teachers": named}} if teachers else {}


# --- before compute is spent --------------------------------------------------------------------


def find_teachers(config: ConfigDict, dataset: Dataset) -> list[Teacher]:
    """Returns the teachers of a run, [] for none.

    Raises:
      UserError: a teacher is no complete run, answers another question, or knows images on which
        the student is judged.
    """
    paths = teachers_of(config.distill.teacher)
    if paths:
        _check_student(config)
        check_teachers(config)
    return [_find(path, config, dataset) for path in paths]


def _check_student(config: ConfigDict) -> None:
    name = config.model.name
    if name not in MODELS or not MODELS[name].trained_by_gradient:
        raise UserError(
            f"config.distill.teacher={config.distill.teacher}: {name} is not trained by gradient, "
            "so it cannot learn from a teacher: leave it out of config.models, or set "
            f"--config.per_model.{name}.distill.teacher='' (in a sweep, name the others: "
            "per_model.cnn.distill.teacher=...)"
        )


def _find(path: Path, config: ConfigDict, dataset: Dataset) -> Teacher:
    where = f"config.distill.teacher=run:{path}"
    file = find_weights(path)
    stat = file.stat()
    digest, facts = _read(file, stat.st_mtime_ns, stat.st_size)
    stored = read_json(path / "config.json")
    if "hinge" in [v for k, v in flatten(stored).items() if k.endswith("loss.name")]:
        raise UserError(
            f"{where} was trained with loss.name=hinge, whose scores are no probabilities: take a "
            "teacher trained with cross_entropy"
        )
    if not MODELS[facts["model"]].trained_by_gradient:
        raise UserError(
            f"{where}: {facts['model']} remembers its training images, so it is sure of every one "
            "of them and tells no more than their labels: take another teacher"
        )
    if facts["image_size"] != (size := config.data.image_size):
        raise UserError(
            f"{where} was trained on images of {facts['image_size']} pixels, but would see the "
            f"student's, of {size}: train a teacher with data.image_size={size}, or the student "
            f"with data.image_size={facts['image_size']}"
        )
    order = _order(where, facts["class_names"], dataset.class_names)
    _check_images(where, path, dataset)
    return Teacher(path, file, digest, facts, order)


@functools.lru_cache(maxsize=32)
def _read(file: Path, changed: int, size: int) -> tuple[str, dict]:
    """Returns the digest of a file of weights, and the facts that it states."""
    facts = read_own(file)
    del facts["arrays"]
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest(), facts


def _order(where: str, theirs: list[str], ours: list[str]) -> tuple[int, ...]:
    """Returns where the teacher has each of the student's classes."""
    theirs, ours = ([unicodedata.normalize("NFC", n) for n in names] for names in (theirs, ours))
    if set(theirs) == set(ours):
        return tuple(theirs.index(name) for name in ours)
    differences = (
        ("unknown to it", set(ours) - set(theirs)),
        ("not here", set(theirs) - set(ours)),
    )
    texts = [f"{what}: {', '.join(sorted(names)[:4])}" for what, names in differences if names]
    raise UserError(
        f"{where} tells {len(theirs)} classes apart, which are not the {len(ours)} of this data "
        f"({'; '.join(texts)}): train a teacher on the student's data"
    )


def _check_images(where: str, path: Path, dataset: Dataset) -> None:
    """Raises a UserError if a teacher was trained or chosen on images that judge the student.

    An image is the same if its id and class are; one whose id the teacher does not know, if its
    pixels are, before they are resized. So duplicates within the data count as they do without one.
    """
    stored = read_json(path / "dataset.json")
    if stored.get("identity") == dataset.identity:
        return
    try:
        folders = [
            parent / "audit" for parent in path.resolve().parents[1:3]
        ]  # of a search's trial
        folder = next((f for f in folders if f.is_dir()), folders[0])
        theirs = read_table(folder, stored.get("identity", ""))
    except (OSError, ValueError):
        raise UserError(
            f"{where} was trained on other images or parts than the student's, and its workdir no "
            "longer knows on which: train a teacher on the student's data"
        ) from None
    ours = dataset.identity_table
    at = theirs.index.get_indexer(ours.index)
    known = (at >= 0) & (theirs["class"].to_numpy()[at] == ours["class"].to_numpy())
    for seen, judged in (("train", "validation"), ("train", "test"), ("validation", "test")):
        pixels = set(theirs["pixels"][theirs["part"] == seen]) - {""}
        leaks = np.where(known, theirs["part"].to_numpy()[at] == seen, ours["pixels"].isin(pixels))
        of_student = ours["part"] == judged
        same = ours.index[of_student & leaks]
        if len(same):
            raise UserError(
                f"{where}: {len(same)} of the student's {of_student.sum()} {judged} images, such "
                f"as {same[0]}, are {seen} images of the teacher, which would tell their answers: "
                "train a teacher with the student's data.split, data.split_seed and data.fold"
            )


# --- what a step takes --------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """Takes logits [views * N, T, K] of the training images, view after view."""

    views: int

    def __call__(self, taught: jax.Array, inputs: jax.Array, batch: dict) -> jax.Array:
        """Returns those of a batch: [B, T, K]."""
        count = len(taught) // self.views
        return taught[batch["row"] + batch["epoch"] % self.views * count]


@dataclass(frozen=True)
class Within:
    """Runs networks, whose arrays and orders of classes are arguments: constants compile slowly."""

    outlines: tuple[Outline, ...]

    def __call__(self, taught: list[dict], images: jax.Array, batch: object = None) -> jax.Array:
        """Returns the logits of each teacher on images [B, H, W, 3]: [B, T, K]."""
        logits = []
        for outline, of in zip(self.outlines, taught, strict=True):
            model = merge_model(outline.model(), of["params"], of["stats"])
            logits.append(forward(model, images)[:, of["order"]])
        return jnp.stack(logits, axis=1)


class TeacherLogits(StoredOutputs):
    """The logits [N, T, K] of teachers, known by the digests of their files."""

    def __init__(self, record: RunRecord, config: ConfigDict, teachers: list[Teacher]):
        self.record, self.teachers = record, teachers
        known = [[teacher.digest, teacher.order] for teacher in teachers]
        super().__init__(config, ["teachers", known])

    @functools.cached_property
    def models(self) -> list[Classifier]:
        """The networks, read when first needed."""
        return [teacher.model() for teacher in self.teachers]

    @functools.cached_property
    def output(self) -> Within:
        """How a step runs the teachers."""
        return Within(tuple(Outline.of(model) for model in self.models))

    @functools.cached_property
    def model(self) -> list[dict]:
        """What that takes beside images."""
        taught = []
        for teacher, model in zip(self.teachers, self.models, strict=True):
            _, params, stats = split_model(model)
            order = np.array(teacher.order, np.int32)
            taught.append({"params": params, "stats": stats, "order": order})
        return self.record.put(taught)


def lesson(
    record: RunRecord, config: ConfigDict, after_batch: Callable[[], None]
) -> tuple[Callable | None, tuple]:
    """Returns how a step of a phase gets the teachers' logits, and what it takes for that.

    (None, ()) without teachers. `after_batch` may raise to stop, while logits are stored.
    """
    teachers = find_teachers(config, record.dataset)
    if not teachers:
        return None, ()
    feed = record.feed("train", large=crops(config.augment))
    answers = TeacherLogits(record, config, teachers)
    views = stored_views(config)
    megabytes = logits_megabytes(config, len(feed), record.dataset.num_classes)
    if views and megabytes <= config.runtime.feature_cache_mb:
        return Stored(views), (answers.features(feed, views, after_batch).images,)
    return answers.output, (answers.model,)
