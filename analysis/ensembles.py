"""What do ensembles of finished runs gain, and at which cost?

    python -m analysis.ensembles WORKDIR [--data=PATH] [--output=DIR] [--nomodels]

From stored predictions: each model's seeds together, all models together, and a selection of them.
By running the models (--nomodels leaves this out): the average of the weights of a model's seeds,
and each image together with its mirror image. Validation makes every choice. With --output, also
writes ensembles.csv.
"""

import numpy as np
import pandas as pd
from absl import flags

from analysis.combine.gains import Row, distinct, figures, measure, printed, spread_of_gains
from analysis.combine.weights import model_rows
from analysis.compare import Comparison, compare_workdir
from analysis.evaluate import losses, mean_probability
from analysis.page.section import Section
from analysis.page.tables import percent, points
from analysis.runs import FinishedRun, Groups, same_images
from analysis.verdict import listed
from errors import UserError
from experiment.command import arguments, output_folder, run_command

ROUNDS = 25  # of greedy selection; what is best after one of them is kept
LEAST = 1e-6  # nats of validation loss that further members must save


def select_members(own: np.ndarray) -> list[int]:
    """Returns the members of greedy ensemble selection with replacement (Caruana et al. 2004).

    `own` is each member's probability of the true class on validation, float [M, N]: the loss of
    their mean needs no more.
    """
    chosen, total, losses = [], np.zeros(own.shape[1]), []
    for count in range(1, ROUNDS + 1):
        mean = np.maximum((total + own) / count, np.finfo(float).tiny)
        loss = -np.log(mean).mean(axis=1)
        chosen.append(int(loss.argmin()))
        losses.append(loss.min())
        total += own[chosen[-1]]
    # The first of a few may stay alone for a while: a second then counts less than half.
    enough = np.array(losses) <= min(losses) + LEAST
    return sorted(chosen[: enough.argmax() + 1])


def _alike(first: FinishedRun, second: FinishedRun) -> bool:
    ids = [run.validation["ids"] for run in (first, second)]
    classes = first.class_names == second.class_names
    return classes and same_images(first, second) and np.array_equal(*ids)


def _largest_pool(runs: list[FinishedRun]) -> list[FinishedRun]:
    """The most runs that were validated and tested on the same images."""
    pools: list[list[FinishedRun]] = []
    for run in runs:
        pool = next((pool for pool in pools if _alike(pool[0], run)), None)
        if pool is None:
            pools.append(pool := [])
        pool.append(run)
    return max(pools, key=len)


def stored_rows(groups: Groups) -> tuple[list[Row], list[str]]:
    """Returns the ensembles that stored predictions give, and what was left out."""
    rows, notes = [], []
    for label, runs in groups.items():
        if len(runs) > 1:
            rows.append(measure("seed ensemble", label, runs, [mean_probability(runs)]))
    if alone := [label for label, runs in groups.items() if len(runs) < 2]:
        notes.append(f"One seed makes no ensemble: {listed(alone)}.")
    every = [run for runs in groups.values() for run in runs]
    pool = _largest_pool(every)
    if len(pool) < len(every):
        known = {run.path for run in pool}
        left = listed([run.name for run in every if run.path not in known])
        notes.append(f"Not among all models, for their images differ: {left}.")
    models = len({run.label for run in pool})
    if models < 2:
        return rows, notes
    text = f"{len(pool)} ({models} models)"
    rows.append(measure("all models together", "", pool, [mean_probability(pool)], text=text))
    labels = pool[0].validation["labels"]
    own = [np.exp(-losses(labels, run.validation["logits"])) for run in pool]
    bag = [pool[i] for i in select_members(np.array(own))]
    chosen = distinct(bag)
    counts = [(run.name, sum(run is other for other in bag)) for run in chosen]
    names = [f"{name} × {count}" if count > 1 else name for name, count in counts]
    notes.append(f"Greedy selection on validation chose {listed(names)}.")
    if len(chosen) > 1:
        text = f"{len(chosen)} of {len(pool)}"
        rows.append(measure("greedy selection", "", bag, [mean_probability(bag)], text=text))
    return rows, notes


