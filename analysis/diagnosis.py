"""What a learning curve says: the best epoch, the generalisation gap, and one of three verdicts.

"Late" is the median over the last quarter of the last phase, "lowest" the lowest running median of
the validation loss over a tenth of all evaluations (at least 3). The rules, in this order:

* overfits: the late validation loss lies 10 % above the lowest while the training loss fell on;
* still improving: the late validation loss lies 1 % below that of the quarter before, the best
  epoch is in the last quarter, and early stopping did not end the run;
* overfits: the late training accuracy lies 10 points above the late validation accuracy;
* stopped improving: none of these.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.page.section import Table
from analysis.page.tables import decimal, percent, points
from analysis.runs import FinishedRun, Groups

MIN_ROWS = 4  # evaluations that are judged; a shorter last phase counts with those before it
NOISE = 0.02  # changes of the validation loss that do not count, as a share of its fall
RISE, FALL = 0.10, 0.01  # of the validation loss, relative
GAP = 0.10  # between training and validation accuracy


@dataclass(frozen=True)
class Diagnosis:
    """The verdict on one run, and its numbers: NaN without a curve."""

    verdict: str  # overfits | still improving | stopped improving | no curve
    sentence: str
    epoch: float = math.nan  # of the lowest validation loss
    last_epoch: float = math.nan
    training_accuracy: float = math.nan  # at the best epoch, in 0..1
    validation_accuracy: float = math.nan
    late_gap: float = math.nan  # training minus validation accuracy at the end


def read_curve(lines: list[dict]) -> pd.DataFrame:
    """Returns epoch, phase, loss and accuracy of every evaluation that has training before it.

    Training values are means since the evaluation before, weighted by steps.
    """
    rows, since, last_step = [], [], 0
    for line in lines:
        if line["split"] == "train":
            since.append((line["step"] - last_step, line))
            last_step = line["step"]
        elif since and "accuracy" in since[-1][1]:
            row = {"epoch": line["epoch"], "phase": line.get("phase", "")}
            for name in ("loss", "accuracy"):
                values = np.array([trained[name] for _, trained in since], float)
                row[f"train_{name}"] = np.average(values, weights=[steps for steps, _ in since])
                row[f"validation_{name}"] = line[name]
            rows.append(row)
            since = []
    return pd.DataFrame(rows)


def diagnose(run: FinishedRun) -> Diagnosis:
    """Returns the verdict on a run's learning curve, by the rules at the top of this file."""
    curve = read_curve(run.metrics)
    if len(curve) < MIN_ROWS:
        few = f"{len(curve)} evaluations are too few to judge."
        return Diagnosis("no curve", few if len(curve) else "The model was not trained by steps.")
    phase = curve.phase.iloc[-1]
    in_phase = int((curve.phase == phase).sum())
    judged = in_phase if in_phase >= MIN_ROWS else len(curve)
    quarter = max(2, judged // 4)
    numbers = curve.drop(columns="phase").astype(float)
    late = numbers.iloc[-quarter:].median()
    before = numbers.validation_loss.iloc[-2 * quarter : -quarter].median()
    window = max(3, 2 * round(len(curve) / 20) + 1)
    smooth = numbers.rolling(window, center=True, min_periods=1).median()
    lowest = smooth.loc[smooth.validation_loss.idxmin()]
    best = numbers.loc[numbers.validation_loss.idxmin()]
    since_best = min(len(curve) - 1 - best.name, in_phase)
    everywhere = run.config["early_stopping_patience"]
    patience = run.config["phase"].get(phase, {}).get("early_stopping_patience", everywhere)
    stopped = 0 < patience <= since_best

    floor, end = lowest.validation_loss, late.validation_loss
    rise, fall, late_gap = end - floor, before - end, late.train_accuracy - late.validation_accuracy
    noise = NOISE * max(0, numbers.validation_loss.iloc[-judged] - floor)
    if rise > max(RISE * floor, noise) and late.train_loss < lowest.train_loss:
        verdict, why = "overfits", f"the validation loss ends {rise / floor:.0%} above its lowest"
    elif fall > max(FALL * before, noise) and since_best < quarter and not stopped:
        verdict, why = "still improving", f"the validation loss still fell by {fall / before:.1%}"
    elif late_gap > GAP:
        verdict, why = "overfits", f"the accuracies end {100 * late_gap:.0f} points apart"
    else:
        verdict, why = "stopped improving", "the validation loss no longer falls"
    last_epoch, accuracies = numbers.epoch.iloc[-1], (best.train_accuracy, best.validation_accuracy)
    sentence = (
        f"{verdict.capitalize()}: {why}. At the end, training accuracy is "
        f"{late.train_accuracy:.1%} and validation {late.validation_accuracy:.1%}. The weights of "
        f"epoch {best.epoch:.3g} of {last_epoch:.3g} are kept."
    )
    if stopped:
        sentence += f" Early stopping ended the run (patience {patience})."
    return Diagnosis(verdict, sentence, best.epoch, last_epoch, *accuracies, late_gap)


def diagnosis_table(groups: Groups) -> Table:
    """Returns a row per model: the verdict on each seed, and means over seeds."""
    rows = []
    for label, runs in groups.items():
        seeds = [f"{r.seed}" if r.fold is None else f"{r.seed} fold {r.fold}" for r in runs]
        diagnoses = pd.DataFrame([diagnose(run) for run in runs], index=seeds)
        seeds = diagnoses.groupby("verdict", sort=False).groups.items()
        by_seed = "; ".join(f"{verdict} (seed {', '.join(of)})" for verdict, of in seeds)
        verdict = by_seed if len(seeds) > 1 else diagnoses.verdict.iloc[0]
        mean = diagnoses.mean(numeric_only=True)  # leaves out NaN
        accuracies = mean.training_accuracy, mean.validation_accuracy
        cells = [decimal(epoch, 1) for epoch in (mean.epoch, mean.last_epoch)]
        cells += [percent(accuracy, 1) for accuracy in accuracies]
        cells += [points(gap, 1) for gap in (accuracies[0] - accuracies[1], mean.late_gap)]
        rows.append([label, verdict, *cells])
    columns = ["model", "verdict", "best epoch", "last epoch", "training acc. %"]
    columns += ["validation acc. %", "gap, points", "gap at end, points"]
    caption = (
        "Means over seeds; accuracies and their gap at the best epoch, that of the lowest "
        "validation loss. Training accuracy is measured under augmentation and dropout, so the "
        f"true gap is usually larger. Overfits: the loss ends {100 * RISE:.0f} % above its lowest, "
        f"or the gap above {100 * GAP:.0f} points (rules of thumb)."
    )
    return Table(columns, rows, caption)
