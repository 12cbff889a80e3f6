"""A traced function as a plain list of steps, with the functions that ONNX has as a whole."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.extend import core

from deploy.onnx_graph import Value
from deploy.onnx_shapes import Step

# Functions within functions, and where each keeps what it calls.
CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint")
CALLS = (*CALLS, "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
INSIDE = ("jaxpr", "call_jaxpr", "fun_jaxpr")


@dataclass(frozen=True)
class Traced:
    """A step, what it takes (keys, or constants), the keys of what it makes, and its origin."""

    step: Step
    taken: list[int | Value]
    made: list[int]
    origins: tuple[core.JaxprEqn, ...] = ()  # the calls around it, the outermost first

    @property
    def place(self) -> str:
        """Where it stands in the architecture's own code; "" if that is not known."""
        here, library = Path(__file__).parent, str(Path(jax.__file__).parent.parent)
        traces = (eqn.source_info.traceback for eqn in self.origins)
        for frame in (frame for trace in traces if trace for frame in trace.frames):
            path = Path(frame.file_name)
            own = here not in path.parents and not frame.file_name.startswith(library)
            if own and path.is_file():
                return (
                    f" in {frame.function_name} ({path.parent.name}/{path.name}:{frame.line_num})"
                )
        return ""


def constant(array: Any) -> Value:
    """Returns an array as a constant; random keys have no form here."""
    if jax.dtypes.issubdtype(getattr(array, "dtype", None), jax.dtypes.extended):
        return Value(tuple(array.shape), array.dtype)
    array = np.asarray(array)
    return Value(array.shape, array.dtype, const=array)


def steps_of(traced: core.ClosedJaxpr, arguments: list[Value]) -> tuple[list[Traced], list]:
    """Returns the steps of a function with all calls inlined, and its outputs.

    The arguments have the keys 0, 1, ..; those that are constants are put in.
    """
    numbers = iter(range(len(arguments), 10**9))
    results: list = []

    def inline(closed: core.ClosedJaxpr, taken: list, *around) -> Iterator[Traced]:
        taken = [constant(c) for c in closed.consts] + taken
        known = dict(zip([*closed.jaxpr.constvars, *closed.jaxpr.invars], taken, strict=True))

        def read(atom: Any) -> int | Value:
            literal = isinstance(atom, core.Literal)
            return constant(np.asarray(atom.val, atom.aval.dtype)) if literal else known[atom]

        for eqn in closed.jaxpr.eqns:
            taken = [read(atom) for atom in eqn.invars]
            inner = next((eqn.params[key] for key in INSIDE if key in eqn.params), None)
            if all(0 in var.aval.shape for var in eqn.outvars):
                known |= {var: _empty(var.aval) for var in eqn.outvars}
            elif eqn.primitive.name in CALLS and inner is not None:
                is_closed = isinstance(inner, core.ClosedJaxpr)
                inner = inner if is_closed else core.ClosedJaxpr(inner, ())
                yield from inline(inner, taken, *around, eqn)
                known |= dict(zip(eqn.outvars, results, strict=True))
            else:
                known |= {var: next(numbers) for var in eqn.outvars}
                yield Traced(_step(eqn), taken, [known[var] for var in eqn.outvars], (*around, eqn))
        results[:] = [read(atom) for atom in closed.jaxpr.outvars]

    keys = [key if value.const is None else value for key, value in enumerate(arguments)]
    steps = list(inline(traced, keys))
    return _needed(_recognised(steps), results), list(results)


def _empty(aval: Any) -> Value:
    shape = tuple(aval.shape)
    array = np.zeros([size if isinstance(size, int) else 1 for size in shape], aval.dtype)
    return Value(shape, array.dtype, const=array)


def _step(eqn: core.JaxprEqn) -> Step:
    shapes = [tuple(var.aval.shape) for var in eqn.outvars]
    dtypes = [var.aval.dtype for var in eqn.outvars]  # of JAX's own for random keys
    params = {**eqn.params, "primitive": eqn.primitive, "bind": eqn.params}
    return Step(eqn.primitive.name, params, shapes, dtypes)


def _needed(steps: list[Traced], results: list) -> list[Traced]:
    """Returns the steps on which the outputs depend."""
    wanted, kept = {atom for atom in results if isinstance(atom, int)}, []
    for traced in reversed(steps):
        if wanted.intersection(traced.made):
            wanted.update(atom for atom in traced.taken if isinstance(atom, int))
            kept.append(traced)
    return kept[::-1]


# --- what ONNX has as a whole ------------------------------------------------------------------
#
# A pattern is (operation, pattern of each input); "x" and "*.." are any array, the same at each
# place, and "#.." is a constant.

