"""One model in a process of its own, for `deploy.profile`: it talks like `analysis.speed.worker`.

python -m deploy.profile_worker '{"path": "runs/w/cnn/seed0", "threads": 1, "batch": 8, ...}'
"""

import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from analysis.speed.worker import host_memory, talk

MOST = 1000  # calls of one turn
BESIDE = 60  # calls of decoding and of preprocessing in one turn


@dataclass(frozen=True)
class Spec:
    """What a process measures."""

    path: str  # that `deploy.load` reads
    threads: int  # cores that the process may use, and threads of the runtime; 0: all
    batch: int
    photos: str  # folder of encoded photos
    seconds: float  # about what the calls of one turn take
    preprocess: str = ""  # preprocessing alone, as a file that `deploy.load` reads


def limit_to(cores: int) -> None:
    """Lets this process use so many cores, 0 for all of them; to be called before JAX is imported.

    JAX makes a thread for each core that it may use, or $NPROC threads; no flag of XLA limits them.
    """
    if cores:
        os.environ["NPROC"] = str(cores)
        if hasattr(os, "sched_setaffinity"):  # not on macOS
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])


def calls(call: Callable[[], object], most: int, seconds: float = math.inf) -> list[float]:
    """Returns the seconds of each of so many calls, of fewer once this time is over."""
    spent: list[float] = []
    end = time.perf_counter() + seconds
    while len(spent) < most and (not spent or time.perf_counter() < end):
        began = time.perf_counter()
        call()
        spent.append(time.perf_counter() - began)
    return spent


def serve(content: dict, say: Callable[[dict], None], lines: Iterable[str] = sys.stdin) -> None:
    """Says what loading and the first call took; then takes a turn for each line.

    A turn answers the seconds of each call by what it did: "network", "decode", "preprocess".
    """
    spec = Spec(**content)
    limit_to(spec.threads)
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # the first call of a machine compiles
    began = time.perf_counter()
    # Imported here: what they count as cores is limited by now.
    import jax
    import numpy as np

    from analysis.predict import decode_image
    from deploy.load import load
    from training.cost import COMPILING

    imported, before = time.perf_counter(), host_memory()
    predictor = load(Path(spec.path), threads=spec.threads)
    loaded = time.perf_counter()
    photos = [file.read_bytes() for file in sorted(Path(spec.photos).iterdir())]
    decoded = [decode_image(predictor.facts, photo) for photo in photos]
    images = np.stack([decoded[i % len(decoded)] for i in range(spec.batch)])
    answer, others = partial(predictor.answer, images), COMPILING.seconds
    (first,) = calls(answer, 1)
    compiled, step = COMPILING.seconds - others, min(calls(answer, 3, spec.seconds))
    device = None if predictor.file.suffix == ".onnx" else jax.devices()[0]
    stats = (device and device.memory_stats()) or {}
    ready = {
        "steps": max(1, min(MOST, round(spec.seconds / step))),
        "import_seconds": imported - began,
        "load_seconds": loaded - imported,
        "compile_seconds": first,  # the name that `turns` knows
        "compiled_seconds": compiled,
        "memory_before": before,
        "memory": host_memory(),
        "device_memory": stats.get("peak_bytes_in_use"),
        "device": device.device_kind if device else "cpu",
    }
    say({"ready": ready})
    photo = itertools.cycle(photos)
    beside = {"decode": lambda: decode_image(predictor.facts, next(photo))}
    if spec.preprocess:
        program = load(Path(spec.preprocess), threads=spec.threads).answer
        beside["preprocess"] = partial(program, images)
    elif predictor.model:
        program = jax.jit(predictor.model.preprocess)
        beside["preprocess"] = lambda: jax.block_until_ready(program(images))
    for line in lines:
        answer()  # the caches are another side's
        used = time.process_time()
        parts = {"network": calls(answer, json.loads(line)["steps"])}
        parts["cpu"] = [time.process_time() - used]
        for what, call in beside.items():
            call()
            parts[what] = calls(call, BESIDE, spec.seconds / 4)
        say({"seconds": sum(parts["network"]), "memory": host_memory(), "parts": parts})


if __name__ == "__main__":
    sys.exit(talk(serve))
