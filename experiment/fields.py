"""The fields of a config by dotted path: read, set and stored; a run's config in each phase."""

import difflib
import json
import re
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from ml_collections.config_flags import config_path

from errors import UserError, choose
from models import fields_of

# What a section of config.phase may change.
PHASE_FIELDS = (
    "train", "layer_decay", "batch_norm", "frozen_batch_norm", "augment_views", "epochs",
    "batch_size", "optimizer", "schedule", "loss", "augment", "ema_decay", "eval_every_epochs",
    "early_stopping_patience",
)  # fmt: skip


def flatten(tree: ConfigDict | dict) -> dict[str, Any]:
    """Returns {"a.b": value} of nested sections."""
    tree = tree.to_dict() if isinstance(tree, ConfigDict) else tree
    return flatten_dict(unflatten_dict(tree, sep="."), sep=".")


def unflatten(flat: dict[str, Any]) -> dict:
    """Returns nested sections of {"a.b": value}."""
    return unflatten_dict(flat, sep=".")


def stored_config(config: ConfigDict) -> dict:
    """Returns the config as `config.json` holds it: plain values, tuples as lists."""
    return json.loads(json.dumps(config.to_dict()))


def get(settings: ConfigDict, path: str, where: str) -> Any:
    """Returns the field of a dotted path; raises a UserError that suggests the nearest one."""
    known = flatten(settings)
    if path not in known:
        known |= {f"model.{field}": None for field in fields_of(settings.model.name)}
    if path in known:
        return known[path]
    near = difflib.get_close_matches(path, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UserError(
        f"{where}: there is no field {path!r}.{hint} Every field is explained in configs/base.py"
    )


def assign(settings: ConfigDict, path: str, value: Any, where: str) -> None:
    """Sets the field of a dotted path; raises a UserError if there is none, or of another type."""
    get(settings, path, where)
    try:
        with settings.unlocked():
            config_path.set_value(path, settings, value, accept_new_attributes=True)
    except TypeError as error:
        raise UserError(f"{where}: {path}={value!r} has the wrong type: {error}") from error


def parse(text: str, current: Any, path: str) -> Any:
    """Returns one swept value as the type that the field has."""
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
    settings = ConfigDict(config.to_dict())
    for path, value in flatten(config.phase[name]).items():
        choose(f"config.phase.{name}", path.split(".")[0], PHASE_FIELDS)
        assign(settings, path, value, f"phase.{name}")
    return settings


def first_trained_stage(train: str, stages: int) -> int:
    """Returns the number of the first stage that trains: 0 for "all", stages - N for "last:N".

    Raises:
      UserError: the text is of another form, or there are not so many stages.
    """
    text = {"head": "last:1", "all": f"last:{stages}"}.get(train, train)
    match = re.fullmatch(r"last:(\d+)", text)
    if not match or not 1 <= int(match[1]) <= stages:
        raise UserError(
            f"train={train!r}: expected head, all, or last:N with N from 1 to {stages}, the number "
            "of this model's stages, the head included"
        )
    return stages - int(match[1])
