"""The chapters of the report that need no model: from saved predictions, metrics and the audit."""

import json
import os
import shlex
from pathlib import Path

import pandas as pd
from ml_collections import ConfigDict

from analysis import compare, evaluate
from analysis.diagnosis import diagnosis_table
from analysis.forward import load_test_images
from analysis.page import charts
from analysis.page.figures import draw_photos, save, shortened
from analysis.page.section import Details, Picture, Section, Table
from analysis.page.tables import decimal, percent, printed_pairs, printed_table
from analysis.runs import FinishedRun, Groups, read_plan
from errors import UserError

PHOTOS = 6  # in a row
LISTED = 200  # names in a folded list


def as_table(frame: pd.DataFrame, caption: str = "") -> Table:
    """Returns a table of strings of a printed frame."""
    return Table(list(frame), frame.astype(str).values.tolist(), caption)


def overview(groups: Groups, table: pd.DataFrame, options: ConfigDict) -> Section:
    """The table: every model with both intervals, and the runs behind each row."""
    first, device = table.iloc[0], ", ".join(sorted(set(table.device)))
    text = [
        f"Measured on {first.test_images} test images with the weights of lowest validation loss. "
        "Two sources of chance, kept apart: the interval over seeds says where other seeds would "
        f"move the mean ({'t-interval' if options.seed_interval == 't' else 'bootstrap'}), the "
        "interval over images what these very networks would do on other photos of the same kind "
        "(Wilson's, images as units). F1 is the mean over classes; NLL is the loss in nats; Brier "
        "is from 0 to 2; ECE is the calibration error of the top class in 15 bins. Accuracies, F1 "
        "and ECE are in percent. Parameters and FLOPs (matrix products and convolutions of one "
        "image forward, a multiply-add as two) are counted; seconds and images/s are means over "
        f"seeds, without compilation, measured on {device}."
    ]
    if options.reference:
        source = options.reference_source or "the config's compare.reference"
        text.append(f"Published figures, for orientation ({source}); not measured here.")
    if table.near_leaks.any():
        text.append(
            f"The audit found {table.leaks.max()} test images with an exact copy in another part, "
            f"and {table.near_leaks.max()} with an exact or a near one; “without” them, the "
            "accuracy on the rest."
        )
    if "knn" in set(table.model):
        text.append("Nearest neighbours draw nothing at random: their seeds agree by construction.")
    lines = [
        f"{label}: "
        + ", ".join(f"{run.name} {percent(compare.correctness([run]).mean())} %" for run in runs)
        for label, runs in groups.items()
    ]
    behind = Details("The runs behind each row, with their test accuracy", lines)
    return Section("Comparison", text, [as_table(printed_table(table))], details=[behind])


def costs(groups: Groups, table: pd.DataFrame, output: Path) -> Section:
    """Accuracy against parameters, FLOPs, training time and speed of prediction."""
    save(charts.draw_pareto(groups, table), output / "pareto.svg")
    caption = (
        "Test accuracy against cost. Filled: no other model is both cheaper and more accurate (the "
        "Pareto front, joined by the grey line). Bars are 95 % intervals over seeds, over images "
        f"where there is one seed. Times on {', '.join(sorted(set(table.device)))}."
    )
    return Section("What accuracy costs", pictures=[Picture("pareto.svg", caption, wide=True)])


def curves(groups: Groups, output: Path) -> Section:
    """Learning curves and what they say of over- and underfitting."""
    save(charts.draw_curves(groups), output / "learning_curves.svg")
    caption = (
        "Learning curves on validation images: thin lines are seeds, dashes are models fitted at "
        "once."
    )
    picture = Picture("learning_curves.svg", caption, wide=True)
    table = diagnosis_table(groups)
    return Section("How they learned", tables=[table], pictures=[picture], pictures_first=True)


