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
from data.randomness import phase_key
from errors import Pruned, UserError
from experiment.fields import first_trained_stage, phase_config, phase_names, stored_config
from experiment.files import DamagedFile, read_json, read_status, run_dirs, write_json
from experiment.grid import AS_BEFORE
from experiment.runner import FINAL, GROUP, kin
from input_pipeline import Dataset, load_dataset
from models import Classifier, create_model
from models.classifier import MISTAKES, check_architecture, split_model
from training.cost import model_cost
from training.distillation import note_teachers
from training.heads import HeadGroup, SeedRecord
from training.log import environment
from training.phase import save_augmented_batch, train_phase
from training.preflight import check_phases, inspect_pixels
from training.record import Diverged, RunRecord
from training.results import complete, cost, predicted_parts, prediction_memory, write_predictions
from training.steps import make_eval_step, trained
from training.stored_features import FrozenStages
from training.together import obstacle, seeds_at_once, tries_settings
from training.weights import find_weights


def train_and_evaluate(
    config: ConfigDict,
    run_dir: Path,
    should_stop: Callable[[], bool] = lambda: False,
    watch: Callable[[float, float], None] | None = None,
) -> dict:
    """Trains one model as `config` says, or goes on where an interrupted run stopped.

    Args:
      config: one run's config, as `experiment.grid.expand` returns it.
      run_dir: where everything is written.
      should_stop: asked after every step; when true the state is saved.
      watch: called after every validation with the epoch and the loss; it may raise Pruned.

    Returns:
      What `summary.json` holds; its `status` is "complete", "diverged" or "pruned".

    Raises:
      Interrupted: `should_stop` was true, and the state is saved.
      UserError: the config, the data or the disk is at fault.
    """
    if tries_settings(config):
        return train_together([config], [run_dir], should_stop)[0]
    run_dir = Path(run_dir)
    dataset, model = prepare(config, [run_dir])
    summary = begin([config], [run_dir], dataset, model)
    record = RunRecord(config, run_dir, dataset, model, device_mesh(), should_stop)
    record.watch = watch
    try:
        weights = train(record) if model.trained_by_gradient else fit(record)
        metrics, memory = predict(record, weights)
    except Diverged as error:
        summary |= {"status": "diverged", "error": str(error), "cost": cost(record, None)}
    except Pruned as error:
        record.count_time()
        summary |= {"status": "pruned", "error": str(error), "cost": cost(record, None)}
    else:
        summary |= complete(record, weights, metrics, cost(record, memory), summary)
    finally:
        record.close()
    write_json(run_dir / "summary.json", summary)
    return summary


def train_runs(
    configs: list[ConfigDict], run_dirs: list[Path], should_stop: Callable[[], bool]
) -> list[dict]:
    """Trains a run, or several at once (see `train_together`); returns their summaries."""
    if len(configs) == 1:
        return [train_and_evaluate(configs[0], run_dirs[0], should_stop)]
    return train_together(configs, run_dirs, should_stop)


def train_together(
    configs: list[ConfigDict],
    run_dirs: list[Path],
    should_stop: Callable[[], bool] = lambda: False,
) -> list[dict]:
    """Trains the heads of several seeds at once, as `train_and_evaluate` would one by one.

    The configs differ in their seed alone; `training.together` says which can be. The group's state
    lies in the first run directory; of directories that are complete, nothing is written.
    """
    run_dirs = [Path(run_dir) for run_dir in run_dirs]
    dataset, model = prepare(configs[0], run_dirs)
    if why := obstacle(configs[0], model, dataset):
        raise UserError(f"these runs cannot be trained together: {why}")
    left = [s for s, run_dir in enumerate(run_dirs) if read_status(run_dir) not in FINAL]
    summary = begin([configs[s] for s in left], [run_dirs[s] for s in left], dataset, model)
    names = ["/".join(run_dir.resolve().parts[-2:]) for run_dir in run_dirs]
    for s in left:
        write_json(run_dirs[s] / GROUP, {"runs": names})
    mesh, records = device_mesh(), []
    for config, run_dir in zip(configs, run_dirs, strict=True):
        records.append(SeedRecord(config, run_dir, dataset, model, mesh, should_stop))
        records[-1].feeds = records[0].feeds
    group = HeadGroup(records, initial_arrays(configs, model, dataset), names)
    try:
        group.train()
        write_seeds(group, left, summary)
    finally:
        for opened in (group, *records):
            opened.close()
    return [read_json(run_dir / "summary.json") for run_dir in run_dirs]


