"""Convolutions and matrix products as ONNX has them; what is constant becomes part of weights."""

import math
from dataclasses import dataclass, field, replace

import numpy as np

from deploy.onnx_graph import Deferred, Graph, Unsupported, Value, shaped
from deploy.onnx_shapes import Flat, Step, turned, whole


@dataclass(frozen=True)
class Product(Deferred):
    """Conv, Gemm or MatMul by constant weights, whose `channel` is stored there."""

    op: str
    taken: str
    weight: np.ndarray
    bias: np.ndarray | None = None
    attributes: dict = field(default_factory=dict)

    @property
    def channel(self) -> int:
        """The stored axis of the outputs."""
        return 1 if self.op == "Conv" else -1

    def scaled(self, scale: np.ndarray, shift: np.ndarray) -> "Product":
        """Returns the product whose outputs are multiplied and shifted."""
        out = 0 if self.op == "Conv" else 1
        bias = (0.0 if self.bias is None else self.bias) * scale + shift
        weight = self.weight
        if not np.all(scale == 1):
            weight = (weight * shaped(scale, out, weight.ndim)).astype(weight.dtype)
        width = weight.shape[out]
        bias = np.broadcast_to(bias, (width,)) if np.any(bias) else None
        return replace(self, weight=weight, bias=bias)

    def write(self, graph: Graph, value: Value) -> str:
        """Writes one node, or two where the bias is a node of its own."""
        inputs = [self.taken, graph.weight(self.weight)]
        bias = [] if self.bias is None else [graph.weight(self.bias.astype(self.weight.dtype))]
        if self.op == "MatMul":
            name = graph.emit("MatMul", inputs)
            return graph.emit("Add", [name, *bias]) if bias else name
        return graph.emit(self.op, inputs + bias, **self.attributes)


def affine(graph: Graph, value: Value, scale, shift, axis: int, single: bool) -> Value:
    """Returns value * scale + shift, [1] or [C] along `axis`, without writing it."""
    value, later = replace(value), value.later
    if isinstance(later, Product):
        if single and not value.waits and axis in (-1, value.perm[later.channel]):
            return replace(value, later=later.scaled(scale, shift))
        graph.written(value)
    if -1 != value.axis != axis != -1:
        graph.settle(value)

    return replace(
        value,
        scale=value.scale * scale,
        shift=value.shift * scale + shift,
        axis=max(axis, value.axis),
    )


def convolution(graph: Graph, step: Step, x: Value, kernel: Value) -> Value:
    """`conv_general_dilated` of any number of spatial axes."""
    p, numbers = step.params, step.params["dimension_numbers"]
    if set(p["lhs_dilation"]) != {1} or p["batch_group_count"] != 1:
        raise Unsupported("a transposed convolution")
    if min(edge for pair in p["padding"] for edge in pair) < 0:
        raise Unsupported("a convolution with negative padding")
    pads = [edge for side in zip(*p["padding"], strict=True) for edge in side]
    groups = p["feature_group_count"]
    options = {"strides": list(p["window_strides"]), "dilations": list(p["rhs_dilation"])}
    options |= {"pads": pads, "group": groups}
    order = tuple(numbers.lhs_spec)
    if kernel.const is None:
        taken = [graph.name(graph.full(x), order), graph.name(kernel, numbers.rhs_spec)]
        return step.value(name=graph.emit("Conv", taken, **options), perm=tuple(numbers.out_spec))
    weight = np.broadcast_to(kernel.const, kernel.shape).transpose(numbers.rhs_spec)
    x = graph.full(x)
    taken = graph.name(x, order, raw=True)
    product = Product("Conv", taken, weight, attributes=options)
    if x.waits and x.axis in (-1, order[1]) and (x.scale.all() or not x.shift.any()):
        width = x.shape[order[1]]
        scale, shift = (np.broadcast_to(array, (width,)) for array in (x.scale, x.shift))
        if shift.any() and any(pads):  # zeros are put around what was shifted
            other = shaped(shift / scale, 1, len(order)).astype(weight.dtype)
            product = replace(product, taken=graph.emit("Add", [taken, graph.weight(other)]))
            shift = np.zeros(1)
        outputs, inputs = weight.shape[:2]
        seen = np.arange(outputs)[:, None] // (outputs // groups) * inputs + np.arange(inputs)
        wide = (outputs, inputs, *[1] * (weight.ndim - 2))
        bias = None
        if shift.any():
            bias = (weight * shift[seen].reshape(wide)).sum(axis=tuple(range(1, weight.ndim)))
        weight = (weight * scale[seen].reshape(wide)).astype(weight.dtype)
        product = replace(product, weight=weight, bias=bias)
    elif x.waits:
        product = replace(product, taken=graph.name(x, order))
    return step.value(later=product, perm=tuple(numbers.out_spec))


