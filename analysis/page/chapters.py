"""The chapters of the report that need no model; None where there is nothing to say."""

import itertools
import json
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd

from analysis import compare
from analysis.compare import Comparison
from analysis.diagnosis import diagnose, diagnosis_table
from analysis.folds import SOURCE, single_runs
from analysis.page import charts
from analysis.page.figures import save
from analysis.page.gallery import make_gallery
from analysis.page.section import Details, Picture, Section, Table, as_table
from analysis.page.tables import NONE, percent, printed_pairs, printed_table
from analysis.runs import read_plan
from analysis.verdict import listed, plural

LISTED = 200  # names in a folded list
DRAWN = 20  # models in a chart of colours, of which there are no more
ROWS = 40  # models in a chart with a row for each
CLASSES = 40  # in a chart of classes
SPOKEN = {  # after one run and after several
    "overfits": ("overfits", "overfit"),
    "no curve": ("has no curve", "have no curve"),
    "still improving": ("is still improving", "are still improving"),
}
COSTS = ["params", "multiply-adds", "train s", "train images/s"]  # which have their own chapter
PAIRS = 500  # rows of a table of pairs on the page


def best(comparison: Comparison, count: int) -> Comparison:
    """Returns the comparison of its first `count` models alone."""
    groups = dict(itertools.islice(comparison.groups.items(), count))
    pairs = comparison.pairs
    if len(pairs):
        pairs = pairs[pairs["first"].isin(groups) & pairs["second"].isin(groups)]
    return replace(comparison, groups=groups, table=comparison.table.head(count), pairs=pairs)


def _chart(
    of: Comparison, draw: Callable, file: str, caption: str, wide: bool = True, most: int = DRAWN
) -> Picture:
    """Draws the first models, and says so where there are more."""
    if len(of.groups) > most:
        caption += f" The first {most} of {len(of.groups)} models."
    figure = draw(best(of, most))
    figure.tight_layout()
    save(figure, of.output / file)
    return Picture(file, caption, wide)


def overview(comparison: Comparison) -> Section:
    """Every figure of every model, the ranks, and the runs behind each row."""
    table, options, groups = comparison.table, comparison.options, comparison.groups
    text = []
    if comparison.smaller:
        part = 100 * comparison.runs[0].train_fraction
        text.append(
            f"Compared are the runs on {part:g} % of the training images, the most there are; "
            "those on fewer stand in the chapter Data size alone."
        )
    if options.reference:
        source = options.reference_source or "the config's compare.reference"
        text.append(f"Published figures, for orientation ({source}); not measured here.")
    if table.near_leaks.any():
        text.append(
            f"{table.leaks.max()} test images have an exact copy in another part, "
            f"{table.near_leaks.max()} an exact or near one; “without” is the accuracy on the rest."
        )
    if any(compare.draws_nothing(runs[0]) for runs in groups.values()):
        text.append("Nearest neighbours have no randomness: their seeds agree by construction.")
    caption = "In percent, but for NLL (nats) and Brier. All but the interval are means over seeds."
    if comparison.folds:
        caption += f" Every fold tests its own images; the interval is {SOURCE}."
    lines = [
        f"{label}: " + ", ".join(f"{run.name} {percent(run.correct.mean())} %" for run in runs)
        for label, runs in single_runs(groups).items()
    ]
    over = f" {SOURCE}" * bool(comparison.folds)
    ranks = (
        f"Dots: mean over seeds; lines: 95 % intervals{over}. Models that share a letter cannot be "
    )
    ranks += "told apart." + " Crosses: published." * bool(options.reference)
    finding = f"{percent(table.score.max(), 1)} % on {plural(table.test_images[0], 'test image')}"
    if len(table) > 1:
        finding = f"{percent(table.score.min(), 1)} to {finding}, {plural(len(table), 'model')}"
    return Section(
        text=text,
        tables=[as_table(printed_table(table, comparison.baseline).drop(columns=COSTS), caption)],
        pictures=[_chart(comparison, charts.draw_ranks, "ranks.svg", ranks, most=ROWS)],
        pictures_first=True,
        details=[Details("Test accuracy of every run", lines)],
        finding=finding + ".",
    )


def curves(comparison: Comparison) -> Section:
    """Learning curves and what they say about over- and underfitting."""
    caption = "On validation images. Thin lines: seeds; dashes: models fitted in one step."
    if comparison.folds:
        caption = caption.replace("seeds", "seeds and folds")
        comparison = replace(comparison, groups=single_runs(comparison.groups))
    picture = _chart(comparison, charts.draw_curves, "learning_curves.svg", caption)
    table = diagnosis_table(comparison.groups)
    runs = comparison.runs
    verdicts = Counter(diagnose(run).verdict for run in runs).most_common()
    found = [f"{n} {SPOKEN.get(verdict, (verdict,) * 2)[n > 1]}" for verdict, n in verdicts]
    finding = f"Of {plural(len(runs), 'run')}, {listed(found)}"
    return Section(tables=[table], pictures=[picture], pictures_first=True, finding=finding + ".")