def write_seeds(group: HeadGroup, seeds: list[int], summary: dict) -> None:
    """Writes the run directories of some seeds of a group; `summary` is how each one begins."""
    lead = group.lead
    fixed = model_cost(lead.model, lead.config.data.image_size)
    fixed["shared_by"] = {"seeds": len(group.records), "settings": len(group.settings)}
    memory = prediction_memory(lead, group.weights(0, 0))
    predicted = {part: group.predictions(part) for part in predicted_parts(lead.config)}
    for seed in seeds:
        record, chosen = group.records[seed], group.chosen(seed)
        setting = chosen or 0
        record.progress = group.account(seed, setting)
        save_augmented_batch(record, group.config, phase_key(record.config.seed, 0))
        for line in group.lines[seed][setting]:
            record.metrics.write(**line)
        own = dict(summary)
        if tries_settings(lead.config):
            own["settings"] = {"tried": group.tried(seed)}
        if chosen is None:
            error = group.errors[seed][setting]
            own |= {"status": "diverged", "error": error, "cost": cost(record, None, fixed)}
        else:
            if "settings" in own:
                own["settings"]["chosen"] = group.settings[chosen]
            metrics = {}
            for part, (scores, logits) in predicted.items():
                found = {name: values[seed][chosen] for name, values in scores.items()}
                metrics[part] = write_predictions(record, part, found, logits[seed, chosen])
            weights, spent = group.weights(seed, chosen), cost(record, memory, fixed)
            own |= complete(record, weights, metrics, spent, own)
        write_json(record.run_dir / "summary.json", own)


def initial_arrays(configs: list[ConfigDict], model: Classifier, dataset: Dataset) -> list[dict]:
    """Returns {"params", "stats"} that each seed begins with: the first one's are the model's.

    Of the others, they are what trains: frozen stages are the same.
    """
    _, params, stats = split_model(model)
    settings = phase_config(configs[0], phase_names(configs[0])[0])
    first = first_trained_stage(settings.train, len(model.stages))

    @jax.jit  # once for all seeds; what is frozen is not computed
    def of_seed(seed: jax.Array) -> dict:
        fresh = build_model(configs[0], dataset.num_classes, dataset.class_names, seed)
        _, params, stats = split_model(fresh)
        return {"params": trained(params, first), "stats": trained(stats, first)}

    rest = [of_seed(config.seed) for config in configs[1:]]
    return [{"params": params, "stats": stats}, *rest]


def prepare(config: ConfigDict, run_dirs: list[Path]) -> tuple[Dataset, Classifier]:
    """Returns the data and the initial model of a run, after all checks that need them."""
    dataset = load_dataset(config.data, config.runtime.cache_dir, config.runtime.resident_limit_mb)
    for run_dir in run_dirs:
        check_data(dataset, config, run_dir)
    model = build_model(config, dataset.num_classes, dataset.class_names)
    check_phases(config, model, dataset, device_mesh())
    return dataset, model


