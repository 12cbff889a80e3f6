"""From a function of JAX to an ONNX file: traced once, for batches of any size."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from onnx import helper

from deploy.onnx_graph import Graph, Unsupported, Value
from deploy.onnx_ops import SIMPLE, TABLE
from deploy.onnx_shapes import Step, whole
from errors import UserError
from models.lowering import plain_lowering

INLINED = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # where a call keeps what it calls
# Of constants: by their small forms.
POINTWISE = {*SIMPLE, "add", "sub", "mul", "div", "max", "min", "rsqrt", "integer_pow", "select_n",
             "convert_element_type", "square", "ne", "log1p", "expm1", "erfc", "clamp"}  # fmt: skip


def to_onnx(function: Callable, side: int) -> bytes:
    """Returns the ONNX file of a function of images uint8 [B, side, side, 3] to {name: array}.

    Raises UserError for what ONNX has no form for; the message names the operation and its place.
    """
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.uint8)
    with plain_lowering():
        traced, shapes = jax.make_jaxpr(function, return_shape=True)(images)
    graph = Graph(batch)
    pixels = Value(images.shape, np.dtype(np.uint8), name="images")
    try:
        outputs = run(graph, traced, [pixels])
        named = jax.tree.unflatten(jax.tree.structure(shapes), outputs)
        return graph.model(side, named)
    except Unsupported as error:
        raise UserError(
            f"ONNX: {error} cannot be written: export with --format=stablehlo or "
            "--format=safetensors, which hold whatever JAX computes"
        ) from error


def run(graph: Graph, traced: core.ClosedJaxpr, arguments: list[Value]) -> list[Value]:
    """Writes a traced function into a graph; returns its outputs."""
    steps = list(_flat(traced.jaxpr, [_constant(c) for c in traced.consts], arguments))
    known: dict[int, Value] = dict(enumerate(arguments))
    read = lambda atom: known[atom] if isinstance(atom, int) else atom  # noqa: E731
    *steps, results = steps
    uses = Counter(atom for step in steps for atom in step.taken if isinstance(atom, int))
    uses.update(atom for atom in results if isinstance(atom, int))
    for step in steps:
        values = [
            replace(read(atom)) if not isinstance(atom, int) else known[atom] for atom in step.taken
        ]
        single = [isinstance(atom, int) and uses[atom] == 1 for atom in step.taken]
        try:
            made = _write(graph, replace(step.step, single=single), values)
        except Unsupported as error:
            raise Unsupported(f"the operation {step.step.name} ({error}){step.place}") from error
        for key, value in zip(step.made, made, strict=True):
            known[key] = value
    return [read(atom) for atom in results]


def _constant(array: Any) -> Value:
    array = np.asarray(array)
    return Value(array.shape, array.dtype, const=array)


def _write(graph: Graph, step: Step, values: list[Value]) -> list[Value]:
    """Computes what is constant, and writes the rest."""
    if step.name == "scan":
        return _scan(graph, step, values)
    if values and all(value.const is not None for value in values):
        made = _computed(step, values)
        if made is not None:
            return made
    if step.name not in TABLE:
        raise Unsupported("no such operation there")
    lazy = step.name in ("broadcast_in_dim", "transpose")
    if values and all(value.const is not None for value in values) and not lazy:
        values = [whole(graph, value) for value in values]
    made = TABLE[step.name](graph, step, *values)
    made = made if isinstance(made, list) else [made]
    return [replace(value, shape=tuple(shape)) if value.const is None else value
            for value, shape in zip(made, step.shapes, strict=True)]  # fmt: skip


def _computed(step: Step, values: list[Value]) -> list[Value] | None:
    """Returns the result of an operation on constants; None where it needs the batch."""
    if step.name in POINTWISE:
        shape = np.broadcast_shapes(*(value.const.shape for value in values))
        arrays = [np.broadcast_to(v.const, shape) if v.shape else v.const for v in values]
    elif all(isinstance(n, int) for of in [*step.shapes, *(v.shape for v in values)] for n in of):
        if step.name in ("broadcast_in_dim", "gelu", "softmax"):
            return None
        arrays = [np.broadcast_to(value.const, value.shape) for value in values]
    else:
        return None
    with jax.ensure_compile_time_eval():
        made = step.params["primitive"].bind(*arrays, **step.params["bind"])
    made = made if step.params["primitive"].multiple_results else [made]
    return [
        Value(tuple(shape), dtype, const=np.asarray(array).astype(dtype))
        for shape, dtype, array in zip(step.shapes, step.dtypes, made, strict=True)
    ]


# --- functions within functions -----------------------------------------------------------------


@dataclass(frozen=True)
class Traced:
    """A step, the keys of what it takes and makes, and where it stands in the code."""

    step: Step
    taken: list[int | Value]
    made: list[int]
    place: str


def _flat(jaxpr: core.Jaxpr, constants: list, arguments: list) -> Iterator[Any]:
    """Yields the steps of a function with all calls inlined, and at last its outputs."""
    numbers = iter(range(len(arguments), 10**9))
    results: list = []

    def inline(jaxpr: core.Jaxpr, taken: list) -> Iterator[Traced]:
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], taken, strict=True))
        read = lambda atom: _literal(atom) if isinstance(atom, core.Literal) else known[atom]  # noqa: E731
        for eqn in jaxpr.eqns:
            taken = [read(atom) for atom in eqn.invars]
            inner = next((eqn.params[k] for k in INLINED if k in eqn.params), None)
            named = _named(eqn, inner)
            if inner is not None and eqn.primitive.name != "scan" and named is None:
                closed = (
                    inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())
                )
                taken = [_constant(c) for c in closed.consts] + taken
                yield from inline(closed.jaxpr, taken)
                known |= dict(zip(eqn.outvars, results, strict=True))
                continue
            known |= {var: next(numbers) for var in eqn.outvars}
            yield _traced(eqn, taken, [known[var] for var in eqn.outvars], named)
        results[:] = [read(atom) for atom in jaxpr.outvars]

    keys = [key if a.const is None else a for key, a in enumerate(arguments)]
    yield from inline(jaxpr, [*constants, *keys])
    yield list(results)


def _literal(atom: core.Literal) -> Value:
    return _constant(np.asarray(atom.val, atom.aval.dtype))


def _traced(eqn: core.JaxprEqn, taken: list, made: list[int], named: tuple | None) -> Traced:
    name, params = named or (eqn.primitive.name, dict(eqn.params))
    params = {**params, "primitive": eqn.primitive, "bind": eqn.params}
    shapes = [var.aval.shape for var in eqn.outvars]
    dtypes = [np.dtype(var.aval.dtype) for var in eqn.outvars]
    return Traced(Step(name, params, shapes, dtypes), taken, made, _place(eqn))


def _place(eqn: core.JaxprEqn) -> str:
    """Returns where an operation stands in the architecture's own code."""
    here, library = Path(__file__).parent, str(Path(jax.__file__).parent.parent)
    trace = eqn.source_info.traceback
    for frame in trace.frames if trace else ():
        path = Path(frame.file_name)
        if path.is_file() and not frame.file_name.startswith(library) and here not in path.parents:
            return f", in {frame.function_name} ({path.parent.name}/{path.name}:{frame.line_num}),"
    return ""


