"""The outputs of frozen networks, computed once instead of at every step, and kept on disk."""

import functools
import hashlib
import json
import math
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

import data
import models
from data.augmentation import changes_nothing
from data.cache import put_in_place, sweep, temporary_folder
from experiment.checks import teachers_of
from input_pipeline import Feed, gather_program, to_devices
from models import Classifier
from models.classifier import merge_model, stage_of
from training import hosts
from training.programs import settings, shared
from training.steps import augment_views

VERSION = 1  # of an entry; raise it when it holds other things


class FeatureFeed(Feed):
    """As `Feed`, but "image" is the input of stage `first`: the image's view of that epoch."""

    def __init__(self, feed: Feed, features: jax.Array, views: int):
        self.rows, self.labels, self.sharding = feed.rows, feed.labels, feed.sharding
        self.images, self.views, self.resident = features, views, True
        self.gather = gather_program(self.sharding)

    def places(self, rows: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Returns where in the resident array the views of a batch lie: int [B]."""
        return rows + (epochs % self.views) * len(self)


def features_fit(
    config: ConfigDict, model: Classifier, first: int, images: int, validation_images: int
) -> int:
    """Returns how many views of each training image are stored in a phase; 0 for none."""
    if features_obstacle(config, model, first, images, validation_images):
        return 0
    return stored_views(config)


def stored_views(config: ConfigDict) -> int:
    """Returns how many images a phase makes of each training image; 0 for new ones every time."""
    return 1 if changes_nothing(config.augment) else config.augment_views


def features_obstacle(
    config: ConfigDict, model: Classifier, first: int, images: int, validation_images: int
) -> str:
    """Returns why no features are stored in a phase, and the cure; "" where they are.

    `model` may hold shapes in place of arrays.
    """
    if not first:
        return "it freezes no stage: set train=head"
    if config.frozen_batch_norm == "batch":
        return "what is frozen depends on the batch: set frozen_batch_norm=running"
    if not stored_views(config):
        return "each epoch augments anew: set augment_views=4, say, with augment.mixup and cutmix 0"
    size = config.data.image_size
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
    shape = jax.eval_shape(lambda m, x: _condensed(m, x, first), model, image)
    count = stored_views(config) * images + validation_images
    megabytes = count * math.prod(shape.shape) * shape.dtype.itemsize / 2**20
    megabytes += logits_megabytes(config, images, model.num_classes)
    if megabytes > config.runtime.feature_cache_mb:
        return (
            f"its features take {megabytes:.0f} MB: raise runtime.feature_cache_mb, or lower "
            "augment_views"
        )
    return ""


def logits_megabytes(config: ConfigDict, images: int, num_classes: int) -> float:
    """Returns what the logits of a run's teachers take, of all views of its training images."""
    teachers = len(teachers_of(config.distill.teacher))
    return stored_views(config) * images * teachers * num_classes * 4 / 2**20


def _condensed(model: Classifier, images: jax.Array, first: int) -> jax.Array:
    """Returns the input of stage `first`, reduced to what that stage needs of it."""
    features = model.run(model.preprocess(images), 0, first)
    condense = getattr(model.stages[first], "condense", None)
    return condense(features) if condense else features


class StoredOutputs:
    """What `output(model, images)` makes of images is kept in `runtime.cache_dir`.

    An entry there is known by all that it depends on: the code of models and augmentation, the
    images, their order and their views, and `key`, which says all of `model` and `output`. So
    neither another seed nor another command computes it again; a damaged one is made anew.
    """

    model: Any  # a tree of arrays
    output: Callable[[Any, jax.Array], jax.Array]  # equal to another that does the same

    def __init__(self, config: ConfigDict, key: list):
        self.config = config
        self.folder = Path(config.runtime.cache_dir).expanduser() / "features"
        self.key = [VERSION, jax.__version__, jax.default_backend(), _code(), *key]

    def features(
        self, feed: Feed, views: int = 0, after_batch: Callable[[], None] = lambda: None
    ) -> FeatureFeed:
        """Returns the outputs of every view of every image of `feed`, as a feed.

        With 0 `views`, the images stay as they are. `after_batch` may raise to stop.
        """
        entry = self.entry(feed, views)
        features = _read(entry)
        if not hosts.all_have(features is not None):
            features = self._compute(feed, views, after_batch)
            _write(entry, features)
        everywhere = NamedSharding(feed.sharding.mesh, PartitionSpec())
        return FeatureFeed(feed, to_devices(features, everywhere), max(views, 1))

    def entry(self, feed: Feed, views: int) -> Path:
        """Returns the folder where these features are kept."""
        drawn = [views, self.config.augment.to_dict()] if self._augments(views) else []
        rows = hashlib.sha256(feed.rows.astype(np.int64)).hexdigest()
        key = [*self.key, feed.entry, rows, self.config.data.image_size, drawn]
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode())
        return self.folder / digest.hexdigest()[:24]

    def _augments(self, views: int) -> bool:
        return views > 0 and not changes_nothing(self.config.augment)

    def _compute(self, feed: Feed, views: int, after_batch: Callable[[], None]) -> np.ndarray:
        config, output, augments = self.config, self.output, self._augments(views)

        def run(model: Any, batch: dict, view: jax.Array) -> jax.Array:
            images = batch["image"]
            if augments:
                every = jnp.full(len(images), view)
                images = augment_views(images, batch["row"], every, config)
            return output(model, images)

        program = shared(("outputs", settings(config), output, augments), lambda: jax.jit(run))
        # Batches of nearly equal size, for padding would be computed too.
        devices = feed.sharding.mesh.size
        count = -(-len(feed) // config.eval_batch_size)
        batch_size = -(-len(feed) // (count * devices)) * devices
        stored, total, filled = None, max(views, 1) * len(feed), 0
        for view in range(max(views, 1)):
            left = len(feed)
            for batch in feed.evaluation(batch_size):
                features = hosts.whole(program(self.model, batch, view))[:left]
                if stored is None:  # in place, for a list and its concatenation are twice as large
                    stored = np.empty((total, *features.shape[1:]), features.dtype)
                stored[filled : filled + len(features)] = features
                filled, left = filled + len(features), left - len(features)
                after_batch()
        return stored


@dataclass(frozen=True)
class Condensed:
    """What a model hands to stage `first`."""

    first: int

    def __call__(self, model: Classifier, images: jax.Array) -> jax.Array:
        """Returns it of images [B, H, W, 3]: see `_condensed`."""
        return _condensed(model, images, self.first)


class FrozenStages(StoredOutputs):
    """The stages before `first`, known by their arrays and their architecture."""

    def __init__(self, config: ConfigDict, model: Classifier, weights: dict, first: int):
        self.model = merge_model(model, weights["params"], weights["stats"])
        arrays = hashlib.sha256()
        for path, array in sorted((weights["params"] | weights["stats"]).items()):
            if stage_of(path) < first:
                arrays.update(f"{path} {array.dtype} {array.shape}".encode())
                arrays.update(np.ascontiguousarray(array))
        known = model.name, repr(model.fields), model.preprocessing.to_dict(), config.compute_dtype
        self.output = Condensed(first)
        super().__init__(config, [arrays.hexdigest(), first, *known])


@functools.cache
def _code() -> str:
    """Returns a digest of the code that features come from: architectures and augmentation."""
    digest = hashlib.sha256()
    for path in (
        *sorted(Path(models.__path__[0]).glob("*.py")),
        Path(data.__path__[0]) / "augmentation.py",
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(entry: Path) -> np.ndarray | None:
    """Maps an entry; None if there is none, or any part of it is lost or changed."""
    try:
        notes = json.loads((entry / "notes.json").read_text(encoding="utf-8"))
        form = {"dtype": jnp.dtype(notes["dtype"]), "shape": tuple(notes["shape"])}
        features = np.memmap(entry / "features.bin", mode="r", **form)
        return features if zlib.crc32(_bytes(features)) == notes["checksum"] else None
    except Exception:  # noqa: BLE001 - damage has many faces, and all are mended alike
        return None


def _write(entry: Path, features: np.ndarray) -> None:
    """Keeps an entry; says so where the disk does not take it."""
    notes = {"dtype": features.dtype.name, "shape": features.shape}
    notes["checksum"] = zlib.crc32(_bytes(features))
    try:
        sweep(entry.parent)
        with temporary_folder(entry) as work:
            (work / "features.bin").write_bytes(_bytes(features))
            (work / "notes.json").write_text(json.dumps(notes), encoding="utf-8")
            put_in_place(work, entry, lambda: _read(entry) is not None)
    except OSError as error:
        print(
            f"warning: features cannot be kept in {entry.parent}: {error}; they are computed again "
            "by the next run. Make room there, or set --config.runtime.cache_dir=...",
            file=sys.stderr,
        )


def _bytes(features: np.ndarray) -> np.ndarray:
    return features.reshape(-1).view(np.uint8)
