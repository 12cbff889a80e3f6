"""One run: train a model, keep its best weights, evaluate them once, write the run directory.

Every number drawn comes from (seed, purpose, step), so an interrupted run that goes on from a
checkpoint ends with the same bits as one that was never interrupted.
"""

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from tqdm import tqdm

import checkpoint
from augmentation import augment, image_sheet
from cost import model_cost, peak_memory
from experiment import stored_config
from input_pipeline import Dataset, Feed, check_batches, load_dataset, steps_per_epoch
from models import Classifier, create_model
from models.classifier import split_model
from optimizer import make_optimizer, make_plateau, make_schedule
from recorder import Recorder, environment, write_json
from steps import (
    Metrics,
    class_weights,
    copy_arrays,
    evaluated_weights,
    initial_state,
    make_eval_step,
    make_train_step,
    step_keys,
)

SAY_EVERY_SECONDS = 10.0  # a line of progress where there is no terminal for a bar


class Interrupted(Exception):
    """The run was asked to stop; its state is saved and it can go on."""


class Diverged(Exception):
    """The loss or its gradient stopped being finite."""


@dataclass
class Progress:
    """What the host knows of a run beside the arrays; part of every checkpoint."""

    step: int = 0
    finished: bool = False
    best_step: int = -1
    best_loss: float | None = None
    evaluations_since_best: int = 0
    seconds: float = 0.0  # of training and validation, summed over interruptions
    seconds_to_best: float = 0.0
    timed_images: int = 0  # trained on, without the steps that compile
    timed_seconds: float = 0.0


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
        "model": config.model.to_dict(),
        "image_size": config.data.image_size,
        "preprocessing": model.preprocessing.to_dict(),
    }
    run = TrainingRun(config, run_dir, dataset, model, mesh, should_stop)
    try:
        weights = run.train() if model.trained_by_gradient else run.fit()
    except Diverged as error:
        summary |= {"status": "diverged", "error": str(error), "cost": run.cost()}
    else:
        summary |= {"status": "complete", "metrics": run.predict(weights), "cost": run.cost()}
        summary |= {"best_step": run.progress.best_step, "steps": run.progress.step}
    finally:
        if run.recorder:
            run.recorder.close()
    write_json(run_dir / "summary.json", summary)
    return summary


