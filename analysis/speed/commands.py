"""Whole commands against the clock: the start of a run, and a comparison of linear probes."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from analysis.speed.turns import ROOT, SideFailed
from errors import UserError

PHOTOS, SEEDS, EPOCHS, BATCH = 1000, 5, 10, 32  # of a comparison of probes
CLASSES = ("bay", "city", "desert", "forest", "meadow", "valley")
LONG = 300.0  # seconds; a side that has taken more sits out further rounds
KERAS_MODELS = ("resnet50", "efficientnet_b0", "mobilenet_v2", "vgg16")
# The report of a probe: its tables and intervals, without what runs the models again.
SHORT_REPORT = (
    "--config.compare.robustness_images=0",
    "--config.compare.gradcam_images=0",
    "--config.compare.measure_speed=False",
    "--config.compare.average_weights=False",
    "--config.compare.look_inside=False",
)


def duration_row(mode: str, model: str, side: str, seconds: list[float]) -> dict:
    """Returns the row of a command that was timed whole."""
    quartiles = statistics.quantiles(seconds, n=4, method="inclusive") if seconds[1:] else seconds
    return {
        "mode": mode,
        "model": model,
        "side": side,
        "seconds": statistics.median(seconds),
        "seconds_quartiles": [quartiles[0], quartiles[-1]],
        "seconds_of_repeats": seconds,
        "error": "",
    }


def failed_row(mode: str, model: str, side: str, reason: str) -> dict:
    """Returns the row of a command that failed."""
    return {"mode": mode, "model": model, "side": side, "error": reason}


# --- start --------------------------------------------------------------------------------------


def start_rows(folder: Path, repeats: int, say: Callable[[str], None]) -> list[dict]:
    """Times the command of a CNN on the digits until its first step is taken and logged.

    In turn with an empty cache and with the one that this has filled.
    """
    seconds: dict[str, list[float]] = {"ours, empty cache": [], "ours, filled cache": []}
    for number in range(repeats):
        for side, times in seconds.items():
            workdir = folder / f"{side} {number}"
            try:
                times.append(seconds_to_first_step(workdir, folder / f"cache {number}"))
            except SideFailed as failed:
                return [failed_row("start", "cnn", side, str(failed))]
            say(f"start: {side}: {times[-1]:.1f} s")
    return [duration_row("start", "cnn", side, times) for side, times in seconds.items()]


def seconds_to_first_step(workdir: Path, cache: Path) -> float:
    """Starts the command, waits for the line of its first step, and ends it."""
    command = [sys.executable, "main.py", "--config=configs/digits.py:cnn", "--config.seeds=0"]
    command += ["--config.runtime.log_every_steps=1", f"--config.runtime.cache_dir={cache}"]
    lines = workdir / "cnn" / "seed0" / "metrics.jsonl"
    began = time.perf_counter()
    with open(f"{workdir}.log", "wb") as log:
        process = subprocess.Popen(
            [*command, f"--workdir={workdir}"], cwd=ROOT, stdout=log, stderr=log
        )
    try:
        while not (lines.exists() and lines.stat().st_size):
            if process.poll() is not None:
                raise SideFailed(f"ended with code {process.returncode}: {last_line(workdir)}")
            time.sleep(0.01)
        return time.perf_counter() - began
    finally:
        process.kill()
        process.wait()


def last_line(path: Path) -> str:
    """Returns the last line of the log of a command."""
    lines = Path(f"{path}.log").read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


# --- probes -------------------------------------------------------------------------------------


@dataclass
class Probes:
    """A comparison of linear probes of `models` over seeds, that of ours and that of Keras."""

    models: list[str]
    image_size: int
    folder: Path
    photos: Path

    def prepare(self) -> None:
        """Writes random weights, as if they were published ones, for ours."""
        for name in self.models:
            call = f"write_weights({name!r}, {self.image_size}, {str(self.weights(name))!r})"
            code = f"from analysis.speed.ours import write_weights; {call}"
            run([sys.executable, "-c", code], self.folder / f"{name} weights")

    def weights(self, name: str) -> Path:
        """Returns where the weights of an architecture lie."""
        return self.folder / f"{name}.safetensors"

    def ours(self, name: str) -> dict:
        """Runs our command; afterwards its cache holds compiled programs alone."""
        workdir, cache = self.folder / name, self.folder / "cache"
        wall = time.time()
        seconds = run(our_probe(self, workdir, cache), workdir)
        for entry in cache.iterdir():  # decoded images, stored features
            if entry.name != "compiled":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        ends = [path.stat().st_mtime for path in workdir.glob("*/seed*/summary.json")]
        return {"seconds": seconds, "runs_seconds": max(ends) - wall}

    def keras(self, name: str, seeds: int = SEEDS, epochs: int = EPOCHS) -> dict:
        """Runs that of Keras, which keeps compiled programs too."""
        options = {"data": str(self.photos), "models": self.models, "image_size": self.image_size}
        options |= {"batch_size": BATCH, "seeds": seeds, "epochs": epochs}
        command = [sys.executable, "-m", "analysis.speed.keras_probe", json.dumps(options)]
        compiled = str(self.folder / "keras compiled")
        return {"seconds": run(command, self.folder / name, JAX_COMPILATION_CACHE_DIR=compiled)}


def probe_rows(probes: Probes, peers: list[str], repeats: int, say: Callable) -> list[dict]:
    """Times comparisons of linear probes, in turn.

    Programs are compiled before, by a first round, which for ours is timed too; images are decoded
    and features computed anew in every round.
    """
    first, sides = "ours, empty cache", {"ours": probes.ours}
    sides |= {"keras": probes.keras} if "keras" in peers else {}
    measured: dict[str, list[dict]] = {side: [] for side in (first, *sides)}
    errors: dict[str, str] = {}

    def attempt(side: str, action: Callable[..., dict], name: str, **options) -> None:
        if side in errors:
            return
        try:
            measured[side].append(action(name, **options))
            say(f"probe: {name}: {measured[side][-1]['seconds']:.1f} s")
        except SideFailed as failed:
            errors[side] = str(failed)
            say(f"probe: {name}: {failed}")

    probes.prepare()
    attempt(first, probes.ours, "ours first")
    if "keras" in sides:
        attempt("keras", probes.keras, "keras first, one seed and epoch", seeds=1, epochs=1)
        measured["keras"].clear()
    for number in range(repeats):
        for side, action in sides.items():
            if sum(each["seconds"] for each in measured[side]) < LONG:
                attempt(side, action, f"{side} {number}")
    rows = []
    for side, each in measured.items():
        if side in errors:
            rows.append(failed_row("probe", "+".join(probes.models), side, errors[side]))
            continue
        until_runs = [one["runs_seconds"] for one in each if "runs_seconds" in one]
        more = {"runs_seconds": statistics.median(until_runs)} if until_runs else {}
        seconds = [one["seconds"] for one in each]
        row = duration_row("probe", "+".join(probes.models), side, seconds)
        rows.append(row | more | {"image_size": probes.image_size})
    return rows


def our_probe(probes: Probes, workdir: Path, cache: Path) -> list[str]:
    """Returns the command of our comparison."""
    return [
        sys.executable,
        "main.py",
        f"--config=configs/base.py:{','.join(probes.models)}",
        f"--workdir={workdir}",
        f"--config.data.path={probes.photos}",
        f"--config.data.image_size={probes.image_size}",
        f"--config.batch_size={BATCH}",
        f"--config.seeds={','.join(map(str, range(SEEDS)))}",
        "--config.phases=head",
        f"--config.phase.head.epochs={EPOCHS}",
        "--config.phase.head.early_stopping_patience=0",
        "--config.preflight=off",  # the weights are random
        f"--config.runtime.cache_dir={cache}",
        *(f"--config.per_model.{m}.weights=archcompare:{probes.weights(m)}" for m in probes.models),
        *SHORT_REPORT,
    ]


def run(command: list[str], log: Path, **environment: str) -> float:
    """Runs a command to its end; returns seconds, or raises SideFailed with its last line."""
    keep = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
    keep["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    began = time.perf_counter()
    with open(f"{log}.log", "wb") as file:
        environment = os.environ | keep | environment
        done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, env=environment)
    if done.returncode:
        raise SideFailed(f"ended with code {done.returncode}: {last_line(log)}")
    return time.perf_counter() - began


def photos_for(data: str, folder: Path) -> Path:
    """Returns a folder of photos: copied from the folder `data`, or drawn where that is ""."""
    copy_photos(Path(data).expanduser(), folder) if data else draw_photos(folder)
    return folder


def draw_photos(folder: Path) -> None:
    """Writes photos of clouds of colour, 200 x 150 pixels, in a folder for each class."""
    draw = np.random.default_rng(0)
    for number in range(PHOTOS):
        kind = number % len(CLASSES)
        coarse = draw.integers(0, 256, (4, 5, 3)) // 2 + 128 * ((kind >> np.arange(3)) & 1)
        image = Image.fromarray(coarse.astype(np.uint8)).resize(
            (200, 150), Image.Resampling.BICUBIC
        )
        path = folder / CLASSES[kind] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def copy_photos(source: Path, folder: Path) -> None:
    """Copies photos, evenly spaced over those of `source`, into a folder for each class."""
    endings = (".jpg", ".jpeg", ".png")
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in endings)
    if len({path.parent.name for path in files}) < 2:
        raise UserError(f"--data={source}: need photos in a folder for each of several classes")
    count = min(PHOTOS, len(files))
    for number in range(count):
        path = files[number * len(files) // count]
        copied = folder / path.parent.name / f"{number}{path.suffix.lower()}"
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copied)
