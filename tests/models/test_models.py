"""Every architecture keeps the contract of `models/classifier.py`."""

import functools
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from errors import UserError
from models import MODELS, create_model
from models.classifier import Classifier, in_mode, merge_model, split_model
from tests.models.filled import filled, unfilled

# Per architecture the trainable parameters, and what is switched on in networks that are trained:
# one network at least of every file, with whatever training draws at random. Large ones are trained
# with fewer blocks (whole ones are in weights/test_names.py).
SMALL = {  # with 6 classes at 32 pixels, counted by hand
    "linear": (32 * 32 * 3 * 6 + 6, {}),
    "knn": (0, {}),
    "mlp": (32 * 32 * 3 * 256 + 256 + 256 * 6 + 6, {"dropout": 0.5}),
    "cnn": (
        (27 * 32 + 32) + (288 * 64 + 64) + (8 * 8 * 64 * 128 + 128) + (128 * 6 + 6),
        {"dropout": 0.5},
    ),
    "cnn_deep": (
        sum(
            9 * a * b + 2 * b
            for a, b in ((3, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256))
        )
        + (256 * 256 + 256)
        + (256 * 6 + 6),
        {"dropout": 0.5},
    ),
}  # fmt: skip
LARGE = {  # with 1,000 classes at 224 pixels, as timm counts them
    "vgg16": (138_357_544, {"hidden": 32, "dropout": 0.2}),
    "vgg16_bn": (138_365_992,),
    "vgg19": (143_667_240,),
    "resnet18": (11_689_512, {"dropout": 0.2}),
    "resnet34": (21_797_672,),
    "resnet50": (25_557_032, {"dropout": 0.2}, {"form": "keras"}),
    "resnet101": (44_549_160,),
    "resnet152": (60_192_808,),
    "efficientnet_b0": (5_288_548, {"dropout": 0.0, "stochastic_depth": 0.9}),
    "efficientnet_b1": (7_794_184,),
    "efficientnet_b2": (9_109_994,),
    "efficientnet_b3": (12_233_232,),
    "efficientnet_lite0": (4_652_008,),
    "efficientnet_lite1": (5_416_680,),
    "efficientnet_lite2": (6_092_072,),
    "efficientnet_lite3": (8_197_096,),
    "efficientnet_lite4": (13_006_568,),
    "mobilenet_v2": (3_504_872, {"dropout": 0.2, "form": "tf"}),
    "vit_s16": (22_050_664, {"dropout": 0.2}),
    "vit_b16": (86_567_656,),
}
NETWORKS = {
    name if len(variants) == 1 else f"{name}-{fields.get('form', 'torch')}": (name, fields)
    for name, (_, *variants) in (SMALL | LARGE).items()
    for fields in variants
}
# One of those that differ in the number or the width of their blocks alone.
KINDS = list(dict.fromkeys(name for name, _ in NETWORKS.values())) + [
    "vgg16_bn",
    "efficientnet_lite0",
]
# Not both forms: a step compiles for long, and a bias before BatchNorm has no gradient but rounding.
TRAINED = [label for label in NETWORKS if label not in ("knn", "resnet50-keras")]
FILES = {MODELS[name].__module__ for name in MODELS}
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def build(name, **fields):
    model = create_model(name, 6, image_size=32, **fields)
    if not model.trained_by_gradient:
        labels = np.array([0, 1, 2, 3])
        model.fit((IMAGES, labels), (IMAGES, labels), batch_size=2)
    model = in_mode(model, training=False)
    return model


class Network:
    """A small network and what it computes, each compiled once for all tests of this file."""

    def __init__(self, label: str):
        name, fields = NETWORKS[label]
        self.model = (
            build(name, **fields) if name in SMALL else filled(name, 6, 32, shallow=True, **fields)
        )
        _, self.params, self.stats = split_model(self.model)

    @cached_property
    def evaluation(self) -> dict:
        """All steps of the contract, and the statistics after them."""

        def run(params, stats):
            model = merge_model(self.model, params, stats)
            images = model.preprocess(IMAGES)
            features = model.features(images)
            out = {"images": images, "features": features, "logits": model(images)}
            return out | {"classified": model.classify(features), "stats": split_model(model)[2]}

        self.model = in_mode(self.model, training=False)
        return jax.jit(run, compiler_options=QUICK)(self.params, self.stats)

    @cached_property
    def training(self) -> list[dict]:
        """Logits, gradients and statistics of a step with one key, the same again, and another."""

        def loss(params, stats, key):
            model = merge_model(self.model, params, stats, key)
            logits = model(model.preprocess(IMAGES))
            value = (logits * jnp.arange(6.0)).sum() ** 2 + logits[:, 0].sum()
            return value, {"logits": logits, "stats": split_model(model)[2]}

        self.model = in_mode(self.model, training=True)
        step = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK)
        keys = (jax.random.key(seed) for seed in (0, 0, 1))
        steps = [step(self.params, self.stats, key) for key in keys]
        return [out | {"gradient": gradient} for gradient, out in steps]


@pytest.fixture(scope="module")
def network():
    """Returns a function: the network of a label, built once."""
    return functools.cache(Network)


def test_the_tables_cover_every_model_and_every_file():
    assert set(SMALL) | set(LARGE) == set(MODELS)
    assert {MODELS[name].__module__ for name, _ in NETWORKS.values()} == FILES


@pytest.mark.parametrize("name", MODELS)
def test_parameter_count(name):
    num_classes, size = (6, 32) if name in SMALL else (1000, 224)

    params = split_model(unfilled(name, num_classes, size))[1]
    assert sum(p.size for p in params.values()) == (SMALL | LARGE)[name][0]
    assert all(path.startswith("stages.") for path in params)
    assert all(p.dtype == jnp.float32 for p in params.values())


