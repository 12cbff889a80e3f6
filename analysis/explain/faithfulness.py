"""How far can a saliency map be trusted? Deletion, insertion, focus, and a sanity check.

* Deletion and insertion (Petsiuk et al. 2018, arXiv:1806.07421): pixels are blurred, or returned to
  a blurred image, in the order of the map; the probability of the class should fall, or rise, fast:
  faster than in a random order, and than from the centre outwards, as photos centre their subject.
* Focus: how small a part of the image the map points at. A focused map need not be right.
* Sanity check (Adebayo et al. 2018, arXiv:1810.03292): the map of a network with shuffled weights
  should differ. Where it does not, the map shows the image rather than what was learned.
"""

import math
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from scipy import ndimage, stats

from analysis.forward import compiled, in_batches
from analysis.page.figures import legend_beside, literal, plt
from analysis.page.section import Table
from analysis.page.tables import decimal
from models import Classifier
from models.classifier import merge_model, split_model

STEPS = 16  # of deletion and insertion, each an equal share of the pixels
Scores = dict[str, np.ndarray]  # what `score_maps` returns


def blurred(images: np.ndarray) -> np.ndarray:
    """Returns images [N, S, S, 3], float32, blurred by an eighth of their side."""
    sigma = images.shape[1] / 8
    return ndimage.gaussian_filter(images.astype(np.float32), (0, sigma, sigma, 0), mode="nearest")


def ranks(maps: np.ndarray, seed: int = 0) -> np.ndarray:
    """Returns int [N, S, S]: 0 at the largest value of each map, then 1; ties in random order."""
    flat = maps.reshape(len(maps), -1)
    # In reading order, equal values such as the zeros of a CAM would favour the top of the image.
    places = np.broadcast_to(np.arange(flat.shape[1]), flat.shape)
    ties = np.random.default_rng(seed).permuted(places, axis=1)
    order = np.lexsort((ties, -flat), axis=1)
    return np.argsort(order, axis=1).reshape(maps.shape)


