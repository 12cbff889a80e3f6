"""An ONNX graph in the making: nodes, weights, and values that know how they lie in memory.

JAX computes with channels last, ONNX convolves with channels first. A value therefore remembers the
order in which its axes are stored; what is per channel and constant waits, so that it can become
part of the weights before or after it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

OPSET, IR_VERSION = 20, 9  # ONNX Runtime 1.17 and later
LIMIT = 2**31  # bytes of a file: protobuf knows no more
INPUT = "images"


class Unsupported(Exception):
    """An operation, or this use of it, has no form in ONNX; the text says what it is."""


@dataclass
class Value:
    """An array of the traced function.

    `shape` may hold the symbolic batch. A constant or a tensor may be smaller, with 1 where it is
    to be broadcast: `extent`. Stored axis k of a tensor is axis perm[k]. What is stored is to be
    multiplied by `scale` and added to `shift`, along `axis`.
    """

    shape: tuple
    dtype: np.dtype
    const: np.ndarray | None = None
    name: str = ""
    perm: tuple[int, ...] = ()
    extent: tuple = ()
    scale: np.ndarray = field(default_factory=lambda: np.ones(1))  # float64 [1] or [C]
    shift: np.ndarray = field(default_factory=lambda: np.zeros(1))
    axis: int = -1
    later: Any = None  # what writes it: see `Deferred`

    def __post_init__(self):
        self.perm = self.perm or tuple(range(len(self.shape)))
        if self.const is not None:
            self.extent = self.const.shape
        self.extent = tuple(self.extent) or tuple(self.shape)

    @property
    def waits(self) -> bool:
        """Whether scale and shift still have to be applied."""
        return self.shift.any() or not np.allclose(self.scale, 1, rtol=2e-7, atol=0)


class Deferred:
    """What a value is, before it is known what becomes of it."""

    def write(self, graph: "Graph", value: Value) -> str:
        """Writes it, with axes in the order of `value`, and returns its name."""
        raise NotImplementedError


def shaped(array: np.ndarray, axis: int, rank: int) -> np.ndarray:
    """[1] or [C] -> [1, .., C, .., 1] with C at `axis`; a scalar stays one."""
    if array.size == 1:
        return array.reshape(())
    return array.reshape([-1 if i == axis else 1 for i in range(rank)])


class Graph:
    """Nodes in order, each written once, and the weights."""

    def __init__(self, batch: object):
        self.batch = batch  # the symbolic dimension
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}
        self._names: dict[tuple, list[str]] = {}  # what is there already
        self.casts: dict[str, tuple[str, int]] = {}  # of single bytes: from what, to which type
        self._before: dict[str, str] = {}  # what was reshaped into what
        self._count = 0

    def emit(self, op: str, inputs: Sequence[str], outputs: int = 1, **attributes) -> str | list:
        """Writes a node unless there is the same; returns its output, or the list of several."""
        key = (op, *inputs, outputs, repr(sorted(attributes.items())))
        if key not in self._names or op == "Scan":
            names = [self.fresh(op) for _ in range(outputs)]
            self.nodes.append(helper.make_node(op, list(inputs), names, names[0], **attributes))
            self._names[key] = names
        names = self._names[key]
        return names[0] if outputs == 1 else names

    def fresh(self, stem: str) -> str:
        """Returns a name that nothing has yet."""
        self._count += 1
        return f"{stem}_{self._count}"

    def weight(self, array: np.ndarray) -> str:
        """Returns the name of a constant; equal ones are stored once."""
        array = np.ascontiguousarray(array) if array.ndim else array
        digest = hashlib.sha256(array.tobytes()).hexdigest()[:16]
        name = f"weight_{'x'.join(map(str, array.shape))}_{array.dtype}_{digest}"
        self.weights[name] = array
        return name

    def integers(self, *numbers: int) -> str:
        """Returns the name of a constant int64 [N]."""
        return self.weight(np.array(numbers, np.int64))

    def nested(self) -> "Graph":
        """Returns a graph for the body of a loop, which sees the names of this one."""
        body = Graph(self.batch)
        body.weights, body.fresh, body._names = self.weights, self.fresh, dict(self._names)
        return body

    # --- values -------------------------------------------------------------------------------

    def written(self, value: Value) -> Value:
        """Writes a value but for what waits; returns it."""
        if value.later is not None:
            value.name, value.later = value.later.write(self, value), None
        return value

    def settle(self, value: Value) -> Value:
        """Writes a value and all that waits; returns it."""
        self.written(value)
        if value.waits:
            rank, at = len(value.shape), value.axis
            stored = value.perm.index(at) if rank and at >= 0 else 0
            for op, array, idle in (("Mul", value.scale, 1.0), ("Add", value.shift, 0.0)):
                if not np.allclose(array, idle, rtol=2e-7, atol=0):
                    other = self.weight(shaped(array, stored, rank).astype(value.dtype))
                    value.name = self.emit(op, [value.name, other])
        value.scale, value.shift, value.axis = np.ones(1), np.zeros(1), -1
        return value

    def name(self, value: Value, perm: Sequence[int] | None = None, raw: bool = False) -> str:
        """Returns the name of a value stored in an order of axes; None for that of the axes.

        With `raw`, what waits is left to the caller.
        """
        perm = tuple(range(len(value.shape))) if perm is None else tuple(perm)
        if value.const is not None:
            return self.weight(value.const.transpose(perm) if value.const.ndim else value.const)
        (self.written if raw else self.settle)(value)
        return self.stored(value, perm)

    def stored(self, value: Value, perm: tuple[int, ...]) -> str:
        """Returns the name of a written value with its axes in another order."""
        if perm == value.perm:
            return value.name
        order = [value.perm.index(axis) for axis in perm]
        return self.transposed(value.name, order)

    def transposed(self, name: str, order: list[int]) -> str:
        """Transposes pixels while they still are single bytes."""
        if name in self.casts:
            source, kind = self.casts[name]
            return self.emit("Cast", [self.emit("Transpose", [source], perm=order)], to=kind)
        return self.emit("Transpose", [name], perm=order)

    def full(self, value: Value) -> Value:
        """Returns the value with nothing left to be broadcast, as a tensor."""
        if value.const is None and value.extent == tuple(value.shape):
            return value
        name = self.emit("Expand", [self.name(value), self.shape(value.shape)])
        return Value(value.shape, value.dtype, name=name)

    def shape(self, dims: Sequence) -> str:
        """Returns the name of a shape, int64 [R], that may hold the batch."""
        parts, known = [], []
        for dim in dims:
            if isinstance(dim, int):
                known.append(dim)
            elif dim == self.batch:
                parts += [self.integers(*known)] if known else []
                parts.append(self.emit("Shape", [INPUT], start=0, end=1))
                known = []
            else:
                raise Unsupported(f"an array of the size {dim}")
        parts += [self.integers(*known)] if known or not parts else []
        return parts[0] if len(parts) == 1 else self.emit("Concat", parts, axis=0)

    def reshaped(self, name: str, dims: Sequence) -> str:
        """Returns the name of a tensor in another shape, of which one size may be symbolic."""
        sizes = [dim if isinstance(dim, int) else -1 for dim in dims]
        if sizes.count(-1) > 1:
            raise Unsupported(f"an array of the shape {tuple(dims)}")
        name = self._before.get(name, name)  # not one reshape after another
        made = self.emit("Reshape", [name, self.integers(*sizes)])
        self._before[made] = name
        return made

    # --- the whole ------------------------------------------------------------------------------

    def model(self, side: int, outputs: dict[str, Value]) -> bytes:
        """Returns the ONNX file of uint8 images [B, side, side, 3] and these outputs."""
        size = sum(array.nbytes for array in self.weights.values())
        if size > LIMIT - 2**24:
            raise Unsupported(f"a file of more than 2 GB ({size / 1e9:.1f} GB of weights)")
        renamed, results = {}, []
        for name, value in outputs.items():
            last = self.name(self.full(value))
            if last in renamed or not any(last in node.output for node in self.nodes):
                last = self.emit("Identity", [last])
            renamed[last] = name
            dims = [dim if isinstance(dim, int) else "batch" for dim in value.shape]
            kind = helper.np_dtype_to_tensor_dtype(value.dtype)
            results.append(helper.make_tensor_value_info(name, kind, dims))
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [renamed.get(name, name) for name in names]
        used, nodes = set(outputs), []
        for node in reversed(self.nodes):  # what nothing takes is left out
            if used.intersection(node.output):
                used.update(inputs_of(node))
                nodes.insert(0, node)
        weights = [numpy_helper.from_array(a, n) for n, a in self.weights.items() if n in used]
        taken = [
            helper.make_tensor_value_info(INPUT, onnx.TensorProto.UINT8, ["batch", side, side, 3])
        ]
        graph = helper.make_graph(nodes, "archcompare", taken, results, weights)
        options = {"opset_imports": [helper.make_opsetid("", OPSET)], "ir_version": IR_VERSION}
        made = helper.make_model(graph, producer_name="archcompare", **options)
        onnx.checker.check_model(made)
        return made.SerializeToString()


def with_metadata(content: bytes, metadata: dict[str, str]) -> bytes:
    """Returns an ONNX file with these properties in place of its own."""
    model = onnx.load_from_string(content)
    helper.set_model_props(model, metadata)
    return model.SerializeToString()


def inputs_of(node: onnx.NodeProto) -> list[str]:
    """Returns the names that a node and the graphs within it take."""
    names = list(node.input)
    for attribute in node.attribute:
        for inner in attribute.g.node:
            names += inputs_of(inner)
        names += [output.name for output in attribute.g.output]
    return names
