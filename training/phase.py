"""One phase of a run: which stages train, on images or on stored features, until it has had enough.

A run is one phase after the other; see `TrainingRun.train` in train.py.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
import optax
from ml_collections import ConfigDict
from tqdm import tqdm

from data.augmentation import augment, image_sheet
from experiment.fields import first_trained_stage, phase_config
from input_pipeline import Feed, steps_per_epoch
from training import checkpoint
from training.optimizer import make_optimizer, make_plateau, make_schedule
from training.steps import (
    Metrics,
    class_weights,
    copy_arrays,
    evaluated_weights,
    initial_state,
    make_eval_step,
    make_train_step,
    step_keys,
)
from training.stored_features import cache_features, feature_shape, stored_views

SAY_EVERY_SECONDS = 10.0  # a line of progress where there is no terminal for a bar


class Interrupted(Exception):
    """The run was asked to stop; its state is saved and it can go on."""


class Diverged(Exception):
    """The loss or its gradient stopped being finite."""


@dataclass
class Progress:
    """What the host knows of a run beside the arrays; part of every checkpoint."""

    step: int = 0  # over all phases
    finished: bool = False  # the phase
    phase: int = 0  # its number
    phase_start: int = 0  # the step it began after
    epochs_before: float = 0.0  # of earlier phases
    best_step: int = -1  # over all phases
    best_loss: float | None = None
    evaluations_since_best: int = 0  # in the phase
    seconds: float = 0.0  # of training and validation, summed over interruptions
    seconds_to_best: float = 0.0
    timed_images: int = 0  # trained on in the phase, without the steps that compile
    timed_seconds: float = 0.0
    phases: list[dict] = field(default_factory=list)  # a record of each one that ended


class Phase:
    """One phase under way: the arrays travel through its methods, the record is the run's."""

    def __init__(self, run, name: str, number: int):
        self.run, self.name, self.number = run, name, number
        self.config = phase_config(run.config, name)
        self.stages = len(run.model.stages)
        self.first = first_trained_stage(self.config.train, self.stages)
        # The key of the first phase is the seed's own; steps and other uses never fold in as much.
        key = jax.random.key(run.config.seed)
        self.key = jax.random.fold_in(key, np.uint32(2**32 - number)) if number else key
        self.compiled = False
        self.said_at = time.monotonic()

    def train(self, weights: dict, stored: dict | None, previous: dict) -> dict:
        """Trains until the last epoch, or until patience ends; the run keeps the best weights.

        Args:
          weights: {"params", "stats"} to start from.
          stored: arrays of a checkpoint of this phase to go on from, or None.
          previous: optimizer state of the phase before it, by name; used with `keep_optimizer`.

        Returns:
          The optimizer state at the end, by name.
        """
        run, config, progress = self.run, self.config, self.run.progress
        run.clock, began = time.monotonic(), progress.seconds
        feed, validation, cached = self._feeds(weights)
        per_epoch = steps_per_epoch(len(feed), config.batch_size)
        total = config.epochs * per_epoch
        schedule = make_schedule(config, per_epoch, total)
        optimizer = make_optimizer(config, schedule, self.stages)
        state = self._initial_state(optimizer, weights, stored, previous)
        if progress.step == 0:
            save_augmented_batch(run.run_dir, run.feed("train"), config, self.key)
        step = make_train_step(
            config,
            run.model,
            optimizer,
            class_weights(config, run.dataset),
            first=self.first,
            cached=cached,
        )
        eval_step = make_eval_step(config, run.model, self.first if cached else 0)
        done = progress.step - progress.phase_start
        order = config.seed + (self.number << 32)  # another one in each phase
        batches = feed.training(order, config.batch_size, done, total)
        title = f"{config.model.name} seed {config.seed} {self.name}"
        with tqdm(total=total, initial=done, desc=title, leave=False, disable=None) as bar:
            while not progress.finished:
                stop, evaluates = next_pause(done, total, per_epoch, config)
                state, speed = self._train_until(stop - done, state, step, batches, bar)
                done = stop
                epoch = progress.epochs_before + done / per_epoch
                where = {"epoch": epoch, "phase": self.name}
                rate = float(schedule(done - 1)) * float(state["rate_scale"].scale)
                self._log_training(state, where, rate, speed)
                state["metrics"] = run.put(Metrics.empty())
                if evaluates:
                    state = self._validate(state, validation, eval_step, where, bar)
                progress.finished = done == total or self._out_of_patience()
                if progress.finished:
                    self._close(cached, done / per_epoch, began)
                run.count_time()
                due = run.clock - run.saved_at >= config.runtime.checkpoint_every_seconds
                if due or progress.finished:
                    run.save(state)
                if not progress.finished and run.should_stop():
                    run.interrupt(state)
        return checkpoint.flat(state["optimizer"])

    def _initial_state(
        self,
        optimizer: optax.GradientTransformation,
        weights: dict,
        stored: dict | None,
        previous: dict,
    ) -> dict:
        """Returns the state to start from, or to go on from; see `train`."""
        run, config = self.run, self.config
        before = [phase["train"] for phase in run.progress.phases]
        if self.first and config.weights == "none" and "all" not in before:
            print(
                f"warning: phase {self.name} freezes {self.first} stages at random values, for "
                "config.weights is none",
                file=sys.stderr,
            )
        state = initial_state(config, weights, optimizer, self.first)
        if stored is not None:
            state = checkpoint.fit(state, stored, run.checkpoints)
        elif config.keep_optimizer:
            state["optimizer"] = carry_over(state["optimizer"], previous)
        return run.put(state)

    def _feeds(self, weights: dict) -> tuple[Feed, Feed, bool]:
        """Returns what to train and to validate on, and whether both are stored features."""
        run, config = self.run, self.config
        feed, validation = run.feed("train"), run.feed("validation")
        views = stored_views(config, self.first)
        shape = feature_shape(run.model, self.first, config.data.image_size)
        count = views * len(feed) + len(validation)
        size = count * math.prod(shape.shape) * shape.dtype.itemsize / 2**20
        if not views or size > config.runtime.feature_cache_mb:
            return feed, validation, False

        def stop_if_asked() -> None:
            if run.should_stop():
                raise Interrupted("stopped while features were stored; they are computed again")

        arguments = (config, run.model, weights)
        stored = (
            cache_features(*arguments, part, self.first, number, stop_if_asked)
            for part, number in ((feed, views), (validation, 0))
        )
        return *stored, True

    def _train_until(
        self, steps: int, state: dict, step: Callable, batches: Iterator[dict], bar: tqdm
    ) -> tuple[dict, dict]:
        """Trains for some steps; returns the state and {"images_per_second"} if measured."""
        run, progress = self.run, self.run.progress
        stop = progress.step + steps
        began, first = time.monotonic(), progress.step
        while progress.step < stop:
            state = step(state, next(batches), self.key)
            progress.step += 1
            bar.update()
            if not self.compiled:  # the first step of this process: not part of the speed
                jax.block_until_ready(state)
                self.compiled = True
                run.compile_seconds += time.monotonic() - began
                began, first = time.monotonic(), progress.step
            if progress.step < stop and run.should_stop():  # at `stop` the pause comes first
                run.interrupt(state)
        jax.block_until_ready(state)
        images, seconds = (progress.step - first) * self.config.batch_size, time.monotonic() - began
        if not images:
            return state, {}
        progress.timed_images += images
        progress.timed_seconds += seconds
        return state, {"images_per_second": images / seconds}

    def _log_training(self, state: dict, where: dict, rate: float, speed: dict) -> None:
        """Writes the training metrics since the last pause; raises Diverged if they broke off."""
        run, bad = self.run, int(state["bad_step"])
        if bad >= 0:
            bad += run.progress.phase_start + 1
            run.recorder.write("train", bad, **where, loss=float("nan"), learning_rate=rate)
            raise Diverged(
                f"the loss or its gradient was not finite at step {bad} (learning rate "
                f"{rate:.3g}); try {self._advice()}"
            )
        measured = {name: float(value) for name, value in state["metrics"].compute().items()}
        run.recorder.write(
            "train", run.progress.step, **where, **measured, learning_rate=rate, **speed
        )

    def _advice(self) -> str:
        advice = "a lower optimizer.learning_rate, schedule.warmup_epochs=1, optimizer.clip_norm=1"
        return advice + ", compute_dtype=float32" * (self.config.compute_dtype != "float32")

    def _validate(
        self, state: dict, validation: Feed, eval_step: Callable, where: dict, bar: tqdm
    ) -> dict:
        """Evaluates on validation images, keeps the weights if they are the best so far."""
        run, progress, weights = self.run, self.run.progress, evaluated_weights(state)
        measured, _ = run.evaluate(validation, weights, eval_step)
        run.recorder.write("validation", progress.step, **where, **measured)
        if not math.isfinite(measured["loss"]):
            raise Diverged(
                f"the validation loss was not finite at step {progress.step}; try {self._advice()}"
            )
        text = f"validation accuracy {measured['accuracy']:.4f}, loss {measured['loss']:.4f}"
        bar.set_postfix_str(text)
        if bar.disable and time.monotonic() - self.said_at > SAY_EVERY_SECONDS:
            print(f"  {self.name}, step {progress.step}: {text}", flush=True)
            self.said_at = time.monotonic()
        if self.config.schedule.name == "plateau":
            plateau = make_plateau(self.config)
            _, scale = plateau.update({}, state["rate_scale"], value=measured["loss"])
            state["rate_scale"] = run.put(scale)
        run.count_time()
        if progress.best_loss is None or measured["loss"] < progress.best_loss:
            progress.best_loss, progress.best_step = measured["loss"], progress.step
            progress.seconds_to_best, progress.evaluations_since_best = progress.seconds, 0
            run.best = copy_arrays(weights)
        else:
            progress.evaluations_since_best += 1
        return state

    def _out_of_patience(self) -> bool:
        patience = self.config.early_stopping_patience
        return bool(patience) and self.run.progress.evaluations_since_best >= patience

    def _close(self, cached: bool, epochs: float, began: float) -> None:
        """Adds the record of this phase to the run's progress."""
        self.run.count_time()
        progress = self.run.progress
        progress.phases.append(
            {
                "name": self.name,
                "train": self.config.train,
                "first_trained_stage": self.first,
                "epochs": epochs,
                "steps": progress.step - progress.phase_start,
                "stored_features": cached,
                "seconds": progress.seconds - began,
                "best_validation_loss": progress.best_loss,
            }
        )


