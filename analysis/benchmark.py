"""How fast are training and inference, beside PyTorch and Keras? The one place that measures it.

    python -m analysis.benchmark --models=cnn,resnet50 --modes=train,infer --peers=torch,keras

Each side is a process of its own that builds, compiles and warms up; then all are timed in turn, in
every round in another order. Prints a table with the ratio of ours to the best peer; with --output
the same as CSV and JSON. A peer whose package is missing is listed with the reason. Peers:
pip install -e '.[parity]'.

  train  the step of training: preprocessing, loss, AdamW, metrics; images on the device
  infer  the step of evaluation: preprocessing, loss, metrics
  epoch  the loop of a run, its steps with feeding and logging, beside `train`; validation and a
         checkpoint an epoch apart; --config=configs/folder.py augments, --data=DIR feeds photos
  start  from the command of a CNN on the digits to its first step, without and with the caches
  probe  a comparison of linear probes of two of the networks, 5 seeds, on 1,000 photos (--data or
         drawn) with random weights, beside Keras with a frozen network and `fit` for each seed

Without --batch_size it is 32 for cnn and cnn_deep, 8 for VGG and 16 for the rest; a vision
transformer takes the next image size that it can. Peak memory is that of the process, on an
accelerator that of the device. PyTorch has its fused AdamW; peers have glibc's default allocator
unless --peers_keep_memory. Whether float32 is multiplied in TF32 there is each library's
default.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from absl import flags

from analysis.speed.commands import KERAS_MODELS, Probes, photos_for, probe_rows, start_rows
from analysis.speed.results import (
    PART,
    durations_of,
    ratios_of,
    rows_of,
    summary_of,
    table_of,
    write_files,
)
from analysis.speed.turns import ROOT, steps_within, time_in_turn, worker_command
from analysis.speed.worker import PEERS, Spec
from errors import UserError, choose
from experiment.command import arguments, output_folder, run_command
from models import MODELS
from training.log import PACKAGES

PER_MODEL = ("train", "infer", "epoch")
MODES = (*PER_MODEL, "start", "probe")
DEFAULT_MODELS = "cnn,cnn_deep,resnet50,efficientnet_b0,mobilenet_v2,vit_s16,vgg16"


def main(argv: list[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    arguments(
        argv, "analysis.benchmark [--models=...] [--modes=...] [--peers=...]", least=0, most=0
    )
    models = chosen("models", MODELS_FLAG.value, MODELS)
    modes = chosen("modes", MODES_FLAG.value, MODES)
    peers = chosen("peers", PEERS_FLAG.value, PEERS)
    unable = [name for name in models if not MODELS[name].trained_by_gradient]
    if unable:
        raise UserError(f"--models: {', '.join(unable)} has no step of training: leave it out")
    if "probe" in modes and not probed(models):
        raise UserError(f"--modes=probe: --models needs one of {', '.join(KERAS_MODELS)}")
    if DATA.value and not Path(DATA.value).expanduser().is_dir():
        raise UserError(f"--data={DATA.value} is no folder")
    if not CONFIG.value.endswith(".py") or not Path(CONFIG.value).is_file():
        raise UserError(f"--config={CONFIG.value} is no file: give one such as configs/folder.py")
    output = output_folder(OUTPUT.value) if OUTPUT.value else None
    content = {"environment": surroundings(), "rows": []}
    for mode, name in [(m, n) for m in modes for n in (models if m in PER_MODEL else [""])]:
        with tempfile.TemporaryDirectory() as folder:
            measure(mode, name, models, peers, Path(folder), content)
        content["ratios"] = ratios_of(content["rows"])
        content["summary"] = summary_of(content["ratios"])
        if "devices" not in content["environment"]:  # no worker said it
            content["environment"] = devices_and_commit() | content["environment"]
        if output:
            write_files(output, content)
    print(describe(content))
    return 1 if any(row["error"] for row in content["rows"] if row["side"] == "ours") else 0


def measure(
    mode: str, name: str, models: list[str], peers: list[str], folder: Path, content: dict
) -> None:
    """Adds the rows of a mode to `content`: of one network, or of all."""

    def say(text: str) -> None:
        print(f"{mode} {name}: {text}" if name else text, file=sys.stderr, flush=True)

    if mode == "start":
        content["rows"] += start_rows(folder, REPEATS.value, say)
    elif mode == "probe":
        photos = photos_for(DATA.value, folder / "photos")
        probes = Probes(probed(models), IMAGE_SIZE.value, folder, photos)
        content["rows"] += probe_rows(probes, peers, REPEATS.value, say)
    else:
        size, batch = usual_size(name), BATCH_SIZE.value or usual_batch(name)
        spec = Spec("ours", mode, name, size, batch, DTYPE.value, fused=FUSED.value)
        commands = epoch_commands(spec) if mode == "epoch" else step_commands(spec, peers)
        keep = KEEP.value
        timings = time_in_turn(commands, folder, REPEATS.value, SECONDS.value, say, keep)
        for timing in timings.values():
            content["environment"] = timing.ready.pop("environment", {}) | content["environment"]
        rows = rows_of(spec, timings)
        speeds = [f"{r['side']} {r['images_per_second']:.4g}" for r in rows if not r["error"]]
        say(f"images/s: {', '.join(speeds)}")
        content["rows"] += rows


def step_commands(spec: Spec, peers: list[str]) -> dict:
    """Returns the commands of the workers that take steps, ours and those of peers."""
    return {side: worker_command(replace(spec, side=side)) for side in ("ours", *peers)}


def epoch_commands(spec: Spec) -> dict:
    """Returns the commands of the worker of steps alone, and of the loop with epochs as long."""
    spec = replace(spec, config=CONFIG.value)

    def loop(timings: dict) -> list[str]:
        ready = timings["step"].ready
        batches = steps_within(SECONDS.value, ready) if ready else 2
        return worker_command(replace(spec, batches=batches, data=DATA.value))

    return {"step": worker_command(replace(spec, mode="train")), "ours": loop}


def chosen(option: str, values: list[str], known) -> list[str]:
    """Returns the values of an option; raises UserError for one that is not known."""
    return [choose(f"--{option}", value, known) for value in dict.fromkeys(values) if value]


def probed(models: list[str]) -> list[str]:
    """Returns the networks that probes are compared of: the first two that Keras has too."""
    return [model for model in models if model in KERAS_MODELS][:2]


def usual_batch(name: str) -> int:
    """Returns the batch size at which a network is timed if none is given."""
    return 32 if name in ("cnn", "cnn_deep") else 8 if name.startswith("vgg") else 16


def usual_size(name: str) -> int:
    """Returns --image_size, or the next multiple of a vision transformer's patch."""
    patch = getattr(MODELS[name], "patch", 1)
    return -(-IMAGE_SIZE.value // patch) * patch


def surroundings() -> dict:
    """Returns when, where, and with which versions of the peers, for the files."""
    versions = {}
    for name in ("torch", "torchvision", "timm", "keras"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    return {
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "command": sys.argv,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "cpu_model": cpu_model(),
        "usable_cores": len(usable),
        "peers": versions,
    }


def devices_and_commit() -> dict:
    """Returns what a run's environment.json holds; this process itself uses no device."""
    code = "import json; from training.log import environment; print(json.dumps(environment()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return {} if done.returncode else json.loads(done.stdout.splitlines()[-1])


def cpu_model() -> str:
    """Returns the processor's name, "" where nothing says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((x.partition(": ")[2] for x in lines if x.startswith("model name")), "")


def describe(content: dict) -> str:
    """Returns the table, why some are not in it, and the ratios of each mode."""
    environment = content["environment"]
    versions = environment.get("packages", {}) | environment["peers"]
    used = ("jax", "torch", "timm", "keras")
    lines = [
        f"{environment['cpu_model']}, {environment['usable_cores']} cores; "
        + ", ".join(f"{name} {versions[name]}" for name in used if versions.get(name))
        + f"; {environment['date']}",
        *(text for text in (table_of(content["rows"]), durations_of(content["rows"])) if text),
    ]
    for row in content["rows"]:
        if row["error"]:
            lines.append(f"not timed: {row['mode']} {row['model']}, {row['side']}: {row['error']}")
    for row in content["rows"]:
        parts = {key: row[key] for key in row if key.endswith(PART)}
        if parts:
            text = ", ".join(f"{k.removesuffix(PART)} {v:.4g}" for k, v in parts.items())
            lines.append(f"{row['mode']} {row['model']}, milliseconds for each step: {text}")
    for mode in content["summary"]:
        what = "the loop / its steps alone" if mode["mode"] == "epoch" else "ours / best peer"
        lines.append(
            f"{mode['mode']}: {what} {mode['geometric_mean']:.2f} in the geometric mean "
            f"of {mode['networks']} networks, {mode['least']:.2f} at least ({mode['least_model']})"
        )
    lines.append(
        "Multiply-adds (GMAC) of a training step: three times those of its forward pass. Ratio: "
        "ours / the fastest peer, in images/s. First step: with compilation."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    MODELS_FLAG = flags.DEFINE_list("models", DEFAULT_MODELS, "Networks")
    MODES_FLAG = flags.DEFINE_list("modes", "train,infer", ", ".join(MODES))
    PEERS_FLAG = flags.DEFINE_list("peers", ",".join(PEERS), "Any of torch, torch_compile, keras")
    IMAGE_SIZE = flags.DEFINE_integer(
        "image_size", 150, "Height and width in pixels", lower_bound=1
    )
    BATCH_SIZE = flags.DEFINE_integer("batch_size", 0, "0: as each network has it", lower_bound=0)
    DTYPE = flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16"), "Of the computation")
    REPEATS = flags.DEFINE_integer("repeats", 5, "Rounds in which all take turns", lower_bound=1)
    SECONDS = flags.DEFINE_float("seconds", 4.0, "About what a side takes a round", lower_bound=0)
    FUSED = flags.DEFINE_bool("fused", True, "PyTorch's fused AdamW; its default is slower")
    KEEP = flags.DEFINE_bool(
        "peers_keep_memory", False, "glibc keeps what peers free, as it does what we free"
    )
    CONFIG = flags.DEFINE_string("config", "configs/base.py", "Of epochs: augmentation, optimizer")
    DATA = flags.DEFINE_string("data", "", "Folder of photos, for epochs and probes")
    OUTPUT = flags.DEFINE_string("output", None, "Folder of benchmark.csv and benchmark.json")
    run_command(main)
