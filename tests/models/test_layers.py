"""Layers against plain definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.layers import BatchNorm, SqueezeExcite, adaptive_average_pool, stochastic_depth

RNG = np.random.default_rng(0)


def random(*shape):
    return jnp.asarray(RNG.standard_normal(shape, np.float32))


@pytest.mark.parametrize("size", [5, 7, 8, 10, 14])
def test_adaptive_average_pool_equals_a_loop_over_windows(size):
    """As PyTorch defines it: window i reaches from floor(i n / 7) to ceil((i + 1) n / 7)."""
    x = random(2, size, size + 1, 3)
    height, width = x.shape[1:3]
    expected = np.zeros((2, 7, 7, 3), np.float32)
    for i in range(7):
        for j in range(7):
            rows = slice(i * height // 7, -(-(i + 1) * height // 7))
            columns = slice(j * width // 7, -(-(j + 1) * width // 7))
            expected[:, i, j] = np.asarray(x)[:, rows, columns].mean(axis=(1, 2))
    np.testing.assert_allclose(adaptive_average_pool(x, 7), expected, rtol=1e-5, atol=1e-6)
    same = random(1, 7, 7, 2)
    np.testing.assert_array_equal(adaptive_average_pool(same, 7), same)


def test_batch_norm_shows_its_input_to_whoever_asks():
    norm = BatchNorm(3, momentum=0.9, use_running_average=True, rngs=nnx.Rngs(0))
    x, seen = random(4, 5, 5, 3), []
    plain = norm(x)
    norm.observe = seen.append
    np.testing.assert_array_equal(norm(x), plain)
    assert len(seen) == 1 and np.array_equal(seen[0], x)


def test_squeeze_excite_gates_channels_by_their_means():
    layer = SqueezeExcite(4, 2, dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer.reduce.bias[...], layer.expand.bias[...] = random(2), random(4)
    x = random(3, 5, 5, 4)
    means = np.asarray(x).mean(axis=(1, 2))
    hidden = jax.nn.silu(means @ layer.reduce.kernel[0, 0] + layer.reduce.bias[...])
    gate = 1 / (1 + np.exp(-(hidden @ layer.expand.kernel[0, 0] + layer.expand.bias[...])))
    np.testing.assert_allclose(layer(x), x * gate[:, None, None], rtol=1e-4, atol=1e-5)


def test_stochastic_depth_drops_whole_images_and_keeps_the_mean():
    layer = stochastic_depth(0.25, nnx.Rngs(dropout=0))
    x = 1 + jnp.abs(random(4000, 2, 2, 3))
    layer.set_attributes(deterministic=True)
    np.testing.assert_array_equal(layer(x), x)
    layer.set_attributes(deterministic=False)
    ratio = np.asarray(layer(x) / x).reshape(4000, -1)
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1], ratio.shape), rtol=1e-6)
    np.testing.assert_allclose(np.unique(ratio[:, 0].round(5)), [0, 1.33333], rtol=1e-5)
    assert abs(ratio.mean() - 1) < 0.04
