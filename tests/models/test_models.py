import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from errors import UserError
from models import MODELS, create_model
from models.classifier import merge_model, set_mode, split_model
from models.layers import convolve, max_pool_2x2

# Trainable parameters with 6 classes at 32 pixels, counted by hand.
PARAMETERS = {
    "linear": 32 * 32 * 3 * 6 + 6,
    "knn": 0,
    "mlp": 32 * 32 * 3 * 256 + 256 + 256 * 6 + 6,
    "cnn": (27 * 32 + 32) + (288 * 64 + 64) + (8 * 8 * 64 * 128 + 128) + (128 * 6 + 6),
    "cnn_deep": sum(
        9 * a * b + 2 * b
        for a, b in ((3, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256))  # noqa: E501
    )
    + (256 * 256 + 256)
    + (256 * 6 + 6),
}  # fmt: skip
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)


def build(name, **fields):
    model = create_model(name, 6, image_size=32, **fields)
    if not model.trained_by_gradient:
        labels = np.array([0, 1, 2, 3])
        model.fit((IMAGES, labels), (IMAGES, labels), batch_size=2)
    set_mode(model, training=False)
    return model


def test_the_table_of_parameters_covers_every_model():
    assert set(PARAMETERS) == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_parameter_count(name):
    params = split_model(build(name))[1]
    assert sum(p.size for p in params.values()) == PARAMETERS[name]
    assert all(path.startswith("stages.") for path in params)


@pytest.mark.parametrize("name", MODELS)
def test_contract(name):
    model = build(name)
    images = model.preprocess(IMAGES)
    assert images.shape == (4, 32, 32, 3) and images.dtype == jnp.float32
    features = model.features(images)
    assert features.ndim == 4 and len(features) == 4
    logits = model(images)
    assert logits.shape == (4, 6) and logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, model.classify(features))
    shift = create_model(name, 6, image_size=32).preprocessing
    expected = (IMAGES / 255 - np.array(shift.mean)) / np.array(shift.std)
    np.testing.assert_allclose(images, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in MODELS if MODELS[n].trained_by_gradient])
def test_every_parameter_receives_a_gradient(name):
    model = build(name)
    _, params, stats = split_model(model)
    if name == "linear":
        assert not any(p.any() for p in params.values())  # starts at zero
    set_mode(model, training=True)

    @jax.jit
    @jax.grad
    def gradient(params):
        merged = merge_model(model, params, stats, jax.random.key(0))
        logits = merged(merged.preprocess(IMAGES))
        return (logits * jnp.arange(6.0)).sum() ** 2 + logits[:, 0].sum()

    gradient = gradient(params)
    dead = [path for path, g in gradient.items() if not jnp.abs(g).max() > 0]
    assert not dead


@pytest.mark.parametrize("name", [n for n in MODELS if MODELS[n].trained_by_gradient])
def test_bfloat16_computes_near_float32_and_keeps_float32_parameters(name):
    exact, rough = build(name, seed=1), build(name, seed=1, dtype="bfloat16")
    assert all(p.dtype == jnp.float32 for p in split_model(rough)[1].values())
    a, b = (model(model.preprocess(IMAGES)) for model in (exact, rough))
    assert b.dtype == jnp.float32
    np.testing.assert_allclose(a, b, atol=0.05 * max(1, float(jnp.abs(a).max())))


def test_seeds_decide_the_initialisation():
    first, again, other = (split_model(build("cnn", seed=s))[1] for s in (0, 0, 1))
    path = "stages.0.layers.0.kernel"
    assert np.array_equal(first[path], again[path]) and not np.array_equal(first[path], other[path])


@pytest.mark.parametrize("name", ["mlp", "cnn", "cnn_deep"])
def test_dropout_acts_in_training_only_and_follows_its_key(name):
    model = build(name, dropout=0.5)
    _, params, stats = split_model(model)
    images = model.preprocess(IMAGES)

    def logits(key):
        return merge_model(model, params, stats, key)(images)

    keys = jax.random.split(jax.random.key(0))
    assert np.array_equal(logits(keys[0]), logits(keys[1]))
    set_mode(model, training=True)
    assert np.array_equal(logits(keys[0]), logits(keys[0]))
    assert not np.allclose(logits(keys[0]), logits(keys[1]))


