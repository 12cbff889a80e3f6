"""What random numbers are drawn for, so that no two uses of a seed draw the same ones.

A key is folded with the step of training, or with one of these numbers far beyond any step.
"""

from enum import IntEnum

import jax
import numpy as np


class Purpose(IntEnum):
    """A use of a seed other than a step of training."""

    ORDER = 1  # of training images; drawn by NumPy
    SUBSET = 2  # of training images, for data.train_fraction; drawn by NumPy
    VIEWS = 2**32 - 2**16  # augmented views
    PHASE = 2**32  # less the phase's number


def view_key() -> jax.Array:
    """Returns the key of augmented views: the same for every run, so that runs can share them."""
    return jax.random.fold_in(jax.random.key(0), np.uint32(Purpose.VIEWS))


def phase_key(seed: int, number: int) -> jax.Array:
    """Returns the key of a phase; that of the first is the seed's own."""
    key = jax.random.key(seed)
    return jax.random.fold_in(key, np.uint32(Purpose.PHASE - number)) if number else key
