"""What did the models look at? Heat maps of the same images by every architecture, and their worth.

    python -m analysis.gradcam RUN_DIR [--method=gradcam] [--target=predicted|true|CLASS]
                                       [--stage=N] [--images=8 | --images=ID,ID] [--data=PATH]
                                       [--output=DIR]
    python -m analysis.gradcam WORKDIR [--method=...] [--images=8] [--data=PATH] [--output=DIR]

Of a run: photo, heat map and both for some of its test images, and the raw maps as .npz. Of a
workdir: the pictures and tables of the report. Methods: see `analysis/explain/methods.py`.
"""

import difflib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from analysis.evaluate import confused_pairs, confusion
from analysis.explain import faithfulness
from analysis.explain.heatmaps import Lens, View, draw_views
from analysis.explain.methods import METHODS, SMALLEST_MAP
from analysis.page.figures import colours, save, shortened
from analysis.page.section import Picture, Section
from analysis.runs import FinishedRun, Groups, group_runs, load_run, load_runs
from errors import UserError, choose
from experiment.command import run_command
from models import MODELS

MEASURED = 32  # test images of the faithfulness tables
PAIRS = 3  # of confused classes that are shown, with
EXAMPLES = 2  # images of each direction
SCALE = "Colour is the share of each map's own maximum; strengths of maps cannot be compared."


# --- which images ---------------------------------------------------------------------------------


def in_turn(
    rows: Sequence[int], labels: np.ndarray, count: int, taken: Sequence[int] = ()
) -> list[int]:
    """Returns up to `count` of the rows: the first of each class, then the second, and so on.

    Args:
      rows: the most wanted first.
      labels: int [N], the class of every image.
      count: of rows.
      taken: rows chosen before, whose classes wait for the others.
    """
    seen, turns = Counter(labels[list(taken)].tolist()), []
    for row in rows:
        turns.append(seen[int(labels[row])])
        seen[int(labels[row])] += 1
    return [int(rows[i]) for i in np.argsort(turns, kind="stable")[:count]]


