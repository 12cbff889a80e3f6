"""Saliency maps of a run's test images, and pictures of them: heat maps over photos, on a grid."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import softmax

from analysis.explain.methods import METHODS, default_stage, explainer, map_side
from analysis.forward import load_classifier, load_test_images
from analysis.page.figures import literal, plt, shortened
from analysis.runs import FinishedRun

COLOURS = plt.get_cmap("YlOrRd")
RIGHT, WRONG = "#1a7f37", "#c62828"


@dataclass(frozen=True)
class View:
    """A cell of a picture: a photo, a heat map, or both."""

    title: str  # one or two short lines
    photo: np.ndarray | None = None  # uint8 [S, S, 3]
    heat: np.ndarray | None = None  # [S, S], raw
    colour: str = "black"  # of the title


def overlay(photo: np.ndarray | None, heat: np.ndarray | None) -> np.ndarray:
    """Returns [S, S, 3] in 0..1: a heat map over a pale grey photo, or one of them alone."""
    if heat is None:
        return photo / 255
    share = heat / (heat.max() or 1)
    colours = COLOURS(share)[..., :3]
    if photo is None:
        return colours
    grey = 0.3 + 0.7 * photo.mean(axis=-1, keepdims=True) / 255
    strength = 0.85 * share[..., None]  # the photo shows where there is no evidence
    return np.clip(grey * (1 - strength) + colours * strength, 0, 1)


def draw_views(rows: list[list[View | None]], names: list[str]) -> plt.Figure:
    """Draws rows of views, None for an empty cell, with a name of up to three lines beside each."""
    shape, side, gap = (len(rows), len(rows[0])), 1.3, 0.42  # inches
    left, right = 0.75, 0.9
    width, height = left + shape[1] * (side + 0.12) + right, shape[0] * (side + gap)
    figure, axes = plt.subplots(*shape, figsize=(width, height), squeeze=False)
    figure.subplots_adjust(
        left=left / width, right=1 - right / width, bottom=0.02, top=1 - gap / height,
        wspace=0.12 / side, hspace=gap / side,
    )  # fmt: skip
    for axis, view in zip(axes.flat, sum(rows, []), strict=True):
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        if view is None:
            continue
        axis.imshow(overlay(view.photo, view.heat), interpolation="nearest")
        axis.set_title(literal(view.title), fontsize=8, color=view.colour, pad=3)
        if view.heat is not None and not view.heat.any():
            box = {"color": "white", "alpha": 0.85, "pad": 2}
            place = {"ha": "center", "va": "center", "transform": axis.transAxes}
            axis.text(0.5, 0.5, "map is zero: no\npositive evidence", fontsize=8, bbox=box, **place)
    for axis, name in zip(axes[:, 0], names, strict=True):
        axis.set_ylabel(literal(name), fontsize=9)
    bar = figure.add_axes([1 - (right - 0.15) / width, 0.02, 0.12 / width, min(0.85, 2.4 / height)])
    figure.colorbar(plt.cm.ScalarMappable(cmap=COLOURS), cax=bar)
    bar.set_ylabel("share of the map's maximum", fontsize=8)
    bar.tick_params(labelsize=8)
    return figure


class ExplainedRun:
    """A run's model and test images, and their maps by one method."""

    def __init__(
        self, run: FinishedRun, method: str, stage: int | None = None, data_path: str = ""
    ):
        self.run, self.model = run, load_classifier(run)
        self.photos, self.labels = load_test_images(run, data_path), run.test["labels"]
        self.probabilities = softmax(run.test["logits"], axis=1)
        self._choose(method, stage)

    def _choose(self, method: str, stage: int | None = None) -> None:
        size, kind, self.method = self.photos.shape[1], METHODS[method].kind, method
        self.explain = explainer(self.model, size, method, stage)
        self.stage = default_stage(self.model, size) if stage is None else stage
        self.only_pixels = kind == "map" and self.stage == 0  # a CAM that weighs colours alone
        side = map_side(self.model, size, self.stage)
        of_stage = f"{side}x{side}, stage {self.stage} of {len(self.model.stages)}"
        self.resolution = of_stage if kind == "map" else "pixels"  # as a reader sees it

    def by(self, method: str) -> "ExplainedRun":
        """Returns the same run and images, explained by another method."""
        other = copy.copy(self)
        other._choose(method)
        return other

    def photo(self, row: int) -> View:
        """Returns the photo of a test image under its true class."""
        return View(f"true:\n{self.name(self.labels[row])}", self.photos[row])

    def views(self, rows: Sequence[int], targets: np.ndarray) -> list[View]:
        """Returns maps over photos, titled with class and confidence."""
        views, heats = [], self.explain(self.photos[rows], targets)
        for row, target, heat in zip(rows, targets, heats, strict=True):
            mark, colour = "for", "black"
            if target == self.run.predicted[row]:
                mark, colour = ("✓", RIGHT) if self.run.correct[row] else ("✗", WRONG)
            title = f"{mark} {self.name(target)}\n{100 * self.probabilities[row, target]:.0f} %"
            views.append(View(title, self.photos[row], heat, colour))
        return views

    def surest(self, rows: np.ndarray) -> np.ndarray:
        """Returns the rows by the confidence of their prediction, the highest first."""
        return rows[np.argsort(-self.probabilities.max(axis=1)[rows], kind="stable")]

    def name(self, number: int) -> str:
        """Returns the name of a class, cut to 12 letters."""
        return shortened(self.run.class_names[number], 12)
