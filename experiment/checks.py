"""What the fields of a run's config may be."""

import math

from ml_collections import ConfigDict

from errors import UserError, choose
from experiment.fields import lookup, phase_config, phase_names
from models.classifier import MISTAKES

CHOICES = {
    "data.source": ("digits", "folder", "npz", "tfds"),
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
    "runtime.feed": ("auto", "resident", "streaming"),
}
# field: (lowest, highest, whether the lowest itself is allowed, likewise the highest)
RANGES = {
    "data.image_size": (1, 4096, True, True),
    "data.split_seed": (0, 2**31, True, False),
    "layer_decay": (0, 1, False, True),
    "augment_views": (0, 10**6, True, True),
    "epochs": (1, 10**6, True, True),
    "batch_size": (1, 10**6, True, True),
    "eval_batch_size": (1, 10**6, True, True),
    "optimizer.learning_rate": (0, math.inf, False, False),
    "optimizer.momentum": (0, 1, True, False),
    "optimizer.b1": (0, 1, True, False),
    "optimizer.b2": (0, 1, True, False),
    "optimizer.weight_decay": (0, math.inf, True, False),
    "optimizer.l1": (0, math.inf, True, False),
    "optimizer.clip_norm": (0, math.inf, True, False),
    "schedule.warmup_epochs": (0, 10**6, True, True),
    "schedule.end_factor": (0, 1, True, True),
    "schedule.factor": (0, 1, False, False),
    "schedule.patience": (1, 10**6, True, True),
    "loss.label_smoothing": (0, 1, True, False),
    "ema_decay": (0, 1, True, False),
    "eval_every_epochs": (1, 10**6, True, True),
    "early_stopping_patience": (0, 10**6, True, True),
    "augment.rotation": (0, 180, True, True),
    "augment.zoom": (0, 1, True, False),
    "augment.shift": (0, 1, True, True),
    "augment.brightness": (0, 1, True, True),
    "augment.contrast": (0, 1, True, True),
    "augment.saturation": (0, 1, True, True),
    "augment.mixup": (0, math.inf, True, False),
    "augment.cutmix": (0, math.inf, True, False),
    "runtime.resident_limit_mb": (0, math.inf, True, True),
    "runtime.feature_cache_mb": (0, math.inf, True, True),
    "runtime.checkpoint_every_seconds": (0, math.inf, True, True),
    "runtime.log_every_steps": (1, 10**9, True, True),
}


def validate(config: ConfigDict) -> None:
    """Checks one run's config and each of its phases; needs neither data nor devices.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    _validate(config)
    for name in phase_names(config):
        try:
            _validate(phase_config(config, name))
        except UserError as error:
            raise UserError(f"in phase {name}: {error}") from error


def _validate(config: ConfigDict) -> None:
    for path, known in CHOICES.items():
        choose(f"config.{path}", lookup(config, path, "config"), known)
    for path, (low, high, low_allowed, high_allowed) in RANGES.items():
        value = lookup(config, path, "config")
        inside = (low <= value if low_allowed else low < value) and (
            value <= high if high_allowed else value < high
        )
        if not inside:  # also when it is nan
            below, above = ("<=" if allowed else "<" for allowed in (low_allowed, high_allowed))
            raise UserError(
                f"config.{path}={value} is out of range: need {low} {below} value {above} {high}"
            )
    if config.augment_views and (config.augment.mixup or config.augment.cutmix):
        raise UserError(
            f"config.augment_views={config.augment_views} stores views of single images: set "
            "augment.mixup and augment.cutmix to 0 there, or augment_views to 0"
        )
    split = tuple(config.data.split)
    if len(split) not in (2, 3) or any(not 0 < part < 1 for part in split):
        raise UserError(f"config.data.split={split}: give two or three fractions between 0 and 1")
    if abs(sum(split) - 1) > 1e-6:
        raise UserError(f"config.data.split={split} sums to {sum(split):g}; it must sum to 1")
    if config.data.source != "digits" and not config.data.path:
        raise UserError(
            f"config.data.path is empty: say where the {config.data.source} data lies, "
            "with --config.data.path=..."
        )
    background = tuple(config.data.background)
    if len(background) != 3 or any(not 0 <= value <= 255 for value in background):
        raise UserError(f"config.data.background={background}: give three numbers from 0 to 255")
    low, high = config.augment.crop_area
    if not 0 < low <= high <= 1:
        raise UserError(
            f"config.augment.crop_area={(low, high)}: need 0 < smallest <= largest <= 1"
        )
    low, high = config.augment.crop_aspect
    if not 0 < low <= high < math.inf:
        raise UserError(f"config.augment.crop_aspect={(low, high)}: need 0 < smallest <= largest")
    mixes_labels = config.loss.label_smoothing or config.augment.mixup or config.augment.cutmix
    if config.loss.name == "hinge" and mixes_labels:
        raise UserError(
            "config.loss.name=hinge needs hard labels: set loss.label_smoothing, augment.mixup and "
            "augment.cutmix to 0, or use cross_entropy"
        )


def validate_compare(compare: ConfigDict, models: list[str]) -> None:
    """Checks `config.compare`, so that a mistake in it is found before training rather than after.

    Args:
      compare: that section of an experiment's config.
      models: names in the grid.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    choose("config.compare.seed_interval", compare.seed_interval, ("t", "bootstrap"))
    if compare.baseline:
        choose("config.compare.baseline", compare.baseline, models)
    for field in ("robustness_images", "gradcam_images"):
        if compare[field] < 0:
            raise UserError(f"config.compare.{field}={compare[field]} must be 0 or more")
    for name, value in compare.reference.items():
        if not isinstance(value, (int, float)) or not 0 <= value <= 100:
            raise UserError(
                f"config.compare.reference.{name}={value!r} is not an accuracy in percent, 0 to 100"
            )
