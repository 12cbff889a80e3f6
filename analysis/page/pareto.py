"""Accuracy against each cost, laid out for the page: points, whiskers, ticks, Pareto front."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.compare import Comparison
from analysis.page.first import measured
from analysis.page.section import Section
from analysis.page.tables import percent, scaled
from analysis.uncertainty import pareto_front

WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 62, 24, 16, 46
AXES = "Pareto axes"  # in the data of a section: {title: {label: cost}}
NAMED = 24  # models; beyond, only those on the front bear their name


@dataclass(frozen=True)
class Point:
    """A model in units of the drawing; `name` is "" where it would lie on another."""

    model: str
    x: float
    y: float
    low: float
    high: float
    front: bool
    words: str
    name: str = ""
    anchor: str = "start"


@dataclass(frozen=True)
class Plot:
    """Accuracy against one cost."""

    title: str
    points: list[Point]
    ticks_x: list[tuple[float, str]]
    ticks_y: list[tuple[float, str]]
    front: str  # points of a line
    missing: list[str]  # models without that cost, which cannot be shown


def plots(comparison: Comparison, sections: list[Section]) -> list[Plot]:
    """Returns a plot for each cost that was measured of two models or more."""
    table = comparison.table
    if table.empty:
        return []
    milliseconds = measured(sections, "milliseconds_at_1")[0]
    unknown = pd.Series(math.nan, table.index)
    costs = {
        "multiply-adds per image": table.multiply_adds_per_image,
        "parameters": table.parameters,
        "training time, s": table.seconds,
        "memory of a training step, bytes": table.get("train_step_memory_bytes", unknown),
        "latency, ms per image": table.label.map(milliseconds),
    }
    for section in sections:
        for title, cost in section.data.get(AXES, {}).items():
            costs[title] = table.label.map(cost)
    made = (_plot(title, cost.astype(float), table) for title, cost in costs.items())
    return [plot for plot in made if len(plot.points) > 1]


def _plot(title: str, cost: pd.Series, table: pd.DataFrame) -> Plot:
    known = (cost > 0) & table.score.notna()  # nearest neighbours have no parameters
    shown, cost = table[known], cost[known].to_numpy()
    missing = table.label[~known].tolist()
    if shown.empty:
        return Plot(title, [], [], [], "", missing)
    ends = shown[["ci95_low", "ci95_high"]].to_numpy(float)
    score = shown.score.to_numpy(float)
    ends = np.where(np.isnan(ends), score[:, None], ends)
    span = np.log10(cost.max() / cost.min()) or 1.0
    left, low, high = np.log10(cost.min()) - 0.08 * span, ends.min(), max(ends.max(), score.max())
    room = max(0.04 * (high - low), 5e-4)
    right, low, high = np.log10(cost.max()) + 0.12 * span, low - room, high + room

    def across(value: float) -> float:
        share = (math.log10(value) - left) / (right - left)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def up(value: float) -> float:
        return round(TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    front = pareto_front(cost, score)
    points = [
        Point(
            label, across(cost[i]), up(score[i]), up(ends[i, 0]), up(ends[i, 1]), i in front,
            f"{label}: {percent(score[i])} %, {title}: {scaled(cost[i])}",
        )
        for i, label in enumerate(shown.label)
    ]  # fmt: skip
    line = " ".join(
        f"{points[b].x},{points[a].y} {points[b].x},{points[b].y}"
        for a, b in zip(front[:1] + front, front, strict=False)
    )
    ticks_x = [(across(x), scaled(x)) for x in _log_ticks(10**left, 10**right)]
    ticks_y = [(up(y), f"{100 * y:.4g}") for y in _ticks(low, high)]
    return Plot(title, _named(points), ticks_x, ticks_y, line, missing)


def _ticks(low: float, high: float) -> list[float]:
    """Returns about five round numbers between two."""
    step = 10 ** math.floor(math.log10(high - low))
    step *= next(s for s in (0.1, 0.2, 0.5, 1, 2) if (high - low) / (step * s) <= 7)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Returns 1, 2 and 5 times the powers of ten between two numbers; of a wide range, fewer."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ratio = high / low
    for digits in ((1, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1,)):
        found = [d * 10.0**p for p in powers for d in digits if low <= d * 10.0**p <= high]
        if len(found) <= 9 or ratio > 1e9:
            break
    return found[:: max(1, -(-len(found) // 9))]


def _named(points: list[Point]) -> list[Point]:
    """Gives points their names, the front first, as far as they do not cover each other."""
    boxes = [(p.x - 5, p.y - 5, p.x + 5, p.y + 5) for p in points]
    named = {}
    for i in sorted(range(len(points)), key=lambda i: not points[i].front):
        point = points[i]
        if len(points) > NAMED and not point.front:
            continue
        name = point.model if len(point.model) <= 28 else point.model[:27] + "…"
        width = 7.2 * len(name)
        for anchor, x in (("start", point.x + 8), ("end", point.x - 8 - width)):
            box = (x, point.y - 15, x + width, point.y - 1)
            if x >= LEFT and x + width <= WIDTH and not any(_overlap(box, b) for b in boxes):
                boxes.append(box)
                named[i] = (name, anchor)
                break
    return [
        Point(**vars(point) | dict(zip(("name", "anchor"), named[i], strict=True)))
        if i in named
        else point
        for i, point in enumerate(points)
    ]


def _overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
