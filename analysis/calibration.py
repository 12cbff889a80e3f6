"""How far can their confidence be trusted? The chapter on calibration, review and sets."""

import numpy as np
import pandas as pd
from scipy.stats import norm

from analysis import evaluate
from analysis.compare import Comparison
from analysis.confidence import LEVELS, RISK, TARGET, coverage_curve, reliability, softmax
from analysis.page import figures
from analysis.page.figures import literal, plt, save, shortened
from analysis.page.section import Details, Picture, Section, Table, as_table
from analysis.page.tables import NONE, decimal, percent
from analysis.runs import FinishedRun, Groups
from analysis.verdict import listed

SHOWN = 12  # models in the pictures, and models or classes in the table of sets by class
ALPHA = 0.05
LEAST = 20  # images answered; of fewer, accuracy is noise


HOW = [
    "By chance: the ECE that a perfectly calibrated model with these confidences would show on so "
    "few images. An ECE is more than chance if such a model would reach it with a probability "
    f"below {ALPHA:.2g} (for each model).",
    "Temperature: it divides the logits; above 1, the model was overconfident. It is fitted on "
    "validation images, stays 1 unless they improve by more than chance, and is drawn towards 1 "
    "where they are few.",
    f"Answered: the share of test images confident enough for the promised {percent(TARGET, 0)} % "
    "accuracy; the others go to a person. The threshold has a margin, so that the chance in the "
    f"validation images breaks the promise in at most {percent(RISK, 0)} % of experiments.",
    "Sets (split conformal prediction): every class whose probability reaches a level, so that the "
    "true class is in 90 or 95 % of the sets. One half of the validation images, drawn by class, "
    "sets the level, the other half the temperature of the sets; the temperature and the threshold "
    "above come from all of them.",
    "The validation images also chose the weights, which no promise here accounts for. “–”: too "
    "few validation images for a promise.",
]
FOLDS = (
    "Cross-validation: each fold has its own temperature, threshold and sets, fitted on its own "
    "validation images and used on its own test images, as its model would be; the temperatures "
    "shown are means. So no test image takes part in what is applied to it."
)


def calibration_section(comparison: Comparison) -> Section:
    """Returns reliability, temperature scaling, review thresholds and sets of classes."""
    table = comparison.table.set_index("label")
    # Twice the mean of p-values is one, however the seeds depend on each other (Vovk, Wang 2020).
    excess = 2 * table.ece_excess_p_mean < ALPHA
    scaled = 2 * table.ece_scaled_excess_p_mean < ALPHA
    shown = dict(list(comparison.groups.items())[:SHOWN])
    by_class = sets_by_class(comparison.groups)
    by_class.to_csv(comparison.output / "sets.csv", index=False)
    section = Section(
        finding=_finding(table, excess, scaled),
        tables=[_calibration_table(table, excess), _use_table(table)],
        details=[Details("How to read this", [*HOW, *([FOLDS] if comparison.folds else [])])],
        warnings=_harm(table, scaled & ~excess),
    )
    few = f" The first {SHOWN} models." if len(comparison.groups) > SHOWN else ""
    for file, draw, caption in (
        ("reliability.svg", draw_reliability, "On the dashed line, confidence equals "
         "accuracy. All seeds together; the ECE is that of the table."),
        ("coverage.svg", draw_coverage, "Accuracy of the most confident predictions alone."),
    ):  # fmt: skip
        figure = draw(shown, table)
        figure.tight_layout()
        save(figure, comparison.output / file)
        section.pictures.append(Picture(file, caption + few, wide=True))
    _add_by_class(section, by_class[by_class.model.isin(list(shown))], few)
    return section


