"""Convolution and pooling by the lowering that is fast on the backend; results are the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from flax import nnx

_plain = ContextVar("plain", default=False)


@contextmanager
def plain_lowering() -> Iterator[None]:
    """Leaves every convolution one convolution in what is traced, so that it can be counted."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu" and not _plain.get()


def max_pool_2x2(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H // 2, W // 2, C]; an odd last row or column is dropped.

    By reshape: on a CPU its gradient is far cheaper than that of `reduce_window`.
    """
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


def max_pool_3x3(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), C]: windows of 3, stride 2, padding 1.

    Padding never wins, which after ReLU is the same as padding with zeros. On a CPU as a maximum
    of shifted slices, along rows and then columns, whose gradient is far cheaper.
    """
    if not _on_cpu():
        return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    for axis in (1, 2):
        places = -(-x.shape[axis] // 2)
        pad = [(0, 0)] * 4
        pad[axis] = (1, 1)
        padded = jnp.pad(x, pad, constant_values=-jnp.inf)
        slices = (
            jax.lax.slice_in_dim(padded, i, i + 2 * places - 1, stride=2, axis=axis)
            for i in range(3)
        )
        x = jnp.maximum(jnp.maximum(next(slices), next(slices)), next(slices))
    return x


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: str | list[tuple[int, int]],
    feature_group_count: int = 1,
    **options,
) -> jax.Array:
    """[B, H, W, C], [kh, kw, C / groups, O] -> [B, h, w, O], by the lowering that is fast here.

    On a CPU (2 cores, jax 0.10, 32 images, with both gradients) XLA's own convolution loses to

    * one matrix product for 1x1 kernels: 1.5 to 4 times;
    * one matrix product over patches where input channels or output places are few: 22 times for
      128 -> 256 channels at 2x2 places, 3 times for 3 -> 32 channels at 64x64;
    * a sum of shifted products for depthwise kernels: 10 to 45 times.

    Elsewhere this is `jax.lax.conv_general_dilated`, whose arguments it takes.
    """
    size = kernel.shape[:2]
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], size, strides, padding)
    rows, columns = (
        (length + low + high - k) // stride + 1
        for length, (low, high), k, stride in zip(x.shape[1:3], padding, size, strides, strict=True)
    )
    depthwise = feature_group_count == x.shape[-1] == kernel.shape[-1]
    few = x.shape[-1] <= 4 or rows * columns <= 16 or size == (1, 1)
    dilated = any(set(options.get(f"{s}_dilation") or (1,)) != {1} for s in ("lhs", "rhs"))
    suits = depthwise or (few and feature_group_count == 1)
    if not _on_cpu() or dilated or not suits:
        options["feature_group_count"] = feature_group_count
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    (down, across), (height, width) = strides, size
    shifted = {
        (i, j): x[
            :, i : i + (rows - 1) * down + 1 : down, j : j + (columns - 1) * across + 1 : across
        ]
        for i in range(height)
        for j in range(width)
    }
    if depthwise:
        return sum(part * kernel[i, j, 0] for (i, j), part in shifted.items())
    flat = jnp.concatenate(list(shifted.values()), axis=-1).reshape(
        -1, height * width * x.shape[-1]
    )
    product = flat @ kernel.reshape(-1, kernel.shape[-1])
    return product.reshape(len(x), rows, columns, -1)