def classes(groups: Groups, output: Path, data_path: str) -> Section:
    """Per-class scores, confusion matrices, and the confused pairs with their photos."""
    best, runs = next(iter(groups.items()))
    save(charts.draw_class_scores(groups, "f1"), output / "classes.svg")
    save(charts.draw_confusion(groups), output / "confusion.svg")
    scores = charts.class_scores(runs)
    never = scores[scores.predicted == 0]["class"].tolist()
    printed = pd.DataFrame(
        {"class": scores["class"]}
        | {name: scores[name].map(percent) for name in ("precision", "recall")}
        | {"F1": scores["f1"].map(percent)}
        | {name: scores[name].map("{:.4g}".format) for name in ("support", "predicted")}
    )
    section = Section(
        "Classes and what is taken for what",
        tables=[as_table(printed, f"{best}: percent and numbers of images, means over seeds.")],
        pictures=[
            Picture("classes.svg", "F1 of every class, mean over seeds.", wide=True),
            Picture(
                "confusion.svg",
                "Confusion on test images: number of images (mean over seeds), and colour and "
                "percent by true class.",
                wide=True,
            ),
        ],
    )
    if never:
        section.text.append(f"{best} never predicts {', '.join(never)}: its precision there is 0.")
    confused = compare.confused_along(groups)
    if len(confused):
        caption = (
            "The most confused pairs of classes from model to model, the least accurate first: "
            "test images of one taken for the other, both ways, mean over seeds."
        )
        section.tables.append(as_table(confused.round(1), caption))
    try:
        section.pictures += mistakes(best, runs[0], output, data_path)
    except UserError as error:
        section.text.append(f"No photos can be shown: {error}")
    return section


def mistakes(label: str, run: FinishedRun, output: Path, data_path: str) -> list[Picture]:
    """Draws photos of a run's most confused pair of classes, and those of highest loss."""
    photos, names = load_test_images(run, data_path), run.class_names
    counts = evaluate.confusion(run.test["labels"], run.predicted, len(run.class_names))
    losses, pairs = evaluate.highest_losses(run), evaluate.confused_pairs(counts)
    wrong = losses[losses.true != losses.predicted]
    if wrong.empty:
        return []
    pair = [names[i] for i in pairs.iloc[0][["first", "second"]].astype(int)]
    between = wrong[wrong.true.isin(pair) & wrong.predicted.isin(pair)]
    chosen = {"confused_pair": between.head(2 * PHOTOS), "highest_loss": wrong.head(2 * PHOTOS)}
    captions = {
        "confused_pair": f"{label}, seed {run.seed}: {pair[0]} taken for {pair[1]} or the other "
        "way, its most confused pair; highest loss first. True class → predicted class.",
        "highest_loss": f"{label}, seed {run.seed}: the test images of highest loss. Wrong labels "
        "often stand here.",
    }
    pictures = []
    for name, rows in chosen.items():
        titles = [
            f"{shortened(r.true)} →\n{shortened(r.predicted)} {100 * r.confidence:.0f} %"
            for r in rows.itertuples()
        ]
        save(draw_photos([photos[i] for i in rows.row], titles, PHOTOS), output / f"{name}.png")
        files = "; ".join(str(name) for name in rows.id)
        pictures.append(Picture(f"{name}.png", f"{captions[name]} Files: {files}.", wide=True))
    return pictures


