"""Do the pixels match the weights? One batch tells, before a run with pretrained weights trains.

Wrong preprocessing lets a network train, only badly: the classic failure of a fine-tuned ResNet50.
Two things give it away.

* The input of each early BatchNorm has a mean and a variance, channel by channel, that the weights
  stored when they were trained. The distance of a layer is the median over channels of the
  Kullback-Leibler divergence between the two normal distributions. Networks without BatchNorm are
  judged likewise by the outputs of their first stages, on the images they were trained on if these
  are stored with the weights, else on two photographs that scikit-learn brings.
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
from PIL import Image
from sklearn.datasets import load_sample_images

from data.decoding import resize
from errors import UserError
from models import Classifier, create_model
from models.classifier import MISTAKES, merge_model
from models.layers import BatchNorm
from models.pretrained import shape_of
from models.weights.loading import find

ABNORMAL = 0.3  # distance; right pixels stay below 0.11, the mildest wrong scale is at 0.45
UNSURE = 2.0  # t-value over images; right order at most -2.3, swapped at least 2.3
# Both measured with a ResNet18 and an EfficientNet-B0 trained on CIFAR-10, on CIFAR-10 and on the
# Intel scenes, 128 images (jax 0.10.2).
EARLY = 1 / 6  # of the layers; later ones see what the images show more than how they are scaled
STAGES = 2  # judged where there is no BatchNorm

Moments = tuple[str, np.ndarray, np.ndarray]  # name, mean [C], variance [C]


def inspect_pixels(
    model: Classifier, images: np.ndarray, name: str, weights: str, *, strict: bool = False
) -> dict:
    """Compares what pretrained weights get with what they expect; prints a warning if it differs.

    Args:
      model: with its weights, and the preprocessing to be judged.
      images: uint8 [B, S, S, 3], of the data to train on; 64 are plenty.
      name: of the architecture.
      weights: their name, as `create_model` takes it.
      strict: whether to stop instead of warning.

    Returns:
      What `preflight.json` holds: "warnings", "layers" with their distances, "first_abnormal" and
      "channel_order".

    Raises:
      UserError: the pixels do not match and `strict` is set.
    """
    layers = _layers(model, images, name, weights)
    first = next((layer for layer in layers if not layer["distance"] <= ABNORMAL), None)
    warnings = []
    if first:
        warnings.append(
            f"{first['layer']} is the first layer out of place (distance {first['distance']:.2f}, "
            f"normal is below {ABNORMAL}): the weights expect inputs of mean "
            f"{first['expected_mean']:.3g} and standard deviation {first['expected_std']:.3g} "
            f"there, and get {first['mean']:.3g} and {first['std']:.3g}"
        )
    order = {} if first else _channel_order(model, images, name, weights)
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


def _layers(model: Classifier, images: np.ndarray, name: str, weights: str) -> list[dict]:
    """Returns expected and found moments of the early layers, in forward order."""
    norms = {path: m for path, m in _batch_norms(model)}
    found = observe(model, images)
    if norms:
        expected = {p: (m.mean[...], m.var[...], m.epsilon) for p, m in norms.items()}
        found = found[: max(2, round(len(found) * EARLY))]
    else:
        source = find(weights, name, dict(model.fields))
        reference = source.reference or _photographs(model, images.shape[1], name, weights)
        expected = {path: (np.array(m), np.array(v), 0.0) for path, (m, v) in reference.items()}
    layers = []
    for path, mean, variance in found:
        if path in expected:
            their_mean, their_variance, epsilon = (np.asarray(x) for x in expected[path])
            distance = divergence(mean, variance, their_mean, their_variance, float(epsilon))
            layers.append(
                {
                    "layer": path,
                    "distance": distance,
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
    """Median over channels of KL(found || expected) between normal distributions.

    Args:
      mean, variance: found, [C] each.
      their_mean, their_variance: expected, [C] each.
      epsilon: added to both variances, beside a thousandth of the median expected one, so that
        channels that are always silent count for little.
    """
    epsilon += 1e-3 * float(np.median(their_variance)) + 1e-12
    variance, theirs = variance + epsilon, their_variance + epsilon
    ratio = variance / theirs
    return float(np.median(0.5 * (ratio + (mean - their_mean) ** 2 / theirs - 1 - np.log(ratio))))


def _batch_norms(model: Classifier) -> list[tuple[str, BatchNorm]]:
    return [
        (".".join(map(str, path)), module)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, BatchNorm)
    ]


def observe(model: Classifier, images: np.ndarray) -> list[Moments]:
    """Returns mean and variance of every BatchNorm's input, in forward order.

    Without any, of the outputs of the first stages. The network is in evaluation mode.
    """
    names: list[str] = []

    @jax.jit
    def run(model: Classifier, images: jax.Array) -> list[jax.Array]:
        moments = []

        def note(path: str, x: jax.Array) -> None:
            axes, wide = tuple(range(x.ndim - 1)), x.astype(jnp.float32)
            names.append(path)
            moments.append(jnp.stack([wide.mean(axes), wide.var(axes)]))

        norms = _batch_norms(model)
        for path, module in norms:
            module.observe = functools.partial(note, path)
        x = model.preprocess(images)
        for number, stage in enumerate(model.stages[:-1]):
            x = stage(x)
            if not norms and number < STAGES:
                note(f"stages.{number}", x)
        return moments

    moments = run(model, jnp.asarray(images))
    return [(name, *np.asarray(m)) for name, m in zip(names, moments, strict=True)]


def reference_of(model: Classifier, weights: dict, images: np.ndarray) -> dict:
    """Returns what later runs from these weights are judged by, if they have no BatchNorm.

    Args:
      model: gives structure and preprocessing.
      weights: {"params", "stats"}.
      images: uint8 [B, S, S, 3], of those it was trained on.

    Returns:
      {stage: [means, variances]}; {} for a model with BatchNorm or of a single stage.
    """
    if _batch_norms(model) or len(model.stages) < 2:
        return {}
    trained = merge_model(model, weights["params"], weights["stats"])
    return {name: [m.tolist(), v.tolist()] for name, m, v in observe(trained, images)}


def _photographs(model: Classifier, size: int, name: str, weights: str) -> dict:
    """Returns the moments of 32 crops of two photographs, preprocessed as the weights expect."""
    rng, crops = np.random.default_rng(0), []
    for photograph in load_sample_images().images:
        for _ in range(16):
            side = int(rng.integers(160, min(photograph.shape[:2])))
            top, left = (int(rng.integers(0, n - side + 1)) for n in photograph.shape[:2])
            crop = Image.fromarray(photograph[top : top + side, left : left + side])
            crops.append(np.asarray(resize(crop, size, "squash", "bilinear")))
    fields = dict(model.fields)
    expected = create_model(name, model.num_classes, weights=weights, image_size=size, **fields)
    return {path: (m, v) for path, m, v in observe(expected, np.stack(crops))}


def _channel_order(model: Classifier, images: np.ndarray, name: str, weights: str) -> dict:
    """Returns {"t"}: how much surer the weights' own classifier is with red and blue swapped.

    {} where the weights came without classifier, or the images are grey.
    """
    # The form alone: a head that was chosen for this run, as of VGG, need not be that of the file.
    form = {key: value for key, value in model.fields if key == "form"}
    width, _ = shape_of(find(weights, name, form), name, form)
    if not width or (images[..., 0] == images[..., 2]).all():
        return {}
    own = create_model(name, width, weights=weights, image_size=images.shape[1], **form)
    given = model.preprocessing

    @jax.jit
    def energy(own: Classifier, x: jax.Array) -> jax.Array:  # [B]
        return jax.nn.logsumexp(own(x), axis=-1)

    swapped = MISTAKES["swapped"](given)
    # Swapped pixels under the same mean and standard deviation of each input channel.
    both = [energy(own, p(jnp.asarray(images))) for p in (given, swapped)]
    gain = np.asarray(both[1] - both[0], np.float64)
    return {"t": float(gain.mean() / (gain.std(ddof=1) / np.sqrt(len(gain)) + 1e-12))}
