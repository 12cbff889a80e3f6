"""Both lowerings of convolution and pooling compute the same, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.lowering import convolve, max_pool_2x2, max_pool_3x3

RNG = np.random.default_rng(0)


def random(*shape):
    return jnp.asarray(RNG.standard_normal(shape, np.float32))


def with_gradients(function, *arguments):
    """Returns a function's value and the gradient of its sum of squares by each argument."""
    loss = lambda *a: (function(*a) ** 2).sum()  # noqa: E731
    return function(*arguments), *jax.grad(loss, range(len(arguments)))(*arguments)


# --- pooling ------------------------------------------------------------------------------------


def test_max_pool_2x2_equals_flax():
    for size in (8, 9):
        x = random(2, size, size, 3)
        np.testing.assert_array_equal(max_pool_2x2(x), nnx.max_pool(x, (2, 2), (2, 2)))


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 2)])
def test_max_pool_3x3_equals_flax(monkeypatch, backend, size):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x = random(2, *size, 3)
    theirs = lambda x: nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))  # noqa: E731
    for ours, expected in zip(
        with_gradients(max_pool_3x3, x), with_gradients(theirs, x), strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


# --- convolution --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize(
    ("size", "channels", "groups", "side", "strides", "padding"),
    [
        # few channels or few places
        (9, 3, 1, 3, (1, 1), "SAME"),
        (9, 3, 1, 5, (2, 2), "SAME"),
        (4, 7, 1, 3, (1, 1), "VALID"),
        (2, 8, 1, 3, (1, 1), "SAME"),
        (7, 8, 1, 3, (2, 2), [(1, 1), (0, 2)]),
        (12, 8, 1, 3, (1, 1), "SAME"),
        # 1x1
        (3, 8, 1, 1, (1, 1), "SAME"),
        (9, 8, 1, 1, (1, 1), [(0, 0), (0, 0)]),
        (9, 8, 1, 1, (2, 2), "SAME"),
        (8, 8, 1, 1, (2, 2), [(0, 0), (0, 0)]),
        # depthwise
        (9, 8, 8, 3, (1, 1), "SAME"),
        (9, 8, 8, 3, (2, 2), "SAME"),
        (8, 8, 8, 3, (2, 2), "SAME"),
        (8, 8, 8, 5, (2, 2), [(2, 2), (2, 2)]),
        (9, 8, 8, 5, (1, 1), [(2, 2), (2, 2)]),
        (2, 8, 8, 5, (2, 2), "SAME"),
        # groups that are neither
        (9, 8, 2, 3, (1, 1), "SAME"),
    ],
)
def test_both_lowerings_of_a_convolution_agree(
    monkeypatch, backend, size, channels, groups, side, strides, padding
):
    x = random(2, size, size, channels)
    kernel = random(side, side, channels // groups, channels if groups > 1 else 5)
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": groups}
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    ours, theirs = (
        jax.jit(
            lambda x, k, f=function: with_gradients(
                lambda *a: f(*a, strides, padding, **options), x, k
            )
        )(x, kernel)
        for function in (convolve, jax.lax.conv_general_dilated)
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_dilated_convolutions_pass_through():
    x, kernel = jnp.ones((1, 5, 5, 2)), jnp.ones((3, 3, 2, 1))
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "rhs_dilation": (2, 2)}
    assert convolve(x, kernel, (1, 1), "VALID", **options).tolist() == [[[[18.0]]]]
