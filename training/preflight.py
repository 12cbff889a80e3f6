"""Before a run trains: can each phase train this model, and do the pixels match the weights?

Wrong preprocessing lets a network train, only badly: the classic failure of a fine-tuned ResNet50.
Two things give it away.

* The input of each early BatchNorm has a mean and a variance, channel by channel, that the weights
  stored when they were trained. The distance of a layer is the median over channels of the
  Kullback-Leibler divergence between the two normal distributions. Networks without BatchNorm are
  judged by the outputs of their first stages, against those under the weights' own preprocessing.
* Swapped colour channels hardly move those numbers. But the classifier that came with the weights
  is surer of images as it knows them: the log of the sum of its exponentiated logits is compared
  between both orders, image by image. On photos of one colour it can err, so only a large
  difference counts; short of that, the order is judged by what the weights record.

On trial are the pixels' scale and origin, not what the images show: to the first layer, faded
photos, right, are what others are when divided by 255 alone. So crops of two photographs that
scikit-learn brings stand in for the images wherever the weights know photographs, that is, where
their own preprocessing fits these. The images of the run judge what other weights get.
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
from models import Classifier, Preprocessing, create_model
from models.classifier import MISTAKES, split_model
from models.layers import BatchNorm
from models.pretrained import shape_of
from models.weights.loading import find
from training.distillation import find_teachers
from training.steps import class_weights

# Measured with the ImageNet weights of EfficientNet-Lite0 to 2 and of a MobileNetV2 (jax 0.10.2).
ABNORMAL = 0.2  # distance; photographs, right, are at 0.12 at most, the mildest mistake is at 0.33
# t-value over images. The right order reaches 3.5 over 128 images (airplanes, forests), and a
# classifier of random numbers 8; the wrong order 8 (sea, glaciers), but often less than 1.
SURE = 5.0
COLOURLESS = 0.2  # rms of red minus blue over rms contrast; photos 0.6 and more, a tenth of it 0.08
# Mean entropy over the largest possible; of photos 0.06 to 0.32, of classifiers of random numbers,
# with 2 to 1,000 classes, 0.48 and more.
UNSURE = 0.4
FAINT = 16  # largest pixel; photos at 0.15 of their brightness reach 38
EARLY = 1 / 6  # of the layers; later ones see what the images show more than how they are scaled
STAGES = 2  # judged where there is no BatchNorm
DOUBT = (
    ". But photographs do not fit these weights either: they may have been trained on another kind "
    "of images than this data set has, and the preprocessing be right"
)
MEANING = {
    "unit": "division by 255 and nothing else",
    "raw": "no rescaling at all",
    "unscaled": "pixels 255 times too large",
    "rescaled_twice": "pixels divided by 255 once too often",
}

Moments = dict[str, tuple[np.ndarray, np.ndarray]]  # {layer: (mean [C], variance [C])}


def check_phases(config: ConfigDict, model: Classifier, dataset: Dataset, mesh: Mesh) -> None:
    """Finds what would stop or spoil a run: its teachers; stages, batches, weights of each phase.

    `model` may hold shapes in place of arrays. Raises a UserError that names the phase.
    """
    find_teachers(config, dataset)
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
    network, has_classifier = _published(model, images.shape[1], weights)
    given, photographs = model.preprocessing, _photographs(images.shape[1])
    layers = _layers(network, network.preprocessing, photographs)
    known = not _abnormal(layers)
    judged = photographs if known else images
    if not known or given != network.preprocessing:
        layers = _layers(network, given, judged)
    first, warnings, order = _abnormal(layers), [], {}
    if first:
        diagnosis = _diagnosis(network, given, judged) + ("" if known else DOUBT)
        warnings.append(_out_of_place(first) + diagnosis)
    else:
        order = _channel_order(network, given, images, has_classifier)
    if order.get("verdict") == "swapped":
        warnings.append(_swapped(network, given, order.get("t"), len(images)))
    if known and images.max() <= FAINT:
        warnings.append(
            f"no pixel of the images is above {images.max()} of 255: they were stored as 0..1, or "
            "the like, and need to be stored as 0..255"
        )
    if warnings:
        text = (
            f"pixels do not match the weights {weights}: " + "; ".join(warnings) + ". "
            f"In use: {given}"
        )
        if strict:
            raise UserError(
                f"{text}. Mend it, or go on regardless with config.preflight=warn "
                "(config.preprocessing=weights is what is recorded with the weights)"
            )
        print(f"warning: {text}", file=sys.stderr, flush=True)
    return {
        "warnings": warnings,
        "judged_by": "photographs" if known else "images",
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


def _abnormal(layers: list[dict]) -> dict | None:
    """Returns the first layer out of place."""
    return next((layer for layer in layers if not layer["distance"] <= ABNORMAL), None)


def _out_of_place(layer: dict) -> str:
    """Returns a warning."""
    return (
        f"{layer['layer']} is the first layer out of place (distance {layer['distance']:.2f}, "
        f"normal is below {ABNORMAL}): the weights expect inputs of mean "
        f"{layer['expected_mean']:.3g} and standard deviation {layer['expected_std']:.3g} there, "
        f"and get {layer['mean']:.3g} and {layer['std']:.3g}"
    )


def _diagnosis(network: Classifier, given: Preprocessing, judged: np.ndarray) -> str:
    """Returns which mistake was made, where it is known, and the preprocessing that would fit."""
    own, text = network.preprocessing, ""
    choices = {name: make(own) for name, make in MISTAKES.items() if name != "swapped"}
    name = next((name for name, wrong in choices.items() if wrong == given != own), None)
    if name:
        text += f". The likely mistake: {name}, that is, {MEANING[name]}"
    distance = {
        name: max(layer["distance"] for layer in _layers(network, pixels, judged))
        for name, pixels in ({"weights": own} | choices).items()
    }
    best = min(distance, key=distance.get) if distance["weights"] > ABNORMAL else "weights"
    if distance[best] > ABNORMAL:
        return text
    return f"{text}. What fits: config.preprocessing={best} (distance {distance[best]:.2f})"


def _layers(network: Classifier, given: Preprocessing, images: np.ndarray) -> list[dict]:
    """Returns expected and actual moments of the early layers, in forward order."""
    norms, actual = _batch_norms(network), _moments(network, given, images)
    if norms:
        expected = {path: (norm.mean[...], norm.var[...]) for path, norm in norms.items()}
    else:
        photographs = _photographs(images.shape[1])
        expected = _moments(network, network.preprocessing, photographs)
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


def _moments(network: Classifier, given: Preprocessing, images: np.ndarray) -> Moments:
    """Returns the moments of the early BatchNorms' inputs in forward order, or of first stages."""
    found = _noted_moments(network, given(jnp.asarray(images)))
    forward = sorted(found, key=lambda path: int(found[path][0]))
    return {path: tuple(np.asarray(m) for m in found[path][1]) for path in forward}


