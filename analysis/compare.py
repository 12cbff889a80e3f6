"""Which architecture is best, and how sure are we? Tables and statistics from saved predictions.

    python -m analysis.compare WORKDIR

Writes table, pairs, confused (.csv with every digit; .md and .tex to paste), only_one_right and
per_class into WORKDIR/report and prints the answer. `analysis.report` makes a page of it.
"""

import itertools
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from analysis import evaluate, uncertainty
from analysis.criterion import values, weights
from analysis.folds import FoldFamily, fold_table, merge_folds, of_seeds
from analysis.page import tables
from analysis.runs import (
    FinishedRun,
    Groups,
    common_criterion,
    correctness,
    group_runs,
    incomplete,
    load_runs,
    planned_seeds,
    read_audit,
    read_plan,
    same_images,
    values_of,
    without_seeds,
)
from analysis.uncertainty import LEVEL, Family
from analysis.verdict import Recommendation, listed, recommend
from configs import base
from errors import UserError
from experiment.command import arguments, output_folder, run_command
from models import MODELS

COSTS = (
    "parameters",
    "multiply_adds_per_image",
    "train_step_memory_bytes",
    "predict_step_memory_bytes",
    "seconds",
    "seconds_to_best",
    "compile_seconds",
    "train_images_per_second",
)
NEEDED = ("seeds_needed", "images_needed", "times_needed")


@dataclass(frozen=True)
class Comparison:
    """What tables, recommendation and chapters are made of."""

    workdir: Path
    groups: Groups
    options: ConfigDict  # `config.compare`
    audit: dict | None
    criterion: str  # what models are compared by, see `criterion.TITLES`
    table: pd.DataFrame  # a row per model: see `make_table`
    baseline: pd.Series | None  # always answering the most frequent class: label and figures
    pairs: pd.DataFrame  # a row per pair of models: see `make_pairs`
    recommendation: Recommendation
    reasons: dict[str, str] = field(default_factory=dict)  # why a run is not counted, by its name
    data_path: str = ""  # where the data lies now, "" for where it was at training
    folder: str = "report"  # of the workdir, for what is written
    smaller: tuple[FinishedRun, ...] = ()  # on fewer training images: not among the `groups`

    @property
    def runs(self) -> list[FinishedRun]:
        """All of them, the best model first."""
        return list(itertools.chain(*self.groups.values()))

    @property
    def folds(self) -> int:
        """Folds of the cross-validation that the first model went through; 0 for none."""
        return self.runs[0].config["data"].get("folds", 0) if self.groups else 0

    @property
    def output(self) -> Path:
        """Folder of the tables, the pictures and the page."""
        return self.workdir / self.folder


def compare(
    workdir: Path, runs: list[FinishedRun], options: ConfigDict | None = None, data_path: str = ""
) -> Comparison:
    """Compares runs of a workdir, with the options of its experiment where none are given.

    Runs that are not complete are counted, and named in `reasons`. Of several fractions of the
    training images, the largest is compared, and runs of the others are `smaller`.
    """
    options, audit = options or read_options(workdir), read_audit(workdir)
    reasons = incomplete(workdir, runs)
    complete = merge_folds([run for run in runs if run.name not in reasons])
    most = max((run.train_fraction for run in complete), default=1.0)  # what there is to choose
    groups = group_runs([run for run in complete if run.train_fraction == most])
    smaller = tuple(run for run in complete if run.train_fraction < most)
    if not groups:
        nothing = pd.DataFrame()
        some = any(run.name not in reasons for run in runs)  # of the folds of a seed
        text = "No seed is complete in all folds yet." if some else "No run is complete yet."
        said = Recommendation(None, (text,))
        return Comparison(
            workdir, groups, options, audit, "accuracy", nothing, None, nothing, said, reasons
        )
    criterion, blocks = common_criterion(groups), tested_alike(groups)
    baseline = baseline_row(next(iter(blocks[0].values()))[0], criterion)
    families = make_families(blocks, criterion, baseline.label)
    lost = of_seeds(runs, reasons)
    states = planned_seeds(groups, lost)
    table = make_table(groups, families, criterion, options, audit, states)
    pairs = make_pairs(groups, families, options.margin / 100)
    margin = options.margin / 100
    absent = without_seeds(groups | group_runs(list(smaller)), runs, lost)
    said = recommend(table, pairs, families[0], baseline, groups, criterion, margin, absent)
    if few := sorted({run.kind for run in smaller} - {of[0].kind for of in groups.values()}):
        text = f"Not compared, for trained on fewer training images only: {listed(few)}."
        said = replace(said, warnings=(*said.warnings, text))
    return Comparison(
        workdir,
        groups,
        options,
        audit,
        criterion,
        table,
        baseline,
        pairs,
        said,
        reasons,
        data_path,
        smaller=smaller,
    )


