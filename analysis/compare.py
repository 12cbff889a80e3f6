"""Which architecture is best, and how sure are we? Tables and statistics from saved predictions.

    python -m analysis.compare WORKDIR

Writes table, pairs, confused (.csv with every digit; .md and .tex to paste), only_one_right and
per_class into WORKDIR/report and prints the answer. `analysis.report` makes a page of it.
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from ml_collections import ConfigDict
from sklearn.metrics import cohen_kappa_score

from analysis import evaluate, uncertainty
from analysis.page import tables
from analysis.runs import (
    FinishedRun,
    Groups,
    correctness,
    group_runs,
    load_runs,
    read_audit,
    read_plan,
    same_images,
)
from configs import base
from errors import UserError
from experiment.command import arguments, output_folder, run_command

ALPHA = 0.05
COSTS = (
    "parameters",
    "flops_per_image",
    "seconds",
    "seconds_to_best",
    "train_images_per_second",
    "inference_images_per_second",
)


@dataclass(frozen=True)
class Comparison:
    """What tables, answer and chapters are made of."""

    workdir: Path
    groups: Groups
    options: ConfigDict  # `config.compare`
    audit: dict | None
    table: pd.DataFrame  # a row per model: see `make_table`
    pairs: pd.DataFrame  # a row per pair of models: see `make_pairs`
    data_path: str = ""  # where the data lies now, "" for where it was at training

    @property
    def runs(self) -> list[FinishedRun]:
        """All of them, the best model first."""
        return list(itertools.chain(*self.groups.values()))

    @property
    def output(self) -> Path:
        """Folder of the tables, the pictures and the page."""
        return self.workdir / "report"


def compare(
    workdir: Path, runs: list[FinishedRun], options: ConfigDict | None = None, data_path: str = ""
) -> Comparison:
    """Compares runs of a workdir, with the options of its experiment where none are given."""
    options = options or read_options(workdir)
    groups, audit = group_runs(runs), read_audit(workdir)
    table, pairs = make_table(groups, options, audit), make_pairs(groups)
    return Comparison(workdir, groups, options, audit, table, pairs, data_path)


def read_options(workdir: Path) -> ConfigDict:
    """Returns `config.compare` of the experiment, with defaults where it says nothing."""
    options = base.get_config().compare
    stored = read_plan(workdir).get("compare", {})
    options.update(ConfigDict({k: v for k, v in stored.items() if k in options}))
    return options


def paired_runs(first: list[FinishedRun], second: list[FinishedRun]) -> list[tuple]:
    """Returns pairs of equal seed, or in order if there are none; [] if test images differ."""
    if not same_images(first[0], second[0]):
        return []
    by_seed = {run.seed: run for run in second}
    common = [(run, by_seed[run.seed]) for run in first if run.seed in by_seed]
    return common or list(zip(first, second, strict=False))


def make_table(groups: Groups, options: ConfigDict, audit: dict | None = None) -> pd.DataFrame:
    """Returns table.csv: a row per model and variant, the best first; shares are in 0..1.

    `seeds_ci95_*` is for other seeds on these images, `images_ci95_*` for these trained models on
    other images. `without_near_leaks` leaves out exact copies in another part, too.
    """
    rows, audit = [], audit or {"leaks": [], "near_leaks": []}
    for runs in groups.values():
        figures = pd.DataFrame([evaluate.evaluate(run) for run in runs]).drop(columns="accuracy")
        costs = pd.DataFrame([run.summary["cost"] for run in runs]).reindex(columns=COSTS)
        first, correct, ids = runs[0], correctness(runs), runs[0].test["ids"]
        accuracy = correct.mean(axis=1)
        over_seeds = uncertainty.seed_interval(accuracy, options.seed_interval)
        exact = np.isin(ids, list(itertools.chain(*audit["leaks"])))
        near = exact | np.isin(ids, list(itertools.chain(*audit["near_leaks"])))
        published = options.reference.get(first.model, math.nan)
        row = {
            "model": first.model,
            "variant": first.variant,
            "seeds": len(runs),
            "test_images": len(ids),
            "test_accuracy_mean": accuracy.mean(),
            "test_accuracy_std": accuracy.std(ddof=1) if len(runs) > 1 else math.nan,
            **uncertainty.ends("seeds", over_seeds),
            **uncertainty.ends("images", uncertainty.image_interval(correct)),
            "published": options.reference.get(first.label, published) / 100,
            "without_leaks": correct[:, ~exact].mean() if not exact.all() else math.nan,
            "leaks": int(exact.sum()),
            "without_near_leaks": correct[:, ~near].mean() if not near.all() else math.nan,
            "near_leaks": int(near.sum()),
            **figures.mean().add_suffix("_mean"),
            **costs.apply(pd.to_numeric).mean(),
            "image_size": first.config["data"]["image_size"],
            "device": first.summary["cost"]["device"],
            "runs": ";".join(run.name for run in runs),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def make_pairs(groups: Groups) -> pd.DataFrame:
    """Returns pairs.csv: a row per pair of models that were tested on the same images."""
    rows = []
    for first, second in itertools.combinations(groups, 2):
        pairs = paired_runs(groups[first], groups[second])
        if not pairs:
            continue
        correct = [correctness(list(runs)) for runs in zip(*pairs, strict=True)]
        names = {"first": first, "second": second}
        same = [(a.predicted == b.predicted).mean() for a, b in pairs]
        kappa = [_kappa(a.predicted, b.predicted) for a, b in pairs]
        agreement = {"agreement": np.mean(same), "kappa": np.mean(kappa)}
        rows.append(names | uncertainty.paired_difference(*correct) | agreement)
    if not rows:
        return pd.DataFrame()
    table = pd.DataFrame(rows)
    table["p_holm"] = uncertainty.holm(table["p"])
    table["p_mcnemar_holm"] = uncertainty.holm(table["p_mcnemar"])
    return table.assign(established=table["p_holm"] < ALPHA)


def _kappa(first: np.ndarray, second: np.ndarray) -> float:
    """Cohen's kappa; 1 where both always say the same one class."""
    return 1.0 if len(np.union1d(first, second)) == 1 else cohen_kappa_score(first, second)


