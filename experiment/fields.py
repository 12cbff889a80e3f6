"""The fields of a config by dotted path: read, set, merged; and a run's config in each phase."""

import json
import re
from typing import Any

from ml_collections import ConfigDict

from errors import UserError, choose

# What a section of config.phase may change.
PHASE_FIELDS = (
    "train", "layer_decay", "batch_norm", "frozen_batch_norm", "keep_optimizer", "augment_views",
    "epochs", "batch_size", "optimizer", "schedule", "loss", "augment", "ema_decay",
    "eval_every_epochs", "early_stopping_patience",
)  # fmt: skip


def override(settings: ConfigDict, path: str, value: Any, where: str) -> None:
    """Sets a field for the whole run: it wins over what phases say of it, unless it names one.

    Raises:
      UserError: there is no such field, or it has another type.
    """
    if path.startswith("phase."):
        nested = value
        for name in reversed(path.split(".")):
            nested = {name: nested}
        merge(settings, nested, where)
        return
    assign(settings, path, value, where)
    for section in settings.phase.values():
        forget(section, path)


def forget(section: ConfigDict, path: str) -> None:
    """Deletes a dotted path, if it is there."""
    *sections, field = path.split(".")
    for name in sections:
        section = section.get(name)
        if not isinstance(section, ConfigDict):
            return
    if field in section:
        del section[field]


def merge(settings: ConfigDict, changes: dict, where: str) -> None:
    """Sets the fields of nested `changes`; `where` names them in errors.

    Raises:
      UserError: there is no such field, or it has another type.
    """
    for key, value in changes.items():
        if key == "phase":  # its sections hold what differs: `phase_config` checks them
            settings.phase = ConfigDict(overlay(settings.phase.to_dict(), value))
        elif isinstance(value, dict):
            if not isinstance(settings.get(key), ConfigDict):
                raise UserError(f"{where}: there is no section {key!r} in the config")
            merge(settings[key], value, f"{where}.{key}")
        else:
            assign(settings, key, value, where)


def overlay(under: dict, over: dict) -> dict:
    """Returns nested dictionaries merged, `over` winning."""
    merged = under | over
    for key in under.keys() & over.keys():
        if isinstance(under[key], dict) and isinstance(over[key], dict):
            merged[key] = overlay(under[key], over[key])
    return merged


def lookup(settings: ConfigDict, path: str, where: str) -> Any:
    """Returns the field of a dotted path; raises a UserError if there is none."""
    *sections, field = path.split(".")
    for section in sections:
        choose(f"{where}: section of {path!r}", section, settings.keys())
        settings = settings[section]
    choose(f"{where}: field of {path!r}", field, settings.keys())
    return settings[field]


def assign(settings: ConfigDict, path: str, value: Any, where: str) -> None:
    """Sets the field of a dotted path; raises a UserError if there is none, or of another type."""
    lookup(settings, path, where)
    *sections, field = path.split(".")
    for section in sections:
        settings = settings[section]
    try:
        settings[field] = value
    except TypeError as error:
        raise UserError(f"{where}: {path}={value!r} has the wrong type: {error}") from error


def parse(text: str, current: Any, path: str) -> Any:
    """Reads one swept value as the type that the field has."""
    try:
        if isinstance(current, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(current, (int, float, str)):
            return type(current)(text)
    except (ValueError, KeyError) as error:
        raise UserError(f"sweep: {path}={text!r} is not a {type(current).__name__}") from error
    raise UserError(f"sweep: {path} is a {type(current).__name__}; sweep numbers, strings or flags")


# --- phases -------------------------------------------------------------------------------------


def phase_names(config: ConfigDict) -> list[str]:
    """Returns the names of a run's phases in order."""
    return [name.strip() for name in config.phases.split(",") if name.strip()]


def phase_config(config: ConfigDict, name: str) -> ConfigDict:
    """Returns a run's config as it holds in one phase.

    Raises:
      UserError: the phase changes a field that it may not, or that there is not.
    """
    changes = config.phase[name].to_dict()
    for field in changes:
        choose(f"config.phase.{name}", field, PHASE_FIELDS)
    settings = ConfigDict(config.to_dict())
    merge(settings, changes, f"phase.{name}")
    return settings


def first_trained_stage(train: str, stages: int) -> int:
    """Returns the number of the first stage that trains: 0 for "all", stages - N for "last:N".

    Raises:
      UserError: the text is of another form, or there are not so many stages.
    """
    match = re.fullmatch(
        r"last:(\d+)", {"head": "last:1", "all": f"last:{stages}"}.get(train, train)
    )
    if not match or not 1 <= int(match[1]) <= stages:
        raise UserError(
            f"train={train!r}: expected head, all, or last:N with N from 1 to {stages}, the number "
            "of this model's stages, the head included"
        )
    return stages - int(match[1])


# --- as stored ----------------------------------------------------------------------------------


def stored_config(config: ConfigDict) -> dict:
    """Returns the config as `config.json` holds it: plain values, tuples as lists."""
    return json.loads(json.dumps(config.to_dict()))


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Returns {"a.b": value} for nested dictionaries."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
