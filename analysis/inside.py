"""What is inside a trained model: its first filters, feature maps, predictions, representations.

    python -m analysis.inspect RUN_OR_WORKDIR [--what=filters,features,predictions,curves,cka]
        [--stage=N] [--image=ID] [--images=12] [--select=spread|worst|random] [--seed=0]
        [--data=PATH] [--output=DIR]

Of a workdir, filters, curves and cka speak of every model, predictions of the best one, features of
the best one that has feature maps.
"""

import difflib
from pathlib import Path

import numpy as np
from absl import flags

from analysis.diagnosis import diagnose
from analysis.evaluate import losses, softmax
from analysis.explain.representations import (
    MAX_FILTERS,
    NothingToShow,
    Similarity,
    compare_representations,
    describe,
    draw_similarity,
    feature_maps,
    first_filters,
    has_one_layer,
    strongest,
    telling_stage,
)
from analysis.forward import load_classifier, load_test_images
from analysis.page.figures import literal, plt, save, shortened
from analysis.page.section import Picture, Section
from analysis.runs import FinishedRun, Groups, chosen_runs, group_runs
from errors import UserError, choose
from experiment.command import run_command
from experiment.files import plain
from models import Classifier

PARTS = ("filters", "features", "predictions", "curves", "cka")
SELECTIONS = ("spread", "worst", "random")
CHANNELS = 16  # of feature maps
NAMED = 12  # classes whose templates bear their names, at most
RIGHT, WRONG, OTHER = "#0072B2", "#D55E00", "#999999"  # told apart by colour-blind readers too