def ensembles_section(comparison: Comparison) -> Section | None:
    """What averaging stored predictions gains; None where there is nothing to average."""
    rows, notes = stored_rows(comparison.groups)
    if not rows:
        return None
    table = figures(rows)
    seeds = spread_of_gains(table, "seed ensemble", "their mean")
    parts = [f"A model's seeds together gain {seeds}"] if seeds else []
    for row in table[table.label == ""].itertuples():
        parts.append(
            f"{row.what}: {percent(row.accuracy)} %, {points(row.over_best)} points over the best "
            f"member ({points(row.over_best_ci95_low)} to {points(row.over_best_ci95_high)})"
        )
    text = (
        "An ensemble answers with the mean of its members' probabilities (Lakshminarayanan et al. "
        "2017): softmax of the stored logits, not scaled by a temperature. All models together: "
        "one member per model and seed, of equal weight. Greedy selection adds, with replacement, "
        "the member that lowers the validation loss most (Caruana et al. 2004). These seeds are "
        "one draw: intervals are over test images alone and say nothing of other seeds."
    )
    return Section(
        "Ensembles",
        [text, *notes],
        [printed(table)],
        data={"rows": table.to_dict("records")},
        finding=". ".join(part[0].upper() + part[1:] for part in parts) + ".",
    )


def averages_section(comparison: Comparison) -> Section | None:
    """What averaging weights and mirrored images gain; runs the models."""
    rows, notes = model_rows(comparison.groups, comparison.data_path)
    if not rows:
        return None
    table = figures(rows)
    soups, flips = (table[table.kind == kind] for kind in ("weight average", "with mirror image"))
    parts = []
    for own, verb, over in (
        (soups, "The average of the weights holds", "the mean of the seeds averaged"),
        (flips, "Mirror images help", "the same networks without"),
    ):
        if len(own):
            held = own[own.used].label.tolist()
            parts.append(f"{verb} on validation for {len(held)} of {len(own)} models")
            parts[-1] += f" ({listed(held, 3)})" if held else ""
            gain = spread_of_gains(own, own.kind.iloc[0], over)
            parts[-1] += f", on test {gain}" if gain else ""
    text = [
        "Weight average (soup; Wortsman et al. 2022): one network whose weights are the mean of "
        "those of a model's seeds, all of them (uniform), or from the best on each that does not "
        "lower the validation score (greedy). It holds where validation is no worse than with the "
        "best seed alone. Trainings from scratch seldom average; from the same pretrained weights "
        "they may. BatchNorm statistics are averaged as they are, not computed anew.",
        "With mirror image: the mean probability of an image and its mirror image, for each seed "
        "by itself, where that raises the mean validation score of the seeds. Test figures are "
        "given only of what validation chose. Intervals are over test images alone.",
        "On validation: the average against the best seed, with against without mirror images; "
        "no means that it does not hold.",
    ]
    return Section(
        "Averaged weights and mirror images",
        [*text, *notes],
        [printed(table)],
        data={"rows": table.to_dict("records")},
        finding=". ".join(parts) + ".",
    )


def main(argv: list[str]) -> None:
    """Prints what ensembles of a workdir's runs gain."""
    usage = "analysis.ensembles WORKDIR [--data=PATH] [--output=DIR] [--nomodels]"
    comparison = compare_workdir(*arguments(argv, usage), DATA.value)
    makers = (ensembles_section, averages_section)[: 1 + MODEL_RUNS.value]
    sections = [section for make in makers if (section := make(comparison))]
    if not sections:
        raise UserError(f"{comparison.workdir}: an ensemble needs two complete runs")
    for section in sections:
        (table,) = section.tables
        print("\n".join([str(table), table.caption, *section.text, section.finding, ""]))
    if OUTPUT.value:
        file = output_folder(OUTPUT.value) / "ensembles.csv"
        rows = [row for section in sections for row in section.data["rows"]]
        pd.DataFrame(rows).to_csv(file, index=False)
        print(f"written to {file}")


if __name__ == "__main__":
    DATA = flags.DEFINE_string("data", "", "Where the data lies now, if it was moved")
    OUTPUT = flags.DEFINE_string("output", "", "Folder of ensembles.csv")
    MODEL_RUNS = flags.DEFINE_bool("models", True, "Run the models: weights and mirror images")
    run_command(main)
