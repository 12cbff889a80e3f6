"""The outputs of frozen stages, computed once instead of at every step."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from data.augmentation import changes_nothing
from input_pipeline import Feed, gather_program
from models import Classifier
from models.classifier import merge_model
from training.programs import settings, shared
from training.steps import augment_views


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
    """Returns how many views of each training image are stored in a phase; 0 for none.

    None can be where nothing is frozen, where what is frozen depends on the batch, or where each
    epoch augments anew; and none are where they take more than `runtime.feature_cache_mb`.
    """
    if not first or config.frozen_batch_norm == "batch":
        return 0
    views = 1 if changes_nothing(config.augment) else config.augment_views
    size = config.data.image_size
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
    shape = jax.eval_shape(lambda x: _condensed(model, x, first), image)
    count = views * images + validation_images
    megabytes = count * math.prod(shape.shape) * shape.dtype.itemsize / 2**20
    return views if megabytes <= config.runtime.feature_cache_mb else 0


def _condensed(model: Classifier, images: jax.Array, first: int) -> jax.Array:
    """Returns the input of stage `first`, reduced to what that stage needs of it."""
    features = model.run(model.preprocess(images), 0, first)
    condense = getattr(model.stages[first], "condense", None)
    return condense(features) if condense else features


def cache_features(
    config: ConfigDict,
    model: Classifier,
    weights: dict,
    feed: Feed,
    first: int,
    views: int,
    key: jax.Array,
    after_batch: Callable[[], None] = lambda: None,
) -> FeatureFeed:
    """Runs the stages before `first` over every view of every image of a feed.

    Views are drawn from the phase's `key`; with 0 `views`, the images stay as they are.
    """
    model = merge_model(model, weights["params"], weights["stats"])

    def run(model: Classifier, batch: dict, view: jax.Array, key: jax.Array) -> jax.Array:
        images = batch["image"]
        if views and not changes_nothing(config.augment):
            every = jnp.full(len(images), view)
            images = augment_views(key, images, batch["row"], every, config)
        return _condensed(model, images, first)

    program = shared(("features", settings(config), first, views), lambda: jax.jit(run))
    # Batches of nearly equal size, for padding would be computed too.
    devices = feed.sharding.mesh.size
    count = -(-len(feed) // config.eval_batch_size)
    batch_size = -(-len(feed) // (count * devices)) * devices
    parts = []
    for view in range(max(views, 1)):
        left = len(feed)
        for batch in feed.evaluation(batch_size):
            features = np.asarray(program(model, batch, view, key))
            parts.append(features[:left])
            left -= len(features)
            after_batch()
    everywhere = NamedSharding(feed.sharding.mesh, PartitionSpec())
    return FeatureFeed(feed, jax.device_put(np.concatenate(parts), everywhere), max(views, 1))
