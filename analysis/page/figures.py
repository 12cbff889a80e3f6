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
    """Returns a name as matplotlib shows it letter by letter, without reading $ as mathematics."""
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
    """Puts one legend for all axes to the right of the figure, or at another place."""
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
    """Draws a matrix with a text in each cell and a name at each row and column; returns the image.

    Args:
      axis: to draw on.
      values: [R, C]; NaN stays white.
      write: text of cell (i, j), "" for none.
      rows, columns: names; [] for none, and none are shown where there are more than 40.
      **options: of `imshow`, such as `cmap`, `vmin`, `vmax`.
    """
    image = axis.imshow(values, **options)
    for i, j in np.ndindex(values.shape):
        if text := write(i, j):
            red, green, blue, _ = image.cmap(image.norm(values[i, j]))
            dark = not np.isnan(values[i, j]) and 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            ink = "white" if dark else "black"
            axis.text(j, i, text, ha="center", va="center", fontsize=8, color=ink)
    across = [literal(shortened(name)) for name in columns]
    down = [literal(name) for name in rows]
    if len(across) <= NAMED:
        axis.set_xticks(range(len(across)), across, rotation=45, ha="right", fontsize=8)
    if len(down) <= NAMED:
        axis.set_yticks(range(len(down)), down, fontsize=8)
    return image


def draw_photos(images: list[np.ndarray], titles: list[str], columns: int = 6) -> plt.Figure:
    """Draws photos, each uint8 [S, S, 3], in rows with a title of one or two lines above each."""
    # At least a whole row, so that few photos are shown no larger than many.
    figure, axes = small_multiples(max(len(images), columns), columns, (1.9, 2.25))
    for axis in axes:
        axis.axis("off")
    for axis, image, title in zip(axes, images, titles, strict=False):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(literal(title), fontsize=8)
    figure.tight_layout()
    return figure


def save(figure: plt.Figure, path: Path) -> None:
    """Writes an SVG (charts) or a PNG (photos), by the path's ending, and lets the figure go."""
    metadata = {"Date": None} if path.suffix == ".svg" else None  # the same bits every time
    figure.savefig(path, dpi=130, bbox_inches="tight", metadata=metadata)
    plt.close(figure)
