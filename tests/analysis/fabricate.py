"""Run directories: with predictions made up to a given accuracy, or trained in seconds."""

import json

import numpy as np

from configs import base, digits
from experiment.grid import expand
from train import train_and_evaluate

CLASSES = ["plain", "with space", "<script>alert('x')</script>", "été $x_1$"]


def predictions(seed, accuracy, count, classes=4, stream=0):
    """Labels and logits of about that accuracy; ids and labels are the same for every seed."""
    labels = np.random.default_rng([classes, stream]).integers(0, classes, count).astype(np.int32)
    draw = np.random.default_rng([seed, int(accuracy * 1000), stream])
    logits = draw.normal(size=(count, classes)).astype(np.float32)
    right = draw.random(count) < accuracy
    logits[np.arange(count), np.where(right, labels, (labels + 1) % classes)] += np.where(
        right, 5, 3
    )
    return {
        "ids": np.array([f"test/{i}.png" for i in range(count)]),
        "labels": labels,
        "logits": logits,
    }


def write_run(
    workdir, model, seed, accuracy=0.8, variant="", status="complete", count=200, classes=CLASSES
):
    """Writes a run directory; a status other than complete leaves predictions out."""
    suffix = f"_{variant}" if variant else ""
    run_dir = workdir / model / f"seed{seed}{suffix}"
    run_dir.mkdir(parents=True)
    data = base.get_config().data
    data.path, data.image_size = str(workdir / "data that is gone"), 8
    config = {"model": {"name": model}, "seed": seed, "variant": variant, "data": data.to_dict(),
              "runtime": {"cache_dir": str(workdir)}, "phases": "all", "phase": {"all": {}},
              "early_stopping_patience": 0}  # fmt: skip
    write = lambda name, content: (run_dir / name).write_text(json.dumps(content))  # noqa: E731
    write("config.json", config)
    environment = {
        "command": ["main.py"], "git_commit": None, "git_dirty": None, "python": "3.11", "packages": {},
        "devices": ["cpu"], "device_kind": "cpu",
    }  # fmt: skip
    write("environment.json", environment)
    counts = {part: dict.fromkeys(classes, 1) for part in ("train", "validation", "test")}
    write(
        "dataset.json",
        {"class_names": classes, "fingerprint": "0" * 64, "split_seed": 0, "counts": counts},
    )
    lines = [
        {
            "step": s,
            "epoch": s,
            "split": split,
            "phase": "all",
            "loss": 1 / s,
            "accuracy": 1 - 0.5 / s,
        }
        for s in (1, 2, 3)
        for split in ("train", "validation")
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if status != "complete":
        write("summary.json", {"status": status, "error": "<b>lost</b>"} if status else {})
        return run_dir
    for stream, part in enumerate(("test", "validation")):
        np.savez(
            run_dir / f"predictions_{part}.npz",
            **predictions(seed, accuracy, count, len(classes), stream),
        )
    cost = {
        "parameters": 10, "multiply_adds_per_image": 1e6, "train_images_per_second": None if model == "knn" else 5.0,
        "seconds": 4.0, "seconds_to_best": 3.0, "compile_seconds": 2.0, "train_step_memory_bytes": None if model == "knn" else 3e6, "device": "1 x cpu",
    }  # fmt: skip
    write("summary.json", {"status": "complete", "metrics": {}, "cost": cost})
    return run_dir


def train_digits(folder, cache_dir, models, twice, **changes):
    """Trains models on the digits without augmentation: seed 0, and seed 1 of the model `twice`."""
    config = digits.get_config(models)
    config.seeds = (0, 1)
    overrides = {
        "runtime.cache_dir": cache_dir,
        "runtime.tensorboard": False,
        **{f"augment.{name}": 0.0 for name in ("rotation", "zoom", "shift")},
        **{path.replace("__", "."): value for path, value in changes.items()},
    }
    for run in expand(config, overrides):
        if run.name.startswith(twice) or run.config.seed == 0:
            train_and_evaluate(run.config, folder / run.name)
    return folder
