"""How good is one run? Every number and list that its saved predictions give.

    python -m analysis.evaluate RUN_OR_WORKDIR [--output=DIR]

Prints the numbers of each complete run; with --output, also writes evaluation.json, per_class.csv,
confusion.csv and losses.csv (every test image, highest loss first) into a folder for each.
Temperature and thresholds are fitted on validation predictions, everything else is measured on test
predictions.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from absl import flags
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from analysis.runs import FinishedRun, chosen_runs
from errors import UserError
from experiment.command import run_command
from experiment.files import write_json

BINS = 15  # of confidence, in the calibration error
TEMPERATURES = (0.05, 20.0)  # the range searched; a perfect validation score would want 0
TOP_K = (2, 3, 5)

# --- numbers of predictions -----------------------------------------------------------------------


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Returns probabilities float64 [N, K] of logits [N, K] divided by a temperature."""
    return np.exp(log_softmax(logits.astype(np.float64) / temperature, axis=1))


def losses(labels: np.ndarray, logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Returns the negative log-likelihood of each label: float64 [N], in nats."""
    log_probabilities = log_softmax(logits.astype(np.float64) / temperature, axis=1)
    return -log_probabilities[np.arange(len(labels)), labels]


def top_k_accuracy(labels: np.ndarray, logits: np.ndarray, k: int) -> float:
    """Returns the share of images whose class is among the k highest logits; ties go by order."""
    own = logits[np.arange(len(labels)), labels][:, None]
    before = np.arange(logits.shape[1]) < labels[:, None]
    rank = ((logits > own) | ((logits == own) & before)).sum(axis=1)
    return float((rank < k).mean())


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> pd.DataFrame:
    """Returns, for each bin of the top class's confidence, `images`, `confidence`, `accuracy`.

    Args:
      probabilities: [N, K], rows that sum to 1.
      labels: int [N].
      bins: of equal width; those without images have NaN.
    """
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    images = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        return pd.DataFrame(
            {
                "low": np.arange(bins) / bins,
                "images": images,
                "confidence": np.bincount(place, confidence, bins) / images,
                "accuracy": np.bincount(place, correct, bins) / images,
            }
        )


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error (Naeini et al. 2015) of the top class, bins of equal width."""
    table = reliability(probabilities, labels, bins).dropna()
    gap = (table.confidence - table.accuracy).abs()
    return float((gap * table.images).sum() / len(labels))


def per_class(labels: np.ndarray, predicted: np.ndarray, class_names: list[str]) -> pd.DataFrame:
    """Returns a row per class: precision, recall, F1, support, and how often it was predicted.

    A class never predicted has precision 0; one without test images has recall 0.
    """
    classes = range(len(class_names))
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=classes, zero_division=0
    )
    return pd.DataFrame(
        {
            "class": class_names,
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "support": support,
            "predicted": np.bincount(predicted, minlength=len(class_names)),
        }
    )