def choose_images(votes: np.ndarray, labels: np.ndarray, count: int, seed: int = 0) -> list[int]:
    """Returns rows of images: half where models disagree most, the rest where all of them agree.

    Args:
      votes: int [M, N], the class that each model predicts.
      labels: int [N], the true ones, over which both halves are spread.
      count: of images; fewer are returned where models agree on fewer.
      seed: of the order of images on which models disagree alike.
    """
    classes = np.arange(max(votes.max(), labels.max()) + 1)
    majority = (votes == classes[:, None, None]).sum(axis=1).max(axis=0)  # [N]
    dissent = len(votes) - majority
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(-dissent[order], kind="stable")]
    disputed = in_turn(order[dissent[order] > 0], labels, count // 2)
    rest = in_turn(order[dissent[order] == 0], labels, count - len(disputed), disputed)
    return disputed + rest


# --- the report -----------------------------------------------------------------------------------


def gradcam_section(
    groups: Groups, output: Path, count: int, data_path: str = "", method: str = "gradcam"
) -> Section:
    """Returns what the models looked at, the first seed of each, and how far to trust that.

    Args:
      groups: complete runs by label, the most accurate first.
      output: folder of the pictures.
      count: of images a row.
      data_path: where the data lies now, "" for where the runs found it.
      method: a key of `saliency.METHODS`.

    Raises:
      UserError: an unknown method, no image, or the data is not that of the runs.
    """
    if count < 1:
        raise UserError(f"heat maps of {count} images: at least one is needed")
    title = METHODS[choose("method", method, METHODS)].title
    words = [f"Heat maps by {title}."]
    section = Section("What the models looked at", words, pictures_first=True)
    runs, left_out = _comparable(groups, METHODS[method].kind)
    rows, names, measured, accuracies, maps = [], [], {}, [], []
    for label, run in runs.items():
        lens = Lens(run, method, data_path=data_path)
        if lens.only_pixels:
            left_out[label] = f"none of its stages hands on {SMALLEST_MAP}x{SMALLEST_MAP} places"
            continue
        if not rows:  # the most accurate one
            votes = np.stack([run.predicted for run in runs.values()])
            chosen = choose_images(votes, lens.labels, count)
            order = np.random.default_rng(0).permutation(len(lens.labels))
            sample = in_turn(order, lens.labels, MEASURED)
            rows, names = [[lens.photo(row) for row in chosen]], ["photo"]
            section.pictures = best_pictures(label, lens, output, method, count)
        rows.append(lens.views(chosen, lens.predicted[chosen]))
        names.append("\n".join(shortened(part, 18) for part in (run.model, run.variant) if part))
        photos, targets = lens.photos[sample], lens.predicted[sample]
        measured[label] = faithfulness.measure(lens.model, lens.explain, photos, targets)
        accuracies.append(float((lens.predicted == lens.labels).mean()))
        maps.append(lens.map_name)
    section.text += [f"{label} is left out: {why}." for label, why in left_out.items()]
    if not rows:
        return section
    files = "; ".join(str(run.test["ids"][row]) for row in chosen)
    section.pictures.insert(0, _models_picture(rows, names, list(runs), files, output, method))
    section.pictures.append(_faithfulness_picture(measured, groups, output, method, len(sample)))
    summaries = [faithfulness.summarise(values) for values in measured.values()]
    section.text += [
        faithfulness.answer(accuracies, summaries),
        faithfulness.against_centre(summaries),
    ]
    section.tables = faithfulness.tables(measured, accuracies, maps, title)
    section.data = dict(zip(measured, summaries, strict=True))
    return section


def _models_picture(
    rows: list, names: list[str], labels: list[str], files: str, output: Path, method: str
) -> Picture:
    file = f"{method}_models.png"
    save(draw_views(rows, names), output / file)
    caption = (
        "The same test images through every model, each with the class it predicts and its "
        f"confidence; ✓ right, ✗ wrong. First those on which {', '.join(labels)} disagree most, "
        "then as many on which all of them agree; both are spread over the true classes, and ties "
        f"are drawn with a fixed seed. {SCALE} Files: {files}."
    )
    return Picture(file, caption, wide=True)


def _faithfulness_picture(
    measured: dict, groups: Groups, output: Path, method: str, count: int
) -> Picture:
    file, title = f"{method}_faithfulness.svg", METHODS[method].title
    save(faithfulness.draw_faithfulness(measured, title, colours(groups)), output / file)
    caption = (
        "How fast the probability of the predicted class falls while pixels are blurred in the "
        f"order of the map, and rises while they return: mean over {count} test images, spread "
        "over the classes. Dotted: in random order."
    )
    return Picture(file, caption, wide=True)


def _comparable(groups: Groups, kind: str) -> tuple[dict[str, FinishedRun], dict[str, str]]:
    """Returns the first run of every model that can be explained, and why others cannot be."""
    runs, left_out = {}, {}
    for label, (run, *_) in groups.items():
        first = next(iter(runs.values()), run)
        if kind != "answers" and not MODELS[run.model].trained_by_gradient:
            left_out[label] = "it is not trained by gradient and has no layers to look into"
        elif not np.array_equal(run.test["ids"], first.test["ids"]):
            left_out[label] = "it was tested on other images"
        else:
            runs[label] = run
    return runs, left_out


def best_pictures(label: str, lens: Lens, output: Path, method: str, count: int) -> list[Picture]:
    """Draws right beside wrong predictions, and both classes of the most confused pairs.

    Args:
      label: of the model, as a reader sees it.
      lens: of its run.
      output: folder of the pictures.
      method: begins their names.
      count: of images a row.
    """
    right = lens.predicted == lens.labels
    if right.all():
        return []
    rows, names = [], []
    for name, found in (("right", right), ("wrong", ~right)):
        chosen = in_turn(lens.surest(np.flatnonzero(found)), lens.labels, count)
        views = lens.views(chosen, lens.predicted[chosen])
        blank = [None] * (count - len(chosen))
        rows += [[*(lens.photo(row) for row in chosen), *blank], [*views, *blank]]
        names += [name, ""]
    save(draw_views(rows, names), output / f"{method}_right_wrong.png")
    pictures = [
        Picture(
            f"{method}_right_wrong.png",
            f"{label}, the most accurate model with maps: test images that it predicts rightly and "
            "wrongly, the most confident of each true class. Maps are of the predicted class. "
            f"{SCALE}",
            wide=True,
        )
    ]
    save(_draw_confused(lens), output / f"{method}_confused.png")
    caption = (
        f"{label}: its most confused pairs of classes, in both directions, with the most confident "
        "errors. Each photo is followed by the map for the predicted class and the map for the "
        f"true one. {SCALE}"
    )
    return [*pictures, Picture(f"{method}_confused.png", caption, wide=True)]


def _draw_confused(lens: Lens):
    counts = confusion(lens.labels, lens.predicted, len(lens.run.class_names))
    rows, names = [], []
    for pair in confused_pairs(counts).head(PAIRS).itertuples():
        for true, taken in ((pair.first, pair.second), (pair.second, pair.first)):
            found = np.flatnonzero((lens.labels == true) & (lens.predicted == taken))
            if not len(found):
                continue
            chosen, views = lens.surest(found)[:EXAMPLES], []
            both = [lens.views(chosen, np.full(len(chosen), c)) for c in (taken, true)]
            for row, *heats in zip(chosen, *both, strict=True):
                views += [lens.photo(row), *heats]
            rows.append(views + [None] * (3 * EXAMPLES - len(views)))
            words = [lens.name(true), f"as {lens.name(taken)}", f"({len(found)} images)"]
            names.append("\n".join(words))
    return draw_views(rows, names)


# --- the command ----------------------------------------------------------------------------------


def choose_targets(lens: Lens, rows: Sequence[int], target: str) -> np.ndarray:
    """Returns int [n], the class to explain of each row.

    Args:
      lens: of a run.
      rows: of its test images.
      target: "predicted", "true", or the name of a class.

    Raises:
      UserError: there is no such class.
    """
    if target in ("predicted", "true"):
        return (lens.predicted if target == "predicted" else lens.labels)[rows]
    names = lens.run.class_names
    return np.full(len(rows), names.index(choose("target", target, names)))


def find_rows(run: FinishedRun, images: str) -> list[int]:
    """Returns the rows of test images.

    Args:
      run: a complete run.
      images: how many, which are then spread over the classes, or ids separated by commas.

    Raises:
      UserError: an unknown id, or no image at all.
    """
    labels, ids = run.test["labels"], [str(name) for name in run.test["ids"]]
    if images.isdigit():
        rows = in_turn(np.random.default_rng(0).permutation(len(labels)), labels, int(images))
        if not rows:
            raise UserError("--images=0: at least one image is needed")
        return rows
    places, rows = {name: row for row, name in enumerate(ids)}, []
    for name in filter(None, (part.strip() for part in images.split(","))):
        if name not in places:
            near = difflib.get_close_matches(name, ids, n=1)
            hint = f" Did you mean {near[0]}?" if near else f" They are of the form {ids[0]}."
            raise UserError(f"--images: {run.path} was not tested on an image {name!r}.{hint}")
        rows.append(places[name])
    if not rows:
        raise UserError(f"--images={images}: give a number, or ids separated by commas")
    return rows


def explain_run(
    run: FinishedRun,
    output: Path,
    images: str = "8",
    method: str = "gradcam",
    target: str = "predicted",
    stage: int | None = None,
    data_path: str = "",
) -> tuple[Path, str]:
    """Writes photo, heat map and both of some test images, and the raw maps.

    Args:
      run: a complete run.
      output: folder of <method>.png and <method>.npz (maps [n, S, S], ids, targets, stage).
      images: see `find_rows`.
      method: a key of `saliency.METHODS`.
      target: see `choose_targets`.
      stage: see `saliency.explain`.
      data_path: where the data lies now, "" for where the run found it.

    Returns:
      The picture, and what the maps are of.

    Raises:
      UserError: a mistake in an argument, or the data is not that of the run.
    """
    choose("method", method, METHODS)
    rows = find_rows(run, images)
    lens = Lens(run, method, stage, data_path)
    targets = choose_targets(lens, rows, target)
    views = lens.views(rows, targets)
    title = METHODS[method].title
    cells = [
        [lens.photo(row), View(f"{title}\nof {lens.name(number)}", heat=view.heat), view]
        for row, number, view in zip(rows, targets, views, strict=True)
    ]
    half = -(-len(cells) // 2)  # two images a row
    grid = [sum(cells[2 * i : 2 * i + 2], []) for i in range(half)]
    grid[-1] += [None] * (len(grid[0]) - len(grid[-1]))
    save(draw_views(grid, [""] * half), output / f"{method}.png")
    np.savez_compressed(
        output / f"{method}.npz",
        maps=np.stack([view.heat for view in views]),
        ids=np.array([str(run.test["ids"][row]) for row in rows]),
        targets=targets,
        stage=lens.stage,
    )
    zero = sum(not view.heat.any() for view in views)
    about = f"{title} of {lens.map_name}; {zero} of {len(rows)} maps are zero"
    if lens.only_pixels:
        about += "\nthe map is the image itself: it weighs colours and tells of no layer"
    return output / f"{method}.png", about


def _folder(path: Path | str) -> Path:
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --output={folder}: {error.strerror}") from error
    return folder


def main(argv: list[str]) -> int:
    """Explains a run, or compares the models of a workdir; returns the exit code."""
    if len(argv) != 2:
        raise UserError("usage: python -m analysis.gradcam RUN_OR_WORKDIR [--method=gradcam] ...")
    path = Path(argv[1]).expanduser()
    if (path / "config.json").exists():
        output = _folder(OUTPUT.value or path / "gradcam")
        options = (IMAGES.value, METHOD.value, TARGET.value, STAGE.value, DATA.value)
        print("{1}\n{0}".format(*explain_run(load_run(path), output, *options)))
        return 0
    if TARGET.value != "predicted" or STAGE.value is not None or not IMAGES.value.isdigit():
        raise UserError(
            f"{path} is not the directory of a run, which --target, --stage and --images=ID need: "
            f"give one, such as {path}/cnn/seed0"
        )
    groups = group_runs(load_runs(path))
    if not groups:
        raise UserError(f"{path} holds no complete run: expected {path}/<model>/seed<k>")
    output = _folder(OUTPUT.value or path / "report")
    section = gradcam_section(groups, output, int(IMAGES.value), DATA.value, METHOD.value)
    print("\n".join([*section.text, *(str(output / p.file) for p in section.pictures)]))
    return 0


if __name__ == "__main__":
    METHOD = flags.DEFINE_string("method", "gradcam", ", ".join(METHODS))
    TARGET = flags.DEFINE_string("target", "predicted", "predicted, true, or the name of a class")
    STAGE = flags.DEFINE_integer("stage", None, "Stage whose input is the map; see the summary")
    IMAGES = flags.DEFINE_string("images", "8", "How many, or ids of test images")
    DATA = flags.DEFINE_string("data", "", "Where the data lies now, if it was moved")
    OUTPUT = flags.DEFINE_string("output", None, "Folder of the pictures")
    run_command(main)
