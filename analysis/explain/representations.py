"""What a network makes of images: its first filters, feature maps, and how alike features are.

Similarity is debiased linear CKA (Kornblith et al. 2019, arXiv:1905.00414): the cosine between the
U-centred Gram matrices (Székely and Rizzo 2014) of two feature matrices, 1 for features that differ
by a rotation and a scale. It can fall slightly below 0; the plain estimate is far too high with
fewer images than features.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from analysis.forward import compiled, in_batches, load_classifier, load_test_images
from analysis.page.figures import heat_map, plt
from analysis.runs import Groups, evenly_spaced, same_images
from errors import UserError
from models import Classifier
from models.classifier import split_model, stage_of

PIXELS = "pixels"  # the row of models whose features are the image itself


class NothingToShow(UserError):
    """A model has no such part: no mistake unless the user asked for it."""


def first_filters(model: Classifier) -> np.ndarray:
    """Returns the weights of a first convolution or dense layer on pixels, [N, h, w, 3] in RGB."""
    params = split_model(model)[1].items()
    kernels = [np.asarray(x, np.float32) for path, x in params if stage_of(path) == 0]
    filters = [x.transpose(3, 0, 1, 2) for x in kernels if x.ndim == 4 and x.shape[2] == 3]
    for kernel in kernels:
        side = round((kernel.shape[0] / 3) ** 0.5)
        if kernel.ndim == 2 and kernel.shape[0] == 3 * side * side:
            filters.append(kernel.T.reshape(-1, side, side, 3))
    if not filters:
        raise NothingToShow("the first layer has no weights on the image: choose another model")
    return filters[0][..., ::-1] if model.preprocessing.channels == "bgr" else filters[0]


def has_one_layer(model: Classifier) -> bool:
    """Returns whether the first layer gives the logits: then its filters are class templates."""
    return sum(kernel.ndim > 1 for kernel in split_model(model)[1].values()) == 1


def strongest(filters: np.ndarray, limit: int = 64) -> np.ndarray:
    """Returns the `limit` filters [N, h, w, 3] of the largest norm, in their own order."""
    norms = np.linalg.norm(filters.reshape(len(filters), -1), axis=1)
    return filters[np.sort(np.argsort(-norms, kind="stable")[:limit])]


def map_shapes(model: Classifier, image_size: int) -> dict[int, tuple[int, int, int]]:
    """Returns the shape (h, w, C) of the map that each stage returns, where h and w exceed 1."""
    x, shapes = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32), {}
    for i in range(len(model.stages)):
        x = jax.eval_shape(lambda x, i=i: model.run(x, i, i + 1), x)
        if len(x.shape) == 4 and min(x.shape[1:3]) > 1:
            shapes[i] = x.shape[1:]
    return shapes


def feature_maps(model: Classifier, image: np.ndarray, stage: int) -> np.ndarray:
    """Returns the output of a stage for one image: uint8 [S, S, 3] -> float32 [h, w, C]."""
    shapes = map_shapes(model, image.shape[0])
    if stage not in shapes:
        raise UserError(
            f"stage {stage} of this {type(model).__name__} returns no feature map of more than "
            f"one place; those that do: {', '.join(map(str, shapes)) or 'none'}"
        )
    run = compiled(model, lambda m, x: m.run(m.preprocess(x), 0, stage + 1).astype(jnp.float32))
    return np.asarray(run(jnp.asarray(image[None])))[0]


def telling_stage(model: Classifier, image_size: int) -> int | None:
    """Returns the last stage whose map has 8 places a side, else the first with a map, or None."""
    shapes = map_shapes(model, image_size)
    large = [stage for stage, shape in shapes.items() if min(shape[:2]) >= 8]
    return large[-1] if large else next(iter(shapes), None)


def centred_gram(features: np.ndarray) -> np.ndarray:
    """Returns the U-centred Gram matrix [n, n] of features [n, ...], scaled to a norm of 1.

    Debiased CKA is the sum of the products of two of them, NaN for features that are all the same.
    """
    count = len(features)
    if count < 4:
        raise UserError(f"{count} test images are too few to compare representations: need 4")
    x = np.asarray(features, np.float64).reshape(count, -1)
    x = x - x.mean(axis=0)  # does not change the result, and keeps the numbers small
    gram = x @ x.T  # [n, n] rather than [d, d]: a few hundred images, thousands of features
    np.fill_diagonal(gram, 0)
    rows = gram.sum(axis=1) / (count - 2)
    gram += rows.sum() / (count - 1) - rows[:, None] - rows
    np.fill_diagonal(gram, 0)
    norm = np.linalg.norm(gram)
    return gram / norm if norm > 0 else np.full_like(gram, np.nan)


def representation(model: Classifier, images: np.ndarray) -> np.ndarray:
    """Returns a model's last features, averaged over places [n, C], or the pixels."""
    if len(model.stages) == 1:
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


def compare_representations(groups: Groups, data_path: str = "", images: int = 512) -> Similarity:
    """Compares the first seed of every model with that of every other, and with its second."""
    first_run = next(iter(groups.values()))[0]
    rows = evenly_spaced(len(first_run.test["ids"]), images)
    grams: dict[str, list[np.ndarray]] = {}
    left_out = []
    for label, runs in groups.items():
        if not all(same_images(run, first_run) for run in runs[:2]):
            left_out.append(label)
            continue
        for run in runs[:2]:
            model = load_classifier(run)
            name = PIXELS if len(model.stages) == 1 else label
            if name == PIXELS and PIXELS in grams:
                break
            features = representation(model, load_test_images(run, data_path)[rows])
            grams.setdefault(name, []).append(centred_gram(features))
    first = np.stack([seeds[0].ravel() for seeds in grams.values()])
    matrix = first @ first.T
    own = [np.vdot(*seeds) if len(seeds) > 1 else np.nan for seeds in grams.values()]
    np.fill_diagonal(matrix, own)
    return Similarity(list(grams), matrix, len(rows), left_out)


def describe(similarity: Similarity) -> str:
    """Returns the most and the least alike pair of models, and what was left out."""
    labels, matrix, text = similarity.labels, similarity.matrix, ""
    pairs = [(i, j) for i in range(len(labels)) for j in range(i) if not np.isnan(matrix[i, j])]
    pairs.sort(key=lambda pair: matrix[pair])
    named = [f"{labels[j]} and {labels[i]} ({matrix[i, j]:.2f})" for i, j in pairs]
    if len(named) > 1:
        text = (
            f"{named[-1]} have the most similar features, {named[0]} the least (CKA in brackets)."
        )
    elif named:
        text = f"CKA between the features of {named[0]}."
    if similarity.left_out:
        names = ", ".join(similarity.left_out)
        text += f" Left out, as they were tested on other images: {names}."
    return text.strip()


def draw_similarity(similarity: Similarity) -> plt.Figure:
    """Draws the matrix with its numbers; the diagonal is between two seeds."""
    labels, matrix = similarity.labels, similarity.matrix
    side = max(3.6, 0.62 * len(labels) + 1.6)
    figure, axis = plt.subplots(figsize=(side + 0.8, side), layout="constrained")
    shown = heat_map(
        axis, matrix, lambda i, j: "–" if np.isnan(matrix[i, j]) else f"{matrix[i, j]:.2f}",
        labels, labels, cmap="Blues", vmin=0, vmax=1,
    )  # fmt: skip
    axis.spines[:].set_visible(False)
    figure.colorbar(shown, ax=axis, shrink=0.8, label="linear CKA, debiased")
    return figure
