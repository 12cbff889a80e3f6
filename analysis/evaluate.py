"""How good is one run? Every figure and table that its saved predictions give.

    python -m analysis.evaluate RUN_OR_WORKDIR [--output=DIR]

With --output, also writes evaluation.json, per_class.csv, confusion.csv and losses.csv (every test
image, highest loss first) into a folder for each run. Temperature, threshold and sets of classes
are fitted on validation predictions; the rest is of test predictions.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from absl import flags
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from analysis.confidence import (
    LEVELS,
    TARGET,
    calibration_error,
    choose_threshold,
    error_by_chance,
    fit_sets,
    fit_temperature,
    losses,
    sets_of_classes,
    softmax,
)
from analysis.page.tables import decimal
from analysis.runs import FinishedRun, chosen_runs, clusters_of
from analysis.uncertainty import Family, Interval, ends, share_interval
from experiment.command import arguments, output_folder, run_command
from experiment.files import write_json

TOP_K = (2, 3, 5)


def top_k_accuracy(labels: np.ndarray, logits: np.ndarray, k: int) -> float:
    """Returns the share of images whose class is among the k highest logits; ties go by order."""
    own = logits[np.arange(len(labels)), labels][:, None]
    before = (logits == own) & (np.arange(logits.shape[1]) < labels[:, None])
    return float((((logits > own) | before).sum(axis=1) < k).mean())


def per_class(labels: np.ndarray, predicted: np.ndarray, class_names: list[str]) -> pd.DataFrame:
    """Returns a row per class: precision, recall, F1, support, predictions.

    Precision is NaN where the class is never predicted, recall and F1 where it has no images.
    """
    classes = range(len(class_names))
    options = {"labels": classes, "zero_division": np.nan}
    columns = precision_recall_fscore_support(labels, predicted, **options)
    names = ("precision", "recall", "f1", "support")
    table = pd.DataFrame({"class": class_names} | dict(zip(names, columns, strict=True)))
    table["f1"] = table.f1.fillna(0).where(table.support > 0)
    return table.assign(predicted=np.bincount(predicted, minlength=len(class_names)))


def ranking_values(positive: np.ndarray, score: np.ndarray) -> dict[str, np.ndarray]:
    """Returns values [N] whose means are AUROC and average precision, and vary as these do.

    A value is the measure plus N times what the image adds to it (for AUROC: DeLong et al. 1988);
    NaN where `positive`, bool [N], holds one kind only.
    """
    count, hits = len(score), int(positive.sum())
    if hits in (0, count):
        return {"auroc": np.full(count, np.nan), "average_precision": np.full(count, np.nan)}
    _, place = np.unique(score, return_inverse=True)  # equal scores share a place, lowest first
    every, right = np.bincount(place), np.bincount(place, positive)
    below = (np.cumsum(every - right) - (every - right) / 2) / (count - hits)
    above = (hits - np.cumsum(right) + right / 2) / hits
    auroc = (right * below).sum() / hits
    from_here = count - np.cumsum(every) + every  # images that score at least this
    precision = (hits - np.cumsum(right) + right) / from_here
    average = (right * precision).sum() / hits
    gained, lost = (np.cumsum(right * x / from_here)[place] for x in (1, precision))
    won = np.where(positive, below[place], above[place]) - auroc  # pairs with the other kind
    added = positive * (precision[place] - average + gained) - lost
    return {
        "auroc": auroc + count * won / np.where(positive, hits, count - hits),
        "average_precision": average + count * added / hits,
    }


def ranking(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Returns AUROC and average precision: of class 1 of two, else the mean over classes.

    A class counts, one against the rest, where it has some of the images and not all.
    """
    classes = [1] if probabilities.shape[1] == 2 else np.unique(labels)
    rows = [ranking_values(labels == k, probabilities[:, k]) for k in classes]
    rows = [{name: values.mean() for name, values in row.items()} for row in rows]
    return pd.DataFrame(rows).mean().to_dict()


