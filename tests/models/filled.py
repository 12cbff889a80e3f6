"""Networks without the minutes that compiling the initialisation of the large ones takes."""

import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import MODELS
from models.classifier import Classifier, in_mode, merge_model, split_model


def _fewer_blocks(architecture: type[Classifier]) -> dict:
    """Attributes of the same network with fewer blocks, of each kind at least one."""
    if hasattr(
        architecture, "plan"
    ):  # a block a stage, and two in one, whose second has a shortcut
        return {"plan": [(*r[:2], 2 if r[1] == 24 else 1, *r[3:]) for r in architecture.plan]}
    if len(getattr(architecture, "blocks", ())) == 4:
        return {"blocks": (2, 1, 1, 1)}
    return {"depth": 3} if hasattr(architecture, "patch") else {}


def unfilled(
    name: str, num_classes: int, image_size: int, *, dtype=jnp.float32, shallow=False, **fields
) -> Classifier:
    """The network `create_model` returns, but with shapes in place of arrays."""
    architecture = MODELS[name]
    if shallow:
        architecture = type(name, (architecture,), _fewer_blocks(architecture))
    model = nnx.eval_shape(
        lambda: architecture(
            num_classes, image_size, dtype=dtype, rngs=nnx.Rngs(params=0, dropout=0), **fields
        )
    )
    model.num_classes, model.fields = num_classes, tuple(sorted(fields.items()))
    model = in_mode(model, training=False)
    return model


def filled(name: str, num_classes: int, image_size: int, **options) -> Classifier:
    """The same with random arrays that depend on their names and shapes alone."""
    model = keyed(unfilled(name, num_classes, image_size, **options))
    params, stats = ({p: _array(p, a) for p, a in part.items()} for part in split_model(model)[1:])
    return merge_model(model, params, stats)


def keyed(model: Classifier) -> Classifier:
    """The same with a true key in each random stream; its other arrays may be shapes."""
    graphdef, random, rest = nnx.split(model, nnx.RngState, ...)
    return nnx.merge(graphdef, jax.tree.map(_key_or_count, random), rest)


def _key_or_count(like) -> jax.Array:
    is_key = jnp.issubdtype(like.dtype, jax.dtypes.prng_key)
    return jax.random.key(0) if is_key else jnp.zeros(like.shape, like.dtype)


def _array(path: str, like) -> jnp.ndarray:
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    if path.endswith((".scale", ".var")):
        values = np.ones(like.shape)
    elif path.endswith(".mean"):
        values = np.zeros(like.shape)
    elif len(like.shape) == 1 or path.endswith((".positions", "_token")):
        values = rng.normal(0, 0.1, like.shape)
    else:
        values = rng.normal(0, math.sqrt(2 / math.prod(like.shape[:-1])), like.shape)
    return jnp.asarray(values, like.dtype)
