"""The space of a search: which fields of a run it tries, and with which values."""

import itertools
import math
import re
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from errors import UserError, choose
from experiment.fields import flatten, get, parse, phase_names
from experiment.grid import Variant, axes_of
from models import MODELS

WHERE = "config.search.space"
# With other images in the parts, validation losses could not be compared.
FIXED = (
    "data.source", "data.path", "data.tfds_dir", "data.layout", "data.split", "data.split_seed",
    "data.groups", "data.folds", "data.fold", "data.train_fraction", "data.unreadable",
    "data.exclude_leaks", "predict_test",
)  # fmt: skip
# What matters to a model that is not trained by gradient: fields that begin so.
WITHOUT_GRADIENT = ("model.", "data.", "preprocessing", "compute_dtype")
REPLACES = {"learning_rate": "try_learning_rates", "weight_decay": "try_weight_decays"}


@dataclass(frozen=True)
class Choices:
    """Values of a field by how they were typed."""

    values: dict[str, Any]

    def __str__(self) -> str:
        return ",".join(self.values)

    @property
    def ends(self) -> list:
        """All values, to be checked."""
        return list(self.values.values())


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; whole ones where `low` is an integer."""

    low: float
    high: float
    log: bool

    def __str__(self) -> str:
        return f"{'log:' * self.log}{self.low}..{self.high}"

    @property
    def ends(self) -> list:
        """The least and the largest value."""
        return [self.low, self.high]


Space = dict[str, Choices | Range]


def read_space(text: str, settings: ConfigDict) -> Space:
    """Returns the space of one model, by dotted path.

    Args:
      text: `config.search.space`, as configs/base.py explains it.
      settings: the config of a run of the model, by whose types the values are read.

    Raises:
      UserError: an unknown field, a bad number, or an empty range.
    """
    model, own, common = settings.model.name, {}, {}
    for path, typed in axes_of(text, WHERE).items():
        if path.split(".")[0] != "per_model":
            common[path] = typed
            continue
        _, name, field = f"{path}..".split(".", 2)
        choose(f"{WHERE}: per_model", name, MODELS)
        if name == model:
            own[field.rstrip(".")] = typed
    space = {path: _read_values(path, typed, settings) for path, typed in (common | own).items()}
    if MODELS[model].trained_by_gradient:
        return space
    return {path: of for path, of in space.items() if path.startswith(WITHOUT_GRADIENT)}


def _read_values(path: str, typed: list[str], settings: ConfigDict) -> Choices | Range:
    in_phase = re.fullmatch(r"phase\.(\w+)\.(.+)", path)
    field = in_phase[2] if in_phase else path
    if in_phase:
        choose(f"{WHERE}: {path}: phase", in_phase[1], phase_names(settings))
    current = get(settings, field, WHERE)
    if field in FIXED or field.startswith("runtime."):
        raise UserError(
            f"{WHERE}: {path} is not a field to search for: trials are compared on the same "
            "validation images, and nothing under runtime changes a result"
        )
    number = type(current) in (int, float)
    if number and any(".." in value for value in typed):
        if len(typed) > 1:
            raise UserError(f"{WHERE}: {path}={','.join(typed)}: give values or one range")
        return _read_range(path, typed[0], current)
    if any(re.match(r"log:|.+\.\..", value) for value in typed) and type(current) is not str:
        kind = type(current).__name__
        raise UserError(
            f"{WHERE}: {path}={','.join(typed)}: a range has the form LOW..HIGH or log:LOW..HIGH, "
            f"of a number; this field is a {kind}"
        )
    values = {value: parse(value, current, path, WHERE) for value in typed}
    if len(set(map(str, values.values()))) < len(typed):
        raise UserError(f"{WHERE}: {path}={','.join(typed)} names a value twice")
    return Choices(values)


def _read_range(path: str, text: str, current: float) -> Range:
    log, low, high = re.fullmatch(r"(log:)?(.*?)\.\.(.*)", text.strip()).groups()
    if high.startswith("."):
        raise UserError(f"{WHERE}: {path}={text}: two dots stand between the ends of a range")
    low, high = (parse(end.strip(), current, path, WHERE) for end in (low, high))
    said = f"{WHERE}: {path}={text}"
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{said}: both ends of a range must be finite")
    if low >= high:
        raise UserError(f"{said} is empty: its low end must be below its high end")
    if log and low <= 0:
        raise UserError(
            f"{said}: a logarithmic range begins above 0; for 0 itself give values, such as "
            f"{path}=0,{high / 100:g},{high:g}"
        )
    return Range(low, high, bool(log))


def check_space(
    space: Space, settings: ConfigDict, variant: Variant, overrides: dict[str, Any]
) -> None:
    """Raises a UserError for a searched field that something else sets, or that has no effect."""
    model = settings.model.name
    given = {path.removeprefix(f"per_model.{model}."): path for path in overrides}
    for path in space:
        if path in variant.swept or path in variant.changes:
            raise UserError(f"{WHERE}: {path} is also set by the variant {variant.name!r}")
        if path in given:
            raise UserError(f"{WHERE}: {path} is also set by --config.{given[path]}: leave one out")
        values = flatten(settings)
        replaced = REPLACES.get(path.rpartition(".")[2]) if "optimizer." in path else None
        tried = [p for p, v in values.items() if replaced and p.endswith(replaced) and v]
        if tried:
            raise UserError(f"{WHERE}: {path} has no effect where {tried[0]} is set: set it to ()")


def points(space: Space) -> list[dict[str, str]]:
    """Returns every point of a grid, its values as they were typed.

    Raises:
      UserError: a range, of which a grid has no points.
    """
    for path, of in space.items():
        if isinstance(of, Range):
            middle = math.sqrt(of.low * of.high) if of.log else (of.low + of.high) / 2
            middle = round(middle) if isinstance(of.low, int) else middle
            raise UserError(
                f"{WHERE}: {path}={of} is a range, of which a grid has no points: give values, "
                f"such as {path}={of.low},{middle:.3g},{of.high}, or search.method=random"
            )
    every = itertools.product(*(of.values for of in space.values()))
    return [dict(zip(space, point, strict=True)) for point in every]


def size(space: Space) -> float:
    """Returns the number of points of a space, infinite where it has a range."""
    whole = [len(of.values) if isinstance(of, Choices) else math.inf for of in space.values()]
    return math.prod(whole)


def corners(space: Space, most: int = 64) -> list[dict[str, Any]]:
    """Returns points to check, the last ends last: all corners, or of more than `most`, some."""
    ends = {path: of.ends for path, of in space.items()}
    if math.prod(map(len, ends.values())) <= most:
        return [dict(zip(ends, point, strict=True)) for point in itertools.product(*ends.values())]
    first, last = ({path: of[place] for path, of in ends.items()} for place in (0, -1))
    return [first, *(first | {path: end} for path, of in ends.items() for end in of), last]
