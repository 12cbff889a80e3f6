"""Heads on stored features: all seeds of a model, and a grid of settings for each, at once.

A member is one seed with one setting, a pair of learning rate and weight decay. Its numbers are
those of the same run by itself, but for rounding; its history and its patience are its own.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from data.augmentation import crops
from data.randomness import phase_key
from errors import Interrupted
from experiment.fields import first_trained_stage, phase_config, phase_names
from input_pipeline import Feed, rows_at, steps_per_epoch
from training.checkpoint import CheckpointError, Checkpoints, fit, restore
from training.cost import step_memory, working_time
from training.distillation import lesson
from training.members import (
    initial_members,
    make_eval_members,
    make_settle,
    make_take_steps,
    of_members,
)
from training.phase import broken_loss, broken_step, next_pause
from training.record import Progress, RunRecord
from training.steps import (
    class_weights,
    copy_arrays,
    evaluated_weights,
    selection_score,
    trained,
)
from training.stored_features import FrozenStages, features_fit
from training.together import settings_of

STATE = "group"  # folder of the checkpoints, in the run directory of the first seed


class SeedRecord(RunRecord):
    """The record of one seed, whose state is in the checkpoints of the group."""

    def _resume(self) -> None:
        return None


class HeadGroup:
    """The seeds of one model under way together, new or where an interrupted group stopped.

    Attributes:
      settings: G pairs that are tried with each seed.
      members: [S][G], the progress of each.
      errors: [S][G], why a member diverged, "" if it did not.
      lines: [S][G], what its metrics.jsonl holds.
      progress: of the group, its steps and seconds.
      state, best: arrays of the members [S, G, ...], and the best trained weights of each.
    """

    def __init__(self, records: list[SeedRecord], arrays: list[dict], names: list[str]):
        """`arrays` are initial ones: of the first seed all, of the others those that train."""
        self.records, self.names, self.lead = records, names, records[0]
        self.model, self.phase = self.lead.model, phase_names(self.lead.config)[0]
        self.config = config = phase_config(self.lead.config, self.phase)
        self.settings = settings_of(config)
        self.first = first_trained_stage(config.train, len(self.model.stages))
        self.members = [[Progress() for _ in self.settings] for _ in records]
        self.errors = [["" for _ in self.settings] for _ in records]
        self.lines: list[list[list[dict]]] = [[[] for _ in self.settings] for _ in records]
        self.progress = self.lead.progress = Progress()
        self.lead.start_clock()
        self._store_features(arrays[0])
        self.steps_per_epoch = steps_per_epoch(len(self.feed), config.batch_size)
        self.steps = config.epochs * self.steps_per_epoch  # at most
        self.frozen = {
            kind: {path: a for path, a in part.items() if path not in trained(part, self.first)}
            for kind, part in arrays[0].items()
        }
        heads = [{kind: trained(part, self.first) for kind, part in a.items()} for a in arrays]
        stages = len(self.model.stages)
        state = initial_members(config, heads, len(self.settings), self.first, stages)
        self.state = self.lead.put(state)
        self.best = copy_arrays(evaluated_weights(self.state))
        self.take_steps = make_take_steps(
            config, self.model, self.first, self.steps_per_epoch, self.steps
        )
        self.settle, self.eval_step = make_settle(config), make_eval_members(self.model, self.first)
        self.scores = jax.jit(of_members(lambda metrics: metrics.compute()))
        self.checkpoints = Checkpoints(self.lead.run_dir / STATE)
        self._resume()

    def _store_features(self, arrays: dict) -> None:
        """Sets the feeds of stored features to train and to validate on, and what teachers say."""
        lead, config = self.lead, self.config
        train, validation = lead.feed("train", large=crops(config.augment)), lead.feed("validation")
        views = features_fit(config, self.model, self.first, len(train), len(validation))
        self.stages = FrozenStages(config, self.model, arrays, self.first)

        def stop_if_asked() -> None:
            if lead.should_stop():
                raise Interrupted("stopped while features were stored; they are computed again")

        self.feed = self.stages.features(train, views, stop_if_asked)
        self.validation = self.stages.features(validation, 0, stop_if_asked)
        _, self.taught = lesson(lead, config, stop_if_asked)

    # --- training ---------------------------------------------------------------------------------

    def train(self) -> None:
        """Trains until every member had its last epoch, ran out of patience, or diverged.

        Raises:
          Interrupted: `should_stop` was true, and the state is saved.
        """
        lead, progress, config = self.lead, self.progress, self.config
        per_epoch, constants = self.steps_per_epoch, self._constants()
        title = f"{self.model.name} {self.phase} x {len(self.records)}"
        with tqdm(
            total=self.steps, initial=progress.step, desc=title, leave=False, disable=None
        ) as bar:
            while not progress.finished:
                pause, evaluates = next_pause(progress.step, self.steps, per_epoch, config)
                self._train_until(pause, constants)
                if evaluates:
                    self._validate()
                self._end_members()
                bar.update(progress.step - bar.n)
                lead.count_time()
                due = lead.clock - lead.saved_at >= config.runtime.checkpoint_every_seconds
                stop = not progress.finished and lead.should_stop()
                if due or stop or progress.finished:
                    self._save()
                if stop:
                    raise Interrupted(f"stopped at step {progress.step}; the state is saved")

    def _constants(self) -> dict:
        """Returns what every step reads."""
        keys = [phase_key(record.config.seed, 0) for record in self.records]
        rates, decays = (
            np.array([setting[name] for setting in self.settings], np.float32)
            for name in ("learning_rate", "weight_decay")
        )
        arrays = {
            "frozen": self.frozen,
            "features": self.feed.images,
            "labels": self.feed.labels,
            "taught": self.taught,
            "classes": class_weights(self.config, self.lead.dataset),
            "keys": jnp.stack(keys),
            "rates": rates,
            "decays": decays,
        }
        return self.lead.put(arrays)

    def _index(self, start: int, stop: int) -> np.ndarray:
        """Returns where the features of some steps lie: int32 [L, S, B], L as long as it gets."""
        size, count = self.config.batch_size, len(self.feed)
        places = np.arange(start * size, stop * size)
        columns = [
            self.feed.places(rows_at(record.config.seed, places, count), places // count)
            for record in self.records
        ]
        index = np.stack(columns, axis=1).reshape(-1, size, len(columns)).swapaxes(1, 2)
        longest = min(self.steps_per_epoch * self.config.eval_every_epochs, self.steps)
        longest = min(longest, self.config.runtime.log_every_steps)
        return np.pad(index, ((0, longest - len(index)), (0, 0), (0, 0))).astype(np.int32)

    def _active(self) -> np.ndarray:
        return np.array([[not member.finished for member in row] for row in self.members])

    def _each(self) -> Iterator[tuple[int, int, Progress]]:
        """Yields seed, setting and progress of every member that still trains."""
        for s, row in enumerate(self.members):
            for g, member in enumerate(row):
                if not member.finished:
                    yield s, g, member

    def _train_until(self, pause: int, constants: dict) -> None:
        """Trains until a step, and logs how each member did."""
        progress, steps = self.progress, pause - self.progress.step
        call = (self.state, constants, self._index(progress.step, pause), steps, self._active())
        if progress.train_step_memory_bytes is None:
            progress.train_step_memory_bytes = step_memory(self.take_steps, *call)
        began = working_time()
        self.state, report = self.take_steps(*call)
        report = jax.tree.map(np.ndarray.tolist, jax.device_get(report))
        images, seconds = steps * self.config.batch_size, working_time() - began
        progress.step = pause
        progress.timed_images += images
        progress.timed_seconds += seconds
        speed = {"images_per_second": images * len(self.records) / seconds}
        where = {"epoch": pause / self.steps_per_epoch, "phase": self.phase}
        for s, g, member in self._each():
            rate, bad = report["learning_rate"][s][g], report["bad_step"][s][g]
            member.step = pause if bad < 0 else bad + 1
            values = {"loss": report["loss"][s][g], "accuracy": report["accuracy"][s][g]}
            if bad >= 0:
                values = {"loss": float("nan")}
                self._end(s, g, broken_step(self.config, member.step, rate))
            line = {"step": member.step, "split": "train", **where, "learning_rate": rate, **speed}
            self.lines[s][g].append(line | values)

    def _validate(self) -> None:
        """Evaluates every member; keeps the weights of those that are best so far."""
        active, better = self._active(), np.zeros((len(self.records), len(self.settings)), bool)
        if not active.any():
            return
        scores, logits = self._evaluate(self.validation, evaluated_weights(self.state))
        labels = self.lead.dataset.labels("validation")
        self.lead.count_time()
        where = {"epoch": self.progress.step / self.steps_per_epoch, "phase": self.phase}
        for s, g, member in self._each():
            values = {name: score[s][g] for name, score in scores.items()}
            line = {"step": member.step, "split": "validation", **where, **values}
            self.lines[s][g].append(line)
            if not math.isfinite(values["loss"]):
                self._end(s, g, broken_loss(self.config, member.step))
                continue
            score = selection_score(self.config.select, values["loss"], logits[s, g], labels)
            member.seconds = self.progress.seconds / len(self.records)
            better[s, g] = member.evaluated(values["loss"], score)
        losses = np.array(scores["loss"], np.float32)
        self.state, self.best = self.settle(
            self.state, self.best, losses, active & self._active(), better
        )

    def _evaluate(self, feed: Feed, weights: dict) -> tuple[dict, np.ndarray]:
        """Returns {"loss", "accuracy"}: [S][G] over every image once, and logits [S, G, N, K]."""
        total, parts = jax.tree.map(jnp.zeros_like, self.state["metrics"]), []
        for batch in feed.evaluation(self.config.eval_batch_size):
            logits, total = self.eval_step(weights, total, batch, self.frozen)
            parts.append(logits)
        scores = jax.tree.map(np.ndarray.tolist, jax.device_get(self.scores(total)))
        logits = np.concatenate([np.asarray(part) for part in parts], axis=2)
        return scores, logits[:, :, : len(feed)]

    def _end_members(self) -> None:
        """Ends members whose patience or epochs are over, and the group with the last of them."""
        patience = self.config.early_stopping_patience
        for s, g, member in self._each():
            waited = bool(patience) and member.evaluations_since_best >= patience
            if waited or member.step == self.steps:
                self._end(s, g)
        self.progress.finished = not self._active().any()

    def _end(self, seed: int, setting: int, error: str = "") -> None:
        member = self.members[seed][setting]
        member.finished, self.errors[seed][setting] = True, error
        record = {
            "name": self.phase,
            "train": self.config.train,
            "first_trained_stage": self.first,
            "epochs": member.step / self.steps_per_epoch,
            "steps": member.step,
            "stored_features": True,
            **({"stored_logits": True} if self.taught else {}),
            "best_validation_loss": member.best_loss,
        }
        member.phases.append(record)

    # --- results ----------------------------------------------------------------------------------

    def chosen(self, seed: int) -> int | None:
        """Returns the setting that validation chooses for a seed; None if every one diverged."""
        sound = [g for g in range(len(self.settings)) if not self.errors[seed][g]]
        return max(sound, key=lambda g: self.members[seed][g].best_score, default=None)

    def weights(self, seed: int, setting: int) -> dict:
        """Returns the best weights of a member: {"params", "stats"}."""
        best = jax.tree.map(lambda a: a[seed, setting], self.best)
        return {kind: self.frozen[kind] | best[kind] for kind in best}

    def predictions(self, part: str) -> tuple[dict, np.ndarray]:
        """Returns {"loss", "accuracy"}: [S][G] and logits [S, G, N, K] of the best weights."""
        feed = self.stages.features(self.lead.feed(part)) if part == "test" else self.validation
        return self._evaluate(feed, self.best)

    def account(self, seed: int, setting: int) -> Progress:
        """Returns the progress of a member, with a seed's share of what the group took."""
        member, group, share = self.members[seed][setting], self.progress, 1 / len(self.records)
        member.seconds, member.compile_seconds = (
            group.seconds * share,
            group.compile_seconds * share,
        )
        member.timed_images, member.timed_seconds = group.timed_images, group.timed_seconds * share
        member.train_step_memory_bytes = group.train_step_memory_bytes
        for phase in member.phases:
            phase["seconds"] = member.seconds
        return member

    def tried(self, seed: int) -> list[dict]:
        """Returns what became of each setting of a seed, for `summary.json`."""
        found, select = [], self.config.select
        for setting, member, error in zip(
            self.settings, self.members[seed], self.errors[seed], strict=True
        ):
            found.append(setting | {"status": "diverged" if error else "complete"})
            if member.best_score:
                score = member.best_loss if select == "loss" else member.best_score[0]
                scores = {"loss": member.best_loss} | {select: score}
                found[-1] |= {f"validation_{name}": value for name, value in scores.items()}
                found[-1] |= {"best_epoch": member.best_step / self.steps_per_epoch}
        return found

    def close(self) -> None:
        """Closes the files of the group."""
        self.checkpoints.close()

    # --- checkpoints ------------------------------------------------------------------------------

    def _save(self) -> None:
        record = {"runs": self.names, "settings": self.settings, "progress": asdict(self.progress)}
        record |= {"members": [[asdict(member) for member in row] for row in self.members]}
        record |= {"errors": self.errors, "lines": self.lines}
        tree = {"state": self.state, "best": self.best}
        self.checkpoints.save("latest", self.progress.step, tree, record)
        self.lead.saved_at = working_time()

    def _resume(self) -> None:
        """Goes on from the newest state that can be read, if it is of the same seeds."""
        for step in self.checkpoints.steps("latest"):
            path = self.checkpoints.path("latest", step)
            try:
                arrays, record = restore(path)
            except CheckpointError as error:
                print(f"warning: {error}\nThe seeds are trained anew.", file=sys.stderr)
                self.checkpoints.delete("latest", step)
                continue
            if (record["runs"], record["settings"]) != (self.names, self.settings):
                self.checkpoints.delete("latest", step)
                continue
            tree = fit({"state": self.state, "best": self.best}, arrays, path)
            tree = self.lead.put(tree)
            self.state, self.best = tree["state"], tree["best"]
            self.progress = self.lead.progress = Progress(**record["progress"])
            self.members = [[Progress(**member) for member in row] for row in record["members"]]
            self.errors, self.lines = record["errors"], record["lines"]
            return
