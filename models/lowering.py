"""Convolution, pooling and products by the lowering that is fast on the backend.

Results are the same to rounding. ARCHCOMPARE_LOWERING=plain leaves all of it to XLA, as everything
but the CPU does; docs/performance.md has the measurements.
"""

import functools
import itertools
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial

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
    plain = _plain.get() or os.environ.get("ARCHCOMPARE_LOWERING") == "plain"
    return jax.default_backend() == "cpu" and not plain


def max_pool_2x2(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H // 2, W // 2, C]; an odd last row or column is dropped.

    By reshape: on a CPU its gradient is far cheaper than that of `reduce_window`.
    """
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return _largest_of_four(x) if _on_cpu() else x.max(axis=(2, 4))


@jax.custom_vjp
def _largest_of_four(x: jax.Array) -> jax.Array:
    """[B, h, 2, w, 2, C] -> [B, h, w, C]."""
    return x.max(axis=(2, 4))


def _largest_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    """Divides a gradient among equals, as JAX does, but counts them without a reduction.

    The largest is found anew: compared with one that another program computed, none might be equal.
    """
    four = [x[:, :, i, :, j] for i in range(2) for j in range(2)]
    largest = functools.reduce(jnp.maximum, four)
    count = sum((part == largest).astype(gradient.dtype) for part in four)
    spread = (slice(None), slice(None), None, slice(None), None)
    return (jnp.where(x == largest[spread], (gradient / jnp.maximum(count, 1))[spread], 0),)


_largest_of_four.defvjp(lambda x: (_largest_of_four(x), x), _largest_backward)


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


# --- convolution --------------------------------------------------------------------------------

GATHERED_BYTES = 2 * 2**20  # by a step of a kernel gradient: it should stay in the cache
SUMS_BYTES = 2**20  # likewise, by its sums where the convolution is depthwise
FEW = 4  # channels, as an image has


@dataclass(frozen=True)
class Shape:
    """Of a convolution: sides of the kernel, strides, padding (low, high), rows and columns out."""

    sides: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    out: tuple[int, int]
    depthwise: bool

    @property
    def places(self) -> list[tuple[int, int]]:
        """Of the kernel."""
        return list(itertools.product(*map(range, self.sides)))

    def pad(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> padded."""
        return jnp.pad(x, ((0, 0), *self.padding, (0, 0)))

    def part(self, x: jax.Array, i: int, j: int, rows: int | None = None) -> jax.Array:
        """Returns what place (i, j) of the kernel sees: padded [..., H, W, C] -> [..., h, w, C]."""
        (down, across), (height, width) = self.strides, (rows or self.out[0], self.out[1])
        rows = slice(i, i + (height - 1) * down + 1, down)
        return x[..., rows, j : j + (width - 1) * across + 1 : across, :]


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: str | list[tuple[int, int]],
    feature_group_count: int = 1,
    **options,
) -> jax.Array:
    """[B, H, W, C], [kh, kw, C / groups, O] -> [B, h, w, O], by the lowerings that are fast here.

    On a CPU forward, input gradient and kernel gradient each have their own: see
    docs/performance.md. Elsewhere this is `jax.lax.conv_general_dilated`, whose arguments it takes.
    """
    sides = kernel.shape[:2]
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], sides, strides, padding)
    depthwise = feature_group_count == x.shape[-1] == kernel.shape[-1]
    dilated = any(set(options.get(f"{s}_dilation") or (1,)) != {1} for s in ("lhs", "rhs"))
    if not _on_cpu() or dilated or not (depthwise or feature_group_count == 1):
        options["feature_group_count"] = feature_group_count
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    out = tuple(
        (length + low + high - k) // stride + 1
        for length, (low, high), k, stride in zip(
            x.shape[1:3], padding, sides, strides, strict=True
        )
    )
    shape = Shape(sides, tuple(strides), tuple(map(tuple, padding)), out, depthwise)
    return _convolve(x, kernel, shape)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(x: jax.Array, kernel: jax.Array, shape: Shape) -> jax.Array:
    if shape.depthwise:  # XLA's own takes 10 to 45 times as long
        x = shape.pad(x)
        return sum(shape.part(x, i, j) * kernel[i, j, 0] for i, j in shape.places)
    if shape.sides == (1, 1) or math.prod(shape.out) <= 16:
        product = matmul(_patches(shape, x), kernel.reshape(-1, kernel.shape[-1]))
        return product.reshape(len(x), *shape.out, -1)
    return _xla_convolve(x, kernel, shape)


def _xla_convolve(x: jax.Array, kernel: jax.Array, shape: Shape) -> jax.Array:
    if x.shape[-1] == 3 and kernel.shape[-1] <= 32:  # four times as fast with an empty channel
        x, kernel = (
            jnp.pad(a, [(0, i == at) for i in range(4)]) for a, at in ((x, 3), (kernel, 2))
        )
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, shape.strides, shape.padding, dimension_numbers=layout
    )


