"""The charts of the comparison, from saved predictions and metrics."""

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter, FuncFormatter, NullFormatter

from analysis import evaluate
from analysis.compare import mean_confusion
from analysis.page.figures import colours, legend_beside, literal, shortened, small_multiples
from analysis.runs import FinishedRun, Groups, correctness
from analysis.uncertainty import indistinct, pareto_front


def draw_ranks(groups: Groups, table: pd.DataFrame, established: set) -> plt.Figure:
    """Accuracy by rank with both intervals; bars at the right tie models that may be equal."""
    count, stretches = len(groups), indistinct(len(groups), established)
    figure, axis = plt.subplots(figsize=(9, 0.5 * count + 1.4))
    for rank, (label, row) in enumerate(zip(groups, table.itertuples(), strict=True)):
        colour, mean = colours(groups)[label], 100 * row.test_accuracy_mean
        images = (100 * row.images_ci95_low, 100 * row.images_ci95_high)
        axis.plot(images, (rank, rank), color=colour, lw=1.5, label="over test images" * (not rank))
        seeds = (100 * row.seeds_ci95_low, 100 * row.seeds_ci95_high)
        if not np.isnan(seeds[0]):
            axis.plot(seeds, (rank, rank), color=colour, lw=6, alpha=0.4, label="over seeds")
        axis.plot(mean, rank, "o", color=colour, label="mean" * (not rank))
        if not np.isnan(row.published):
            axis.plot(100 * row.published, rank, "kx", label="published")
    axis.set_yticks(range(count), [literal(label) for label in groups])
    axis.set(xlabel="test accuracy, %, with 95 % intervals", ylim=(count - 0.5, -0.5))
    axis.grid(axis="x")
    for place, (first, last) in enumerate(stretches):
        x = 1.02 + 0.025 * place  # of the axes' width
        axis.plot(
            (x, x),
            (first - 0.2, last + 0.2),
            color="#333333",
            lw=4,
            solid_capstyle="butt",
            transform=axis.get_yaxis_transform(),
            clip_on=False,
        )
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.tight_layout()
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0)}
    figure.legend(handles.values(), handles, ncols=4, frameon=False, **place)
    return figure


