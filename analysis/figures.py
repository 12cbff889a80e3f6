"""The pictures of the comparison: curves, confusion, accuracy against cost."""

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from sklearn.metrics import confusion_matrix

from analysis.runs import FinishedRun

matplotlib.use("Agg")
import matplotlib.pyplot as plt

plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})


def colours(groups: dict) -> dict:
    """Returns a colour for each label, the same in every picture."""
    cycle = plt.get_cmap("tab10" if len(groups) <= 10 else "tab20").colors
    return {label: cycle[i % len(cycle)] for i, label in enumerate(sorted(groups))}


def literal(name: str) -> str:
    """Returns a name as matplotlib shows it letter by letter, without reading $ as mathematics."""
    return name.replace("$", r"\$")


def draw_curves(groups: dict[str, list[FinishedRun]]) -> plt.Figure:
    """Validation accuracy and loss by epoch: a thin line a seed, a thick one for their mean."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for axis, value in zip(axes, ("accuracy", "loss"), strict=True):
        for label, runs in groups.items():
            series = []
            for run in runs:
                lines = [x for x in run.metrics if x["split"] == "validation"]
                series.append(pd.Series({x["epoch"]: x[value] for x in lines}, dtype=float))
            colour = colours(groups)[label]
            if max(map(len, series)) == 1:  # fitted at once, without epochs
                axis.axhline(
                    np.mean([s.iloc[0] for s in series]),
                    color=colour,
                    ls="--",
                    label=literal(label),
                )
                continue
            for one in series:
                axis.plot(one.index, one, color=colour, lw=0.7, alpha=0.4)
            mean = pd.concat(series, axis=1).dropna().mean(axis=1)
            axis.plot(mean.index, mean, color=colour, lw=2, label=literal(label))
        axis.set(xlabel="epoch", ylabel=f"validation {value}")
        axis.grid(alpha=0.3)
    if groups:
        axes[1].set_yscale("log")
        axes[0].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    return figure


def draw_confusion(groups: dict[str, list[FinishedRun]]) -> plt.Figure:
    """A matrix a model: counts summed over seeds, coloured by the share of the true class."""
    columns = min(3, max(1, len(groups)))
    rows = max(1, -(-len(groups) // columns))
    figure, axes = plt.subplots(rows, columns, figsize=(4.3 * columns, 4.3 * rows), squeeze=False)
    for axis in axes.flat[len(groups) :]:
        axis.axis("off")
    for axis, (label, runs) in zip(axes.flat, groups.items(), strict=False):
        names = runs[0].dataset["class_names"]
        counts = sum(
            confusion_matrix(
                run.test["labels"], run.test["logits"].argmax(axis=1), labels=range(len(names))
            )
            for run in runs
        )
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        if len(names) <= 12:
            for i, j in np.ndindex(counts.shape):
                if counts[i, j]:
                    ink = "white" if share[i, j] > 0.5 else "black"
                    axis.text(
                        j, i, str(counts[i, j]), ha="center", va="center", fontsize=7, color=ink
                    )
        if len(names) <= 40:
            short = [literal(name if len(name) <= 14 else name[:13] + "…") for name in names]
            axis.set_xticks(range(len(names)), short, rotation=60, ha="right", fontsize=7)
            axis.set_yticks(range(len(names)), short, fontsize=7)
        axis.set(xlabel="predicted", ylabel="true")
        axis.set_title(f"{literal(label)}, {len(runs)} seed{'s' * (len(runs) > 1)}", fontsize=10)
    figure.tight_layout()
    return figure


def draw_cost(groups: dict[str, list[FinishedRun]], table: pd.DataFrame) -> plt.Figure:
    """Test accuracy, with the interval over seeds, against three costs."""
    costs = {
        "parameters": "parameters",
        "flops_per_image": "FLOPs per image, forward",
        "seconds_to_best": "seconds to the best weights",
    }
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), sharey=True)
    for axis, (column, title) in zip(axes, costs.items(), strict=True):
        for label, row in zip(groups, table.itertuples(), strict=True):
            x, y = getattr(row, column), 100 * row.test_accuracy_mean
            if pd.isna(x) or x <= 0:
                continue  # no such cost: nearest neighbours have no parameters
            spread = None
            if row.seeds > 1:
                low, high = row.test_accuracy_ci95_low, row.test_accuracy_ci95_high
                spread = [[y - 100 * low], [100 * high - y]]
            axis.errorbar(
                x, y, spread, fmt="o", color=colours(groups)[label], capsize=3, label=literal(label)
            )
        axis.set(xlabel=title, xscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy, %")
    if len(table):
        handles = {}
        for axis in axes:
            handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        figure.legend(
            handles.values(), handles, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False
        )
    figure.tight_layout()
    return figure


def save(figure: plt.Figure, path: Path) -> None:
    """Writes a PNG and lets the figure go."""
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
