"""One phase of a run: some stages train, on images or on stored features, until it is enough."""

import functools
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from data.augmentation import augment, crops, image_sheet
from data.randomness import phase_key
from errors import Interrupted
from experiment.fields import first_trained_stage, phase_config, phase_names
from input_pipeline import Feed, batch_rows, steps_per_epoch
from training import checkpoint
from training.cost import step_memory, working_time
from training.distillation import Stored, lesson
from training.optimizer import make_plateau
from training.record import Diverged, RunRecord
from training.steps import (
    Metrics,
    class_weights,
    evaluated_weights,
    initial_state,
    make_eval_step,
    selection_score,
    step_keys,
    train_program,
)
from training.stored_features import FrozenStages, features_fit

SAY_EVERY_SECONDS = 10.0  # a line of progress where there is no terminal for a bar


def train_phase(record: RunRecord, weights: dict, stored: dict | None) -> None:
    """Trains the phase that `record` is in, until its last epoch or until patience ends.

    Args:
      record: of the run; it keeps the best weights.
      weights: {"params", "stats"} to start from.
      stored: arrays of a checkpoint of this phase to go on from, or None.
    """
    progress = record.progress
    record.start_clock()
    phase = Phase(record, weights)
    config, per_epoch, total = phase.config, phase.steps_per_epoch, phase.steps
    state = initial_state(config, weights, phase.program.optimizer, phase.first)
    if stored is not None:
        state = checkpoint.fit(state, stored, record.checkpoints.directory)
    state = record.put(state)
    done = progress.step - progress.phase_start
    order = config.seed + (progress.phase << 32)  # another one in each phase
    batches = phase.feed.training(order, config.batch_size, done, total)
    batches = _measure_memory(record, phase, state, batches)
    if progress.step == 0:
        save_augmented_batch(record, phase.config, phase.key)
    title = f"{config.model.name} seed {config.seed} {phase.name}"
    with tqdm(total=total, initial=done, desc=title, leave=False, disable=None) as bar:
        while not progress.finished:
            pause, evaluates = next_pause(done, total, per_epoch, config)
            state, speed = _take_steps(record, phase, state, batches, pause - done, bar)
            done = pause
            where = {"epoch": progress.epochs_before + done / per_epoch, "phase": phase.name}
            rate = float(phase.program.schedule(done - 1)) * float(state["rate_scale"].scale)
            _log_training(record, config, state, learning_rate=rate, **where, **speed)
            state["metrics"] = record.put(Metrics.empty())
            if evaluates:
                state = _validate(record, phase, state, where, bar)
            patience = config.early_stopping_patience
            waited = bool(patience) and progress.evaluations_since_best >= patience
            progress.finished = done == total or waited
            record.count_time()
            if progress.finished:
                progress.phases.append(
                    {
                        "name": phase.name,
                        "train": config.train,
                        "first_trained_stage": phase.first,
                        "epochs": done / per_epoch,
                        "steps": done,
                        "stored_features": phase.cached,
                        **phase.teaching,
                        "seconds": progress.seconds - progress.phase_began,
                        "best_validation_loss": progress.best_loss,
                    }
                )
            due = record.clock - record.saved_at >= config.runtime.checkpoint_every_seconds
            if due or progress.finished:
                record.save(state)
            if not progress.finished and record.should_stop():
                record.interrupt(state)


class Phase:
    """What a phase needs beside the state: its config, feeds, schedule and compiled steps."""

    def __init__(self, record: RunRecord, weights: dict):
        progress, model, stages = record.progress, record.model, len(record.model.stages)
        self.name = phase_names(record.config)[progress.phase]
        self.config = config = phase_config(record.config, self.name)
        self.first = first = first_trained_stage(config.train, stages)  # that trains
        before = [phase["train"] for phase in progress.phases]
        if first and config.weights == "none" and "all" not in before:
            print(
                f"warning: phase {self.name} freezes {first} stages at random values, for "
                "config.weights is none",
                file=sys.stderr,
            )
        self.key = phase_key(config.seed, progress.phase)

        def stop_if_asked() -> None:
            if record.should_stop():
                raise Interrupted("stopped while features were stored; they are computed again")

        # `cached` says whether both feeds are of stored features.
        self.feed, self.validation, self.cached = _feeds(
            record, config, weights, first, stop_if_asked
        )
        teach, self.taught = lesson(record, config, stop_if_asked)  # the latter for every step
        self.teaching = {"stored_logits": isinstance(teach, Stored)} if teach else {}
        self.steps_per_epoch = steps_per_epoch(len(self.feed), config.batch_size)
        self.steps = config.epochs * self.steps_per_epoch  # at most
        classes, steps = class_weights(config, record.dataset), (self.steps_per_epoch, self.steps)
        self.program = train_program(
            config, model, classes, steps, first=first, cached=self.cached, teach=teach
        )
        self.eval_step = make_eval_step(model, first if self.cached else 0)
        self.said_at = time.monotonic()  # when the last line of progress was printed


def _feeds(
    record: RunRecord,
    config: ConfigDict,
    weights: dict,
    first: int,
    after_batch: Callable[[], None],
) -> tuple[Feed, Feed, bool]:
    """Returns what to train and to validate on, and whether both are stored features."""
    train = record.feed("train", large=crops(config.augment))
    validation = record.feed("validation")
    views = features_fit(config, record.model, first, len(train), len(validation))
    if not views:
        return train, validation, False
    frozen = FrozenStages(config, record.model, weights, first)
    pairs = ((train, views), (validation, 0))
    return *(frozen.features(feed, number, after_batch) for feed, number in pairs), True


