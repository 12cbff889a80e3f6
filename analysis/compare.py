"""Which architecture is best, and how sure are we? Tables, pictures and a page from finished runs.

    python -m analysis.compare runs/digits

Reads run directories alone, so it can be repeated on any subset of runs that is complete.
"""

import base64
import json
import math
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
from scipy import stats
from sklearn.metrics import precision_recall_fscore_support

from analysis import figures
from analysis.runs import FinishedRun, load_runs
from errors import UserError
from experiment import run_command

BINS = 15  # of confidence, in the calibration error


@dataclass(frozen=True)
class Report:
    """What `write_report` made: the table as text, the page, and the runs that are not complete."""

    text: str
    page: Path
    not_complete: dict[str, str]


# --- numbers --------------------------------------------------------------------------------------


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error (Naeini et al. 2015) of the top class, 15 bins of equal width.

    Args:
      probabilities: [N, K], rows that sum to 1.
      labels: int [N].
    """
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gap = np.bincount(bins, weights=confidence - correct, minlength=BINS)
    return float(np.abs(gap).sum() / len(labels))


def run_metrics(run: FinishedRun) -> dict[str, float]:
    """Returns the test metrics of one run, computed from its saved predictions."""
    labels, predicted = run.test["labels"], run.test["logits"].argmax(axis=1)
    classes = range(run.test["logits"].shape[1])
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, predicted, labels=classes, average="macro", zero_division=0
    )
    return {
        "test_accuracy": float((labels == predicted).mean()),
        "macro_precision": float(precision),
        "macro_recall": float(recall),
        "macro_f1": float(f1),
        "ece": calibration_error(run.probabilities, labels),
        "validation_accuracy": run.summary["metrics"]["validation"]["accuracy"],
    }


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % t-interval of the mean over seeds, cut to 0..1; NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan, math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return max(0.0, values.mean() - half), min(1.0, values.mean() + half)


def group_runs(runs: list[FinishedRun]) -> dict[str, list[FinishedRun]]:
    """Returns complete runs by label (model and variant), the highest mean accuracy first."""
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        if run.status == "complete":
            groups.setdefault(run.label, []).append(run)
    mean = {k: np.mean([run_metrics(run)["test_accuracy"] for run in g]) for k, g in groups.items()}
    return {label: groups[label] for label in sorted(groups, key=lambda k: (-mean[k], k))}


def make_table(groups: dict[str, list[FinishedRun]]) -> pd.DataFrame:
    """Returns a row per model and variant; the columns of `table.csv`.

    Accuracies and shares are in 0..1. The interval is over seeds: how far another set of seeds
    would move the mean on the same split. Costs are means over seeds.
    """
    rows = []
    for runs in groups.values():
        measured = pd.DataFrame([run_metrics(run) for run in runs])
        cost = pd.DataFrame([run.summary["cost"] for run in runs])
        accuracy = measured["test_accuracy"].to_numpy()
        low, high = interval(accuracy)

        def mean(name: str, cost: pd.DataFrame = cost) -> float:
            return pd.to_numeric(cost[name]).mean()

        rows.append(
            {
                "model": runs[0].model,
                "seeds": len(runs),
                "test_accuracy_mean": accuracy.mean(),
                "test_accuracy_std": accuracy.std(ddof=1) if len(runs) > 1 else math.nan,
                "test_accuracy_ci95_low": low,
                "test_accuracy_ci95_high": high,
                **{f"{name}_mean": measured[name].mean() for name in list(measured)[1:]},
                "parameters": int(mean("parameters")),
                "flops_per_image": mean("flops_per_image"),
                "train_images_per_second": mean("train_images_per_second"),
                "seconds_to_best": mean("seconds_to_best"),
                "test_images": len(runs[0].test["labels"]),
                "image_size": runs[0].config["data"]["image_size"],
                "variant": runs[0].variant,
                "device": runs[0].summary["cost"]["device"],
                "runs": ";".join(run.name for run in runs),
            }
        )
    return pd.DataFrame(rows)


def printed_table(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the table as a reader wants it: percent, rounded, "–" where there is no number."""

    def percent(value: float, digits: int = 2) -> str:
        return "–" if pd.isna(value) else f"{100 * value:.{digits}f}"

    def percents(low: float, high: float) -> str:
        return "–" if pd.isna(low) else f"{percent(low)}–{percent(high)}"

    def scaled(value: float) -> str:
        if pd.isna(value):
            return "–"
        for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
            if value >= size:
                return f"{value / size:.3g} {unit}"
        return f"{value:.3g}"

    return pd.DataFrame(
        [
            {
                "model": f"{row.model} ({row.variant})" if row.variant else row.model,
                "seeds": str(row.seeds),
                "test acc. %": percent(row.test_accuracy_mean),
                "std": percent(row.test_accuracy_std),
                "95 % interval": percents(row.test_accuracy_ci95_low, row.test_accuracy_ci95_high),
                "precision": percent(row.macro_precision_mean),
                "recall": percent(row.macro_recall_mean),
                "F1": percent(row.macro_f1_mean),
                "ECE": percent(row.ece_mean),
                "params": scaled(row.parameters),
                "FLOPs/image": scaled(row.flops_per_image),
                "train images/s": scaled(row.train_images_per_second),
                "s to best": scaled(row.seconds_to_best),
            }
            for row in table.itertuples()
        ]
    )


