"""How far can a saliency map be trusted? Deletion, insertion, focus, and a sanity check.

* Deletion and insertion (Petsiuk et al. 2018, arXiv:1806.07421): pixels are blurred, or returned to
  a blurred image, in the order of the map; the probability of the class should fall, or rise, fast.
  A random order is the baseline: an area under a curve means something only against it.
* Focus: how small a part of the image the map points at. A focused map need not be right.
* Sanity check (Adebayo et al. 2018, arXiv:1810.03292): the map of a network whose weights mean
  nothing should differ. Where it does not, the map shows the image rather than what was learned.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage, stats

from analysis.forward import compiled, in_batches
from analysis.page.figures import legend_beside, literal, plt
from analysis.page.section import Table
from analysis.page.tables import decimal, percent
from models import Classifier
from models.classifier import merge_model, split_model

STEPS = 16  # of deletion and insertion, each an equal share of the pixels
BLUR = 1 / 8  # standard deviation of the blur that takes information away, in image sides
Scores = dict[str, np.ndarray]  # what `score_maps` returns


def random_maps(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Returns [count, size, size], uniform noise that knows neither image nor model."""
    return np.random.default_rng(seed).random((count, size, size))


def blurred(images: np.ndarray) -> np.ndarray:
    """Returns float32 [N, S, S, 3], images blurred by a Gaussian of an eighth of their side."""
    sigma = BLUR * images.shape[1]
    return ndimage.gaussian_filter(images.astype(np.float32), (0, sigma, sigma, 0), mode="nearest")


def ranks(maps: np.ndarray, seed: int = 0) -> np.ndarray:
    """Returns int [N, S, S]: 0 at the largest value of each map, then 1, and so on.

    Equal values, such as the zeros of a CAM, are in random order: in reading order, they would
    favour the top of the image.
    """
    flat = maps.reshape(len(maps), -1)
    ties = np.random.default_rng(seed).permuted(
        np.broadcast_to(np.arange(flat.shape[1]), flat.shape), axis=1
    )
    order = np.lexsort((ties, -flat), axis=1)
    return np.argsort(order, axis=1).reshape(maps.shape)