def deletion_and_insertion(
    predict: Callable, images: np.ndarray, maps: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the target's probability [N, STEPS + 1] while pixels go, and while they return."""
    rank, blur = ranks(maps)[..., None], blurred(images)
    rows, deletion, insertion = np.arange(len(images)), [], []
    for step in range(STEPS + 1):
        chosen = rank < round(step / STEPS * rank[0].size)
        deletion.append(predict(np.where(chosen, blur, images))[rows, targets])
        insertion.append(predict(np.where(chosen, images, blur))[rows, targets])
    return np.stack(deletion, axis=1), np.stack(insertion, axis=1)


def half_area(maps: np.ndarray) -> np.ndarray:
    """Returns the smallest share of pixels that holds half of each map, [N]; NaN for zeros."""
    flat = maps.reshape(len(maps), -1).astype(np.float64)
    total = flat.sum(axis=1, keepdims=True)
    shares = -np.sort(-flat / np.where(total > 0, total, np.nan), axis=1)  # the largest first
    area = ((shares.cumsum(axis=1) < 0.5).sum(axis=1) + 1) / flat.shape[1]
    return np.where(total[:, 0] > 0, area, np.nan)


def shuffled_model(model: Classifier, seed: int = 0) -> Classifier:
    """Returns the model with the values of each parameter array in random order."""
    # Keeping their distribution keeps outputs of a size that has gradients.
    _, params, statistics = split_model(model)
    draw = np.random.default_rng(seed)
    shuffled = {
        path: jnp.asarray(draw.permutation(np.asarray(array).ravel()).reshape(array.shape))
        for path, array in sorted(params.items())
    }
    return merge_model(model, shuffled, statistics)


def rank_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns Spearman's correlation [N] of maps [N, S, S]; NaN for a map of one value."""
    x, y = (pd.DataFrame(maps.reshape(len(maps), -1).T).rank() for maps in (first, second))
    return x.corrwith(y).to_numpy()


def score_maps(
    model: Classifier, explain: Callable[..., np.ndarray], images: np.ndarray, targets: np.ndarray
) -> Scores:
    """Returns the scores [N] and curves [N, STEPS + 1] of the maps that an `explainer` gives.

    `seconds` [1] is the time an image takes, without compilation.
    """
    maps = explain(images, targets)
    other, began = shuffled_model(model), time.perf_counter()
    shuffled, took = explain(images, targets, other), time.perf_counter() - began
    scores = {
        "zero": maps.max(axis=(1, 2)) == 0,
        "half_area": half_area(maps),
        "similarity": rank_correlation(maps, shuffled),
        "seconds": np.array([took / len(images)]),
    }
    program = compiled(model, lambda m, x: jax.nn.softmax(m(m.preprocess(x))))
    predict = partial(in_batches, program)
    noise = np.random.default_rng(0).random(maps.shape)
    for name, order in (("map", maps), ("random", noise), ("centre", centred(maps.shape))):
        curves = deletion_and_insertion(predict, images, order, targets)
        scores[f"deletion_{name}"], scores[f"insertion_{name}"] = curves
    return scores


def centred(shape: tuple[int, int, int]) -> np.ndarray:
    """Returns maps [N, S, S] that fall from the centre outwards, whatever the image shows."""
    places = np.arange(shape[1]) - (shape[1] - 1) / 2
    return np.broadcast_to(-(places[:, None] ** 2) - places**2, shape)


MEANING = (
    "Gain: the area under the insertion curve less that under the deletion curve, less the same "
    "for a random order of pixels, or for an order from the centre outwards; higher is better. "
    "Pixels return from, or give way to, a blur of an eighth of the image's side.",
    "Area of half: the smallest share of the image that holds half of the map; coarse maps cannot "
    "be as focused as fine ones.",
    "Similarity: rank correlation with the map of the same network with shuffled weights; it "
    "should be near 0.",
    "Seconds are without compilation. A zero map shows no evidence for the class.",
)


def gains(scores: Scores, over: str = "random") -> np.ndarray:
    """Returns insertion less deletion [N], less what the `over` order reaches on the same image."""
    areas = {
        name: np.trapezoid(scores[f"insertion_{name}"] - scores[f"deletion_{name}"], dx=1 / STEPS)
        for name in ("map", over)
    }
    return areas["map"] - areas[over]


def mean_and_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Returns the mean of all but NaN, and the half-width of its t-interval, NaN for one."""
    known = pd.Series(values).dropna()
    quantile = stats.t.ppf((1 + level) / 2, len(known) - 1)
    return float(known.mean()), float(quantile * known.sem())


def summarise(scores: Scores) -> dict[str, tuple[float, float]]:
    """Returns mean and half-width of the 95 % interval of every score; curves become areas."""
    values = {key: scores[key] for key in ("half_area", "similarity")}
    curves = {key: score for key, score in scores.items() if score.ndim == 2}
    values |= {key: np.trapezoid(curve, dx=1 / STEPS) for key, curve in curves.items()}
    values |= {"gain": gains(scores), "gain_centre": gains(scores, "centre")}
    summary = {key: mean_and_interval(value) for key, value in values.items()}
    return summary | {"seconds": (scores["seconds"].item(), math.nan)}


def score_table(scores: dict[str, Scores], heads: list[str], about: dict[str, list[str]]) -> Table:
    """Returns a row per label: what `about` says of it under `heads`, then its scores."""
    columns = {"gain": "gain over random", "gain_centre": "over the centre"}
    columns |= {"half_area": "area of half", "similarity": "similarity"}
    rows = []
    for label, cells in about.items():
        summary, zero = summarise(scores[label]), scores[label]["zero"]
        numbers = [_plus_minus(*summary[key]) for key in columns]
        numbers += [seconds(summary["seconds"][0]), f"{zero.sum()} of {len(zero)}"]
        rows.append([label, *cells, *numbers])
    caption = f"{len(zero)} test images: means ± half of the 95 % t-interval."
    return Table([*heads, *columns.values(), "s per image", "zero maps"], rows, caption)


def seconds(value: float) -> str:
    """Returns a time as a reader sees it, with two significant digits."""
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _plus_minus(mean: float, half: float) -> str:
    return decimal(mean) if math.isnan(half) else f"{decimal(mean)} ± {decimal(half)}"


def draw_faithfulness(scores: dict[str, Scores], title: str, colours: dict) -> plt.Figure:
    """Draws the mean curves of each label's maps by a method, and, dotted, of random maps."""
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), sharey=True)
    axes[0].plot([], [], "-", color="0.3", label=f"by {title}")
    axes[0].plot([], [], ":", color="0.3", label="in random order")
    share = np.linspace(0, 100, STEPS + 1)
    verbs, orders = {"deletion": "blurred", "insertion": "shown sharp"}, ("map", "random")
    for axis, (kind, verb) in zip(axes, verbs.items(), strict=True):
        for label, values in scores.items():
            mean = {order: 100 * values[f"{kind}_{order}"].mean(axis=0) for order in orders}
            axis.plot(share, mean["map"], "-", color=colours[label], label=literal(label))
            axis.plot(share, mean["random"], ":", color=colours[label])
        axis.set(xlabel=f"pixels {verb}, % of the image", title=kind)
        axis.grid()
    axes[0].set_ylabel("mean probability of the class, %")
    figure.tight_layout()
    legend_beside(figure, axes)
    return figure
