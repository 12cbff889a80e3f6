"""How far can a saliency map be trusted? Deletion, insertion, focus, and a sanity check.

* Deletion and insertion (Petsiuk et al. 2018, arXiv:1806.07421): pixels are blurred, or returned to
  a blurred image, in the order of the map; the probability of the class should fall, or rise, fast.
* Focus: how small a part of the image the map points at. A focused map need not be right.
* Sanity check (Adebayo et al. 2018, arXiv:1810.03292): the map of a network whose weights mean
  nothing should differ. Where it does not, the map shows the image rather than what was learned.

A map that knows nothing of the model, random or of the middle of the image, is measured beside it:
an area under a curve means something only against theirs.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from scipy import ndimage, stats

from analysis.forward import compiled, in_batches
from analysis.page import figures
from analysis.page.figures import plt
from analysis.page.section import Table
from analysis.page.tables import decimal, percent
from models import Classifier
from models.classifier import merge_model, split_model

STEPS = 16  # of deletion and insertion, each an equal share of the pixels
BLUR = 1 / 8  # standard deviation of the blur that takes information away, in image sides
BASELINES = ("random", "centre")  # maps that know nothing of the model
ORDERS = ("map", *BASELINES)  # in which pixels are deleted and inserted


# --- focus ----------------------------------------------------------------------------------------


def entropy(maps: np.ndarray) -> np.ndarray:
    """Returns [N], the entropy of each map [N, S, S] as a share of the largest possible.

    0 is a single pixel, 1 the same value everywhere; NaN for a map of zeros.
    """
    shares = _shares(maps)
    logs = np.log(np.where(shares > 0, shares, 1))
    return -(shares * logs).sum(axis=1) / math.log(shares.shape[1])


def half_area(maps: np.ndarray) -> np.ndarray:
    """Returns [N], the smallest share of the pixels that holds half of a map; NaN for zeros."""
    largest_first = -np.sort(-_shares(maps), axis=1)
    held = largest_first.cumsum(axis=1)
    area = ((held < 0.5).sum(axis=1) + 1) / held.shape[1]
    return np.where(np.isnan(held[:, -1]), np.nan, area)


def _shares(maps: np.ndarray) -> np.ndarray:
    """[N, S, S] -> float64 [N, S * S] that sum to 1, or are NaN for a map of zeros."""
    flat = maps.reshape(len(maps), -1).astype(np.float64)
    total = flat.sum(axis=1, keepdims=True)
    return flat / np.where(total > 0, total, np.nan)


# --- deletion and insertion -----------------------------------------------------------------------


def uninformed_maps(name: str, count: int, size: int, seed: int = 0) -> np.ndarray:
    """Returns float64 [count, size, size] that know nothing of images and models.

    Args:
      name: "random", uniform and another for every image, or "centre", a Gaussian of a quarter of
        the side in the middle of each.
      count: of maps.
      size: height and width in pixels.
      seed: of the random ones.
    """
    if name == "random":
        return np.random.default_rng(seed).random((count, size, size))
    line = np.exp(-0.5 * ((np.arange(size) - (size - 1) / 2) / (size / 4)) ** 2)
    return np.broadcast_to(np.outer(line, line), (count, size, size))


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


def probabilities_of(model: Classifier) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a compiled function: [N, S, S, 3] in 0..255 -> probabilities float32 [N, K]."""
    program = compiled(model, lambda m, x: jax.nn.softmax(m(m.preprocess(x))))
    return lambda images: in_batches(program, images.astype(np.float32))