# --- drawing --------------------------------------------------------------------------------------


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
    """A mosaic a model; filters that stand for a class bear its name.

    Args:
      filters: [N, h, w, 3] by label of the model; of more than 64, the strongest are shown.
      names: of the filters, for models whose filters have names.
    """
    columns = {label: min(len(x), 6 if label in names else 16) for label, x in filters.items()}
    rows = {label: -(-min(len(x), MAX_FILTERS) // columns[label]) for label, x in filters.items()}
    heights = [8 * rows[label] / columns[label] + 0.4 for label in filters]
    figure, axes = plt.subplots(
        len(filters), 1, figsize=(8, sum(heights)), squeeze=False, height_ratios=heights
    )
    for axis, (label, weights) in zip(axes.flat, filters.items(), strict=True):
        shown, side = strongest(weights), weights.shape[1]
        gap = max(1, side // 16)
        axis.imshow(mosaic(as_colours(shown), columns[label], gap), interpolation="nearest")
        axis.axis("off")
        what = "class templates" if label in names else "filters"
        title = f"{literal(label)}: {len(shown)} {what} of {side}×{side} pixels"
        title += f", the strongest of {len(weights)}" * (len(shown) < len(weights))
        axis.set_title(title, loc="left", fontsize=10)
        box = {"color": "white", "alpha": 0.75, "pad": 1, "linewidth": 0}
        for i, name in enumerate(names.get(label, [])):
            place = np.array([i % columns[label], i // columns[label]]) * (side + gap) + 0.03 * side
            axis.text(*place, literal(shortened(name)), fontsize=8, va="top", bbox=box)
    figure.tight_layout()
    return figure


def draw_feature_maps(maps: np.ndarray, image: np.ndarray, title: str) -> plt.Figure:
    """The image, and beside it the 16 channels of the highest mean activation on one colour scale.

    Args:
      maps: [h, w, C].
      image: uint8 [S, S, 3].
      title: says what is seen; the number of channels and the size of the maps is added.
    """
    chosen = np.argsort(-maps.mean(axis=(0, 1)), kind="stable")[:CHANNELS]
    columns = min(8, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = plt.figure(figsize=(2.8 + 1.15 * columns, max(3.0, 1.35 * rows)), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2, 1.15 * columns + 0.8))
    axis = left.subplots()
    axis.imshow(image, interpolation="nearest")
    axis.set_title("image", fontsize=9)
    axis.axis("off")
    grid = right.subplots(rows, columns, squeeze=False)
    low, high = min(0.0, float(maps[..., chosen].min())), float(maps[..., chosen].max())
    for axis in grid.flat:
        axis.axis("off")
    for axis, channel in zip(grid.flat, chosen, strict=False):
        one = maps[..., channel]
        shown = axis.imshow(one, vmin=low, vmax=max(high, low + 1e-9), interpolation="nearest")
        axis.set_title(f"{channel}" + ": all zero" * (not one.any()), fontsize=8, pad=2)
    right.colorbar(shown, ax=grid, shrink=0.9, label="activation")
    height, width, channels = maps.shape
    size = f"{len(chosen)} of {channels} channels, maps of {height}×{width}"
    figure.suptitle(f"{literal(title)}: {size}", fontsize=10)
    return figure


def select_images(run: FinishedRun, select: str, count: int, seed: int = 0) -> np.ndarray:
    """Returns row numbers of test images [n], n = min(count, N).

    Args:
      run: a complete run.
      select: `spread`, evenly over the test images; `worst`, the highest loss first; `random`.
      count: how many, at least 1.
      seed: of the random choice.

    Raises:
      UserError: another `select`, or a count below 1.
    """
    choose("--select", select, SELECTIONS)
    labels, logits = run.test["labels"], run.test["logits"]
    if count < 1:
        raise UserError(f"--images={count}: show at least 1 image")
    count = min(count, len(labels))
    if select == "spread":
        return np.linspace(0, len(labels) - 1, count).round().astype(int)
    if select == "random":
        return np.random.default_rng(seed).permutation(len(labels))[:count]
    return np.argsort(-losses(labels, logits), kind="stable")[:count]


def find_image(run: FinishedRun, image_id: str) -> int:
    """Returns the row of a test image.

    Raises:
      UserError: there is no such id; names the nearest one.
    """
    ids = run.test["ids"].tolist()
    if image_id in ids:
        return ids.index(image_id)
    near = difflib.get_close_matches(image_id, ids, n=1, cutoff=0) or ids[:1]
    raise UserError(f"--image={image_id}: no such test image; the nearest id is {near[0]!r}")


def draw_predictions(run: FinishedRun, images: np.ndarray, rows: np.ndarray) -> plt.Figure:
    """A photo with its true class, right or wrong, and bars of the three likeliest classes.

    Args:
      run: a complete run.
      images: uint8 [n, S, S, 3], those of `rows`.
      rows: int [n], numbers of test images.
    """
    labels, probabilities = run.test["labels"][rows], softmax(run.test["logits"][rows])
    names = [literal(shortened(name)) for name in run.class_names]
    columns = min(6, len(rows))
    lines = -(-len(rows) // columns)
    figure, axes = plt.subplots(
        2 * lines,
        columns,
        figsize=(1.75 * columns, 2.65 * lines),
        squeeze=False,
        height_ratios=(1.6, 0.7) * lines,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.axis("off")
    for i, (image, label, row) in enumerate(zip(images, labels, probabilities, strict=True)):
        photo, bars = axes[2 * (i // columns) : 2 * (i // columns) + 2, i % columns]
        top = np.argsort(-row, kind="stable")[:3]
        right = top[0] == label
        photo.imshow(image, interpolation="nearest")
        word, colour = ("right", RIGHT) if right else ("wrong", WRONG)
        photo.set_title(f"{names[label]}: {word}", fontsize=8, color=colour, pad=2)
        bars.barh(range(len(top)), np.ones(len(top)), color="#eeeeee")
        shades = [RIGHT if k == label else OTHER for k in top]
        shades[0] = colour
        bars.barh(range(len(top)), row[top], color=shades, alpha=0.45)
        for j, k in enumerate(top):
            bars.text(0.02, j, f"{100 * row[k]:.0f} % {names[k]}", fontsize=8, va="center")
        bars.set(xlim=(0, 1), ylim=(2.5, -0.5))
    return figure


# --- pictures into a folder -----------------------------------------------------------------------


def picture_similarity(groups: Groups, output: Path, data_path: str) -> tuple[Similarity, Picture]:
    """Writes inspect_cka.svg; returns the numbers too.

    Raises:
      NothingToShow: there are no two representations to compare.
    """
    similarity = compare_representations(groups, data_path)
    if np.isnan(similarity.matrix).all():
        raise NothingToShow("representations need two models, or two seeds of one, to be compared")
    save(draw_similarity(similarity), output / "inspect_cka.svg")
    caption = (
        f"How alike the last features are on {similarity.images} test images: linear CKA, debiased "
        "(1: the same but for rotation and scale; 0: unrelated). First seed of every model; on the "
        "diagonal two seeds of one model, “–” where there is but one. Features are averaged over "
        "places; “pixels” stands for models that have no features before their classifier."
    )
    return similarity, Picture("inspect_cka.svg", caption)


def picture_filters(groups: Groups, output: Path) -> Picture:
    """Writes inspect_filters.png, of the first seed of every model with weights on the image.

    Raises:
      NothingToShow: no model has any.
    """
    filters, names = {}, {}
    for label, runs in groups.items():
        model = load_classifier(runs[0])
        try:
            filters[label] = first_filters(model)
        except NothingToShow:
            continue
        if has_one_layer(model) and model.num_classes <= NAMED:
            names[label] = runs[0].class_names
    if not filters:
        raise NothingToShow(f"{', '.join(groups)}: no weights on the image; choose another model")
    save(draw_filters(filters, names), output / "inspect_filters.png")
    caption = (
        "Weights of the first layer, first seed, as colour images. Each is scaled by its own "
        "largest weight: grey is zero, brighter is positive, darker negative. Filters of dense "
        "layers are as large as the image."
    )
    return Picture("inspect_filters.png", caption, wide=True, pixelated=True)


def picture_predictions(
    label: str, run: FinishedRun, rows: np.ndarray, output: Path, data_path: str
) -> Picture:
    """Writes inspect_predictions.png, of some rows of the test images."""
    photos = load_test_images(run, data_path)[rows]
    save(draw_predictions(run, photos, rows), output / "inspect_predictions.png")
    caption = (
        f"Predictions of {label}, seed {run.seed}: true class, right or wrong, and the three "
        "likeliest classes; blue is the true one. Files: "
        f"{'; '.join(map(str, run.test['ids'][rows]))}."
    )
    return Picture("inspect_predictions.png", caption, wide=True)


def _first_with_maps(groups: Groups) -> tuple[str, FinishedRun, Classifier, int]:
    for label, runs in groups.items():
        model = load_classifier(runs[0])
        stage = telling_stage(model, runs[0].summary["image_size"])
        if stage is not None:
            return label, runs[0], model, stage
    raise NothingToShow(f"no stage of {', '.join(groups)} hands on a feature map: choose a CNN")


def picture_features(
    groups: Groups, output: Path, data_path: str, stage: int | None = None, image_id: str = ""
) -> Picture:
    """Writes inspect_features.png, of the first model that has feature maps.

    Args:
      groups: the best first.
      output: the folder.
      data_path: where the data lies now, "" for where the run found it.
      stage: None for one that shows objects rather than edges.
      image_id: of a test image, "" for the middle one.

    Raises:
      UserError: there is no such image, or the stage hands on no map.
      NothingToShow: no model has maps.
    """
    label, run, model, default = _first_with_maps(groups)
    row = find_image(run, image_id) if image_id else len(run.test["ids"]) // 2
    image = load_test_images(run, data_path)[row]
    stage = default if stage is None else stage
    maps = feature_maps(model, image, stage)
    title = f"{label}, stage {stage} (of 0 to {len(model.stages) - 1})"
    save(draw_feature_maps(maps, image, title), output / "inspect_features.png")
    caption = (
        f"Feature maps of {label}, seed {run.seed}, for {run.test['ids'][row]}: what stage {stage} "
        "(counted from 0) hands on; the channels of the highest mean activation, by number."
    )
    return Picture("inspect_features.png", caption, wide=True, pixelated=True)


# --- the report and the command -------------------------------------------------------------------


def inspect_section(groups: Groups, output: Path, data_path: str = "") -> Section:
    """Returns the chapter on what is inside the models, and writes its pictures.

    Args:
      groups: complete runs by label, the best first.
      output: the report's folder.
      data_path: where the data lies now, "" for where the runs found it.

    Raises:
      UserError: the images are gone, or no longer those of the runs.
    """
    section = Section("Looking inside")
    best, runs = next(iter(groups.items()))
    rows = select_images(runs[0], "spread", 12)
    section.pictures.append(picture_predictions(best, runs[0], rows, output, data_path))
    try:
        similarity, picture = picture_similarity(groups, output, data_path)
        section.pictures.insert(0, picture)
        section.text.append(describe(similarity))
        matrix = plain(similarity.matrix.tolist())
        section.data["cka"] = {"labels": similarity.labels, "matrix": matrix}
    except NothingToShow as error:
        section.text.append(f"Not shown: {error}.")
    for make in (
        lambda: picture_filters(groups, output),
        lambda: picture_features(groups, output, data_path),
    ):
        try:
            section.pictures.append(make())
        except NothingToShow as error:
            section.text.append(f"Not shown: {error}.")
    return section


def show(part: str, groups: Groups, output: Path) -> str:
    """Makes one part as the command line asks; returns what to print."""
    if part == "curves":
        runs = [run for group in groups.values() for run in group]
        return "\n".join(f"{run.name}: {diagnose(run).sentence}" for run in runs)
    if part == "cka":
        similarity, picture = picture_similarity(groups, output, DATA.value)
        return f"{describe(similarity)}\n{output / picture.file}"
    if part == "filters":
        return str(output / picture_filters(groups, output).file)
    if part == "features":
        picture = picture_features(groups, output, DATA.value, STAGE.value, IMAGE.value)
        return f"{picture.caption}\n{output / picture.file}"
    best, runs = next(iter(groups.items()))
    rows = select_images(runs[0], SELECT.value, IMAGES.value, SEED.value)
    if IMAGE.value:
        rows = np.array([find_image(runs[0], IMAGE.value)])
    picture = picture_predictions(best, runs[0], rows, output, DATA.value)
    return f"{picture.caption}\n{output / picture.file}"


def main(argv: list[str]) -> int:
    """Shows the parts asked for; without --what, those that the models have."""
    if len(argv) != 2:
        raise UserError("usage: python -m analysis.inspect RUN_OR_WORKDIR [--what=...]")
    parts = [choose("--what", part, PARTS) for part in WHAT.value or PARTS]
    path = Path(argv[1]).expanduser()
    groups = group_runs(chosen_runs(path))
    output = Path(OUTPUT.value).expanduser() if OUTPUT.value else path / "inspect"
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write --output={output}: {error.strerror}") from error
    for part in parts:
        try:
            print(f"{part}: {show(part, groups, output)}\n")
        except NothingToShow as error:
            if WHAT.value:
                raise
            print(f"{part}: left out: {error}\n")
    return 0


if __name__ == "__main__":
    WHAT = flags.DEFINE_list("what", None, f"Parts to show, of {', '.join(PARTS)}; default all")
    STAGE = flags.DEFINE_integer("stage", None, "Stage of the feature maps, from 0")
    IMAGE = flags.DEFINE_string("image", "", "Id of the test image for features and predictions")
    IMAGES = flags.DEFINE_integer("images", 12, "Number of predictions")
    SELECT = flags.DEFINE_string("select", "spread", f"Predictions: {' | '.join(SELECTIONS)}")
    SEED = flags.DEFINE_integer("seed", 0, "Of --select=random")
    DATA = flags.DEFINE_string("data", "", "Where the data lies now, if it moved")
    OUTPUT = flags.DEFINE_string("output", "", "Folder for the pictures; default: inspect/ inside")
    run_command(main)