def pairs_of_models(
    groups: Groups, table: pd.DataFrame, pairs: pd.DataFrame, output: Path
) -> Section:
    """Ranks, paired differences, agreement, and images that only one model gets right."""
    section = Section("Which differences are established", pictures_first=True)
    ranks = charts.draw_ranks(groups, table, compare.established(groups, pairs))
    save(ranks, output / "ranks.svg")
    caption = (
        "Models by test accuracy. Thick: 95 % interval over seeds; thin: over test images. A black "
        "bar at the right ties models between which no difference is established."
    )
    section.pictures.append(Picture("ranks.svg", caption, wide=True))
    if pairs.empty:
        return section
    section.text.append(
        "Differences are on the same test images and, seed by seed, in percentage points. The "
        "interval over seeds and images takes both as drawn at random (two-way analysis of "
        "variance); p is its p-value. McNemar's exact test asks whether these trained networks "
        "differ, and nothing of other seeds; of several seeds it is twice the median p-value. "
        "“p Holm” corrects for the number of pairs, and decides at 0.05; with one seed it is "
        "McNemar's. Kappa is agreement beyond chance."
    )
    section.tables.append(as_table(printed_pairs(pairs)))
    save(charts.draw_agreement(groups, pairs), output / "agreement.svg")
    section.pictures.append(
        Picture("agreement.svg", "How often two models predict the same class, mean over seeds.")
    )
    section.text.append(_overlap(groups))
    alone = compare.only_one_right(groups)
    if len(alone):
        lines = [f"{name} ({true}): {model}" for name, true, model in alone.head(LISTED).values]
        title = f"Test images that only one model gets right ({len(alone)})"
        section.details.append(Details(title, lines))
    return section


def _overlap(groups: Groups) -> str:
    right = compare.majority_right(groups)
    count, alone = len(right), compare.only_one_right(groups)["model"].value_counts()
    every, none = right.all(axis=1).sum(), (~right).all(axis=1).sum()
    text = (
        f"By the majority of its seeds, every model gets {every} of {count} test images right, and "
        f"none gets {none}."
    )
    if len(alone):
        each = ", ".join(f"{label} {n}" for label, n in alone.items())
        text += f" Images that one model alone gets right: {each}."
    return text


def calibration(groups: Groups, table: pd.DataFrame, output: Path) -> Section:
    """Reliability, temperature scaling, and accuracy when unsure predictions are left out."""
    save(charts.draw_reliability(groups), output / "reliability.svg")
    save(charts.draw_coverage(groups), output / "coverage.svg")
    rows = [
        {
            "model": label,
            "ECE %": percent(row.ece_mean),
            "NLL": decimal(row.nll_mean),
            "temperature": decimal(row.temperature_mean, 2),
            "ECE % scaled": percent(row.ece_scaled_mean),
            "NLL scaled": decimal(row.nll_scaled_mean),
            "answered %": percent(row.answered_mean, 1),
            "accuracy on these %": percent(row.accuracy_answered_mean),
        }
        for label, row in zip(groups, table.itertuples(), strict=True)
    ]
    text = (
        "The temperature is fitted on validation images and divides the logits: above 1 the model "
        "was too sure, below 1 not sure enough; it changes no prediction. “Answered” are test "
        "images whose scaled confidence reaches the threshold that gave 95 % accuracy on "
        "validation images; the rest would go to a person. Means over seeds."
    )
    pictures = [
        Picture(
            "reliability.svg",
            "Reliability before scaling, seeds pooled. On the dashed line, confidence is accuracy.",
            wide=True,
        ),
        Picture(
            "coverage.svg",
            "Accuracy when only the surest predictions are answered, seeds pooled, before scaling.",
            wide=True,
        ),
    ]
    return Section(
        "How far their confidence can be trusted", [text], [as_table(pd.DataFrame(rows))], pictures
    )


def transfer(groups: Groups) -> Section | None:
    """What was done with pretrained weights, and whether the pixels matched; None without any."""
    rows, warnings = [], []
    for label, runs in groups.items():
        summary = runs[0].summary
        if summary.get("weights", "none") == "none":
            continue
        phases = [
            f"{phase['name']} ({phase['train']}): {phase['epochs']:.3g} epochs"
            + ", on stored features" * phase["stored_features"]
            for phase in summary["phases"]
        ]
        found = summary.get("preflight", {"warnings": ["preflight was off"]})["warnings"]
        warnings += [f"{label}: its pixels do not match its weights. {text}" for text in found]
        state = "DO NOT MATCH" if found else "match"
        rows.append([label, summary["weights"], "; ".join(phases), state])
    if not rows:
        return None
    text = (
        "Before training, a batch went through each network, and what its first layers got was "
        "held against what the weights saw when they were trained. Each phase goes on from the "
        "best weights so far."
    )
    table = Table(["model", "weights", "phases of the first seed", "pixels"], rows)
    return Section("From pretrained weights", [text], [table], warnings=warnings)