def carry_over(fresh: dict, previous: dict) -> dict:
    """Returns an optimizer state with the previous phase's moments of what trains in both.

    The last part of the chain counts the steps of the schedule, which begins anew.
    """
    names = checkpoint.flat(fresh)
    last = max(int(name.partition("/")[0]) for name in names)
    leaves = [
        previous[name]
        if not name.startswith(f"{last}/") and getattr(previous.get(name), "shape", None) == a.shape
        else a
        for name, a in names.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(fresh), leaves)


def save_augmented_batch(run_dir: Path, feed: Feed, config: ConfigDict, key: jax.Array) -> None:
    """Writes `augmented_batch.png`: 32 images of the first batch as the model sees them."""
    batch = next(feed.training(config.seed, config.batch_size, 0, 1))
    targets = jax.nn.one_hot(batch["label"], int(feed.labels.max()) + 1)
    draw = jax.jit(lambda *arguments: augment(*arguments, config.augment)[0])
    images = draw(step_keys(key, 0)[0], batch["image"], targets)
    shown = np.asarray(images)[:32].round().astype(np.uint8)
    image_sheet(shown).save(run_dir / "augmented_batch.png")


def next_pause(step: int, total: int, per_epoch: int, config: ConfigDict) -> tuple[int, bool]:
    """Returns the step after `step` at which training pauses to log, and whether it evaluates."""

    def multiple_after(interval: int) -> int:
        return step - step % interval + interval

    evaluation = min(multiple_after(per_epoch * config.eval_every_epochs), total)
    pause = min(multiple_after(config.runtime.log_every_steps), evaluation)
    return pause, pause == evaluation
