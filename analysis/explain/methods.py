"""Where in an image is the evidence for a class? Saliency maps of any model.

Every method explains one logit, before softmax, of one class. Maps are raw: never negative, not
scaled, of the size of the image, all zero without positive evidence. There are three kinds:

* of a stage's input (class activation maps, CAM): `gradcam`, `gradcam++`, `hirescam`;
* of the pixels, by gradient: `gradient`, `smoothgrad`, `integrated`;
* of the logits alone, which any classifier gives: `occlusion`, and through the packages of these
  names (extra `[explain]`) `lime` and `shap`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from analysis.explain import packages
from analysis.forward import in_batches
from errors import UserError, choose
from models import Classifier
from models.vit import VisionTransformer

SMALLEST_MAP = 4  # places a side that a stage's output needs to say where anything is
SAMPLES = 16  # noisy copies of SmoothGrad, with
NOISE = 0.15  # of the image's range of values as their standard deviation
PATH_STEPS = 32  # of integrated gradients, each at the middle of its part of the path
WINDOWS = 7  # places of the occluding square in each direction; its side is a quarter of the image


def to_map(model: Classifier, x: jax.Array, stage: int) -> jax.Array:
    """[B, S, S, 3] preprocessed -> the input of a stage; the last one's is a map [B, h, w, C]."""
    return model.features(x) if stage == len(model.stages) - 1 else model.run(x, 0, stage)


def from_map(model: Classifier, x: jax.Array, stage: int) -> jax.Array:
    """Input of a stage -> logits [B, K] float32."""
    last = stage == len(model.stages) - 1
    return (model.classify(x) if last else model.run(x, stage)).astype(jnp.float32)


def map_side(model: Classifier, image_size: int, stage: int) -> int:
    """Returns the side of the square map that is a stage's input, 0 if it is none."""
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    shape = jax.eval_shape(lambda x: to_map(model, x, stage), image).shape
    return shape[1] if len(shape) == 4 and shape[1] == shape[2] else 0


def default_stage(model: Classifier, image_size: int) -> int:
    """Returns the last stage whose input is a map of at least 4x4 places, 0 (the image) if none."""
    late_first = reversed(range(1, len(model.stages)))
    return next((s for s in late_first if map_side(model, image_size, s) >= SMALLEST_MAP), 0)


def logit_of(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """[B, K], int [B] -> [B], the logit of each image's target."""
    return jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]


def _patches(model: Classifier, x: jax.Array) -> jax.Array:
    """Leaves out the class token, which a vision transformer's map has at every place alike."""
    return x[..., : model.width] if isinstance(model, VisionTransformer) else x


def _activation_map(weigh: Callable) -> Callable:
    """Returns the method that adds up channels by the weights `weigh(map, gradient)` gives."""

    def maps(model, images, targets, stage):
        x = to_map(model, model.preprocess(images), stage)
        gradient = jax.grad(lambda x: logit_of(from_map(model, x, stage), targets).sum())(x)
        x, gradient = (_patches(model, y).astype(jnp.float32) for y in (x, gradient))
        cam = jax.nn.relu((weigh(x, gradient) * x).sum(axis=-1))
        return jax.image.resize(cam, images.shape[:3], "linear")

    return maps