def data(audit: dict, folder: Path, groups: Groups, output: Path) -> Section:
    """What the audit of the images found, and what the models were trained on."""
    names = audit["class_names"]
    rows = [[name, *(str(counts[name]) for counts in audit["counts"].values())] for name in names]
    section = Section("Data", tables=[Table(["class", *audit["counts"]], rows)])
    if audit["leaks"] or audit["label_conflicts"]:
        section.warnings.append(
            f"{len(audit['leaks'])} groups of identical images lie in several parts and "
            f"{len(audit['label_conflicts'])} carry contradictory labels. "
            "--config.data.exclude_leaks leaves the culprits out of training."
        )
    sizes = "size" if audit["distinct_sizes"] == 1 else "sizes"
    low, high = audit["value_range"]
    near = "near duplicates were not looked for: too many images"
    if audit["near_duplicates_checked"]:
        near = f"{len(audit['near_duplicates'])} groups of near duplicates, "
        near += f"{len(audit['near_leaks'])} across parts"
    section.text.append(
        f"{audit['images']} images of {audit['distinct_sizes']} {sizes}, modes "
        f"{', '.join(audit['modes'])}, values {low} to {high}; {len(audit['unreadable'])} "
        f"unreadable files, {len(audit['not_images'])} files that are no image; "
        f"{len(audit['exact_duplicates'])} groups of exact duplicates, of which "
        f"{len(audit['label_conflicts'])} with contradictory labels and {len(audit['leaks'])} "
        f"across parts; {near}."
    )
    for title, key in (
        ("Leaks", "leaks"),
        ("Contradictory labels", "label_conflicts"),
        ("Unreadable files", "unreadable"),
        ("Near duplicates across parts", "near_leaks"),
    ):
        groups_found = audit[key]
        if groups_found:
            lines = [g if isinstance(g, str) else " = ".join(g) for g in groups_found[:LISTED]]
            section.details.append(Details(f"{title} ({len(groups_found)})", lines))
    sheet = folder / "contact_sheet.png"
    if sheet.exists():
        section.pictures.append(Picture(_relative(sheet, output), "Samples of every class."))
    for label, runs in groups.items():
        path = runs[0].path / "augmented_batch.png"
        if path.exists():
            caption = f"Augmented images for {label}"
            picture = Picture(_relative(path, output), caption, pixelated=True)
            title = f"{label}: images of the first batch, augmented"
            section.details.append(Details(title, picture=picture))
    return section


def _relative(path: Path, folder: Path) -> str:
    return os.path.relpath(path.resolve(), folder.resolve())


def reproduce(runs: list[FinishedRun], groups: Groups, workdir: Path) -> Section:
    """The command, versions, devices, seeds and every model's config."""
    command = ["python", *read_plan(workdir).get("command", ["main.py"])]
    first = runs[0]
    about, found = first.environment, first.dataset
    commits = sorted({str(run.environment["git_commit"]) for run in runs})
    dirty = any(run.environment["git_dirty"] for run in runs)
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    text = [
        f"Command: {shlex.join(command)}",
        f"Commit {', '.join(commits)}{', with uncommitted changes' if dirty else ''}; Python "
        f"{about['python']}; {packages}; devices: {', '.join(about['devices'])} "
        f"({about['device_kind']}).",
        f"Images' fingerprint {found['fingerprint'][:16]}, split seed {found['split_seed']}; "
        f"seeds {', '.join(map(str, sorted({run.seed for run in runs})))}.",
        "The command again skips finished runs; --dry_run prints every config. Every figure here "
        f"comes from the run directories alone: python -m analysis.report {workdir.name}.",
    ]
    details = []
    for label, members in groups.items():
        config = json.dumps(members[0].config, indent=2, ensure_ascii=False)
        details.append(Details(f"Config of {label}, seed {members[0].seed}", code=config))
    return Section("How to reproduce this", text, details=details)
