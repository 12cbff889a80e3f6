"""The charts of the comparison, from saved predictions and metrics."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.ticker import NullFormatter

from analysis import compare
from analysis.compare import Comparison
from analysis.page import figures
from analysis.page.figures import literal, plt, shortened
from analysis.page.tables import scaled
from analysis.uncertainty import pareto_front


def _models(comparison: Comparison) -> Iterator[tuple]:
    """Yields the runs of each model, its row of the table in percent, and its style of lines."""
    colours = figures.colours(comparison.groups)
    percent = 100 * comparison.table.filter(regex="test_accuracy_mean|published|ci95")
    for (label, runs), row in zip(comparison.groups.items(), percent.itertuples(), strict=True):
        yield runs, row, {"color": colours[label], "label": literal(label)}


def draw_ranks(comparison: Comparison) -> plt.Figure:
    """Accuracy by rank with both intervals; bars at the right tie models that may be equal."""
    groups = comparison.groups
    figure, axis = plt.subplots(figsize=(9, 0.5 * len(groups) + 1.4))
    for rank, (_, row, style) in enumerate(_models(comparison)):
        seeds = (row.seeds_ci95_low, row.seeds_ci95_high)
        images, level = (row.images_ci95_low, row.images_ci95_high), (rank, rank)
        axis.plot(images, level, lw=1.5, **style | {"label": "over test images"})
        if not np.isnan(row.seeds_ci95_low):
            axis.plot(seeds, level, lw=6, alpha=0.4, **style | {"label": "over seeds"})
        axis.plot(row.test_accuracy_mean, rank, "o", **style | {"label": "mean"})
        if not np.isnan(row.published):
            axis.plot(row.published, rank, "kx", label="published")
    axis.set_yticks(range(len(groups)), [literal(label) for label in groups])
    axis.set(xlabel="test accuracy, %, with 95 % intervals", ylim=(len(groups) - 0.5, -0.5))
    axis.grid(axis="x")
    figures.legend_beside(figure, [axis], loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4)
    return figure


def draw_curves(comparison: Comparison) -> plt.Figure:
    """Validation accuracy and loss by epoch: a thin line a seed, a thick one for their mean."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for axis, value in zip(axes, ("accuracy", "loss"), strict=True):
        for runs, _, style in _models(comparison):
            logs = [[x for x in run.metrics if x["split"] == "validation"] for run in runs]
            curves = [pd.Series({x["epoch"]: x[value] for x in log}, dtype=float) for log in logs]
            curves = [curve for curve in curves if len(curve)]
            if curves and max(map(len, curves)) == 1:  # fitted at once, without epochs
                axis.axhline(np.mean([curve.iloc[0] for curve in curves]), ls="--", **style)
            elif curves:
                for curve in curves:
                    axis.plot(curve.index, curve, color=style["color"], lw=0.7, alpha=0.4)
                mean = pd.concat(curves, axis=1).dropna().mean(axis=1)
                axis.plot(mean.index, mean, lw=2, **style)
        axis.set(xlabel="epoch", ylabel=f"validation {value}")
        axis.grid()
    axes[1].set_yscale("log")
    low, high = axes[1].get_ylim()
    plain_ticks(axes[1].yaxis, high / low)
    figures.legend_beside(figure, axes)
    return figure


def plain_ticks(axis, ratio: float) -> None:
    """Labels a logarithmic axis with 20 k rather than powers; between powers if it is short."""

    def between(value: float, _: int) -> str:
        return scaled(value) if f"{value:e}"[0] in "25" else ""

    axis.set_major_formatter(lambda value, _: scaled(value))
    axis.set_minor_formatter(between if ratio < 60 else NullFormatter())
    axis.set_tick_params(which="both", labelsize=8)


