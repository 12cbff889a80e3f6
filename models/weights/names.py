"""What published files call our arrays, and how they lay them out.

Each architecture holds, in `names`, a table for every publisher: timm (safetensors), torchvision
(.pth), lukemelas (.pth of the efficientnet_pytorch packages) or keras (.h5). A table goes from our
layers ("0.conv" stands for `stages.0.conv`) to theirs:

* a key is a regular expression in which a dot stands for a dot; the first that matches decides;
* a value is a template of `re`, or a function of the model and the groups that were matched;
* a key of a whole path ("0.positions") gives the name of one array;
* layers of the last stage are written out, which tells a file's own classifier.
"""

import re
from collections.abc import Collection, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from models.classifier import Classifier

TORCH_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
KERAS_LEAVES = {"scale": "gamma", "mean": "moving_mean", "var": "moving_variance"}


def source_names(model: Classifier, publisher: str, paths: Collection[str]) -> dict[str, str]:
    """Returns {our path: the publisher's name} for parameters and statistics of a model."""
    norms = {path.rpartition(".")[0] for path in paths if path.endswith(".scale")}
    table = {key.replace(".", r"\."): name for key, name in model.names[publisher].items()}

    def name_of(path: str) -> str:
        layer, _, leaf = path.removeprefix("stages.").rpartition(".")
        for key, name in table.items():
            whole = re.fullmatch(key, f"{layer}.{leaf}")
            if match := whole or re.fullmatch(key, layer):
                name = name(model, *match.groups()) if callable(name) else match.expand(name)
                is_norm = f"stages.{layer}" in norms
                return name if whole else _leaf_name(publisher, name, leaf, is_norm)
        raise KeyError(f"no name of {publisher} for {path}")

    return {path: name_of(path) for path in paths}


def _leaf_name(publisher: str, layer: str, leaf: str, is_norm: bool) -> str:
    if publisher != "keras":
        separator = "_" if layer.endswith("in_proj") else "."
        return f"{layer}{separator}{TORCH_LEAVES.get(leaf, leaf)}"
    if leaf == "kernel" and re.search(r"(dwconv|depthwise)$", layer):
        return f"{layer}/depthwise_kernel"
    if leaf == "bias" and is_norm:
        return f"{layer}/beta"
    return f"{layer}/{KERAS_LEAVES.get(leaf, leaf)}"


def head_of(model: Classifier, publisher: str, arrays: Iterable[str]) -> set[str]:
    """Returns those names of a file that belong to its classifier."""
    prefix = f"{len(model.stages) - 1}."
    layers = {name for key, name in model.names[publisher].items() if key.startswith(prefix)}
    return {name for name in arrays if re.sub(r"[./][^./]*$", "", name) in layers}


def normalise_names(arrays: dict[str, np.ndarray], publisher: str) -> dict[str, np.ndarray]:
    """Returns arrays under their published names.

    Keras 3 saves depthwise kernels as "kernel", and numbers the normalisation of a second network.
    """
    if publisher != "keras":
        return arrays

    def published(name: str) -> str:
        name = re.sub(r"^normalization_\d+/", "normalization/", name)
        return re.sub(r"(dwconv|depthwise)/kernel$", r"\1/depthwise_kernel", name)

    return {published(name): array for name, array in arrays.items()}


def to_our_layout(
    array: np.ndarray, publisher: str, path: str, shape: tuple, flattened: tuple = ()
) -> np.ndarray:
    """Returns an array of a file in our layout, or as it is where that gives another shape.

    Args:
      array: as read from the file.
      publisher: of the file; our own files differ in the number of positions alone.
      path, shape: ours.
      flattened: (h, w, C) of the map that a linear layer takes; PyTorch puts C first.
    """
    leaf = path.rpartition(".")[2]
    if leaf == "positions":
        return resize_positions(array, shape[1])
    if leaf == "kernel" and publisher == "keras":  # [H, W, I, O], and [H, W, C, 1] where depthwise
        depthwise = array.ndim == len(shape) == 4 and shape[2] == 1 and array.shape[3] == 1
        return array.swapaxes(2, 3) if depthwise else array
    if leaf != "kernel" or publisher not in ("timm", "torchvision", "lukemelas"):
        return array
    if flattened and array.ndim == 2 and array.shape[1] == np.prod(flattened):
        array = array.reshape(-1, flattened[2], *flattened[:2])
    if array.ndim == 4:  # [O, I, H, W] -> [H, W, I, O]
        array = array.transpose(2, 3, 1, 0)
        return array.reshape(-1, array.shape[-1]) if len(shape) == 2 else array
    return array.T


def resize_positions(positions: np.ndarray, count: int) -> np.ndarray:
    """Resizes position embeddings [1, 1 + n, C] to [1, count, C], bicubically; the token's stays.

    Both grids are square; what cannot be read as one is returned as it is.
    """
    if positions.ndim != 3:
        return positions
    old, new = (round(max(n - 1, 0) ** 0.5) for n in (positions.shape[1], count))
    if positions.shape[1] in (count, 0) or old**2 + 1 != positions.shape[1]:
        return positions
    width = positions.shape[-1]
    grid = jnp.asarray(positions[:, 1:]).reshape(1, old, old, width)
    grid = jax.image.resize(
        grid, (1, new, new, width), "cubic", antialias=True, precision="highest"
    )
    return np.concatenate([positions[:, :1], np.asarray(grid).reshape(1, -1, width)], axis=1)
