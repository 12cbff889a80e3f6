"""Pictures of robustness: accuracy by severity, and what the corruptions look like."""

import jax
import matplotlib
import numpy as np

from analysis.page import figures
from analysis.stress.attacks import ATTACKS
from analysis.stress.corruptions import CORRUPTIONS, SEVERITIES, corrupt, spoken

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw_accuracies(outcomes: dict[str, dict]) -> plt.Figure:
    """A panel per corruption or attack: accuracy by severity, a thin line a seed where several.

    Args:
      outcomes: {model: {(corruption or attack, severity or epsilon): bool [S, N]}}, with
        ("clean", 0).
    """
    conditions = {condition for found in outcomes.values() for condition in found}
    levels = {
        name: sorted(level for other, level in conditions if other == name)
        for name in (*CORRUPTIONS, *ATTACKS)
    }
    names = [name for name, found in levels.items() if found]
    figure, axes = figures.small_multiples(len(names), 5, (2.3, 2.1))
    colours = figures.colours(outcomes)
    for axis, name in zip(axes, names, strict=True):
        for label, found in outcomes.items():
            if (name, levels[name][0]) not in found:
                continue  # cannot be attacked
            right = [found["clean", 0], *(found[name, level] for level in levels[name])]
            accuracy = 100 * np.stack(right).mean(axis=2)  # [1 + levels, S]
            places = [0, *levels[name]]
            if accuracy.shape[1] > 1:
                axis.plot(places, accuracy, color=colours[label], lw=0.6, alpha=0.4)
            style = {"color": colours[label], "label": figures.literal(label)}
            axis.plot(places, accuracy.mean(axis=1), lw=1.6, marker="o", ms=2.5, **style)
        axis.set_title(spoken(name), fontsize=10)
        axis.set(ylim=(0, 102), xticks=[0, *levels[name]])
        axis.tick_params(labelsize=8)
        axis.grid()
        axis.set_xlabel("epsilon, grey levels" if name in ATTACKS else "severity", fontsize=9)
    for axis in axes[::5]:
        axis.set_ylabel("accuracy, %", fontsize=9)
    figure.tight_layout()
    figures.legend_beside(figure, axes)
    return figure


def draw_corruptions(image: np.ndarray, names: list[str], key: jax.Array) -> plt.Figure:
    """A row per corruption: the image, then the five severities.

    Args:
      image: uint8 [S, S, 3].
      names: of corruptions.
      key: of the draws, as for the first image that was measured.
    """
    columns = 1 + len(SEVERITIES)
    figure, axes = plt.subplots(
        len(names), columns, figsize=(columns + 1.3, len(names)), squeeze=False
    )
    for row, name in zip(axes, names, strict=True):
        shown = [corrupt(image[None], name, severity, key)[0] for severity in SEVERITIES]
        for axis, pixels in zip(row, [image, *shown], strict=True):
            axis.imshow(np.asarray(pixels, np.uint8), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(spoken(name), rotation=0, ha="right", va="center", fontsize=10)
    for axis, title in zip(axes[0], ["clean", *map(str, SEVERITIES)], strict=True):
        axis.set_title(title, fontsize=10)
    figure.tight_layout(pad=0.3)
    return figure