def dot(graph: Graph, step: Step, left: Value, right: Value) -> Value:
    """`dot_general`: by constant weights, or as a batch of matrix products."""
    (lc, rc), (lb, rb) = step.params["dimension_numbers"]
    if not lb and len(lc) == 1 and step.dtypes[0].kind == "f":
        if right.const is not None and right.const.ndim == 2 and left.const is None:
            return _by_weights(graph, step, left, lc[0], _matrix(right, rc[0]))
        if left.const is not None and left.const.ndim == 2 and right.const is None:
            made = _by_weights(graph, step, right, rc[0], _matrix(left, lc[0]))
            return turned(made, (len(made.shape) - 1, *range(len(made.shape) - 1)), step.shapes[0])
    left, right = whole(graph, left), whole(graph, right)
    lf = [axis for axis in range(len(left.shape)) if axis not in (*lc, *lb)]
    rf = [axis for axis in range(len(right.shape)) if axis not in (*rc, *rb)]
    names = [graph.name(left, (*lb, *lf, *lc)), graph.name(right, (*rb, *rc, *rf))]
    of = lambda value, axes: [value.shape[axis] for axis in axes]  # noqa: E731
    if not len(lc) == len(lf) == len(rf) == 1:  # as one axis each
        shared, inner = of(left, lb), math.prod(of(left, lc))
        sides = [math.prod(of(left, lf)), inner], [inner, math.prod(of(right, rf))]
        names = [graph.reshaped(n, [*shared, *s]) for n, s in zip(names, sides, strict=True)]
    name = graph.emit("MatMul", names)
    if not len(lc) == len(lf) == len(rf) == 1:
        name = graph.reshaped(name, step.shapes[0])
    return step.value(name=name)


def _matrix(value: Value, contracted: int) -> np.ndarray:
    matrix = np.broadcast_to(value.const, value.shape)
    return matrix if contracted == 0 else matrix.T


def _by_weights(graph: Graph, step: Step, x: Value, axis: int, weight: np.ndarray) -> Value:
    """Contracts an axis of x with weights [K, N]; the new axis is the last one."""
    rank, flat = len(x.shape), isinstance(x.later, Flat)
    shape = (*(size for i, size in enumerate(x.shape) if i != axis), weight.shape[1])
    x = graph.full(x)
    if not flat:
        graph.written(x)
    place = x.perm.index(axis)
    perm = [rank - 1 if a == axis else a - (a > axis) for a in x.perm]
    made = Value(shape, step.dtypes[0], perm=tuple(perm))
    if place == rank - 2 > 0:
        made.name = graph.emit("MatMul", [graph.weight(weight.T), graph.name(x, x.perm)])
        return made
    if place != rank - 1:
        x = replace(x, name=graph.stored(x, (*without_axis(rank, axis), axis)))
        x.perm, made.perm = (*without_axis(rank, axis), axis), tuple(range(rank))
    if x.waits and x.axis not in (-1, axis):
        graph.settle(x)
        flat = False
    bias = None
    if x.waits:
        scale, shift = (np.broadcast_to(a, (len(weight),)) for a in (x.scale, x.shift))
        bias = shift @ weight if shift.any() else None
        weight = (weight * scale[:, None]).astype(weight.dtype)
    if flat:
        taken, weight = x.later.write_stored(graph), weight[x.later.order]
    else:
        taken = x.name
    made.later = Product("Gemm" if rank == 2 else "MatMul", taken, weight, bias)
    return made


def without_axis(rank: int, axis: int) -> tuple[int, ...]:
    """Returns all axes but one."""
    return tuple(i for i in range(rank) if i != axis)
