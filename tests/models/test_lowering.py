"""Both lowerings of convolution and pooling compute the same, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import lowering
from models.lowering import convolve, linear_product, max_pool_2x2, max_pool_3x3, plain_lowering

RNG = np.random.default_rng(0)


def random(*shape):
    return jnp.asarray(RNG.standard_normal(shape, np.float32))


def with_gradients(function, *arguments):
    """Returns a function's value and the gradient of its sum of squares by each argument."""
    loss = lambda *a: (function(*a) ** 2).sum()  # noqa: E731
    return function(*arguments), *jax.grad(loss, range(len(arguments)))(*arguments)


# --- pooling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("size", [8, 9])
def test_max_pool_2x2_equals_flax(monkeypatch, backend, size):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x = random(2, size, size, 3)
    theirs = lambda x: nnx.max_pool(x, (2, 2), (2, 2))  # noqa: E731
    for ours, expected in zip(
        with_gradients(max_pool_2x2, x), with_gradients(theirs, x), strict=True
    ):
        np.testing.assert_array_equal(ours, expected)


def test_equals_share_the_gradient_of_a_pool():
    x = jnp.array([1.0, 1, 0, 1]).reshape(1, 2, 2, 1)
    gradient = jax.grad(lambda x: max_pool_2x2(x).sum())(x)
    np.testing.assert_allclose(gradient.ravel(), [1 / 3, 1 / 3, 0, 1 / 3], rtol=1e-6)


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
        # kernel gradients row by row, of the columns in turn (up to 64 channels) or gathered
        (9, 6, 1, 3, (1, 1), "SAME"),
        (8, 6, 1, 3, (1, 1), [(0, 2), (1, 1)]),
        (7, 6, 1, 2, (1, 1), "SAME"),
        (6, 70, 1, 3, (1, 1), "SAME"),
        (13, 6, 1, 3, (2, 1), "VALID"),
        (13, 6, 1, 5, (1, 2), [(2, 1), (0, 3)]),
        (5, 6, 1, 3, (1, 1), "SAME"),
        (9, 8, 8, 3, (1, 2), [(1, 0), (2, 1)]),
        (9, 8, 8, 3, (1, 1), [(3, 3), (0, 0)]),
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


@pytest.mark.parametrize("limit", [1, 1000, 3000])
@pytest.mark.parametrize("channels", [3, 6, 70])
@pytest.mark.parametrize("depthwise", [False, True])
def test_a_kernel_gradient_in_any_blocks_is_the_same(monkeypatch, limit, channels, depthwise):
    """Of some rows of an image, of one image, or of several at once."""
    monkeypatch.setattr(lowering, "GATHERED_BYTES", limit)
    monkeypatch.setattr(lowering, "SUMS_BYTES", limit)
    x, kernel = random(4, 8, 6, channels), random(3, 3, 1 if depthwise else channels, channels)
    groups = {"feature_group_count": channels if depthwise else 1}
    ours = jax.grad(lambda k: (convolve(x, k, (1, 1), "SAME", **groups) ** 2).sum())(kernel)
    with plain_lowering():
        options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), **groups}
        theirs = jax.grad(lambda k: (convolve(x, k, (1, 1), "SAME", **options) ** 2).sum())(kernel)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("channels", "groups", "side"), [(3, 1, 3), (6, 1, 3), (8, 8, 3), (8, 1, 1)]
)
def test_gradients_of_bfloat16_are_as_exact_as_it_is(channels, groups, side):
    x = random(2, 9, 9, channels).astype(jnp.bfloat16)
    kernel = random(side, side, channels // groups, 8).astype(jnp.bfloat16)
    options = {"feature_group_count": groups, "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    weight = random(2, 9, 9, 8)

    def loss(x, kernel):
        return (convolve(x, kernel, (1, 1), "SAME", **options) * weight).sum()

    ours = jax.grad(loss, (0, 1))(x, kernel)
    exact = jax.grad(loss, (0, 1))(x.astype(jnp.float32), kernel.astype(jnp.float32))
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        scale = float(jnp.abs(b).max())
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.02 * scale)


@pytest.mark.parametrize("switch", ["context", "environment"])
def test_one_switch_leaves_everything_to_xla(monkeypatch, switch):
    arguments = random(2, 9, 9, 8), random(3, 3, 1, 8), random(5, 8), random(8, 3)

    def everything(x, depthwise, y, kernel):
        x = convolve(x, depthwise, (1, 1), "SAME", 8, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return max_pool_3x3(x), linear_product(y, kernel, (((1,), (0,)), ((), ())))

    names = lambda: str(jax.make_jaxpr(lambda *a: everything(*a))(*arguments))  # noqa: E731
    assert "custom_vjp" in names() and "conv_general_dilated" not in names()
    if switch == "context":
        with plain_lowering():
            plain = names()
    else:
        monkeypatch.setenv("ARCHCOMPARE_LOWERING", "plain")
        plain = names()
    assert "custom_vjp" not in plain and "conv_general_dilated" in plain
    assert "reduce_window_max" in plain


@pytest.mark.parametrize("rows", [4, 600])
@pytest.mark.parametrize(("inputs", "outputs"), [(5, 7), (7, 5)])
def test_linear_product_equals_dot_general(rows, inputs, outputs):
    x, kernel = random(rows // 2, 2, inputs), random(inputs, outputs)
    dimensions = (((2,), (0,)), ((), ()))
    ours = with_gradients(lambda x, k: linear_product(x, k, dimensions), x, kernel)
    theirs = with_gradients(lambda x, k: jax.lax.dot_general(x, k, dimensions), x, kernel)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_dilated_convolutions_pass_through():
    x, kernel = jnp.ones((1, 5, 5, 2)), jnp.ones((3, 3, 2, 1))
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "rhs_dilation": (2, 2)}
    assert convolve(x, kernel, (1, 1), "VALID", **options).tolist() == [[[[18.0]]]]
