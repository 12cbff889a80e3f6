"""What does each model cost? Size, work, memory and time of training; speed of prediction, warm.

    python -m analysis.costs WORKDIR [--rounds=10] [--batch=256]

Prints the table and writes WORKDIR/report/pareto.svg. Predictions are timed here: the first seed of
each model, compiled and warm, all models in turn, in every round in another order.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np
import pandas as pd
from absl import flags

from analysis.compare import Comparison, compare_workdir
from analysis.folds import first_folds
from analysis.forward import cache_dir_of, load_classifier, use_compilation_cache
from analysis.page import charts
from analysis.page.chapters import DRAWN, best
from analysis.page.figures import save
from analysis.page.section import Details, Section, Table, as_table
from analysis.page.tables import NONE, scaled, times
from analysis.uncertainty import pareto_front
from analysis.verdict import listed
from errors import UserError
from experiment.command import arguments, output_folder, run_command
from models import Classifier
from training.cost import devices_in_use

ROUNDS, BATCH = 10, 256
SECONDS = 1.0  # about what a model takes at one batch size, over all rounds
LEAST_ROUNDS = 3
EXPLANATION = (
    "Multiply-adds: in matrix products and convolutions of one forward pass over one image, as "
    "papers count them.",
    "Memory: arguments, results and temporary arrays of one compiled training step, per device.",
    "Training time: training and validation without compilation, which has its own column; time to "
    "best: until the weights that are kept. All of these are means over seeds, on {of}.",
    "Latency and images/s: predictions by the first seed, on {here}, of random uint8 images that "
    "are already on the device; compiled, warm, preprocessing included, until the logits are "
    "ready. Medians, and in brackets quartiles, of up to {rounds} rounds in which all models take "
    "turns.",
)


def compiled_prediction(model: Classifier, image_size: int, batch: int) -> Callable[[], jax.Array]:
    """Returns a call that computes the logits of the same `batch` random images each time."""
    pixels = np.random.default_rng(0).integers(0, 256, (batch, image_size, image_size, 3), np.uint8)
    images = jax.device_put(pixels)
    # As a list of arrays: to take a model apart at each call would cost more than a small model.
    weights, structure = jax.tree.flatten(model)

    def predict(weights: list, images: jax.Array) -> jax.Array:
        whole = jax.tree.unflatten(structure, weights)
        return whole(whole.preprocess(images))

    program = jax.jit(predict).lower(weights, images).compile()
    return lambda: program(weights, images)


def time_in_turn(
    calls: dict[str, Callable], rounds: int, settle: float = 0.0
) -> dict[str, list[float]]:
    """Returns the seconds of one call of each, for every round; a slow one sits out the last.

    `settle` are seconds before each turn, until threads of the one before have gone to sleep.
    """
    repeats, seconds = {}, {label: [] for label in calls}
    for label, call in calls.items():
        jax.block_until_ready(call())
        began = time.perf_counter()
        jax.block_until_ready(call())
        repeats[label] = max(1, int(SECONDS / rounds / (time.perf_counter() - began)))
    labels = list(calls)
    for number in range(rounds):
        first = number % len(labels)
        for label in labels[first:] + labels[:first]:
            spent = sum(seconds[label]) * repeats[label]
            if spent > SECONDS and len(seconds[label]) >= LEAST_ROUNDS:
                continue
            time.sleep(settle)
            began = time.perf_counter()
            for _ in range(repeats[label]):
                jax.block_until_ready(calls[label]())
            seconds[label].append((time.perf_counter() - began) / repeats[label])
    return seconds


def fitting_batch(seconds_of_one: float, limit: int) -> int:
    """Returns the `limit`, or a smaller power of two where so many images take over a second."""
    fits = SECONDS / seconds_of_one
    return limit if fits >= limit else 2 ** max(0, int(math.log2(max(fits, 1))))


def measure_speed(
    models: dict[str, tuple[Classifier, int]], rounds: int = ROUNDS, batch: int = BATCH
) -> dict[str, dict]:
    """Returns speeds of models with their image sizes: medians and quartiles by label.

    Each is {"milliseconds_at_1", "images_per_second", "batch", "*_quartiles"}.
    """
    if not models:
        return {}
    single = {name: compiled_prediction(*of, batch=1) for name, of in models.items()}
    alone = time_in_turn(single, rounds)
    batches = {name: fitting_batch(np.median(alone[name]), batch) for name in models}
    large = {name: compiled_prediction(*of, batch=batches[name]) for name, of in models.items()}
    together = time_in_turn(large, rounds)
    speeds = {}
    for name in models:
        milliseconds = 1000 * np.array(alone[name])
        images = batches[name] / np.array(together[name])
        speeds[name] = {
            "milliseconds_at_1": float(np.median(milliseconds)),
            "milliseconds_quartiles": np.quantile(milliseconds, (0.25, 0.75)).tolist(),
            "images_per_second": float(np.median(images)),
            "images_per_second_quartiles": np.quantile(images, (0.25, 0.75)).tolist(),
            "batch": batches[name],
        }
    return speeds


def costs_section(comparison: Comparison, rounds: int = ROUNDS, batch: int = BATCH) -> Section:
    """The table of costs and accuracy against four of them; with 0 rounds no model is run."""
    models, warnings = {}, []
    for label, runs in comparison.groups.items() if rounds else ():
        use_compilation_cache(cache_dir_of(runs[0]))
        try:
            models[label] = load_classifier(runs[0]), runs[0].config["data"]["image_size"]
        except UserError as error:
            warnings.append(f"{label} cannot be timed: {error}")
    speeds = measure_speed(models, rounds, batch)
    table = comparison.table
    if any("flops_per_image" in run.cost for run in comparison.runs):
        warnings.append(
            "Runs of an older version: their multiply-adds are half the FLOPs it stored, which on "
            "a CPU left out depthwise convolutions, and compiling counts as training."
        )
    milliseconds = table.label.map({k: v["milliseconds_at_1"] for k, v in speeds.items()})
    drawn = best(comparison, DRAWN)
    figure = charts.draw_pareto(drawn, milliseconds.astype(float).head(DRAWN))
    figure.tight_layout()
    save(figure, comparison.output / "pareto.svg")
    trained_on = ", ".join(sorted(set(table.device)))
    about = [x.format(of=trained_on, here=devices_in_use(), rounds=rounds) for x in EXPLANATION]
    over = "seeds and folds" if comparison.folds else "seeds"
    caption = f"Means over {over}; speed of prediction: medians (quartiles)."
    return Section(
        tables=[_table(table, speeds, caption)],
        details=[Details("How costs are measured", about[: None if speeds else -1])],
        chart="pareto",
        warnings=warnings,
        finding=" ".join(filter(None, [_front(table), _finding(speeds)])),
        data=speeds,
    )


def _table(table: pd.DataFrame, speeds: dict[str, dict], about: str) -> Table:
    """Returns the costs of every model as a reader sees them."""

    def bytes_of(value: float) -> str:
        return NONE if pd.isna(value) else f"{scaled(value)}B".replace(" B", "B")

    def speed(label: str, median: str, quartiles: str, write: Callable[[float], str]) -> str:
        if label not in speeds:
            return NONE
        low, high = speeds[label][quartiles]
        return f"{write(speeds[label][median])} ({write(low)} to {write(high)})"

    latency, rate = "milliseconds", "images_per_second"
    columns = {
        "model": table.label,
        "parameters": table.parameters.map(scaled),
        "multiply-adds": table.multiply_adds_per_image.map(scaled),
        "training step memory": table.train_step_memory_bytes.map(bytes_of),
        "training, s": table.seconds.map(scaled),
        "compilation, s": table.compile_seconds.map(scaled),
        "to best, s": table.seconds_to_best.map(scaled),
        "training images/s": table.train_images_per_second.map(scaled),
        "latency, ms per image": [
            speed(label, f"{latency}_at_1", f"{latency}_quartiles", _number)
            for label in table.label
        ],
        "prediction images/s": [
            speed(label, rate, f"{rate}_quartiles", scaled) for label in table.label
        ],
        "in batches of": [str(speeds[x]["batch"]) if x in speeds else NONE for x in table.label],
    }
    if len(batches := {of["batch"] for of in speeds.values()}) < 2:
        del columns["in batches of"]
        about += f" Images/s in batches of {max(batches)}." if batches else ""
    frame = pd.DataFrame(columns).astype(str)
    return as_table(frame.loc[:, (frame != NONE).any()], about)


def _number(value: float) -> str:
    """Three digits, thousands in full."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _front(table: pd.DataFrame) -> str:
    """Which models no other beats in score and multiply-adds."""
    front = pareto_front(table.multiply_adds_per_image, table.score)
    names = list(table.label[front])
    if not names:
        return "Multiply-adds are not known of any model."
    if len(names) == 1:
        return f"{names[0]} is both the cheapest and the most accurate model."
    return f"Best accuracy for their cost: {listed(names)}."


