"""The charts of the comparison, from saved predictions and metrics."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from matplotlib.ticker import NullFormatter

from analysis import compare
from analysis.compare import Comparison
from analysis.criterion import TITLES
from analysis.page import figures
from analysis.page.figures import literal, plt
from analysis.page.tables import scaled
from analysis.uncertainty import pareto_front

LETTERS = 8  # of groups, which have a column each; more stand in a word


def _models(comparison: Comparison) -> Iterator[tuple]:
    """Yields the runs of each model, its row of the table in percent, and its style of lines."""
    colours = figures.colours(comparison.groups)
    percent = 100 * comparison.table.filter(regex="test_accuracy_mean|published|ci95")
    for (label, runs), row in zip(comparison.groups.items(), percent.itertuples(), strict=True):
        yield runs, row, {"color": colours[label], "label": literal(label)}


def draw_ranks(comparison: Comparison) -> plt.Figure:
    """Scores by rank with their intervals; bars at the right join models that share a letter."""
    table = comparison.table
    figure, axis = plt.subplots(figsize=(9, 0.36 * len(table) + 1.2))
    for place, (_, _, style) in enumerate(_models(comparison)):
        row = table.iloc[place]
        ends = 100 * row[["ci95_low", "ci95_high"]].to_numpy(float)
        axis.plot(ends, (place, place), "|-", lw=1.5, **style)
        axis.plot(100 * row.score, place, "o", **style)
        if not np.isnan(row.published):
            axis.plot(100 * row.published, place, "kx")
    axis.set_yticks(range(len(table)), map(literal, table.label))
    title = f"test {TITLES[comparison.criterion]}, %, with 95 % intervals"
    axis.set(xlabel=title, ylim=(len(table) - 0.5, -0.5))
    axis.grid(axis="x")
    letters = sorted(set("".join(table.group)))
    if len(letters) > LETTERS:
        for place, group in enumerate(table.group):
            axis.text(1.02, place, group, va="center", transform=axis.get_yaxis_transform())
        return figure
    for i, letter in enumerate(letters):
        rows = np.flatnonzero(table.group.str.contains(letter, regex=False))
        x, ends = 1.03 + 0.03 * i, (rows[0], rows[-1])  # x in widths of the axes
        beside = {"transform": axis.get_yaxis_transform(), "clip_on": False}
        axis.plot((x, x), ends, color="#999999", lw=1, **beside)
        for row in rows:
            axis.plot(x, row, "o", color="white", ms=11, **beside)
            axis.text(x, row, letter, ha="center", va="center", fontsize=9, **beside)
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
    digits = "123456789" if ratio < 4 else "25"

    def between(value: float, _: int) -> str:
        return scaled(value) if f"{value:e}"[0] in digits else ""

    axis.set_major_formatter(lambda value, _: scaled(value))
    axis.set_minor_formatter(between if ratio < 60 else NullFormatter())
    axis.set_tick_params(which="both", labelsize=8)


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


def draw_class_scores(comparison: Comparison, most: int = 40) -> plt.Figure:
    """A column a class, a row a model: F1 (mean over seeds) as a heat map; the worst classes."""
    scores = {label: compare.class_scores(runs) for label, runs in comparison.groups.items()}
    shares = pd.DataFrame({label: of.f1 for label, of in scores.items()}).T
    worst = shares.mean().nsmallest(most).index
    shares = shares[[name for name in shares if name in worst]]
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
        "multiply-adds per image": table.multiply_adds_per_image,
        "training time, s": table.seconds,
    }
    if milliseconds is None or milliseconds.isna().all():
        costs["memory of a training step, bytes"] = table.train_step_memory_bytes
    else:
        costs["latency, ms per image"] = milliseconds
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.5), sharey=True)
    score = 100 * table.score.to_numpy()
    for axis, (title, cost) in zip(axes.flat, costs.items(), strict=True):
        cost = cost.where(cost > 0).to_numpy(float)  # nearest neighbours have no parameters
        front = pareto_front(cost, score)
        axis.step(cost[front], score[front], where="post", color="#999999", lw=1, zorder=0)
        for i, (_, row, style) in enumerate(_models(comparison)):
            spread = [[max(0, score[i] - row.ci95_low)], [max(0, row.ci95_high - score[i])]]
            style |= {"fmt": "o", "capsize": 3, "mfc": None if i in front else "white"}
            if not np.isnan(cost[i]):
                axis.errorbar(cost[i], score[i], spread, **style)
        if np.isnan(cost).all():
            axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
        else:
            axis.set_xscale("log")
            plain_ticks(axis.xaxis, np.nanmax(cost) / np.nanmin(cost))
        axis.set(xlabel=title)
        axis.grid()
    for axis in axes[:, 0]:
        axis.set_ylabel(f"test {TITLES[comparison.criterion]}, %")
    figures.legend_beside(figure, axes.flat)
    return figure


def draw_sizes(curves: Sequence, criterion: str) -> plt.Figure:
    """Scores and errors of `sizes.Curve`s against training images; laws up to twice the largest."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4))
    colours, seen = figures.colours({curve.kind: None for curve in curves}), [100.0]
    for curve in curves:
        table, colour = curve.table, colours[curve.kind]
        below = (table.score - table.ci95_low).clip(lower=0)
        above = (table.ci95_high - table.score).clip(lower=0)
        style = {"fmt": "o", "capsize": 3, "color": colour}
        axes[0].errorbar(
            table.images, 100 * table.score, [100 * below, 100 * above],
            label=literal(curve.kind), **style,
        )  # fmt: skip
        error = 100 * (1 - table.score)
        seen += [*error[error > 0]]
        axes[1].errorbar(table.images, error, [100 * above, 100 * below], **style)
        if curve.law is None:
            axes[0].plot(table.images, 100 * table.score, ":", color=colour)
            axes[1].plot(table.images, error, ":", color=colour)
            continue
        first, last = curve.points.sizes[[0, -1]]
        n = np.append(np.geomspace(first, last, 40), np.geomspace(last, 2 * last, 15)[1:])
        errors = 100 * np.stack([curve.law.error(size) for size in n])
        low, middle, high = np.quantile(errors, [0.025, 0.5, 0.975], axis=1)
        known, seen = n <= last, [*seen, middle[-1]]
        for axis, turn in zip(axes, (lambda e: 100 - e, lambda e: e), strict=True):
            axis.fill_between(n, turn(low), turn(high), color=colour, alpha=0.12, lw=0)
            axis.plot(n[known], turn(middle[known]), color=colour)
            axis.plot(n[n >= last], turn(middle[n >= last]), "--", color=colour)
    sizes = np.concatenate([curve.table.images for curve in curves])
    for axis in axes:
        axis.set(xscale="log", xlabel="training images")
        plain_ticks(axis.xaxis, 2 * sizes.max() / sizes.min())
        axis.grid()
    axes[0].set_ylabel(f"test {TITLES[criterion]}, %")
    axes[1].set(yscale="log", ylabel="error, %", ylim=(max(0.75 * min(seen), 1e-3), None))
    low, high = axes[1].get_ylim()
    plain_ticks(axes[1].yaxis, high / low)
    figures.legend_beside(figure, axes[:1])
    return figure
