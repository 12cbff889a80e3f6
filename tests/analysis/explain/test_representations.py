import math
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.signal import correlate

from analysis.explain import representations
from analysis.forward import load_classifier, load_test_images
from errors import UserError
from models import create_model
from models.classifier import in_mode
from models.vit import VisionTransformer
from tests.analysis.conftest import words


@pytest.fixture(scope="module")
def cnn(digits_groups):
    return load_classifier(digits_groups["cnn"][0])


@pytest.fixture(scope="module")
def photos(digits_groups):
    return load_test_images(digits_groups["cnn"][0])


class TinyVit(VisionTransformer):
    width, heads, depth = 8, 2, 1


@pytest.fixture(scope="module")
def vit():
    """A vision transformer of ones: compiling its random weights takes seconds."""
    shapes = nnx.eval_shape(lambda: TinyVit(4, 32, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    graph, keys, arrays = nnx.split(shapes, nnx.RngState, ...)
    ones = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), arrays)
    return in_mode(nnx.merge(graph, keys, ones), training=False)


# --- similarity of representations ----------------------------------------------------------------


def hsic(k, l):  # noqa: E741
    """Unbiased estimator of Song et al. 2012, equation 5, from its sums."""
    n = len(k)
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    one = np.ones(n)
    middle = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ l) + middle - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))


def cka(x, y) -> float:
    return np.vdot(representations.centred_gram(x), representations.centred_gram(y))


@pytest.mark.parametrize("widths", [(5, 7), (60, 3), (90, 200)])
def test_cka_is_that_of_its_definition(widths):
    draw = np.random.default_rng(0)
    x = draw.normal(3, 2, size=(30, widths[0]))
    y = np.tanh(x @ draw.normal(size=widths)) + draw.normal(size=(30, widths[1]))
    k, l = x @ x.T, y @ y.T  # noqa: E741
    expected = hsic(k, l) / math.sqrt(hsic(k, k) * hsic(l, l))
    assert cka(x, y) == pytest.approx(expected, abs=1e-12)


def test_cka_ignores_rotation_scale_and_shift():
    draw = np.random.default_rng(1)
    x, y = draw.normal(size=(40, 12)), draw.normal(size=(40, 6))
    y[:, 0] += x[:, 0]
    rotation = np.linalg.qr(draw.normal(size=(12, 12)))[0]
    value = cka(x, y)
    assert cka(-7 * x @ rotation + 100, 0.01 * y) == pytest.approx(value)
    stretched = x * np.linspace(1, 9, 12)  # not isotropic
    assert abs(cka(stretched, y) - value) > 0.01
    assert cka(x, x @ rotation) == pytest.approx(1)


def test_cka_of_unrelated_features_is_zero():
    draw = np.random.default_rng(2)
    pairs = [draw.normal(size=(2, 50, 500)) for _ in range(20)]
    values = [cka(x, y) for x, y in pairs]
    assert abs(np.mean(values)) < 0.02 and np.max(np.abs(values)) < 0.1


def test_features_that_say_nothing_have_no_similarity():
    x = np.random.default_rng(3).normal(size=(10, 4))
    assert math.isnan(cka(x, np.ones((10, 3))))
    with pytest.raises(UserError, match="need 4"):
        cka(x[:3], x[:3])


def test_models_are_compared_on_the_same_images(digits_groups, cnn, photos):
    found = representations.compare_representations(digits_groups, images=24)
    assert sorted(found.labels) == ["cnn", "pixels"] and found.images == 24
    rows = np.linspace(0, len(photos) - 1, 24).round().astype(int)
    features = []
    for run in digits_groups["cnn"]:
        model = load_classifier(run)
        maps = model.features(model.preprocess(jnp.asarray(photos[rows])))
        features.append(np.asarray(maps).mean(axis=(1, 2)))
    i, j = found.labels.index("cnn"), found.labels.index("pixels")
    assert found.matrix[i, i] == pytest.approx(cka(*features), abs=1e-4)
    between = cka(features[0], photos[rows].reshape(24, -1))
    assert found.matrix[i, j] == found.matrix[j, i] == pytest.approx(between, abs=1e-4)
    assert math.isnan(found.matrix[j, j])
    shown = set(words(representations.draw_similarity(found)))
    assert {"cnn", "pixels", "–", f"{between:.2f}"} <= shown
    pair = " and ".join(found.labels)
    assert f"{pair} ({between:.2f})" in representations.describe(found)


