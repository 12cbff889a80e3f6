"""How good is one run? Every figure and table that its saved predictions give.

    python -m analysis.evaluate RUN_OR_WORKDIR [--output=DIR]

With --output, also writes evaluation.json, per_class.csv, confusion.csv and losses.csv (every test
image, highest loss first) into a folder for each run. Temperature and threshold are fitted on
validation predictions; the rest is of test predictions.
"""

import math
from pathlib import Path

import numpy as np
import pandas as pd
from absl import flags
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from analysis.runs import FinishedRun, chosen_runs
from experiment.command import arguments, output_folder, run_command
from experiment.files import write_json

BINS = 15  # of confidence, in the calibration error
TEMPERATURES = (0.05, 20.0)  # the range searched; a perfect validation score would want 0
TOP_K = (2, 3, 5)


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Returns probabilities float64 [N, K] of logits [N, K] divided by a temperature."""
    return np.exp(log_softmax(logits.astype(np.float64) / temperature, axis=1))


def losses(labels: np.ndarray, logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Returns the negative log-likelihood of each label in nats: float64 [N]."""
    log_probabilities = log_softmax(logits.astype(np.float64) / temperature, axis=1)
    return -log_probabilities[np.arange(len(labels)), labels]


def top_k_accuracy(labels: np.ndarray, logits: np.ndarray, k: int) -> float:
    """Returns the share of images whose class is among the k highest logits; ties go by order."""
    highest = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return float((highest == labels[:, None]).any(axis=1).mean())


def reliability(probabilities: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
    """Returns `images`, mean `confidence`, `accuracy` and lower end of each bin of confidence."""
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    sums = {"images": None, "confidence": confidence, "accuracy": correct}
    table = pd.DataFrame({name: np.bincount(place, of, BINS) for name, of in sums.items()})
    table[["confidence", "accuracy"]] = table[["confidence", "accuracy"]].div(table.images, axis=0)
    return table.assign(low=np.arange(BINS) / BINS)


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Returns the expected calibration error of the top class (Naeini et al. 2015)."""
    table = reliability(probabilities, labels).dropna()
    return float(((table.confidence - table.accuracy).abs() * table.images).sum() / len(labels))


def per_class(labels: np.ndarray, predicted: np.ndarray, class_names: list[str]) -> pd.DataFrame:
    """Returns a row per class: precision, recall, F1 (0 where undefined), support, predictions."""
    classes = range(len(class_names))
    columns = precision_recall_fscore_support(labels, predicted, labels=classes, zero_division=0)
    names = ("precision", "recall", "f1", "support")
    table = pd.DataFrame({"class": class_names} | dict(zip(names, columns, strict=True)))
    return table.assign(predicted=np.bincount(predicted, minlength=len(class_names)))


def scores(labels: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """Returns the figures of a set of predictions, shares in 0..1.

    Macro averages are over classes with images; the Brier score is summed over classes, 0 to 2.
    """
    probabilities, predicted = softmax(logits), logits.argmax(axis=1)
    classes, own = logits.shape[1], probabilities[np.arange(len(labels)), labels]
    table = per_class(labels, predicted, [str(i) for i in range(classes)])
    macro = table[table.support > 0][["precision", "recall", "f1"]].mean()
    return {
        "accuracy": float((labels == predicted).mean()),
        **macro.add_prefix("macro_").to_dict(),
        **{f"top{k}": top_k_accuracy(labels, logits, k) for k in TOP_K if k < classes},
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


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the temperature of least loss (Guo et al. 2017); 1 where all are as good."""

    def loss(log_temperature: float) -> float:
        return losses(labels, logits, np.exp(log_temperature)).mean()

    best = minimize_scalar(loss, bounds=np.log(TEMPERATURES), options={"xatol": 1e-6})
    return float(np.exp(best.x)) if loss(0.0) - best.fun > 1e-9 else 1.0


def coverage_curve(probabilities: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
    """Returns `coverage` and `accuracy` at each confidence taken as `threshold`, highest first."""
    correct = pd.Series(probabilities.argmax(axis=1) == labels)
    by_confidence = correct.groupby(probabilities.max(axis=1)).agg(["size", "sum"])
    answered = by_confidence[::-1].cumsum().rename_axis("threshold").reset_index()
    answered["coverage"] = answered["size"] / len(labels)
    answered["accuracy"] = answered["sum"] / answered["size"]
    return answered[["threshold", "coverage", "accuracy"]]


def choose_threshold(probabilities: np.ndarray, labels: np.ndarray, target: float = 0.95) -> dict:
    """Returns the least `confidence` whose `accuracy` is at `target` (inf if none), `coverage`."""
    curve = coverage_curve(probabilities, labels)
    enough = curve[curve.accuracy >= target]
    confidence, coverage, accuracy = math.inf, 0.0, math.nan
    if len(enough):
        confidence, coverage, accuracy = map(float, enough.iloc[-1])
        confidence = 0.0 if coverage == 1 else confidence
    return dict(confidence=confidence, accuracy=accuracy, coverage=coverage, target=target)


def evaluate(run: FinishedRun) -> dict[str, float]:
    """Returns `scores` of a run's test images, before and after scaling by temperature.

    `answered` is the share whose confidence reaches the threshold of 95 % validation accuracy.
    """
    labels, logits = run.test["labels"], run.test["logits"]
    known_labels, known_logits = run.validation["labels"], run.validation["logits"]
    temperature = fit_temperature(known_logits, known_labels)
    scaled = softmax(logits, temperature)
    threshold = choose_threshold(softmax(known_logits, temperature), known_labels)["confidence"]
    answered = scaled.max(axis=1) >= threshold
    return scores(labels, logits) | {
        "validation_accuracy": float((known_logits.argmax(axis=1) == known_labels).mean()),
        "temperature": temperature,
        "ece_scaled": calibration_error(scaled, labels),
        "nll_scaled": float(losses(labels, logits, temperature).mean()),
        "threshold": threshold,
        "answered": float(answered.mean()),
        "accuracy_answered": float(run.correct[answered].mean()) if answered.any() else math.nan,
    }


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
    figures = ", ".join(f"{name} {value:.4f}" for name, value in evaluate(run).items())
    pairs = [
        f"  {names[p.first]} taken for {names[p.second]} {p.forth} times, the other way {p.back}"
        for p in confused_pairs(confusion_of(run)).head(3).itertuples()
    ]
    classes = classes_of(run).to_string(index=False, float_format="%.4f")
    return "\n".join([f"{run.name}: {len(run.predicted)} test images", figures, classes, *pairs])


def write(run: FinishedRun, output: Path) -> None:
    """Writes evaluation.json and three tables of a run into a folder."""
    output_folder(output)
    figures = evaluate(run)
    probabilities = softmax(run.validation["logits"], figures["temperature"])
    threshold = choose_threshold(probabilities, run.validation["labels"])
    content = {"run": str(run.path), "test": figures, "review_threshold": threshold}
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