def to_markdown(table: pd.DataFrame) -> str:
    """Returns the printed table in GitHub's Markdown."""
    escape = lambda text: str(text).replace("|", "\\|")  # noqa: E731
    rows = [list(table), ["---"] + ["---:"] * (len(table.columns) - 1), *table.values.tolist()]
    return "".join("| " + " | ".join(map(escape, row)) + " |\n" for row in rows)


def to_latex(table: pd.DataFrame) -> str:
    """Returns the printed table for the booktabs package."""
    columns = "l" + "r" * (len(table.columns) - 1)
    return table.to_latex(index=False, escape=True, column_format=columns).replace("–", "--")


# --- words ----------------------------------------------------------------------------------------


def answer(table: pd.DataFrame) -> str:
    """Returns the comparison in a sentence or two."""
    if table.empty:
        return "No run is complete yet."
    names = printed_table(table)["model"]
    first = table.iloc[0]
    text = f"{names[0]} has the highest mean test accuracy, {100 * first.test_accuracy_mean:.2f} %"
    if first.seeds > 1:
        low, high = first.test_accuracy_ci95_low, first.test_accuracy_ci95_high
        text += f" (95 % interval over {first.seeds} seeds {100 * low:.2f} to {100 * high:.2f})"
    if len(table) == 1:
        return text + "."
    second = table.iloc[1]
    gap = 100 * (first.test_accuracy_mean - second.test_accuracy_mean)
    text += f", {gap:.2f} points above {names[1]}."
    if min(first.seeds, second.seeds) < 2:
        return text + " With one seed, how much of that is chance is unknown."
    if first.test_accuracy_ci95_low <= second.test_accuracy_ci95_high:
        return text + " Their intervals overlap, so these seeds do not establish which is better."
    return text + " Their intervals do not overlap."


def incomplete(workdir: Path, runs: list[FinishedRun]) -> dict[str, str]:
    """Returns {run: why} for every run that exists or was planned, and is not complete."""
    reasons = {}
    plan = workdir / "experiment.json"
    if plan.exists():
        planned = json.loads(plan.read_text(encoding="utf-8"))["runs"]
        reasons = {name: "not started" for name in planned}
    for run in runs:
        reasons.pop(run.name, None)
        if run.status != "complete":
            error = run.summary.get("error", "").strip().split("\n")[0]
            reasons[run.name] = f"{run.status}: {error}" if error else run.status
    return reasons


def transfer(groups: dict[str, list[FinishedRun]]) -> list[dict[str, str]]:
    """Returns, for every model that began from pretrained weights, what was done with them.

    Each has the keys label, weights, phases, and warning: what preflight found in the first run,
    "" if the pixels match the weights.
    """
    rows = []
    for label, runs in groups.items():
        summary = runs[0].summary
        if summary.get("weights", "none") == "none":
            continue
        phases = [
            f"{phase['name']} ({phase['train']}): {phase['epochs']:.3g} epochs"
            + ", on stored features" * phase["stored_features"]
            for phase in summary["phases"]
        ]
        found = summary.get("preflight", {"warnings": ["preflight was off"]})
        rows.append(
            {
                "label": label,
                "weights": summary["weights"],
                "phases": "; ".join(phases),
                "warning": "; ".join(found["warnings"]),
            }
        )
    return rows