MEAN = ("div", ("reduce_sum", "x"), "#count")
VARIANCE = ("sub", ("div", ("reduce_sum", ("square", "x")), "#count"), ("square", MEAN))
LAYER_NORM = (
    "add",
    (
        "mul",
        ("sub", "x", ("reshape", MEAN)),
        (
            "mul",
            ("rsqrt", ("add", ("reshape", ("max", "#zero", VARIANCE)), "#epsilon")),
            ("reshape", "#scale"),
        ),
    ),
    ("reshape", "#bias"),
)
EXPONENTIAL = ("exp", ("sub", "x", "*peak"))
SOFTMAX = ("div", EXPONENTIAL, ("broadcast_in_dim", ("reduce_sum", EXPONENTIAL)))
HALF = ("mul", "#half", "x")
GELU = ("mul", HALF, ("erfc", ("mul", ("neg", "x"), "#root")))
SYMMETRIC = ("add", "mul", "max")


def _recognised(steps: list[Traced]) -> list[Traced]:
    """Returns the steps with the last of each known pattern replaced by one for all of it."""
    makers = {key: traced for traced in steps for key in traced.made}
    forms = {"add": (LAYER_NORM, _layer_norm), "div": (SOFTMAX, _softmax), "mul": (GELU, _gelu)}
    changed = []
    for traced in steps:
        pattern, make = forms.get(traced.step.name, (None, None))
        found: dict[str, Any] = {}
        if pattern and _matches(pattern, traced.made[0], makers, found):
            traced = make(traced, found, makers) or traced
        changed.append(traced)
    return changed


def _matches(pattern: Any, atom: Any, makers: dict, found: dict[str, Any]) -> bool:
    """Whether an array was made as a pattern says; `found` gets what its names stand for."""
    if isinstance(pattern, str):
        if pattern.startswith("#"):
            known = found.get(pattern, atom)
            if isinstance(atom, int) or not np.array_equal(known.const, atom.const):
                return False
        elif pattern in found and not _same(found[pattern], atom):
            return False
        found[pattern] = atom
        return True
    traced = makers.get(atom) if isinstance(atom, int) else None
    if traced is None or traced.step.name != pattern[0]:
        return False
    orders: Iterable[Sequence] = [traced.taken]
    if pattern[0] in SYMMETRIC:
        orders = [traced.taken, traced.taken[::-1]]
    for taken in orders:
        trial = dict(found)
        if pattern[0] == "reduce_sum":
            axes = tuple(map(int, traced.step.params["axes"]))
            trial["axes"] = trial.get("axes", set()) | {axes}
        if len(taken) == len(pattern) - 1 and all(
            _matches(part, one, makers, trial) for part, one in zip(pattern[1:], taken, strict=True)
        ):
            found.update(trial)
            return True
    return False


def _same(one: int | Value, other: int | Value) -> bool:
    return one == other if isinstance(one, int) else one is other


def _number(value: Value) -> float:
    return float(value.const.ravel()[0]) if value.const.size == 1 else math.nan


def _layer_norm(last: Traced, found: dict, makers: dict) -> Traced | None:
    shape = last.step.shapes[0]
    width, scale, bias = shape[-1], found["#scale"].const, found["#bias"].const
    count, zero, epsilon = (_number(found[name]) for name in ("#count", "#zero", "#epsilon"))
    if {scale.shape, bias.shape} != {(width,)} or (count, zero) != (width, 0):
        return None
    if math.isnan(epsilon) or found["axes"] != {(len(shape) - 1,)}:
        return None
    params = {"epsilon": epsilon}
    step = replace(last.step, name="layer_norm", params=params)
    return replace(last, step=step, taken=[found["x"], found["#scale"], found["#bias"]])


def _softmax(last: Traced, found: dict, makers: dict) -> Traced | None:
    (axes,), shape, peak = found["axes"], last.step.shapes[0], found["*peak"]
    kept = makers[last.taken[1]].step.shapes[0]
    level = peak.shape if isinstance(peak, Value) else makers[peak].step.shapes[0]
    # Whatever is the same along the axis may be subtracted: the result does not depend on it.
    if len(axes) != 1 or len(level) != len(shape) or {level[axes[0]], kept[axes[0]]} != {1}:
        return None
    step = replace(last.step, name="softmax", params={"axis": axes[0]})
    return replace(last, step=step, taken=[found["x"]])


def _gelu(last: Traced, found: dict, makers: dict) -> Traced | None:
    half, root = _number(found["#half"]), _number(found["#root"])
    if half != 0.5 or not abs(root - 0.5**0.5) <= 1e-6:
        return None
    return replace(last, step=replace(last.step, name="gelu", params={}), taken=[found["x"]])