def build_model(config: ConfigDict, num_classes: int) -> Classifier:
    """Returns the model of a run's config, freshly initialised from its seed."""
    fields = config.model.to_dict()
    return create_model(
        fields.pop("name"),
        num_classes,
        seed=config.seed,
        image_size=config.data.image_size,
        dtype=config.compute_dtype,
        **fields,
    )


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
        self.clock = self.saved_at = self.said_at = time.monotonic()

    def feed(self, part: str) -> Feed:
        """Returns the batches of a part."""
        return Feed(self.dataset, part, self.mesh, self.config.runtime)

    def put(self, tree):
        """Copies a tree of arrays to every device."""
        return jax.device_put(jax.tree.map(jnp.asarray, tree), self.replicated)

    # --- training by gradient -------------------------------------------------------------------

    def train(self) -> dict:
        """Trains and returns the best weights: {"params", "stats"}.

        This is one phase: all parameters under one schedule. A run of several phases calls the
        like of it once a phase, each with an optimizer over what that phase trains.
        """
        config, feed = self.config, self.feed("train")
        per_epoch = steps_per_epoch(len(feed), config.batch_size)
        total = config.epochs * per_epoch
        schedule = make_schedule(config, per_epoch, total)
        optimizer = make_optimizer(config, schedule)
        state = self.resume(self.put(initial_state(config, self.model, optimizer)))
        progress, key = self.progress, jax.random.key(config.seed)
        self.recorder = Recorder(self.run_dir, progress.step, config.runtime.tensorboard)
        if progress.step == 0:
            self._save_augmented_batch(feed, key)
        weights = class_weights(config, self.dataset)
        train_step = make_train_step(config, self.model, optimizer, weights)
        validation = self.feed("validation")
        batches = feed.training(config.seed, config.batch_size, progress.step, total)
        self.clock = time.monotonic()
        name = f"{config.model.name} seed {config.seed}"
        with tqdm(total=total, initial=progress.step, desc=name, leave=False, disable=None) as bar:
            while not progress.finished:
                stop, evaluates = next_pause(progress.step, total, per_epoch, config)
                state, speed = self._train_until(stop, state, train_step, batches, key, bar)
                where = {"epoch": progress.step / per_epoch, "phase": config.phases[0]}
                rate = float(schedule(progress.step - 1)) * float(state["rate_scale"].scale)
                self._log_training(state, where, rate, speed)
                state["metrics"] = self.put(Metrics.empty())
                if evaluates:
                    state = self._validate(state, validation, where, bar)
                progress.finished = progress.step == total or self._out_of_patience()
                self._count_time()
                due = self.clock - self.saved_at >= config.runtime.checkpoint_every_seconds
                if due or progress.finished:
                    self.save(state)
                if not progress.finished and self.should_stop():
                    self._interrupt(state)
        return self.best

    def _train_until(
        self,
        stop: int,
        state: dict,
        train_step: Callable,
        batches: Iterator[dict],
        key: jax.Array,
        bar: tqdm,
    ) -> tuple[dict, dict]:
        """Trains up to step `stop`; returns the state and {"images_per_second"} if measured."""
        progress = self.progress
        began, first = time.monotonic(), progress.step
        while progress.step < stop:
            state = train_step(state, next(batches), key)
            progress.step += 1
            bar.update()
            if not self.compile_seconds:  # the first step of this process: not part of the speed
                jax.block_until_ready(state)
                self.compile_seconds = time.monotonic() - began
                began, first = time.monotonic(), progress.step
            if progress.step < stop and self.should_stop():  # at `stop` the pause comes first
                self._interrupt(state)
        jax.block_until_ready(state)
        images, seconds = (progress.step - first) * self.config.batch_size, time.monotonic() - began
        if not images:
            return state, {}
        progress.timed_images += images
        progress.timed_seconds += seconds
        return state, {"images_per_second": images / seconds}

    def _log_training(self, state: dict, where: dict, rate: float, speed: dict) -> None:
        """Writes the training metrics since the last pause; raises Diverged if they broke off."""
        bad = int(state["bad_step"])
        if bad >= 0:
            self.recorder.write("train", bad + 1, **where, loss=float("nan"), learning_rate=rate)
            raise Diverged(
                f"the loss or its gradient was not finite at step {bad + 1} (learning rate "
                f"{rate:.3g}); try {self._advice()}"
            )
        measured = {name: float(value) for name, value in state["metrics"].compute().items()}
        self.recorder.write(
            "train", self.progress.step, **where, **measured, learning_rate=rate, **speed
        )

    def _advice(self) -> str:
        advice = "a lower optimizer.learning_rate, schedule.warmup_epochs=1, optimizer.clip_norm=1"
        return advice + ", compute_dtype=float32" * (self.config.compute_dtype != "float32")

    def _validate(self, state: dict, validation: Feed, where: dict, bar: tqdm) -> dict:
        """Evaluates on validation images, keeps the weights if they are the best so far."""
        progress, weights = self.progress, evaluated_weights(state)
        measured, _ = self.evaluate(validation, weights)
        self.recorder.write("validation", progress.step, **where, **measured)
        if not math.isfinite(measured["loss"]):
            raise Diverged(
                f"the validation loss was not finite at step {progress.step}; try {self._advice()}"
            )
        text = f"validation accuracy {measured['accuracy']:.4f}, loss {measured['loss']:.4f}"
        bar.set_postfix_str(text)
        if bar.disable and time.monotonic() - self.said_at > SAY_EVERY_SECONDS:
            print(f"  step {progress.step} of {bar.total}: {text}", flush=True)
            self.said_at = time.monotonic()
        if self.config.schedule.name == "plateau":
            plateau = make_plateau(self.config)
            _, scale = plateau.update({}, state["rate_scale"], value=measured["loss"])
            state["rate_scale"] = self.put(scale)
        self._count_time()
        if progress.best_loss is None or measured["loss"] < progress.best_loss:
            progress.best_loss, progress.best_step = measured["loss"], progress.step
            progress.seconds_to_best, progress.evaluations_since_best = progress.seconds, 0
            self.best = copy_arrays(weights)
        else:
            progress.evaluations_since_best += 1
        return state

    def _out_of_patience(self) -> bool:
        patience = self.config.early_stopping_patience
        return bool(patience) and self.progress.evaluations_since_best >= patience

    def _count_time(self) -> None:
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

    def _interrupt(self, state: dict) -> None:
        self._count_time()
        self.save(state)
        raise Interrupted(f"stopped at step {self.progress.step}; the state is saved")

    def resume(self, state: dict) -> dict:
        """Returns the newest state that can be read, or `state` itself where there is none."""
        for path in checkpoint.find(self.checkpoints, "latest"):
            kept = [path]
            try:
                restored, record = checkpoint.restore(path, state)
                progress = Progress(**record)
                if progress.best_step >= 0:
                    kept.append(checkpoint.path_of(self.checkpoints, "best", progress.best_step))
                    self.best = self.put(checkpoint.restore(kept[1], evaluated_weights(state))[0])
            except checkpoint.CheckpointError as error:
                print(f"warning: {error}\nThe run goes on from an earlier state.", file=sys.stderr)
                for damaged in kept:
                    shutil.rmtree(damaged, ignore_errors=True)
                continue
            self.progress = progress
            checkpoint.keep(self.checkpoints, kept)
            return self.put(restored)
        return state

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
        self._count_time()
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

    def evaluate(self, feed: Feed, weights: dict) -> tuple[dict, np.ndarray]:
        """Returns {"loss", "accuracy"} over every image of a feed once, and logits [N, K]."""
        total, logits = self.put(Metrics.empty()), []
        for batch in feed.evaluation(self.config.eval_batch_size):
            out, total = self.eval_step(weights, total, batch)
            logits.append(out)
        count = int(total.accuracy.count)
        assert count == len(feed), f"counted {count} of {len(feed)} images"
        measured = {name: float(value) for name, value in total.compute().items()}
        return measured, np.concatenate([np.asarray(part) for part in logits])[: len(feed)]

    def predict(self, weights: dict) -> dict:
        """Writes the predictions on validation and test images; returns the metrics of both."""
        result = {}
        for part in ("validation", "test"):
            measured, logits = self.evaluate(self.feed(part), weights)
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
            "seconds": progress.seconds,
            "seconds_to_best": progress.seconds_to_best,
            "compile_seconds": self.compile_seconds,
            **peak_memory(),
        }

    def _save_augmented_batch(self, feed: Feed, key: jax.Array) -> None:
        """Writes `augmented_batch.png`: 32 images of the first batch as the model sees them."""
        config = self.config.augment
        batch = next(feed.training(self.config.seed, self.config.batch_size, 0, 1))
        targets = jax.nn.one_hot(batch["label"], self.dataset.num_classes)
        draw = jax.jit(lambda *arguments: augment(*arguments, config)[0])
        images = draw(step_keys(key, 0)[0], batch["image"], targets)
        shown = np.asarray(images)[:32].round().astype(np.uint8)
        image_sheet(shown).save(self.run_dir / "augmented_batch.png")


def next_pause(step: int, total: int, per_epoch: int, config: ConfigDict) -> tuple[int, bool]:
    """Returns the step after `step` at which training pauses to log, and whether it evaluates."""

    def multiple_after(interval: int) -> int:
        return step - step % interval + interval

    evaluation = min(multiple_after(per_epoch * config.eval_every_epochs), total)
    pause = min(multiple_after(config.runtime.log_every_steps), evaluation)
    return pause, pause == evaluation
