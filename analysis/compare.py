"""Which architecture is best, and how sure are we? Tables and statistics from saved predictions.

    python -m analysis.compare WORKDIR

Writes table, pairs, confused and only_one_right (.csv with every digit; .md and .tex to paste) into
WORKDIR/report and prints the answer. `python -m analysis.report WORKDIR` makes the page of it.
"""

import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
from ml_collections import ConfigDict
from sklearn.metrics import cohen_kappa_score

from analysis import evaluate, uncertainty
from analysis.page.tables import (
    labels_of,
    percent,
    percents,
    points,
    printed_pairs,
    printed_table,
    write_table,
)
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
from experiment.command import run_command

ALPHA = 0.05
COSTS = (
    "parameters",
    "flops_per_image",
    "seconds",
    "seconds_to_best",
    "train_images_per_second",
    "inference_images_per_second",
)

# --- runs -----------------------------------------------------------------------------------------


def read_options(workdir: Path) -> ConfigDict:
    """Returns `config.compare` of the experiment, with defaults where it says nothing."""
    options = base.get_config().compare
    stored = read_plan(workdir).get("compare", {})
    options.update(ConfigDict({k: v for k, v in stored.items() if k in options}))
    return options


def paired_runs(first: list[FinishedRun], second: list[FinishedRun]) -> list[tuple]:
    """Returns pairs of runs of equal seed, or in order where no seed is common.

    Empty if the two were not tested on the same images.
    """
    if not same_images(first[0], second[0]):
        return []
    by_seed = {run.seed: run for run in second}
    common = [(run, by_seed[run.seed]) for run in first if run.seed in by_seed]
    return common or list(zip(first, second, strict=False))


# --- a row per model ----------------------------------------------------------------------------


def leaked(groups: list[list[str]], ids: np.ndarray) -> np.ndarray:
    """Returns bool [N]: which test images are in one of the audit's groups across parts."""
    return np.isin(ids, [name for group in groups for name in group])


def make_table(groups: Groups, options: ConfigDict, audit: dict | None = None) -> pd.DataFrame:
    """Returns a row per model and variant, the best first; the columns of `table.csv`.

    Shares are in 0..1. `seeds_ci95_*` says where other seeds would move the mean on these images,
    `images_ci95_*` what these trained models would do on other images. Costs are means over seeds,
    measured on `device`, but for parameters and FLOPs, which are counted. `without_leaks` leaves
    out test images with an exact copy in another part, `without_near_leaks` near copies too.
    """
    rows = []
    for label, runs in groups.items():
        measured = pd.DataFrame([evaluate.evaluate(run) for run in runs])
        cost = pd.DataFrame([run.summary["cost"] for run in runs]).reindex(columns=COSTS)
        correct, ids = correctness(runs), runs[0].test["ids"]
        accuracy = correct.mean(axis=1)
        seeds = uncertainty.seed_interval(accuracy, options.seed_interval)
        images = uncertainty.image_interval(correct)
        audited = audit or {"leaks": [], "near_leaks": []}
        exact = leaked(audited["leaks"], ids)
        near = exact | leaked(audited["near_leaks"], ids)
        published = options.reference.get(label, options.reference.get(runs[0].model, math.nan))
        rows.append(
            {
                "model": runs[0].model,
                "variant": runs[0].variant,
                "seeds": len(runs),
                "test_images": len(ids),
                "test_accuracy_mean": accuracy.mean(),
                "test_accuracy_std": accuracy.std(ddof=1) if len(runs) > 1 else math.nan,
                "seeds_ci95_low": seeds[0],
                "seeds_ci95_high": seeds[1],
                "images_ci95_low": images[0],
                "images_ci95_high": images[1],
                "published": published / 100,
                "without_leaks": correct[:, ~exact].mean() if not exact.all() else math.nan,
                "leaks": int(exact.sum()),
                "without_near_leaks": correct[:, ~near].mean() if not near.all() else math.nan,
                "near_leaks": int(near.sum()),
                **{f"{name}_mean": measured[name].mean() for name in list(measured)[1:]},
                **{name: pd.to_numeric(cost[name]).mean() for name in COSTS},
                "image_size": runs[0].config["data"]["image_size"],
                "device": runs[0].summary["cost"]["device"],
                "runs": ";".join(run.name for run in runs),
            }
        )
    return pd.DataFrame(rows)


# --- a row per pair -----------------------------------------------------------------------------