def _positive_gradient(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """Grad-CAM++'s weights, up to a factor of each image: its target is the exponential logit."""
    squared = gradient**2
    divisor = 2 * squared + x.sum(axis=(1, 2), keepdims=True) * gradient**3
    alpha = jnp.where(divisor == 0, 0.0, squared / jnp.where(divisor == 0, 1.0, divisor))
    return (alpha * jax.nn.relu(gradient)).sum(axis=(1, 2), keepdims=True)


def pixel_gradient(model: Classifier, images: jax.Array, targets: jax.Array) -> jax.Array:
    """[B, S, S, 3] float in 0..255, [B] -> [B, S, S, 3], the change of a logit per grey level."""
    return jax.grad(lambda x: logit_of(model(model.preprocess(x)), targets).sum())(images)


def _mean_of_gradients(model, copies: jax.Array, targets: jax.Array) -> jax.Array:
    """[B, n, S, S, 3], [B] -> [B, S, S, 3], the mean over the n copies of an image."""
    flat, repeated = copies.reshape(-1, *copies.shape[2:]), jnp.repeat(targets, copies.shape[1])
    return pixel_gradient(model, flat, repeated).reshape(copies.shape).mean(axis=1)


def integrated_gradients(
    model: Classifier, images: jax.Array, targets: jax.Array, steps: int = PATH_STEPS
) -> jax.Array:
    """[B, S, S, 3] float in 0..255, [B] -> [B, S, S, 3], each value's share in the logit.

    They sum up to its difference from the logit of a black image.
    """
    places = (jnp.arange(steps) + 0.5) / steps
    path = images[:, None] * places[:, None, None, None]
    return images * _mean_of_gradients(model, path, targets)


def _smooth_gradient(model, images, targets, stage):
    # The same noise for every image, so that a map does not depend on the others of its batch.
    noise = jax.random.normal(jax.random.key(0), (SAMPLES, *images.shape[1:]))
    spread = NOISE * jnp.ptp(images, axis=(1, 2, 3), keepdims=True)
    noisy = images[:, None] + spread[:, None] * noise
    return jnp.abs(_mean_of_gradients(model, noisy, targets)).sum(axis=-1)


def _over_channels(attribute: Callable) -> Callable:
    """Returns the method that adds up what `attribute` gives for the channels of a pixel."""
    return lambda model, images, targets, stage: jnp.abs(attribute(model, images, targets)).sum(-1)


def windows(size: int) -> np.ndarray:
    """Returns bool [W, size, size]: the occluding square at each of its places."""
    side = max(1, round(size / 4))
    starts = np.unique(np.linspace(0, size - side, WINDOWS).round().astype(int))
    inside = (np.arange(size) >= starts[:, None]) & (np.arange(size) < starts[:, None] + side)
    return (inside[:, None, :, None] & inside[None, :, None, :]).reshape(-1, size, size)


def _occlusion(model, images, targets, stage):
    masks = windows(images.shape[1])
    mean = images.mean(axis=(1, 2), keepdims=True)[:, None]
    occluded = jnp.where(masks[..., None], mean, images[:, None])  # [B, W, S, S, 3]
    logits = model(model.preprocess(occluded.reshape(-1, *images.shape[1:])))
    covered = logit_of(logits, jnp.repeat(targets, len(masks))).reshape(len(images), -1)
    drop = logit_of(model(model.preprocess(images)), targets)[:, None] - covered  # [B, W]
    total = jnp.einsum("bw,wij->bij", drop, masks.astype(np.float32), precision="highest")
    return jax.nn.relu(total / masks.sum(axis=0))


@dataclass(frozen=True)
class Method:
    """A way to explain a logit."""

    maps: Callable  # (model, images float32 in 0..255, targets, stage) -> [B, S, S] >= 0
    title: str  # as a reader sees it
    kind: str  # "map" of a stage's input, "pixels" by gradient, "logits" of any classifier
    copies: int = 1  # of an image, in memory at once
    package: str = ""  # that must be installed; `maps` is then (predict, image, target) -> [S, S]


# With their papers on arXiv. Score-CAM (1910.01279) is left out: on 100 test images of the digits,
# its gain over a random map was 0.14 (cnn) and 0.28 (cnn_deep), HiResCAM's 0.21 and 0.37.
METHODS = {
    "gradcam": Method(  # 1610.02391
        _activation_map(lambda x, g: g.mean((1, 2), keepdims=True)), "Grad-CAM", "map"
    ),
    "gradcam++": Method(_activation_map(_positive_gradient), "Grad-CAM++", "map"),  # 1710.11063
    "hirescam": Method(_activation_map(lambda x, g: g), "HiResCAM", "map"),  # 2011.08891
    "gradient": Method(_over_channels(pixel_gradient), "gradient", "pixels"),  # 1312.6034
    "smoothgrad": Method(_smooth_gradient, "SmoothGrad", "pixels", SAMPLES),  # 1706.03825
    "integrated": Method(  # 1703.01365
        _over_channels(integrated_gradients), "integrated gradients", "pixels", PATH_STEPS
    ),
    "occlusion": Method(_occlusion, "occlusion", "logits", WINDOWS**2),  # 1311.2901
    "lime": Method(packages.lime_map, "LIME", "logits", package="lime"),  # 1602.04938
    "shap": Method(packages.shap_map, "SHAP", "logits", package="shap"),  # 1705.07874
}


def explainer(
    model: Classifier,
    image_size: int,
    method: str = "gradcam",
    stage: int | None = None,
    batch: int = 64,
) -> Callable[..., np.ndarray]:
    """Returns a function of images uint8 [N, S, S, 3] and classes [N] to maps float32 [N, S, S].

    It is compiled once, seeded, and also takes another model of the same architecture. `stage` is
    the one whose input is the map of a CAM, None the default one; `batch` counts the copies that a
    method makes of images. Raises UserError for a method or stage that does not suit the model.
    """
    entry = METHODS[choose("method", method, METHODS)]
    if entry.kind != "logits" and not model.trained_by_gradient:
        raise UserError(
            f"{type(model).__name__} has no layers that learn by gradient, which {entry.title} "
            "needs: use method=occlusion"
        )
    packages.need(entry.package)
    if entry.kind != "map" and stage is not None:
        raise UserError(f"{entry.title} looks at pixels, not at a stage: leave out stage={stage}")
    stage = default_stage(model, image_size) if stage is None else stage
    suited = [s for s in range(len(model.stages)) if map_side(model, image_size, s)]
    if stage not in suited:
        raise UserError(
            f"stage {stage} of this {type(model).__name__} is given no map of the image: choose "
            f"one of {', '.join(map(str, suited))} (0 is the image itself)"
        )
    if entry.package:
        return _one_by_one(model, entry)

    @jax.jit
    def maps(model: Classifier, images, targets) -> jax.Array:
        return entry.maps(model, images.astype(jnp.float32), targets, stage)

    size = max(1, batch // entry.copies)

    def explain(images: np.ndarray, targets: np.ndarray, other: Classifier = model):
        return in_batches(partial(maps, other), images, np.asarray(targets, np.int32), size=size)

    return explain


def _one_by_one(model: Classifier, entry: Method) -> Callable[..., np.ndarray]:
    """Returns the function of `explainer` for a method of a package, which sees one image."""

    @jax.jit
    def logits(model: Classifier, images) -> jax.Array:
        return model(model.preprocess(images)).astype(jnp.float32)

    def explain(images: np.ndarray, targets: np.ndarray, other: Classifier = model):
        def predict(some: np.ndarray) -> np.ndarray:
            # Always whole batches, as every other number of images would be compiled anew.
            rows = np.arange(-(-len(some) // packages.BATCH) * packages.BATCH) % len(some)
            some, program = some.astype(np.float32), partial(logits, other)
            return in_batches(program, some[rows], size=packages.BATCH)[: len(some)]

        maps = [entry.maps(predict, *one) for one in zip(images, map(int, targets), strict=True)]
        return np.stack(maps).astype(np.float32)

    return explain
