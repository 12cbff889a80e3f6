"""One side of the benchmark in a process of its own, which talks in lines of JSON.

    python -m analysis.speed.worker '{"side": "ours", "mode": "train", "model": "cnn", ...}'

It builds, compiles and warms up, and answers {"ready": {...}} or {"error": reason}. To each line
{"steps": n} it then answers {"seconds": of n steps, "memory": bytes at most so far}.
"""

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from errors import UserError

MODULES = {
    "ours": "analysis.speed.ours",
    "torch": "analysis.speed.torch_peer",
    "torch_compile": "analysis.speed.torch_peer",
    "keras": "analysis.speed.keras_peer",
}
PEERS = tuple(side for side in MODULES if side != "ours")
NUM_CLASSES = 6


@dataclass(frozen=True)
class Spec:
    """What a worker runs."""

    side: str  # a key of MODULES
    mode: str  # train | infer | epoch
    model: str
    image_size: int
    batch_size: int
    dtype: str  # float32 | bfloat16
    batches: int = 8  # that the images on the device make; of an epoch
    config: str = "configs/base.py"  # of ours: optimizer, augmentation, ...
    data: str = ""  # of an epoch: a folder of images; "" for random ones
    fused: bool = True  # of PyTorch: AdamW(fused=True) rather than its default

    @property
    def images(self) -> int:
        """Number of images on the device."""
        return self.batches * self.batch_size


@dataclass
class Side:
    """A step that is built but not yet compiled.

    Attributes:
      run: takes n steps and waits for the device.
      device_memory: returns the peak bytes of an accelerator, None on a CPU.
      check: raises if what was computed so far is not finite.
      about: for the coordinator.
    """

    run: Callable[[int], None]
    device_memory: Callable[[], int | None]
    check: Callable[[], None]
    about: dict = field(default_factory=dict)


def host_memory() -> int:
    """Returns the most bytes that this process had resident."""
    try:
        with open("/proc/self/status") as file:  # ru_maxrss also counts the process it came from
            line = next(line for line in file if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def timed(run: Callable[[int], None], steps: int) -> float:
    """Returns the seconds that so many steps take."""
    began = time.perf_counter()
    run(steps)
    return time.perf_counter() - began


def build(spec: Spec) -> Side:
    """Returns one side; raises UserError where a package is missing."""
    try:
        return importlib.import_module(MODULES[spec.side]).build(spec)
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is missing: pip install -e '.[parity]'") from error


def serve(spec: Spec, say: Callable[[dict], None]) -> None:
    """Builds and warms up one side, then answers what comes on stdin."""
    side = build(spec)
    compile_seconds = timed(side.run, 1)
    side.run(1)
    ready = {"compile_seconds": compile_seconds, "step_seconds": timed(side.run, 1)}
    say({"ready": ready | side.about})
    for line in sys.stdin:
        steps = json.loads(line)["steps"]
        side.run(1)  # the caches are another side's
        seconds = timed(side.run, steps)
        side.check()
        say({"seconds": seconds, "memory": side.device_memory() or host_memory()})


def talk(serve: Callable[[dict, Callable[[dict], None]], None]) -> int:
    """Serves the JSON on the command line, alone on standard output; returns the exit code."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print

    def say(answer: dict) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        serve(json.loads(sys.argv[1]), say)
    except Exception as error:  # noqa: BLE001 - the other sides go on
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        say({"error": text})
        if not isinstance(error, UserError):
            raise
        return 1
    return 0


def _serve(content: dict, say: Callable[[dict], None]) -> None:
    spec = Spec(**content)
    loop = importlib.import_module("analysis.speed.loop") if spec.mode == "epoch" else None
    (loop.serve if loop else serve)(spec, say)


if __name__ == "__main__":
    sys.exit(talk(_serve))