def draw_curves(groups: Groups) -> plt.Figure:
    """Validation accuracy and loss by epoch: a thin line a seed, a thick one for their mean."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for axis, value in zip(axes, ("accuracy", "loss"), strict=True):
        for label, runs in groups.items():
            series = []
            for run in runs:
                lines = [x for x in run.metrics if x["split"] == "validation"]
                series.append(pd.Series({x["epoch"]: x[value] for x in lines}, dtype=float))
            series = [one for one in series if len(one)]
            colour = colours(groups)[label]
            if not series:
                continue
            if max(map(len, series)) == 1:  # fitted at once, without epochs
                height = np.mean([s.iloc[0] for s in series])
                axis.axhline(height, color=colour, ls="--", label=literal(label))
                continue
            for one in series:
                axis.plot(one.index, one, color=colour, lw=0.7, alpha=0.4)
            mean = pd.concat(series, axis=1).dropna().mean(axis=1)
            axis.plot(mean.index, mean, color=colour, lw=2, label=literal(label))
        axis.set(xlabel="epoch", ylabel=f"validation {value}")
        axis.grid()
    axes[1].set_yscale("log")
    low, high = axes[1].get_ylim()
    plain_ticks(axes[1].yaxis, high / low)
    figure.tight_layout()
    legend_beside(figure, axes)
    return figure


def plain_ticks(axis, ratio: float) -> None:
    """Labels a logarithmic axis with 20 k rather than powers; between powers if it is short."""

    def label(value: float, _: int) -> str:
        return EngFormatter(sep=" ")(value) if value >= 1000 else f"{value:g}"

    def between(value: float, _: int) -> str:
        return label(value, 0) if f"{value:e}"[0] in "25" else ""

    axis.set_major_formatter(FuncFormatter(label))
    axis.set_minor_formatter(FuncFormatter(between) if ratio < 60 else NullFormatter())
    axis.set_tick_params(which="both", labelsize=8)


def draw_confusion(groups: Groups) -> plt.Figure:
    """A matrix a model: images (mean over seeds) and their share of the true class."""
    figure, axes = small_multiples(len(groups), 3, (4.3, 4.3))
    for axis, (label, runs) in zip(axes, groups.items(), strict=True):
        names, counts = runs[0].class_names, mean_confusion(runs)
        share = evaluate.row_shares(counts)
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        if len(names) <= 12:
            for i, j in np.ndindex(counts.shape):
                if counts[i, j]:
                    ink = "white" if share[i, j] > 0.5 else "black"
                    text = f"{counts[i, j]:.0f}" if counts[i, j] >= 1 else f"{counts[i, j]:.1g}"
                    text += f"\n{100 * share[i, j]:.0f} %" * (len(names) <= 8)
                    axis.text(j, i, text, ha="center", va="center", fontsize=7, color=ink)
        if len(names) <= 40:
            short = [literal(shortened(name)) for name in names]
            axis.set_xticks(range(len(names)), short, rotation=60, ha="right", fontsize=8)
            axis.set_yticks(range(len(names)), short, fontsize=8)
        axis.set(xlabel="predicted", ylabel="true")
        axis.set_title(literal(label), fontsize=10)
    figure.tight_layout()
    return figure


def draw_class_scores(groups: Groups, score: str) -> plt.Figure:
    """A column a class, a row a model: precision, recall or F1 (mean over seeds) as a heat map."""
    names = next(iter(groups.values()))[0].class_names
    values = np.array([class_scores(runs)[score] for runs in groups.values()])  # [models, K]
    figure, axis = plt.subplots(
        figsize=(min(16, 2.5 + 0.75 * len(names)), 1.3 + 0.38 * len(groups))
    )
    image = axis.imshow(100 * values, cmap="viridis", aspect="auto", vmax=100)
    if len(names) <= 24:
        middle = (100 + 100 * values.min()) / 2
        for i, j in np.ndindex(values.shape):
            ink = "black" if 100 * values[i, j] > middle else "white"
            text = f"{100 * values[i, j]:.0f}"
            axis.text(j, i, text, ha="center", va="center", fontsize=8, color=ink)
    if len(names) <= 40:
        short = [literal(shortened(name)) for name in names]
        axis.set_xticks(range(len(names)), short, rotation=40, ha="right", fontsize=9)
    axis.set_yticks(range(len(groups)), [literal(label) for label in groups], fontsize=9)
    figure.colorbar(image, ax=axis, label={"f1": "F1"}.get(score, score) + ", %")
    figure.tight_layout()
    return figure


def class_scores(runs: list[FinishedRun]) -> pd.DataFrame:
    """Returns `evaluate.per_class` of a model, means over its seeds."""
    tables = [evaluate.per_class(r.test["labels"], r.predicted, r.class_names) for r in runs]
    mean = sum(table.drop(columns="class") for table in tables) / len(tables)
    return pd.concat([tables[0]["class"], mean], axis=1)


def draw_pareto(groups: Groups, table: pd.DataFrame) -> plt.Figure:
    """Accuracy against four costs; a line joins the models that no other beats in both."""
    costs = {
        "parameters": table.parameters,
        "FLOPs per image, forward": table.flops_per_image,
        "seconds of training": table.seconds,
        "seconds to predict 1,000 images": 1000 / table.inference_images_per_second,
    }
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.5), sharey=True)
    accuracy = 100 * table.test_accuracy_mean.to_numpy()
    for axis, (title, cost) in zip(axes.flat, costs.items(), strict=True):
        cost = cost.where(cost > 0).to_numpy(float)  # nearest neighbours have no parameters
        front = pareto_front(cost, accuracy)
        axis.step(cost[front], accuracy[front], where="post", color="#999999", lw=1, zorder=0)
        for i, (label, row) in enumerate(zip(groups, table.itertuples(), strict=True)):
            if np.isnan(cost[i]):
                continue
            low, high = 100 * row.images_ci95_low, 100 * row.images_ci95_high
            if not np.isnan(row.seeds_ci95_low):
                low, high = 100 * row.seeds_ci95_low, 100 * row.seeds_ci95_high
            spread = [[max(0, accuracy[i] - low)], [max(0, high - accuracy[i])]]
            style = {"mfc": None if i in front else "white", "color": colours(groups)[label]}
            axis.errorbar(
                cost[i], accuracy[i], spread, fmt="o", capsize=3, label=literal(label), **style
            )
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


def draw_reliability(groups: Groups) -> plt.Figure:
    """A diagram a model: accuracy by confidence, and how often each confidence occurs."""
    figure, axes = small_multiples(len(groups), 4, (3, 3))
    for axis, (label, runs) in zip(axes, groups.items(), strict=True):
        probabilities = np.concatenate([evaluate.softmax(r.test["logits"]) for r in runs])
        labels = np.concatenate([run.test["labels"] for run in runs])
        bins = evaluate.reliability(probabilities, labels)
        colour, left, width = colours(groups)[label], bins.low, 1 / len(bins)
        share = bins.images / bins.images.sum()
        axis.bar(left, share, width, align="edge", color="#cccccc")
        axis.plot((0, 1), (0, 1), color="#666666", lw=1, ls="--")
        axis.plot(bins.confidence, bins.accuracy, "o-", ms=4, color=colour)
        error = evaluate.calibration_error(probabilities, labels)
        axis.set_title(f"{literal(label)}: ECE {100 * error:.1f} %", fontsize=9)
        axis.set(xlim=(0, 1), ylim=(0, 1))
        axis.grid()
    figure.supxlabel("confidence in the predicted class", fontsize=10)
    figure.supylabel("accuracy; grey: share of images", fontsize=10)
    figure.tight_layout()
    return figure


def draw_coverage(groups: Groups) -> plt.Figure:
    """Accuracy on the images answered against their share, as the confidence asked for rises."""
    figure, axis = plt.subplots(figsize=(7, 4.2))
    lowest = 100.0
    for label, runs in groups.items():
        probabilities = np.concatenate([evaluate.softmax(r.test["logits"]) for r in runs])
        labels = np.concatenate([run.test["labels"] for run in runs])
        curve = evaluate.coverage_curve(probabilities, labels)
        curve = curve[curve.coverage * len(labels) >= 20]  # of fewer images accuracy is noise
        axis.step(
            100 * curve.coverage,
            100 * curve.accuracy,
            color=colours(groups)[label],
            where="post",
            label=literal(label),
        )
        lowest = min(lowest, 100 * correctness(runs).mean())
    axis.set(xlabel="images answered, %", ylabel="accuracy on them, %", ylim=(lowest - 2, 100.5))
    axis.grid()
    legend_beside(figure, [axis])
    figure.tight_layout()
    return figure


def draw_agreement(groups: Groups, pairs: pd.DataFrame) -> plt.Figure:
    """Share of test images on which two models predict the same class."""
    labels = list(groups)
    values = np.full((len(labels), len(labels)), np.nan)
    for row in pairs.itertuples():
        i, j = labels.index(row.first), labels.index(row.second)
        values[i, j] = values[j, i] = 100 * row.agreement
    side = 2 + 0.6 * len(labels)
    figure, axis = plt.subplots(figsize=(side + 1.2, side))
    image = axis.imshow(values, cmap="viridis", vmax=100)
    for i, j in np.ndindex(values.shape):
        if not np.isnan(values[i, j]) and len(labels) <= 16:
            middle = (np.nanmin(values) + 100) / 2
            ink = "black" if values[i, j] > middle else "white"
            axis.text(j, i, f"{values[i, j]:.0f}", ha="center", va="center", fontsize=8, color=ink)
    short = [literal(label) for label in labels]
    axis.set_xticks(range(len(labels)), short, rotation=45, ha="right", fontsize=9)
    axis.set_yticks(range(len(labels)), short, fontsize=9)
    figure.colorbar(image, ax=axis, label="same prediction, % of test images", shrink=0.8)
    figure.tight_layout()
    return figure
