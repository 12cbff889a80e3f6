"""The architectures: one dictionary from name to class, and the function that builds one."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from errors import UserError, choose
from models.classifier import Classifier, Preprocessing, blame, check_stages, in_mode
from models.cnn import Cnn
from models.cnn_deep import CnnDeep
from models.efficientnet import (
    EfficientNetB0,
    EfficientNetB1,
    EfficientNetB2,
    EfficientNetB3,
    EfficientNetLite0,
    EfficientNetLite1,
    EfficientNetLite2,
    EfficientNetLite3,
    EfficientNetLite4,
)
from models.knn import Knn
from models.linear import Linear
from models.mlp import Mlp
from models.mobilenet import MobileNetV2
from models.resnet import ResNet18, ResNet34, ResNet50, ResNet101, ResNet152
from models.vgg import Vgg16, Vgg16Bn, Vgg19
from models.vit import VitB16, VitS16
from models.weights import loading

MODELS: dict[str, type[Classifier]] = {
    "linear": Linear,
    "knn": Knn,
    "mlp": Mlp,
    "cnn": Cnn,
    "cnn_deep": CnnDeep,
    "vgg16": Vgg16,
    "vgg16_bn": Vgg16Bn,
    "vgg19": Vgg19,
    "resnet18": ResNet18,
    "resnet34": ResNet34,
    "resnet50": ResNet50,
    "resnet101": ResNet101,
    "resnet152": ResNet152,
    "efficientnet_b0": EfficientNetB0,
    "efficientnet_b1": EfficientNetB1,
    "efficientnet_b2": EfficientNetB2,
    "efficientnet_b3": EfficientNetB3,
    "efficientnet_lite0": EfficientNetLite0,
    "efficientnet_lite1": EfficientNetLite1,
    "efficientnet_lite2": EfficientNetLite2,
    "efficientnet_lite3": EfficientNetLite3,
    "efficientnet_lite4": EfficientNetLite4,
    "mobilenet_v2": MobileNetV2,
    "vit_s16": VitS16,
    "vit_b16": VitB16,
}

__all__ = ["MODELS", "Classifier", "Preprocessing", "create_model", "fields_of"]


def fields_of(name: str) -> dict[str, Any]:
    """Returns an architecture's own fields with their defaults, such as {"dropout": 0.0}."""
    common = {"self", "num_classes", "image_size", "dtype", "rngs"}
    parameters = inspect.signature(MODELS[name].__init__).parameters
    return {key: p.default for key, p in parameters.items() if key not in common}


def create_model(
    name: str,
    num_classes: int,
    *,
    weights: str | None = None,
    class_names: Sequence[str] | None = None,
    seed: int = 0,
    image_size: int | None = None,
    dtype: str = "float32",
    **fields,
) -> Classifier:
    """Builds an architecture in evaluation mode, freshly initialised or with pretrained weights.

    Args:
      name: a key of `MODELS`.
      num_classes: length of a row of logits.
      weights: name of pretrained weights (see `models/pretrained.py`); None or "none" for none.
        Their preprocessing is used, and their classifier if it has as many classes.
      class_names: in the order of the labels; with them, a classifier of weights is used only if
        its classes have the same names, and brought into this order.
      seed: of the initialisation and of dropout.
      image_size: height and width in pixels; None is the architecture's own.
      dtype: of the computation, float32 or bfloat16; parameters and logits are float32.
      **fields: the architecture's own, such as `dropout`.
    """
    architecture = MODELS[choose("model", name, MODELS)]
    if num_classes < 2:
        raise UserError(f"{name} needs at least two classes to tell apart, got {num_classes}")
    known = fields_of(name)
    for field in fields:
        if field not in known:
            raise UserError(f"{name} has no field {field!r}; it has {', '.join(known) or 'none'}")
        if field.endswith(("dropout", "stochastic_depth")) and not 0 <= fields[field] < 1:
            raise UserError(f"{name}: {field}={fields[field]} is out of range: need 0 <= rate < 1")
    image_size = architecture.default_image_size if image_size is None else image_size
    if image_size < architecture.min_image_size:
        raise UserError(
            f"{name} needs images of at least {architecture.min_image_size} pixels a side, got "
            f"{image_size}: set data.image_size"
        )
    source = loading.find(weights, name, fields) if weights not in (None, "none") else None
    fields = fields | (source.fields if source else {})
    if source:
        loading.compare_size(source, image_size)

    own = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(fields.items()))
    key = jax.random.key(seed)
    builder = _builder(architecture, num_classes, image_size, dtype, own)
    with blame(architecture, "cannot be built"):
        model = nnx.eval_shape(builder.build, key) if source else builder.jitted(key)
    check_stages(model)
    model.name, model.num_classes, model.fields = name, num_classes, own
    if source:
        model = _complete(loading.load(model, source, class_names), builder.some, key)
    return in_mode(model, training=False)


class Builder(NamedTuple):
    """How a model is made from a key: as it is written, and in programs that all seeds share."""

    build: Callable[[jax.Array], Classifier]
    jitted: Callable[[jax.Array], Classifier]
    some: Callable[[jax.Array, tuple[int, ...]], tuple[list[jax.Array], nnx.State]]


@functools.lru_cache(maxsize=32)
def _builder(
    architecture: type[Classifier], num_classes: int, image_size: int, dtype: str, fields: tuple
) -> Builder:
    def build(key: jax.Array) -> Classifier:
        rngs = nnx.Rngs(params=key, dropout=key)
        return architecture(
            num_classes, image_size, dtype=jnp.dtype(dtype), rngs=rngs, **dict(fields)
        )

    @functools.partial(jax.jit, static_argnums=1)
    def some(key: jax.Array, wanted: tuple[int, ...]) -> tuple[list[jax.Array], nnx.State]:
        _, rng_state, fresh = nnx.split(build(key), nnx.RngState, ...)
        fresh = jax.tree.leaves(fresh)
        return [fresh[i] for i in wanted], rng_state

    # One program initialises all layers: op by op, each shape would be compiled by itself.
    return Builder(build, nnx.jit(build), some)


def _complete(model: Classifier, some: Callable, key: jax.Array) -> Classifier:
    """Returns the model with initial values where it holds only the shape of an array.

    `some` is of its `Builder`; what is not needed of a fresh model is not computed.
    """
    graphdef, _, variables = nnx.split(model, nnx.RngState, ...)
    leaves, structure = jax.tree.flatten(variables)
    missing = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.ShapeDtypeStruct)]
    values, rng_state = some(key, tuple(missing))
    filled = dict(enumerate(leaves)) | dict(zip(missing, values, strict=True))
    return nnx.merge(graphdef, rng_state, jax.tree.unflatten(structure, filled.values()))
