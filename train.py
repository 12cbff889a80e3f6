"""One run: train a model, keep its best weights, evaluate them once, write the run directory.

Every number drawn comes from (seed, purpose, step), so an interrupted run that goes on from a
checkpoint ends with the same bits as one that was never interrupted.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pandas as pd
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data.identity import check_identity, write_table
from experiment.fields import phase_names, stored_config
from experiment.files import DamagedFile, read_json, write_json
from input_pipeline import Dataset, load_dataset
from models import Classifier, create_model
from models.classifier import MISTAKES, check_architecture, split_model
from training.cost import model_cost, step_memory
from training.log import environment
from training.phase import train_phase
from training.preflight import check_phases, inspect_pixels
from training.record import Diverged, RunRecord
from training.steps import Metrics, make_eval_step
from training.weights import find_weights, save_weights


def train_and_evaluate(
    config: ConfigDict, run_dir: Path, should_stop: Callable[[], bool] = lambda: False
) -> dict:
    """Trains one model as `config` says, or goes on where an interrupted run stopped.

    Args:
      config: one run's config, as `experiment.grid.expand` returns it.
      run_dir: where everything is written.
      should_stop: asked after every step; when true the state is saved.

    Returns:
      What `summary.json` holds; its `status` is "complete" or "diverged".

    Raises:
      Interrupted: `should_stop` was true, and the state is saved.
      UserError: the config, the data or the disk is at fault.
    """
    run_dir = Path(run_dir)
    dataset = load_dataset(config.data, config.runtime.cache_dir)
    mesh = device_mesh()
    check_data(dataset, config, run_dir)
    model = build_model(config, dataset.num_classes, dataset.class_names)
    check_phases(config, model, dataset, mesh)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "config.json", stored_config(config))
    write_json(run_dir / "environment.json", environment())
    write_json(run_dir / "dataset.json", dataset.to_dict(config.data))
    summary = {
        "model": config.model.to_dict() | dict(model.fields),
        "image_size": config.data.image_size,
        "preprocessing": model.preprocessing.to_dict(),
        "weights": config.weights,
    }
    if config.weights != "none" and config.preflight != "off":
        strict = config.preflight == "error"
        summary["preflight"] = inspect_pixels(model, sample(dataset), config.weights, strict=strict)
        write_json(run_dir / "preflight.json", summary["preflight"])

    record = RunRecord(config, run_dir, dataset, model, mesh, should_stop)
    try:
        weights = train(record) if model.trained_by_gradient else fit(record)
        metrics, memory = predict(record, weights)
    except Diverged as error:
        summary |= {"status": "diverged", "error": str(error), "cost": cost(record, None)}
    else:
        progress = record.progress
        summary |= {"status": "complete", "metrics": metrics, "cost": cost(record, memory)}
        summary |= {"best_step": progress.best_step, "steps": progress.step}
        summary |= {"phases": progress.phases}
        arrays = {path: np.asarray(a) for part in weights.values() for path, a in part.items()}
        save_weights(run_dir, arrays, stored_config(config), dataset.class_names, summary)
    finally:
        record.close()
    write_json(run_dir / "summary.json", summary)
    return summary


def sample(dataset: Dataset, count: int = 128) -> np.ndarray:
    """Returns training images, of every class one before of any a second: uint8 [n, S, S, 3]."""
    labels, rows = dataset.labels("train"), dataset.rows["train"]
    turn = pd.Series(labels).groupby(labels).cumcount().to_numpy()
    chosen = rows[np.sort(np.argsort(turn, kind="stable")[:count])]
    return dataset.decoded.images[chosen]


def train(record: RunRecord) -> dict:
    """Trains phase after phase and returns the best weights over all: {"params", "stats"}.

    Each phase starts from the best weights so far.
    """
    _, params, stats = split_model(record.model)
    weights, stored = record.put({"params": params, "stats": stats}), record.stored
    last = len(phase_names(record.config)) - 1
    while True:
        if record.progress.finished:
            if record.progress.phase == last:
                return record.best
            record.progress.begin_next_phase()
            stored = None
        train_phase(record, record.best or weights, stored)


def fit(record: RunRecord) -> dict:
    """Fits a model that has no gradient and returns its weights: {"params", "stats"}."""
    config, model, dataset = record.config, record.model, record.dataset
    train, validation = (
        (dataset.images(part), dataset.labels(part)) for part in ("train", "validation")
    )
    record.start_clock()
    model.fit(train, validation, config.eval_batch_size)
    _, params, stats = split_model(model)
    weights = record.put({"params": params, "stats": stats})
    record.count_time()
    scores, _ = record.evaluate(record.feed("validation"), weights, make_eval_step(model))
    record.progress.best_loss, record.progress.best_step = scores["loss"], 0
    record.progress.seconds_to_best = record.progress.seconds
    record.metrics.write("validation", 0, epoch=0.0, phase="fit", **scores)
    return weights


def predict(record: RunRecord, weights: dict) -> tuple[dict, int | None]:
    """Writes the predictions on validation and test images, and the groups of `data.groups`.

    Returns the metrics of both, and the bytes on each device that a batch of predictions takes.
    """
    config, dataset, metrics = record.config, record.dataset, {}
    eval_step, empty = make_eval_step(record.model), record.put(Metrics.empty())
    batch = next(record.feed("validation").evaluation(config.eval_batch_size))
    memory = step_memory(eval_step, weights, empty, batch)
    for part in ("validation", "test"):
        scores, logits = record.evaluate(record.feed(part), weights, eval_step)
        labels, groups = dataset.labels(part), dataset.listing.groups
        arrays = {"ids": np.array(dataset.ids(part)), "labels": labels, "logits": logits}
        if groups:
            arrays["groups"] = np.array([groups[row] for row in dataset.rows[part]])
        np.savez(record.run_dir / f"predictions_{part}.npz", **arrays)
        correct = int((logits.argmax(axis=1) == labels).sum())
        metrics[part] = scores | {"correct": correct, "count": len(labels)}
    return metrics, memory


def cost(record: RunRecord, prediction_memory: int | None) -> dict:
    """Returns what the run took, as `summary.json` holds it; bytes are on each device."""
    progress, timed = record.progress, record.progress.timed_seconds
    return model_cost(record.model, record.config.data.image_size) | {
        "train_images_per_second": progress.timed_images / timed if timed else None,
        "seconds": progress.seconds,
        "seconds_to_best": progress.seconds_to_best,
        "compile_seconds": progress.compile_seconds,
        "train_step_memory_bytes": progress.train_step_memory_bytes,
        "predict_step_memory_bytes": prediction_memory,
    }


# --- before training ----------------------------------------------------------------------------


def device_mesh() -> Mesh:
    """Returns all devices along one axis, "data", over which batches are divided."""
    return Mesh(np.array(jax.devices()), ("data",))


def build_model(
    config: ConfigDict, num_classes: int, class_names: list[str] | None = None
) -> Classifier:
    """Returns the model of a run's config, initialised from its seed and its pretrained weights."""
    fields, weights = config.model.to_dict(), config.weights
    if weights.startswith("run:"):
        find_weights(Path(weights.removeprefix("run:")))
    model = create_model(
        fields.pop("name"),
        num_classes,
        weights=weights,
        class_names=class_names,
        seed=config.seed,
        image_size=config.data.image_size,
        dtype=config.compute_dtype,
        **fields,
    )
    if config.preprocessing != "weights":  # an ablation
        model.preprocessing = MISTAKES[config.preprocessing](model.preprocessing)
    return model


