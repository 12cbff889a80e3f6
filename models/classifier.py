"""What every architecture shares: the contract that training and analysis rely on."""

import inspect
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx

from errors import UserError


@dataclass(frozen=True)
class Preprocessing:
    """How pixels become the numbers that these weights were trained on; it belongs to the weights.

    y = (x * scale - mean) / std, channel by channel, for x in 0..255 in the order of `channels`.
    `size`, `interpolation` and `crop` record how the publisher cut and resized photos; an
    experiment chooses its own in `config.data`, the same for every model.
    """

    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.25, 0.25, 0.25)
    channels: str = "rgb"  # rgb | bgr; mean and std are in this order too
    size: int = 0  # height and width in pixels; 0 is any
    interpolation: str = "bilinear"
    crop: float = 1.0  # side of the central crop as a fraction of the resized shorter side

    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, H, W, 3] uint8, or float in 0..255, in RGB order -> [B, H, W, 3] float32."""
        mean, std = jnp.asarray(self.mean, jnp.float32), jnp.asarray(self.std, jnp.float32)
        images = images[..., ::-1] if self.channels == "bgr" else images
        return (images.astype(jnp.float32) * self.scale - mean) / std

    def to_dict(self) -> dict:
        """Returns the fields as plain values for JSON."""
        return asdict(self)


# Preprocessing gone wrong, as it commonly does; for ablations and for proving the preflight check.
MISTAKES = {
    "unit": lambda p: Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3),  # 1/255 and nothing else
    "raw": lambda p: Preprocessing(1.0, mean=(0.0,) * 3, std=(1.0,) * 3),  # no rescaling at all
    "unscaled": lambda p: replace(p, scale=255 * p.scale),  # mean and std, but of pixels in 0..255
    "rescaled_twice": lambda p: replace(p, scale=p.scale / 255),
    "swapped": lambda p: replace(p, channels={"rgb": "bgr", "bgr": "rgb"}[p.channels]),
}


class Classifier(nnx.Module):
    """An image classifier as a list of stages, of which the last turns features into logits.

    A subclass fills `stages` in forward order. `create_model` returns it in evaluation mode;
    `in_mode` gives a view of it in another.
    """

    default_image_size = 64
    min_image_size = 1
    preprocessing = Preprocessing()  # of the class; loading weights gives a model its own
    trained_by_gradient = True  # False: the model has `fit` instead
    names = {}  # {publisher: what its files call our layers}, see weights/names.py
    flattened = {}  # {kernel: (h, w, C)} of a linear layer that takes a flattened map
    name: str  # in `models.MODELS`
    num_classes: int
    fields: tuple[tuple, ...]  # what `create_model` was given beside the common arguments
    stages: nnx.List

    def preprocess(self, images: jax.Array) -> jax.Array:
        """[B, H, W, 3] uint8 -> [B, H, W, 3] float32, as these weights were trained."""
        return self.preprocessing(images)

    def run(self, x: jax.Array, start: int = 0, stop: int | None = None) -> jax.Array:
        """Applies `stages[start:stop]` to the output of the stage before them."""
        for stage in self.stages[start:stop]:
            x = stage(x)
        return x

    def features(self, images: jax.Array) -> jax.Array:
        """[B, H, W, 3] float32 -> [B, h, w, C], the last spatial map."""
        return self.run(images, 0, -1)

    def classify(self, features: jax.Array) -> jax.Array:
        """[B, h, w, C] -> logits [B, K] float32."""
        return self.run(features, -1).astype(jnp.float32)

    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, H, W, 3] float32, preprocessed -> logits [B, K] float32."""
        return self.classify(self.features(images))