def _patches(shape: Shape, x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B * h * w, kh * kw * C], what each place of the output sees."""
    x = shape.pad(x)
    parts = [shape.part(x, i, j) for i, j in shape.places]
    return jnp.concatenate(parts, axis=-1).reshape(-1, len(parts) * x.shape[-1])


def _forward(x: jax.Array, kernel: jax.Array, shape: Shape) -> tuple[jax.Array, tuple]:
    return _convolve(x, kernel, shape), (x, kernel)


def _backward(shape: Shape, arrays: tuple, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = arrays
    places, by_input = math.prod(shape.out), _input_gradient(shape, x, kernel, gradient)
    if jax.device_count() > 1:  # images lie on several devices: none may ask for all of them
        by_kernel = _by(lambda k: _convolve.fun(x, k, shape), kernel, gradient)
    elif shape.depthwise:
        by_kernel = _depthwise_kernel_gradient(shape, x, gradient)
    elif shape.sides == (1, 1) or places <= 16:
        flat = gradient.reshape(-1, gradient.shape[-1])
        by_kernel = transposed_matmul(_patches(shape, x), flat).reshape(kernel.shape)
    elif places <= 32:
        by_kernel = _by(lambda k: _xla_convolve(x, k, shape), kernel, gradient)
    else:
        by_kernel = _kernel_gradient(shape, x, gradient)
    return by_input, by_kernel.astype(kernel.dtype)


_convolve.defvjp(_forward, _backward)


def _by(function, argument: jax.Array, gradient: jax.Array) -> jax.Array:
    return jax.vjp(function, argument)[1](gradient)[0]


def _input_gradient(
    shape: Shape, x: jax.Array, kernel: jax.Array, gradient: jax.Array
) -> jax.Array:
    """A depthwise one of stride 1 is itself a depthwise convolution, by the kernel turned round."""
    margins = [
        tuple(k - 1 - margin for margin in edges)
        for k, edges in zip(shape.sides, shape.padding, strict=True)
    ]
    if shape.depthwise and shape.strides == (1, 1) and min(min(edges) for edges in margins) >= 0:
        turned = replace(shape, padding=tuple(margins), out=x.shape[1:3])
        return _convolve(gradient, kernel[::-1, ::-1], turned)
    return _by(lambda x: _convolve.fun(x, kernel, shape), x, gradient)


def _kernel_gradient(shape: Shape, x: jax.Array, gradient: jax.Array) -> jax.Array:
    """[B, H, W, C], [B, h, w, O] -> float32 [kh, kw, C, O], some images or rows at a time.

    What a row of the kernel sees is gathered and multiplied while it is in the processor's cache;
    XLA's own takes 1.2 to 4 times as long.
    """
    channels, outputs = x.shape[-1], gradient.shape[-1]
    (height, width), down, (side, wide) = shape.out, shape.strides[0], shape.sides
    groups = 1 if channels <= FEW else side  # few channels: the whole kernel at once
    columns = channels * wide * side // groups
    images, rows = _blocks(len(x), height, 4 * width * columns)
    taken, blocks = (rows - 1) * down + side, height // rows
    x = shape.pad(x)
    if _in_turn(shape, channels):  # columns to a multiple of the kernel's
        missing = ((0, 0), (0, 0), (0, -width % wide), (0, 0))
        x, gradient = jnp.pad(x, missing), jnp.pad(gradient, missing)

    def add(totals: list[jax.Array], step: jax.Array) -> tuple[list[jax.Array], None]:
        image, row = step // blocks * images, step % blocks * rows
        size = (images, taken, *x.shape[2:])
        seen = jax.lax.dynamic_slice(x, (image, row * down, 0, 0), size)
        size = (images, rows, *gradient.shape[2:])
        part = jax.lax.dynamic_slice(gradient, (image, row, 0, 0), size)
        totals = list(totals)
        for group, wider, below in _gathered(shape, seen, part):
            totals[group] += _fast_product(wider.reshape(-1, columns), below.reshape(-1, outputs))
        return totals, None

    empty = jnp.zeros((outputs, columns) if columns > outputs else (columns, outputs))
    steps = jnp.arange(len(x) // images * blocks)
    totals, _ = jax.lax.scan(add, [empty] * groups, steps)
    total = jnp.stack([t.T if columns > outputs else t for t in totals])
    return total.reshape(side, wide, channels, outputs)


def _in_turn(shape: Shape, channels: int) -> bool:
    """Returns whether places are taken in turn, each kw-th column at once: nothing is gathered."""
    return FEW < channels <= 64 and shape.strides[1] == 1 < shape.sides[1]


def _gathered(
    shape: Shape, seen: jax.Array, gradient: jax.Array
) -> Iterator[tuple[int, jax.Array, jax.Array]]:
    """Yields (group of places in the kernel, what they see [..., D], the gradient [..., O])."""
    (images, rows, width), channels = gradient.shape[:3], seen.shape[-1]
    (down, across), (side, wide) = shape.strides, shape.sides
    if channels <= FEW:
        everything = [shape.part(seen, i, j, rows) for i, j in shape.places]
        yield 0, jnp.concatenate(everything, axis=-1), gradient
        return
    if _in_turn(shape, channels):
        by_turn = gradient.reshape(images, rows, width // wide, wide, -1)
        wider = [
            (seen[:, :, j : j + width].reshape(images, -1, width // wide, wide * channels), j)
            for j in range(wide)
        ]
        pairs = [(row, by_turn[:, :, :, j]) for row, j in wider]
    else:
        last = (width - 1) * across + 1
        parts = [seen[:, :, j : j + last : across] for j in range(wide)]
        pairs = [(jnp.concatenate(parts, axis=-1), gradient)]
    for row, below in pairs:
        for i in range(side):
            yield i, row[:, i : i + (rows - 1) * down + 1 : down], below


def _blocks(batch: int, height: int, row_bytes: int) -> tuple[int, int]:
    """Returns how many images, or rows of one where an image is too large, fit into the cache."""
    if height * row_bytes > GATHERED_BYTES:
        rows = _divisor(height, GATHERED_BYTES // row_bytes)
        return 1, rows if rows > 2 else height
    return _divisor(batch, GATHERED_BYTES // (height * row_bytes)), height


def _divisor(number: int, limit: int) -> int:
    """Returns the largest divisor up to a limit, at least 1."""
    return max(n for n in range(1, number + 1) if number % n == 0 and n <= max(limit, 1))


def _depthwise_kernel_gradient(shape: Shape, x: jax.Array, gradient: jax.Array) -> jax.Array:
    """[B, H, W, C], [B, h, w, C] -> float32 [kh, kw, 1, C].

    Products are summed over images and blocks of rows place by place, in sums that stay in the
    processor's cache, and over places at the end: XLA's own sum over both takes 2 to 6 times as
    long.
    """
    channels = x.shape[-1]
    height, width = shape.out
    rows = _divisor(height, SUMS_BYTES // (4 * width * channels * math.prod(shape.sides)))
    x = shape.pad(x)
    down, across = shape.strides
    taken = (rows - 1) * down + shape.sides[0]

    def add(totals: list[jax.Array], step: jax.Array) -> tuple[list[jax.Array], None]:
        image, block = step // (height // rows), step % (height // rows)
        start = (image, block * rows * down, 0, 0)
        seen = jax.lax.dynamic_slice(x, start, (1, taken, *x.shape[2:]))[0]
        start = (image, block * rows, 0, 0)
        part = jax.lax.dynamic_slice(gradient, start, (1, rows, width, channels))[0]
        part = part.astype(jnp.float32)
        if across == 1:  # columns and channels as one axis: longer loops
            seen, part = seen.reshape(taken, -1), part.reshape(rows, -1)
        products = []
        for i, j in shape.places:
            if across == 1:
                below = seen[i : i + (rows - 1) * down + 1 : down]
                products.append(below[:, j * channels : (j + width) * channels] * part)
            else:
                products.append(shape.part(seen, i, j, rows) * part)
        return [a + b for a, b in zip(totals, products, strict=True)], None

    empty = jnp.zeros((rows, width * channels) if across == 1 else (rows, width, channels))
    totals, _ = jax.lax.scan(
        add, [empty] * len(shape.places), jnp.arange(len(x) * (height // rows))
    )
    sums = [total.reshape(-1, channels).sum(axis=0) for total in totals]
    return jnp.stack(sums).reshape(*shape.sides, 1, channels)


# --- matrix products ----------------------------------------------------------------------------


def linear_product(x: jax.Array, kernel: jax.Array, dimensions: tuple, **options) -> jax.Array:
    """[..., D], [D, O] -> [..., O]; takes the arguments of `jax.lax.dot_general`."""
    if not _on_cpu():
        return jax.lax.dot_general(x, kernel, dimensions, **options)
    return matmul(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[N, D], [D, O] -> [N, O]; the gradient by the kernel is turned if that is faster on a CPU."""
    return x @ kernel


def _matmul_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple]:
    return x @ kernel, (x, kernel)


def _matmul_backward(arrays: tuple, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = arrays
    return gradient @ kernel.T, transposed_matmul(x, gradient).astype(kernel.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


def transposed_matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """[N, D], [N, O] -> x.T @ y, float32 [D, O]."""
    if x.shape[1] <= y.shape[1] or len(x) < 512:  # of few rows, turning costs more than it saves
        return jnp.matmul(x.T, y, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(_fast_product(x, y)).T


def _fast_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """[N, D], [N, O] -> x.T @ y or its transpose, whichever has more columns than rows.

    On a CPU the other one takes up to three times as long.
    """
    first, second = (y, x) if x.shape[1] > y.shape[1] else (x, y)
    return jnp.matmul(first.T, second, preferred_element_type=jnp.float32)
