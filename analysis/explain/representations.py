"""What a network makes of images: its first filters, feature maps, and how alike features are.

The last by linear CKA. Centred kernel alignment (Kornblith et al. 2019, arXiv:1905.00414) of two
feature matrices is the cosine between their centred Gram matrices. It is 1 for features that differ
by a rotation and a scale, and compares layers of any two widths. With fewer images than features
the plain estimate is far too high: two random matrices of 500 rows and 10,000 columns reach 0.95.
The default is therefore the debiased one, whose Gram matrices are U-centred (Székely and Rizzo
2014): their inner product is the unbiased HSIC of Song et al. 2012, as Nguyen et al. 2021
(arXiv:2010.15327) and Murphy et al. 2024 (arXiv:2405.01012) use it. It can fall slightly below 0.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from analysis.forward import compiled, in_batches, load_classifier, load_test_images
from analysis.page.figures import literal, plt
from analysis.runs import FinishedRun
from errors import UserError
from models import Classifier
from models.classifier import split_model, stage_of

MAX_FILTERS = 64
IMAGES = 512  # of the test images, at most
PIXELS = "pixels"  # the row of models whose features are the image itself


class NothingToShow(UserError):
    """A model has no such part: no mistake unless the user asked for it."""


# --- the first layer ------------------------------------------------------------------------------


def first_filters(model: Classifier) -> np.ndarray:
    """Returns the weights of a model's first layer as images, float32 [N, h, w, 3] in RGB order.

    The kernel of the first convolution (of a vision transformer: of its patches), or of the first
    dense layer on the pixels, whose units then are images themselves.

    Raises:
      NothingToShow: the first layer has no weights on the image, as in nearest neighbours.
    """
    kernels = [x for path, x in split_model(model)[1].items() if stage_of(path) == 0]
    convolutions = [kernel for kernel in kernels if kernel.ndim == 4 and kernel.shape[2] == 3]
    if convolutions:
        filters = np.asarray(convolutions[0], np.float32).transpose(3, 0, 1, 2)
    else:
        filters = _dense_filters([kernel for kernel in kernels if kernel.ndim == 2])
    return filters[..., ::-1] if model.preprocessing.channels == "bgr" else filters


def _dense_filters(kernels: list[jax.Array]) -> np.ndarray:
    for kernel in kernels:
        side = round((kernel.shape[0] / 3) ** 0.5)
        if kernel.shape[0] == 3 * side * side:
            return np.asarray(kernel, np.float32).T.reshape(-1, side, side, 3)
    raise NothingToShow(
        "the first layer of this model has no weights on the image, so there are no filters to "
        "show: choose a model that is trained by gradient"
    )


def has_one_layer(model: Classifier) -> bool:
    """Returns whether the first layer gives the logits: then its filters are class templates."""
    return sum(kernel.ndim > 1 for kernel in split_model(model)[1].values()) == 1


def strongest(filters: np.ndarray, limit: int = MAX_FILTERS) -> np.ndarray:
    """Returns the `limit` filters [N, h, w, 3] of the largest norm, in their own order."""
    norms = np.linalg.norm(filters.reshape(len(filters), -1), axis=1)
    return filters[np.sort(np.argsort(-norms, kind="stable")[:limit])]


# --- feature maps ---------------------------------------------------------------------------------


def map_shapes(model: Classifier, image_size: int) -> dict[int, tuple[int, int, int]]:
    """Returns the shape (h, w, C) of the map that each stage hands on, where h and w exceed 1."""

    def outputs(images: jax.Array) -> list[jax.Array]:
        x, every = model.preprocess(images), []
        for stage in range(len(model.stages)):
            x = model.run(x, stage, stage + 1)
            every.append(x)
        return every

    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.uint8)
    shapes = [x.shape for x in jax.eval_shape(outputs, image)]
    return {i: s[1:] for i, s in enumerate(shapes) if len(s) == 4 and min(s[1:3]) > 1}


def feature_maps(model: Classifier, image: np.ndarray, stage: int) -> np.ndarray:
    """Returns what one stage makes of one image.

    Args:
      model: in evaluation mode.
      image: uint8 [S, S, 3].
      stage: its number in `model.stages`, from 0.

    Returns:
      float32 [h, w, C].

    Raises:
      UserError: the stage does not hand on a map; names those that do.
    """
    shapes = map_shapes(model, image.shape[0])
    if stage not in shapes:
        raise UserError(
            f"stage {stage} of this {type(model).__name__} hands on no feature map of more than "
            f"one place; those that do: {', '.join(map(str, shapes)) or 'none'}"
        )
    run = compiled(model, lambda m, x: m.run(m.preprocess(x), 0, stage + 1).astype(jnp.float32))
    return np.asarray(run(jnp.asarray(image[None])))[0]


def telling_stage(model: Classifier, image_size: int) -> int | None:
    """Returns the last stage whose map has 8 places a side, else the first map's; None: no map."""
    shapes = map_shapes(model, image_size)
    large = [stage for stage, shape in shapes.items() if min(shape[:2]) >= 8]
    return large[-1] if large else next(iter(shapes), None)


