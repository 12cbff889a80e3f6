"""What do ensembles of finished runs gain, and at which cost?

    python -m analysis.ensembles WORKDIR [--data=PATH] [--output=DIR] [--nomodels]

From stored predictions: each model's seeds together, all models together, and a selection of them.
By running the models (--nomodels leaves this out): the average of the weights of a model's seeds,
and each image together with its horizontal flip. Validation makes every choice. With --output, also
writes ensembles.csv.
"""

from dataclasses import replace

import numpy as np
import pandas as pd
from absl import flags

from analysis.combine.gains import Row, clear_gains, clearly, distinct, figures, measure, printed
from analysis.combine.weights import model_rows
from analysis.compare import Comparison, compare_workdir
from analysis.evaluate import losses, mean_probability
from analysis.folds import first_folds
from analysis.page.section import Details, Section
from analysis.page.tables import percent
from analysis.runs import FinishedRun, Groups, same_images
from analysis.verdict import listed
from errors import UserError
from experiment.command import arguments, output_folder, run_command

ROUNDS = 25  # of greedy selection; what is best after one of them is kept
BEST_MEMBER = (
    "The best member has the highest accuracy on validation (or what config.select names; ties go "
    "by loss)."
)
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
        notes.append(f"No seed ensemble of a single seed: {listed(alone)}.")
    every = [run for runs in groups.values() for run in runs]
    pool = _largest_pool(every)
    if len(pool) < len(every):
        known = {run.path for run in pool}
        left = listed([run.name for run in every if run.path not in known])
        notes.append(f"Not among all models, as their images differ: {left}.")
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
    if pool[0].folds:
        notes[-1] += " One choice for all folds, though one validates on images that others test."
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
    seeds = clear_gains(table, "seed ensemble")
    parts = [f"seed ensembles {seeds}"] if seeds else []
    for row in table[table.kind == "all models together"].itertuples():
        against = clearly(row.over_best_ci95_low, row.over_best_ci95_high)
        parts.append(f"{row.what} ({percent(row.accuracy, 1)} %) are {against} the best of them")
    finding = "; ".join(parts) + "."
    how = [
        "An ensemble predicts with the mean of its members' probabilities (Lakshminarayanan et al. "
        "2017): softmax of the stored logits, without temperature.",
        "All models together: one member per model and seed, equally weighted. Greedy selection "
        "adds, with replacement, the member that lowers the validation loss most (Caruana et al. "
        "2004).",
        "“Clearly”: the 95 % interval of the gain leaves out 0. Intervals are over test images "
        "alone and say nothing about other seeds; two made-up images, one for and one against, "
        "keep them honest where few answers change.",
        BEST_MEMBER,
    ]
    return Section(
        "Ensembles",
        notes,
        [printed(table)],
        details=[Details("How ensembles are measured", how)],
        data={"rows": table.to_dict("records")},
        finding=finding[0].upper() + finding[1:],
    )


def averages_section(comparison: Comparison) -> Section | None:
    """What averaging weights and mirrored images gain; runs the models."""
    rows, notes = model_rows(comparison.groups, comparison.data_path)
    if not rows:
        return None
    table = figures(rows)
    parts = []
    for kind, verb in (("weight average", "averaged weights hold up"), ("flip averaging",) * 2):
        own = table[table.kind == kind]
        if len(own):
            held = own[own.used].label.tolist()
            names = f" ({listed(held, 3)})" if held else ""
            parts.append(f"{verb} for {len(held) or 'none'} of {len(own)} models{names}")
    finding = f"On validation, {', '.join(parts)}"
    if table.used.any():
        clear = table[table.used & (table.over_mean_ci95_low > 0)].what.tolist()
        gain = f"clear gain on test: {listed(clear, 3)}" if clear else "no clear gain on test"
        finding += f"; {gain}"
    how = [
        "Weight average (model soup; Wortsman et al. 2022): one network whose weights are the mean "
        "of those of a model's seeds: of all of them (uniform), or of the best and every other "
        "that does not lower the validation score (greedy). It holds up if its validation score is "
        "no lower than that of the best seed. Runs that start from the same pretrained weights may "
        "average well; runs from scratch seldom do. BatchNorm statistics are averaged, too, and "
        "not recomputed.",
        "Flip averaging: the mean probability of an image and its mirror image, for each seed by "
        "itself, if that raises the mean validation score of the seeds.",
        "On validation: the average against the best seed, or with flips against without. Test "
        "figures are given only where validation accepts. Intervals are over test images alone. "
        "A gain is clear if its interval leaves out 0.",
        BEST_MEMBER,
    ]
    return Section(
        "Averaged weights and flips",
        notes,
        [printed(table)],
        details=[Details("How averages are measured", how)],
        data={"rows": table.to_dict("records")},
        finding=f"{finding}.",
    )


def main(argv: list[str]) -> None:
    """Prints what ensembles of a workdir's runs gain."""
    usage = "analysis.ensembles WORKDIR [--data=PATH] [--output=DIR] [--nomodels]"
    comparison = compare_workdir(*arguments(argv, usage), DATA.value)
    makers = (ensembles_section, averages_section)[: 1 + MODEL_RUNS.value]
    groups = first_folds(comparison.groups)  # whose models are not asked of images they know
    given = comparison, replace(comparison, groups=groups)
    pairs = zip(makers, given, strict=False)
    sections = [section for make, of in pairs if (section := make(of))]
    if not sections:
        raise UserError(f"{comparison.workdir}: an ensemble needs two complete runs")
    for section in sections:
        table, how = section.tables[0], section.details[0].lines
        print("\n".join([str(table), table.caption, *section.text, section.finding, *how, ""]))
    if OUTPUT.value:
        file = output_folder(OUTPUT.value) / "ensembles.csv"
        rows = [row for section in sections for row in section.data["rows"]]
        pd.DataFrame(rows).to_csv(file, index=False)
        print(f"written to {file}")


if __name__ == "__main__":
    DATA = flags.DEFINE_string("data", "", "Where the data lies now, if it was moved")
    OUTPUT = flags.DEFINE_string("output", "", "Folder of ensembles.csv")
    MODEL_RUNS = flags.DEFINE_bool("models", True, "Run the models: averaged weights, flips")
    run_command(main)