def test_batch_norm_moves_its_statistics_in_training_only():
    model = build("cnn_deep")
    _, params, stats = split_model(model)
    for training in (False, True):
        set_mode(model, training=training)
        merged = merge_model(model, params, stats, jax.random.key(0))
        merged(merged.preprocess(IMAGES))
        moved = [
            path for path, s in split_model(merged)[2].items() if not np.array_equal(s, stats[path])
        ]
        assert len(moved) == (16 if training else 0)


def test_max_pool_equals_flax():
    for size in (8, 9):
        x = jax.random.normal(jax.random.key(0), (2, size, size, 3))
        np.testing.assert_array_equal(max_pool_2x2(x), nnx.max_pool(x, (2, 2), (2, 2)))


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize(
    ("size", "channels", "side", "strides", "padding"),
    [
        (9, 3, 3, (1, 1), "SAME"),
        (9, 3, 5, (2, 2), "SAME"),
        (4, 7, 3, (1, 1), "VALID"),
        (2, 8, 3, (1, 1), "SAME"),
        (3, 8, 1, (1, 1), "SAME"),
        (7, 8, 3, (2, 2), [(1, 1), (0, 2)]),
        (12, 8, 3, (1, 1), "SAME"),
    ],
)
def test_both_lowerings_of_a_convolution_agree(
    monkeypatch, backend, size, channels, side, strides, padding
):
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (2, size, size, channels))
    kernel = jax.random.normal(keys[1], (side, side, channels, 5))
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    monkeypatch.setattr(jax, "default_backend", lambda: backend)

    def both(function):
        loss = lambda x, k: (function(x, k, strides, padding, **options) ** 2).sum()  # noqa: E731
        return function(x, kernel, strides, padding, **options), *jax.grad(loss, (0, 1))(x, kernel)

    for ours, theirs in zip(both(convolve), both(jax.lax.conv_general_dilated), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def test_grouped_and_dilated_convolutions_pass_through():
    x, kernel = jnp.ones((1, 3, 3, 4)), jnp.ones((3, 3, 1, 4))
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": 4}
    assert convolve(x, kernel, (1, 1), "SAME", **options)[0, 1, 1].tolist() == [9.0] * 4


@pytest.mark.parametrize(("metric", "theirs"), [("l1", "manhattan"), ("l2", "euclidean")])
def test_knn_agrees_with_scikit_learn(metric, theirs):
    digits = load_digits()
    images = np.repeat(np.round(digits.images * 255 / 16).astype(np.uint8)[..., None], 3, axis=3)
    parts = np.split(np.random.default_rng(0).permutation(len(images)), [1000, 1300])
    train, validation, test = ((images[p], digits.target[p]) for p in parts)
    model = create_model("knn", 10, image_size=8, metric=metric, max_k=9)
    by_k = model.fit(train, validation, batch_size=128)
    flat = lambda part: part[0].reshape(len(part[0]), -1).astype(float)  # noqa: E731
    for k in (1, 4, 9):
        reference = KNeighborsClassifier(k, metric=theirs).fit(flat(train), train[1])
        assert abs(by_k[k] - reference.score(flat(validation), validation[1])) <= 1 / 300  # ties
    k = int(model.stages[-1].k[...])
    assert by_k[k] == max(by_k.values())
    assert all(by_k[smaller] < by_k[k] for smaller in range(1, k))
    reference = KNeighborsClassifier(k, metric=theirs).fit(flat(train), train[1])
    logits = np.asarray(model(model.preprocess(test[0])))
    assert (logits.argmax(axis=1) != reference.predict(flat(test))).sum() <= 1
    shares = reference.predict_proba(flat(test))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert (np.abs(probabilities - shares).max(axis=1) > 0.02).sum() <= 2
    assert model.flops_per_image() == 1000 * 192 * (3 if metric == "l1" else 2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cmn", {}, "Did you mean 'cnn'"),
        ("cnn_deep", {"image_size": 8}, "at least 16 pixels"),
        ("cnn", {"droput": 0.5}, "no field 'droput'; it has dropout"),
        ("cnn", {"weights": "timm/x"}, "no pretrained weights"),
        ("cnn", {"dropout": 2.0}, "dropout=2.0 is out of range"),
        ("mlp", {"hidden": (0,)}, "widths of at least 1"),
        ("knn", {"metric": "l3"}, "l1, l2"),
        ("knn", {"max_k": 0}, "max_k"),
    ],
)
def test_mistakes_are_named(name, options, message):
    with pytest.raises(UserError, match=message):
        create_model(name, 6, **options)
    with pytest.raises(UserError, match="at least two classes"):
        create_model("cnn", 1)
