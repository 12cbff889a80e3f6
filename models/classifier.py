"""What every architecture shares: the contract that training and analysis rely on."""

from dataclasses import asdict, dataclass

import jax
import jax.numpy as jnp
from flax import nnx


@dataclass(frozen=True)
class Preprocessing:
    """How pixels become the numbers that these weights were trained on; it belongs to the weights.

    y = (x * scale - mean) / std, channel by channel, for x in 0..255 in RGB order.
    """

    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.25, 0.25, 0.25)

    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, H, W, 3] uint8, or float in 0..255 -> [B, H, W, 3] float32."""
        mean, std = jnp.asarray(self.mean, jnp.float32), jnp.asarray(self.std, jnp.float32)
        return (images.astype(jnp.float32) * self.scale - mean) / std

    def to_dict(self) -> dict:
        """Returns the fields as plain values for JSON."""
        return asdict(self)


class Classifier(nnx.Module):
    """An image classifier as a list of stages, of which the last turns features into logits.

    A subclass fills `stages` in forward order. Dropout and BatchNorm follow the mode set by
    `set_mode`; a new model is in evaluation mode after it.
    """

    default_image_size = 64
    min_image_size = 1
    preprocessing = Preprocessing()
    trained_by_gradient = True  # False: the model has `fit` instead
    stages: nnx.List

    def preprocess(self, images: jax.Array) -> jax.Array:
        """[B, H, W, 3] uint8 -> [B, H, W, 3] float32, as these weights were trained."""
        return self.preprocessing(images)

    def features(self, images: jax.Array) -> jax.Array:
        """[B, H, W, 3] float32 -> [B, h, w, C], the last spatial map."""
        for stage in self.stages[:-1]:
            images = stage(images)
        return images

    def classify(self, features: jax.Array) -> jax.Array:
        """[B, h, w, C] -> logits [B, K] float32."""
        return self.stages[-1](features).astype(jnp.float32)

    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, H, W, 3] float32, preprocessed -> logits [B, K] float32."""
        return self.classify(self.features(images))


def set_mode(model: nnx.Module, *, training: bool) -> None:
    """Switches dropout on or off and BatchNorm between batch and running statistics."""
    model.set_attributes(
        deterministic=not training, use_running_average=not training, raise_if_not_found=False
    )


def split_model(model: Classifier) -> tuple[nnx.GraphDef, dict, dict]:
    """Returns (structure, parameters, statistics); the two last as {"stages.0.kernel": array}.

    Statistics are everything an evaluation needs beside the parameters, such as BatchNorm's means.
    Keys of random streams are left out: `merge_model` supplies them.
    """
    graphdef, params, _, stats = nnx.split(model, nnx.Param, nnx.RngState, ...)
    return graphdef, _flat(params), _flat(stats)


def merge_model(model: Classifier, params: dict, stats: dict, dropout_key=None) -> Classifier:
    """Returns a copy of `model` that holds these parameters and statistics (see `split_model`).

    Works under jit: `model` gives structure and mode, the arrays may be traced.
    """
    graphdef, old_params, rng_state, old_stats = nnx.split(model, nnx.Param, nnx.RngState, ...)
    merged = nnx.merge(
        graphdef, _fill(old_params, params), rng_state, _fill(old_stats, stats), copy=True
    )
    if dropout_key is not None:
        nnx.reseed(merged, dropout=dropout_key)
    return merged


def _path(keys: tuple) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator=".").removesuffix(".value")


def _flat(state: nnx.State) -> dict[str, jax.Array]:
    return {_path(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _fill(state: nnx.State, arrays: dict) -> nnx.State:
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    paths = [_path(keys) for keys, _ in leaves]
    if set(paths) != set(arrays):
        raise ValueError(f"variables differ: {sorted(set(paths) ^ set(arrays))}")
    return jax.tree_util.tree_unflatten(structure, [arrays[path] for path in paths])
