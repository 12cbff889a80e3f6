"""What each operation of JAX becomes in ONNX: one table."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from onnx import helper

from deploy import onnx_products as products
from deploy import onnx_shapes as shapes
from deploy.onnx_graph import Deferred, Graph, Unsupported, Value
from deploy.onnx_shapes import Step, whole

Handler = Callable[..., Value | list[Value]]


# --- element by element -------------------------------------------------------------------------


def elementwise(graph: Graph, step: Step, op: str, *values: Value) -> Value:
    """Writes an operation whose inputs broadcast, in the order in which most is stored."""
    if len(values) == 1:
        x = graph.settle(values[0])
        return step.value(name=graph.emit(op, [x.name]), perm=x.perm, extent=x.extent)
    rank = len(step.shapes[0])
    tensors = [graph.settle(v) for v in values if v.const is None and len(v.shape) == rank]
    orders = [v.perm for v in tensors if v.extent == tuple(v.shape)] + [v.perm for v in tensors]
    straight = tuple(range(rank))
    order = next((perm for perm in orders if perm != straight), straight)
    names = [graph.name(v, order if len(v.shape) == rank else None) for v in values]
    extent = [1] * rank
    for v in values:
        for axis, size in enumerate(v.extent):
            extent[axis] = size if v.extent[axis] != 1 else extent[axis]
    return step.value(name=graph.emit(op, names), perm=order, extent=tuple(extent))


def plain(op: str) -> Handler:
    """Returns the handler of an operation that ONNX has."""
    return lambda graph, step, *values: elementwise(graph, step, op, *values)


def arithmetic(op: str) -> Handler:
    """Returns the handler of Add, Sub, Mul or Div, of which constants per channel wait."""

    def handle(graph: Graph, step: Step, left: Value, right: Value) -> Value:
        for value, other, single in ((left, right, 0), (right, left, 1)):
            axis = _channel(value, other)
            if axis is None or step.dtypes[0] != np.float32 or (op == "Div" and value is right):
                continue
            number = other.const.astype(np.float64).ravel()
            one, zero = np.ones(1), np.zeros(1)
            scale, shift = {
                "Add": (one, number),
                "Sub": (one, -number) if value is left else (-one, number),
                "Mul": (number, zero),
                "Div": (one / number if number.all() else number, zero),
            }[op]
            if (
                np.isfinite(scale).all()
                and np.isfinite(shift).all()
                and (op != "Div" or number.all())
            ):
                return products.affine(graph, value, scale, shift, axis, step.single[single])
        return elementwise(graph, step, op, left, right)

    return handle


def _channel(value: Value, other: Value) -> int | None:
    """Returns the axis along which a constant differs, -1 for one number; None otherwise."""
    if value.const is not None or other.const is None or value.extent != tuple(value.shape):
        return None
    wide = [axis for axis, size in enumerate(other.const.shape) if size != 1]
    if len(wide) > 1 or len(value.shape) < other.const.ndim:
        return None
    return wide[0] if wide else -1


@dataclass(frozen=True)
class Rectified(Deferred):
    """max(x, 0), which may become a Clip."""

    taken: str

    def write(self, graph: Graph, value: Value) -> str:
        """Writes a Relu."""
        return graph.emit("Relu", [self.taken])


def _number(value: Value) -> float | None:
    return (
        float(value.const.ravel()[0]) if value.const is not None and value.const.size == 1 else None
    )


def largest(graph: Graph, step: Step, left: Value, right: Value) -> Value:
    """`max`, which with 0 is a Relu."""
    x, other = (right, left) if left.const is not None else (left, right)
    if _number(other) == 0 and x.const is None and x.dtype == np.float32:
        graph.settle(x)
        return step.value(later=Rectified(x.name), perm=x.perm, extent=x.extent)
    return elementwise(graph, step, "Max", left, right)


def smallest(graph: Graph, step: Step, left: Value, right: Value) -> Value:
    """`min`, which with a Relu is a Clip."""
    x, other = (right, left) if left.const is not None else (left, right)
    if _number(other) is not None and isinstance(x.later, Rectified):
        ends = [graph.weight(np.array(end, np.float32)) for end in (0.0, _number(other))]
        name = graph.emit("Clip", [x.later.taken, *ends])
        return step.value(name=name, perm=x.perm, extent=x.extent)
    return elementwise(graph, step, "Min", left, right)


def clamp(graph: Graph, step: Step, low: Value, x: Value, high: Value) -> Value:
    """`clamp`, by numbers or by arrays."""
    return elementwise(graph, step, "Min", elementwise(graph, step, "Max", x, low), high)


def power(graph: Graph, step: Step, x: Value) -> Value:
    """`integer_pow`."""
    exponent = step.params["y"]
    if exponent == 2:
        return elementwise(graph, step, "Mul", x, x)
    other = Value((), x.dtype, const=np.array(exponent, x.dtype))
    return elementwise(graph, step, "Pow", x, other)


def chain(*ops: str) -> Handler:
    """Returns the handler of several operations, one after the other."""

    def handle(graph: Graph, step: Step, x: Value) -> Value:
        for op in ops:
            x = elementwise(graph, step, op, x)
        return x

    return handle


def moved(op: str, before: float, scale: float, after: float) -> Handler:
    """Returns the handler of op(x + before) * scale + after."""

    def handle(graph: Graph, step: Step, x: Value) -> Value:
        one = np.ones(1)
        x = products.affine(graph, x, one, np.full(1, before), -1, single=False)
        made = elementwise(graph, step, op, x)
        return products.affine(graph, made, np.full(1, scale), np.full(1, after), -1, single=True)

    return handle


def cast(graph: Graph, step: Step, x: Value) -> Value:
    """`convert_element_type`."""
    if x.dtype == step.dtypes[0]:
        return x
    kind = helper.np_dtype_to_tensor_dtype(step.dtypes[0])
    graph.settle(x)
    return step.value(name=graph.emit("Cast", [x.name], to=kind), perm=x.perm, extent=x.extent)


def select(graph: Graph, step: Step, which: Value, *cases: Value) -> Value:
    """`select_n` of two cases."""
    if which.dtype != np.bool_ or len(cases) != 2:
        raise Unsupported("a choice among more than two cases")
    return elementwise(graph, step, "Where", which, cases[1], cases[0])


def negated(graph: Graph, step: Step, left: Value, right: Value) -> Value:
    """`ne`."""
    return elementwise(graph, step, "Not", elementwise(graph, step, "Equal", left, right))


# --- parts of arrays ----------------------------------------------------------------------------


def sliced(graph: Graph, step: Step, x: Value, bounds: dict[int, tuple[int, int, int]]) -> Value:
    """Returns x[start:stop:stride] along each axis of `bounds`."""
    x = graph.settle(graph.full(x))
    bounds = {axis: b for axis, b in bounds.items() if b != (0, x.shape[axis], 1)}
    if not bounds:
        return x
    places = {x.perm.index(axis): bound for axis, bound in bounds.items()}
    columns = zip(*places.values(), strict=True)
    starts, stops, strides = (graph.integers(*column) for column in columns)
    taken = [x.name, starts, stops, graph.integers(*places), strides]
    return step.value(name=graph.emit("Slice", taken), perm=x.perm)


def static_slice(graph: Graph, step: Step, x: Value) -> Value:
    """`slice`."""
    p = step.params
    strides = p["strides"] or (1,) * len(x.shape)
    triples = zip(p["start_indices"], p["limit_indices"], strides, strict=True)
    bounds = {a: t for a, t in enumerate(triples) if t != (0, x.shape[a], 1)}
    if not all(isinstance(n, int) for t in bounds.values() for n in t):
        raise Unsupported("a part of the batch")
    return sliced(graph, step, x, bounds)


def dynamic_slice(graph: Graph, step: Step, x: Value, *starts: Value) -> Value:
    """`dynamic_slice`, whose starts are kept within the array."""
    sizes = step.params["slice_sizes"]
    cut = [axis for axis, size in enumerate(sizes) if size != x.shape[axis]]
    if len(starts) != len(sizes) or not all(isinstance(x.shape[axis], int) for axis in cut):
        raise Unsupported("a part of the batch")
    name = graph.name(graph.full(x)) if x.const is None else graph.name(whole(graph, x))
    begins, ends = [], []
    for axis in cut:
        least, most = (
            graph.weight(np.array(n, np.int64)) for n in (0, x.shape[axis] - sizes[axis])
        )
        begin = graph.emit("Cast", [graph.name(starts[axis])], to=helper.TensorProto.INT64)
        begin = graph.emit("Reshape", [graph.emit("Clip", [begin, least, most]), graph.integers(1)])
        begins.append(begin)
        ends.append(graph.emit("Add", [begin, graph.integers(sizes[axis])]))
    if not cut:
        return x
    both = [graph.emit("Concat", names, axis=0) for names in (begins, ends)]
    return step.value(name=graph.emit("Slice", [name, *both, graph.integers(*cut)]))


def split(graph: Graph, step: Step, x: Value) -> list[Value]:
    """`split` into parts along an axis."""
    parts, start, axis = [], 0, step.params["axis"]
    for shape, size in zip(step.shapes, step.params["sizes"], strict=True):
        one = replace(step, shapes=[shape])
        parts.append(sliced(graph, one, replace(x), {axis: (start, start + size, 1)}))
        start += size
    return parts


def gather(graph: Graph, step: Step, x: Value, indices: Value) -> Value:
    """`gather` where it is a part at a constant place, or takes rows of the first axis."""
    numbers, sizes = step.params["dimension_numbers"], step.params["slice_sizes"]
    batched = numbers.operand_batching_dims or numbers.start_indices_batching_dims
    if not batched and indices.const is not None and indices.const.ndim == 1:
        starts = dict(zip(numbers.start_index_map, indices.const.tolist(), strict=True))
        bounds = {axis: (at, at + sizes[axis], 1) for axis, at in starts.items()}
        shape = tuple(sizes[a] if a in starts else n for a, n in enumerate(x.shape))
        part = sliced(graph, replace(step, shapes=[shape]), x, bounds)
        return shapes.reshaped(graph, part, tuple(step.shapes[0]))
    rows = numbers.collapsed_slice_dims == numbers.start_index_map == (0,)
    rank = len(step.shapes[0])
    trailing = tuple(range(rank - len(x.shape) + 1, rank))
    if batched or not rows or numbers.offset_dims != trailing or indices.shape[-1] != 1:
        raise Unsupported("an indexing other than by rows or constant parts")
    if any(size != n for size, n in zip(sizes[1:], x.shape[1:], strict=True)):
        raise Unsupported("an indexing of parts of rows")
    places = shapes.reshaped(graph, whole(graph, indices), tuple(indices.shape[:-1]))
    taken = [graph.name(whole(graph, x)), graph.name(places)]
    return step.value(name=graph.emit("Gather", taken, axis=0))


def concatenate(graph: Graph, step: Step, *parts: Value) -> Value:
    """`concatenate`, in the order of axes of the first part that is no constant."""
    parts = [whole(graph, part) for part in parts]
    order = next((graph.settle(part).perm for part in parts if part.const is None), ())
    axis = order.index(step.params["dimension"])
    names = [graph.name(part, order) for part in parts]
    return step.value(name=graph.emit("Concat", names, axis=axis), perm=order)


def pad(graph: Graph, step: Step, x: Value, filling: Value) -> Value:
    """`pad` around an array; what is negative cuts."""
    edges = step.params["padding_config"]
    if any(inner for _, _, inner in edges):
        raise Unsupported("padding between elements")
    x = graph.settle(whole(graph, x))
    order = x.perm
    pads = [edges[axis][side] for side in (0, 1) for axis in order]
    taken = [graph.name(x, order), graph.integers(*pads), graph.name(filling)]
    return step.value(name=graph.emit("Pad", taken), perm=order)


def reverse(graph: Graph, step: Step, x: Value) -> Value:
    """`rev`."""
    x = graph.settle(graph.full(x))
    name = x.name
    for axis in step.params["dimensions"]:
        places = graph.integers(*reversed(range(x.shape[axis])))
        name = graph.emit("Gather", [name, places], axis=x.perm.index(axis))
    return step.value(name=name, perm=x.perm)


def top_k(graph: Graph, step: Step, x: Value) -> list[Value]:
    """`top_k`, of which equal ones come in the order of their places, as in JAX."""
    taken = [graph.name(graph.full(x)), graph.integers(step.params["k"])]
    axis = step.params.get("axis", len(x.shape) - 1)
    values, places = graph.emit("TopK", taken, 2, axis=axis)
    kind = helper.np_dtype_to_tensor_dtype(step.dtypes[1])
    places = graph.emit("Cast", [places], to=kind)
    return [
        Value(shape, dtype, name=name)
        for shape, dtype, name in zip(step.shapes, step.dtypes, (values, places), strict=True)
    ]


def extreme(op: str) -> Handler:
    """Returns the handler of `argmax` or `argmin`."""

    def handle(graph: Graph, step: Step, x: Value) -> Value:
        (axis,) = step.params["axes"]
        name = graph.emit(op, [graph.name(graph.full(x))], axis=axis, keepdims=0)
        kind = helper.np_dtype_to_tensor_dtype(step.dtypes[0])
        return step.value(name=graph.emit("Cast", [name], to=kind))

    return handle


def iota(graph: Graph, step: Step) -> Value:
    """`iota`: a constant."""
    axis, shape = step.params["dimension"], step.shapes[0]
    if not isinstance(shape[axis], int):
        raise Unsupported("numbers counted along the batch")
    small = [shape[axis] if i == axis else 1 for i in range(len(shape))]
    return step.value(const=np.arange(shape[axis], dtype=step.dtypes[0]).reshape(small))


def cumulative(graph: Graph, step: Step, x: Value) -> Value:
    """`cumsum`."""
    axis = graph.weight(np.array(step.params["axis"], np.int64))
    taken = [graph.name(graph.full(x)), axis]
    return step.value(name=graph.emit("CumSum", taken, reverse=int(step.params["reverse"])))


def same(graph: Graph, step: Step, x: Value) -> Value:
    """What changes nothing here."""
    return x


# --- what was recognised: see `onnx_trace` ------------------------------------------------------


def softmax(graph: Graph, step: Step, x: Value) -> Value:
    """Softmax over one axis."""
    x = graph.settle(graph.full(x))
    axis = x.perm.index(step.params["axis"])
    return step.value(name=graph.emit("Softmax", [x.name], axis=axis), perm=x.perm)


def layer_norm(graph: Graph, step: Step, x: Value, scale: Value, bias: Value) -> Value:
    """Normalisation over the last axis."""
    taken = [graph.name(graph.full(x)), graph.weight(scale.const), graph.weight(bias.const)]
    epsilon = step.params["epsilon"]
    return step.value(name=graph.emit("LayerNormalization", taken, axis=-1, epsilon=epsilon))


SIMPLE = {
    "abs": "Abs", "neg": "Neg", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "tanh": "Tanh",
    "logistic": "Sigmoid", "erf": "Erf", "sin": "Sin", "cos": "Cos", "tan": "Tan", "floor": "Floor",
    "ceil": "Ceil", "sign": "Sign", "pow": "Pow", "rem": "Mod", "eq": "Equal", "lt": "Less",
    "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual", "and": "And", "or": "Or",
    "not": "Not", "xor": "Xor", "sinh": "Sinh", "cosh": "Cosh", "atan": "Atan", "asin": "Asin",
    "acos": "Acos",
}  # fmt: skip
TABLE: dict[str, Handler] = {
    **{name: plain(op) for name, op in SIMPLE.items()},
    **{name: shapes.reduction for name in shapes.REDUCTIONS},
    **{name: arithmetic(name.capitalize()) for name in ("add", "sub", "mul", "div")},
    **dict.fromkeys(("copy", "copy_p", "optimization_barrier", "stop_gradient"), same),
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), shapes.reshape),
    **dict.fromkeys(("reduce_window_max", "reduce_window_sum"), shapes.window),
    "add_any": arithmetic("Add"),
    "argmax": extreme("ArgMax"),
    "argmin": extreme("ArgMin"),
    "broadcast_in_dim": shapes.broadcast,
    "clamp": clamp,
    "concatenate": concatenate,
    "conv_general_dilated": products.convolution,
    "convert_element_type": cast,
    "cumsum": cumulative,
    "dot_general": products.dot,
    "dynamic_slice": dynamic_slice,
    "erfc": moved("Erf", 0.0, -1.0, 1.0),
    "exp2": lambda graph, step, x: elementwise(
        graph, step, "Pow", Value((), x.dtype, const=np.array(2, x.dtype)), x
    ),
    "expm1": moved("Exp", 0.0, 1.0, -1.0),
    "gather": gather,
    "gelu": plain("Gelu"),
    "integer_pow": power,
    "iota": iota,
    "layer_norm": layer_norm,
    "log1p": moved("Log", 1.0, 1.0, 0.0),
    "max": largest,
    "min": smallest,
    "ne": negated,
    "pad": pad,
    "rev": reverse,
    "rsqrt": chain("Sqrt", "Reciprocal"),
    "select_n": select,
    "slice": static_slice,
    "softmax": softmax,
    "split": split,
    "square": lambda graph, step, x: elementwise(graph, step, "Mul", x, x),
    "top_k": top_k,
    "transpose": shapes.transpose,
}
