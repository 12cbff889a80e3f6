"""Softmax regression on the pixels: the baseline that any network must beat."""

import jax.numpy as jnp
from flax import nnx

from models.classifier import Classifier
from models.layers import flatten


class Linear(Classifier):
    """logits = W x + b, with x the flattened image; W starts at zero, so the loss at log K."""

    def __init__(self, num_classes: int, image_size: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        dense = nnx.Linear(
            image_size * image_size * 3,
            num_classes,
            kernel_init=nnx.initializers.zeros,
            dtype=dtype,
            rngs=rngs,
        )
        self.stages = nnx.List([nnx.Sequential(flatten, dense)])