def classes(comparison: Comparison) -> Section:
    """Confusion matrices with the photos in their cells, and scores by class."""
    groups, output = comparison.groups, comparison.output
    label, runs = next(iter(groups.items()))
    scores = compare.class_scores(runs)
    section = Section(gallery=make_gallery(comparison))
    _long_confusion(comparison).to_csv(output / "confusion.csv", index=False)
    confused = compare.confused_along(dict(itertools.islice(groups.items(), 8)))
    if len(confused):
        columns = ["pair", *reversed(confused.columns[1:])]
        caption = (
            "The most confused pairs: test images of either class taken for the other, mean over "
        )
        caption += "seeds" + " of the first 8 models" * (len(groups) > 8) + "."
        section.tables.append(as_table(confused[columns].head(PAIRS).round(1), caption))
        most = confused.loc[confused[label].idxmax()]
        images = f"{most[label]:.{int(most[label] < 10)}f} of {len(runs[0].predicted):,}"
        pair = most.pair.replace(" / ", " and ")
        section.finding = (
            f"{label} most often confuses {pair}: {images} test images (mean over seeds)."
        )
    else:
        section.finding = "No test image is misclassified."
    section.details.append(Details("F1 by class, all models", picture=_class_chart(comparison)))
    never = scores.index[scores.predicted == 0].tolist()
    if never:
        section.text.append(f"{label} never predicts {listed(never)}.")
    printed = scores[["precision", "recall", "f1"]].map(percent).rename(columns={"f1": "F1"})
    counts = scores[["support", "predicted"]].map("{:.4g}".format)
    printed = pd.concat([printed, counts], axis=1).reset_index()
    table = as_table(printed, "In percent, and numbers of images; means over seeds.")
    section.details.append(Details(f"Precision and recall of {label} by class", table=table))
    return section


def _class_chart(comparison: Comparison) -> Picture:
    """Draws F1 by class; of many classes, the worst."""
    count = len(comparison.runs[0].class_names)
    caption = "F1 by class, %, mean over seeds."
    if count > CLASSES:
        caption += f" The {CLASSES} of {count} classes that are worst over all models."
    draw = partial(charts.draw_class_scores, most=CLASSES)
    return _chart(comparison, draw, "classes.svg", caption, most=ROWS)


def _long_confusion(comparison: Comparison) -> pd.DataFrame:
    """Returns every cell that is not 0: model, true and predicted class, images (mean)."""
    frames = []
    for label, runs in comparison.groups.items():
        counts, names = compare.mean_confusion(runs), np.array(runs[0].class_names, object)
        true, predicted = np.nonzero(counts)
        cells = {"model": label, "true": names[true], "predicted": names[predicted]}
        frames.append(pd.DataFrame(cells | {"images": counts[true, predicted].round(3)}))
    return pd.concat(frames)


def pairs_of_models(comparison: Comparison) -> Section | None:
    """Paired differences, agreement, and images that only one model gets right."""
    groups, pairs = comparison.groups, comparison.pairs
    if pairs.empty:
        return None
    alone, right = compare.only_one_right(groups), compare.majority_right(groups)
    every, none = right.all(axis=1).sum(), (~right).all(axis=1).sum()
    established = f"{pairs.established.sum():,} of {len(pairs):,}"
    section = Section(finding=f"{established} differences between models are established.")
    section.text = [
        f"By majority vote of its seeds, every model gets {every:,} of {len(right):,} test images "
        f"right, and no model gets {none:,} of them right.",
    ]
    caption = "Differences on the same test images, in percentage points."
    if comparison.folds:
        caption += f" Intervals are {SOURCE}, and hold for all pairs at once."
    if len(pairs) > PAIRS:
        first = best(comparison, 32)
        caption += f" The first 32 of {len(groups)} models; pairs.csv has all {len(pairs):,} pairs."
        pairs = first.pairs
    section.tables.append(as_table(printed_pairs(pairs), caption))
    caption = "How often two models predict the same class, mean over seeds."
    agreement = _chart(comparison, charts.draw_agreement, "agreement.svg", caption, False, ROWS)
    section.details.append(Details("Agreement of models", picture=agreement))
    if len(alone):
        counts = [f"{label} {n}" for label, n in alone["model"].value_counts().items()]
        lines = [f"{name} ({true}): {model}" for name, true, model in alone.head(LISTED).values]
        title = f"Test images that only one model gets right: {listed(counts)}"
        section.details.append(Details(title, lines))
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
    text = (
        "Pixels: whether photographs (or the run's images, where the weights do not know "
        "photographs) reach the first layers as the images did on which the weights were trained. "
        "Each phase starts from the best weights so far."
    )
    table = Table(["model", "weights", "phases of the first seed", "pixels"], rows)
    wrong = [label for label, *_, state in rows if state == "DO NOT MATCH"]
    finding = f"{plural(len(rows), 'model')} with pretrained weights"
    finding += f"; the pixels of {listed(wrong)} do not match." if wrong else "."
    return Section(text=[text], tables=[table], warnings=warnings, finding=finding)