def in_mode(
    model: Classifier,
    *,
    training: bool,
    first: int = 0,
    batch_norm: str = "batch",
    frozen_batch_norm: str = "running",
) -> Classifier:
    """Returns a view of the model, with the same arrays, whose dropout and BatchNorm are set.

    Args:
      model: stays in its own mode.
      training: False for evaluation, where the rest does not matter.
      first: the first stage that trains; those before it are frozen, without dropout.
      batch_norm: of stages that train: "batch" normalises by the batch and moves the running
        statistics, "running" normalises by those and keeps them.
      frozen_batch_norm: likewise of frozen stages, where "batch" is a mistake.
    """
    view = nnx.view(model, raise_if_not_found=False)
    for number, stage in enumerate(view.stages):
        trains = training and number >= first
        mode = batch_norm if number >= first else frozen_batch_norm
        running = not training or mode == "running"
        stage.set_attributes(
            deterministic=not trains, use_running_average=running, raise_if_not_found=False
        )
    return view


# --- the contract, checked ----------------------------------------------------------------------


def check_stages(model: Classifier) -> None:
    """Raises a UserError unless all that a network learns lies in its `stages`."""
    name = type(model).__name__
    if not isinstance(getattr(model, "stages", None), nnx.List) or not len(model.stages):
        raise UserError(
            f"{name} has no stages: set self.stages = nnx.List([...]) in its constructor, in "
            "forward order, the last of which gives logits"
        )
    _, params, stats = split_model(model)
    moved = ("deterministic", "use_running_average")  # what `in_mode` sets in stages
    outside = [path for path in params | stats if not path.startswith("stages.")] + [
        ".".join(map(str, path))
        for path, module in nnx.iter_modules(model)
        if path and path[0] != "stages" and any(hasattr(module, field) for field in moved)
    ]
    if outside:
        more = f" and {len(outside) - 3} more" if len(outside) > 3 else ""
        raise UserError(
            f"{name}: {', '.join(outside[:3])}{more} can be reached outside of `stages`, by which "
            "layers are frozen, scaled and switched to evaluation: name them in a stage alone"
        )


def check_architecture(model: Classifier, image_size: int) -> None:
    """Raises a UserError unless a network keeps the contract; computes shapes alone.

    `model` comes from `create_model`; it may hold shapes in place of arrays.
    """
    check_stages(model)
    if not model.trained_by_gradient:
        return

    def run(model: Classifier, images: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        x = model.preprocess(images)
        features = model.features(x)
        return features, model.classify(features), model(x)

    images = jax.ShapeDtypeStruct((2, image_size, image_size, 3), jnp.uint8)
    with blame(type(model), f"cannot be applied to images of {image_size} pixels"):
        features, *both = jax.eval_shape(run, model, images)
    name, wanted = type(model).__name__, (2, model.num_classes)
    if len(features.shape) != 4 or features.shape[0] != 2:
        raise UserError(
            f"{name}: features of 2 images have the shape {features.shape}; they must be a map "
            "[B, h, w, C], the output of the last stage but one"
        )
    for logits in both:
        if logits.shape != wanted or logits.dtype != jnp.float32:
            raise UserError(
                f"{name}: logits of 2 images and {model.num_classes} classes are {logits.dtype} "
                f"{logits.shape}; they must be float32 {wanted}"
            )


@contextmanager
def blame(architecture: type, what: str) -> Iterator[None]:
    """Turns an error of an architecture's own code into a UserError that says where it is."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # any type may come from a stranger's code
        file = inspect.getfile(architecture)
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        where = f" ({file}:{lines[-1]})" if lines else ""
        raise UserError(
            f"{architecture.__name__} {what}: {type(error).__name__}: {error}{where}"
        ) from error


# --- arrays by path -----------------------------------------------------------------------------


def split_model(model: Classifier) -> tuple[nnx.GraphDef, dict, dict]:
    """Returns (structure, parameters, statistics); the two last as {"stages.0.kernel": array}.

    Statistics are everything an evaluation needs beside the parameters, such as BatchNorm's means.
    Keys of random streams are left out: `merge_model` adds them.
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


def stage_of(path: str) -> int:
    """Returns the number of the stage that a parameter or statistic belongs to."""
    return int(path.split(".")[1])


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