def draw_confusion(comparison: Comparison) -> plt.Figure:
    """A matrix a model: images (mean over seeds) and their share of the true class."""
    groups = comparison.groups
    figure, axes = figures.small_multiples(len(groups), 3, (4.3, 4.3))
    for axis, (label, runs) in zip(axes, groups.items(), strict=True):
        names = [shortened(name) for name in runs[0].class_names]
        counts = compare.mean_confusion(runs)
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)

        def write(i: int, j: int, counts=counts, share=share) -> str:
            if not counts[i, j] or len(counts) > 12:
                return ""
            text = f"{counts[i, j]:.0f}" if counts[i, j] >= 1 else f"{counts[i, j]:.1g}"
            return text + f"\n{100 * share[i, j]:.0f} %" * (len(counts) <= 8)

        figures.heat_map(axis, share, write, names, names, cmap="Blues", vmin=0, vmax=1)
        axis.set(xlabel="predicted", ylabel="true")
        axis.set_title(literal(label), fontsize=10)
    return figure


def _percent_map(shares: pd.DataFrame, size: tuple, shown: int, label: str) -> plt.Figure:
    """A heat map of shares in percent, written out where there are at most `shown` columns."""
    values = 100 * shares.to_numpy(float)

    def write(i: int, j: int) -> str:
        return "" if np.isnan(values[i, j]) or len(values[0]) > shown else f"{values[i, j]:.0f}"

    figure, axis = plt.subplots(figsize=size)
    names = list(shares.index), list(shares)
    image = figures.heat_map(axis, values, write, *names, aspect="auto", vmax=100)
    figure.colorbar(image, ax=axis, label=label)
    return figure


def draw_class_scores(comparison: Comparison) -> plt.Figure:
    """A column a class, a row a model: F1 (mean over seeds) as a heat map."""
    shares = pd.DataFrame({m: compare.class_scores(r).f1 for m, r in comparison.groups.items()}).T
    size = (min(16, 2.5 + 0.75 * len(shares.columns)), 1.3 + 0.38 * len(shares))
    return _percent_map(shares, size, 24, "F1, %")


def draw_agreement(comparison: Comparison) -> plt.Figure:
    """Share of test images on which two models predict the same class."""
    labels = list(comparison.groups)
    shares = comparison.pairs.pivot(index="first", columns="second", values="agreement")
    shares = shares.reindex(index=labels, columns=labels)
    size = (3.2 + 0.6 * len(labels), 2 + 0.6 * len(labels))
    return _percent_map(shares.fillna(shares.T), size, 16, "same prediction, % of test images")


def draw_pareto(comparison: Comparison, milliseconds: pd.Series | None = None) -> plt.Figure:
    """Accuracy against four costs; a line joins the models that no other beats in both.

    The last is `milliseconds` for one image if they were measured, or the memory of training.
    """
    table = comparison.table
    costs = {
        "parameters": table.parameters,
        "multiply-adds per image, forward": table.multiply_adds_per_image,
        "seconds of training": table.seconds,
    }
    if milliseconds is None or milliseconds.isna().all():
        costs["bytes of memory for a training step"] = table.train_step_memory_bytes
    else:
        costs["milliseconds to predict one image"] = milliseconds
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.5), sharey=True)
    accuracy = 100 * table.test_accuracy_mean.to_numpy()
    for axis, (title, cost) in zip(axes.flat, costs.items(), strict=True):
        cost = cost.where(cost > 0).to_numpy(float)  # nearest neighbours have no parameters
        front = pareto_front(cost, accuracy)
        axis.step(cost[front], accuracy[front], where="post", color="#999999", lw=1, zorder=0)
        for i, (_, row, style) in enumerate(_models(comparison)):
            low, high = row.seeds_ci95_low, row.seeds_ci95_high
            if np.isnan(low):
                low, high = row.images_ci95_low, row.images_ci95_high
            spread = [[max(0, accuracy[i] - low)], [max(0, high - accuracy[i])]]
            style |= {"fmt": "o", "capsize": 3, "mfc": None if i in front else "white"}
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
    figures.legend_beside(figure, axes.flat)
    return figure