def deletion_and_insertion(
    predict: Callable[[np.ndarray], np.ndarray],
    images: np.ndarray,
    maps: np.ndarray,
    targets: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the probability of the target [N] while pixels go, and while they come back.

    Two curves [N, STEPS + 1], in the order of maps [N, S, S], the highest values first: from the
    whole image to the blurred one, and back. `predict` gives probabilities [N, K] of images.
    """
    rank, blur = ranks(maps)[..., None], blurred(images)
    rows, deletion, insertion = np.arange(len(images)), [], []
    for step in range(STEPS + 1):
        chosen = rank < round(step / STEPS * rank[0].size)
        deletion.append(predict(np.where(chosen, blur, images))[rows, targets])
        insertion.append(predict(np.where(chosen, images, blur))[rows, targets])
    return np.stack(deletion, axis=1), np.stack(insertion, axis=1)


def area_under(curves: np.ndarray) -> np.ndarray:
    """Returns [N], the areas under curves [N, STEPS + 1] over 0..1, by trapezoids."""
    return np.trapezoid(curves, dx=1 / (curves.shape[1] - 1), axis=1)


def half_area(maps: np.ndarray) -> np.ndarray:
    """Returns [N], the smallest share of the pixels that holds half of a map; NaN for zeros."""
    flat = maps.reshape(len(maps), -1).astype(np.float64)
    total = flat.sum(axis=1, keepdims=True)
    shares = -np.sort(-flat / np.where(total > 0, total, np.nan), axis=1)  # the largest first
    area = ((shares.cumsum(axis=1) < 0.5).sum(axis=1) + 1) / flat.shape[1]
    return np.where(total[:, 0] > 0, area, np.nan)


def shuffled_model(model: Classifier, seed: int = 0) -> Classifier:
    """Returns the model with the values of each parameter array in random order.

    The weights mean nothing any more, but keep their distribution, so that the outputs of a network
    with stored BatchNorm statistics stay of a size that has gradients.
    """
    _, params, statistics = split_model(model)
    draw = np.random.default_rng(seed)
    shuffled = {
        path: jnp.asarray(draw.permutation(np.asarray(array).ravel()).reshape(array.shape))
        for path, array in sorted(params.items())
    }
    return merge_model(model, shuffled, statistics)


def rank_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns [N], Spearman's correlation of maps [N, S, S]; NaN for a map of one value."""
    ranked = [stats.rankdata(maps.reshape(len(maps), -1), axis=1) for maps in (first, second)]
    x, y = (values - values.mean(axis=1, keepdims=True) for values in ranked)
    scale = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    return (x * y).sum(axis=1) / np.where(scale > 0, scale, np.nan)


def score_maps(
    model: Classifier, explain: Callable[..., np.ndarray], images: np.ndarray, targets: np.ndarray
) -> Scores:
    """Returns the scores of one model's maps of images uint8 [N, S, S, 3] and their targets [N].

    `explain` is from `methods.explainer`. Scores are `half_area` and `similarity` to the map of
    shuffled weights, [N] with NaN for maps of zeros; `zero` bool [N]; and the curves
    `deletion_map`, `insertion_map`, `deletion_random` and `insertion_random`, [N, STEPS + 1].
    """
    maps = explain(images, targets)
    shuffled = explain(images, targets, shuffled_model(model))
    scores = {
        "zero": maps.max(axis=(1, 2)) == 0,
        "half_area": half_area(maps),
        "similarity": rank_correlation(maps, shuffled),
    }
    program = compiled(model, lambda m, x: jax.nn.softmax(m(m.preprocess(x))))
    predict = partial(in_batches, program)
    for name, order in (("map", maps), ("random", random_maps(*images.shape[:2]))):
        curves = deletion_and_insertion(predict, images, order, targets)
        scores[f"deletion_{name}"], scores[f"insertion_{name}"] = curves
    return scores


def mean_and_interval(values: np.ndarray) -> tuple[float, float]:
    """Returns the mean of all but NaN, and the half-width of its 95 % t-interval, NaN for one."""
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return (float(values[0]) if len(values) else math.nan), math.nan
    return float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def summarise(scores: Scores) -> dict[str, tuple[float, float]]:
    """Returns mean and half-width of the 95 % interval of every score; curves become areas.

    `gain` is by how much insertion lies above deletion, less what a random map reaches on the same
    image: 0 is a map that knows nothing, higher is better.
    """
    values = {key: scores[key] for key in ("half_area", "similarity")}
    values |= {key: area_under(curves) for key, curves in scores.items() if curves.ndim == 2}
    random_order = values["insertion_random"] - values["deletion_random"]
    values["gain"] = values["insertion_map"] - values["deletion_map"] - random_order
    return {key: mean_and_interval(value) for key, value in values.items()}


def score_table(
    scores: dict[str, Scores], accuracies: list[float], resolutions: list[str]
) -> Table:
    """Returns a row per label; accuracies are in 0..1, resolutions as a reader sees them."""
    columns = {"deletion_map": "deletion", "insertion_map": "insertion", "gain": "gain over random"}
    columns |= {"half_area": "area of half", "similarity": "similarity"}
    rows = []
    for label, accuracy, resolution in zip(scores, accuracies, resolutions, strict=True):
        summary, zero = summarise(scores[label]), scores[label]["zero"]
        cells = [*(_plus_minus(*summary[key]) for key in columns), f"{zero.sum()} of {len(zero)}"]
        rows.append([label, percent(accuracy), resolution, *cells])
    caption = (
        "Areas under deletion (lower is better) and insertion (higher is better); pixels are "
        "replaced by a blur of an eighth of the image's side. The gain is insertion less deletion, "
        "compared with a random order on the same image. Area of half: the smallest share of the "
        "image that holds half of the map; coarse maps cannot be as focused as fine ones. "
        "Similarity: rank correlation with the map of the same network with shuffled weights, "
        "which should be near 0. Mean ± half of the 95 % t-interval over images."
    )
    return Table(["model", "test acc. %", "map", *columns.values(), "zero maps"], rows, caption)


def _plus_minus(mean: float, half: float) -> str:
    return decimal(mean) if math.isnan(half) else f"{decimal(mean)} ± {decimal(half)}"


def draw_faithfulness(scores: dict[str, Scores], title: str, colours: dict) -> plt.Figure:
    """Draws the mean curves of each label's maps by a method, dotted those of random maps."""
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), sharey=True)
    axes[0].plot([], [], "-", color="0.3", label=f"by {title}")
    axes[0].plot([], [], ":", color="0.3", label="in random order")
    share = np.linspace(0, 100, STEPS + 1)
    verbs = {"deletion": "blurred", "insertion": "shown sharp"}
    for axis, (kind, verb) in zip(axes, verbs.items(), strict=True):
        for label, values in scores.items():
            by_map, at_random = (
                100 * values[f"{kind}_{x}"].mean(axis=0) for x in ("map", "random")
            )
            axis.plot(share, by_map, "-", color=colours[label], label=literal(label))
            axis.plot(share, at_random, ":", color=colours[label])
        axis.set(xlabel=f"pixels {verb}, % of the image", title=kind)
        axis.grid()
    axes[0].set_ylabel("mean probability of the class, %")
    figure.tight_layout()
    legend_beside(figure, axes)
    return figure