def _finding(table: pd.DataFrame, excess: pd.Series, scaled: pd.Series) -> str:
    images = int(table.test_images.iloc[0])
    if not excess.any():
        text = (
            f"On {images:,} test images, no model's confidence is off by more than chance explains"
        )
    else:
        worst = table.ece_mean[excess].max()
        text = f"The confidence of {listed(excess.index[excess])} is off by more than chance"
        text += f" explains (ECE {'up to ' * (int(excess.sum()) > 1)}{percent(worst, 1)} %)"
        still = excess & scaled
        rest = f"still that of {listed(still.index[still])}" if still.any() else "that of none"
        text += f", after temperature scaling {rest}"
    least, most = (percent(x, 0) for x in (table.answered_mean.min(), table.answered_mean.max()))
    span = most if least == most else f"{least} to {most}"
    return f"{text}; at {percent(TARGET, 0)} % promised accuracy, {span} % need no human review."


def _calibration_table(table: pd.DataFrame, excess: pd.Series) -> Table:
    columns = {
        "model": table.index,
        "ECE %": table.ece_mean.map(percent),
        "by chance %": table.ece_expected_mean.map(percent),
        "more than chance": excess.map({True: "yes", False: "no"}),
        "temperature": table.temperature_mean.map("{:.2f}".format),
        "ECE scaled %": table.ece_scaled_mean.map(percent),
        "NLL": table.nll_mean.map(decimal),
        "NLL scaled": table.nll_scaled_mean.map(decimal),
    }
    return as_table(
        columns, "On test images, before and after temperature scaling; means over seeds."
    )


def _use_table(table: pd.DataFrame) -> Table:
    promised = table.threshold_mean < np.inf
    columns = {
        "model": table.index,
        "answered %": table.answered_mean.map(lambda share: percent(share, 1)),
        "accuracy on these %": table.accuracy_answered_mean.map(percent),
    }
    for level in LEVELS:
        name = f"set{100 * level:.0f}"
        coverage, size = table[f"{name}_coverage_mean"], table[f"{name}_size_mean"]
        sets = f"{percent(level, 0)} % sets"
        columns[f"{sets}: coverage %"] = coverage.map(lambda share: percent(share, 1))
        columns[f"{sets}: classes per set"] = size.map(lambda classes: decimal(classes, 2))
    caption = (
        f"Thresholds for {percent(TARGET, 0)} % accuracy and conformal sets, chosen on validation "
    )
    caption += "images, and how they do on test images."
    if not promised.all():
        never = listed(promised.index[~promised])
        caption += f" Everything goes to a person in some seed of: {never}."
    return as_table(columns, caption)


def _harm(table: pd.DataFrame, newly_off: pd.Series) -> list[str]:
    """Where temperature scaling made the test images worse by more than chance explains."""
    change, limit = table.nll_scaled_mean - table.nll_mean, norm.ppf(1 - ALPHA / len(table))
    worse = change > limit * table.nll_change_se_mean
    worse_ece = newly_off & (table.ece_scaled_mean > table.ece_mean)
    return [
        f"Temperature scaling makes {label} worse on test images: NLL {decimal(row.nll_mean)} to "
        f"{decimal(row.nll_scaled_mean)}, ECE {percent(row.ece_mean)} % to "
        f"{percent(row.ece_scaled_mean)} %. The validation images are too few, or unlike them."
        for label, row in table[(worse & (change > 1e-6)) | worse_ece].iterrows()
    ]


def sets_by_class(groups: Groups) -> pd.DataFrame:
    """Returns sets.csv: coverage and mean size by model, level and class, means over seeds."""
    rows = []
    for label, runs in groups.items():
        names, labels = runs[0].class_names, runs[0].test["labels"]
        images = np.bincount(labels, minlength=len(names))
        fitted = [evaluate.sets_fitted_to(run) for run in runs]
        for level in LEVELS:
            pairs = zip(runs, fitted, strict=True)
            of_runs = np.array([evaluate.coverage_of_sets(*pair, level) for pair in pairs])
            sums = [np.bincount(labels, v, len(names)) for v in of_runs.mean(axis=0)]
            coverage, size = np.array(sums) / np.where(images, images, np.nan)
            columns = {"class": names, "images": images, "coverage": coverage, "size": size}
            rows.append(pd.DataFrame({"model": label, "level": level} | columns))
    return pd.concat(rows, ignore_index=True)


