"""The charts of the comparison, from saved predictions and metrics."""

import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, NullFormatter

from analysis import evaluate
from analysis.compare import Comparison, class_scores, established, mean_confusion
from analysis.page.figures import (
    colours,
    heat_map,
    legend_beside,
    literal,
    plt,
    shortened,
    small_multiples,
)
from analysis.page.tables import scaled
from analysis.runs import FinishedRun, correctness
from analysis.uncertainty import indistinct, pareto_front


def draw_ranks(comparison: Comparison) -> plt.Figure:
    """Accuracy by rank with both intervals; bars at the right tie models that may be equal."""
    groups, count = comparison.groups, len(comparison.groups)
    figure, axis = plt.subplots(figsize=(9, 0.5 * count + 1.4))
    for rank, (label, row) in enumerate(zip(groups, _percentages(comparison.table), strict=True)):
        style, images = (
            {"color": colours(groups)[label]},
            (row.images_ci95_low, row.images_ci95_high),
        )
        axis.plot(images, (rank, rank), lw=1.5, label="over test images", **style)
        seeds = (row.seeds_ci95_low, row.seeds_ci95_high)
        if not np.isnan(row.seeds_ci95_low):
            axis.plot(seeds, (rank, rank), lw=6, alpha=0.4, label="over seeds", **style)
        axis.plot(row.test_accuracy_mean, rank, "o", label="mean", **style)
        if not np.isnan(row.published):
            axis.plot(row.published, rank, "kx", label="published")
    axis.set_yticks(range(count), [literal(label) for label in groups])
    axis.set(xlabel="test accuracy, %, with 95 % intervals", ylim=(count - 0.5, -0.5))
    axis.grid(axis="x")
    bar = {"color": "#333333", "lw": 4, "solid_capstyle": "butt", "clip_on": False}
    apart = established(groups, comparison.pairs)
    for place, (first, last) in enumerate(indistinct(count, apart)):
        x, ends = 1.02 + 0.025 * place, (first - 0.2, last + 0.2)  # x in widths of the axes
        axis.plot((x, x), ends, transform=axis.get_yaxis_transform(), **bar)
    figure.tight_layout()
    legend_beside(figure, [axis], loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4)
    return figure


def _percentages(table: pd.DataFrame) -> list:
    """Accuracy, published accuracy and both intervals of each model, in percent."""
    return list((100 * table.filter(regex="test_accuracy_mean|published|ci95")).itertuples())


def draw_curves(comparison: Comparison) -> plt.Figure:
    """Validation accuracy and loss by epoch: a thin line a seed, a thick one for their mean."""
    groups = comparison.groups
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for axis, value in zip(axes, ("accuracy", "loss"), strict=True):
        for label, runs in groups.items():
            style = {"color": colours(groups)[label], "label": literal(label)}
            curves = [curve for run in runs if len(curve := _validation_curve(run, value))]
            if not curves:
                continue
            if max(map(len, curves)) == 1:  # fitted at once, without epochs
                axis.axhline(np.mean([curve.iloc[0] for curve in curves]), ls="--", **style)
                continue
            for curve in curves:
                axis.plot(curve.index, curve, color=style["color"], lw=0.7, alpha=0.4)
            mean = pd.concat(curves, axis=1).dropna().mean(axis=1)
            axis.plot(mean.index, mean, lw=2, **style)
        axis.set(xlabel="epoch", ylabel=f"validation {value}")
        axis.grid()
    axes[1].set_yscale("log")
    low, high = axes[1].get_ylim()
    plain_ticks(axes[1].yaxis, high / low)
    figure.tight_layout()
    legend_beside(figure, axes)
    return figure


def _validation_curve(run: FinishedRun, value: str) -> pd.Series:
    lines = [line for line in run.metrics if line["split"] == "validation"]
    return pd.Series({line["epoch"]: line[value] for line in lines}, dtype=float)


def plain_ticks(axis, ratio: float) -> None:
    """Labels a logarithmic axis with 20 k rather than powers; between powers if it is short."""

    def between(value: float, _: int) -> str:
        return scaled(value) if f"{value:e}"[0] in "25" else ""

    axis.set_major_formatter(FuncFormatter(lambda value, _: scaled(value)))
    axis.set_minor_formatter(FuncFormatter(between) if ratio < 60 else NullFormatter())
    axis.set_tick_params(which="both", labelsize=8)


def draw_confusion(comparison: Comparison) -> plt.Figure:
    """A matrix a model: images (mean over seeds) and their share of the true class."""
    groups = comparison.groups
    figure, axes = small_multiples(len(groups), 3, (4.3, 4.3))
    for axis, (label, runs) in zip(axes, groups.items(), strict=True):
        names = [shortened(name) for name in runs[0].class_names]
        counts = mean_confusion(runs)
        share = evaluate.row_shares(counts)

        def write(i: int, j: int, counts=counts, share=share) -> str:
            if not counts[i, j] or len(counts) > 12:
                return ""
            text = f"{counts[i, j]:.0f}" if counts[i, j] >= 1 else f"{counts[i, j]:.1g}"
            return text + f"\n{100 * share[i, j]:.0f} %" * (len(counts) <= 8)

        heat_map(axis, share, write, names, names, cmap="Blues", vmin=0, vmax=1)
        axis.set(xlabel="predicted", ylabel="true")
        axis.set_title(literal(label), fontsize=10)
    figure.tight_layout()
    return figure


