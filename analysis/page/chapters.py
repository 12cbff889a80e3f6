"""The chapters of the report that need no model; None where there is nothing to say."""

import json
import shlex
from collections.abc import Callable

import pandas as pd

from analysis import compare, evaluate
from analysis.compare import Comparison
from analysis.diagnosis import diagnosis_table
from analysis.forward import load_test_images
from analysis.page import charts
from analysis.page.figures import draw_photos, save, shortened
from analysis.page.section import Details, Picture, Section, Table
from analysis.page.tables import percent, printed_pairs, printed_table
from analysis.runs import FinishedRun, read_plan
from errors import UserError

PHOTOS = 12  # of a picture of mistakes
LISTED = 200  # names in a folded list


def _as_table(frame: pd.DataFrame, caption: str = "") -> Table:
    return Table(list(frame), frame.astype(str).values.tolist(), caption)


def _chart(of: Comparison, draw: Callable, file: str, caption: str, wide: bool = True) -> Picture:
    figure = draw(of)
    figure.tight_layout()
    save(figure, of.output / file)
    return Picture(file, caption, wide)


def overview(comparison: Comparison) -> Section:
    """The table: every model with both intervals, and the runs behind each row."""
    table, options = comparison.table, comparison.options
    interval = "t-interval"
    text = [
        f"Measured on {table.test_images[0]} test images, with the weights that validation images "
        f"chose. The interval over seeds says where other seeds would move the mean ({interval}), "
        "that over images what these very networks would do on other photos of the same kind "
        "(Wilson's). F1 is the mean over classes, NLL the loss in nats, Brier from 0 to 2, ECE the "
        "calibration error of the top class in 15 bins; accuracies, F1 and ECE are in percent. "
        "Multiply-adds are those of matrix products and convolutions of one image forward. "
        "Seconds and images/s are means over seeds, without compilation, on "
        f"{', '.join(sorted(set(table.device)))}."
    ]
    if options.reference:
        source = options.reference_source or "the config's compare.reference"
        text.append(f"Published figures, for orientation ({source}); not measured here.")
    if table.near_leaks.any():
        text.append(
            f"{table.leaks.max()} test images have an exact copy in another part, "
            f"{table.near_leaks.max()} an exact or near one; “without” is the accuracy on the rest."
        )
    if "knn" in set(table.model):
        text.append("Nearest neighbours draw nothing at random: their seeds agree by construction.")
    lines = [
        f"{label}: " + ", ".join(f"{run.name} {percent(run.correct.mean())} %" for run in runs)
        for label, runs in comparison.groups.items()
    ]
    behind = Details("The runs behind each row, with their test accuracy", lines)
    return Section(text=text, tables=[_as_table(printed_table(table))], details=[behind])


def costs(comparison: Comparison) -> Section:
    """Accuracy against parameters, multiply-adds, training time and memory."""
    caption = "Filled: no other model is both cheaper and more accurate (the Pareto front). Bars: "
    caption += "95 % intervals over seeds, or over images where there is one seed."
    return Section(pictures=[_chart(comparison, charts.draw_pareto, "pareto.svg", caption)])


def curves(comparison: Comparison) -> Section:
    """Learning curves and what they say about over- and underfitting."""
    caption = "On validation images: thin lines are seeds, dashes are models fitted at once."
    picture = _chart(comparison, charts.draw_curves, "learning_curves.svg", caption)
    tables = [diagnosis_table(comparison.groups)]
    return Section(tables=tables, pictures=[picture], pictures_first=True)


def classes(comparison: Comparison) -> Section:
    """Per-class scores, confusion matrices, and the confused pairs with their photos."""
    best, runs = next(iter(comparison.groups.items()))
    scores = compare.class_scores(runs)
    shares = scores[["precision", "recall", "f1"]].map(percent).rename(columns={"f1": "F1"})
    counts = scores[["support", "predicted"]].map("{:.4g}".format)
    printed = pd.concat([shares, counts], axis=1).reset_index()
    confusion = "Test images (mean over seeds); colour and percent are shares of the true class."
    section = Section(
        tables=[_as_table(printed, f"{best}: percent and numbers of images, means over seeds.")],
        pictures=[
            _chart(comparison, charts.draw_class_scores, "classes.svg", "F1, mean over seeds."),
            _chart(comparison, charts.draw_confusion, "confusion.svg", confusion),
        ],
    )
    never = ", ".join(scores.index[scores.predicted == 0])
    if never:
        section.text.append(f"{best} never predicts {never}: its precision there is undefined.")
    confused = compare.confused_along(comparison.groups)
    if len(confused):
        caption = "The most confused pairs of classes by model, the least accurate first: test "
        caption += "images of one taken for the other, both ways, mean over seeds."
        section.tables.append(_as_table(confused.round(1), caption))
    try:
        section.pictures += _mistakes(best, runs[0], comparison)
    except UserError as error:
        section.text.append(f"No photos can be shown: {error}")
    return section


