"""Where in an image is the evidence for a class? Saliency maps of any model.

Every method explains one logit, before softmax, of one class. Maps are raw: never negative, not
scaled, of the size of the image. The methods are of three kinds:

* of a stage's output (class activation maps, CAM): `gradcam`, `gradcam++`, `hirescam`, `scorecam`;
* of the pixels, by gradient: `gradient`, `smoothgrad`, `integrated`;
* of the answers alone, which any classifier gives: `occlusion`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from analysis.forward import in_batches
from errors import UserError, choose
from models import Classifier
from models.vit import VisionTransformer

SMALLEST_MAP = 4  # places a side that a stage's output needs to say where anything is
CHANNELS = 64  # of Score-CAM: those of the highest activation
SAMPLES = 16  # noisy copies of SmoothGrad, with
NOISE = 0.15  # of the image's range of values as their standard deviation
PATH_STEPS = 32  # of integrated gradients, each at the middle of its part of the path
WINDOWS = 7  # places of the occluding square in each direction; its side is a quarter of the image


# --- stages ---------------------------------------------------------------------------------------


def to_map(model: Classifier, x: jax.Array, stage: int) -> jax.Array:
    """[B, S, S, 3] preprocessed -> what `stages[:stage]` make of it, [B, h, w, C] of an image.

    The last stage's input is `model.features`, which is a map even where stages hand on tokens.
    """
    return model.features(x) if stage == len(model.stages) - 1 else model.run(x, 0, stage)


def from_map(model: Classifier, x: jax.Array, stage: int) -> jax.Array:
    """What `to_map` returns -> logits [B, K] float32."""
    last = stage == len(model.stages) - 1
    return (model.classify(x) if last else model.run(x, stage)).astype(jnp.float32)


def map_side(model: Classifier, image_size: int, stage: int) -> int:
    """Returns the side of the square map that a stage is given, 0 if it is given no such map."""
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    shape = jax.eval_shape(lambda x: to_map(model, x, stage), image).shape
    return shape[1] if len(shape) == 4 and shape[1] == shape[2] else 0


def default_stage(model: Classifier, image_size: int) -> int:
    """Returns the last stage whose input is a map of at least 4x4 places.

    0 where there is none but the image itself, as in a linear classifier: then there is no layer
    that could tell where it looks, and CAM methods weigh the colours of pixels.
    """
    for stage in reversed(range(1, len(model.stages))):
        if map_side(model, image_size, stage) >= SMALLEST_MAP:
            return stage
    return 0


def check_stage(model: Classifier, image_size: int, stage: int) -> int:
    """Returns `stage`.

    Raises:
      UserError: there is no such stage, or no map at it.
    """
    suited = [s for s in range(len(model.stages)) if map_side(model, image_size, s)]
    if stage not in suited:
        raise UserError(
            f"stage {stage} of this {type(model).__name__} is given no map of the image: choose "
            f"one of {', '.join(map(str, suited))} (0 is the image itself)"
        )
    return stage


# --- class activation maps ------------------------------------------------------------------------


def logit_of(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """[B, K], int [B] -> [B], the logit of each image's target."""
    return jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]


def resize(maps: jax.Array, size: int) -> jax.Array:
    """[B, h, w, ...] -> [B, size, size, ...], bilinearly."""
    return jax.image.resize(maps, (len(maps), size, size, *maps.shape[3:]), "linear")


def _patches(model: Classifier, x: jax.Array) -> jax.Array:
    """Leaves out the class token that a vision transformer's map carries at every place alike."""
    return x[..., : model.width] if isinstance(model, VisionTransformer) else x


def _activation_map(weigh: Callable) -> Callable:
    """Returns the method that adds up channels by the weights `weigh(map, gradient)` gives."""

    def maps(model, images, targets, stage, seed):
        del seed
        x = to_map(model, model.preprocess(images), stage)
        gradient = jax.grad(lambda x: logit_of(from_map(model, x, stage), targets).sum())(x)
        x, gradient = (_patches(model, y).astype(jnp.float32) for y in (x, gradient))
        cam = (weigh(x, gradient) * x).sum(axis=-1)
        return resize(jax.nn.relu(cam), images.shape[1])

    return maps


def _mean_gradient(x: jax.Array, gradient: jax.Array) -> jax.Array:
    return gradient.mean(axis=(1, 2), keepdims=True)


