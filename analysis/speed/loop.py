"""The loop of a real run, epoch by epoch as the coordinator asks for them.

An epoch is its steps, with feeding and augmentation, and the logging after them. Validation, the
copy of the best weights and the checkpoint, one each epoch here, are timed apart.
"""

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from analysis.speed.ours import config_of, device_memory
from analysis.speed.worker import NUM_CLASSES, Spec, host_memory
from errors import Interrupted, UserError
from train import train_and_evaluate
from training.cost import COMPILING
from training.log import MetricsLog
from training.record import RunRecord


def serve(spec: Spec, say: Callable[[dict], None]) -> None:
    """Trains until there are no more lines on stdin; after every epoch it waits for one."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(spec)
        config.epochs, config.runtime.checkpoint_every_seconds = 1_000_000, 0.0
        config.runtime.cache_dir = f"{folder}/cache"
        if spec.data:
            config.data.update(source="folder", path=spec.data)
        else:
            config.data.path = write_images(spec, Path(folder) / "random.npz")
        try:
            summary = train_and_evaluate(config, Path(folder) / "run", Epochs(spec, say))
        except Interrupted:
            return
        raise UserError(summary.get("error", "training ended"))


def write_images(spec: Spec, path: Path) -> str:
    """Writes random images: an epoch's, and a fifth as many to validate and to test on each."""
    held_out = max(spec.images // 5, NUM_CLASSES)
    parts = np.repeat(["train", "validation", "test"], [spec.images, held_out, held_out])
    shape = (len(parts), spec.image_size, spec.image_size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    np.savez(path, images=images, labels=np.arange(len(parts)) % NUM_CLASSES, parts=parts)
    return str(path)


class Epochs:
    """Is asked by the loop whether to stop: at an epoch's end it answers, and waits."""

    def __init__(self, spec: Spec, say: Callable[[dict], None]):
        self.spec, self.say, self.spent = spec, say, Counter()
        self.began, self.ended, self.ready, self.step = time.perf_counter(), False, False, 0
        self._time(RunRecord, "evaluate", "validation")
        self._time(RunRecord, "keep_if_best", "best weights")
        self._time(RunRecord, "save", "checkpoint")
        self._time(MetricsLog, "write", "logging")

    def _time(self, owner: type, name: str, part: str) -> None:
        """Counts the seconds of every call of a method."""
        method = getattr(owner, name)

        def counted(*arguments, **options):
            began = time.perf_counter()
            result = method(*arguments, **options)
            self.spent[part] += time.perf_counter() - began
            if part == "logging":
                self._read(*arguments[1:], **options)
            return result

        setattr(owner, name, counted)

    def _read(self, split: str, step: int, images_per_second: float = 0.0, **_) -> None:
        """Reads a line of metrics."""
        self.ended |= split == "validation"
        steps, self.step = step - self.step if split == "train" else 0, step
        if steps:
            self.spent["steps"] += steps * self.spec.batch_size / images_per_second

    def __call__(self) -> bool:
        """Returns whether no further epoch is asked for."""
        if not self.ended:
            return False
        whole = time.perf_counter() - self.began
        apart = sum(self.spent[part] for part in ("validation", "best weights", "checkpoint"))
        if self.ready:
            memory = device_memory() or host_memory()
            parts = dict(self.spent) | {"whole epoch": whole}
            self.say({"seconds": whole - apart, "memory": memory, "parts": parts})
        else:
            ready = {"compile_seconds": COMPILING.seconds, "steps": self.step, "step_seconds": 0.0}
            self.say({"ready": ready})
        self.ready, self.ended = True, False
        if not sys.stdin.readline():
            return True
        self.spent.clear()
        self.began = time.perf_counter()
        return False