def baseline_row(run: FinishedRun, criterion: str) -> pd.Series:
    """Returns label and figures of always answering the class of most training images."""
    labels, number = run.test["labels"], majority(run)
    predicted = np.full(len(labels), number)
    figures = {
        "label": f"always {run.class_names[number]}",
        "class_name": run.class_names[number],
        "score": values(labels, predicted, criterion).mean(),
        "test_accuracy_mean": (labels == number).mean(),
        "balanced_accuracy_mean": 1 / len(np.unique(labels)) * (number in labels),
        "least_recall": 0.0 if len(np.unique(labels)) > 1 else 1.0,
    }
    return pd.Series(figures)


def read_options(workdir: Path) -> ConfigDict:
    """Returns `config.compare` of the experiment, with defaults where it says nothing."""
    options = base.get_config().compare
    stored = read_plan(workdir).get("compare", {})
    options.update(ConfigDict({k: v for k, v in stored.items() if k in options}))
    return options


def draws_nothing(run: FinishedRun) -> bool:
    """Returns whether a model's training draws nothing at random, so that its seeds are one."""
    fitted = run.model in MODELS and not MODELS[run.model].trained_by_gradient
    return fitted and run.train_fraction == 1  # or else each seed has images of its own


def majority(run: FinishedRun) -> int:
    """Returns the number of the class with most training images."""
    counts = run.dataset["counts"]["train"]
    return int(np.argmax([counts.get(name, 0) for name in run.class_names]))


def tested_alike(groups: Groups) -> list[Groups]:
    """Returns the models of each set of test images, that of most models first."""
    blocks: list[Groups] = []
    for label, runs in groups.items():
        correctness(runs)  # raises where the seeds' images differ
        known = (b for b in blocks if same_images(next(iter(b.values()))[0], runs[0]))
        block = next(known, None)
        if block is None:
            blocks.append(block := {})
        block[label] = runs
    return sorted(blocks, key=len, reverse=True)


def make_families(blocks: list[Groups], criterion: str, baseline: str) -> list[Family]:
    """Returns a family for each set of test images.

    The `baseline`, which always answers the class of most training images, is a member of each.
    """
    families = []
    for block in blocks:
        first = next(iter(block.values()))[0]
        labels, always = first.test["labels"], np.full(len(first.test["labels"]), majority(first))
        of_each = {label: values_of(runs, criterion) for label, runs in block.items()}
        of_each[baseline] = values(labels, always, criterion)[None]
        fixed = {baseline, *(label for label, runs in block.items() if draws_nothing(runs[0]))}
        weigh = weights(labels, criterion)
        if first.folds:
            families.append(FoldFamily(of_each, first, weights=weigh))
        else:
            families.append(Family(of_each, first.clusters, fixed, weigh))
    return families


