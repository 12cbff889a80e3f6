"""What the fields of a run's config may be."""

import math
import re
from pathlib import Path

from ml_collections import ConfigDict

from data.augmentation import crops
from data.folders import LAYOUTS
from errors import UserError, choose
from experiment.fields import flatten, phase_config, phase_names
from experiment.files import read_json, read_status
from models.classifier import MISTAKES
from models.weights.download import digest
from models.weights.own import WEIGHTS

CHOICES = {
    "data.source": ("digits", "folder", "npz", "tfds", "array_record"),
    "data.layout": LAYOUTS,
    "data.resize": ("squash", "crop"),
    "data.interpolation": ("nearest", "bilinear", "bicubic", "lanczos"),
    "data.unreadable": ("error", "skip"),
    "compute_dtype": ("float32", "bfloat16"),
    "preprocessing": ("weights", *MISTAKES),
    "preflight": ("warn", "error", "off"),
    "batch_norm": ("batch", "running"),
    "frozen_batch_norm": ("running", "batch"),
    "optimizer.name": ("sgd", "adam", "adamw"),
    "schedule.name": ("constant", "step", "cosine", "plateau"),
    "loss.name": ("cross_entropy", "hinge"),
    "select": ("loss", "accuracy", "balanced_accuracy", "macro_f1"),
    "runtime.feed": ("auto", "resident", "streaming"),
}
TAUGHT = "distill.json"  # of a run directory: its teachers
TRIAL_SEED = 10_000  # plus config.search.seed, for the trials of a search
TRIED = {"try_learning_rates": "learning_rate", "try_weight_decays": "weight_decay"}
# Intervals; a round bracket leaves its end out.
RANGES = {
    "data.image_size": "[1, 4096]",
    "data.max_pixels": "[1, inf)",
    "data.store_size": "[0, 4096]",
    "data.split_seed": "[0, 2147483648)",
    "data.train_fraction": "(0, 1]",
    "data.folds": "[0, 1000]",
    "layer_decay": "(0, 1]",
    "augment_views": "[0, 1e6]",
    "epochs": "[1, 1e6]",
    "batch_size": "[1, 1e6]",
    "eval_batch_size": "[1, 1e6]",
    "optimizer.learning_rate": "(0, inf)",
    "optimizer.momentum": "[0, 1)",
    "optimizer.b1": "[0, 1)",
    "optimizer.b2": "[0, 1)",
    "optimizer.weight_decay": "[0, inf)",
    "optimizer.l1": "[0, inf)",
    "optimizer.clip_norm": "[0, inf)",
    "schedule.warmup_epochs": "[0, 1e6]",
    "schedule.end_factor": "[0, 1]",
    "schedule.factor": "(0, 1)",
    "schedule.patience": "[1, 1e6]",
    "loss.label_smoothing": "[0, 1)",
    "distill.temperature": "(0, inf)",
    "distill.weight": "[0, 1]",
    "ema_decay": "[0, 1)",
    "eval_every_epochs": "[1, 1e6]",
    "early_stopping_patience": "[0, 1e6]",
    "augment.rotation": "[0, 180]",
    "augment.zoom": "[0, 1)",
    "augment.shift": "[0, 1]",
    "augment.brightness": "[0, 1]",
    "augment.contrast": "[0, 1]",
    "augment.saturation": "[0, 1]",
    "augment.mixup": "[0, inf)",
    "augment.cutmix": "[0, inf)",
    "runtime.resident_limit_mb": "[0, inf]",
    "runtime.feature_cache_mb": "[0, inf]",
    "runtime.checkpoint_every_seconds": "[0, inf]",
    "runtime.log_every_steps": "[1, 1e9]",
}