def draw_class_scores(comparison: Comparison) -> plt.Figure:
    """A column a class, a row a model: F1 (mean over seeds) as a heat map."""
    groups = comparison.groups
    names = next(iter(groups.values()))[0].class_names
    values = 100 * np.array([class_scores(runs)["f1"] for runs in groups.values()])  # [models, K]
    size = (min(16, 2.5 + 0.75 * len(names)), 1.3 + 0.38 * len(groups))
    figure, axis = plt.subplots(figsize=size)
    write = lambda i, j: f"{values[i, j]:.0f}" if len(names) <= 24 else ""  # noqa: E731
    image = heat_map(axis, values, write, list(groups), names, aspect="auto", vmax=100)
    figure.colorbar(image, ax=axis, label="F1, %")
    figure.tight_layout()
    return figure


def draw_agreement(comparison: Comparison) -> plt.Figure:
    """Share of test images on which two models predict the same class."""
    groups, pairs = comparison.groups, comparison.pairs
    shares = pairs.pivot(index="first", columns="second", values="agreement")
    shares = shares.reindex(index=list(groups), columns=list(groups)).to_numpy(float)
    values = 100 * np.where(np.isnan(shares), shares.T, shares)

    def write(i: int, j: int) -> str:
        return "" if np.isnan(values[i, j]) or len(groups) > 16 else f"{values[i, j]:.0f}"

    side = 2 + 0.6 * len(groups)
    figure, axis = plt.subplots(figsize=(side + 1.2, side))
    image = heat_map(axis, values, write, list(groups), list(groups), vmax=100)
    figure.colorbar(image, ax=axis, label="same prediction, % of test images", shrink=0.8)
    figure.tight_layout()
    return figure


def draw_pareto(comparison: Comparison) -> plt.Figure:
    """Accuracy against four costs; a line joins the models that no other beats in both."""
    groups, table = comparison.groups, comparison.table
    costs = {
        "parameters": table.parameters,
        "FLOPs per image, forward": table.flops_per_image,
        "seconds of training": table.seconds,
        "seconds to predict 1,000 images": 1000 / table.inference_images_per_second,
    }
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.5), sharey=True)
    accuracy, rows = 100 * table.test_accuracy_mean.to_numpy(), _percentages(table)
    for axis, (title, cost) in zip(axes.flat, costs.items(), strict=True):
        cost = cost.where(cost > 0).to_numpy(float)  # nearest neighbours have no parameters
        front = pareto_front(cost, accuracy)
        axis.step(cost[front], accuracy[front], where="post", color="#999999", lw=1, zorder=0)
        for i, (label, row) in enumerate(zip(groups, rows, strict=True)):
            low, high = row.seeds_ci95_low, row.seeds_ci95_high
            if np.isnan(low):
                low, high = row.images_ci95_low, row.images_ci95_high
            spread = [[max(0, accuracy[i] - low)], [max(0, high - accuracy[i])]]
            style = {"mfc": None if i in front else "white", "color": colours(groups)[label]}
            style |= {"fmt": "o", "capsize": 3, "label": literal(label)}
            if not np.isnan(cost[i]):
                axis.errorbar(cost[i], accuracy[i], spread, **style)
        if np.isnan(cost).all():
            axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
        else:
            axis.set_xscale("log")
            plain_ticks(axis.xaxis, np.nanmax(cost) / np.nanmin(cost))
        axis.set(xlabel=title)
        axis.grid()
    for axis in axes[:, 0]:
        axis.set_ylabel("test accuracy, %")
    figure.tight_layout()
    legend_beside(figure, list(axes.flat))
    return figure


def draw_reliability(comparison: Comparison) -> plt.Figure:
    """A diagram a model: accuracy by confidence, and how often each confidence occurs."""
    groups = comparison.groups
    figure, axes = small_multiples(len(groups), 4, (3, 3))
    for axis, (label, runs) in zip(axes, groups.items(), strict=True):
        pooled = _pooled(runs)
        bins = evaluate.reliability(*pooled)
        share = bins.images / bins.images.sum()
        axis.bar(bins.low, share, 1 / len(bins), align="edge", color="#cccccc")
        axis.plot((0, 1), (0, 1), color="#666666", lw=1, ls="--")
        axis.plot(bins.confidence, bins.accuracy, "o-", ms=4, color=colours(groups)[label])
        error = evaluate.calibration_error(*pooled)
        axis.set_title(f"{literal(label)}: ECE {100 * error:.1f} %", fontsize=9)
        axis.set(xlim=(0, 1), ylim=(0, 1))
        axis.grid()
    figure.supxlabel("confidence in the predicted class", fontsize=10)
    figure.supylabel("accuracy; grey: share of images", fontsize=10)
    figure.tight_layout()
    return figure


def _pooled(runs: list[FinishedRun]) -> tuple[np.ndarray, np.ndarray]:
    """Test probabilities [S * N, K] and labels of all seeds."""
    probabilities = [evaluate.softmax(run.test["logits"]) for run in runs]
    return np.concatenate(probabilities), np.concatenate([run.test["labels"] for run in runs])


def draw_coverage(comparison: Comparison) -> plt.Figure:
    """Accuracy on the images answered against their share, as the confidence asked for rises."""
    groups = comparison.groups
    figure, axis = plt.subplots(figsize=(7, 4.2))
    for label, runs in groups.items():
        probabilities, labels = _pooled(runs)
        curve = evaluate.coverage_curve(probabilities, labels)
        curve = 100 * curve[curve.coverage * len(labels) >= 20]  # of fewer images it is noise
        style = {"color": colours(groups)[label], "label": literal(label), "where": "post"}
        axis.step(curve.coverage, curve.accuracy, **style)
    lowest = 100 * min(correctness(runs).mean() for runs in groups.values())
    axis.set(xlabel="images answered, %", ylabel="accuracy on them, %", ylim=(lowest - 2, 100.5))
    axis.grid()
    legend_beside(figure, [axis])
    figure.tight_layout()
    return figure
