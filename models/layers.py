"""Layers that several architectures share."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

he_normal = nnx.initializers.he_normal()
he_normal_fan_out = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


def flatten(x: jax.Array) -> jax.Array:
    """[B, ...] -> [B, D]."""
    return x.reshape(x.shape[0], -1)


# --- pooling ------------------------------------------------------------------------------------


def global_average_pool(x: jax.Array) -> jax.Array:
    """[B, h, w, C] -> [B, C]."""
    return x.mean(axis=(1, 2))


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
    if jax.default_backend() != "cpu":
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


def adaptive_average_pool(x: jax.Array, side: int) -> jax.Array:
    """[B, h, w, C] -> [B, side, side, C]: means over windows that share their edges evenly."""

    def windows(size: int) -> np.ndarray:  # [side, size]
        matrix = np.zeros((side, size), np.float32)
        for i in range(side):
            low, high = i * size // side, -(-(i + 1) * size // side)
            matrix[i, low:high] = 1 / (high - low)
        return matrix

    if x.shape[1:3] == (side, side):
        return x
    rows, columns = (windows(size).astype(x.dtype) for size in x.shape[1:3])
    return jnp.einsum("ih,bhwc,jw->bijc", rows, x, columns, precision="highest")


# --- convolution --------------------------------------------------------------------------------


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
    if jax.default_backend() != "cpu" or dilated or not suits:
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


Conv = partial(nnx.Conv, conv_general_dilated=convolve)  # as nnx.Conv, with the lowering above


def conv(inputs: int, outputs: int, side: int, stride: int = 1, *, same: bool = False, **options):
    """Returns a square convolution without bias unless asked.

    Args:
      inputs: channels.
      outputs: channels; with groups=inputs, this is a depthwise convolution.
      side: of the kernel.
      stride: in both directions.
      same: TensorFlow's `SAME` padding, which at stride 2 adds more at the far edge; otherwise
        (side - 1) // 2 at every edge, as networks trained in PyTorch have it.
      **options: of `nnx.Conv`, such as `groups`, `use_bias`, `dtype`, `rngs`.
    """
    margin = (side - 1) // 2
    padding = "SAME" if same else [(margin, margin)] * 2
    groups = options.pop("groups", 1)
    initial = he_normal_fan_out if groups == 1 else he_normal  # each output of groups sees few
    options = {"use_bias": False, "kernel_init": initial} | options
    return Conv(
        inputs,
        outputs,
        (side, side),
        stride,
        padding=padding,
        feature_group_count=groups,
        **options,
    )


# --- normalisation and regularisation -----------------------------------------------------------


class BatchNorm(nnx.BatchNorm):
    """As nnx.BatchNorm; `observe`, if set, is called with each input."""

    observe = None

    def __call__(self, x: jax.Array, **options) -> jax.Array:
        """[B, h, w, C] -> [B, h, w, C]."""
        if self.observe is not None:
            self.observe(x)
        return super().__call__(x, **options)


def stochastic_depth(rate: float, rngs: nnx.Rngs) -> nnx.Dropout:
    """Drops a residual branch of whole images in training (Huang et al. 2016)."""
    return nnx.Dropout(rate, broadcast_dims=(1, 2, 3), rngs=rngs)


class SqueezeExcite(nnx.Module):
    """Scales channels by a gate computed from their means (Hu et al. 2018)."""

    def __init__(self, channels: int, reduced: int, *, act=nnx.silu, **settings):
        self.reduce = conv(channels, reduced, 1, use_bias=True, **settings)
        self.expand = conv(reduced, channels, 1, use_bias=True, **settings)
        self.act = act

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, C] -> [B, h, w, C]."""
        means = x.mean(axis=(1, 2), keepdims=True)
        return x * nnx.sigmoid(self.expand(self.act(self.reduce(means))))


class PooledLinear(nnx.Module):
    """The usual head: global average pooling, dropout, one linear layer."""

    def __init__(self, channels: int, num_classes: int, dropout: float, *, dtype, rngs: nnx.Rngs):
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.linear = nnx.Linear(channels, num_classes, dtype=dtype, rngs=rngs)

    def condense(self, x: jax.Array) -> jax.Array:
        """[B, h, w, C] -> [B, 1, 1, C], all that this head needs of its input."""
        return x.mean(axis=(1, 2), keepdims=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, C] -> [B, K]."""
        return self.linear(self.dropout(global_average_pool(x)))