def check_config(config: ConfigDict) -> None:
    """Checks one run's config and each of its phases; needs neither data nor devices.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    _check(config)
    size, stored = config.data.image_size, config.data.store_size
    names = phase_names(config)
    if stored and (stored < size or not any(crops(phase_config(config, n).augment) for n in names)):
        raise UserError(
            f"config.data.store_size={stored} is for random crops: it must be at least "
            f"data.image_size={size} and augment.crop_area below 1; 0 turns it off"
        )
    for name in names:
        try:
            _check(phase_config(config, name))
        except UserError as error:
            raise UserError(f"in phase {name}: {error}") from error


def _check(config: ConfigDict) -> None:
    values = flatten(config)
    for path, known in CHOICES.items():
        choose(f"config.{path}", values[path], known)
    for path, interval in RANGES.items():
        _check_range(path, values[path], interval)
    _check_data(config.data)
    for path, field in TRIED.items():
        for value in config[path]:
            _check_range(path, value, RANGES[f"optimizer.{field}"])
        if len(set(config[path])) < len(config[path]):
            raise UserError(f"config.{path}={tuple(config[path])} names a value twice")
    if config.augment_views and (config.augment.mixup or config.augment.cutmix):
        raise UserError(
            f"config.augment_views={config.augment_views} stores views of single images: set "
            "augment.mixup and augment.cutmix to 0 there, or augment_views to 0"
        )
    for field, highest in (("crop_area", 1), ("crop_aspect", math.inf)):
        low, high = config.augment[field]
        if not 0 < low <= high <= highest or math.isinf(high):
            limit = " <= 1" if highest == 1 else ""
            raise UserError(
                f"config.augment.{field}={(low, high)}: need 0 < smallest <= largest{limit}"
            )
    mixes_labels = config.loss.label_smoothing or config.augment.mixup or config.augment.cutmix
    if config.loss.name == "hinge" and mixes_labels:
        raise UserError(
            "config.loss.name=hinge needs hard labels: set loss.label_smoothing, augment.mixup and "
            "augment.cutmix to 0, or use cross_entropy"
        )
    if teachers_of(config.distill.teacher) and config.loss.name == "hinge":
        raise UserError(
            "config.loss.name=hinge: a student learns probabilities from its teacher, and hinge "
            "has none: use cross_entropy, or set distill.teacher=''"
        )


def teachers_of(text: str) -> list[Path]:
    """Returns the run directories that `config.distill.teacher` names; raises UserError."""
    parts = re.split(r",\s*(?=run:)", text.strip()) if text.strip() else []
    paths = [Path(part.removeprefix("run:")).expanduser() for part in parts]
    if not all(re.match("run:.", part) for part in parts) or len(set(paths)) < len(paths):
        raise UserError(
            f"config.distill.teacher={text!r}: expected run:DIR, the directory of a finished run, "
            "or several different ones, run:DIR,run:DIR, or '' for none"
        )
    return paths


def why_incomplete(path: Path, state: str) -> str:
    """Returns what a path is that is no complete run's directory; `state` is what a run's would."""
    if not path.exists():
        return "no such folder"
    if (path / "config.json").exists():
        return state
    if path.is_file() or any(path.glob("model.*")):
        return "an export: give its run, and to deploy.monitor the export with --model"
    files = (file for deep in ("*", "*/*") for file in sorted(path.glob(f"{deep}/summary.json")))
    run = next((f.parent for f in files if read_status(f.parent) == "complete"), None)
    return f"it holds runs: did you mean {run}?" if run else state


def check_teachers(config: ConfigDict) -> None:
    """Raises a UserError if a teacher of a run is not complete; needs no data."""
    for path in teachers_of(config.distill.teacher):
        status = read_json(path / "summary.json").get("status", "not finished")
        if status != "complete":
            why = why_incomplete(path, f"{status}: train it first, or take another")
            raise UserError(
                f"config.distill.teacher=run:{path} is not the directory of a complete run ({why})"
            )


def check_taught(run_dir: Path) -> None:
    """Raises a UserError if a teacher of a run changed since the run began."""
    for teacher in read_json(run_dir / TAUGHT).get("teachers", []):
        file = Path(teacher["path"]) / WEIGHTS
        if file.is_file() and digest(file, "sha256") != teacher["digest"]:
            raise UserError(
                f"{run_dir} learns from run:{teacher['path']}, which was trained anew since: use "
                f"another --workdir, or delete {run_dir} to train it with the new teacher"
            )


def _check_range(path: str, value: float, interval: str) -> None:
    """Raises a UserError for a value outside an interval such as "(0, 1]", or for NaN."""
    low, high = map(float, re.findall(r"[\d.e]+|inf", interval))
    above = value > low or (interval[0] == "[" and value == low)
    below = value < high or (interval[-1] == "]" and value == high)
    if not (above and below):
        raise UserError(f"config.{path}={value} is out of range: it must lie in {interval}")


def _check_data(data: ConfigDict) -> None:
    split, background = tuple(data.split), tuple(data.background)
    if len(split) not in (2, 3) or any(not 0 < part < 1 for part in split):
        raise UserError(f"config.data.split={split}: give two or three fractions between 0 and 1")
    if abs(sum(split) - 1) > 1e-6:
        raise UserError(f"config.data.split={split} sums to {sum(split):g}; it must sum to 1")
    if data.folds == 1:
        raise UserError("config.data.folds=1: cross-validation needs 2 folds or more, 0 is none")
    if data.source != "digits" and not data.path:
        raise UserError(
            f"config.data.path is empty: say where the {data.source} data lies, "
            "with --config.data.path=..."
        )
    if len(background) != 3 or any(not 0 <= value <= 255 for value in background):
        raise UserError(f"config.data.background={background}: give three numbers from 0 to 255")


def check_search(search: ConfigDict, seeds: tuple[int, ...]) -> None:
    """Checks `config.search` but for its space, for an experiment of these `seeds`."""
    choose("config.search.method", search.method, ("grid", "random", "tpe"))
    choose("config.search.prune", search.prune, ("none", "median", "halving"))
    _check_range("search.trials", search.trials, "[0, 1e6]")
    _check_range("search.seed", search.seed, "[0, 1e9]")
    if TRIAL_SEED + search.seed in seeds:
        raise UserError(
            f"config.search.seed={search.seed}: its trials are trained with seed "
            f"{TRIAL_SEED + search.seed}, which is in config.seeds: choose another"
        )


def check_compare(compare: ConfigDict, models: list[str]) -> None:
    """Checks `config.compare` for models of the grid: before training rather than after it."""
    if compare.baseline:
        choose("config.compare.baseline", compare.baseline, models)
    for field in ("margin", "robustness_images", "gradcam_images"):
        if not 0 <= compare[field] < math.inf:
            raise UserError(f"config.compare.{field}={compare[field]} must be 0 or more")
    for name, value in compare.reference.items():
        if not isinstance(value, (int, float)) or not 0 <= value <= 100:
            raise UserError(
                f"config.compare.reference.{name}={value!r} is not an accuracy in percent, 0 to 100"
            )
