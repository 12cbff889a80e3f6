"""Parts of arrays, arrays put together, and places in them, as ONNX has them."""

from dataclasses import replace

import numpy as np
from onnx import helper

from deploy import onnx_shapes as shapes
from deploy.onnx_graph import Graph, Unsupported, Value
from deploy.onnx_shapes import Handler, Step, whole


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
    """`gather` where it is a part at a constant place, or takes rows along an axis."""
    numbers, sizes = step.params["dimension_numbers"], step.params["slice_sizes"]
    batched = numbers.operand_batching_dims or numbers.start_indices_batching_dims
    if not batched and indices.const is not None and indices.const.ndim == 1:
        starts = dict(zip(numbers.start_index_map, indices.const.tolist(), strict=True))
        bounds = {axis: (at, at + sizes[axis], 1) for axis, at in starts.items()}
        shape = tuple(sizes[a] if a in starts else n for a, n in enumerate(x.shape))
        part = sliced(graph, replace(step, shapes=[shape]), x, bounds)
        return shapes.reshaped(graph, part, tuple(step.shapes[0]))
    (axis, *others), rank = numbers.start_index_map, len(step.shapes[0])
    places = [place for place in range(rank) if place not in numbers.offset_dims]
    one = not others and numbers.collapsed_slice_dims == (axis,) and indices.shape[-1] == 1
    whole_rows = all(n == x.shape[a] for a, n in enumerate(sizes) if a != axis)
    if batched or not one or not whole_rows or places != [axis + i for i in range(len(places))]:
        raise Unsupported("an indexing by more than one axis, or of parts")
    if indices.const is not None and indices.const.ravel().tolist() == list(range(x.shape[axis])):
        return x
    rows = shapes.reshaped(graph, whole(graph, indices), tuple(indices.shape[:-1]))
    taken = [graph.name(whole(graph, x)), graph.name(rows)]
    return step.value(name=graph.emit("Gather", taken, axis=axis))


def concatenate(graph: Graph, step: Step, *parts: Value) -> Value:
    """`concatenate`, in the order of axes of the first part that is no constant."""
    parts = [whole(graph, part) for part in parts if 0 not in part.shape]
    if len(parts) == 1:
        return parts[0]
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
