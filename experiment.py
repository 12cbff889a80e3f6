"""From one config to a grid of checked runs: expansion, validation, command-line errors."""

import difflib
import itertools
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from errors import UserError, choose
from models import MODELS

GRID_FIELDS = ("models", "seeds", "sweep", "per_model")


@dataclass(frozen=True)
class Run:
    """One model trained once: `name` is its folder in the workdir, `config` all it depends on."""

    name: str
    config: ConfigDict


def expand(config: ConfigDict, overrides: dict[str, Any] | None = None) -> list[Run]:
    """Returns the runs of models x sweep x seeds, each with its own checked config.

    Args:
      config: an experiment as `configs/base.py` describes it.
      overrides: what the command line set, by dotted path; it wins over the file's `per_model`.

    Raises:
      UserError: an unknown model or field, or a value out of range.
    """
    overrides = overrides or {}
    models = [name.strip() for item in config.models for name in item.split(",")]
    for what, values in (("models", models), ("seeds", list(config.seeds))):
        if not values:
            raise UserError(f"config.{what} is empty: name at least one")
        if len(set(values)) < len(values):
            raise UserError(f"config.{what} names something twice: {values}")
    for name in (*models, *config.per_model):
        choose("model", name, MODELS)
    for seed in config.seeds:
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**31:
            raise UserError(f"config.seeds: {seed!r} is not a whole number from 0 to 2**31 - 1")

    runs = []
    for name, point in itertools.product(models, _sweep_points(config.sweep)):
        settings = _model_config(config, name, overrides)
        for path, text in point:
            _assign(settings, path, _parse(text, _lookup(settings, path, "sweep"), path), "sweep")
        settings.variant = ", ".join(f"{path.split('.')[-1]}={text}" for path, text in point)
        validate(settings)
        suffix = re.sub(r"[^\w.=+-]+", "_", settings.variant)
        for seed in config.seeds:
            run_config = ConfigDict(settings.to_dict())
            run_config.seed = seed
            runs.append(Run(f"{name}/seed{seed}" + (f"_{suffix}" if suffix else ""), run_config))
    if len({run.name for run in runs}) < len(runs):
        raise UserError(f"config.sweep: two points share a name: {config.sweep!r}")
    return runs


def _model_config(config: ConfigDict, name: str, overrides: dict[str, Any]) -> ConfigDict:
    """Returns the config of one model, before sweep and seed."""
    settings = ConfigDict({k: v for k, v in config.to_dict().items() if k not in GRID_FIELDS})
    prefix = f"per_model.{name}."
    specific = ConfigDict(config.per_model.get(name, {})).to_dict()
    settings.model.update(specific.pop("model", {}))
    _merge(settings, specific, f"per_model.{name}")
    for path, value in overrides.items():
        if path.split(".")[0].split("[")[0] not in GRID_FIELDS and "[" not in path:
            _assign(settings, path, value, "command line")
    for path, value in overrides.items():
        if path.startswith(prefix):
            _assign(settings, path.removeprefix(prefix), value, "command line")
    settings.model.name = name
    return settings


def _merge(settings: ConfigDict, changes: dict, where: str) -> None:
    for key, value in changes.items():
        if isinstance(value, dict):
            if not isinstance(settings.get(key), ConfigDict):
                raise UserError(f"{where}: there is no section {key!r} in the config")
            _merge(settings[key], value, f"{where}.{key}")
        else:
            _assign(settings, key, value, where)


def _lookup(settings: ConfigDict, path: str, where: str) -> Any:
    *sections, field = path.split(".")
    for section in sections:
        choose(f"{where}: section of {path!r}", section, settings.keys())
        settings = settings[section]
    choose(f"{where}: field of {path!r}", field, settings.keys())
    return settings[field]


def _assign(settings: ConfigDict, path: str, value: Any, where: str) -> None:
    _lookup(settings, path, where)
    *sections, field = path.split(".")
    for section in sections:
        settings = settings[section]
    try:
        settings[field] = value
    except TypeError as error:
        raise UserError(f"{where}: {path}={value!r} has the wrong type: {error}") from error


def _sweep_points(sweep: str) -> list[list[tuple[str, str]]]:
    """Parses "a.b=1,2; c=x,y" into every combination of (path, value)."""
    axes = []
    for part in filter(None, (part.strip() for part in sweep.split(";"))):
        path, equals, values = (text.strip() for text in part.partition("="))
        if not equals or not values:
            raise UserError(f"config.sweep: {part!r} is not of the form field=value,value")
        axes.append([(path, value.strip()) for value in values.split(",")])
    return [list(point) for point in itertools.product(*axes)]


