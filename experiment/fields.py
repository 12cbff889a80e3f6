"""The fields of a config by dotted path: read, set and stored; a run's config in each phase."""

import ast
import difflib
import json
import re
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from ml_collections.config_flags import config_path

from errors import UserError, choose
from models import fields_of

# Of the whole experiment, not of a run.
GRID_FIELDS = ("models", "seeds", "sweep", "variants", "per_model", "compare", "search")
# What a section of config.phase may change.
PHASE_FIELDS = (
    "train", "layer_decay", "batch_norm", "frozen_batch_norm", "augment_views", "epochs",
    "batch_size", "optimizer", "schedule", "loss", "augment", "ema_decay", "eval_every_epochs",
    "early_stopping_patience", "try_learning_rates", "try_weight_decays",
)  # fmt: skip


class Text(str):
    """The value of a field as it was typed, to be read by the type that the field has."""


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
    name = settings.model.name
    known = {f"model.{field}": default for field, default in fields_of(name).items()}
    known |= {k: v for k, v in flatten(settings).items() if k not in ("model.name", "variant")}
    if path in known:
        return known[path]
    if path.split(".")[0] in GRID_FIELDS:
        raise UserError(f"{where}: {path} is of the whole experiment, not of a run")
    if any(field.startswith(f"{path}.") for field in known):
        raise UserError(
            f"{where}: {path} is a section: name one field of it, or change several fields at once "
            "with config.variants, as configs/ablation.py does"
        )
    near = difflib.get_close_matches(path, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if path.startswith("model."):
        own = ", ".join(fields_of(name)) or "none"
        raise UserError(
            f"{where}: {name} has no field {path!r}; of its own it has {own}.{hint} For a model "
            f"that has it: per_model.<model>.{path}"
        )
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


def parse(text: str, current: Any, path: str, where: str) -> Any:
    """Returns a typed value, such as "(64, 32)", as the type of the field's `current` one."""
    kind = type(current)
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind is str:
            quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
            return text[1:-1] if quoted else str(text)
        if kind in (tuple, list):
            return _parse_tuple(text, current)
        return kind(text)
    except (ValueError, KeyError, SyntaxError, TypeError) as error:
        example = f" such as {current!r}" if kind in (tuple, list) else ""
        raise UserError(f"{where}: {path}={text!r} is not a {kind.__name__}{example}") from error


def _parse_tuple(text: str, current: tuple) -> tuple:
    value = ast.literal_eval(text)
    value = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    known = {type(item) for item in current} or {float}  # an empty one is of numbers
    if not {type(item) for item in value} <= known | {int}:
        raise TypeError
    return value


def split_values(text: str, separator: str) -> list[str]:
    """Returns what stands between separators that are in neither brackets nor quotes."""
    whole = rf"""(?:\([^()]*\)|\[[^\[\]]*\]|"[^"]*"|'[^']*'|[^{separator}])+"""
    return [part.strip() for part in re.findall(whole, text) if part.strip()]


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