def test_runs_on_other_images_are_left_out(digits_groups):
    run = digits_groups["cnn"][0]
    other = SimpleNamespace(test={"ids": run.test["ids"][::-1]})
    found = representations.compare_representations({"cnn": [run], "other": [other]})
    assert found.labels == ["cnn"] and found.left_out == ["other"]
    text = representations.describe(found)
    assert text == "Left out, as they were tested on other images: other."


def test_filters_are_the_first_kernel(cnn, monkeypatch):
    filters = representations.first_filters(cnn)
    kernel = np.asarray(cnn.stages[0].layers[0].kernel[...])  # [3, 3, 3, 32]
    assert filters.shape == (32, 3, 3, 3)
    np.testing.assert_array_equal(filters[5, 1, 2], kernel[1, 2, :, 5])
    monkeypatch.setattr(cnn, "preprocessing", replace(cnn.preprocessing, channels="bgr"))
    swapped = representations.first_filters(cnn)
    np.testing.assert_array_equal(swapped[5, 1, 2], kernel[1, 2, ::-1, 5])


def test_templates_of_a_linear_model_explain_its_logits(digits_groups, photos):
    model = load_classifier(digits_groups["linear"][0])
    assert representations.has_one_layer(model)
    templates = representations.first_filters(model)
    assert templates.shape == (10, 8, 8, 3)
    x = model.preprocess(jnp.asarray(photos[:2]))
    change = np.asarray(model(x) - model(jnp.zeros_like(x)))
    np.testing.assert_allclose(
        np.einsum("nhwc,khwc->nk", np.asarray(x), templates), change, atol=1e-4
    )


def test_other_first_layers(digits_groups, vit):
    mlp = create_model("mlp", 4, image_size=8, hidden=(70,))
    assert representations.first_filters(mlp).shape == (70, 8, 8, 3)
    assert not representations.has_one_layer(mlp)
    assert representations.first_filters(vit).shape == (8, 16, 16, 3)
    with pytest.raises(UserError, match="no weights on the image"):
        representations.first_filters(load_classifier(digits_groups["knn"][0]))


def test_the_strongest_filters_keep_their_order():
    filters = np.ones((5, 2, 2, 3)) * np.array([1, -5, 2, 4, 0])[:, None, None, None]
    assert representations.strongest(filters, 3)[:, 0, 0, 0].tolist() == [-5, 2, 4]
    assert len(representations.strongest(np.ones((200, 1, 1, 3)))) == 64


def test_feature_maps_are_the_convolution_written_out(cnn, photos):
    maps = representations.feature_maps(cnn, photos[3], 0)
    assert maps.shape == (4, 4, 32)
    kernel = np.asarray(cnn.stages[0].layers[0].kernel[...])
    bias = np.asarray(cnn.stages[0].layers[0].bias[...])
    x = np.pad(np.asarray(cnn.preprocess(photos[3])), ((1, 1), (1, 1), (0, 0)))
    for channel in (0, 31):
        y = correlate(x, kernel[..., channel], mode="valid")[..., 0] + bias[channel]
        pooled = np.maximum(y, 0).reshape(4, 2, 4, 2).max(axis=(1, 3))
        np.testing.assert_allclose(maps[..., channel], pooled, atol=1e-5)


def test_stages_without_maps_are_named(cnn, vit, photos):
    assert representations.map_shapes(cnn, 8) == {0: (4, 4, 32), 1: (2, 2, 64)}
    assert representations.telling_stage(cnn, 8) == 0
    with pytest.raises(UserError, match="stage 2 of this Cnn .* those that do: 0, 1"):
        representations.feature_maps(cnn, photos[0], 2)
    assert representations.telling_stage(vit, 32) is None  # its stages return tokens