def _parse(text: str, current: Any, path: str) -> Any:
    """Reads one swept value as the type that the field has."""
    try:
        if isinstance(current, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(current, (int, float, str)):
            return type(current)(text)
    except (ValueError, KeyError) as error:
        raise UserError(f"sweep: {path}={text!r} is not a {type(current).__name__}") from error
    raise UserError(f"sweep: {path} is a {type(current).__name__}; sweep numbers, strings or flags")


# --- validation ---------------------------------------------------------------------------------

CHOICES = {
    "data.source": ("digits", "folder", "npz", "tfds"),
    "data.resize": ("squash", "crop"),
    "data.interpolation": ("nearest", "bilinear", "bicubic", "lanczos"),
    "data.unreadable": ("error", "skip"),
    "compute_dtype": ("float32", "bfloat16"),
    "optimizer.name": ("sgd", "adam", "adamw"),
    "schedule.name": ("constant", "step", "cosine", "plateau"),
    "loss.name": ("cross_entropy", "hinge"),
    "runtime.feed": ("auto", "resident", "streaming"),
}
# field: (lowest, highest, whether the lowest itself is allowed, likewise the highest)
RANGES = {
    "data.image_size": (1, 4096, True, True),
    "data.split_seed": (0, 2**31, True, False),
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
    "runtime.checkpoint_every_seconds": (0, math.inf, True, True),
    "runtime.log_every_steps": (1, 10**9, True, True),
}


def validate(config: ConfigDict) -> None:
    """Checks one run's config; needs neither data nor devices.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    for path, known in CHOICES.items():
        choose(f"config.{path}", _lookup(config, path, "config"), known)
    for path, (low, high, low_allowed, high_allowed) in RANGES.items():
        value = _lookup(config, path, "config")
        inside = (low <= value if low_allowed else low < value) and (
            value <= high if high_allowed else value < high
        )
        if not inside:  # also when it is nan
            below, above = ("<=" if allowed else "<" for allowed in (low_allowed, high_allowed))
            raise UserError(
                f"config.{path}={value} is out of range: need {low} {below} value {above} {high}"
            )
    if tuple(config.phases) != ("all",):
        raise UserError(f"config.phases={tuple(config.phases)}: only ('all',) is known")
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


# --- a run directory and its config -------------------------------------------------------------


def stored_config(config: ConfigDict) -> dict:
    """Returns the config as `config.json` holds it: plain values, tuples as lists."""
    return json.loads(json.dumps(config.to_dict()))


def check_run_dir(run: Run, workdir: Path) -> None:
    """Refuses a run directory that belongs to another config.

    `runtime` may differ: it changes how a run is carried out, never its result.

    Raises:
      UserError: shows every field that differs.
    """
    path = workdir / run.name / "config.json"
    if not path.exists():
        return
    try:
        old = flatten(json.loads(path.read_text()))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): delete {path.parent}") from error
    new = flatten(stored_config(run.config))
    missing = object()
    lines = [
        f"  {key}: stored {old.get(key, 'nothing')!r}, now {new.get(key, 'nothing')!r}"
        for key in sorted(old.keys() | new.keys())
        if not key.startswith("runtime.") and old.get(key, missing) != new.get(key, missing)
    ]
    if lines:
        raise UserError(
            f"{path.parent} holds a run of another config:\n" + "\n".join(lines) + "\n"
            "Use another --workdir, delete that directory, or undo the change."
        )


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Returns {"a.b": value} for nested dictionaries."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def shard(runs: list[Run], text: str) -> list[Run]:
    """Returns every n-th run for "i/n", i counted from 0; all of them for "".

    Raises:
      UserError: the text is of another form, or i is not below n.
    """
    if not text:
        return runs
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(f"--shard={text}: expected i/n with 0 <= i < n, such as 0/4")
    return runs[int(match[1]) :: int(match[2])]


# --- the command line ---------------------------------------------------------------------------


def run_command(main: Callable[[list[str]], int | None]) -> None:
    """Runs `main(argv)` under absl; a user's mistake prints one message and exits with 2."""

    def guarded(argv: list[str]) -> int | None:
        try:
            return main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    logging.set_verbosity(logging.WARNING)
    app.run(guarded, flags_parser=_parse_flags)


def config_overrides(flag: flags.FlagHolder) -> dict[str, Any]:
    """Returns what the command line set in a config flag, by dotted path."""
    return dict(config_flags.get_override_values(flags.FLAGS[flag.name]))


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses flags; absl and ml_collections raise many types here, all of them user mistakes."""
    try:
        return flags.FLAGS(argv)
    except Exception as error:  # noqa: BLE001
        text = str(error.__cause__ if isinstance(error.__cause__, UserError) else error)
        hint = re.search(r'Did you mean "([\w.]+)" instead of "([\w.]+)"', text)
        if isinstance(error, (AttributeError, KeyError)) and "--config." in " ".join(argv):
            known = f'{hint[2]!r}. Did you mean "{hint[1]}"?' if hint else text.strip("\"'") + "."
            text = f"no such config field: {known} Every field is explained in configs/base.py."
        if isinstance(error, flags.UnrecognizedFlagError):
            near = difflib.get_close_matches(error.flagname, list(flags.FLAGS), n=1)
            text = f"no such option: --{error.flagname}." + (
                f" Did you mean --{near[0]}?" if near else ""
            )
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)
