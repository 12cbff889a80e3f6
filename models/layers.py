"""Layers that several architectures share."""

import jax
from flax import nnx


def max_pool_2x2(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H // 2, W // 2, C]; an odd last row or column is dropped.

    By reshape: on a CPU its gradient is far cheaper than that of `reduce_window`.
    """
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


def flatten(x: jax.Array) -> jax.Array:
    """[B, ...] -> [B, D]."""
    return x.reshape(x.shape[0], -1)


def global_average_pool(x: jax.Array) -> jax.Array:
    """[B, h, w, C] -> [B, C]."""
    return x.mean(axis=(1, 2))


he_normal = nnx.initializers.he_normal()