def deletion_and_insertion(
    predict: Callable[[np.ndarray], np.ndarray],
    images: np.ndarray,
    maps: np.ndarray,
    targets: np.ndarray,
    steps: int = STEPS,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the probability of the target while pixels go, and while they come back.

    Args:
      predict: images [N, S, S, 3] in 0..255 -> probabilities [N, K].
      images: uint8 [N, S, S, 3].
      maps: [N, S, S], the pixels of the highest values go and come first.
      targets: int [N].
      steps: of equal numbers of pixels.
      seed: of the order of equal values.

    Returns:
      Two curves, each [N, steps + 1]: from the whole image to the blurred one, and back.
    """
    rank, blur = ranks(maps, seed)[..., None], blurred(images)
    rows, curves = np.arange(len(images)), ([], [])
    for step in range(steps + 1):
        chosen = rank < round(step / steps * rank[0].size)
        for curve, mixed in zip(
            curves, (np.where(chosen, blur, images), np.where(chosen, images, blur)), strict=True
        ):
            curve.append(predict(mixed)[rows, targets])
    return np.stack(curves[0], axis=1), np.stack(curves[1], axis=1)


def area_under(curves: np.ndarray) -> np.ndarray:
    """Returns [N], the areas under curves [N, steps + 1] over 0..1, by trapezoids."""
    return np.trapezoid(curves, dx=1 / (curves.shape[1] - 1), axis=1)


# --- sanity check ---------------------------------------------------------------------------------


def shuffled_model(model: Classifier, seed: int = 0) -> Classifier:
    """Returns the model with the values of each parameter array in random order.

    The weights mean nothing any more, but keep their distribution, so that the answers of a network
    with stored BatchNorm statistics stay of a size that has gradients.
    """
    _, params, stats = split_model(model)
    draw = np.random.default_rng(seed)
    shuffled = {
        path: jnp.asarray(draw.permutation(np.asarray(params[path]).ravel()).reshape(array.shape))
        for path, array in sorted(params.items())
    }
    return merge_model(model, shuffled, stats)


def rank_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns [N], Spearman's correlation over the pixels of each pair of maps [N, S, S].

    NaN where a map is the same everywhere.
    """
    values = []
    for pair in zip(first, second, strict=True):
        ranked = [stats.rankdata(one) - (one.size + 1) / 2 for one in pair]
        scale = math.sqrt((ranked[0] ** 2).sum() * (ranked[1] ** 2).sum())
        values.append((ranked[0] * ranked[1]).sum() / scale if scale else math.nan)
    return np.array(values)


# --- together -------------------------------------------------------------------------------------


def measure(
    model: Classifier,
    explain: Callable[..., np.ndarray],
    images: np.ndarray,
    targets: np.ndarray,
    steps: int = STEPS,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Returns every measure of the maps of one model, per image.

    Args:
      model: in evaluation mode.
      explain: of this model, as `saliency.explainer` returns it.
      images: uint8 [N, S, S, 3].
      targets: int [N], the classes that are explained.
      steps: of deletion and insertion.
      seed: of everything that is random.

    Returns:
      `entropy`, `half_area`, `similarity` to the map of shuffled weights, each [N] with NaN for
      maps of zeros; `zero` bool [N]; and for "map", "random" and "centre" the curves
      `deletion_<name>`, `insertion_<name>` [N, steps + 1].
    """
    maps = explain(images, targets)
    meaningless = explain(images, targets, shuffled_model(model, seed))
    measured = {
        "zero": maps.max(axis=(1, 2)) == 0,
        "entropy": entropy(maps),
        "half_area": half_area(maps),
        "similarity": rank_correlation(maps, meaningless),
    }
    predict, shape = probabilities_of(model), images.shape[:2]
    uninformed = {name: uninformed_maps(name, *shape, seed) for name in BASELINES}
    for name, one in {"map": maps, **uninformed}.items():
        curves = deletion_and_insertion(predict, images, one, targets, steps, seed)
        measured[f"deletion_{name}"], measured[f"insertion_{name}"] = curves
    return measured


def mean_and_interval(values: np.ndarray) -> tuple[float, float]:
    """Returns the mean over images and half the width of its 95 % t-interval.

    NaN values are left out; the width is NaN for fewer than two others, the mean for none.
    """
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return (float(values[0]) if len(values) else math.nan), math.nan
    return float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def summarise(measured: dict[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """Returns one row of a model: mean and half-width of the 95 % interval of every measure.

    Curves become their areas. `gain` is by how much insertion lies above deletion, less what a
    random map reaches on the same image: 0 is a map that knows nothing, higher is better.

    Args:
      measured: what `measure` returned.
    """
    values = {key: measured[key] for key in ("entropy", "half_area", "similarity")}
    for key, curves in measured.items():
        if curves.ndim == 2:
            values[key] = area_under(curves)
    above = {
        name: values[f"insertion_{name}"] - values[f"deletion_{name}"] for name in ("map", "random")
    }
    values["gain"] = above["map"] - above["random"]
    return {key: mean_and_interval(value) for key, value in values.items()}


def rank_test(x: Sequence[float], y: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Returns Spearman's correlation and its two-sided p-value by permutation, exact for few.

    NaN for fewer than three pairs, and where one of both is the same throughout.
    """
    x, y = (stats.rankdata(one) - (len(one) + 1) / 2 for one in (x, y))
    scale = math.sqrt((x**2).sum() * (y**2).sum())
    if len(x) < 3 or not scale > 0:
        return math.nan, math.nan
    found = stats.permutation_test(
        (x,),
        lambda x, axis=-1: (x * y).sum(axis=axis) / scale,
        permutation_type="pairings",
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(found.statistic), float(found.pvalue)


def answer(accuracies: Sequence[float], rows: Sequence[dict]) -> str:
    """Returns whether the more accurate models have the less focused or less faithful maps.

    Args:
      accuracies: of each model.
      rows: what `summarise` returned for each.
    """
    found = {
        name: rank_test(accuracies, [sign * row[key][0] for row in rows])
        for name, key, sign in (("focused", "half_area", -1), ("faithful", "gain", 1))
    }
    if any(math.isnan(correlation) for correlation, _ in found.values()):
        return (
            f"Whether more accurate models have more focused or more faithful maps cannot be said "
            f"of {len(rows)}: three or more with maps are needed."
        )
    words, numbers = [], []
    for name, (correlation, p) in found.items():
        tends = "more" if correlation > 0 else "less"
        words.append(f"{tends} {name}" if p < 0.05 else f"neither clearly more nor less {name}")
        numbers.append(f"{correlation:+.2f} with how {name} they are (p = {p:.2g})")
    return (
        f"Of these {len(rows)} models, the more accurate have maps that are {words[0]}, and "
        f"{words[1]}: the rank correlation of accuracy is {' and '.join(numbers)}. "
        "Focused means that half of the map lies on little of the image, faithful that it beats a "
        "random map in deletion and insertion. Models differ in more than accuracy, the resolution "
        "of their maps among others, so this describes these models and establishes no cause."
    )


def against_centre(rows: Sequence[dict]) -> str:
    """Returns how often a Gaussian in the centre, which knows no model, does as well as the maps.

    Args:
      rows: what `summarise` returned for each model.
    """
    better = [
        row["deletion_map"][0] < row["deletion_centre"][0]
        and row["insertion_map"][0] > row["insertion_centre"][0]
        for row in rows
    ]
    return (
        f"The maps of {sum(better)} of {len(rows)} models beat, on average, a Gaussian in the "
        "centre of the image in both deletion and insertion; that Gaussian knows no model."
    )


def tables(
    measured: dict[str, dict[str, np.ndarray]],
    accuracies: Sequence[float],
    maps: Sequence[str],
    title: str,
) -> list[Table]:
    """Returns two tables with a row per model: deletion and insertion; focus and sanity.

    Args:
      measured: what `measure` returned, by label.
      accuracies: on all test images, in 0..1.
      maps: resolution and stage of each model's maps.
      title: of the method.
    """
    curves = [f"{kind}_{name}" for kind in ("deletion", "insertion") for name in ORDERS]
    known, faithful, focused = {"map": title} | {name: name for name in BASELINES}, [], []
    for (label, values), accuracy, name in zip(measured.items(), accuracies, maps, strict=True):
        row = {key: _plus_minus(*pair) for key, pair in summarise(values).items()}
        start = [label, percent(accuracy)]
        faithful.append([*start, *(row[key] for key in curves), row["gain"]])
        rest = [row[key] for key in ("half_area", "entropy", "similarity")]
        focused.append([*start, name, *rest, f"{values['zero'].sum()} of {len(values['zero'])}"])
    first = ["model", "test acc. %"]
    headings = [f"{key.split('_')[0]}: {known[key.split('_')[1]]}" for key in curves]
    mean = "Mean ± half of the 95 % t-interval over images."
    return [
        Table(
            [*first, *headings, "gain over random"],
            faithful,
            "Areas under deletion (lower is better) and insertion (higher is better), by the order "
            "of the map, a random one, and a Gaussian in the centre; pixels are replaced by a blur "
            "of an eighth of the image's side. The gain is insertion less deletion, compared with "
            f"the random order on the same image. {mean}",
        ),
        Table(
            [*first, "map", "area of half", "entropy", "similarity", "zero maps"],
            focused,
            "Focus and sanity: the smallest share of the image that holds half of the map; entropy "
            "as a share of the largest possible; rank correlation with the map of the same network "
            "with shuffled weights, which should be near 0. Coarse maps cannot be as focused as "
            f"fine ones. {mean}",
        ),
    ]


def _plus_minus(mean: float, half: float) -> str:
    return decimal(mean) if math.isnan(half) else f"{decimal(mean)} ± {decimal(half)}"


def draw_faithfulness(
    measured: dict[str, dict[str, np.ndarray]], title: str, colours: dict
) -> Figure:
    """Deletion and insertion by model: the mean over images, dotted for a random map.

    Args:
      measured: what `measure` returned, by label.
      colours: of each label, as in the other pictures.
      title: of the method.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), sharey=True)
    axes[0].plot([], [], "-", color="0.3", label=f"by {title}")
    axes[0].plot([], [], ":", color="0.3", label="in random order")
    for axis, kind, verb in zip(
        axes, ("deletion", "insertion"), ("blurred", "shown sharp"), strict=True
    ):
        for label, values in measured.items():
            for name, style in (("map", "-"), ("random", ":")):
                curve = 100 * values[f"{kind}_{name}"].mean(axis=0)
                axis.plot(
                    np.linspace(0, 100, len(curve)),
                    curve,
                    style,
                    color=colours[label],
                    label=figures.literal(label) if name == "map" else None,
                )
        axis.set(xlabel=f"pixels {verb}, % of the image", title=kind)
        axis.grid()
    axes[0].set_ylabel("mean probability of the class, %")
    figure.tight_layout()
    figures.legend_beside(figure, axes)
    return figure