def _positive_gradient(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """Grad-CAM++'s weights, up to a factor of each image: its target is the exponential logit."""
    squared = gradient**2
    divisor = 2 * squared + x.sum(axis=(1, 2), keepdims=True) * gradient**3
    alpha = jnp.where(divisor == 0, 0.0, squared / jnp.where(divisor == 0, 1.0, divisor))
    return (alpha * jax.nn.relu(gradient)).sum(axis=(1, 2), keepdims=True)


def _score_cam(model, images, targets, stage, seed):
    del seed
    size, pixels = images.shape[1], model.preprocess(images)
    x = _patches(model, to_map(model, pixels, stage)).astype(jnp.float32)
    _, channels = jax.lax.top_k(x.max(axis=(1, 2)), min(CHANNELS, x.shape[-1]))  # [B, k]
    x = jnp.take_along_axis(x, channels[:, None, None], axis=-1)  # [B, h, w, k]
    masks = resize(x, size)
    low, high = (extreme(masks, axis=(1, 2), keepdims=True) for extreme in (jnp.min, jnp.max))
    masks = (masks - low) / jnp.where(high > low, high - low, 1.0)
    masked = pixels[:, None] * jnp.moveaxis(masks, -1, 1)[..., None]  # [B, k, S, S, 3]
    scores = logit_of(
        model(masked.reshape(-1, size, size, 3)), jnp.repeat(targets, channels.shape[1])
    )
    # The paper takes off the logit of an empty image first, which softmax would not notice.
    weights = jax.nn.softmax(scores.reshape(channels.shape), axis=1)
    return resize(jax.nn.relu((x * weights[:, None, None]).sum(axis=-1)), size)


# --- gradients of the pixels ----------------------------------------------------------------------


def pixel_gradient(model: Classifier, images: jax.Array, targets: jax.Array) -> jax.Array:
    """[B, S, S, 3] float in 0..255, [B] -> [B, S, S, 3], the change of a logit per grey level."""

    def total(images: jax.Array) -> jax.Array:
        return logit_of(model(model.preprocess(images)), targets).sum()

    return jax.grad(total)(images)


def _mean_of_gradients(model, copies: jax.Array, targets: jax.Array) -> jax.Array:
    """[B, n, S, S, 3], [B] -> [B, S, S, 3], the mean over the n copies of an image."""
    count = copies.shape[1]
    gradient = pixel_gradient(
        model, copies.reshape(-1, *copies.shape[2:]), jnp.repeat(targets, count)
    )
    return gradient.reshape(copies.shape).mean(axis=1)


def integrated_gradients(
    model: Classifier, images: jax.Array, targets: jax.Array, steps: int = PATH_STEPS
) -> jax.Array:
    """Signed shares of every value in the difference of logits between an image and a black one.

    Sundararajan et al. 2017 (arXiv:1703.01365). Over an image they sum up to that difference, the
    more exactly the more steps the path from black has.

    Args:
      model: trained by gradient.
      images: [B, S, S, 3] float in 0..255.
      targets: int [B].
      steps: of the path.

    Returns:
      float32 [B, S, S, 3].
    """
    places = (jnp.arange(steps) + 0.5) / steps
    path = images[:, None] * places[:, None, None, None]
    return images * _mean_of_gradients(model, path, targets)


def _gradient(model, images, targets, stage, seed):
    return jnp.abs(pixel_gradient(model, images, targets)).sum(axis=-1)


def _smooth_gradient(model, images, targets, stage, seed):
    # The same noise for every image, so that a map does not depend on the others of its batch.
    noise = jax.random.normal(jax.random.key(seed), (SAMPLES, *images.shape[1:]))
    axes = (1, 2, 3)
    spread = NOISE * (images.max(axes, keepdims=True) - images.min(axes, keepdims=True))
    noisy = images[:, None] + spread[:, None] * noise
    return jnp.abs(_mean_of_gradients(model, noisy, targets)).sum(axis=-1)


def _integrated(model, images, targets, stage, seed):
    return jnp.abs(integrated_gradients(model, images, targets)).sum(axis=-1)


# --- answers alone --------------------------------------------------------------------------------


def windows(size: int) -> np.ndarray:
    """Returns bool [W, size, size]: the occluding square at each of its places."""
    side = max(1, round(size / 4))
    starts = np.unique(np.linspace(0, size - side, WINDOWS).round().astype(int))
    inside = (np.arange(size) >= starts[:, None]) & (np.arange(size) < starts[:, None] + side)
    return (inside[:, None, :, None] & inside[None, :, None, :]).reshape(-1, size, size)


def _occlusion(model, images, targets, stage, seed):
    masks = windows(images.shape[1])
    mean = images.mean(axis=(1, 2), keepdims=True)[:, None]
    occluded = jnp.where(masks[..., None], mean, images[:, None])  # [B, W, S, S, 3]
    logits = model(model.preprocess(occluded.reshape(-1, *images.shape[1:])))
    covered = logit_of(logits, jnp.repeat(targets, len(masks))).reshape(len(images), -1)
    drop = logit_of(model(model.preprocess(images)), targets)[:, None] - covered  # [B, W]
    total = jnp.einsum("bw,wij->bij", drop, masks.astype(np.float32), precision="highest")
    return jax.nn.relu(total / masks.sum(axis=0))


# --- all of them ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A way to explain a logit.

    Attributes:
      maps: of (model, images [B, S, S, 3] float32 in 0..255, targets [B], stage, seed); returns
        [B, S, S] float32, not negative.
      title: as a reader sees it.
      kind: "map" of a stage's output, "pixels" by gradient, "answers" of any classifier.
      copies: of an image that are in memory at once.
    """

    maps: Callable
    title: str
    kind: str
    copies: int = 1


METHODS = {
    # Selvaraju et al. 2017, arXiv:1610.02391
    "gradcam": Method(_activation_map(_mean_gradient), "Grad-CAM", "map"),
    # Chattopadhay et al. 2018, arXiv:1710.11063
    "gradcam++": Method(_activation_map(_positive_gradient), "Grad-CAM++", "map"),
    # Draelos and Carin 2020, arXiv:2011.08891
    "hirescam": Method(_activation_map(lambda x, gradient: gradient), "HiResCAM", "map"),
    # Wang et al. 2020, arXiv:1910.01279
    "scorecam": Method(_score_cam, "Score-CAM", "map", CHANNELS),
    # Simonyan et al. 2013, arXiv:1312.6034
    "gradient": Method(_gradient, "gradient", "pixels"),
    # Smilkov et al. 2017, arXiv:1706.03825
    "smoothgrad": Method(_smooth_gradient, "SmoothGrad", "pixels", SAMPLES),
    "integrated": Method(_integrated, "integrated gradients", "pixels", PATH_STEPS),
    # Zeiler and Fergus 2013, arXiv:1311.2901
    "occlusion": Method(_occlusion, "occlusion", "answers", WINDOWS**2),
}


def explainer(
    model: Classifier,
    image_size: int,
    method: str = "gradcam",
    stage: int | None = None,
    seed: int = 0,
    batch: int = 64,
) -> Callable[..., np.ndarray]:
    """Returns `explain` as a function of images and targets that is compiled once.

    The function takes a third argument: another model of the same architecture to explain instead.
    The other arguments and what is raised are those of `explain`.
    """
    entry = METHODS[choose("method", method, METHODS)]
    if entry.kind != "answers" and not model.trained_by_gradient:
        raise UserError(
            f"{type(model).__name__} has no layers that learn by gradient, which {entry.title} "
            "needs: use method=occlusion"
        )
    if entry.kind != "map" and stage is not None:
        raise UserError(f"{entry.title} looks at pixels, not at a stage: leave out stage={stage}")
    if stage is None:
        stage = default_stage(model, image_size)
    check_stage(model, image_size, stage)

    @jax.jit
    def maps(model: Classifier, images, targets) -> jax.Array:
        return entry.maps(model, images.astype(jnp.float32), targets, stage, seed)

    size = max(1, batch // entry.copies)

    def explain_all(images: np.ndarray, targets: np.ndarray, other: Classifier = model):
        return in_batches(partial(maps, other), images, np.asarray(targets, np.int32), size=size)

    return explain_all


def explain(
    model: Classifier,
    images: np.ndarray,
    targets: np.ndarray,
    method: str = "gradcam",
    stage: int | None = None,
    seed: int = 0,
    batch: int = 64,
) -> np.ndarray:
    """Returns a map for each image: where the evidence for its target lies.

    Args:
      model: in evaluation mode.
      images: uint8 [N, S, S, 3].
      targets: int [N], the class to explain.
      method: a key of `METHODS`.
      stage: of CAM methods, the stage whose input is the map; None is `default_stage`.
      seed: of SmoothGrad's noise.
      batch: images in memory at once, copies that a method makes of them included.

    Returns:
      float32 [N, S, S], raw: not negative, not scaled, all zero without positive evidence.

    Raises:
      UserError: an unknown method, a stage without a map or of a method that has no use for it, or
        a method that needs gradients of a model that has none.
    """
    return explainer(model, images.shape[1], method, stage, seed, batch)(images, targets)