@pytest.mark.parametrize("label", NETWORKS)
def test_contract(network, label):
    model, out = network(label).model, network(label).evaluation
    assert isinstance(model, Classifier) and isinstance(model.stages, nnx.List)
    assert out["images"].shape == (4, 32, 32, 3) and out["images"].dtype == jnp.float32
    assert out["features"].ndim == 4 and len(out["features"]) == 4
    assert out["logits"].shape == (4, 6) and out["logits"].dtype == jnp.float32
    scale = np.abs(out["logits"]).max()
    np.testing.assert_allclose(out["classified"], out["logits"], atol=1e-5 * scale)
    pixels = model.preprocessing
    expected = (IMAGES * pixels.scale - np.array(pixels.mean)) / np.array(pixels.std)
    np.testing.assert_allclose(out["images"], expected, rtol=1e-5, atol=1e-6)


def test_the_features_of_a_vision_transformer_let_every_patch_reach_the_logits(network):
    """After the last block only the class token would: a map that says nothing about places."""
    model, features = network("vit_s16").model, network("vit_s16").evaluation["features"]
    assert features.shape == (4, 2, 2, 2 * model.width)
    params, stats = split_model(model)[1:]

    def first_logit(features, params, stats):
        return merge_model(model, params, stats).classify(features)[:, 0].sum()

    gradient = jax.jit(jax.grad(first_logit))(features, params, stats)
    assert (np.abs(gradient[..., : model.width]).max(axis=-1) > 0).all()


@pytest.mark.parametrize("label", TRAINED)
def test_every_parameter_receives_a_gradient(network, label):
    if label == "linear":
        assert not any(p.any() for p in network(label).params.values())  # starts at zero
    gradient = network(label).training[0]["gradient"]
    assert set(gradient) == set(network(label).params)
    assert not [path for path, g in gradient.items() if not jnp.abs(g).max() > 0]


@pytest.mark.parametrize("label", [label for label in TRAINED if label != "linear"])
def test_what_training_draws_at_random_follows_its_key(network, label):
    first, again, other = (step["logits"] for step in network(label).training)
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


@pytest.mark.parametrize("label", TRAINED)
def test_batch_norm_moves_its_statistics_in_training_only(network, label):
    before = network(label).stats
    for stats, moves in (
        (network(label).evaluation["stats"], False),
        (network(label).training[0]["stats"], True),
    ):
        moved = [path for path in before if not np.array_equal(stats[path], before[path])]
        assert len(moved) == (len(before) if moves else 0)
    counts = {"cnn_deep": 16, "mlp": 0, "vgg16": 0, "vit_s16": 0}
    assert len(before) == counts.get(label, len(before))


@pytest.mark.parametrize("label", TRAINED)
def test_bfloat16_computes_near_float32_and_keeps_float32_parameters(network, label):
    exact, (name, fields) = network(label), NETWORKS[label]
    model = unfilled(name, 6, 32, dtype=jnp.bfloat16, shallow=True, **fields)
    for ours, theirs in zip(split_model(model)[1:], (exact.params, exact.stats), strict=True):
        assert {p: a.dtype for p, a in ours.items()} == {p: a.dtype for p, a in theirs.items()}

    def logits(params, stats):
        merged = merge_model(model, params, stats)
        return merged(merged.preprocess(IMAGES))

    rough = jax.jit(logits, compiler_options=QUICK)(exact.params, exact.stats)
    exact = exact.evaluation["logits"]
    assert rough.dtype == jnp.float32
    assert np.array_equal(rough, exact) == (label == "linear")  # its only layer is the last
    if label != "linear":  # whose logits are float32 values, not bfloat16's
        assert (rough != rough.astype(jnp.bfloat16)).mean() > 0.8
    np.testing.assert_allclose(rough, exact, atol=0.05 * max(1, float(jnp.abs(exact).max())))


def test_seeds_decide_the_initialisation():
    first, again, other = (split_model(build("cnn", seed=s))[1] for s in (0, 0, 1))
    path = "stages.0.layers.0.kernel"
    assert np.array_equal(first[path], again[path]) and not np.array_equal(first[path], other[path])


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
    assert model.multiply_adds() == 1000 * 192


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cmn", {}, "Did you mean 'cnn'"),
        ("cnn_deep", {"image_size": 8}, "at least 16 pixels"),
        ("resnet18", {"image_size": 31}, "at least 32 pixels"),
        ("vit_s16", {"image_size": 40}, "a multiple of it, got 40"),
        ("cnn", {"droput": 0.5}, "no field 'droput'; it has dropout"),
        ("cnn", {"weights": "timm/x"}, "no weights of cnn are published"),
        ("cnn", {"dropout": 2.0}, "dropout=2.0 is out of range"),
        ("efficientnet_b0", {"stochastic_depth": 1.0}, "stochastic_depth=1.0 is out of range"),
        ("resnet18", {"form": "tf"}, "choose one of torch, keras"),
        ("efficientnet_b0", {"form": "keras"}, "choose one of torch, tf"),
        ("mlp", {"hidden": (0,)}, "widths of at least 1"),
        ("knn", {"metric": "l3"}, "l1, l2"),
        ("knn", {"max_k": 0}, "max_k"),
    ],
)
def test_mistakes_are_named(name, options, message):
    with pytest.raises(UserError, match=message):
        create_model(name, 6, **options)


def test_one_class_is_refused():
    with pytest.raises(UserError, match="at least two classes"):
        create_model("cnn", 1)