# --- the page -------------------------------------------------------------------------------------


def write_report(workdir: Path) -> Report:
    """Writes `report/`: table.csv, table.md, table.tex, pictures and the self-contained index.html.

    Raises:
      UserError: there is no run under the workdir, or the report cannot be written.
    """
    runs = load_runs(workdir)
    if not runs:
        raise UserError(f"{workdir} holds no runs: expected {workdir}/<model>/seed<k>/config.json")
    groups = group_runs(runs)
    table = make_table(groups)
    reasons = incomplete(workdir, runs)
    output = workdir / "report"
    try:
        output.mkdir(exist_ok=True)
        if len(table):
            printed = printed_table(table)
            table.to_csv(output / "table.csv", index=False)
            (output / "table.md").write_text(to_markdown(printed), encoding="utf-8")
            (output / "table.tex").write_text(to_latex(printed), encoding="utf-8")
            figures.save(figures.draw_curves(groups), output / "learning_curves.png")
            figures.save(figures.draw_confusion(groups), output / "confusion.png")
            figures.save(figures.draw_cost(groups, table), output / "cost.png")
        page = output / "index.html"
        page.write_text(render_page(workdir, groups, table, reasons), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the report to {output}: {error}") from error
    lines = [answer(table)]
    if len(table):
        lines.insert(0, printed.to_string(index=False) + "\n")
    for row in transfer(groups):
        if row["warning"]:
            lines.append(f"{row['label']}: {row['warning']}")
    lines += [f"not complete: {name}: {reason}" for name, reason in reasons.items()]
    return Report("\n".join(lines), page, reasons)


def render_page(
    workdir: Path,
    groups: dict[str, list[FinishedRun]],
    table: pd.DataFrame,
    reasons: dict[str, str],
) -> str:
    """Returns index.html: every picture is inside it, every name is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )

    def picture(path: Path) -> str:
        return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()

    output, audit = workdir / "report", workdir / "audit"
    titles = {
        "learning_curves.png": "Learning curves on validation images: thin lines are seeds.",
        "confusion.png": "Confusion on test images: counts over all seeds, colour by true class.",
        "cost.png": "Test accuracy against cost; bars are 95 % intervals over seeds.",
    }
    first = next(iter(groups.values()))[0] if groups else None
    printed = printed_table(table) if len(table) else pd.DataFrame()
    found = audit / "audit.json"
    return environment.get_template("report.html.j2").render(
        title=workdir.resolve().name,
        answer=answer(table),
        columns=list(printed),
        rows=printed.values.tolist(),
        has_knn="knn" in set(table.get("model", [])),
        reasons=reasons,
        transfer=transfer(groups),
        pictures=[(picture(output / name), text) for name, text in titles.items()]
        if groups
        else [],
        audit=json.loads(found.read_text(encoding="utf-8")) if found.exists() else None,
        contact_sheet=picture(audit / "contact_sheet.png") if found.exists() else None,
        augmented=[
            (label, picture(path))
            for label, runs in groups.items()
            if (path := runs[0].path / "augmented_batch.png").exists()
        ],
        dataset=first.dataset if first else None,
        environment=first.environment if first else None,
        test_images=int(table.test_images.iloc[0]) if len(table) else 0,
        config=json.dumps(first.config, indent=2, ensure_ascii=False) if first else "",
    )


def main(argv: list[str]) -> int:
    """Writes the report of a workdir; returns 1 if a run in it is not complete."""
    if len(argv) != 2:
        raise UserError("usage: python -m analysis.compare WORKDIR")
    report = write_report(Path(argv[1]).expanduser())
    print(f"{report.text}\n\nreport: {report.page}")
    return 1 if report.not_complete else 0


if __name__ == "__main__":
    run_command(main)
