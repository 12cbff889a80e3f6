"""Pictures of robustness: accuracy by severity, and what the corruptions look like."""

import numpy as np
from matplotlib.figure import Figure

from analysis.page import figures
from analysis.stress.attacks import ATTACKS
from analysis.stress.corruptions import CORRUPTIONS, SEVERITIES, corrupt, spoken
from analysis.stress.summary import CLEAN, Outcomes

SHOWN_MODELS = 12  # more lines in one panel cannot be told apart


def draw_accuracies(outcomes: dict[str, Outcomes]) -> Figure:
    """A panel per corruption or attack: accuracy by severity, a thin line a seed where several."""
    conditions = {condition for by_condition in outcomes.values() for condition in by_condition}
    order = (*CORRUPTIONS, *ATTACKS)
    names = sorted({name for name, _ in conditions - {CLEAN}}, key=order.index)
    figure, axes = figures.small_multiples(len(names), 5, (2.3, 2.1))
    colours = figures.colours(outcomes)
    for axis, name in zip(axes, names, strict=True):
        levels = sorted(level for other, level in conditions if other == name)
        for label, right in outcomes.items():
            if (name, levels[0]) not in right:
                continue  # cannot be attacked
            series = [right[CLEAN], *(right[name, level] for level in levels)]
            attacked = min(map(len, series))  # fewer seeds than are corrupted
            # [1 + levels, S]
            accuracy = 100 * np.array([x[:attacked].mean(axis=1) for x in series])
            style = {"color": colours[label], "label": figures.literal(label)}
            if accuracy.shape[1] > 1:
                axis.plot([0, *levels], accuracy, color=colours[label], lw=0.6, alpha=0.4)
            axis.plot([0, *levels], accuracy.mean(axis=1), lw=1.6, marker="o", ms=2.5, **style)
        axis.set_title(spoken(name), fontsize=10)
        axis.set(ylim=(0, 102), xticks=[0, *levels])
        axis.tick_params(labelsize=8)
        axis.grid()
        axis.set_xlabel("epsilon, grey levels" if name in ATTACKS else "severity", fontsize=9)
    for axis in axes[::5]:
        axis.set_ylabel("accuracy, %", fontsize=9)
    figure.tight_layout()
    figures.legend_beside(figure, axes)
    return figure


def draw_corruptions(image: np.ndarray, names: list[str]) -> Figure:
    """A row per corruption: the image uint8 [H, W, 3], then the five severities."""
    columns = 1 + len(SEVERITIES)
    size = ((columns + 1.3) / columns, 1)  # room for the names
    figure, axes = figures.small_multiples(len(names) * columns, columns, size)
    for axis, title in zip(axes, ["clean", *map(str, SEVERITIES)], strict=False):
        axis.set_title(title, fontsize=10)
    for name, row in zip(names, range(0, len(axes), columns), strict=True):
        shown = [corrupt(image, name, severity) for severity in SEVERITIES]
        for axis, pixels in zip(axes[row : row + columns], [image, *shown], strict=True):
            axis.imshow(pixels, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        axes[row].set_ylabel(spoken(name), rotation=0, ha="right", va="center", fontsize=10)
    figure.tight_layout(pad=0.3)
    return figure