def begin(
    configs: list[ConfigDict], run_dirs: list[Path], dataset: Dataset, model: Classifier
) -> dict:
    """Writes what is known of runs before they train; returns how their summaries begin.

    The runs differ in their seed alone; `model` is of the first.
    """
    where = environment()
    for config, run_dir in zip(configs, run_dirs, strict=True):
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(run_dir / "config.json", stored_config(config))
        write_json(run_dir / "environment.json", where)
        write_json(run_dir / "dataset.json", dataset.to_dict(config.data))
    if not configs:
        return {}
    config = configs[0]
    summary = {
        "model": config.model.to_dict() | dict(model.fields),
        "image_size": config.data.image_size,
        "preprocessing": model.preprocessing.to_dict(),
        "weights": config.weights,
    }
    summary |= note_teachers(config, dataset, run_dirs)
    if config.weights != "none" and config.preflight != "off":
        strict = config.preflight == "error"
        summary["preflight"] = inspect_pixels(model, sample(dataset), config.weights, strict=strict)
        for run_dir in run_dirs:
            write_json(run_dir / "preflight.json", summary["preflight"])
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

    Returns the metrics of each part, and the bytes on each device that a batch of it takes.
    """
    metrics, first = {}, frozen_in_all(record.progress.phases)
    memory = prediction_memory(record, weights)
    feeds = {part: record.feed(part) for part in predicted_parts(record.config)}
    if first:
        stages = FrozenStages(record.config, record.model, weights, first)
        feeds = {part: stages.features(feed) for part, feed in feeds.items()}
    eval_step = make_eval_step(record.model, first)
    for part, feed in feeds.items():
        scores, logits = record.evaluate(feed, weights, eval_step)
        metrics[part] = write_predictions(record, part, scores, logits)
    return metrics, memory


def frozen_in_all(phases: list[dict]) -> int:
    """Returns the stage before which all phases of a run stored features; 0 if there is none."""
    firsts = {p["first_trained_stage"] if p["stored_features"] else 0 for p in phases}
    return firsts.pop() if len(firsts) == 1 else 0


# --- before training ----------------------------------------------------------------------------


def device_mesh() -> Mesh:
    """Returns all devices along one axis, "data", over which batches are divided."""
    return Mesh(np.array(jax.devices()), ("data",))


def build_model(
    config: ConfigDict,
    num_classes: int,
    class_names: list[str] | None = None,
    seed: jax.Array | None = None,
) -> Classifier:
    """Returns the model of a run's config, initialised from its seed and its pretrained weights.

    `seed`, which may be traced, stands in for the config's.
    """
    fields, weights = config.model.to_dict(), config.weights
    if weights.startswith("run:"):
        find_weights(Path(weights.removeprefix("run:")))
    model = create_model(
        fields.pop("name"),
        num_classes,
        weights=weights,
        class_names=class_names,
        seed=config.seed if seed is None else seed,
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
    check_identity(stored, current, str(run_dir), lambda: dataset.identity_table, folder)


def check_run(config: ConfigDict) -> int:
    """Finds every mistake in a run's config that shows without training.

    Returns how many seeds of it may be trained at once.

    Raises:
      UserError: about its data, its phases, or a model that does not fit the images.
    """
    dataset = load_dataset(config.data, config.runtime.cache_dir, config.runtime.resident_limit_mb)
    model = nnx.eval_shape(lambda: build_model(config, dataset.num_classes, dataset.class_names))
    check_architecture(model, config.data.image_size)
    check_phases(config, model, dataset, device_mesh())
    return seeds_at_once(config, model, dataset)


def check_runs(configs: list[ConfigDict], workdir: Path) -> tuple[list[Dataset], dict[str, int]]:
    """Checks every run of a grid, and that all runs of the workdir are of the same data.

    Runs whose configs ask for other data may differ. Returns the different data, and how many runs
    of a kin, which differ in their seed alone, may be trained at once.
    """
    at_once, datasets = {}, []
    check_fractions(configs)
    for config in configs:
        if kin(config) in at_once:
            continue
        at_once[kin(config)] = check_run(config)
        dataset = load_dataset(
            config.data, config.runtime.cache_dir, config.runtime.resident_limit_mb
        )
        if not any(same_data(config.data.to_dict(), other.data.to_dict()) for other, _ in datasets):
            datasets.append((config, dataset))
    for run_dir in [*run_dirs(workdir), *sorted(workdir.glob("search/*/trial*"))]:
        try:
            stored = read_json(run_dir / "config.json").get("data")
        except DamagedFile:  # of a run outside this grid; the report lists it
            continue
        for config, dataset in datasets:
            if stored and same_data(stored, stored_config(config)["data"]):
                check_data(dataset, config, run_dir)
    for _, dataset in datasets:
        write_table(dataset.identity_table, workdir / "audit", dataset.identity)
    return [dataset for _, dataset in datasets], at_once


def check_fractions(configs: list[ConfigDict]) -> None:
    """Raises a UserError if two values of `data.train_fraction` keep equally many images."""
    if len({config.data.train_fraction for config in configs}) < 2:
        return
    fractions: dict[tuple, float] = {}
    for config in configs:
        data = dict(config.data)
        fraction, seed = data.pop("train_fraction", 1.0), data.pop("train_seed", config.seed)
        where, limit = config.runtime.cache_dir, config.runtime.resident_limit_mb
        kept = len(load_dataset(config.data, where, limit).rows["train"])
        key = (config.model.name, ConfigDict(data).to_json(), seed, kept)
        if (other := fractions.setdefault(key, fraction)) != fraction:
            raise UserError(
                f"config.data.train_fraction: {other:g} and {fraction:g} both keep {kept} training "
                "images, in whole images or groups, at least one of each class: leave one out"
            )


def same_data(first: dict, second: dict) -> bool:
    """Returns whether two sections `data` ask for the same images, of any size and anywhere."""
    free = {"source", "path", "tfds_dir", "image_size", "store_size", "resize", "interpolation"}
    before = {k.removeprefix("data."): v for k, v in AS_BEFORE.items() if k.startswith("data.")}
    first, second = before | first, before | second
    return all(first[key] == second[key] for key in (first.keys() & second.keys()) - free)