def make_table(
    groups: Groups,
    families: list[Family],
    criterion: str,
    options: ConfigDict,
    audit: dict | None = None,
    states: dict[str, tuple[int, str]] | None = None,
) -> pd.DataFrame:
    """Returns table.csv: a row per model and variant, the best on validation first; shares in 0..1.

    `score` is the criterion, `ci95_*` for other seeds and images; `simultaneous_*` hold for all
    models at once, so also for one that was picked by its test score. `group` has the letters
    of models that cannot be told apart. `without_near_leaks` leaves out exact copies, too.
    """
    rows = []
    family_of = {label: family for family in families for label in family.mean}
    ranked = {
        label: np.mean([run.validation_score(criterion) for run in runs])
        for label, runs in groups.items()
    }
    for label, runs in groups.items():
        figures = pd.DataFrame([evaluate.evaluate(run) for run in runs])
        figures = figures.drop(columns=["accuracy", "validation_accuracy"])
        costs = pd.DataFrame([run.cost for run in runs]).reindex(columns=COSTS)
        first, correct, ids = runs[0], correctness(runs), runs[0].test["ids"]
        accuracy, family = correct.mean(axis=1), family_of[label]
        published = options.reference.get(first.model, math.nan)
        better = sum(score > ranked[label] for score in ranked.values())
        tied = sum(score == ranked[label] for score in ranked.values()) > 1
        planned, state = (states or {}).get(label, (len(runs), ""))
        recalls = pd.DataFrame([r.correct for r in runs]).T.groupby(first.test["labels"]).mean()
        row = {
            "label": label,
            "model": first.model,
            "variant": first.variant,
            "seeds": len(runs),
            "planned": planned,
            "state": state,
            "rank": f"{better + 1}{'=' if tied else ''}",
            "group": family.letters[label] if family is families[0] else "",
            "criterion": criterion,
            "validation_score": ranked[label],
            "score": family.mean[label],
            **uncertainty.ends("", family.interval(label)),
            **uncertainty.ends("simultaneous_", family.interval(label, LEVEL ** (1 / len(groups)))),
            "test_images": len(ids),
            "test_accuracy_mean": accuracy.mean(),
            "test_accuracy_std": accuracy.std(ddof=1) if len(runs) > 1 else math.nan,
            "least_recall": recalls.mean(axis=1).min(),
            "published": options.reference.get(label, published) / 100,
            **_without_leaks(correct, ids, audit),
            **figures.mean().add_suffix("_mean"),
            **costs.apply(pd.to_numeric).mean(),
            "image_size": first.config["data"]["image_size"],
            "device": first.cost["device"],
            "runs": ";".join(run.name for run in runs),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def _without_leaks(correct: np.ndarray, ids: np.ndarray, audit: dict | None) -> dict[str, float]:
    """The accuracy without test images that are in another part, and how many these are."""
    columns, left_out = {}, np.zeros(len(ids), bool)
    for kind in ("leaks", "near_leaks"):
        left_out = left_out | np.isin(ids, list(itertools.chain(*(audit or {}).get(kind, []))))
        without = correct[:, ~left_out].mean() if not left_out.all() else math.nan
        columns |= {f"without_{kind}": without, kind: int(left_out.sum())}
    return columns


def make_pairs(groups: Groups, families: list[Family], margin: float = 0.005) -> pd.DataFrame:
    """Returns pairs.csv: a row per pair of models that were tested on the same images.

    `p_better` and `p_matters` are the probabilities that the first is better, and by more than the
    margin; `*_needed` would settle the pair, see `Family.needed`.
    """
    rows = []
    for family in families:
        open_pairs = family.pairs[family.pairs["first"].isin(groups)]
        for _, pair in open_pairs[open_pairs["second"].isin(groups)].iterrows():
            first, second = (groups[pair[side]] for side in ("first", "second"))
            both = list(zip(first, second, strict=False))
            needed = (math.nan,) * 3 if pair.established else family.needed(pair)
            more = {
                "p_better": family.probability(pair),
                "p_matters": family.probability(pair, margin),
                **dict(zip(NEEDED, needed, strict=True)),
                "agreement": np.mean([(a.predicted == b.predicted).mean() for a, b in both]),
                "kappa": np.mean([_kappa(a.predicted, b.predicted) for a, b in both]),
            }
            rows.append(pair.to_dict() | more)
    return pd.DataFrame(rows)


def _kappa(first: np.ndarray, second: np.ndarray) -> float:
    """Cohen's kappa; 1 where both always say the same one class."""
    count = int(max(first.max(), second.max())) + 1
    one, other = (np.bincount(of, minlength=count) / len(of) for of in (first, second))
    by_chance, same = float(one @ other), float((first == second).mean())
    return 1.0 if by_chance == 1 else (same - by_chance) / (1 - by_chance)


def majority_right(groups: Groups) -> pd.DataFrame:
    """Returns whether most seeds are right: a row per image (id, class), a column per model."""
    first = next(iter(groups.values()))[0]
    classes = np.array(first.class_names, object)[first.test["labels"]]
    columns = {
        label: correctness(runs).mean(axis=0) > 0.5
        for label, runs in groups.items()
        if same_images(runs[0], first)
    }
    return pd.DataFrame(columns, index=[first.test["ids"], classes])


def only_one_right(groups: Groups) -> pd.DataFrame:
    """Returns the test images that exactly one model gets right: id, class, model."""
    right = majority_right(groups)
    alone = right[(right.sum(axis=1) == 1) & (right.shape[1] > 1)]
    model = alone.columns.to_numpy()[alone.to_numpy().argmax(axis=1)]
    return alone.index.to_frame(index=False, name=["id", "class"]).assign(model=model)


def mean_confusion(runs: list[FinishedRun]) -> np.ndarray:
    """Returns float [K, K]: images by true (row) and predicted class, mean over seeds."""
    return np.mean([evaluate.confusion_of(run) for run in runs], axis=0)


def class_scores(runs: list[FinishedRun]) -> pd.DataFrame:
    """Returns `evaluate.per_class` of a model by class, means over its seeds."""
    by_seed = pd.concat([evaluate.classes_of(run) for run in runs])
    return by_seed.groupby("class", sort=False).mean()


def confused_along(groups: Groups, top: int = 2) -> pd.DataFrame:
    """Returns the mean errors between the `top` pairs of any model: a column a model, best last."""
    by_model = {label: mean_confusion(groups[label]) for label in reversed(groups)}
    names = next(iter(groups.values()))[0].class_names
    pairs = pd.concat([evaluate.confused_pairs(counts).head(top) for counts in by_model.values()])
    chosen = sorted({tuple(sorted(pair)) for pair in pairs[["first", "second"]].to_numpy()})
    table = pd.DataFrame({"pair": [f"{names[i]} / {names[j]}" for i, j in chosen]})
    for label, counts in by_model.items():
        table[label] = [counts[i, j] + counts[j, i] for i, j in chosen]
    return table.iloc[np.argsort(-table.iloc[:, 1:].sum(axis=1), kind="stable")]


def write_tables(comparison: Comparison) -> None:
    """Writes every table into the report's folder; nothing where no run is complete."""
    groups, output = comparison.groups, output_folder(comparison.output, "report")
    if not groups:
        return
    table, pairs, confused = comparison.table, comparison.pairs, confused_along(groups)
    tables.write_table(table, tables.printed_table(table, comparison.baseline), output / "table")
    tables.write_table(pairs, tables.printed_pairs(pairs), output / "pairs")
    tables.write_table(confused, confused.round(1), output / "confused")
    only_one_right(groups).to_csv(output / "only_one_right.csv", index=False)
    if len(folds := fold_table(groups)):
        folds.to_csv(output / "folds.csv", index=False)
    each = [evaluate.classes_of(run).assign(run=run.name) for run in comparison.runs]
    pd.concat(each).to_csv(output / "per_class.csv", index=False)


def compare_workdir(name: str, data_path: str = "") -> Comparison:
    """Compares the runs of the workdir named on a command line; raises UserError without any."""
    workdir = Path(name).expanduser()
    comparison = compare(workdir, load_runs(workdir), data_path=data_path)
    if not comparison.groups:
        raise UserError(f"{workdir} holds no complete run (WORKDIR/<model>/seed<k>/summary.json)")
    return comparison


def main(argv: list[str]) -> None:
    """Writes the tables of a workdir and prints the recommendation."""
    comparison = compare_workdir(*arguments(argv, "analysis.compare WORKDIR"))
    write_tables(comparison)
    printed = [
        tables.printed_table(comparison.table, comparison.baseline),
        tables.printed_pairs(comparison.pairs),
    ]
    print("\n".join(table.to_string(index=False) + "\n" for table in printed if len(table)))
    print(f"{comparison.recommendation}\n\ntables: {comparison.output}")


if __name__ == "__main__":
    run_command(main)