def established(groups: Groups, pairs: pd.DataFrame) -> set[tuple[int, int]]:
    """Returns the ranks (i, j), i < j, of the pairs whose difference is established."""
    rank = {label: i for i, label in enumerate(groups)}
    return {(rank[r.first], rank[r.second]) for r in pairs.itertuples() if r.established}


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


def answer(table: pd.DataFrame, pairs: pd.DataFrame) -> str:
    """Returns the comparison in a sentence or two: which model, by how much, how sure."""
    if table.empty:
        return "No run is complete yet."
    printed, accuracies = tables.printed_table(table), table.test_accuracy_mean
    names, first = printed["model"], printed.iloc[0]
    intervals = f"{first['95 % over images']} over test images"
    if first["95 % over seeds"] != tables.NONE:
        intervals = f"{first['95 % over seeds']} over seeds, {intervals}"
    mean = f", mean of {table.seeds[0]} seeds" if table.seeds[0] > 1 else ""
    text = f"{names[0]} has the highest test accuracy: {first['test acc. %']} %{mean}"
    text += f" (95 % interval {intervals})"
    if len(table) == 1:
        return text + "."
    text += f", {tables.percent(accuracies[0] - accuracies[1])} points above {names[1]}"
    own = pairs[pairs["first"] == names[0]] if len(pairs) else pairs
    if own.empty:
        return text + ". They were tested on different images, so no difference can be established."
    for _, pair in tables.printed_pairs(own[own["second"] == names[1]]).iterrows():
        both = pair["95 % over seeds and images"] != tables.NONE
        over = "seeds and images" if both else "images"
        text += f" (95 % interval {pair[f'95 % over {over}']} over {over})"
    return f"{text}. {_verdict(own)}"


def _verdict(own: pd.DataFrame) -> str:
    """Which of the best model's differences are established, and by which test."""

    def listed(names: list[str]) -> str:
        return ", ".join(names[:-1]) + " and " * (len(names) > 1) + names[-1]

    unsure, single = own[~own.established]["second"].tolist(), own[own.seeds < 2]["second"].tolist()
    if not unsure:
        text = "It is ahead of every other model by more than chance explains"
    elif len(unsure) == len(own):
        text = "No difference from another model is established"
    else:
        text = f"The difference from {listed(unsure)} is not established"
    test = "over seeds and images, Holm-corrected"
    if len(single) == len(own):
        test = "McNemar's exact test, Holm-corrected: what another seed would give is unknown"
    elif single:
        test += f"; over images alone against {listed(single)}, compared at one seed"
    return f"{text} ({test})."


def write_tables(comparison: Comparison) -> None:
    """Writes every table into the report's folder; nothing where no run is complete."""
    groups, output = comparison.groups, output_folder(comparison.output, "report")
    if not groups:
        return
    table, pairs, confused = comparison.table, comparison.pairs, confused_along(groups)
    tables.write_table(table, tables.printed_table(table), output / "table")
    tables.write_table(pairs, tables.printed_pairs(pairs), output / "pairs")
    tables.write_table(confused, confused.round(1), output / "confused")
    only_one_right(groups).to_csv(output / "only_one_right.csv", index=False)
    each = [evaluate.classes_of(run).assign(run=run.name) for run in comparison.runs]
    pd.concat(each).to_csv(output / "per_class.csv", index=False)


def main(argv: list[str]) -> None:
    """Writes the tables of a workdir and prints the answer."""
    workdir = Path(arguments(argv, "analysis.compare WORKDIR")[0]).expanduser()
    comparison = compare(workdir, load_runs(workdir))
    if not comparison.groups:
        raise UserError(f"{workdir} holds no complete run (WORKDIR/<model>/seed<k>/summary.json)")
    write_tables(comparison)
    printed = tables.printed_table(comparison.table), tables.printed_pairs(comparison.pairs)
    print("\n".join(table.to_string(index=False) + "\n" for table in printed if len(table)))
    print(f"{answer(comparison.table, comparison.pairs)}\n\ntables: {comparison.output}")


if __name__ == "__main__":
    run_command(main)
