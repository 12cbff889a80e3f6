"""From a function of JAX to an ONNX file: traced once, for batches of any size."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from onnx import checker, helper

from deploy.onnx_graph import Graph, Unsupported, Value
from deploy.onnx_ops import SIMPLE, TABLE
from deploy.onnx_shapes import Step, whole
from deploy.onnx_trace import steps_of
from errors import UserError
from models.lowering import plain_lowering

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
    except (Unsupported, checker.ValidationError) as error:
        raise UserError(
            f"cannot write as ONNX: {error}: export with --format=stablehlo or "
            "--format=safetensors, which hold whatever JAX computes"
        ) from error


def run(graph: Graph, traced: core.ClosedJaxpr, arguments: list[Value]) -> list[Value]:
    """Writes a traced function into a graph; returns its outputs."""
    steps, results = steps_of(traced, arguments)
    known: dict[int, Value] = dict(enumerate(arguments))
    uses = Counter(atom for one in [*(s.taken for s in steps), results] for atom in one
                   if isinstance(atom, int))  # fmt: skip
    for traced_step in steps:
        taken = traced_step.taken
        values = [known[atom] if isinstance(atom, int) else replace(atom) for atom in taken]
        single = [isinstance(atom, int) and uses[atom] == 1 for atom in taken]
        step = replace(traced_step.step, single=single)
        try:
            _check_types([*step.dtypes, *(value.dtype for value in values)])
            made = _write(graph, step, values)
        except Exception as error:  # no architecture may end in a traceback
            reason = f"{error}" if isinstance(error, Unsupported) else repr(error)
            raise Unsupported(f"{step.name}{traced_step.place} ({reason})") from error
        known |= dict(zip(traced_step.made, made, strict=True))
    return [known[atom] if isinstance(atom, int) else atom for atom in results]


def _check_types(kinds: list) -> None:
    if not all(isinstance(kind, np.dtype) for kind in kinds):
        raise Unsupported("random keys")
    if "bfloat16" in (kind.name for kind in kinds):
        raise Unsupported("bfloat16, in which ONNX Runtime cannot compute on a CPU")


def _write(graph: Graph, step: Step, values: list[Value]) -> list[Value]:
    """Computes what is constant, and writes the rest."""
    if step.name == "scan":
        return _scan(graph, step, values)
    if values and all(value.const is not None for value in values):
        made = _computed(step, values)
        if made is not None:
            return made
    if step.name not in TABLE:
        raise Unsupported("ONNX has no such operation, or this project does not know it")
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
        if step.name == "broadcast_in_dim" or step.params["primitive"].name != step.name:
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


def _scan(graph: Graph, step: Step, values: list[Value]) -> list[Value]:
    """`scan`: a loop along the first axis."""
    p = step.params
    if p["reverse"]:
        raise Unsupported("a loop that runs backwards")
    fixed, states = p["num_consts"], p["num_carry"]
    if len(values) == fixed + states:
        raise Unsupported("a loop along no array")
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
