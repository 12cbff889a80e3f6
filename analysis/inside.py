"""What is inside a trained model: its first filters, feature maps, predictions, representations.

    python -m analysis.inside RUN_OR_WORKDIR [--what=filters,features,predictions,curves,cka]
        [--stage=N] [--image=ID] [--images=12] [--data=PATH] [--output=DIR]

Of a workdir, filters, curves and cka show every model, predictions the best one, and features the
best one that has feature maps.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from analysis.diagnosis import diagnose
from analysis.evaluate import softmax
from analysis.explain import representations
from analysis.explain.representations import NothingToShow
from analysis.explain.selection import find_image
from analysis.forward import load_classifier, load_test_images
from analysis.page.figures import literal, plt, save, shortened
from analysis.page.section import Details, Picture, Section
from analysis.runs import FinishedRun, Groups, chosen_runs, evenly_spaced, group_runs
from errors import choose
from experiment.command import arguments, output_folder, run_command
from experiment.files import plain

PARTS = ("filters", "features", "predictions", "curves", "cka")
FOLDED = {
    "predictions": "Predictions for some test images",
    "filters": "Filters of the first layers",
    "features": "Feature maps of a test image",
}
PREDICTIONS = 12  # test images with predictions
NAMED = 12  # classes whose templates bear their names, at most
RIGHT, WRONG, OTHER = "#0072B2", "#D55E00", "#999999"  # told apart by colour-blind readers too


def as_colours(filters: np.ndarray) -> np.ndarray:
    """Scales each filter [N, h, w, 3] by its largest absolute weight: -1..1 to 0..1, 0 is grey."""
    largest = np.abs(filters).max(axis=(1, 2, 3), keepdims=True)
    return 0.5 + 0.5 * filters / np.where(largest > 0, largest, 1)


def mosaic(tiles: np.ndarray, columns: int, gap: int) -> np.ndarray:
    """Returns tiles [N, h, w, 3] in rows of `columns`, a white gap below and right of each."""
    blank = -len(tiles) % columns
    tiles = np.pad(tiles, ((0, blank), (0, gap), (0, gap), (0, 0)), constant_values=1)
    count, height, width, _ = tiles.shape
    rows = tiles.reshape(count // columns, columns, height, width, 3).swapaxes(1, 2)
    return rows.reshape(-1, columns * width, 3)


def draw_filters(filters: dict[str, np.ndarray], names: dict[str, list[str]]) -> plt.Figure:
    """Draws a mosaic of the strongest filters [N, h, w, 3] of each model, with names if given."""
    shown = {label: representations.strongest(weights) for label, weights in filters.items()}
    columns = [min(len(tiles), 6 if label in names else 16) for label, tiles in shown.items()]
    heights = [8 * -(-len(x) // n) / n + 0.4 for x, n in zip(shown.values(), columns, strict=True)]
    figure, axes = plt.subplots(
        len(filters), 1, figsize=(8, sum(heights)), squeeze=False, height_ratios=heights
    )
    for axis, across, (label, tiles) in zip(axes.flat, columns, shown.items(), strict=True):
        count, side = len(filters[label]), tiles.shape[1]
        gap = max(1, side // 16)
        axis.imshow(mosaic(as_colours(tiles), across, gap), interpolation="nearest")
        axis.axis("off")
        what = "class templates" if label in names else "filters"
        title = f"{literal(label)}: {len(tiles)} {what} of {side}×{side} pixels"
        title += f", the strongest of {count}" * (len(tiles) < count)
        axis.set_title(title, loc="left", fontsize=10)
        box = {"color": "white", "alpha": 0.75, "pad": 1, "linewidth": 0}
        for i, name in enumerate(names.get(label, [])):
            place = np.array([i % across, i // across]) * (side + gap) + 0.03 * side
            axis.text(*place, literal(shortened(name)), fontsize=8, va="top", bbox=box)
    figure.tight_layout()
    return figure


def draw_feature_maps(maps: np.ndarray, image: np.ndarray, title: str) -> plt.Figure:
    """Draws an image, and the 16 channels of the highest mean of maps [h, w, C], on one scale."""
    chosen = np.argsort(-maps.mean(axis=(0, 1)), kind="stable")[:16]
    columns = min(8, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = plt.figure(figsize=(2.8 + 1.15 * columns, max(3.0, 1.35 * rows)), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2, 1.15 * columns + 0.8))
    axis = left.subplots()
    axis.imshow(image, interpolation="nearest")
    axis.set_title("image", fontsize=9)
    grid = right.subplots(rows, columns, squeeze=False)
    low, high = min(0.0, float(maps[..., chosen].min())), float(maps[..., chosen].max())
    for cell in [axis, *grid.flat]:
        cell.axis("off")
    for axis, channel in zip(grid.flat, chosen, strict=False):
        values = maps[..., channel]
        shown = axis.imshow(values, vmin=low, vmax=max(high, low + 1e-9), interpolation="nearest")
        axis.set_title(f"{channel}" + ": all zero" * (not values.any()), fontsize=8, pad=2)
    right.colorbar(shown, ax=grid, shrink=0.9, label="activation")
    height, width, channels = maps.shape
    size = f"{len(chosen)} of {channels} channels, maps of {height}×{width}"
    figure.suptitle(f"{literal(title)}: {size}", fontsize=10)
    return figure


def draw_predictions(run: FinishedRun, images: np.ndarray, rows: Sequence[int]) -> plt.Figure:
    """Draws test images with their true class, right or wrong, and the three likeliest classes."""
    labels, probabilities = run.test["labels"][rows], softmax(run.test["logits"][rows])
    names = [literal(shortened(name)) for name in run.class_names]
    columns = min(6, len(rows))
    lines = -(-len(rows) // columns)
    figure, axes = plt.subplots(
        2 * lines, columns, figsize=(1.75 * columns, 2.65 * lines), squeeze=False,
        height_ratios=(1.6, 0.7) * lines, layout="constrained",
    )  # fmt: skip
    for axis in axes.flat:
        axis.axis("off")
    for i, (image, label, row) in enumerate(zip(images, labels, probabilities, strict=True)):
        photo, bars = axes[2 * (i // columns) : 2 * (i // columns) + 2, i % columns]
        top = np.argsort(-row, kind="stable")[:3]
        photo.imshow(image, interpolation="nearest")
        word, colour = ("right", RIGHT) if top[0] == label else ("wrong", WRONG)
        photo.set_title(f"{names[label]}: {word}", fontsize=8, color=colour, pad=2)
        bars.barh(range(len(top)), np.ones(len(top)), color="#eeeeee")
        shades = [colour, *(RIGHT if k == label else OTHER for k in top[1:])]
        bars.barh(range(len(top)), row[top], color=shades, alpha=0.45)
        for j, k in enumerate(top):
            bars.text(0.02, j, f"{100 * row[k]:.0f} % {names[k]}", fontsize=8, va="center")
        bars.set(xlim=(0, 1), ylim=(2.5, -0.5))
    return figure


def picture_similarity(section: Section, groups: Groups, output: Path, data_path: str) -> Picture:
    """Writes inspect_cka.svg; adds its numbers to the section."""
    similarity = representations.compare_representations(groups, data_path)
    if np.isnan(similarity.matrix).all():
        raise NothingToShow("representations need two models, or two seeds of one, to be compared")
    save(representations.draw_similarity(similarity), output / "inspect_cka.svg")
    caption = (
        f"Similarity of the last features on {similarity.images} test images: debiased linear CKA "
        "(1: equal up to rotation and scale; 0: unrelated) between first seeds; on the diagonal, "
        "between two seeds of a model (“–”: it has one). Features are averaged over positions; "
        "“pixels” stands for models without features before their classifier."
    )
    section.text.append(representations.describe(similarity))
    matrix = plain(similarity.matrix.tolist())
    section.data["cka"] = {"labels": similarity.labels, "matrix": matrix}
    return Picture("inspect_cka.svg", caption)


def picture_filters(groups: Groups, output: Path) -> Picture:
    """Writes inspect_filters.png, of the first seed of every model with weights on the image."""
    filters, names = {}, {}
    for label, runs in groups.items():
        model = load_classifier(runs[0])
        try:
            filters[label] = representations.first_filters(model)
        except NothingToShow:
            continue
        if representations.has_one_layer(model) and model.num_classes <= NAMED:
            names[label] = runs[0].class_names
    if not filters:
        raise NothingToShow(f"{', '.join(groups)}: no weights on the image; choose another model")
    save(draw_filters(filters, names), output / "inspect_filters.png")
    caption = (
        "Weights of the first layer, first seed, each filter scaled by its largest weight: grey is "
        "zero, brighter is positive, darker negative. Those of dense layers cover the whole image."
    )
    return Picture("inspect_filters.png", caption, wide=True, pixelated=True)


def picture_predictions(
    groups: Groups, output: Path, data_path: str, image_id: str, count: int
) -> Picture:
    """Writes inspect_predictions.png, of the first model and one image or several."""
    label, (run, *_) = next(iter(groups.items()))
    ids = run.test["ids"]
    rows = [find_image(run, image_id)] if image_id else evenly_spaced(len(ids), count)
    photos = load_test_images(run, data_path)[rows]
    save(draw_predictions(run, photos, rows), output / "inspect_predictions.png")
    caption = (
        f"Predictions of {label}, seed {run.seed}: the true class, right or wrong, and the "
        f"three most likely classes (blue: the true one). Files: {'; '.join(map(str, ids[rows]))}."
    )
    return Picture("inspect_predictions.png", caption, wide=True)


def picture_features(
    groups: Groups, output: Path, data_path: str, stage: int | None, image_id: str
) -> Picture:
    """Writes inspect_features.png, of the first model with maps; by default of the middle image."""
    for run, *_ in groups.values():
        model = load_classifier(run)
        default = representations.telling_stage(model, run.summary["image_size"])
        if default is not None:
            break
    else:
        raise NothingToShow(f"no stage of {', '.join(groups)} returns a feature map: choose a CNN")
    row = find_image(run, image_id) if image_id else len(run.test["ids"]) // 2
    image = load_test_images(run, data_path)[row]
    stage = default if stage is None else stage
    maps = representations.feature_maps(model, image, stage)
    title = f"{run.label}, stage {stage} (of 0 to {len(model.stages) - 1})"
    save(draw_feature_maps(maps, image, title), output / "inspect_features.png")
    caption = (
        f"Feature maps of {run.label}, seed {run.seed}, for {run.test['ids'][row]}: the output of "
        f"stage {stage} (counted from 0); the numbered channels have the highest mean activation."
    )
    return Picture("inspect_features.png", caption, wide=True, pixelated=True)


def add_part(
    section: Section,
    part: str,
    groups: Groups,
    output: Path,
    data_path: str,
    stage: int | None = None,
    image_id: str = "",
    count: int = PREDICTIONS,
) -> None:
    """Adds one of `PARTS` to a section; raises NothingToShow where the models have no such part."""
    match part:
        case "curves":
            runs = [run for group in groups.values() for run in group]
            section.text += [f"{run.name}: {diagnose(run).sentence}" for run in runs]
            return
        case "cka":
            picture = picture_similarity(section, groups, output, data_path)
        case "filters":
            picture = picture_filters(groups, output)
        case "features":
            picture = picture_features(groups, output, data_path, stage, image_id)
        case "predictions":
            picture = picture_predictions(groups, output, data_path, image_id, count)
    section.pictures.append(picture)


def inspect_section(groups: Groups, output: Path, data_path: str = "") -> Section:
    """Returns the chapter on what is inside the models, and writes its pictures."""
    section = Section("Looking inside")
    for part in ("cka", "predictions", "filters", "features"):
        try:
            add_part(section, part, groups, output, data_path)
        except NothingToShow as error:
            section.text.append(f"Not shown: {error}.")
            continue
        if part in FOLDED:
            section.details.append(Details(FOLDED[part], picture=section.pictures.pop()))
        else:
            section.finding = section.text[-1]
    section.finding = section.finding or "Nothing to compare between models."
    return section


def main(argv: list[str]) -> int:
    """Shows the parts asked for; without --what, those that the models have."""
    path = Path(arguments(argv, "analysis.inside RUN_OR_WORKDIR [--what=...]")[0]).expanduser()
    parts = [choose("--what", part, PARTS) for part in WHAT.value or PARTS]
    groups = group_runs(chosen_runs(path))
    output = output_folder(OUTPUT.value or path / "inspect")
    options = (DATA.value, STAGE.value, IMAGE.value, IMAGES.value)
    for part in parts:
        section = Section(part)
        try:
            add_part(section, part, groups, output, *options)
        except NothingToShow as error:
            if WHAT.value:
                raise
            section.text.append(f"left out: {error}")
        pictures = [f"{picture.caption}\n{output / picture.file}" for picture in section.pictures]
        print(f"{part}: " + "\n".join(section.text + pictures) + "\n")
    return 0


if __name__ == "__main__":
    WHAT = flags.DEFINE_list("what", None, f"Parts to show, of {', '.join(PARTS)}; default all")
    STAGE = flags.DEFINE_integer("stage", None, "Stage of the feature maps, from 0")
    IMAGE = flags.DEFINE_string("image", "", "Id of the test image for features and predictions")
    IMAGES = flags.DEFINE_integer("images", PREDICTIONS, "Number of predictions", lower_bound=1)
    DATA = flags.DEFINE_string("data", "", "Where the data lies now, if it moved")
    OUTPUT = flags.DEFINE_string("output", "", "Folder for the pictures; default: inspect/ inside")
    run_command(main)