def check_data(dataset: Dataset, config: ConfigDict, run_dir: Path) -> None:
    """Raises a UserError if a run directory is of other images, labels or parts than `dataset`."""
    stored = read_json(run_dir / "dataset.json")
    size = read_json(run_dir / "config.json").get("data", {}).get("image_size")
    if "identity" not in stored and size != config.data.image_size:
        return  # of an older version, whose fingerprint depends on the size
    current, folder = dataset.to_dict(config.data), run_dir.parent.parent / "audit"
    check_identity(stored, current, str(run_dir), dataset.identity_table, folder)


def check_run(config: ConfigDict) -> None:
    """Finds every mistake in a run's config that shows without training.

    Raises:
      UserError: about its data, its phases, or a model that does not fit the images.
    """
    dataset = load_dataset(config.data, config.runtime.cache_dir)
    model = nnx.eval_shape(lambda: build_model(config, dataset.num_classes, dataset.class_names))
    check_architecture(model, config.data.image_size)
    check_phases(config, model, dataset, device_mesh())


def check_runs(configs: list[ConfigDict], workdir: Path) -> list[Dataset]:
    """Checks every run of a grid, and that all runs of the workdir are of the same data.

    Runs whose configs ask for other data may differ. Returns the different data.
    """
    checked, datasets = set(), []
    for config in configs:
        settings = ConfigDict(config.to_dict() | {"seed": 0})
        if settings.to_json() in checked:
            continue
        checked.add(settings.to_json())
        check_run(config)
        dataset = load_dataset(config.data, config.runtime.cache_dir)
        if not any(same_data(config.data.to_dict(), other.data.to_dict()) for other, _ in datasets):
            datasets.append((config, dataset))
    for run_dir in sorted(workdir.glob("*/seed*")):
        try:
            stored = read_json(run_dir / "config.json").get("data")
        except DamagedFile:  # of a run outside this grid; the report lists it
            continue
        for config, dataset in datasets:
            if stored and same_data(stored, stored_config(config)["data"]):
                check_data(dataset, config, run_dir)
    for _, dataset in datasets:
        write_table(dataset.identity_table, workdir / "audit", dataset.identity)
    return [dataset for _, dataset in datasets]


def same_data(first: dict, second: dict) -> bool:
    """Returns whether two sections `data` ask for the same images, of any size and anywhere."""
    free = {"path", "tfds_dir", "image_size", "store_size", "resize", "interpolation"}
    return all(first[key] == second[key] for key in (first.keys() & second.keys()) - free)
