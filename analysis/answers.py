"""What a deployed model says of images: logits, and 32 numbers by which drift is noticed."""

from collections.abc import Callable

import jax
import numpy as np

from models import Classifier
from models.layers import adaptive_average_pool, flatten

WIDTH = 32  # numbers of an image
SIDE = 4  # rows and columns of a feature map that they tell apart, at most


def answers(model: Classifier, images: jax.Array) -> dict[str, jax.Array]:
    """Returns `logits` [B, K] and `features` [B, 32], float32, of images uint8 [B, H, W, 3].

    The numbers are a random projection, the same everywhere, of the last spatial map as the head
    sees it.
    """
    seen = model.features(model.preprocess(images))
    condense = getattr(model.stages[-1], "condense", None)
    condensed = condense(seen) if condense else seen  # [B, h, w, C]
    side = min(SIDE, *condensed.shape[1:3])
    condensed = flatten(adaptive_average_pool(condensed.astype(np.float32), side))  # [B, D]
    return {"logits": model.classify(seen), "features": condensed @ projection(condensed.shape[1])}


def projection(inputs: int) -> np.ndarray:
    """Returns the matrix float32 [D, 32] of that projection."""
    drawn = np.random.default_rng(0).standard_normal((inputs, WIDTH)) / np.sqrt(inputs)
    return drawn.astype(np.float32)


def answering(model: Classifier) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Returns `answers` of a model, compiled for each batch size that it meets."""
    # As a list of arrays: to take a model apart at each call would cost more than a small model.
    weights, structure = jax.tree.flatten(model)
    program = jax.jit(lambda weights, x: answers(jax.tree.unflatten(structure, weights), x))
    return lambda images: {k: np.asarray(v) for k, v in program(weights, images).items()}