# --- similarity -----------------------------------------------------------------------------------


def centred_gram(features: np.ndarray, debiased: bool = True) -> np.ndarray:
    """Returns the centred Gram matrix [n, n] of features [n, d], scaled to a norm of 1.

    n times n rather than d times d, for a few hundred images stand against thousands of features.
    Features that are the same for every image give NaN.

    Args:
      features: a row per image.
      debiased: U-centring with a zero diagonal instead of double centring.

    Raises:
      ValueError: fewer than 4 images, of which nothing unbiased can be said.
    """
    count = len(features)
    if count < 4:
        raise ValueError(f"{count} images are too few to compare representations: need 4")
    x = np.asarray(features, np.float64).reshape(count, -1)
    x = x - x.mean(axis=0)  # changes neither centring, and keeps the numbers small
    gram = x @ x.T
    if debiased:
        np.fill_diagonal(gram, 0)
        rows = gram.sum(axis=1) / (count - 2)
        gram += rows.sum() / (count - 1) - rows[:, None] - rows
        np.fill_diagonal(gram, 0)
    norm = np.linalg.norm(gram)
    return gram / norm if norm > 0 else np.full_like(gram, np.nan)


def linear_cka(x: np.ndarray, y: np.ndarray, debiased: bool = True) -> float:
    """Returns the similarity of two representations of the same images.

    Args:
      x: [n, p].
      y: [n, q], rows in the same order.
      debiased: see the top of this file.

    Raises:
      ValueError: the rows differ in number, or are fewer than 4.
    """
    return float(np.vdot(centred_gram(x, debiased), centred_gram(y, debiased)))


def sees_pixels(model: Classifier) -> bool:
    """Returns whether a model's features are the image itself, for all of it is its head."""
    return len(model.stages) == 1


def representation(model: Classifier, images: np.ndarray) -> np.ndarray:
    """Returns what a model hands to its classifier, averaged over places.

    Args:
      model: in evaluation mode.
      images: uint8 [n, S, S, 3].

    Returns:
      [n, C]; [n, S * S * 3] pixels if `sees_pixels`.
    """
    if sees_pixels(model):
        return images.reshape(len(images), -1)
    pooled = compiled(model, lambda m, x: m.features(m.preprocess(x)).mean(axis=(1, 2)))
    return in_batches(pooled, images)


@dataclass(frozen=True)
class Similarity:
    """Debiased linear CKA between models, NaN on the diagonal of one with a single seed."""

    labels: list[str]
    matrix: np.ndarray  # [M, M]; the diagonal compares the first two seeds
    images: int
    left_out: list[str]  # models that were tested on other images than the first one


