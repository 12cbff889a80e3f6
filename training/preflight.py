"""Before a run trains: can each phase train this model, and do the pixels match the weights?

Wrong preprocessing lets a network train, only badly: the classic failure of a fine-tuned ResNet50.
Two things give it away.

* The input of each early BatchNorm has a mean and a variance, channel by channel, that the weights
  stored when they were trained. The distance of a layer is the median over channels of the
  Kullback-Leibler divergence between the two normal distributions. Networks without BatchNorm are
  judged by the outputs of their first stages, against those for two photographs that scikit-learn
  brings, preprocessed as the weights were published.
* Swapped colour channels hardly move those numbers. But the classifier that came with the weights
  is surer of images as it knows them: the log of the sum of its exponentiated logits is compared
  between both orders, image by image.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from data.decoding import resize
from errors import UserError
from experiment.fields import first_trained_stage, phase_config, phase_names
from input_pipeline import Dataset, check_batches
from models import Classifier, create_model
from models.classifier import MISTAKES
from models.layers import BatchNorm
from models.pretrained import shape_of
from models.weights.loading import find
from training.steps import class_weights

ABNORMAL = 0.3  # distance; right pixels stay below 0.11, the mildest wrong scale is at 0.45
UNSURE = 2.0  # t-value over images; right order at most -2.3, swapped at least 2.3
# Both measured with a ResNet18 and an EfficientNet-B0 trained on CIFAR-10, on CIFAR-10 and on the
# Intel scenes, 128 images (jax 0.10.2).
EARLY = 1 / 6  # of the layers; later ones see what the images show more than how they are scaled
STAGES = 2  # judged where there is no BatchNorm

Moments = dict[str, tuple[np.ndarray, np.ndarray]]  # {layer: (mean [C], variance [C])}


def check_phases(config: ConfigDict, model: Classifier, dataset: Dataset, mesh: Mesh) -> None:
    """Finds what would stop or spoil a phase of a run: its stages, batches and class weights.

    `model` may hold shapes in place of arrays. Raises a UserError that names the phase.
    """
    for name in phase_names(config):
        settings = phase_config(config, name)
        try:
            check_batches(settings, mesh)
            class_weights(settings, dataset)
            first = first_trained_stage(settings.train, len(model.stages))
            check_batch_norm(settings, model, first)
        except UserError as error:
            raise UserError(f"in phase {name}: {error}") from error


def check_batch_norm(config: ConfigDict, model: Classifier, first: int) -> None:
    """Raises a UserError if BatchNorm would normalise by a batch of one image.

    A map of one place then becomes zero, whatever the image, and the statistics of larger ones are
    those of single images. `config` is of a phase that trains stage `first` and those after it.
    """
    if config.batch_size > 1:
        return
    for path, module in nnx.iter_modules(model):
        mode = config.batch_norm if path[1:] and path[1] >= first else config.frozen_batch_norm
        if isinstance(module, nnx.BatchNorm) and mode == "batch":
            raise UserError(
                f"config.batch_size=1: {model.name} has BatchNorm, which cannot normalise by a "
                "single image: use larger batches, or config.batch_norm=running with pretrained "
                "weights"
            )


def inspect_pixels(
    model: Classifier, images: np.ndarray, weights: str, *, strict: bool = False
) -> dict:
    """Compares what pretrained weights get with what they expect; prints a warning if it differs.

    Args:
      model: with its weights, and the preprocessing to be judged.
      images: uint8 [B, S, S, 3], of the data to train on; 64 are plenty.
      weights: their name, as `create_model` takes it.
      strict: whether to raise a UserError instead of warning.

    Returns:
      What `preflight.json` holds.
    """
    published, has_classifier = _published(model, images.shape[1], weights)
    layers = _layers(model, published, images)
    first = next((layer for layer in layers if not layer["distance"] <= ABNORMAL), None)
    warnings, order = [], {}
    if first:
        warnings.append(
            f"{first['layer']} is the first layer out of place (distance {first['distance']:.2f}, "
            f"normal is below {ABNORMAL}): the weights expect inputs of mean "
            f"{first['expected_mean']:.3g} and standard deviation {first['expected_std']:.3g} "
            f"there, and get {first['mean']:.3g} and {first['std']:.3g}"
        )
    elif has_classifier and (images[..., 0] != images[..., 2]).any():
        order = {"t": _gain_of_swapping(model, published, images)}
    if order.get("t", 0.0) > UNSURE:
        warnings.append(
            "the weights' own classifier is surer of the images with red and blue swapped "
            f"(t = {order['t']:.1f} over {len(images)} images): the channel order is probably wrong"
        )
    if warnings:
        text = (
            f"preprocessing does not match the weights {weights}: " + "; ".join(warnings) + ". "
            f"In use: {model.preprocessing}"
        )
        if strict:
            raise UserError(
                f"{text}. Use the preprocessing of the weights (config.preprocessing=weights), or "
                "go on regardless with config.preflight=warn"
            )
        print(f"warning: {text}", file=sys.stderr, flush=True)
    return {
        "warnings": warnings,
        "first_abnormal": first and first["layer"],
        "channel_order": order,
        "layers": layers,
    }


def _published(model: Classifier, size: int, weights: str) -> tuple[Classifier, bool]:
    """Returns the network as its weights were published, and whether with their classifier."""
    # The form alone: a head that was chosen for this run, as of VGG, need not be that of the file.
    form = {key: value for key, value in model.fields if key == "form"}
    width, _ = shape_of(find(weights, model.name, form), model.name, form)
    network = create_model(model.name, width or 2, weights=weights, image_size=size, **form)
    return network, width > 0


def _layers(model: Classifier, published: Classifier, images: np.ndarray) -> list[dict]:
    """Returns expected and actual moments of the early layers, in forward order."""
    norms, actual = _batch_norms(model), _moments(model, images)
    if norms:
        expected = {path: (norm.mean[...], norm.var[...]) for path, norm in norms.items()}
        actual = dict(list(actual.items())[: max(2, round(len(actual) * EARLY))])
    else:
        expected = _moments(published, _photographs(images.shape[1]))
    layers = []
    for path, (mean, variance) in actual.items():
        their_mean, their_variance = (np.asarray(x) for x in expected[path])
        epsilon = norms[path].epsilon if norms else 0.0
        layers.append(
            {
                "layer": path,
                "distance": divergence(mean, variance, their_mean, their_variance, epsilon),
                "mean": float(mean.mean()),
                "std": float(np.sqrt(variance.mean())),
                "expected_mean": float(their_mean.mean()),
                "expected_std": float(np.sqrt(their_variance.mean())),
            }
        )
    return layers


def divergence(
    mean: np.ndarray, variance: np.ndarray, their_mean, their_variance, epsilon: float
) -> float:
    """Returns the median over channels of KL(actual || expected) between normal distributions.

    To both variances, `epsilon` and a thousandth of the median expected one are added, so that
    channels that are always silent count for little.
    """
    epsilon += 1e-3 * float(np.median(their_variance)) + 1e-12
    variance, theirs = variance + epsilon, their_variance + epsilon
    ratio = variance / theirs
    return float(np.median(0.5 * (ratio + (mean - their_mean) ** 2 / theirs - 1 - np.log(ratio))))


def _batch_norms(model: Classifier) -> dict[str, BatchNorm]:
    return {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, BatchNorm)
    }


def _moments(model: Classifier, images: np.ndarray) -> Moments:
    """Returns the moments of every BatchNorm's input in forward order, or of the first stages."""
    found = _noted_moments(model, jnp.asarray(images))
    forward = sorted(found, key=lambda path: int(found[path][0]))
    return {path: tuple(np.asarray(m) for m in found[path][1]) for path in forward}


