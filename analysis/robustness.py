"""How much accuracy do corrupted and attacked test images cost each model?

    python -m analysis.robustness RUN_OR_WORKDIR [--images=N] [--seeds=N] [--attacked_seeds=1] \
        [--baseline=MODEL] [--corruptions=a,b] [--data=PATH] [--output=DIR]

Writes robustness.csv and two pictures, and prints the table. The stored photo is corrupted and then
resized as each run does, so models of every image size meet the same one. Attacks change a model's
own pixels and need its gradient, so nearest neighbours are only corrupted.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags

from analysis.compare import draws_nothing
from analysis.forward import compiled, in_batches, load_classifier
from analysis.page.figures import save
from analysis.page.section import Details, Picture, Section, Table
from analysis.runs import FinishedRun, Groups, chosen_runs, evenly_spaced, group_runs, same_images
from analysis.stress import photos, summary
from analysis.stress.attacks import RESTARTS, STEPS, attack
from analysis.stress.charts import SHOWN_MODELS, draw_accuracies, draw_corruptions
from analysis.stress.corruptions import CORRUPTIONS, SEVERITIES
from analysis.stress.summary import CLEAN, FEWEST_ERRORS, Outcomes
from analysis.uncertainty import Family
from errors import UserError, choose
from experiment.command import arguments, output_folder, run_command
from models import Classifier

BATCH = 128  # images
BYTES = 2**30  # of corrupted pixels in memory at once
CAPTION = (
    "Corrupted: mean over {corruptions} at "
    f"{len(SEVERITIES)} severities, interval over "
    "{over}. Errors: beside those of {baseline}. PGD: {attacked} of each model."
)
METHOD = (
    "A photo is corrupted as it is stored and then resized for each model; its shorter side is at "
    f"most {photos.LARGEST} pixels, or the largest image size. Random draws depend on the photo "
    "alone.",
    f"Errors are summed over all corruptions and divided by those of the baseline (–: it has fewer "
    f"than {FEWEST_ERRORS}). The mean corruption error of Hendrycks and Dietterich (2019) "
    "averages the ratios of single corruptions instead, so that one which hardly harms the "
    "baseline can outweigh all others.",
    f"PGD takes {STEPS} steps up the cross-entropy and up the logit margin, each from {RESTARTS} "
    "starts (FGSM's point, then random ones). An image counts as right if it withstands all of "
    "them, so the accuracy is an upper bound: a better attack may leave less. –: no gradient.",
)


def predicted_classes(model: Classifier, images: jax.Array) -> jax.Array:
    """[B, S, S, 3] in 0..255 -> int [B]."""
    return model(model.preprocess(images)).argmax(axis=-1)


def outcomes_of(
    run: FinishedRun, pixels: np.ndarray, clean: np.ndarray, labels: np.ndarray, attacked: bool
) -> tuple[np.ndarray, Outcomes]:
    """Returns which answers are right for pixels uint8 [C, N, S, S, 3], and under attack.

    They are bool [C, N], and by attack and epsilon bool [N] for clean images uint8 [N, S, S, 3].
    """
    model = load_classifier(run)
    program = compiled(model, predicted_classes)
    classes = in_batches(program, pixels.reshape(-1, *pixels.shape[2:]), size=BATCH)
    attacked = attacked and model.trained_by_gradient
    under_attack = attack(model, clean, labels) if attacked else {}
    return classes.reshape(len(pixels), -1) == labels, under_attack


def spread(labels: np.ndarray, count: int) -> np.ndarray:
    """Returns up to `count` rows, spread evenly over the classes."""
    return np.sort(np.argsort(labels, kind="stable")[evenly_spaced(len(labels), count)])


def group_outcomes(
    groups: Groups,
    rows: np.ndarray,
    corruptions: Sequence[str] = tuple(CORRUPTIONS),
    attacked: int = 1,
    data_path: str = "",
) -> dict[str, Outcomes]:
    """Returns the outcomes of each label on rows of the test part: bool [S, N].

    Attacks are those of the first `attacked` seeds.
    """
    first, *_ = every = list(itertools.chain(*groups.values()))
    by_data: dict[str, list[FinishedRun]] = {}
    for run in every:
        if not same_images(run, first):
            raise UserError(
                f"{run.path} and {first.path} were tested on different images: measure their "
                "robustness one by one"
            )
        by_data.setdefault(json.dumps(run.config["data"], sort_keys=True), []).append(run)
    tested = {key: photos.TestPart.of(runs[0], data_path) for key, runs in by_data.items()}
    victims = {run.path for runs in groups.values() for run in runs[:attacked]}
    conditions = list(itertools.product(corruptions, SEVERITIES))
    parts: dict[Path, list[Outcomes]] = {run.path: [] for run in every}
    for block in photos.blocks(rows, tested, BYTES // len(conditions)):
        labels, pixels = first.test["labels"][block], photos.corrupted(tested, block, conditions)
        for key, runs in by_data.items():
            clean = tested[key].clean(block)
            for run in runs:
                right, more = outcomes_of(run, pixels[key], clean, labels, run.path in victims)
                right = dict(zip(conditions, right, strict=True))
                parts[run.path].append({CLEAN: run.correct[block]} | right | more)
    outcomes = {}
    for label, runs in groups.items():
        outcomes[label] = {
            condition: np.stack(
                [
                    np.concatenate([part[condition] for part in parts[run.path]])
                    for run in runs
                    if condition in parts[run.path][0]
                ]
            )
            for condition in parts[runs[0].path][0]
        }
    return outcomes


def baseline_labels(baseline: str, groups: Groups) -> list[str]:
    """Returns the labels that a baseline may mean: itself, the variants of a model; "" is cnn."""
    models = {label: runs[0].model for label, runs in groups.items()}
    if baseline in groups:
        return [baseline]
    if baseline:
        choose("baseline", baseline, sorted({*models, *models.values()}))
    # The least accurate model is no yardstick: corruption hardly harms one that is near chance.
    labels = [label for label, model in models.items() if model == (baseline or "cnn")]
    return labels or list(groups)


def robustness_section(
    groups: Groups,
    output: Path,
    count: int,
    baseline: str = "",
    data_path: str = "",
    seeds: int = 0,
    attacked: int = 1,
    corruptions: Sequence[str] = tuple(CORRUPTIONS),
) -> Section:
    """Tests every model on `count` images; writes a table and two pictures.

    `baseline` is the label, or the model of the least accurate variant, whose errors are 100 %.
    `seeds` are the first ones of each model, 0 for all; `attacked` of them are attacked.
    """
    candidates = baseline_labels(baseline, groups)
    groups = {label: runs[: seeds or None] for label, runs in groups.items()}
    first = next(iter(groups.values()))[0]
    rows = spread(first.test["labels"], count)
    outcomes = group_outcomes(groups, rows, corruptions, attacked, data_path)
    baseline = min(candidates, key=lambda label: (outcomes[label][CLEAN].mean(), label))
    table = summary.accuracy_table(outcomes)
    table.to_csv(output / "robustness.csv", index=False)
    family = Family(
        summary.shares(outcomes),
        None if first.clusters is None else first.clusters[rows],
        fixed={label for label, runs in groups.items() if draws_nothing(runs[0])},
    )
    by_model = summary.summarise(table, family, baseline)
    drawn = sorted(outcomes, key=lambda label: -family.mean[label])[:SHOWN_MODELS]
    save(draw_accuracies({label: outcomes[label] for label in drawn}), output / "robustness.svg")
    (photo,) = photos.TestPart.of(first, data_path).stored(rows[:1])
    save(draw_corruptions(photo, list(corruptions)), output / "corruptions.png")
    seeds = _number(sorted({len(runs) for runs in groups.values()}), "seed")
    source = f"{len(rows)} test images, spread evenly over classes; {seeds} of each model."
    caption = CAPTION.format(
        corruptions=_number([len(corruptions)], "corruption"),
        over="seeds and images" if family.freedom else "images alone",
        baseline=baseline,
        attacked="first seed" if attacked == 1 else f"first {attacked} seeds",
    )
    drawing = f"Accuracy by severity of corruption and epsilon of attacks; 0 is clean. {source}"
    if len(drawn) < len(outcomes):
        drawing += f" Of {len(outcomes)} models, the {len(drawn)} most accurate under corruption."
    sheet = Picture("corruptions.png", "The first of these images under every corruption.")
    shown = summary.printed(by_model, baseline)
    return Section(
        "Robustness",
        finding=summary.conclude(family),
        tables=[Table(list(shown), shown.values.tolist(), f"{source} {caption}")],
        pictures=[Picture("robustness.svg", drawing, wide=True)],
        details=[
            Details("How this is measured", list(METHOD)),
            Details("Worst corruption of each model", summary.worst_corruptions(by_model)),
            Details("What the corruptions look like", picture=sheet),
        ],
        data=json.loads(by_model.set_index("model").to_json(orient="index")),
    )


def _number(counts: list[int], what: str) -> str:
    """One corruption, 3 seeds, 1 to 3 seeds."""
    if counts == [1]:
        return f"one {what}"
    return " to ".join(map(str, dict.fromkeys([counts[0], counts[-1]]))) + f" {what}s"


def main(argv: list[str]) -> int:
    """Tests a run, or every model of a workdir; prints the table."""
    usage = "analysis.robustness RUN_OR_WORKDIR [--images=N] ..."
    path = Path(arguments(argv, usage)[0]).expanduser()
    given = filter(None, CORRUPTED.value)
    names = [choose("--corruptions", name, CORRUPTIONS) for name in given] or list(CORRUPTIONS)
    groups = group_runs(chosen_runs(path))
    output = output_folder(OUTPUT.value or path / "robustness")
    try:
        section = robustness_section(
            groups,
            output,
            IMAGES.value,
            BASELINE.value,
            DATA.value,
            SEEDS.value,
            ATTACKED.value,
            names,
        )
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror}") from error
    (table,) = section.tables
    print("\n".join([str(table), table.caption, section.finding, f"\nwritten to {output}"]))
    return 0


if __name__ == "__main__":
    IMAGES = flags.DEFINE_integer("images", 128, "Test images", lower_bound=2)
    SEEDS = flags.DEFINE_integer("seeds", 0, "First seeds of each model, 0: all", lower_bound=0)
    ATTACKED = flags.DEFINE_integer("attacked_seeds", 1, "Of these, attacked ones", lower_bound=1)
    BASELINE = flags.DEFINE_string("baseline", "", "Model whose errors count as 100 %")
    CORRUPTED = flags.DEFINE_list("corruptions", [], "Corruptions, all by default")
    DATA = flags.DEFINE_string("data", "", "Where the data lies now, if it was moved")
    OUTPUT = flags.DEFINE_string("output", "", "Folder of robustness.csv and the pictures")
    run_command(main)
