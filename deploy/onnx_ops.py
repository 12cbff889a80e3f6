"""What each operation of JAX becomes in ONNX: one table."""

from dataclasses import dataclass

import numpy as np
from onnx import helper

from deploy import onnx_parts as parts
from deploy import onnx_products as products
from deploy import onnx_shapes as shapes
from deploy.onnx_graph import Deferred, Graph, Unsupported, Value
from deploy.onnx_shapes import Handler, Step

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
    if _number(other) is not None and isinstance(x.later, Rectified) and not x.waits:
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
    name = graph.emit("Cast", [x.name], to=kind)
    if x.dtype.itemsize == 1:
        graph.casts[name] = x.name, kind
    return step.value(name=name, perm=x.perm, extent=x.extent)


def select(graph: Graph, step: Step, which: Value, *cases: Value) -> Value:
    """`select_n` of two cases."""
    if which.dtype != np.bool_ or len(cases) != 2:
        raise Unsupported("a choice among more than two cases")
    return elementwise(graph, step, "Where", which, cases[1], cases[0])


def finite(graph: Graph, step: Step, x: Value) -> Value:
    """`is_finite`."""
    either = [elementwise(graph, step, op, x) for op in ("IsNaN", "IsInf")]
    return elementwise(graph, step, "Not", elementwise(graph, step, "Or", *either))


def negated(graph: Graph, step: Step, left: Value, right: Value) -> Value:
    """`ne`."""
    return elementwise(graph, step, "Not", elementwise(graph, step, "Equal", left, right))


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
    "ceil": "Ceil", "sign": "Sign", "pow": "Pow", "eq": "Equal", "lt": "Less",
    "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual", "and": "And", "or": "Or",
    "not": "Not", "xor": "Xor", "sinh": "Sinh", "cosh": "Cosh", "atan": "Atan", "asin": "Asin",
    "acos": "Acos",
}  # fmt: skip
TABLE: dict[str, Handler] = {
    **{name: plain(op) for name, op in SIMPLE.items()},
    **{name: shapes.reduction for name in shapes.REDUCTIONS},
    **{name: arithmetic(name.capitalize()) for name in ("add", "sub", "mul", "div")},
    **dict.fromkeys(("copy", "optimization_barrier", "stop_gradient"), same),
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), shapes.reshape),
    **dict.fromkeys(("reduce_window_max", "reduce_window_sum"), shapes.window),
    "add_any": arithmetic("Add"),
    "argmax": parts.extreme("ArgMax"),
    "argmin": parts.extreme("ArgMin"),
    "broadcast_in_dim": shapes.broadcast,
    "clamp": clamp,
    "concatenate": parts.concatenate,
    "conv_general_dilated": products.convolution,
    "convert_element_type": cast,
    "cumsum": parts.cumulative,
    "dot_general": products.dot,
    "dynamic_slice": parts.dynamic_slice,
    "erfc": moved("Erf", 0.0, -1.0, 1.0),
    "exp2": lambda graph, step, x: elementwise(
        graph, step, "Pow", Value((), x.dtype, const=np.array(2, x.dtype)), x
    ),
    "expm1": moved("Exp", 0.0, 1.0, -1.0),
    "gather": parts.gather,
    "gelu": plain("Gelu"),
    "integer_pow": power,
    "iota": parts.iota,
    "is_finite": finite,
    "layer_norm": layer_norm,
    "log1p": moved("Log", 1.0, 1.0, 0.0),
    "max": largest,
    "min": smallest,
    "ne": negated,
    "pad": parts.pad,
    "rev": parts.reverse,
    "rsqrt": chain("Sqrt", "Reciprocal"),
    "select_n": select,
    "slice": parts.static_slice,
    "softmax": softmax,
    "split": parts.split,
    "square": lambda graph, step, x: elementwise(graph, step, "Mul", x, x),
    "top_k": parts.top_k,
    "transpose": shapes.transpose,
}