@jax.jit
def _noted_moments(model: Classifier, images: jax.Array) -> dict[str, tuple[int, jax.Array]]:
    """Returns (place in the forward order, mean and variance [2, C]) by layer."""
    found, norms = {}, _batch_norms(model)

    def note(path: str, x: jax.Array) -> None:
        axes, wide = tuple(range(x.ndim - 1)), x.astype(jnp.float32)
        found[path] = len(found), jnp.stack([wide.mean(axes), wide.var(axes)])

    for path, norm in norms.items():
        norm.observe = functools.partial(note, path)
    x = model.preprocess(images)
    for number, stage in enumerate(model.stages[:-1]):
        x = stage(x)
        if not norms and number < STAGES:
            note(f"stages.{number}", x)
    return found


def _photographs(size: int) -> np.ndarray:
    """Returns 32 crops of two photographs: uint8 [32, S, S, 3]."""
    from sklearn.datasets import load_sample_images  # as slow to import as seldom needed

    rng, crops = np.random.default_rng(0), []
    for photograph in load_sample_images().images:
        for _ in range(16):
            side = int(rng.integers(160, min(photograph.shape[:2])))
            top, left = (int(rng.integers(0, n - side + 1)) for n in photograph.shape[:2])
            crop = Image.fromarray(photograph[top : top + side, left : left + side])
            crops.append(np.asarray(resize(crop, size, "squash", "bilinear")))
    return np.stack(crops)


def _gain_of_swapping(model: Classifier, published: Classifier, images: np.ndarray) -> float:
    """Returns how much surer the weights' classifier is with red and blue swapped: a t-value."""
    # Swapped pixels under the same mean and standard deviation of each input channel.
    given, swapped = model.preprocessing, MISTAKES["swapped"](model.preprocessing)
    both = [_energy(published, pixels(jnp.asarray(images))) for pixels in (given, swapped)]
    gain = np.asarray(both[1] - both[0], np.float64)
    return float(gain.mean() / (gain.std(ddof=1) / np.sqrt(len(gain)) + 1e-12))


@jax.jit
def _energy(network: Classifier, x: jax.Array) -> jax.Array:
    """Returns [B], the log of the sum of exponentiated logits."""
    return jax.nn.logsumexp(network(x), axis=-1)
