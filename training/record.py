"""The record of a run under way: its progress and best weights, and how they are saved."""

import functools
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from errors import Interrupted, UserError
from input_pipeline import Dataset, Feed, load_dataset
from models import Classifier
from training import hosts
from training.checkpoint import CheckpointError, Checkpoints, restore
from training.cost import COMPILING, working_time
from training.log import MetricsLog
from training.steps import Metrics, copy_arrays


class Diverged(Exception):
    """The loss or its gradient stopped being finite."""


@dataclass
class Progress:
    """What the host knows of a run beside the arrays; part of every checkpoint."""

    step: int = 0  # over all phases
    finished: bool = False  # the phase
    phase: int = 0  # its number
    phase_start: int = 0  # the step it began after
    phase_began: float = 0.0  # `seconds` when it began
    epochs_before: float = 0.0  # of earlier phases
    best_step: int = -1  # over all phases
    best_loss: float | None = None
    best_score: list[float] | None = None  # see `steps.selection_score`
    evaluations_since_best: int = 0  # in the phase
    seconds: float = 0.0  # of training and validation, not of compiling, over interruptions
    seconds_to_best: float = 0.0
    timed_images: int = 0  # trained on in the phase
    timed_seconds: float = 0.0
    compile_seconds: float = 0.0  # beside them
    train_step_memory_bytes: int | None = None  # on each device, of the phase that takes most
    phases: list[dict] = field(default_factory=list)  # a record of each one that ended

    def evaluated(self, loss: float, score: list[float]) -> bool:
        """Notes validation scores; returns whether they are the best so far."""
        if self.best_score is not None and score <= self.best_score:
            self.evaluations_since_best += 1
            return False
        self.best_loss, self.best_score, self.best_step = loss, score, self.step
        self.seconds_to_best, self.evaluations_since_best = self.seconds, 0
        return True

    def begin_next_phase(self) -> None:
        """Moves on from a phase that is finished."""
        self.epochs_before += self.phases[-1]["epochs"]
        self.phase, self.phase_start = self.phase + 1, self.step
        self.phase_began = self.seconds
        self.finished, self.evaluations_since_best = False, 0
        self.timed_images, self.timed_seconds = 0, 0.0


class RunRecord:
    """One run under way, new or where an interrupted one stopped.

    Attributes:
      best: the weights of the best validation score, {"params", "stats"}; {} before there are any.
      stored: arrays of the state to go on from, None for a new run.
      watch: called after every validation with the epoch and the loss, if there is one.
    """

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
        self.feeds: dict[tuple[str, int], Feed] = {}  # by part and size
        self.watch: Callable[[float, float], None] | None = None
        self.progress, self.best = Progress(), {}
        self.stored = self._resume()
        self.went_on_from = self.progress.step
        self.saved_at = working_time()
        self.start_clock()

    @functools.cached_property
    def checkpoints(self) -> Checkpoints:
        """The run's checkpoints, opened when first needed."""
        return Checkpoints(self.run_dir / "checkpoints")

    @functools.cached_property
    def metrics(self) -> MetricsLog:
        """The run's metrics, from the step on that it went on from."""
        return MetricsLog(self.run_dir, self.went_on_from, self.config.runtime.tensorboard)

    def feed(self, part: str, large: bool = False) -> Feed:
        """Returns the batches of a part, of `data.store_size` if `large`, on the device once."""
        data, runtime = self.config.data, self.config.runtime
        size = data.store_size if large and data.store_size else data.image_size
        if (part, size) not in self.feeds:
            dataset = self.dataset
            if size != data.image_size:
                larger = ConfigDict(data.to_dict() | {"image_size": size})
                dataset = load_dataset(larger, runtime.cache_dir, runtime.resident_limit_mb)
                if dataset.identity != self.dataset.identity:
                    raise UserError("the images changed since the run began: start again")
            self.feeds[part, size] = Feed(dataset, part, self.mesh, runtime)
        return self.feeds[part, size]

    def put(self, tree):
        """Copies a tree of arrays to every device."""
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return hosts.put(tree, everywhere)

    def evaluate(self, feed: Feed, weights: dict, eval_step: Callable) -> tuple[dict, np.ndarray]:
        """Returns {"loss", "accuracy"} over every image of a feed once, and logits [N, K]."""
        total, logits = self.put(Metrics.empty()), []
        for batch in feed.evaluation(self.config.eval_batch_size):
            out, total = eval_step(weights, total, batch)
            logits.append(out)
        count = int(total.accuracy.count)
        assert count == len(feed), f"counted {count} of {len(feed)} images"
        scores = {name: float(value) for name, value in total.compute().items()}
        return scores, np.concatenate([hosts.whole(part) for part in logits])[: len(feed)]

    def keep_if_best(self, weights: dict, loss: float, score: list[float]) -> None:
        """Keeps a copy of the weights if their validation score is the highest so far."""
        self.count_time()
        if self.progress.evaluated(loss, score):
            self.best = copy_arrays(weights)

    def start_clock(self) -> None:
        """Begins to count the run's seconds."""
        self.clock, self.compiled = working_time(), COMPILING.seconds

    def count_time(self) -> None:
        """Adds the time since the last call to the run's seconds, and that of compiling apart."""
        clock, compiled = self.clock, self.compiled
        self.start_clock()
        self.progress.seconds += self.clock - clock
        self.progress.compile_seconds += self.compiled - compiled

    def save(self, state: dict) -> None:
        """Saves the best weights, then the whole state."""
        progress = self.progress
        if self.best:
            best = {"step": progress.best_step, "loss": progress.best_loss}
            self.checkpoints.save("best", progress.best_step, self.best, best)
        self.checkpoints.save("latest", progress.step, state, asdict(progress))
        self.saved_at = working_time()

    def interrupt(self, state: dict) -> None:
        """Saves the state and raises Interrupted."""
        self.count_time()
        self.save(state)
        raise Interrupted(f"stopped at step {self.progress.step}; the state is saved")

    def close(self) -> None:
        """Closes the files of the run."""
        for name in {"metrics", "checkpoints"} & vars(self).keys():  # those that were opened
            getattr(self, name).close()

    def _resume(self) -> dict[str, np.ndarray] | None:
        """Goes on from the newest state that the first host can read; returns its arrays."""
        found = hosts.agreed(self._newest())
        if found is None:
            return None
        arrays, weights, content = found
        self.progress = Progress(**content)
        self.best = self.put(weights) if self.progress.best_step >= 0 else {}
        return arrays

    def _newest(self) -> tuple[dict, dict, dict] | None:
        """Returns the arrays, best weights and progress of the newest state that can be read."""
        for step in self.checkpoints.steps("latest"):
            damaged = ("latest", step)
            try:
                arrays, content = restore(self.checkpoints.path("latest", step))
                best_step = Progress(**content).best_step
                weights: dict = {"params": {}, "stats": {}}
                if best_step >= 0:
                    damaged = ("best", best_step)
                    best, _ = restore(self.checkpoints.path(*damaged))
                    for name, array in best.items():
                        kind, _, path = name.partition("/")
                        weights[kind][path] = array
            except CheckpointError as error:
                print(f"warning: {error}\nThe run goes on from an earlier state.", file=sys.stderr)
                self.checkpoints.delete("latest", step)
                self.checkpoints.delete(*damaged)
                continue
            return arrays, weights, content
        return None
