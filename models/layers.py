"""Layers that several architectures share."""

from functools import partial

import jax
import jax.numpy as jnp
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


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: str | list[tuple[int, int]],
    feature_group_count: int = 1,
    **options,
) -> jax.Array:
    """[B, H, W, C], [kh, kw, C, O] -> [B, h, w, O], by the lowering that is fast here.

    On a CPU, few input channels or few output places are far faster as one matrix product over
    patches: with both gradients, 32 images and 2 cores, 22 times for 128 -> 256 channels at 2x2
    places, 3 times for 3 -> 32 channels at 64x64 (jax 0.10). Elsewhere, and where it is slower,
    this is `jax.lax.conv_general_dilated`, whose arguments it takes.
    """
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    rows, columns = (
        (size + low + high - k) // stride + 1
        for size, (low, high), k, stride in zip(
            x.shape[1:3], padding, kernel.shape[:2], strides, strict=True
        )
    )
    dilated = any(set(options.get(f"{s}_dilation") or (1,)) != {1} for s in ("lhs", "rhs"))
    by_patches = jax.default_backend() == "cpu" and (x.shape[-1] <= 4 or rows * columns <= 16)
    if not by_patches or dilated or feature_group_count != 1:
        options["feature_group_count"] = feature_group_count
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    (down, across), (height, width) = strides, kernel.shape[:2]
    patches = [
        x[:, i : i + (rows - 1) * down + 1 : down, j : j + (columns - 1) * across + 1 : across]
        for i in range(height)
        for j in range(width)
    ]
    flat = jnp.concatenate(patches, axis=-1).reshape(-1, height * width * x.shape[-1])
    product = flat @ kernel.reshape(-1, kernel.shape[-1])
    return product.reshape(len(x), rows, columns, -1)


Conv = partial(nnx.Conv, conv_general_dilated=convolve)  # as nnx.Conv, with the lowering above