def _mistakes(label: str, run: FinishedRun, comparison: Comparison) -> list[Picture]:
    """Draws photos of a run's most confused pair of classes, and those of highest loss."""
    photos, losses = load_test_images(run, comparison.data_path), evaluate.highest_losses(run)
    wrong = losses[losses.true != losses.predicted]
    if wrong.empty:
        return []
    most = evaluate.confused_pairs(evaluate.confusion_of(run)).iloc[0]
    pair = [run.class_names[int(i)] for i in most[["first", "second"]]]
    between = wrong[wrong.true.isin(pair) & wrong.predicted.isin(pair)]
    about_pair = f"its most confused pair, {pair[0]} and {pair[1]}. True class → predicted class."
    about_loss = "the test images of highest loss. Wrong labels often stand here."

    def draw(file: str, rows: pd.DataFrame, about: str) -> Picture:
        rows = rows.head(PHOTOS)
        titles = [
            f"{shortened(r.true)} →\n{shortened(r.predicted)} {100 * r.confidence:.0f} %"
            for r in rows.itertuples()
        ]
        save(draw_photos(photos[rows.index], titles), comparison.output / file)
        files = "; ".join(map(str, rows.id))
        return Picture(file, f"{label}, seed {run.seed}: {about} Files: {files}.", wide=True)

    return [
        draw("confused_pair.png", between, about_pair),
        draw("highest_loss.png", wrong, about_loss),
    ]


def pairs_of_models(comparison: Comparison) -> Section:
    """Ranks, paired differences, agreement, and images that only one model gets right."""
    groups, pairs = comparison.groups, comparison.pairs
    caption = "Thick: 95 % interval over seeds; thin: over test images. A black bar at the right "
    caption += "ties models between which no difference is established."
    ranks = _chart(comparison, charts.draw_ranks, "ranks.svg", caption)
    section = Section(pictures=[ranks], pictures_first=True)
    if pairs.empty:
        return section
    alone, right = compare.only_one_right(groups), compare.majority_right(groups)
    every, none = right.all(axis=1).sum(), (~right).all(axis=1).sum()
    section.text = [
        "Differences are on the same test images, seed by seed, in percentage points. The interval "
        "over seeds and images takes both as drawn at random (two-way analysis of variance); p is "
        "its p-value. McNemar's exact test asks whether these trained networks differ, and nothing "
        "of other seeds; of several seeds it is twice the median p-value. “p Holm” corrects for "
        "the number of pairs, and decides at 0.05; with one seed it is McNemar's. Kappa is "
        "agreement beyond chance.",
        f"By the majority of its seeds, every model gets {every} of {len(right)} test images "
        f"right, and none gets {none}.",
    ]
    section.tables.append(_as_table(printed_pairs(pairs)))
    caption = "How often two models predict the same class, mean over seeds."
    agreement = _chart(comparison, charts.draw_agreement, "agreement.svg", caption, wide=False)
    section.pictures.append(agreement)
    if len(alone):
        counts = ", ".join(f"{label} {n}" for label, n in alone["model"].value_counts().items())
        lines = [f"{name} ({true}): {model}" for name, true, model in alone.head(LISTED).values]
        section.details = [Details(f"Test images that one model alone gets right: {counts}", lines)]
    return section