def data(comparison: Comparison) -> Section | None:
    """What the audit found in the images, and what augmentation makes of them."""
    audit = comparison.audit
    if audit is None:
        return None
    counts = pd.DataFrame(audit["counts"], audit["class_names"]).rename_axis("class").reset_index()
    section = Section(tables=[as_table(counts)])
    count = {key: len(value) for key, value in audit.items() if isinstance(value, list)}
    divided = len(audit.get("group_leaks", {}))
    if audit["leaks"] or audit["label_conflicts"] or divided:
        section.warnings.append(
            f"{count['leaks']} groups of identical images and {divided} groups of data.groups span "
            f"several parts, and {count['label_conflicts']} have contradictory labels. "
            "--config.data.exclude_leaks leaves them out of training."
        )
    section.finding = f"{plural(audit['images'], 'image')}, {plural(len(counts), 'class')}"
    section.finding = section.finding.replace("classs", "classes") + (
        f"; {count['leaks']} groups of duplicates across parts."
        if count["leaks"]
        else "; no exact duplicates across parts."
    )
    near = f"{count['near_duplicates']} groups, {count['near_leaks']} across parts"
    if not audit["near_duplicates_checked"]:
        near = "not looked for, too many images"
    section.text.append(
        f"Images: {audit['images']:,}; sizes: {audit['distinct_sizes']}; modes: "
        f"{', '.join(audit['modes'])}; values: {' to '.join(map(str, audit['value_range']))}; "
        f"unreadable files: {count['unreadable']}; not images: {count['not_images']}; "
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
        picture = Picture(str(sheet), "Images of each class, up to 20 classes.")
        section.details.append(Details("Samples of every class", picture=picture))
    for label, runs in comparison.groups.items():
        path = runs[0].path.resolve() / "augmented_batch.png"
        if path.exists():
            picture = Picture(str(path), f"Augmented images for {label}", pixelated=True)
            title = f"First augmented batch of {label}"
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
        f"Data fingerprint {dataset['fingerprint'][:16]}, split seed {dataset['split_seed']}; "
        f"seeds {', '.join(map(str, sorted({run.seed for run in runs})))}.",
        "Run again, the command skips finished runs; --dry_run prints every config. This page is "
        f"made from the run directories alone: python -m analysis.report {workdir}.",
    ]
    finding = f"Commit {commits[0][:7]}" if about["git_commit"] else "Commit unknown"
    finding += f", jax {about['packages'].get('jax', 'unknown')}, {about['device_kind']}."
    section = Section(text=text, finding=finding)
    if (table := configs(comparison)) is not None:
        section.tables.append(table)
    for label, (run, *_) in itertools.islice(comparison.groups.items(), CLASSES):
        config = json.dumps(run.config, indent=2, ensure_ascii=False)
        section.details.append(Details(f"Config of {label}, seed {run.seed}", code=config))
    return section


def _fields(config: dict, prefix: str = "") -> dict[str, str]:
    """Returns every field of a config by its full name, as text."""
    fields = {}
    for name, value in config.items():
        if isinstance(value, dict):
            fields |= _fields(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = json.dumps(value, ensure_ascii=False).strip('"')
    return fields


def configs(comparison: Comparison) -> Table | None:
    """Returns a row per model with the fields of its config that differ between models."""
    ignored = ("seed", "runtime", "compare", "workdir")
    by_model = {
        label: _fields({k: v for k, v in runs[0].config.items() if k not in ignored})
        for label, runs in comparison.groups.items()
    }
    frame = pd.DataFrame.from_dict(by_model, orient="index").fillna(NONE)
    frame = frame.loc[:, frame.nunique() > 1].rename_axis("model").reset_index()
    if len(frame.columns) == 1:
        return None
    return as_table(frame, "Fields of the config that differ between models.", name="configs")
