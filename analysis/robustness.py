"""How much accuracy do corrupted and attacked test images cost each model?

    python -m analysis.robustness RUN_OR_WORKDIR [--images=N] [--seeds=1] [--baseline=MODEL] \
        [--corruptions=a,b] [--data=PATH] [--output=DIR]

Writes robustness.csv and two pictures, and prints the table. Every model sees the same corrupted
pixels, at its own image size. Attacks need a gradient, so nearest neighbours are only corrupted.
"""

import itertools
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
from analysis.runs import Groups, chosen_runs, evenly_spaced, group_runs, same_images
from analysis.stress import summary
from analysis.stress.attacks import ATTACKS, EPSILONS, PGD_STEPS, loss_gradient
from analysis.stress.charts import draw_accuracies, draw_corruptions
from analysis.stress.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from analysis.stress.summary import CLEAN, SHOWN_EPSILON, Outcomes
from errors import UserError, choose
from experiment.command import arguments, output_folder, run_command
from models import Classifier

BATCH = 32  # images; a gradient of a large network takes far more memory than its prediction
EXPLANATION = (
    "Intervals are over images (Wilson, 95 %). Corrupted: mean over {corruptions} at "
    f"{len(SEVERITIES)} severities; kept: its share of the clean accuracy. mCE: mean over "
    "corruptions of the error divided by that of {baseline}, lower is better. FGSM and PGD "
    f"({PGD_STEPS} steps): accuracy when no value moves by more than {SHOWN_EPSILON} grey levels "
    "of 255, – without a gradient. In brackets: accuracy in percent."
)


def predicted_classes(model: Classifier, images: jax.Array) -> jax.Array:
    """[B, S, S, 3] float32 in 0..255 -> int [B]."""
    return model(model.preprocess(images)).argmax(axis=-1)


def predict_under(
    models: dict, images: np.ndarray, labels: np.ndarray, corruptions: Sequence[str]
) -> dict:
    """Returns the `Outcomes` bool [N] of models on images uint8 [N, S, S, 3], under equal keys."""
    programs = {name: compiled(model, predicted_classes) for name, model in models.items()}
    outcomes = {name: {} for name in models}
    for condition in [CLEAN, *itertools.product(corruptions, SEVERITIES)]:
        shown = images if condition == CLEAN else corrupt(images, *condition)
        for name, program in programs.items():
            classes = in_batches(lambda x, f=program: f(x.astype(jnp.float32)), shown, size=BATCH)
            outcomes[name][condition] = classes == labels
    for name, model in models.items():
        if model.trained_by_gradient:
            outcomes[name] |= _attacked(model, images, labels)
    return outcomes


def _attacked(model: Classifier, images: np.ndarray, labels: np.ndarray) -> Outcomes:
    classes, gradient = compiled(model, predicted_classes), compiled(model, loss_gradient)
    key = jax.random.split(jax.random.key(0))[1]  # starts PGD where earlier versions did

    def under_attack(images: jax.Array, labels: jax.Array, indices: jax.Array) -> Outcomes:
        images, right = images.astype(jnp.float32), {}
        for epsilon in EPSILONS:
            by_image = jax.vmap(jax.random.fold_in, (None, 0))
            keys = by_image(jax.random.fold_in(key, epsilon), indices)
            for name, attack in ATTACKS.items():
                changed = attack(gradient, images, labels, epsilon, keys)
                right[name, epsilon] = classes(changed) == labels
        return right

    return in_batches(under_attack, images, labels, np.arange(len(images)), size=BATCH)


def spread(labels: np.ndarray, count: int) -> np.ndarray:
    """Returns up to `count` rows, spread evenly over the classes."""
    return np.sort(np.argsort(labels, kind="stable")[evenly_spaced(len(labels), count)])


def group_outcomes(
    groups: Groups, count: int, corruptions: Sequence[str], seeds: int = 1, data_path: str = ""
) -> tuple[dict[str, Outcomes], np.ndarray]:
    """Returns the outcomes of each label, bool [S, N], and the first image at the largest size."""
    chosen = {label: runs[:seeds] for label, runs in groups.items()}
    first, *_ = all_runs = list(itertools.chain(*chosen.values()))
    rows = spread(first.test["labels"], count)
    by_data: dict[str, list] = {}
    for run in all_runs:
        if not same_images(run, first):
            raise UserError(
                f"{run.path} and {first.path} were tested on different images: measure their "
                "robustness one by one"
            )
        by_data.setdefault(json.dumps(run.config["data"], sort_keys=True), []).append(run)
    by_run, sample = {}, np.zeros((0, 0, 3), np.uint8)
    for runs in by_data.values():
        images = load_test_images(runs[0], data_path)[rows]
        sample = max(sample, images[0], key=len)
        models = {run.path: load_classifier(run) for run in runs}
        by_run |= predict_under(models, images, first.test["labels"][rows], corruptions)
    outcomes = {}
    for label, runs in chosen.items():
        of_seeds = [by_run[run.path] for run in runs]
        outcomes[label] = {c: np.stack([right[c] for right in of_seeds]) for c in of_seeds[0]}
    return outcomes, sample


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
    seeds: int = 1,
    corruptions: Sequence[str] = tuple(CORRUPTIONS),
) -> Section:
    """Tests the first seeds of every model on `count` images; writes a table and two pictures.

    `baseline` is the label, or the model of the least accurate variant, whose errors are 100 %.
    """
    candidates = baseline_labels(baseline, groups)
    outcomes, sample = group_outcomes(groups, count, corruptions, seeds, data_path)
    baseline = min(candidates, key=lambda label: (outcomes[label][CLEAN].mean(), label))
    table = summary.accuracy_table(outcomes)
    table.to_csv(output / "robustness.csv", index=False)
    save(draw_accuracies(outcomes), output / "robustness.svg")
    save(draw_corruptions(sample, list(corruptions)), output / "corruptions.png")
    by_model = summary.summarise(table, baseline)
    shown = summary.printed(by_model)
    runs = "first seed" if seeds == 1 else f"first {seeds} seeds"
    source = f"{table.images[0]} test images, spread evenly over classes; {runs} of each model."
    number = "one corruption" if len(corruptions) == 1 else f"{len(corruptions)} corruptions"
    meaning = EXPLANATION.format(corruptions=number, baseline=baseline)
    caption = f"Accuracy by severity of corruption and epsilon of attacks; 0 is clean. {source}"
    sheet = Picture("corruptions.png", "The first of these images under each corruption.")
    return Section(
        "Robustness",
        [summary.conclude(outcomes)],
        [Table(list(shown), shown.values.tolist(), f"{source} {meaning}")],
        [Picture("robustness.svg", caption, wide=True)],
        [Details("What the corruptions look like", picture=sheet)],
        data=json.loads(by_model.set_index("model").to_json(orient="index")),
    )


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