def make_pairs(groups: Groups) -> pd.DataFrame:
    """Returns a row per pair of models, the higher ranked first; the columns of `pairs.csv`.

    `p` is over seeds and images where both have several seeds, else McNemar's, which is about
    these trained models alone; `p_holm` is corrected for the number of pairs, and a difference is
    `established` if it is under 0.05. `agreement` and `kappa` are of the predicted classes, means
    over seeds. Pairs tested on different images are left out.
    """
    rows = []
    for first, second in itertools.combinations(groups, 2):
        pairs = paired_runs(groups[first], groups[second])
        if not pairs:
            continue
        found = uncertainty.paired_difference(
            *(correctness(list(x)) for x in zip(*pairs, strict=True))
        )
        choices = [[run.predicted for run in pair] for pair in pairs]
        rows.append(
            {
                "first": first,
                "second": second,
                "seeds": found.seeds,
                "difference": found.mean,
                **_ends("both", found.over_both),
                **_ends("seeds", found.over_seeds),
                **_ends("images", found.over_images),
                "only_first": found.only_first,
                "only_second": found.only_second,
                "p_mcnemar": found.p_mcnemar,
                "p_both": found.p_both,
                "p": found.p,
                "agreement": np.mean([(a == b).mean() for a, b in choices]),
                "kappa": np.mean([_kappa(a, b) for a, b in choices]),
            }
        )
    table = pd.DataFrame(rows)
    if len(table):
        table["p_holm"] = uncertainty.holm(table["p"])
        table["p_mcnemar_holm"] = uncertainty.holm(table["p_mcnemar"])
        table["established"] = table["p_holm"] < ALPHA
    return table


def _ends(name: str, interval: uncertainty.Interval) -> dict[str, float]:
    return {f"{name}_ci95_low": interval[0], f"{name}_ci95_high": interval[1]}


def _kappa(first: np.ndarray, second: np.ndarray) -> float:
    """Cohen's kappa; 1 where both always say the same one class."""
    if len(np.union1d(first, second)) == 1:
        return 1.0
    return float(cohen_kappa_score(first, second))


def established(groups: Groups, pairs: pd.DataFrame) -> set[tuple[int, int]]:
    """Returns the ranks (i, j), i < j, of the pairs whose difference is established."""
    rank = {label: i for i, label in enumerate(groups)}
    return {(rank[r.first], rank[r.second]) for r in pairs.itertuples() if r.established}


# --- errors --------------------------------------------------------------------------------------


def majority_right(groups: Groups) -> pd.DataFrame:
    """Returns bool, a row per test image and a column per model: most of its seeds are right.

    Models tested on other images than the first are left out.
    """
    first = next(iter(groups.values()))[0]
    return pd.DataFrame(
        {
            label: correctness(runs).mean(axis=0) > 0.5
            for label, runs in groups.items()
            if same_images(runs[0], first)
        },
        index=pd.Index(first.test["ids"], name="id"),
    )


def only_one_right(groups: Groups) -> pd.DataFrame:
    """Returns the test images that exactly one model gets right: id, class, model."""
    right = majority_right(groups)
    run = next(iter(groups.values()))[0]
    alone = (right.sum(axis=1) == 1).to_numpy() & (right.shape[1] > 1)
    return pd.DataFrame(
        {
            "id": right.index[alone],
            "class": np.array(run.class_names, object)[run.test["labels"][alone]],
            "model": right.columns.to_numpy()[right.to_numpy()[alone].argmax(axis=1)],
        }
    )


def mean_confusion(runs: list[FinishedRun]) -> np.ndarray:
    """Returns float [K, K]: images by true (row) and predicted class, mean over seeds."""
    matrices = [evaluate.confusion(r.test["labels"], r.predicted, len(r.class_names)) for r in runs]
    return np.mean(matrices, axis=0)


def confused_along(groups: Groups, top: int = 2) -> pd.DataFrame:
    """Returns how pairs of classes are confused from model to model, the least accurate first.

    A row for each pair that is among the `top` of some model, a column per model: errors between
    the two classes, both ways, mean over seeds.
    """
    by_model = {label: mean_confusion(groups[label]) for label in reversed(groups)}
    names = next(iter(groups.values()))[0].class_names
    chosen = {
        tuple(sorted((row.first, row.second)))
        for counts in by_model.values()
        for row in evaluate.confused_pairs(counts).head(top).itertuples()
    }
    table = pd.DataFrame(
        [
            {"pair": f"{names[i]} / {names[j]}"}
            | {label: counts[i, j] + counts[j, i] for label, counts in by_model.items()}
            for i, j in sorted(chosen)
        ]
    )
    if table.empty:
        return table
    return table.iloc[np.argsort(-table.iloc[:, 1:].sum(axis=1), kind="stable")]


