"""How much accuracy do corrupted and attacked test images cost each model?

    python -m analysis.robustness RUN_OR_WORKDIR [--images=N] [--seeds=1] [--baseline=MODEL] \
        [--corruptions=a,b] [--data=PATH] [--output=DIR]

Writes robustness.csv and two pictures, and prints the table. Every model sees the same corrupted
pixels; models of another image size see the same corruptions of their own images. Attacks need a
gradient, so nearest neighbours are only corrupted.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from absl import flags

from analysis.forward import compiled, in_batches, load_classifier, load_test_images
from analysis.page.figures import save
from analysis.page.section import Details, Picture, Section, Table
from analysis.runs import Groups, chosen_runs, group_runs
from analysis.stress.attacks import ATTACKS, EPSILONS, PGD_STEPS, loss_gradient
from analysis.stress.charts import draw_accuracies, draw_corruptions
from analysis.stress.corruptions import CORRUPTIONS, SEVERITIES, corrupt, spoken
from analysis.stress.summary import (
    CLEAN,
    LEAST_LOSS,
    SHOWN_EPSILON,
    Outcomes,
    accuracy_table,
    by_corruption,
    conclude,
    corruption_errors,
    kept,
    left_over,
    printed,
    summarise,
)
from errors import UserError, choose
from experiment.command import run_command
from models import Classifier

SEED = 0  # of noise, directions and PGD's start
BATCH = 32  # images; a gradient of a large network takes far more memory than its prediction

# --- measurement ----------------------------------------------------------------------------------


def _keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """Returns the keys of corruptions and of attacks."""
    return tuple(jax.random.split(jax.random.key(seed)))


def predict_under(
    models: dict[str, Classifier],
    images: np.ndarray,
    labels: np.ndarray,
    corruptions: Sequence[str] = tuple(CORRUPTIONS),
    seed: int = SEED,
) -> dict[str, Outcomes]:
    """Returns for each model which images it gets right, by condition.

    Args:
      models: by name, of one image size; each image is corrupted once for all of them.
      images: [N, S, S, 3] uint8.
      labels: int [N].
      corruptions: names in `CORRUPTIONS`.
      seed: of all draws; those of an image depend on its number in `images`.

    Returns:
      {model: {condition: bool [N]}}: clean, every corruption at every severity, and, of a model
      with a gradient, every attack at every epsilon.
    """
    conditions = [(name, severity) for name in corruptions for severity in SEVERITIES]
    corrupting, attacking = _keys(seed)
    predict = {
        name: compiled(model, lambda m, x: m(m.preprocess(x)).argmax(axis=-1))
        for name, model in models.items()
    }
    gradients = {
        name: compiled(model, loss_gradient)
        for name, model in models.items()
        if model.trained_by_gradient
    }

    def outcomes(images: jax.Array, labels: jax.Array, indices: jax.Array) -> dict[str, Outcomes]:
        images = images.astype(jnp.float32)
        right = {name: {CLEAN: program(images) == labels} for name, program in predict.items()}
        for condition in conditions:
            corrupted = corrupt(images, *condition, corrupting, indices)
            for name, program in predict.items():
                right[name][condition] = program(corrupted) == labels
        for epsilon in EPSILONS:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(
                jax.random.fold_in(attacking, epsilon), indices
            )
            for name, gradient in gradients.items():
                for attack, function in ATTACKS.items():
                    attacked = function(gradient, images, labels, epsilon, keys)
                    right[name][attack, epsilon] = predict[name](attacked) == labels
        return right

    return in_batches(outcomes, images, labels, np.arange(len(images)), size=BATCH)


def measure(
    model: Classifier,
    images: np.ndarray,
    labels: np.ndarray,
    corruptions: Sequence[str] = tuple(CORRUPTIONS),
    seed: int = SEED,
) -> pd.DataFrame:
    """Returns the rows of `accuracy_table` for one model; arguments as in `predict_under`."""
    found = predict_under({"": model}, images, labels, corruptions, seed)[""]
    table = accuracy_table({"": {condition: right[None] for condition, right in found.items()}})
    return table.drop(columns=["model", "seeds"])


def spread(labels: np.ndarray, count: int) -> np.ndarray:
    """Returns up to `count` rows, evenly spaced over the images in the order of their classes."""
    by_class = np.argsort(labels, kind="stable")
    places = np.linspace(0, len(labels) - 1, min(count, len(labels))).round().astype(int)
    return np.sort(by_class[places])


def measure_groups(
    groups: Groups, count: int, corruptions: Sequence[str], seeds: int = 1, data_path: str = ""
) -> tuple[dict[str, Outcomes], np.ndarray]:
    """Measures the first seeds of every model on the same test images.

    Returns:
      {label: {condition: bool [S, N]}}, and the first image, uint8, at the largest size.

    Raises:
      UserError: runs have different test images, or their data is gone.
    """
    chosen = {label: runs[:seeds] for label, runs in groups.items()}
    first = next(iter(chosen.values()))[0]
    rows = spread(first.test["labels"], count)
    by_data: dict[str, list] = {}
    for runs in chosen.values():
        for run in runs:
            if run.test["ids"].tolist() != first.test["ids"].tolist():
                raise UserError(
                    f"{run.path} and {first.path} were tested on different images: robustness "
                    "compares models on the same images, so measure those runs one by one"
                )
            by_data.setdefault(json.dumps(run.config["data"], sort_keys=True), []).append(run)
    found, sample = {}, np.zeros((0, 0, 3), np.uint8)
    for runs in by_data.values():
        images = load_test_images(runs[0], data_path)[rows]
        sample = max(sample, images[0], key=len)
        models = {str(run.path): load_classifier(run) for run in runs}
        found |= predict_under(models, images, first.test["labels"][rows], corruptions)
    outcomes = {
        label: {
            condition: np.stack([found[str(run.path)][condition] for run in runs])
            for condition in found[str(runs[0].path)]
        }
        for label, runs in chosen.items()
    }
    return outcomes, sample


# --- the chapter ----------------------------------------------------------------------------------


def baseline_labels(baseline: str, groups: Groups) -> list[str]:
    """Returns the labels that a baseline may mean: itself, or the variants of a model.

    "" means cnn: a plain network is a better yardstick than one that hardly beats chance, which
    corruption cannot harm. Where there is no cnn it may be any model.

    Raises:
      UserError: no run has that label or model.
    """
    models = {label: runs[0].model for label, runs in groups.items()}
    if not baseline:
        return [label for label, model in models.items() if model == "cnn"] or list(groups)
    if baseline in groups:
        return [baseline]
    choose("baseline", baseline, sorted({*models, *models.values()}))
    return [label for label, model in models.items() if model == baseline]


def explain(table: pd.DataFrame, baseline: str) -> str:
    """Returns what the columns of the printed summary mean."""
    plain = by_corruption(table, baseline)
    errors = corruption_errors(plain, plain)
    costly = ", ".join(spoken(name) for name in errors.index[errors.relative.notna()]) or "none"
    return (
        "Intervals are over images (Wilson, 95 %). Corrupted: mean over "
        f"{len(errors)} corruptions at {len(SEVERITIES)} severities; kept: its share of the clean "
        f"accuracy. mCE: mean over corruptions of the error divided by that of {baseline}, lower "
        "is better; relative mCE: likewise of the error that corruption adds, over those that cost "
        f"{baseline} {100 * LEAST_LOSS:.0f} points or more ({costly}). FGSM and PGD ({PGD_STEPS} "
        f"steps): accuracy when no value moves by more than {SHOWN_EPSILON} grey levels of 255, – "
        "without a gradient. In brackets: accuracy in percent."
    )


def robustness_section(
    groups: Groups,
    output: Path,
    count: int,
    baseline: str = "",
    data_path: str = "",
    seeds: int = 1,
    corruptions: Sequence[str] = tuple(CORRUPTIONS),
) -> Section:
    """Measures every model, and writes robustness.csv and two pictures into `output`.

    Args:
      groups: complete runs by label.
      output: an existing folder.
      count: of test images, spread evenly over the classes.
      baseline: label or model whose errors count as 100 %, its least accurate variant if it has
        several; "" is cnn, else the least accurate of all.
      data_path: where the data lies now, "" for where the runs found it.
      seeds: of each model, the first ones.
      corruptions: names in `CORRUPTIONS`.

    Raises:
      UserError: runs of different test images, no such baseline, or data that is gone.
    """
    candidates = baseline_labels(baseline, groups)
    outcomes, sample = measure_groups(groups, count, corruptions, seeds, data_path)
    baseline = min(candidates, key=lambda label: (outcomes[label][CLEAN].mean(), label))
    table = accuracy_table(outcomes)
    summary = summarise(table, baseline)
    table.to_csv(output / "robustness.csv", index=False)
    save(draw_accuracies(outcomes), output / "robustness.svg")
    save(draw_corruptions(sample, list(corruptions), _keys(SEED)[0]), output / "corruptions.png")
    sheet = Picture("corruptions.png", "The first of these images under each corruption.")
    shown, runs = printed(summary), "first seed" if seeds == 1 else f"first {seeds} seeds"
    images = outcomes[baseline][CLEAN].shape[1]
    source = f"{images} images of the test part, spread evenly over classes; {runs} of each model."
    return Section(
        "Robustness",
        [
            conclude(outcomes, kept, "keeps the largest share of its accuracy under corruption"),
            conclude(outcomes, left_over, "has the highest accuracy under corruption"),
        ],
        [Table(list(shown), shown.values.tolist(), f"{source} {explain(table, baseline)}")],
        [
            Picture(
                "robustness.svg",
                f"Accuracy by severity of corruption and epsilon of attacks; 0 is clean. {source}",
                wide=True,
            ),
        ],
        [Details("What the corruptions look like", picture=sheet)],
        data=json.loads(summary.set_index("model").to_json(orient="index")),
    )


def main(argv: list[str]) -> int:
    """Measures a run, or every model of a workdir; prints the table."""
    if len(argv) != 2:
        raise UserError("usage: python -m analysis.robustness RUN_OR_WORKDIR [--images=N] ...")
    names = [name for name in CORRUPTED.value if name] or list(CORRUPTIONS)
    for name in names:
        choose("--corruptions", name, CORRUPTIONS)
    path = Path(argv[1]).expanduser()
    groups = group_runs(chosen_runs(path))
    output = Path(OUTPUT.value).expanduser() if OUTPUT.value else path / "robustness"
    try:
        output.mkdir(parents=True, exist_ok=True)
        section = robustness_section(
            groups, output, IMAGES.value, BASELINE.value, DATA.value, SEEDS.value, names
        )
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror}") from error
    table = section.tables[0]
    print(pd.DataFrame(table.rows, columns=table.columns).to_string(index=False))
    print("\n".join([table.caption, *section.text, f"\nwritten to {output}"]))
    return 0


if __name__ == "__main__":
    IMAGES = flags.DEFINE_integer("images", 128, "Test images", lower_bound=2)
    SEEDS = flags.DEFINE_integer("seeds", 1, "Seeds of each model, the first ones", lower_bound=1)
    BASELINE = flags.DEFINE_string("baseline", "", "Model whose errors count as 100 %")
    CORRUPTED = flags.DEFINE_list("corruptions", [], "Corruptions, all by default")
    DATA = flags.DEFINE_string("data", "", "Where the data lies now, if it was moved")
    OUTPUT = flags.DEFINE_string("output", "", "Folder of robustness.csv and the pictures")
    run_command(main)
