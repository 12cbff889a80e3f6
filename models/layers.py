"""Layers that several architectures share; `models/lowering.py` makes the costly ones fast."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.lowering import convolve, linear_product

he_normal = nnx.initializers.he_normal()
he_normal_fan_out = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


def flatten(x: jax.Array) -> jax.Array:
    """[B, ...] -> [B, D]."""
    return x.reshape(x.shape[0], -1)


# --- pooling ------------------------------------------------------------------------------------


def global_average_pool(x: jax.Array) -> jax.Array:
    """[B, h, w, C] -> [B, C]."""
    return x.mean(axis=(1, 2))


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

# As nnx.Conv and nnx.Linear, with our lowerings.
Conv = partial(nnx.Conv, conv_general_dilated=convolve)
Dense = partial(nnx.Linear, dot_general=linear_product)


def conv(inputs: int, outputs: int, side: int, stride: int = 1, *, same: bool = False, **options):
    """Returns a convolution with a square kernel, without bias unless `use_bias` is set.

    `same` is TensorFlow's padding, which at stride 2 adds more at the far edge; otherwise it is
    (side - 1) // 2 at every edge, as in PyTorch. With groups=inputs the convolution is depthwise.
    """
    margin = (side - 1) // 2
    padding = "SAME" if same else [(margin, margin)] * 2
    groups = options.pop("groups", 1)
    initial = he_normal_fan_out if groups == 1 else he_normal  # each output of groups sees few
    options = {"use_bias": False, "kernel_init": initial, **options}
    options |= {"padding": padding, "feature_group_count": groups}
    return Conv(inputs, outputs, (side, side), stride, **options)


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


def logits_layer(inputs: int, num_classes: int, rngs: nnx.Rngs, **options) -> nnx.Linear:
    """Returns the last layer, in float32 always: logits of bfloat16's 8 bits would often tie."""
    return Dense(inputs, num_classes, dtype=jnp.float32, rngs=rngs, **options)


class PooledLinear(nnx.Module):
    """The usual head: global average pooling, dropout, one linear layer."""

    def __init__(self, channels: int, num_classes: int, dropout: float, rngs: nnx.Rngs):
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.linear = logits_layer(channels, num_classes, rngs)

    def condense(self, x: jax.Array) -> jax.Array:
        """[B, h, w, C] -> [B, 1, 1, C], all that this head needs of its input."""
        return x.mean(axis=(1, 2), keepdims=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, C] -> [B, K]."""
        return self.linear(self.dropout(global_average_pool(x)))
