"""One run: train a model, keep its best weights, evaluate them once, write the run directory.

Every number drawn comes from (seed, purpose, step), so an interrupted run that goes on from a
checkpoint ends with the same bits as one that was never interrupted.
"""

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from experiment.fields import first_trained_stage, phase_config, phase_names, stored_config
from input_pipeline import Dataset, Feed, check_batches, load_dataset
from models import Classifier, create_model
from models.classifier import MISTAKES, split_model
from training import checkpoint
from training.cost import model_cost, peak_memory
from training.phase import Diverged, Interrupted, Phase, Progress
from training.preflight import inspect_pixels, reference_of
from training.recorder import Recorder, environment, write_json
from training.steps import Metrics, make_eval_step
from training.weights import find_weights, save_weights

__all__ = ["Diverged", "Interrupted", "build_model", "check_phases", "train_and_evaluate"]


def train_and_evaluate(
    config: ConfigDict, run_dir: Path, should_stop: Callable[[], bool] = lambda: False
) -> dict:
    """Trains one model as `config` says, or goes on where an interrupted run stopped.

    Args:
      config: one run's config, as `experiment.expand` returns it.
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
    mesh = Mesh(np.array(jax.devices()), ("data",))
    check_batches(config, mesh)
    model = build_model(config, dataset.num_classes)
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
        strict, name = config.preflight == "error", config.model.name
        found = inspect_pixels(model, sample(dataset), name, config.weights, strict=strict)
        summary["preflight"] = found
        write_json(run_dir / "preflight.json", summary["preflight"])
    run = TrainingRun(config, run_dir, dataset, model, mesh, should_stop)
    try:
        weights = run.train() if model.trained_by_gradient else run.fit()
    except Diverged as error:
        summary |= {"status": "diverged", "error": str(error), "cost": run.cost()}
    else:
        summary |= {"status": "complete", "metrics": run.predict(weights), "cost": run.cost()}
        summary |= {"best_step": run.progress.best_step, "steps": run.progress.step}
        summary |= {"phases": run.progress.phases}
        summary |= {"reference": reference_of(model, weights, sample(dataset))}
        arrays = {path: np.asarray(a) for part in weights.values() for path, a in part.items()}
        save_weights(run_dir, arrays, stored_config(config), dataset.class_names, summary)
    finally:
        if run.recorder:
            run.recorder.close()
    write_json(run_dir / "summary.json", summary)
    return summary


def sample(dataset: Dataset) -> np.ndarray:
    """Returns 128 training images, evenly spaced: uint8 [n, S, S, 3]."""
    rows = dataset.rows["train"]
    return dataset.decoded.images[rows[:: max(1, len(rows) // 128)][:128]]


def build_model(config: ConfigDict, num_classes: int) -> Classifier:
    """Returns the model of a run's config, initialised from its seed and its pretrained weights."""
    fields, weights = config.model.to_dict(), config.weights
    if weights.startswith("run:"):
        weights = f"run:{find_weights(Path(weights.removeprefix('run:')).expanduser()).parent}"
    model = create_model(
        fields.pop("name"),
        num_classes,
        weights=weights,
        seed=config.seed,
        image_size=config.data.image_size,
        dtype=config.compute_dtype,
        **fields,
    )
    if config.preprocessing != "weights":  # an ablation
        model.preprocessing = MISTAKES[config.preprocessing](model.preprocessing)
    return model


def check_phases(config: ConfigDict, model: Classifier) -> None:
    """Raises a UserError if a phase names stages that the model does not have."""
    for name in phase_names(config):
        first_trained_stage(phase_config(config, name).train, len(model.stages))


