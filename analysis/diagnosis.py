"""What a learning curve says: does the run overfit, underfit, diverge, or would more epochs help?

The rules, in this order, on a row per evaluation on validation images (see `read_curve`). "Late"
is the median of the last quarter of the last phase's rows, "smooth" a running median over a tenth
of all rows (at least 3), and the scale of a curve is the first validation loss of the last phase
minus the lowest smooth one. Changes of the validation loss below 2 % of it are taken for noise. A
last phase of fewer than 4 rows is judged together with those before it.

1. no curve: fewer than 4 rows; models that are fitted at once have none.
2. diverged: a loss that is not finite, or a late training loss 20 % above the first one.
3. overfits: the late validation loss lies 10 % above the lowest smooth one, while the training loss
   fell on.
4. still improving: the late validation loss is lower than that of the quarter before by 1 %, the
   lowest one lies in the last quarter, and it was not early stopping that ended the run.
5. overfits: the late training accuracy lies 10 points above that on validation images.
6. underfits: neither late accuracy, of training or validation, reaches 80 %.
7. well fitted: none of these.

The thresholds are rules of thumb. Training metrics are measured while the weights move, under
augmentation, dropout and label smoothing, all of which make them worse: the true generalisation gap
is usually larger than the one given here, and a training loss above the validation loss is no
contradiction.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.page.section import Table
from analysis.runs import FinishedRun

MIN_ROWS = 4
NOISE = 0.02  # of the scale of a curve
RISE = 0.10  # of the validation loss, relative
FALL = 0.01  # of the validation loss, relative
GAP = 0.10  # between training and validation accuracy
LOW = 0.80  # accuracy
EXPLODED = 1.20  # late training loss divided by the first


@dataclass(frozen=True)
class Diagnosis:
    """The verdict on one run and the numbers behind it; NaN where there is none.

    `epoch` is that of the lowest validation loss, whose weights are kept, or of the break if the
    run diverged. Accuracies are in 0..1 and, like `gap` (training minus validation), of the best
    epoch; `late_gap` is of the end.
    """

    verdict: str  # overfits | still improving | underfits | well fitted | diverged | no curve
    sentence: str
    epoch: float = math.nan
    last_epoch: float = math.nan
    validation_loss: float = math.nan  # the lowest
    training_accuracy: float = math.nan
    validation_accuracy: float = math.nan
    late_training_accuracy: float = math.nan
    late_validation_accuracy: float = math.nan
    rise: float = math.nan  # of the late validation loss above the lowest smooth one, relative
    fall: float = math.nan  # of the late validation loss below the quarter before, relative

    @property
    def gap(self) -> float:
        """Training minus validation accuracy at the best epoch."""
        return self.training_accuracy - self.validation_accuracy

    @property
    def late_gap(self) -> float:
        """Training minus validation accuracy at the end."""
        return self.late_training_accuracy - self.late_validation_accuracy


def read_curve(lines: list[dict]) -> pd.DataFrame:
    """Returns a row per evaluation: epoch, phase, and loss and accuracy of training and validation.

    Training values are means over the steps since the evaluation before, weighted by steps. An
    evaluation without training before it, and training without an evaluation after it, is left out.

    Args:
      lines: of metrics.jsonl; a loss that was not finite is None there.
    """
    rows, since, last_step = [], [], 0
    for line in lines:
        if line["split"] == "train":
            since.append((line["step"] - last_step, line))
            last_step = line["step"]
        elif since and "accuracy" in since[-1][1]:
            steps = np.array([count for count, _ in since], float)
            row = {"epoch": line["epoch"], "phase": line.get("phase", "")}
            for value in ("loss", "accuracy"):
                measured = np.array([one[value] for _, one in since], float)
                row[f"train_{value}"] = np.average(measured, weights=steps)
                row[f"validation_{value}"] = np.array(line[value], float)
            rows.append(row)
            since = []
    return pd.DataFrame(rows)


def diagnose(run: FinishedRun) -> Diagnosis:
    """Returns the verdict on the learning curve of a run, by the rules at the top of this file."""
    broken = _first_break(run.metrics)
    if broken is not None or run.status == "diverged":
        where = "" if broken is None else f" in epoch {broken:.3g}"
        sentence = f"Diverged: the loss stopped being finite{where}."
        return Diagnosis("diverged", sentence, math.nan if broken is None else broken)
    curve = read_curve(run.metrics)
    if len(curve) < MIN_ROWS:
        few = f"{len(curve)} evaluations are too few to judge."
        return Diagnosis("no curve", few if len(curve) else "The model was not trained by steps.")
    return _judge(curve, _patience(run.config, curve.phase.iloc[-1]))


def _first_break(lines: list[dict]) -> float | None:
    """Returns the epoch of the first line whose loss is not finite."""
    for line in lines:
        if line["loss"] is None or not math.isfinite(line["loss"]):
            return line["epoch"]
    return None


def _patience(config: dict, phase: str) -> int:
    """Returns the evaluations without progress after which a phase ends, 0 for never."""
    everywhere = config.get("early_stopping_patience", 0)
    return config.get("phase", {}).get(phase, {}).get("early_stopping_patience", everywhere)


def _judge(curve: pd.DataFrame, patience: int) -> Diagnosis:
    in_phase = int((curve.phase == curve.phase.iloc[-1]).sum())
    judged = in_phase if in_phase >= MIN_ROWS else len(curve)
    quarter = max(2, judged // 4)
    late = curve.drop(columns="phase").iloc[-quarter:].median()
    before = curve.validation_loss.iloc[-2 * quarter : -quarter].median()
    window = max(3, 2 * round(len(curve) / 20) + 1)
    smooth = curve[["train_loss", "validation_loss"]].rolling(window, center=True, min_periods=1)
    smooth = smooth.median()
    lowest = smooth.validation_loss.argmin()
    floor = smooth.validation_loss.iloc[lowest]
    noise = NOISE * max(0, curve.validation_loss.iloc[-judged] - floor)
    best = int(curve.validation_loss.argmin())
    since_best = min(len(curve) - 1 - best, in_phase)
    rise, fall = late.validation_loss / floor - 1, 1 - late.validation_loss / before
    rises = rise > RISE and late.validation_loss - floor > noise
    falls = fall > FALL and before - late.validation_loss > noise
    stopped = 0 < patience <= since_best

    if late.train_loss > EXPLODED * curve.train_loss.iloc[0]:
        verdict = "diverged"
    elif rises and late.train_loss < smooth.train_loss.iloc[lowest]:
        verdict = "overfits"
    elif falls and since_best < quarter and not stopped:
        verdict = "still improving"
    elif late.train_accuracy - late.validation_accuracy > GAP:
        verdict = "overfits"
    elif max(late.train_accuracy, late.validation_accuracy) < LOW:
        verdict = "underfits"
    else:
        verdict = "well fitted"
    row = curve.iloc[best]
    numbers = {
        "epoch": row.epoch,
        "last_epoch": curve.epoch.iloc[-1],
        "validation_loss": row.validation_loss,
        "training_accuracy": row.train_accuracy,
        "validation_accuracy": row.validation_accuracy,
        "late_training_accuracy": late.train_accuracy,
        "late_validation_accuracy": late.validation_accuracy,
        "rise": rise,
        "fall": fall,
    }
    numbers = {name: float(value) for name, value in numbers.items()}
    return Diagnosis(verdict, _sentence(verdict, numbers, rises, stopped, patience), **numbers)


def _sentence(verdict: str, n: dict, rises: bool, stopped: bool, patience: int) -> str:
    training, validation = n["late_training_accuracy"], n["late_validation_accuracy"]
    accuracies = f"at the end, training accuracy is {training:.1%} and validation {validation:.1%}"
    match verdict:
        case "diverged":
            text = f"Diverged: the training loss ends far above its beginning; {accuracies}"
        case "overfits" if rises:
            text = (
                f"Overfits from epoch {n['epoch']:.3g} on: in the end the validation loss lies "
                f"{n['rise']:.0%} above its lowest, while the training loss fell on; {accuracies}"
            )
        case "overfits":
            text = (
                f"Overfits from epoch {n['epoch']:.3g} on: since then the validation loss has not "
                f"fallen, and the accuracies lie {100 * (training - validation):.0f} points "
                f"apart; {accuracies}"
            )
        case "still improving":
            text = (
                f"Not converged: the validation loss still fell by {n['fall']:.1%} over the last "
                f"quarter, so more epochs may help; {accuracies}"
            )
        case "underfits":
            text = (
                f"Underfits: {accuracies}, and neither rises any more; a larger model, a higher "
                "learning rate or less regularisation may help"
            )
        case _:
            text = f"Well fitted: the validation loss has settled; {accuracies}"
    text += f". The weights of epoch {n['epoch']:.3g} of {n['last_epoch']:.3g} are kept"
    return text + (f"; early stopping ended the run (patience {patience})." if stopped else ".")


def diagnosis_table(groups: dict[str, list[FinishedRun]]) -> Table:
    """Returns a row per model: the verdict on each seed, and means over seeds.

    Means leave out runs without such a number; "–" where there is none at all.
    """

    def mean(values: list[float], scale: float = 1.0, sign: str = "") -> str:
        finite = [value for value in values if math.isfinite(value)]
        return f"{scale * np.mean(finite):{sign}.1f}" if finite else "–"

    rows = []
    for label, runs in groups.items():
        found = [diagnose(run) for run in runs]
        seeds: dict[str, list[str]] = {}
        for run, one in zip(runs, found, strict=True):
            seeds.setdefault(one.verdict, []).append(str(run.seed))
        by_seed = "; ".join(f"{verdict} (seed {', '.join(n)})" for verdict, n in seeds.items())
        rows.append(
            [
                label,
                found[0].verdict if len(seeds) == 1 else by_seed,
                mean([one.epoch for one in found]),
                mean([one.last_epoch for one in found]),
                mean([one.training_accuracy for one in found], 100),
                mean([one.validation_accuracy for one in found], 100),
                mean([one.gap for one in found], 100, "+"),
                mean([one.late_gap for one in found], 100, "+"),
                mean([one.rise for one in found], 100, "+"),
            ]
        )
    columns = ["model", "verdict", "best epoch", "last epoch", "training acc. %"]
    columns += ["validation acc. %", "gap, points", "gap at the end, points"]
    columns += ["rise of validation loss, %"]
    caption = (
        "What the learning curves say; numbers are means over seeds. Accuracies and their gap "
        "(training minus validation) are those of the best epoch, the one of the lowest validation "
        "loss, whose weights are kept. Training accuracy is measured under augmentation and "
        "dropout, so the true gap is usually larger. Overfits: the validation loss ends more "
        f"than {RISE:.0%} above its lowest, or the gap ends above {100 * GAP:.0f} points. Still "
        "improving: the validation loss fell to the last, so more epochs may help. Underfits: "
        f"neither accuracy reaches {LOW:.0%}. These limits are rules of thumb."
    )
    return Table(columns, rows, caption)