def _measure_memory(
    record: RunRecord, phase: Phase, state: dict, batches: Iterator[dict]
) -> Iterator[dict]:
    """Returns the same batches; `record` knows the most memory that a step on them takes."""
    first, progress = next(batches), record.progress
    memory = step_memory(phase.program.step, state, first, phase.key, *phase.taught)
    known = (progress.train_step_memory_bytes, memory)
    progress.train_step_memory_bytes = max(filter(None, known), default=None)
    return itertools.chain([first], batches)


def _take_steps(
    record: RunRecord, phase: Phase, state: dict, batches: Iterator[dict], steps: int, bar: tqdm
) -> tuple[dict, dict]:
    """Trains for some steps; returns the state and {"images_per_second"}."""
    progress, began = record.progress, working_time()
    stop = progress.step + steps
    while progress.step < stop:
        state = phase.program.step(state, next(batches), phase.key, *phase.taught)
        progress.step += 1
        bar.update()
        if progress.step < stop and record.should_stop():  # at `stop` the pause comes first
            record.interrupt(state)
    jax.block_until_ready(state)
    images, seconds = steps * phase.config.batch_size, working_time() - began
    progress.timed_images += images
    progress.timed_seconds += seconds
    return state, {"images_per_second": images / seconds}


def _log_training(record: RunRecord, config: ConfigDict, state: dict, **values) -> None:
    """Writes the training metrics since the last pause; raises Diverged if they broke off."""
    bad, rate = int(state["bad_step"]), values["learning_rate"]
    if bad >= 0:
        bad += record.progress.phase_start + 1
        record.metrics.write("train", bad, **values | {"loss": float("nan")})
        raise Diverged(broken_step(config, bad, rate))
    scores = {name: float(value) for name, value in state["metrics"].compute().items()}
    record.metrics.write("train", record.progress.step, **values | scores)


def broken_step(config: ConfigDict, step: int, rate: float) -> str:
    """Returns what is said of a step whose loss or gradient was not finite."""
    return (
        f"the loss or its gradient was not finite at step {step} (learning rate {rate:.3g}); "
        f"try {_advice(config)}"
    )


def broken_loss(config: ConfigDict, step: int) -> str:
    """Returns what is said of a validation loss that was not finite."""
    return f"the validation loss was not finite at step {step}; try {_advice(config)}"


def _advice(config: ConfigDict) -> str:
    advice = "a lower optimizer.learning_rate, schedule.warmup_epochs=1, optimizer.clip_norm=1"
    return advice + ", compute_dtype=float32" * (config.compute_dtype != "float32")


def _validate(record: RunRecord, phase: Phase, state: dict, where: dict, bar: tqdm) -> dict:
    """Evaluates on validation images; `record` keeps the weights if they are the best so far."""
    step, weights = record.progress.step, evaluated_weights(state)
    labels = record.dataset.labels("validation")
    scores, logits = record.evaluate(phase.validation, weights, phase.eval_step)
    record.metrics.write("validation", step, **where, **scores)
    if not math.isfinite(scores["loss"]):
        raise Diverged(broken_loss(phase.config, step))
    text = f"validation accuracy {scores['accuracy']:.4f}, loss {scores['loss']:.4f}"
    bar.set_postfix_str(text)
    if bar.disable and time.monotonic() - phase.said_at > SAY_EVERY_SECONDS:
        print(f"  {phase.name}, step {step}: {text}", flush=True)
        phase.said_at = time.monotonic()
    if phase.config.schedule.name == "plateau":
        plateau = make_plateau(phase.config)
        _, scale = plateau.update({}, state["rate_scale"], value=scores["loss"])
        state["rate_scale"] = record.put(scale)
    score = selection_score(phase.config.select, scores["loss"], logits, labels)
    record.keep_if_best(weights, scores["loss"], score)
    if record.watch:
        record.watch(where["epoch"], scores["loss"])
    return state


def save_augmented_batch(record: RunRecord, config: ConfigDict, key: jax.Array) -> None:
    """Writes `augmented_batch.png`: 32 images of the first batch of a phase, augmented."""
    feed = record.feed("train", large=crops(config.augment))
    rows = batch_rows(record.config.seed, 0, len(feed), config.batch_size)
    batch = feed.stored[feed.rows[rows]]
    targets = jax.nn.one_hot(feed.labels[rows], int(feed.labels.max()) + 1)
    draw = _drawing(config.augment.to_json(), config.data.image_size)
    images = draw(step_keys(key, 0)[0], batch, targets)
    shown = np.asarray(images)[:32].round().astype(np.uint8)
    image_sheet(shown).save(record.run_dir / "augmented_batch.png")


@functools.lru_cache(maxsize=4)
def _drawing(config_json: str, size: int) -> Callable:
    config = ConfigDict(json.loads(config_json))
    return jax.jit(lambda key, images, targets: augment(key, images, targets, config, size)[0])


def next_pause(step: int, total: int, per_epoch: int, config: ConfigDict) -> tuple[int, bool]:
    """Returns the step after `step` at which training pauses to log, and whether it evaluates."""

    def multiple_after(interval: int) -> int:
        return step - step % interval + interval

    evaluation = min(multiple_after(per_epoch * config.eval_every_epochs), total)
    pause = min(multiple_after(config.runtime.log_every_steps), evaluation)
    return pause, pause == evaluation
