"""The architectures: one dictionary from name to class, and the function that builds one."""

import inspect

import jax
import jax.numpy as jnp
from flax import nnx

from errors import UserError, choose
from models.classifier import Classifier, Preprocessing
from models.cnn import Cnn
from models.cnn_deep import CnnDeep
from models.knn import Knn
from models.linear import Linear
from models.mlp import Mlp

MODELS: dict[str, type[Classifier]] = {
    "linear": Linear,
    "knn": Knn,
    "mlp": Mlp,
    "cnn": Cnn,
    "cnn_deep": CnnDeep,
}

__all__ = ["MODELS", "Classifier", "Preprocessing", "create_model"]


def create_model(
    name: str,
    num_classes: int,
    *,
    weights: str | None = None,
    seed: int = 0,
    image_size: int | None = None,
    dtype: str = "float32",
    **fields,
) -> Classifier:
    """Builds an architecture with freshly initialised parameters.

    Args:
      name: a key of `MODELS`.
      num_classes: length of a row of logits.
      weights: name of pretrained weights; no architecture here has any yet.
      seed: of the initialisation and of dropout.
      image_size: height and width in pixels; None is the architecture's own.
      dtype: of the computation, float32 or bfloat16; parameters and logits are float32.
      **fields: the architecture's own, such as `dropout`.

    Raises:
      UserError: an unknown name or field, or an image too small for the architecture.
    """
    architecture = MODELS[choose("model", name, MODELS)]
    if weights is not None:
        raise UserError(f"{name} has no pretrained weights: leave weights={weights!r} out")
    if num_classes < 2:
        raise UserError(f"{name} needs at least two classes to tell apart, got {num_classes}")
    given = {"self", "num_classes", "image_size", "dtype", "rngs"}
    known = [key for key in inspect.signature(architecture.__init__).parameters if key not in given]
    for field in fields:
        if field not in known:
            raise UserError(f"{name} has no field {field!r}; it has {', '.join(known) or 'none'}")
        if field.endswith("dropout") and not 0 <= fields[field] < 1:
            raise UserError(f"{name}: {field}={fields[field]} is out of range: need 0 <= rate < 1")
    image_size = architecture.default_image_size if image_size is None else image_size
    if image_size < architecture.min_image_size:
        raise UserError(
            f"{name} needs images of at least {architecture.min_image_size} pixels a side, got "
            f"{image_size}: set data.image_size"
        )

    @nnx.jit  # one program for all layers; op by op, each shape would be compiled by itself
    def initialise(key: jax.Array) -> Classifier:
        rngs = nnx.Rngs(params=key, dropout=key)
        return architecture(num_classes, image_size, dtype=jnp.dtype(dtype), rngs=rngs, **fields)

    return initialise(jax.random.key(seed))