@jax.jit
def _noted_moments(network: Classifier, x: jax.Array) -> dict[str, tuple[int, jax.Array]]:
    """Returns (place in the forward order, mean and variance [2, C]) by layer."""
    found, norms = {}, _batch_norms(network)

    def note(path: str, x: jax.Array) -> None:
        axes, wide = tuple(range(x.ndim - 1)), x.astype(jnp.float32)
        found[path] = len(found), jnp.stack([wide.mean(axes), wide.var(axes)])

    for path, norm in norms.items():
        norm.observe = functools.partial(note, path)
    for number, stage in enumerate(network.stages[:-1]):
        x = stage(x)
        if not norms:
            note(f"stages.{number}", x)
    count = max(2, round(len(norms) * EARLY)) if norms else STAGES
    return dict(list(found.items())[:count])  # the compiler leaves out what comes after these


@functools.cache
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


def _channel_order(
    network: Classifier, given: Preprocessing, images: np.ndarray, has_classifier: bool
) -> dict:
    """Returns a verdict on the order of the channels, or why there is none.

    The classifier's opinion counts where it is very sure, else the record of the weights does.
    """
    wide = images.astype(np.float32)
    contrast = wide.mean(axis=-1).std(axis=(1, 2))
    colour = np.sqrt(np.mean((wide[..., 0] - wide[..., 2]) ** 2) / max(np.mean(contrast**2), 1e-6))
    if colour < COLOURLESS:
        return {"verdict": "no colour"}
    recorded = given.channels == network.preprocessing.channels
    opinion = _gain_of_swapping(network, given, images) if has_classifier else "no classifier"
    if isinstance(opinion, str):
        return {"verdict": opinion if recorded else "swapped"}
    swapped = opinion > SURE or (opinion > -SURE and not recorded)
    verdict = "swapped" if swapped else "right" if opinion < -SURE else "as recorded"
    return {"verdict": verdict, "t": opinion}


def _swapped(network: Classifier, given: Preprocessing, t: float | None, count: int) -> str:
    """Returns a warning; `t` is None where the classifier has no opinion."""
    seen = ""
    if t is not None:
        seen = f" (t = {t:.1f} over {count} images in favour of the other order)"
    recorded = network.preprocessing.channels
    if given.channels == recorded:
        return (
            f"red and blue are swapped, says the weights' own classifier{seen}, though the "
            f"weights get {recorded}, as they record it: the images may be stored in the other "
            "order. What fits: config.preprocessing=swapped"
        )
    return (
        f"red and blue are swapped: the weights record {recorded}, and get {given.channels}"
        f"{seen}. What fits: config.preprocessing=weights"
    )


def _gain_of_swapping(network: Classifier, given: Preprocessing, images: np.ndarray) -> float | str:
    """Returns how much surer the classifier is with red and blue swapped, a t-value, or why not."""
    last = f"stages.{len(network.stages) - 1}."
    for path, bias in split_model(network)[1].items():
        if path.startswith(last) and bias.shape == (network.num_classes,) and not np.ptp(bias):
            return "classifier untrained"
    # Swapped pixels under the same mean and standard deviation of each input channel.
    both = [
        _energy(network, pixels(jnp.asarray(images)))
        for pixels in (given, MISTAKES["swapped"](given))
    ]
    (energy, entropy), (swapped, other) = (np.asarray(x, np.float64) for x in both)
    gain = swapped - energy
    if min(entropy.mean(), other.mean()) > UNSURE or not gain.std():
        return "classifier unsure"
    return float(gain.mean() / (gain.std(ddof=1) / np.sqrt(len(gain))))


@jax.jit
def _energy(network: Classifier, x: jax.Array) -> jax.Array:
    """Returns [2, B]: the log of the sum of exponentiated logits, and the entropy in 0..1."""
    logits = network(x)
    shares = jax.nn.log_softmax(logits)
    entropy = -(jnp.exp(shares) * shares).sum(axis=-1) / np.log(logits.shape[-1])
    return jnp.stack([jax.nn.logsumexp(logits, axis=-1), entropy])
