"""What every picture of the analysis shares: colours, names, grids, files."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
plt.rcParams.update({"svg.hashsalt": "archcompare", "grid.alpha": 0.3})

NAMED = 40  # rows or columns of a matrix; the names of more are too small to read


def colours(groups: dict) -> dict:
    """Returns a colour for each label, the same in every picture."""
    cycle = plt.get_cmap("tab10" if len(groups) <= 10 else "tab20").colors
    return {label: cycle[i % len(cycle)] for i, label in enumerate(sorted(groups))}


def literal(name: str) -> str:
    """Returns a name that matplotlib shows as it is, $ included."""
    return name.replace("$", r"\$")


def shortened(name: str, length: int = 14) -> str:
    """Returns a name of at most that many letters."""
    return name if len(name) <= length else name[: length - 1] + "…"


def small_multiples(count: int, columns: int, size: tuple[float, float]) -> tuple:
    """Returns a figure and `count` axes on a grid; places left over are empty."""
    columns = min(columns, max(1, count))
    rows = max(1, -(-count // columns))
    shape = (size[0] * columns, size[1] * rows)
    figure, axes = plt.subplots(rows, columns, figsize=shape, squeeze=False)
    for axis in axes.flat[count:]:
        axis.axis("off")
    return figure, list(axes.flat[:count])


def legend_beside(figure: plt.Figure, axes: Sequence[plt.Axes], **place) -> None:
    """Puts one legend for all axes to the right of the figure, or at `place`."""
    handles = {}
    for axis in axes:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    place = place or {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    figure.legend(handles.values(), handles, frameon=False, **place)


def heat_map(
    axis: plt.Axes,
    values: np.ndarray,
    write: Callable[[int, int], str],
    rows: Sequence[str],
    columns: Sequence[str],
    **options,
):
    """Draws a matrix [R, C] by `imshow(**options)`, and returns the image; NaN stays white.

    `write(i, j)` is the text of a cell. More than 40 names of rows or columns are not shown.
    """
    image = axis.imshow(values, **options)
    for i, j in np.ndindex(values.shape):
        if text := write(i, j):
            red, green, blue, _ = image.cmap(image.norm(values[i, j]))
            dark = not np.isnan(values[i, j]) and 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            ink = "white" if dark else "black"
            axis.text(j, i, text, ha="center", va="center", fontsize=8, color=ink)
    if len(columns) <= NAMED:
        names = [literal(shortened(name)) for name in columns]
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    if len(rows) <= NAMED:
        axis.set_yticks(range(len(rows)), map(literal, rows), fontsize=8)
    return image


def draw_photos(images: Sequence[np.ndarray], titles: list[str]) -> plt.Figure:
    """Draws photos uint8 [S, S, 3] in rows, a title of one or two lines above each."""
    # At least a whole row, so that few photos are shown no larger than many.
    figure, axes = small_multiples(max(len(images), 6), 6, (1.9, 2.25))
    for axis in axes:
        axis.axis("off")
    for axis, image, title in zip(axes, images, titles, strict=False):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(literal(title), fontsize=8)
    figure.tight_layout()
    return figure


def save(figure: plt.Figure, path: Path) -> None:
    """Writes a figure as SVG or PNG, by the path's ending, and closes it."""
    metadata = {"Date": None} if path.suffix == ".svg" else None  # the same bits every time
    figure.savefig(path, dpi=130, bbox_inches="tight", metadata=metadata)
    plt.close(figure)