def measure(labels: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """Returns the figures of one set of predictions, shares in 0..1.

    Macro averages are over the classes that have images. The Brier score is the sum over classes
    of squared errors (0 to 2), as Brier (1950) defined it.
    """
    probabilities, predicted = softmax(logits), logits.argmax(axis=1)
    classes, own = logits.shape[1], probabilities[np.arange(len(labels)), labels]
    table = per_class(labels, predicted, [str(i) for i in range(classes)])
    macro = table[table.support > 0][["precision", "recall", "f1"]].mean()
    return {
        "accuracy": float((labels == predicted).mean()),
        "macro_precision": float(macro.precision),
        "macro_recall": float(macro.recall),
        "macro_f1": float(macro.f1),
        **{f"top{k}": top_k_accuracy(labels, logits, k) for k in TOP_K if k < classes},
        "nll": float(losses(labels, logits).mean()),
        "brier": float(((probabilities**2).sum(axis=1) - 2 * own + 1).mean()),
        "ece": calibration_error(probabilities, labels),
    }


# --- confusion ------------------------------------------------------------------------------------


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Returns counts int [K, K]: row is the true class, column the predicted one."""
    return confusion_matrix(labels, predicted, labels=range(classes))


def row_shares(counts: np.ndarray) -> np.ndarray:
    """Returns a confusion matrix with rows that sum to 1; a class without images has zeros."""
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def confused_pairs(counts: np.ndarray) -> pd.DataFrame:
    """Returns pairs of classes with errors between them, the most confused first.

    Columns: `first` and `second` (class numbers, the more frequent error is first -> second),
    `forth` and `back` (errors either way), `errors` (their sum), `share` of all errors.
    """
    i, j = np.triu_indices(len(counts), 1)
    turned = counts[j, i] > counts[i, j]
    first, second = np.where(turned, j, i), np.where(turned, i, j)
    table = pd.DataFrame({"first": first, "second": second})
    table["forth"], table["back"] = counts[first, second], counts[second, first]
    table["errors"] = table.forth + table.back
    table = table[table.errors > 0]
    table["share"] = table.errors / table.errors.sum()
    return table.sort_values(
        ["errors", "first", "second"], ascending=[False, True, True], ignore_index=True
    )


# --- fitted on validation ---------------------------------------------------------------------


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the temperature that minimises the loss of these logits (Guo et al. 2017).

    Give validation predictions. Where every temperature is as good (constant logits), it is 1.
    """
    found = minimize_scalar(
        lambda log_t: losses(labels, logits, np.exp(log_t)).mean(),
        bounds=np.log(TEMPERATURES),
        method="bounded",
        options={"xatol": 1e-6},
    )
    better = losses(labels, logits).mean() - found.fun > 1e-9
    return float(np.exp(found.x)) if better else 1.0


def coverage_curve(probabilities: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
    """Returns what answering only above a confidence gives: `threshold`, `coverage`, `accuracy`.

    One row per distinct confidence, the highest first; images of equal confidence are answered
    together.
    """
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    order = np.argsort(-confidence, kind="stable")
    answered = np.arange(1, len(labels) + 1)
    right = np.cumsum(correct[order])
    confidence = confidence[order]
    last = np.append(np.diff(confidence) != 0, True)  # of its group of equals
    return pd.DataFrame(
        {
            "threshold": confidence[last],
            "coverage": answered[last] / len(labels),
            "accuracy": right[last] / answered[last],
        }
    )


@dataclass(frozen=True)
class Threshold:
    """A confidence at or above which predictions are trusted, and what that gave on validation.

    `confidence` is infinite where no threshold reaches the target: then everything is reviewed.
    """

    confidence: float
    accuracy: float
    coverage: float
    target: float


def choose_threshold(
    probabilities: np.ndarray, labels: np.ndarray, target: float = 0.95
) -> Threshold:
    """Returns the threshold that answers most images with at least the target's accuracy.

    Give validation predictions; on other images the accuracy will differ.
    """
    curve = coverage_curve(probabilities, labels)
    enough = curve[curve.accuracy >= target]
    if enough.empty:
        return Threshold(float("inf"), float("nan"), 0.0, target)
    row = enough.iloc[-1]
    everything = row.coverage == 1
    return Threshold(
        0.0 if everything else float(row.threshold),
        float(row.accuracy),
        float(row.coverage),
        target,
    )


# --- a run ----------------------------------------------------------------------------------------


def evaluate(run: FinishedRun) -> dict[str, float]:
    """Returns `measure` of a run's test predictions, and what validation predictions add.

    `temperature` is fitted on validation; `ece_scaled` and `nll_scaled` are measured on test with
    it. `answered` and `accuracy_answered` are the coverage and accuracy on test images at the
    confidence that gives 95 % accuracy on validation images.
    """
    labels, logits = run.test["labels"], run.test["logits"]
    known = run.validation
    temperature = fit_temperature(known["logits"], known["labels"])
    scaled = softmax(logits, temperature)
    threshold = choose_threshold(softmax(known["logits"], temperature), known["labels"])
    answered = scaled.max(axis=1) >= threshold.confidence
    correct = run.predicted == labels
    return measure(labels, logits) | {
        "validation_accuracy": float((known["logits"].argmax(axis=1) == known["labels"]).mean()),
        "temperature": temperature,
        "ece_scaled": calibration_error(scaled, labels),
        "nll_scaled": float(losses(labels, logits, temperature).mean()),
        "threshold": threshold.confidence,
        "answered": float(answered.mean()),
        "accuracy_answered": float(correct[answered].mean()) if answered.any() else float("nan"),
    }


def highest_losses(run: FinishedRun, count: int | None = None) -> pd.DataFrame:
    """Returns test images by loss, the highest first: id, true and predicted class, confidence."""
    labels, logits = run.test["labels"], run.test["logits"]
    names, predicted = np.array(run.class_names, object), run.predicted
    loss = losses(labels, logits)
    order = np.argsort(-loss, kind="stable")[:count]
    table = {
        "row": order,
        "id": run.test["ids"][order],
        "true": names[labels[order]],
        "predicted": names[predicted[order]],
        "confidence": softmax(logits).max(axis=1)[order],
        "loss": loss[order],
    }
    return pd.DataFrame(table)


def describe(run: FinishedRun) -> str:
    """Returns the figures of a run as text."""
    names, labels = run.class_names, run.test["labels"]
    predicted = run.predicted
    figures = ", ".join(f"{name} {value:.4f}" for name, value in evaluate(run).items())
    counts = confusion(labels, predicted, len(names))
    pairs = [
        f"  {names[p.first]} taken for {names[p.second]} {p.forth} times, the other way {p.back}"
        for p in confused_pairs(counts).head(3).itertuples()
    ]
    classes = per_class(labels, predicted, names).to_string(index=False, float_format="%.4f")
    return f"{run.name}: {len(labels)} test images\n{figures}\n{classes}\n" + "\n".join(pairs)


def write(run: FinishedRun, output: Path) -> None:
    """Writes evaluation.json and three tables of a run into a folder."""
    output.mkdir(parents=True, exist_ok=True)
    labels, predicted = run.test["labels"], run.predicted
    counts = confusion(labels, predicted, len(run.class_names))
    found = evaluate(run)
    probabilities = softmax(run.validation["logits"], found["temperature"])
    threshold = choose_threshold(probabilities, run.validation["labels"])
    write_json(
        output / "evaluation.json",
        {"run": str(run.path), "test": found, "review_threshold": asdict(threshold)},
    )
    table = per_class(labels, predicted, run.class_names)
    table.to_csv(output / "per_class.csv", index=False)
    named = pd.DataFrame(counts, index=run.class_names, columns=run.class_names)
    named.to_csv(output / "confusion.csv", index_label="true \\ predicted")
    highest_losses(run).drop(columns="row").to_csv(output / "losses.csv", index=False)


def main(argv: list[str]) -> int:
    """Evaluates a run directory, or every complete run of a workdir."""
    if len(argv) != 2:
        raise UserError("usage: python -m analysis.evaluate RUN_OR_WORKDIR [--output=DIR]")
    for run in chosen_runs(Path(argv[1]).expanduser()):
        print(describe(run) + "\n")
        if OUTPUT.value:
            folder = Path(OUTPUT.value).expanduser() / run.name
            write(run, folder)
            print(f"written to {folder}\n")
    return 0


if __name__ == "__main__":
    OUTPUT = flags.DEFINE_string("output", "", "Folder for the tables")
    run_command(main)