def _named(eqn: core.JaxprEqn, inner: Any) -> tuple[str, dict] | None:
    """Recognises functions that ONNX has as a whole, by their names and what is in them."""
    name = eqn.params.get("name")
    if name not in ("_softmax", "gelu") or len(eqn.outvars) != 1 or inner is None:
        return None
    whole = inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner
    inside = list(_equations(whole))
    if name == "gelu":
        exact = any(e.primitive.name in ("erf", "erfc") for e in inside)
        return "gelu", {"approximate": "none" if exact else "tanh"}
    axes = [e.params["axes"] for e in inside if e.primitive.name == "reduce_max"]
    plain = len(eqn.invars) == 1 and len(axes) == 1 and len(axes[0]) == 1
    return ("softmax", {"over": axes[0][0]}) if plain else None


def _equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    for eqn in jaxpr.eqns:
        inner = next((eqn.params[key] for key in INLINED if key in eqn.params), None)
        if inner is None:
            yield eqn
        else:
            yield from _equations(getattr(inner, "jaxpr", inner))


def _scan(graph: Graph, step: Step, values: list[Value]) -> list[Value]:
    """`scan`: a loop along the first axis."""
    p = step.params
    if p["reverse"]:
        raise Unsupported("a loop that runs backwards")
    fixed, states = p["num_consts"], p["num_carry"]
    constants = [
        value
        if value.const is not None
        else Value(value.shape, value.dtype, name=graph.name(graph.full(value)))
        for value in values[:fixed]
    ]
    taken = [graph.name(whole(graph, value)) for value in values[fixed:]]
    body, inner = graph.nested(), p["jaxpr"]
    inputs = [
        Value(tuple(var.aval.shape), np.dtype(var.aval.dtype), name=graph.fresh("loop"))
        for var in inner.jaxpr.invars[fixed:]
    ]
    made = run(body, inner, [*constants, *map(replace, inputs)])
    names = [body.emit("Identity", [body.name(whole(body, value))]) for value in made]
    declare = lambda name, v: helper.make_tensor_value_info(  # noqa: E731
        name,
        helper.np_dtype_to_tensor_dtype(v.dtype),
        [n if isinstance(n, int) else "batch" for n in v.shape],
    )
    loop = helper.make_graph(
        body.nodes,
        "loop",
        [declare(value.name, value) for value in inputs],
        [declare(name, value) for name, value in zip(names, made, strict=True)],
    )
    options = {"body": loop, "num_scan_inputs": len(taken) - states}
    outputs = graph.emit("Scan", taken, len(made), **options)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    return [
        Value(tuple(shape), dtype, name=name)
        for shape, dtype, name in zip(step.shapes, step.dtypes, outputs, strict=True)
    ]