def compare_representations(
    groups: dict[str, list[FinishedRun]], data_path: str = "", images: int = IMAGES
) -> Similarity:
    """Compares the first seed of every model with that of every other, and with its second seed.

    Models whose features are the pixels share one row, of the pixels of the first of them.

    Args:
      groups: complete runs by label.
      data_path: where the data lies now, "" for where the runs found it.
      images: test images used, evenly spread over all, at most.

    Raises:
      UserError: there are fewer than 4 test images, or the data is not that of the runs.
    """
    ids = next(iter(groups.values()))[0].test["ids"]
    if min(len(ids), images) < 4:
        raise UserError(f"representations need at least 4 test images to compare, got {len(ids)}")
    rows = np.linspace(0, len(ids) - 1, min(images, len(ids))).round().astype(int)
    grams: dict[str, list[np.ndarray]] = {}
    left_out = []
    for label, runs in groups.items():
        if not all(np.array_equal(run.test["ids"], ids) for run in runs[:2]):
            left_out.append(label)
            continue
        for name, features in _representations(label, runs[:2], rows, data_path, PIXELS in grams):
            grams.setdefault(name, []).append(centred_gram(features))
    labels = list(grams)
    first = np.stack([grams[label][0].ravel() for label in labels])
    matrix = first @ first.T
    for i, label in enumerate(labels):
        seeds = grams[label]
        matrix[i, i] = np.vdot(*seeds) if len(seeds) > 1 else np.nan
    return Similarity(labels, matrix, len(rows), left_out)


def _representations(
    label: str, runs: list[FinishedRun], rows: np.ndarray, data_path: str, has_pixels: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the name and the features of each run, of pixels only the first time."""
    for run in runs:
        model = load_classifier(run)
        if sees_pixels(model) and has_pixels:
            return
        images = load_test_images(run, data_path)[rows]
        yield (PIXELS if sees_pixels(model) else label), representation(model, images)
        has_pixels = has_pixels or sees_pixels(model)


def describe(similarity: Similarity) -> str:
    """Returns the most and the least alike pair of models, and what was left out, as text."""
    labels = similarity.labels
    pairs = [(i, j) for i in range(len(labels)) for j in range(i)]
    pairs = [pair for pair in pairs if not np.isnan(similarity.matrix[pair])]
    ranked = sorted(pairs, key=lambda pair: similarity.matrix[pair])
    named = [f"{labels[j]} and {labels[i]} ({similarity.matrix[i, j]:.2f})" for i, j in ranked]
    text = ""
    if len(ranked) > 1:
        text = f"The most alike representations are those of {named[-1]}, the least {named[0]}."
    elif ranked:
        text = f"The representations compared are those of {named[0]}."
    if similarity.left_out:
        names = ", ".join(similarity.left_out)
        text += f" Left out, for they were tested on other images: {names}."
    return text.strip()


def draw_similarity(similarity: Similarity) -> plt.Figure:
    """A matrix with its numbers; the diagonal is between two seeds, "–" where there is one."""
    count = len(similarity.labels)
    side = max(3.6, 0.62 * count + 1.6)
    figure, axis = plt.subplots(figsize=(side + 0.8, side), layout="constrained")
    shown = axis.imshow(similarity.matrix, cmap="Blues", vmin=0, vmax=1)
    for (i, j), value in np.ndenumerate(similarity.matrix):
        text = "–" if np.isnan(value) else f"{value:.2f}"
        ink = "white" if value > 0.7 else "black"
        axis.text(j, i, text, ha="center", va="center", fontsize=9, color=ink)
    names = [literal(name) for name in similarity.labels]
    axis.set_xticks(range(count), names, rotation=45, ha="right", fontsize=9)
    axis.set_yticks(range(count), names, fontsize=9)
    axis.spines[:].set_visible(False)
    figure.colorbar(shown, ax=axis, shrink=0.8, label="linear CKA, debiased")
    return figure