def transfer(comparison: Comparison) -> Section | None:
    """What was done with pretrained weights, and whether the pixels matched."""
    rows, warnings = [], []
    for label, runs in comparison.groups.items():
        summary = runs[0].summary
        if summary.get("weights", "none") == "none":
            continue
        phases = [
            f"{phase['name']} ({phase['train']}): {phase['epochs']:.3g} epochs"
            + ", on stored features" * phase["stored_features"]
            for phase in summary["phases"]
        ]
        problems = summary.get("preflight", {}).get("warnings", [])
        warnings += [f"{label}: its pixels do not match its weights. {text}" for text in problems]
        state = "DO NOT MATCH" if problems else "match" if "preflight" in summary else "not checked"
        rows.append([label, summary["weights"], "; ".join(phases), state])
    if not rows:
        return None
    text = "Pixels: what the first layers got of a batch before training, compared with what the "
    text += "weights saw in theirs. Each phase goes on from the best weights so far."
    table = Table(["model", "weights", "phases of the first seed", "pixels"], rows)
    return Section(text=[text], tables=[table], warnings=warnings)


def data(comparison: Comparison) -> Section | None:
    """What the audit found in the images, and what augmentation makes of them."""
    audit = comparison.audit
    if audit is None:
        return None
    counts = pd.DataFrame(audit["counts"], audit["class_names"]).rename_axis("class").reset_index()
    section = Section(tables=[_as_table(counts)])
    count = {key: len(value) for key, value in audit.items() if isinstance(value, list)}
    divided = len(audit.get("group_leaks", {}))
    if audit["leaks"] or audit["label_conflicts"] or divided:
        section.warnings.append(
            f"{count['leaks']} groups of identical images and {divided} groups of data.groups lie "
            f"in several parts, and {count['label_conflicts']} carry contradictory labels. "
            "--config.data.exclude_leaks leaves them out of training."
        )
    near = f"{count['near_duplicates']} groups, {count['near_leaks']} across parts"
    if not audit["near_duplicates_checked"]:
        near = "not looked for, too many images"
    section.text.append(
        f"Images: {audit['images']}; sizes: {audit['distinct_sizes']}; modes: "
        f"{', '.join(audit['modes'])}; values: {' to '.join(map(str, audit['value_range']))}; "
        f"unreadable files: {count['unreadable']}; files that are no image: {count['not_images']}; "
        f"exact duplicates: {count['exact_duplicates']} groups, {count['label_conflicts']} with "
        f"contradictory labels, {count['leaks']} across parts; near duplicates: {near}."
    )
    titles = {"leaks": "Leaks", "label_conflicts": "Contradictory labels"}
    titles |= {"unreadable": "Unreadable files", "near_leaks": "Near duplicates across parts"}
    for key, title in titles.items():
        if entries := audit[key]:
            lines = [e if isinstance(e, str) else " = ".join(e) for e in entries[:LISTED]]
            section.details.append(Details(f"{title} ({len(entries)})", lines))
    sheet = comparison.workdir.resolve() / "audit" / "contact_sheet.png"
    if sheet.exists():
        section.pictures.append(Picture(str(sheet), "Samples of every class."))
    for label, runs in comparison.groups.items():
        path = runs[0].path.resolve() / "augmented_batch.png"
        if path.exists():
            picture = Picture(str(path), f"Augmented images for {label}", pixelated=True)
            title = f"{label}: images of the first batch, augmented"
            section.details.append(Details(title, picture=picture))
    return section


def reproduce(comparison: Comparison) -> Section:
    """The command, versions, devices, seeds and every model's config."""
    workdir, runs = comparison.workdir, comparison.runs
    command = shlex.join(["python", *read_plan(workdir).get("command", ["main.py"])])
    about, dataset = runs[0].environment, runs[0].dataset
    commits = sorted({str(run.environment["git_commit"]) for run in runs})
    dirty = any(run.environment["git_dirty"] for run in runs)
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    text = [
        f"Command: {command}",
        f"Commit {', '.join(commits)}{', with uncommitted changes' * dirty}; Python "
        f"{about['python']}; {packages}; devices: {', '.join(about['devices'])} "
        f"({about['device_kind']}).",
        f"Images' fingerprint {dataset['fingerprint'][:16]}, split seed {dataset['split_seed']}; "
        f"seeds {', '.join(map(str, sorted({run.seed for run in runs})))}.",
        "The command again skips finished runs; --dry_run prints every config. Every figure here "
        f"comes from the run directories alone: python -m analysis.report {workdir.name}.",
    ]
    section = Section(text=text)
    for label, (run, *_) in comparison.groups.items():
        config = json.dumps(run.config, indent=2, ensure_ascii=False)
        section.details.append(Details(f"Config of {label}, seed {run.seed}", code=config))
    return section
