"""Our side of the benchmark: the very steps and feed of a run."""

import importlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from analysis.speed.worker import NUM_CLASSES, Side, Spec
from data.randomness import phase_key
from errors import UserError
from experiment.fields import phase_config
from experiment.grid import expand
from input_pipeline import Feed, steps_per_epoch
from models import Classifier, create_model
from models.classifier import split_model
from models.weights.own import arrays_of, write_own
from train import build_model, device_mesh
from training.cost import multiply_adds
from training.log import environment
from training.steps import Metrics, initial_state, make_eval_step, train_program

FOREVER = 2**40  # steps


def build(spec: Spec) -> Side:
    """Returns the step of training or evaluation of a model, on images on the device."""
    config = phase_config(config_of(spec), "all")
    model, mesh = build_model(config, NUM_CLASSES), device_mesh()
    feed = Feed(random_dataset(spec), "train", mesh, config.runtime)
    _, params, stats = split_model(model)

    def put(tree):
        return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))

    weights = put({"params": params, "stats": stats})
    make = {"train": training, "infer": inference}[spec.mode]
    run, check = make(config, model, feed, weights, put)

    about = {
        "multiply_adds_per_image": multiply_adds(model, spec.image_size),
        "device": jax.devices()[0].device_kind,
        "environment": environment(),
    }
    return Side(run, device_memory, check, about)


def device_memory() -> int | None:
    """Returns the peak bytes of the first device, None on a CPU."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def config_of(spec: Spec) -> ConfigDict:
    """Returns the config of a run that trains from scratch on images on the device."""
    module = spec.config.removesuffix(".py").replace("/", ".")
    config = importlib.import_module(module).get_config(spec.model)
    config.data.update(source="npz", path="random", image_size=spec.image_size)
    config.update(seeds=(0,), phases="all", compute_dtype=spec.dtype)
    config.update(batch_size=spec.batch_size, eval_batch_size=spec.batch_size)
    config.optimizer.learning_rate, config.schedule.name = 1e-4, "constant"
    config.early_stopping_patience = 0
    config.runtime.feed = "resident"
    return expand(config)[0].config


def random_dataset(spec: Spec) -> SimpleNamespace:
    """Returns what a feed needs of a dataset: random pixels and labels."""
    draw = np.random.default_rng(0)
    shape = (spec.images, spec.image_size, spec.image_size, 3)
    images = draw.integers(0, 256, shape, np.uint8)
    labels = draw.integers(0, NUM_CLASSES, spec.images).astype(np.int32)
    rows = {"train": np.arange(spec.images)}
    return SimpleNamespace(
        rows=rows, labels=lambda part: labels, decoded=SimpleNamespace(images=images, entry="")
    )


def training(
    config: ConfigDict, model: Classifier, feed: Feed, weights: dict, put: Callable
) -> tuple[Callable, Callable]:
    """Returns what takes steps of training, and what checks that the loss is finite."""
    per_epoch = steps_per_epoch(len(feed), config.batch_size)
    steps = (per_epoch, config.epochs * per_epoch)
    program = train_program(config, model, np.ones(NUM_CLASSES, np.float32), steps)
    state = put(initial_state(config, weights, program.optimizer, 0))
    key, batches = phase_key(0, 0), feed.training(0, config.batch_size, 0, FOREVER)

    def run(steps: int) -> None:
        nonlocal state
        for batch in itertools.islice(batches, steps):
            state = program.step(state, batch, key)
        jax.block_until_ready(state)

    def check() -> None:
        if int(state["bad_step"]) >= 0:
            raise UserError(f"the loss was not finite at step {int(state['bad_step'])}")

    return run, check


def inference(
    config: ConfigDict, model: Classifier, feed: Feed, weights: dict, put: Callable
) -> tuple[Callable, Callable]:
    """Returns what takes steps of evaluation, and what checks that the loss is finite."""
    step, total, batches = make_eval_step(model), put(Metrics.empty()), endless(feed, config)

    def run(steps: int) -> None:
        nonlocal total
        logits = []
        for batch in itertools.islice(batches, steps):
            out, total = step(weights, total, batch)
            logits.append(out)
        jax.block_until_ready((logits, total))

    def check() -> None:
        if not np.isfinite(float(total.compute()["loss"])):
            raise UserError("the loss was not finite")

    return run, check


def endless(feed: Feed, config: ConfigDict) -> Iterator[dict]:
    """Yields the batches of evaluation again and again."""
    while True:
        yield from feed.evaluation(config.eval_batch_size)


def write_weights(name: str, image_size: int, path: str) -> None:
    """Writes the initial weights of an architecture, to be read as pretrained ones."""
    model = create_model(name, 1000, image_size=image_size)
    facts = {"model": name, "fields": dict(model.fields), "num_classes": 1000}
    facts["preprocessing"] = model.preprocessing.to_dict()
    write_own(Path(path), arrays_of(model), facts)
