"""What did the models look at? Heat maps of the same images by every architecture, and their worth.

    python -m analysis.gradcam RUN_DIR [--method=gradcam] [--target=predicted|true|CLASS]
        [--stage=N] [--images=8 | --images=ID,ID] [--data=PATH] [--output=DIR]
    python -m analysis.gradcam WORKDIR [--method=...] [--images=8] [--data=PATH] [--output=DIR]

Of a run: photo, heat map and both for some test images, and the raw maps as .npz. Of a workdir: the
pictures of the report's chapter, in WORKDIR/gradcam. The methods, LIME and SHAP among them, are in
`analysis/explain/methods.py`.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from absl import flags

from analysis.compare import Comparison
from analysis.evaluate import confused_pairs, confusion_of
from analysis.explain import faithfulness, packages, worth
from analysis.explain.heatmaps import ExplainedRun, View, draw_views
from analysis.explain.methods import METHODS, SMALLEST_MAP
from analysis.explain.selection import by_disagreement, find_images, in_turn, sample_images
from analysis.page.figures import colours, plt, save, shortened
from analysis.page.section import Details, Picture, Section
from analysis.page.tables import percent
from analysis.runs import FinishedRun, Groups, chosen_runs, group_runs, load_run, same_images
from errors import UserError, choose
from experiment.command import arguments, output_folder, run_command
from models import MODELS

SCALE = "Each map has its own colour scale, so strengths cannot be compared between maps."


MODELS_SHOWN = 8  # the best ones: a grid of more is too large to read
SCORED, SCORED_BY_METHOD = 32, 16  # images of the table of models, and of that of methods
COMPARED = ("gradcam", "hirescam", "integrated", "occlusion", "lime", "shap")  # on one model


def heat_maps(comparison: Comparison) -> Section:
    """Returns the chapter of the report."""
    count = comparison.options.gradcam_images
    return gradcam_section(comparison.groups, comparison.output, count, comparison.data_path)


def gradcam_section(
    groups: Groups, output: Path, count: int, data_path: str = "", method: str = "gradcam"
) -> Section:
    """Returns what the first seed of each model looked at in `count` images, and its worth."""
    if count < 1:
        raise UserError(f"heat maps of {count} images: at least one is needed")
    title = METHODS[choose("method", method, METHODS)].title
    section = Section("What the models looked at", pictures_first=True)
    runs, left_out = _comparable(groups, METHODS[method].kind)
    rows, names, scores, about = [], [], {}, {}
    for label, run in runs.items():
        if len(scores) == MODELS_SHOWN:
            left_out[label] = f"behind the best {MODELS_SHOWN}"
            continue
        explained = ExplainedRun(run, method, data_path=data_path)
        if explained.only_pixels:
            left_out[label] = f"no feature map of at least {SMALLEST_MAP}×{SMALLEST_MAP}"
            continue
        name = [shortened(part, 18) for part in (run.model, run.variant) if part]
        if not rows:  # the best one
            votes = np.stack([run.predicted for run in runs.values()])
            chosen = by_disagreement(votes, explained.labels, count)
            sample = sample_images(explained.labels, SCORED)  # whose maps are scored
            first, rows = explained, [[explained.photo(row) for row in chosen]]
        names.append("\n".join([*name, title]))
        rows.append(explained.views(chosen, run.predicted[chosen]))
        if explained is first:
            best, others = label, _compared(first, method)
        photos, targets = explained.photos[sample], run.predicted[sample]
        scores[label] = faithfulness.score_maps(explained.model, explained.explain, photos, targets)
        about[label] = [percent(run.correct.mean()), explained.resolution]
    for why in dict.fromkeys(left_out.values()):
        labels = ", ".join(label for label, reason in left_out.items() if reason == why)
        section.text.append(f"Left out ({why}): {labels}.")
    if not rows:
        return section
    models, curves = f"{method}_models.png", f"{method}_faithfulness.svg"
    save(draw_views(rows, ["photo", *names]), output / models)
    save(faithfulness.draw_faithfulness(scores, title, colours(groups)), output / curves)
    captions = _captions(title, scores, len(sample))
    grid, chart = (Picture(*one, wide=True) for one in zip((models, curves), captions, strict=True))
    section.pictures = [grid]
    section.data = {label: faithfulness.summarise(values) for label, values in scores.items()}
    _add_methods(section, best, [first, *others], sample[:SCORED_BY_METHOD])
    if others:
        section.details.append(_draw_methods(best, [first, *others], chosen, output))
    section.details += best_pictures(best, first, output, method, count, chosen)
    table = faithfulness.score_table(scores, ["model", "test acc. %", "map"], about)
    section.details += [
        Details(f"Faithfulness of the {title} maps of each model", picture=chart, table=table),
        Details("How maps are scored", list(faithfulness.MEANING)),
        Details("Files shown", list(map(str, first.run.test["ids"][chosen]))),
    ]
    return section


def _captions(title: str, shown: Sequence[str], scored: int) -> tuple[str, str]:
    """Returns the captions of the grid and of the chart."""
    first = f"First the images on which {' and '.join(shown)} disagree most. " * (len(shown) == 2)
    if len(shown) > 2:
        first = "First the images on which the models disagree most. "
    return (
        f"{title} of the same test images for every model, with the predicted class and its "
        f"confidence (✓ right, ✗ wrong). {first}{SCALE}",
        "How the probability of the predicted class falls as pixels are blurred in the order of "
        f"the map (deletion), and rises as they return (insertion): means over {scored} test "
        "images, spread over the classes.",
    )


def _draw_methods(
    label: str, explained: list[ExplainedRun], chosen: Sequence[int], output: Path
) -> Details:
    """Draws the maps of one model by each method, on the images of the grid of models."""
    targets = explained[0].run.predicted[chosen]
    first, *others = (one.views(chosen, targets) for one in explained)
    names = [METHODS[one.method].title for one in explained]
    save(draw_views([first, *map(_untitled, others)], names), output / "heat_map_methods.png")
    caption = f"The same test images by each method. {SCALE}"
    picture = Picture("heat_map_methods.png", caption, wide=True)
    return Details(f"Maps of {label} by {len(names)} methods", picture=picture)


def _comparable(groups: Groups, kind: str) -> tuple[dict[str, FinishedRun], dict[str, str]]:
    """Returns the first run of every model that can be explained, and why others cannot be."""
    runs, left_out = {}, {}
    for label, (run, *_) in groups.items():
        if kind != "logits" and not MODELS[run.model].trained_by_gradient:
            left_out[label] = "not trained by gradient"
        elif runs and not same_images(run, next(iter(runs.values()))):
            left_out[label] = "tested on other images"
        else:
            runs[label] = run
    return runs, left_out


def _compared(explained: ExplainedRun, method: str) -> list[ExplainedRun]:
    """Returns the run explained by every other method that suits it and is installed."""
    others = []
    for name in COMPARED:
        entry = METHODS[name]
        suits = entry.kind == "logits" or explained.model.trained_by_gradient
        if name != method and suits and packages.installed(entry.package):
            others.append(explained.by(name))
    return [other for other in others if not other.only_pixels]


def _untitled(views: list[View]) -> list[View]:
    """Returns views without titles, where the row above has the same."""
    return [replace(view, title="") for view in views]


def _add_methods(
    section: Section, label: str, explained: list[ExplainedRun], sample: Sequence[int]
) -> None:
    """Adds what the methods are worth on one model and the same images: table, text, finding."""
    run, scores, about = explained[0].run, {}, {}
    for one in explained:
        title = METHODS[one.method].title
        photos, targets = one.photos[sample], run.predicted[sample]
        scores[title] = faithfulness.score_maps(one.model, one.explain, photos, targets)
        about[title] = [one.resolution]
    table = faithfulness.score_table(scores, [f"method on {label}", "map"], about)
    slow = [METHODS[name].title for name in ("lime", "shap") if METHODS[name].title in scores]
    section.finding, numbers = worth.sentences(label, scores, slow)
    section.text.append(numbers)
    if slow:
        section.text.append(
            f"{' and '.join(slow)} query the model {packages.EVALUATIONS} times per image and hide "
            "regions with the same blur that the gain is measured with, which favours them."
        )
    missing = {m.package: m.title for m in METHODS.values() if not packages.installed(m.package)}
    if missing:
        names = " and ".join(missing.values())
        section.text.append(f"{names} can be compared, too: {packages.INSTALL}")
    section.tables.append(table)
    section.data["methods"] = {name: faithfulness.summarise(s) for name, s in scores.items()}


def best_pictures(
    label: str,
    explained: ExplainedRun,
    output: Path,
    method: str,
    count: int,
    shown: Sequence[int] = (),
) -> list[Details]:
    """Draws right beside wrong predictions, and both classes of the most confused pairs.

    Images `shown` elsewhere are shown again only where there are no others.
    """
    correct = explained.run.correct
    if correct.all():
        return []
    confused_views, errors = _draw_confused(explained, shown)
    shown, rows = [*shown, *errors], []
    for side in (correct, ~correct):
        candidates = explained.surest(_new(np.flatnonzero(side), shown))
        chosen = in_turn(candidates, explained.labels, count)
        views = explained.views(chosen, explained.run.predicted[chosen])
        blank = [None] * (count - len(chosen))
        rows += [[*(explained.photo(row) for row in chosen), *blank], [*views, *blank]]
    right_wrong, confused = f"{method}_right_wrong.png", f"{method}_confused.png"
    save(draw_views(rows, ["right", "", "wrong", ""]), output / right_wrong)
    save(confused_views, output / confused)
    captions = (
        "The most confident prediction for each true class, with the map of the predicted class. "
        f"{SCALE}",
        "The most confident errors between the most confused classes. After each photo, maps of "
        f"the predicted class and of the true one. {SCALE}",
    )
    return [
        Details(title, picture=Picture(file, caption, wide=True))
        for title, file, caption in zip(
            (f"Right and wrong predictions of {label}", f"Most confused classes of {label}"),
            (right_wrong, confused),
            captions,
            strict=True,
        )
    ]


def _new(rows: np.ndarray, shown: Sequence[int]) -> np.ndarray:
    """Returns the rows that were not shown, all of them if there are none."""
    new = rows[~np.isin(rows, shown)]
    return new if len(new) else rows


def _draw_confused(explained: ExplainedRun, shown: Sequence[int]) -> tuple[plt.Figure, list[int]]:
    """Returns the picture of confused pairs, and the images in it."""
    drawn, labels, predicted = [], explained.labels, explained.run.predicted
    rows, names = [], []
    for pair in confused_pairs(confusion_of(explained.run)).head(3).itertuples():
        for true, taken in ((pair.first, pair.second), (pair.second, pair.first)):
            errors = np.flatnonzero((labels == true) & (predicted == taken))
            if not len(errors):
                continue
            chosen, views = explained.surest(_new(errors, shown))[:2], []
            drawn += chosen.tolist()
            both = [explained.views(chosen, np.full(len(chosen), c)) for c in (taken, true)]
            for row, *heats in zip(chosen, *both, strict=True):
                views += [explained.photo(row), *heats]
            rows.append(views + [None] * (6 - len(views)))
            number = "one image" if len(errors) == 1 else f"{len(errors)} images"
            names.append(f"{explained.name(true)}\nas {explained.name(taken)}\n({number})")
    return draw_views(rows, names), drawn


def explain_run(
    run: FinishedRun,
    output: Path,
    images: str = "8",
    method: str = "gradcam",
    target: str = "predicted",
    stage: int | None = None,
    data_path: str = "",
) -> tuple[Path, str]:
    """Writes photo, heat map and both of some test images, and their raw maps [n, S, S] as .npz.

    Returns the path of the picture, and what the maps are of.
    """
    choose("method", method, METHODS)
    rows, title = find_images(run, images), METHODS[method].title
    explained = ExplainedRun(run, method, stage, data_path)
    if target in ("predicted", "true"):
        targets = (run.predicted if target == "predicted" else run.test["labels"])[rows]
    else:
        choose("target", target, run.class_names)
        targets = np.full(len(rows), run.class_names.index(target))
    views = explained.views(rows, targets)
    cells = [
        [explained.photo(row), View(f"{title}\nof {explained.name(number)}", heat=view.heat), view]
        for row, number, view in zip(rows, targets, views, strict=True)
    ]
    grid = [sum(cells[i : i + 2], []) for i in range(0, len(cells), 2)]  # two images in a row
    grid[-1] += [None] * (len(grid[0]) - len(grid[-1]))
    save(draw_views(grid, [""] * len(grid)), output / f"{method}.png")
    maps, ids = np.stack([view.heat for view in views]), run.test["ids"][rows]
    np.savez_compressed(
        output / f"{method}.npz", maps=maps, ids=ids, targets=targets, stage=explained.stage
    )
    zero = sum(not heat.any() for heat in maps)
    about = f"{title} of {explained.resolution}; {zero} of {len(rows)} maps are zero"
    if explained.only_pixels:
        about += "\nthe map is the image itself: it weighs colours and shows no layer"
    return output / f"{method}.png", about


def main(argv: list[str]) -> int:
    """Explains a run, or compares the models of a workdir."""
    usage = "analysis.gradcam RUN_OR_WORKDIR [--method=gradcam] ..."
    path = Path(arguments(argv, usage)[0]).expanduser()
    if (path / "config.json").exists():
        output = output_folder(OUTPUT.value or path / "gradcam")
        options = (IMAGES.value, METHOD.value, TARGET.value, STAGE.value, DATA.value)
        print("{1}\n{0}".format(*explain_run(load_run(path), output, *options)))
        return 0
    if TARGET.value != "predicted" or STAGE.value is not None or not IMAGES.value.isdigit():
        raise UserError(
            f"{path} is not the directory of a run, which --target, --stage and --images=ID need: "
            f"give one, such as {path}/cnn/seed0"
        )
    groups = group_runs(chosen_runs(path))
    output = output_folder(OUTPUT.value or path / "gradcam")  # never among the report's own
    section = gradcam_section(groups, output, int(IMAGES.value), DATA.value, METHOD.value)
    drawn = [*section.pictures, *(item.picture for item in section.details if item.picture)]
    files = [str(output / picture.file) for picture in drawn]
    print("\n".join(filter(None, [section.finding, *section.text, *files])))
    return 0


if __name__ == "__main__":
    METHOD = flags.DEFINE_string("method", "gradcam", ", ".join(METHODS))
    TARGET = flags.DEFINE_string("target", "predicted", "predicted, true, or the name of a class")
    STAGE = flags.DEFINE_integer("stage", None, "Stage whose input is the map; see the summary")
    IMAGES = flags.DEFINE_string("images", "8", "How many, or ids of test images")
    DATA = flags.DEFINE_string("data", "", "Where the data lies now, if it was moved")
    OUTPUT = flags.DEFINE_string("output", None, "Folder of the pictures")
    run_command(main)
