"""Holds exported programs of every architecture against our own, at their own sizes.

    python -m tests.deploy.parity [--only=vit] [--images=128]      # the table (13 minutes on two cores)

Weights are random: trained ones differ in no operation. The table has the largest difference of any
output as a share of its standard deviation, the predictions that changed, and the size of the graph.
"""

import argparse
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from flax import nnx

from analysis.answers import answering
from deploy.export import _onnx, _stablehlo
from deploy.load import load
from deploy.proof import prove
from models import MODELS
from models.classifier import Classifier, in_mode
from models.knn import Knn

FACTS = {
    "temperature": 1.0,
    "review_thresholds": [{"target": 0.95, "confidence": 0.5}],
    **{"class_names": [], "image_size": 0, "data": {}},
}
REMEMBERED = 2_500  # images of the nearest neighbours


def random_model(architecture: type[Classifier], size: int, classes: int = 10, **fields):
    """Returns an architecture with random weights and statistics, in evaluation mode."""
    rng = np.random.default_rng(0)

    def build():
        rngs = nnx.Rngs(params=0, dropout=0)
        return architecture(classes, size, dtype=jnp.dtype("float32"), rngs=rngs, **fields)

    graphdef, state = nnx.split(nnx.eval_shape(build))
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    filled = [_drawn(rng, jax.tree_util.keystr(path), leaf) for path, leaf in leaves]
    model = nnx.merge(graphdef, jax.tree_util.tree_unflatten(structure, filled))
    model.num_classes, model.fields = classes, ()
    if issubclass(architecture, Knn):
        head, pixels = model.stages[-1], size * size * 3
        head.images.set_value(jnp.asarray(rng.integers(0, 256, (REMEMBERED, pixels), np.uint8)))
        head.labels.set_value(jnp.asarray(rng.integers(0, classes, REMEMBERED), jnp.int32))
        head.k.set_value(jnp.asarray(7, jnp.int32))
    return in_mode(model, training=False)


def _drawn(rng: np.random.Generator, path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    if leaf.dtype != jnp.float32:
        return jnp.zeros(leaf.shape, leaf.dtype)
    if "var" in path or "scale" in path:
        drawn = rng.uniform(0.5, 1.5, leaf.shape)
    elif "kernel" in path:
        drawn = rng.normal(0, np.sqrt(1.5 / np.prod(leaf.shape[:-1])), leaf.shape)
    else:
        drawn = rng.normal(0, 0.2, leaf.shape)
    return jnp.asarray(drawn, jnp.float32)


def compare(
    model: Classifier, size: int, images: np.ndarray, folder: Path, forms=("onnx", "stablehlo")
):
    """Returns the proof of each form, and the seconds that writing it took."""
    found, ours = {}, answering(model)
    for form in forms:
        start, file = time.time(), folder / f"model.{form}"
        {"onnx": _onnx, "stablehlo": _stablehlo}[form](model, size, None)(file, FACTS)
        seconds = time.time() - start
        votes = not model.trained_by_gradient
        found[form] = prove(ours, load(file).answer, images, votes=votes) | {"seconds": seconds}
    return found


def photos(count: int, size: int) -> np.ndarray:
    """Returns images that are neither flat nor mere noise: uint8 [N, S, S, 3]."""
    rng = np.random.default_rng(1)
    coarse = (
        rng.integers(0, 256, (count, -(-size // 8), -(-size // 8), 3)).repeat(8, 1).repeat(8, 2)
    )
    noise = rng.normal(0, 20, (count, size, size, 3))
    return np.clip(coarse[:, :size, :size] + noise, 0, 255).astype(np.uint8)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="part of an architecture's name")
    parser.add_argument("--images", type=int, default=128)
    options = parser.parse_args()
    print("| model | size | images | ONNX | StableHLO | changed | nodes | MB | seconds to write |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, architecture in MODELS.items():
        if options.only not in name:
            continue
        size = architecture.default_image_size
        images = photos(options.images, size)
        with tempfile.TemporaryDirectory() as folder:
            found = compare(random_model(architecture, size), size, images, Path(folder))
            file = Path(folder) / "model.onnx"
            nodes, bytes_ = len(onnx.load(file).graph.node), file.stat().st_size
        onnx_found, hlo_found = found["onnx"], found["stablehlo"]
        changed = f"{onnx_found['changed_predictions']}, {hlo_found['changed_predictions']}"
        seconds = f"{onnx_found['seconds']:.0f}, {hlo_found['seconds']:.0f}"
        print(
            f"| {name} | {size} | {len(images)} | {onnx_found['relative_difference']:.1e} | "
            f"{hlo_found['relative_difference']:.1e} | {changed} | {nodes} | {bytes_ / 1e6:.1f} | "
            f"{seconds} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