def _finding(speeds: dict[str, dict]) -> str:
    """Which model answers fastest, and which slowest."""
    if len(speeds) < 2:
        return ""
    order = sorted(speeds, key=lambda label: speeds[label]["milliseconds_at_1"])
    fast, slow = (speeds[label]["milliseconds_at_1"] for label in (order[0], order[-1]))
    return (
        f"{order[0]} predicts fastest, in {_number(fast)} ms per image; {order[-1]} takes "
        f"{times(slow / fast)} times as long."
    )


def main(argv: list[str]) -> None:
    """Measures the models of a workdir and prints the table."""
    usage = "analysis.costs WORKDIR [--rounds=10] [--batch=256]"
    comparison = compare_workdir(*arguments(argv, usage))
    output_folder(comparison.output, "report")
    comparison = replace(comparison, groups=first_folds(comparison.groups))
    section = costs_section(comparison, ROUNDS_FLAG.value, BATCH_FLAG.value)
    (table,) = section.tables
    print("\n".join(filter(None, [str(table), table.caption, *section.warnings, section.finding])))


if __name__ == "__main__":
    ROUNDS_FLAG = flags.DEFINE_integer("rounds", ROUNDS, "Rounds of timing", lower_bound=3)
    BATCH_FLAG = flags.DEFINE_integer("batch", BATCH, "Images predicted at once", lower_bound=1)
    run_command(main)
