"""From one config to a grid of checked runs: expansion, validation, command-line errors."""

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from errors import UserError, choose
from experiment.checks import validate, validate_compare
from experiment.fields import (
    flatten,
    lookup,
    merge,
    override,
    parse,
    phase_names,
    stored_config,
)
from models import MODELS

GRID_FIELDS = ("models", "seeds", "sweep", "variants", "per_model", "compare")


@dataclass(frozen=True)
class Run:
    """One model trained once: `name` is its folder in the workdir, `config` all it depends on."""

    name: str
    config: ConfigDict


def expand(config: ConfigDict, overrides: dict[str, Any] | None = None) -> list[Run]:
    """Returns the runs of models x variants x sweep x seeds, each with its own checked config.

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

    validate_compare(config.compare, models)
    runs = []
    variants = config.variants.to_dict() or {"": {}}
    for name, variant, point in itertools.product(models, variants, _sweep_points(config.sweep)):
        settings = _model_config(config, name, overrides)
        for path, value in flatten(variants[variant]).items():
            override(settings, path, value, f"variants.{variant}")
        for path, text in point:
            value = parse(text, lookup(settings, path, "sweep"), path)
            override(settings, path, value, "sweep")
        swept = [f"{path.split('.')[-1]}={text}" for path, text in point]
        settings.variant = ", ".join(filter(None, [variant, *swept]))
        _resolve_phases(settings)
        validate(settings)
        suffix = re.sub(r"[^\w.=+-]+", "_", settings.variant)
        for seed in config.seeds:
            run_config = ConfigDict(settings.to_dict())
            run_config.seed = seed
            runs.append(Run(f"{name}/seed{seed}" + (f"_{suffix}" if suffix else ""), run_config))
    if len({run.name for run in runs}) < len(runs):
        raise UserError(f"config.sweep: two points share a name: {config.sweep!r}")
    return runs


def _resolve_phases(settings: ConfigDict) -> None:
    """Replaces phases="auto", and drops the sections of phases that do not take part."""
    if settings.phases == "auto":
        settings.phases = "all" if settings.weights == "none" else "head,tune"
    names = phase_names(settings)
    if not names or len(set(names)) < len(names):
        raise UserError(f"config.phases={settings.phases!r}: name each phase once, at least one")
    for name in names:
        choose("config.phases", name, settings.phase.keys())
    settings.phase = ConfigDict({name: settings.phase[name].to_dict() for name in names})


def _model_config(config: ConfigDict, name: str, overrides: dict[str, Any]) -> ConfigDict:
    """Returns the config of one model, before sweep and seed."""
    settings = ConfigDict({k: v for k, v in config.to_dict().items() if k not in GRID_FIELDS})
    prefix = f"per_model.{name}."
    specific = ConfigDict(config.per_model.get(name, {})).to_dict()
    settings.model.update(specific.pop("model", {}))
    merge(settings, specific, f"per_model.{name}")
    by_phase_last = sorted(overrides.items(), key=lambda item: "phase." in item[0])
    for path, value in by_phase_last:
        if path.split(".")[0].split("[")[0] not in GRID_FIELDS and "[" not in path:
            override(settings, path, value, "command line")
    for path, value in by_phase_last:
        if path.startswith(prefix):
            override(settings, path.removeprefix(prefix), value, "command line")
    settings.model.name = name
    return settings


def _sweep_points(sweep: str) -> list[list[tuple[str, str]]]:
    """Parses "a.b=1,2; c=x,y" into every combination of (path, value)."""
    axes = []
    for part in filter(None, (part.strip() for part in sweep.split(";"))):
        path, equals, values = (text.strip() for text in part.partition("="))
        if not equals or not values:
            raise UserError(f"config.sweep: {part!r} is not of the form field=value,value")
        axes.append([(path, value.strip()) for value in values.split(",")])
    return [list(point) for point in itertools.product(*axes)]


# --- a run directory and its config -------------------------------------------------------------


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