# --- words ---------------------------------------------------------------------------------------


def answer(table: pd.DataFrame, pairs: pd.DataFrame) -> str:
    """Returns the comparison in a sentence or two: which model, by how much, how sure."""
    if table.empty:
        return "No run is complete yet."
    names, first = labels_of(table), table.iloc[0]
    text = f"{names[0]} has the highest test accuracy: {percent(first.test_accuracy_mean)} %"
    chance = f"{percents(first.images_ci95_low, first.images_ci95_high)} over test images"
    if not math.isnan(first.seeds_ci95_low):
        chance = f"{percents(first.seeds_ci95_low, first.seeds_ci95_high)} over seeds, " + chance
    if first.seeds > 1:
        text += f", mean of {first.seeds} seeds"
    text += f" (95 % interval {chance})"
    if len(table) == 1:
        return text + "."
    second = table.iloc[1]
    gap = percent(first.test_accuracy_mean - second.test_accuracy_mean)
    text += f", {gap} points above {names[1]}"
    own = pairs[pairs["first"] == names[0]] if len(pairs) else pairs
    if own.empty:
        return text + ". They were tested on different images, so no difference can be established."
    next_best = own[own["second"] == names[1]]
    if len(next_best):
        low, high = next_best.iloc[0][["both_ci95_low", "both_ci95_high"]]
        what = "seeds and images"
        if math.isnan(low):
            low, high = next_best.iloc[0][["images_ci95_low", "images_ci95_high"]]
            what = "images"
        text += f" (95 % interval {points(low)} to {points(high)} over {what})"
    text += "."
    unsure = own[~own.established]["second"].tolist()
    if len(unsure) == 0:
        text += " It is ahead of every other model by more than chance explains"
    elif len(unsure) == len(own):
        text += " No difference from another model is established"
    else:
        text += f" The difference from {_listed(unsure)} is not established"
    if own.seeds.min() > 1:
        return text + " (over seeds and images, Holm-corrected)."
    if own.seeds.max() < 2:
        return text + (
            " (McNemar's exact test, Holm-corrected); this speaks of these trained networks: with"
            " one seed, what another seed would give is unknown."
        )
    single = _listed(own[own.seeds < 2]["second"].tolist())
    return text + (
        f" (over seeds and images, but over images alone against {single}, compared at one seed;"
        " Holm-corrected)."
    )


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def write_tables(groups: Groups, table: pd.DataFrame, pairs: pd.DataFrame, output: Path) -> None:
    """Writes every table into the report's folder; nothing where no run is complete."""
    if not groups:
        return
    write_table(table, printed_table(table), output / "table")
    if len(pairs):
        write_table(pairs, printed_pairs(pairs), output / "pairs")
    confused = confused_along(groups)
    if len(confused):
        write_table(confused, confused.round(1), output / "confused")
    only_one_right(groups).to_csv(output / "only_one_right.csv", index=False)
    each = [
        evaluate.per_class(r.test["labels"], r.predicted, r.class_names).assign(run=r.name)
        for runs in groups.values()
        for r in runs
    ]
    pd.concat(each).to_csv(output / "per_class.csv", index=False)


def main(argv: list[str]) -> int:
    """Writes the tables of a workdir and prints the answer."""
    if len(argv) != 2:
        raise UserError("usage: python -m analysis.compare WORKDIR")
    workdir = Path(argv[1]).expanduser()
    groups = group_runs(load_runs(workdir))
    if not groups:
        raise UserError(f"{workdir} holds no complete run (WORKDIR/<model>/seed<k>/summary.json)")
    audit = read_audit(workdir)
    table, pairs = make_table(groups, read_options(workdir), audit), make_pairs(groups)
    output = workdir / "report"
    output.mkdir(exist_ok=True)
    write_tables(groups, table, pairs, output)
    print(printed_table(table).to_string(index=False) + "\n")
    if len(pairs):
        print(printed_pairs(pairs).to_string(index=False) + "\n")
    print(f"{answer(table, pairs)}\n\ntables: {output}")
    return 0


if __name__ == "__main__":
    run_command(main)
