"""A user's own architecture: what breaks the contract is named before anything is computed."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from errors import UserError
from models import MODELS, create_model
from models.classifier import Classifier, check_architecture
from models.layers import BatchNorm, flatten, logits_layer


class Own(Classifier):
    """Two stages; the tests break one thing each."""

    def __init__(self, num_classes, image_size, *, dtype, rngs):
        self.body = nnx.Linear(3, 4, dtype=dtype, rngs=rngs)
        self.build(num_classes, image_size, rngs)

    def build(self, num_classes, image_size, rngs):
        body, self.body = self.body, None
        head = nnx.Sequential(flatten, logits_layer(4 * image_size**2, num_classes, rngs))
        self.stages = nnx.List([body, head])


class NoStages(Own):
    def build(self, num_classes, image_size, rngs):
        pass


class Beside(Own):
    def build(self, num_classes, image_size, rngs):
        super().build(num_classes, image_size, rngs)
        self.token = nnx.Param(jnp.zeros(4))


class NamedTwice(Own):
    def build(self, num_classes, image_size, rngs):
        body = self.body
        super().build(num_classes, image_size, rngs)
        self.body = body


class DropoutBeside(Own):
    def build(self, num_classes, image_size, rngs):
        super().build(num_classes, image_size, rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)


class OneLogit(Own):
    def build(self, num_classes, image_size, rngs):
        super().build(1, image_size, rngs)


class OneLogitInCall(Own):
    def __call__(self, images):
        return self.classify(self.features(images))[:, 0]


class HalfLogits(Own):
    def classify(self, features):
        return super().classify(features).astype(jnp.bfloat16)


class FlatFeatures(Own):
    def features(self, images):
        return flatten(super().features(images))


class WrongShapes(Own):
    def build(self, num_classes, image_size, rngs):
        super().build(num_classes, image_size, rngs)
        self.stages = nnx.List([self.stages[0], BatchNorm(5, rngs=rngs), self.stages[1]])


class WrongCall(Own):
    def build(self, num_classes, image_size, rngs):
        super().build(num_classes)


def own(architecture, monkeypatch):
    monkeypatch.setitem(MODELS, "own", architecture)
    return nnx.eval_shape(lambda: create_model("own", 6, image_size=8))


def test_an_architecture_that_keeps_the_contract_passes(monkeypatch):
    check_architecture(own(Own, monkeypatch), 8)
    for name in ("linear", "knn", "cnn_deep", "vit_s16"):
        check_architecture(
            nnx.eval_shape(lambda name=name: create_model(name, 6, image_size=64)), 64
        )
    model = create_model("cnn", 6, image_size=8)
    check_architecture(model, 8)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nnx.state(model)))


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (NoStages, r"NoStages has no stages: set self.stages = nnx.List"),
        (Beside, r"Beside: token can be reached outside of `stages`"),
        (NamedTwice, r"NamedTwice: body.bias, body.kernel can be reached outside of `stages`"),
        (DropoutBeside, r"DropoutBeside: drop can be reached outside of `stages`"),
        (OneLogit, r"OneLogit: logits .* 6 classes are float32 \(2, 1\).*must be float32 \(2, 6\)"),
        (OneLogitInCall, r"float32 \(2,\)"),
        (HalfLogits, r"bfloat16 \(2, 6\)"),
        (FlatFeatures, r"features of 2 images have the shape \(2, 256\)"),
        (WrongShapes, r"WrongShapes cannot be applied to images of 8 pixels: "),
        (WrongCall, r"cannot be built: TypeError: .*test_classifier.py:\d+"),
    ],
)
def test_what_breaks_the_contract_is_named(architecture, message, monkeypatch):
    with pytest.raises(UserError, match=message):
        check_architecture(own(architecture, monkeypatch), 8)