def scores(labels: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """Returns the figures of a set of predictions, shares in 0..1.

    Macro averages are over classes with images, where the precision of one that is never predicted
    counts as 0; balanced accuracy is macro recall. The Brier score is summed over classes, 0 to 2.
    """
    probabilities, predicted = softmax(logits), logits.argmax(axis=1)
    classes, own = logits.shape[1], probabilities[np.arange(len(labels)), labels]
    table = per_class(labels, predicted, [str(i) for i in range(classes)])
    macro = table[table.support > 0][["precision", "recall", "f1"]].fillna(0).mean()
    return {
        "accuracy": float((labels == predicted).mean()),
        "balanced_accuracy": float(macro.recall),
        **macro.add_prefix("macro_").to_dict(),
        **{f"top{k}": top_k_accuracy(labels, logits, k) for k in TOP_K if k < classes},
        **ranking(labels, probabilities),
        "nll": float(losses(labels, logits).mean()),
        "brier": float(((probabilities**2).sum(axis=1) - 2 * own + 1).mean()),
        "ece": calibration_error(probabilities, labels),
    }


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Returns counts int [K, K]: row is the true class, column the predicted one."""
    return confusion_matrix(labels, predicted, labels=range(classes))


def confused_pairs(counts: np.ndarray) -> pd.DataFrame:
    """Returns pairs of classes with errors between them, the most confused first.

    `forth` images of `first` are taken for `second`, and `back`, which are no more, the other way.
    """
    i, j = np.triu_indices(len(counts), 1)
    turned = counts[j, i] > counts[i, j]
    first, second = np.where(turned, j, i), np.where(turned, i, j)
    table = pd.DataFrame({"first": first, "second": second})
    table["forth"], table["back"] = counts[first, second], counts[second, first]
    table["errors"] = table.forth + table.back
    by = ["errors", "first", "second"]
    table = table[table.errors > 0].sort_values(by, ascending=[False, True, True])
    return table.assign(share=table.errors / table.errors.sum()).reset_index(drop=True)


def evaluate(run: FinishedRun) -> dict[str, float]:
    """Returns `scores` of a run's test images, before and after scaling by temperature.

    `ece_expected` is the ECE of a perfectly calibrated model with these confidences, and
    `ece_excess_p` the chance that it has one as large as the run's. `nll_change_se` is the standard
    error of nll_scaled - nll. `answered` is the share whose confidence reaches the threshold that
    promises 95 % accuracy. `set90_coverage` is the share of images whose set of classes holds the
    true one, `set90_size` the mean number of classes in it; NaN where nothing is promised.
    """
    labels, logits, clusters = run.test["labels"], run.test["logits"], run.clusters
    known_labels, known_logits = run.validation["labels"], run.validation["logits"]
    plain, sets = softmax(logits), sets_fitted_to(run)
    scaled, answered, loss, temperature, threshold = _scaled(run)
    change = loss - losses(labels, logits)
    figures = scores(labels, logits) | {
        "validation_accuracy": float((known_logits.argmax(axis=1) == known_labels).mean()),
        "temperature": temperature,
        "ece_scaled": calibration_error(scaled, labels),
        "nll_scaled": float(loss.mean()),
        "nll_change_se": math.sqrt(Family({"": change[None]}, clusters).of_images(change, 0)[1]),
        "threshold": threshold,
        "answered": float(answered.mean()),
        "accuracy_answered": float(run.correct[answered].mean()) if answered.any() else math.nan,
    }
    for suffix, probabilities in (("", plain), ("_scaled", scaled)):
        chance = error_by_chance(probabilities, figures[f"ece{suffix}"], clusters)
        figures |= {f"ece{suffix}_expected": chance[0], f"ece{suffix}_excess_p": chance[1]}
    for level in LEVELS:
        coverage, size = coverage_of_sets(run, sets, level)
        name = f"set{100 * level:.0f}"
        figures |= {f"{name}_coverage": coverage.mean(), f"{name}_size": size.mean()}
    if logits.shape[1] == 2:
        for name, values in ranking_values(labels == 1, plain[:, 1]).items():
            figures |= ends(f"{name}_", ranking_interval(values, labels == 1, clusters))
    return figures


def _scaled(run: FinishedRun) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, float]:
    """Scaled probabilities [N, K], which are answered [N], losses [N]; temperature and threshold.

    Each fold of a cross-validation has its own two, fitted on its own validation images and used
    on its own test images, as the model of a fold would be; those returned are their means.
    """
    if run.folds:
        *arrays, temperatures, thresholds = zip(*map(_scaled, run.parts), strict=True)
        return *map(run.join, arrays), np.mean(temperatures), np.mean(thresholds)
    labels, logits, temperature = run.test["labels"], run.test["logits"], temperature_of(run)
    threshold = threshold_of(run, temperature)["confidence"]
    scaled = softmax(logits, temperature)
    answered = scaled.max(axis=1) >= threshold
    return scaled, answered, losses(labels, logits, temperature), temperature, threshold


def _validation(run: FinishedRun) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    return run.validation["logits"], run.validation["labels"], clusters_of(run.validation)


def mean_probability(runs: Sequence[FinishedRun], part: str = "test") -> np.ndarray:
    """Returns the mean of the runs' softmax on a part, not scaled: float64 [N, K]."""
    return sum(softmax(getattr(run, part)["logits"]) for run in runs) / len(runs)


def temperature_of(run: FinishedRun) -> float:
    """Returns the temperature that a run's validation images choose."""
    return fit_temperature(*_validation(run))


def threshold_of(run: FinishedRun, temperature: float, target: float = TARGET) -> dict:
    """Returns `choose_threshold` of a run's validation images, scaled by its temperature."""
    logits, labels, clusters = _validation(run)
    return choose_threshold(softmax(logits, temperature), labels, target, clusters)


def sets_fitted_to(run: FinishedRun) -> dict | list[dict]:
    """Returns `fit_sets` of a run's validation images; one for each fold, where there are any."""
    if run.folds:
        return [sets_fitted_to(part) for part in run.parts]
    return fit_sets(*_validation(run))


def coverage_of_sets(
    run: FinishedRun, fitted: dict | list[dict], level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns, for each test image, whether its set holds its class, and the set's size [N]."""
    if run.folds:
        pairs = zip(run.parts, fitted, strict=True)
        each = [coverage_of_sets(part, own, level) for part, own in pairs]
        return tuple(run.join(values) for values in zip(*each, strict=True))
    labels, logits = run.test["labels"], run.test["logits"]
    sets = sets_of_classes(logits, fitted, level)
    if sets is None:
        return np.full(len(labels), math.nan), np.full(len(labels), math.nan)
    return sets[np.arange(len(labels)), labels], sets.sum(axis=1)


def ranking_interval(
    values: np.ndarray, positive: np.ndarray, clusters: np.ndarray | None
) -> Interval:
    """Returns the 95 % interval of one of `ranking_values`; NaN where it is not defined."""
    family = Family({"": values[None]}, clusters)
    mean, variance = family.of_images(values, 0)
    if math.isnan(mean):
        return math.nan, math.nan
    groups = np.arange(len(values)) if clusters is None else clusters
    few = min(len(np.unique(groups[kind])) for kind in (positive, ~positive))
    # Scores of few images scatter less than they might: without this limit, 20 positives of 1,000
    # at an AUROC of 0.99 give intervals that hold the truth in 82 %.
    most = min(family.units, 3 * few)
    return share_interval(mean, variance, most, most=most)


def classes_of(run: FinishedRun) -> pd.DataFrame:
    """Returns `per_class` of a run's test predictions."""
    return per_class(run.test["labels"], run.predicted, run.class_names)


def confusion_of(run: FinishedRun) -> np.ndarray:
    """Returns `confusion` of a run's test predictions."""
    return confusion(run.test["labels"], run.predicted, len(run.class_names))


def highest_losses(run: FinishedRun) -> pd.DataFrame:
    """Returns id, classes, confidence and loss of test images, by loss; indexed by place."""
    labels, logits = run.test["labels"], run.test["logits"]
    names = np.array(run.class_names, object)
    columns = {
        "id": run.test["ids"],
        "true": names[labels],
        "predicted": names[run.predicted],
        "confidence": softmax(logits).max(axis=1),
        "loss": losses(labels, logits),
    }
    return pd.DataFrame(columns).sort_values("loss", ascending=False, kind="stable")


def describe(run: FinishedRun) -> str:
    """Returns the figures of a run as text."""
    names = run.class_names
    figures = ", ".join(f"{name} {decimal(value, 4)}" for name, value in evaluate(run).items())
    pairs = [
        f"  {names[p.first]} taken for {names[p.second]} {p.forth} times, the other way {p.back}"
        for p in confused_pairs(confusion_of(run)).head(3).itertuples()
    ]
    classes = classes_of(run).to_string(index=False, float_format="%.4f", na_rep="–")
    return "\n".join([f"{run.name}: {len(run.predicted)} test images", figures, classes, *pairs])


def write(run: FinishedRun, output: Path) -> None:
    """Writes evaluation.json and three tables of a run into a folder."""
    output_folder(output)
    figures = evaluate(run)
    threshold = threshold_of(run, figures["temperature"])
    content = {"run": str(run.path), "test": figures, "review_threshold": threshold}
    content["sets"] = sets_fitted_to(run)
    write_json(output / "evaluation.json", content)
    classes_of(run).to_csv(output / "per_class.csv", index=False)
    counts = pd.DataFrame(confusion_of(run), run.class_names, run.class_names)
    counts.to_csv(output / "confusion.csv", index_label="true \\ predicted")
    highest_losses(run).to_csv(output / "losses.csv", index=False)


def main(argv: list[str]) -> None:
    """Evaluates a run directory, or every complete run of a workdir."""
    (path,) = arguments(argv, "analysis.evaluate RUN_OR_WORKDIR [--output=DIR]")
    for run in chosen_runs(Path(path).expanduser()):
        print(describe(run) + "\n")
        if OUTPUT.value:
            folder = Path(OUTPUT.value).expanduser() / run.name
            write(run, folder)
            print(f"written to {folder}\n")


if __name__ == "__main__":
    OUTPUT = flags.DEFINE_string("output", "", "Folder for the tables")
    run_command(main)