def _add_by_class(section: Section, by_class: pd.DataFrame, few: str) -> None:
    level = LEVELS[-1]
    chosen = by_class[by_class.level == level]
    cells = [
        NONE if np.isnan(row.coverage) else f"{percent(row.coverage, 1)} ({decimal(row.size, 2)})"
        for row in chosen.itertuples()
    ]
    models = list(dict.fromkeys(chosen.model))
    grid = np.reshape(np.array(cells, object), (len(models), -1)).T  # [K, models]
    classes = chosen["class"].iloc[: len(grid)]
    caption = f"{percent(level, 0)} % sets by class: coverage in percent (mean number of classes)."
    caption += " The promise holds over all classes together, not for each." + few
    if len(grid) <= SHOWN:
        rows = [[name, *row] for name, row in zip(classes, grid, strict=True)]
        table = Table(["class", *models], rows, caption)
        title = f"{percent(level, 0)} % sets by class"
        section.details.insert(0, Details(title, table=table))
        return
    lines = [
        f"{name}: " + ", ".join(f"{m} {cell}" for m, cell in zip(models, row, strict=True))
        for name, row in zip(classes, grid, strict=True)
    ]
    section.details.append(Details(f"{caption} All of them: sets.csv", lines))


def draw_reliability(groups: Groups, table: pd.DataFrame) -> plt.Figure:
    """Draws a diagram a model: accuracy by confidence, and how often each confidence occurs."""
    colours = figures.colours(dict.fromkeys(table.index))  # as in every picture
    figure, axes = figures.small_multiples(len(groups), 4, (3, 3))
    for axis, (label, runs) in zip(axes, groups.items(), strict=True):
        bins = reliability(*_pooled(runs))
        share = bins.images / bins.images.sum()
        axis.bar(bins.low, share, 1 / len(bins), align="edge", color="#cccccc")
        axis.plot((0, 1), (0, 1), color="#666666", lw=1, ls="--")
        axis.plot(bins.confidence, bins.accuracy, "o-", ms=4, color=colours[label])
        title = f"{literal(shortened(label, 22))}: ECE {percent(table.ece_mean[label], 1)} %"
        axis.set_title(title, fontsize=9)
        axis.set(xlim=(0, 1), ylim=(0, 1))
        axis.grid()
    figure.supxlabel("confidence in the predicted class", fontsize=10)
    figure.supylabel("accuracy; grey: share of images", fontsize=10)
    return figure


def _pooled(runs: list[FinishedRun]) -> tuple[np.ndarray, np.ndarray]:
    """Test probabilities [S * N, K] and labels of all seeds."""
    probabilities = [softmax(run.test["logits"]) for run in runs]
    return np.concatenate(probabilities), np.concatenate([run.test["labels"] for run in runs])


def draw_coverage(groups: Groups, table: pd.DataFrame) -> plt.Figure:
    """Draws accuracy on the images answered against their share, as the threshold rises."""
    colours = figures.colours(dict.fromkeys(table.index))  # as in every picture
    figure, axis = plt.subplots(figsize=(7, 4.2))
    for label, runs in groups.items():
        probabilities, labels = _pooled(runs)
        curve = coverage_curve(probabilities, labels)
        curve = 100 * curve[curve.coverage * len(labels) >= LEAST]
        style = {"color": colours[label], "label": literal(label)}
        axis.step(curve.coverage, curve.accuracy, where="post", **style)
    lowest = 100 * min(table.test_accuracy_mean[label] for label in groups)
    axis.set(xlabel="images answered, %", ylabel="accuracy on them, %", ylim=(lowest - 2, 100.5))
    axis.grid()
    figures.legend_beside(figure, [axis])
    return figure
