"""k nearest neighbours on the pixels: what similarity of raw images alone can tell."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from errors import UserError, choose
from models.classifier import Classifier, Preprocessing
from models.layers import flatten

BLOCK = 1024  # training images compared at once, which bounds the memory taken
FLOOR = 1e-3  # votes added to every class, so that the log of its share is finite


class Memory(nnx.Variable):
    """An array remembered from the training images rather than learned by gradient."""


class Neighbours(nnx.Module):
    """Votes of the k remembered images nearest to each input, as log-probabilities."""

    def __init__(self, num_classes: int, pixels: int, metric: str, max_k: int):
        self.num_classes, self.metric, self.max_k = num_classes, metric, max_k
        self.images = Memory(jnp.zeros((0, pixels), jnp.uint8))  # [N, D]
        self.labels = Memory(jnp.zeros((0,), jnp.int32))  # [N]
        self.k = Memory(jnp.asarray(1, jnp.int32))

    def nearest_labels(self, x: jax.Array) -> jax.Array:
        """[B, D] float32 in 0..1 -> labels [B, max_k] of the nearest images, nearest first."""
        count, images = len(self.labels), self.images[...]
        size = min(BLOCK, count)
        starts = jnp.arange(0, count, size)
        begins = jnp.minimum(starts, count - size)  # the last block overlaps the one before

        def distances(start: jax.Array, begin: jax.Array) -> jax.Array:  # [size, B]
            block = jax.lax.dynamic_slice_in_dim(images, begin, size).astype(jnp.float32) / 255
            if self.metric == "l1":
                table = jax.lax.map(lambda row: jnp.abs(row - x).sum(axis=-1), block)
            else:  # + |x|^2, the same for all
                product = jnp.matmul(block, x.T, precision=jax.lax.Precision.HIGHEST)
                table = (block**2).sum(axis=-1, keepdims=True) - 2 * product
            again = begin + jnp.arange(size) < start
            return jnp.where(again[:, None], jnp.inf, table)

        table = jax.lax.map(lambda block: distances(*block), (starts, begins))
        rows = (begins[:, None] + jnp.arange(size)).reshape(-1)
        _, nearest = jax.lax.top_k(-table.reshape(len(rows), -1).T, min(self.max_k, count))
        return self.labels[...][rows[nearest]]

    def __call__(self, features: jax.Array) -> jax.Array:
        """[B, H, W, 3] float32 in 0..1 -> logits [B, K], the log of each class's share of votes."""
        labels = self.nearest_labels(flatten(features))
        counted = jnp.arange(labels.shape[1]) < self.k[...]
        votes = (jax.nn.one_hot(labels, self.num_classes) * counted[:, None]).sum(axis=1)
        share = (votes + FLOOR) / (self.k[...] + FLOOR * self.num_classes)
        return jnp.log(share)


class Knn(Classifier):
    """k nearest neighbours by L1 or L2 distance, k from 1 to `max_k` chosen on validation images.

    Ties between classes go to the first one. Nothing is random: every seed gives the same result.
    """

    preprocessing = Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    trained_by_gradient = False

    def __init__(self, num_classes: int, image_size: int, *, metric="l2", max_k=15, dtype, rngs):
        del dtype, rngs  # distances are always float32
        if max_k < 1:
            raise UserError(f"knn: max_k={max_k} must be at least 1")
        metric = choose("knn: metric", metric, ("l1", "l2"))
        pixels = image_size * image_size * 3
        self.stages = nnx.List([Neighbours(num_classes, pixels, metric, max_k)])

    def multiply_adds(self) -> int:
        """Returns how many pixel values one image is compared with: each adds to a distance."""
        return self.stages[-1].images.size

    def fit(self, train: tuple, validation: tuple, batch_size: int) -> dict[int, float]:
        """Remembers the training images and keeps the smallest k of best validation accuracy.

        `train` and `validation` are images [N, H, W, 3] uint8 and labels [N]; `batch_size`
        validation images are looked up at once. Returns the accuracy of every k.
        """
        head = self.stages[-1]
        images, labels = train
        head.images.set_value(jnp.asarray(images).reshape(len(images), -1))
        head.labels.set_value(jnp.asarray(labels, jnp.int32))
        images, labels = validation
        nearest = []
        for start in range(0, len(images), batch_size):
            batch = np.zeros((batch_size, *images.shape[1:]), np.uint8)
            part = images[start : start + batch_size]
            batch[: len(part)] = part
            nearest.append(np.asarray(_look_up(self, batch))[: len(part)])
        votes, accuracy = np.zeros((len(labels), head.num_classes), np.int32), {}
        for k, voted in enumerate(np.concatenate(nearest).T, start=1):
            votes[np.arange(len(labels)), voted] += 1
            accuracy[k] = float((votes.argmax(axis=1) == np.asarray(labels)).mean())
        head.k.set_value(jnp.asarray(max(accuracy, key=accuracy.get), jnp.int32))
        return accuracy


@jax.jit
def _look_up(model: Knn, images: jax.Array) -> jax.Array:
    return model.stages[-1].nearest_labels(flatten(model.preprocess(images)))