class TrainingRun:
    """One run under way: the arrays travel through its methods, the host's record stays here."""

    def __init__(
        self,
        config: ConfigDict,
        run_dir: Path,
        dataset: Dataset,
        model: Classifier,
        mesh: Mesh,
        should_stop: Callable[[], bool],
    ):
        self.config, self.run_dir, self.dataset = config, run_dir, dataset
        self.model, self.mesh, self.should_stop = model, mesh, should_stop
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.checkpoints = run_dir / "checkpoints"
        self.checkpoints.mkdir(exist_ok=True)
        self.eval_step = make_eval_step(config, model)
        self.progress = Progress()
        self.best: dict = {}
        self.recorder: Recorder | None = None
        self.compile_seconds = 0.0
        self.inference_speed: float | None = None
        self.clock = self.saved_at = time.monotonic()

    def feed(self, part: str) -> Feed:
        """Returns the batches of a part."""
        return Feed(self.dataset, part, self.mesh, self.config.runtime)

    def put(self, tree):
        """Copies a tree of arrays to every device."""
        return jax.device_put(jax.tree.map(jnp.asarray, tree), self.replicated)

    # --- training by gradient -------------------------------------------------------------------

    def train(self) -> dict:
        """Trains phase after phase and returns the best weights: {"params", "stats"}.

        Each phase starts from the best weights so far, which are those of the lowest validation
        loss over all phases.
        """
        _, params, stats = split_model(self.model)
        weights = self.put({"params": params, "stats": stats})
        stored, progress = self.resume(), self.progress
        self.recorder = Recorder(self.run_dir, progress.step, self.config.runtime.tensorboard)
        names, previous = phase_names(self.config), {}
        if progress.finished:
            prefix = "optimizer/"
            previous = {
                k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)
            }
            stored = None
        while True:
            if progress.finished:
                if progress.phase == len(names) - 1:
                    return self.best
                self._begin_next_phase()
            phase = Phase(self, names[progress.phase], progress.phase)
            previous = phase.train(self.best or weights, stored, previous)
            stored = None

    def _begin_next_phase(self) -> None:
        progress = self.progress
        progress.epochs_before += progress.phases[-1]["epochs"]
        progress.phase, progress.phase_start = progress.phase + 1, progress.step
        progress.finished, progress.evaluations_since_best = False, 0
        progress.timed_images, progress.timed_seconds = 0, 0.0

    def count_time(self) -> None:
        """Adds the time since the last call to the run's seconds."""
        now = time.monotonic()
        self.progress.seconds += now - self.clock
        self.clock = now

    # --- checkpoints ----------------------------------------------------------------------------

    def save(self, state: dict) -> None:
        """Writes the best weights, then the whole state; deletes older ones after that."""
        progress, kept = self.progress, []
        if self.best:
            record = {"step": progress.best_step, "loss": progress.best_loss}
            kept.append(
                checkpoint.save(self.checkpoints, "best", progress.best_step, self.best, record)
            )
        record = asdict(progress)
        kept.append(checkpoint.save(self.checkpoints, "latest", progress.step, state, record))
        checkpoint.keep(self.checkpoints, kept)
        self.saved_at = time.monotonic()

    def interrupt(self, state: dict) -> None:
        """Saves the state and raises Interrupted."""
        self.count_time()
        self.save(state)
        raise Interrupted(f"stopped at step {self.progress.step}; the state is saved")

    def resume(self) -> dict[str, np.ndarray] | None:
        """Takes over the newest state that can be read; returns its arrays, None for none."""
        for path in checkpoint.find(self.checkpoints, "latest"):
            kept = [path]
            try:
                arrays, record = checkpoint.restore_arrays(path)
                progress = Progress(**record)
                if progress.best_step >= 0:
                    kept.append(checkpoint.path_of(self.checkpoints, "best", progress.best_step))
                    best, _ = checkpoint.restore_arrays(kept[1])
            except checkpoint.CheckpointError as error:
                print(f"warning: {error}\nThe run goes on from an earlier state.", file=sys.stderr)
                for damaged in kept:
                    shutil.rmtree(damaged, ignore_errors=True)
                continue
            self.progress = progress
            if progress.best_step >= 0:
                weights = {"params": {}, "stats": {}}
                for name, array in best.items():
                    kind, _, variable = name.partition("/")
                    weights[kind][variable] = array
                self.best = self.put(weights)
            checkpoint.keep(self.checkpoints, kept)
            return arrays
        return None

    # --- models without gradient ----------------------------------------------------------------

    def fit(self) -> dict:
        """Fits a model that has no gradient and returns its weights: {"params", "stats"}."""
        config, progress = self.config, self.progress
        self.recorder = Recorder(self.run_dir, 0, config.runtime.tensorboard)
        train, validation = (
            (self.dataset.images(part), self.dataset.labels(part))
            for part in ("train", "validation")
        )
        self.clock = time.monotonic()
        self.model.fit(train, validation, config.eval_batch_size)
        self.count_time()
        progress.seconds_to_best = progress.seconds
        _, params, stats = split_model(self.model)
        weights = self.put({"params": params, "stats": stats})
        self.eval_step = make_eval_step(config, self.model)
        measured, _ = self.evaluate(self.feed("validation"), weights)
        progress.best_step, progress.best_loss = 0, measured["loss"]
        self.recorder.write("validation", 0, epoch=0.0, phase="fit", **measured)
        checkpoint.keep(self.checkpoints, [])
        checkpoint.save(self.checkpoints, "best", 0, weights, {"step": 0, "loss": measured["loss"]})
        return weights

    # --- evaluation -----------------------------------------------------------------------------

    def evaluate(
        self, feed: Feed, weights: dict, eval_step: Callable | None = None
    ) -> tuple[dict, np.ndarray]:
        """Returns {"loss", "accuracy"} over every image of a feed once, and logits [N, K]."""
        eval_step = eval_step or self.eval_step
        total, logits = self.put(Metrics.empty()), []
        for batch in feed.evaluation(self.config.eval_batch_size):
            out, total = eval_step(weights, total, batch)
            logits.append(out)
        count = int(total.accuracy.count)
        assert count == len(feed), f"counted {count} of {len(feed)} images"
        measured = {name: float(value) for name, value in total.compute().items()}
        return measured, np.concatenate([np.asarray(part) for part in logits])[: len(feed)]

    def predict(self, weights: dict) -> dict:
        """Writes the predictions on validation and test images; returns the metrics of both.

        The second part is timed, for the program is compiled by then.
        """
        result = {}
        for part in ("validation", "test"):
            feed, began = self.feed(part), time.monotonic()
            measured, logits = self.evaluate(feed, weights)
            self.inference_speed = len(logits) / (time.monotonic() - began)
            labels = self.dataset.labels(part)
            path = self.run_dir / f"predictions_{part}.npz"
            np.savez(path, ids=np.array(self.dataset.ids(part)), labels=labels, logits=logits)
            correct = int((logits.argmax(axis=1) == labels).sum())
            result[part] = measured | {"correct": correct, "count": len(labels)}
        return result

    def cost(self) -> dict:
        """Returns what the run took, as `summary.json` holds it."""
        progress, timed = self.progress, self.progress.timed_seconds
        return model_cost(self.model, self.config.data.image_size) | {
            "train_images_per_second": progress.timed_images / timed if timed else None,
            "inference_images_per_second": self.inference_speed,
            "seconds": progress.seconds,
            "seconds_to_best": progress.seconds_to_best,
            "compile_seconds": self.compile_seconds,
            **peak_memory(),
        }
