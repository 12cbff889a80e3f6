"""Shapes, sums and pooling as ONNX has them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from deploy.onnx_graph import Deferred, Graph, Unsupported, Value

Handler = Callable[..., Value | list[Value]]  # of a graph, a step and its inputs


@dataclass(frozen=True)
class Step:
    """One operation of the traced function."""

    name: str
    params: dict[str, Any]
    shapes: list[tuple]  # of its outputs
    dtypes: list[np.dtype]
    single: list[bool] = field(default_factory=list)  # whether nothing else takes that input

    def value(self, **known) -> Value:
        """Returns a value of the first output's shape and type."""
        return Value(self.shapes[0], self.dtypes[0], **known)


def channels_first(rank: int) -> tuple[int, ...]:
    """Returns the axes of [B, .., C] in the order in which ONNX has them: [B, C, ..]."""
    return (0, rank - 1, *range(1, rank - 1))


def without(perm: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    """Returns an order of axes when some are gone."""
    kept = [axis for axis in perm if axis not in axes]
    return tuple(sum(other < axis for other in kept) for axis in kept)


def whole(graph: Graph, value: Value) -> Value:
    """Returns a value with nothing left to be broadcast, constant if it was."""
    if value.const is None or value.extent == tuple(value.shape):
        return graph.full(value)
    if all(isinstance(size, int) for size in value.shape):
        return replace(value, const=np.broadcast_to(value.const, value.shape), extent=value.shape)
    return graph.full(value)


# --- shapes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flat(Deferred):
    """[B, .., C] as [B, D], which weights can take in the order in which it is stored."""

    source: Value
    order: np.ndarray  # the place in [D] of each that is stored

    def write_stored(self, graph: Graph) -> str:
        """Returns the name of [B, D] in that order."""
        return graph.emit("Flatten", [graph.written(self.source).name], axis=1)

    def write(self, graph: Graph, value: Value) -> str:
        """Writes it in the order of the axes."""
        return graph.reshaped(graph.name(self.source, raw=True), value.shape)


@dataclass(frozen=True)
class Split(Deferred):
    """[B, h * kh, w * kw, C] as [B, h, kh, w, kw, C], of which a pooling may be made."""

    source: Value

    def write(self, graph: Graph, value: Value) -> str:
        """Writes it channels last."""
        return graph.reshaped(graph.name(self.source), value.shape)


def turned(value: Value, permutation: Sequence[int], shape: tuple) -> Value:
    """Returns the value with its axes in another order, of which nothing is written."""
    if value.const is not None:
        return replace(value, shape=shape, const=value.const.transpose(permutation), extent=())
    places = [list(permutation).index(axis) for axis in value.perm]
    extent = [value.extent[axis] for axis in permutation]
    axis = list(permutation).index(value.axis) if value.axis >= 0 else -1
    return replace(value, shape=shape, perm=tuple(places), extent=tuple(extent), axis=axis)


def transpose(graph: Graph, step: Step, x: Value) -> Value:
    """`transpose`: only the order of axes changes."""
    if isinstance(x.later, (Flat, Split, Total)):
        graph.written(x)
    return turned(x, step.params["permutation"], step.shapes[0])


def reshape(graph: Graph, step: Step, x: Value) -> Value:
    """`reshape`, `squeeze` and `expand_dims`."""
    if step.params.get("dimensions") not in (None, ()) and step.name == "reshape":
        raise Unsupported("a reshape in another order of axes")
    return reshaped(graph, whole(graph, x), tuple(step.shapes[0]))


def reshaped(graph: Graph, x: Value, target: tuple) -> Value:
    """Returns a value in another shape, in the order in which it is stored where that is sound."""
    if x.const is not None:
        return Value(target, x.dtype, const=x.const.reshape(target))
    if tuple(x.shape) == target:
        return x
    if isinstance(x.later, Total) and [n for n in target if n != 1] == [
        n for n in x.shape if n != 1
    ]:
        kept = x.later.kept(target)
        if kept is not None:
            old, new = ([i for i, n in enumerate(of) if n != 1] for of in (x.shape, target))
            axis = new[old.index(x.axis)] if x.axis in old else -1
            return replace(kept, scale=x.scale, shift=x.shift, axis=axis)
    graph.written(x)
    made = Value(target, x.dtype, **_waiting(graph, x, target))
    sizes = target[1:] if len(target) == 6 else ()
    if sizes and len(x.shape) == 4 and x.shape[1:] == (
        sizes[0] * sizes[1], sizes[2] * sizes[3], sizes[4]
    ):  # fmt: skip
        return replace(made, later=Split(bare(x)))
    groups = _groups(x.shape, target)
    stored = _regrouped(x.perm, x.shape, groups) if groups else None
    if stored is not None:
        made.name = graph.reshaped(x.name, [target[axis] for axis in stored])
        made.perm = tuple(stored)
        if len(target) < 4 and made.perm != tuple(range(len(target))):
            made.name, made.perm = graph.name(made, raw=True), tuple(range(len(target)))
        return made
    if len(target) == 2 and x.perm[0] == 0 and target[0] == x.shape[0]:
        places = np.arange(math.prod(x.shape[1:])).reshape(x.shape[1:])
        order = places.transpose([axis - 1 for axis in x.perm[1:]]).ravel()
        return replace(made, later=Flat(bare(x), order))
    made.name = graph.reshaped(graph.name(x, raw=True), target)
    return made


def bare(value: Value) -> Value:
    """Returns the value as it is stored, for one whose scale and shift wait elsewhere."""
    return replace(value, scale=np.ones(1), shift=np.zeros(1), axis=-1)


def _waiting(graph: Graph, x: Value, target: tuple) -> dict[str, Any]:
    """Returns scale and shift as they are along the last axis of another shape."""
    if x.axis >= 0:
        last = x.shape[-1]
        if x.axis == len(x.shape) - 1 and isinstance(target[-1], int) and target[-1] % last == 0:
            arrays = (np.broadcast_to(array, (last,)) for array in (x.scale, x.shift))
            scale, shift = (np.tile(array, target[-1] // last) for array in arrays)
            return {"scale": scale, "shift": shift, "axis": len(target) - 1}
        graph.settle(x)
    return {"scale": x.scale, "shift": x.shift}


def _groups(old: Sequence, new: Sequence) -> list[tuple[list[int], list[int]]] | None:
    """Returns which axes become which: ([0], [0]), ([1, 2], [1]); None if that is not clear."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        a, b = ([i], [j])
        i, j = i + 1, j + 1
        if a[0] >= len(old) or b[0] >= len(new):
            rest = list(range(a[0], len(old))), list(range(b[0], len(new)))
            groups.append(rest)
            return groups
        left, right = old[a[0]], new[b[0]]
        while left != right:
            if not (isinstance(left, int) and isinstance(right, int)):
                return None
            if left < right and i < len(old):
                a, left, i = [*a, i], left * old[i], i + 1
            elif right < left and j < len(new):
                b, right, j = [*b, j], right * new[j], j + 1
            else:
                return None
        groups.append((a, b))
    return groups


def _regrouped(perm: Sequence[int], shape: Sequence, groups: list) -> list[int] | None:
    """Returns the order of the new axes if no group of old ones is stored torn apart."""
    order = []
    for a, b in groups:
        real = [perm.index(axis) for axis in a if shape[axis] != 1]
        between = range(min(real), max(real) + 1) if real else ()
        torn = real != sorted(real) or any(
            place not in real and shape[perm[place]] != 1 for place in between
        )
        if torn:
            return None
        order.append((real[0] if real else len(perm), b))
    return [axis for _, b in sorted(order, key=lambda pair: pair[0]) for axis in b]


def broadcast(graph: Graph, step: Step, x: Value, *dynamic: Value) -> Value:
    """`broadcast_in_dim`: only ones are put between axes; operations broadcast by themselves."""
    target = tuple(step.params["shape"])
    places = step.params["broadcast_dimensions"]
    if x.const is None and x.extent != tuple(x.shape):
        graph.settle(x)
    small = [1] * len(target)
    for axis, place in enumerate(places):
        small[place] = x.extent[axis]
    if x.const is not None:
        return Value(target, x.dtype, const=x.const.reshape(small))
    made = reshaped(graph, replace(x, shape=x.extent), tuple(small))
    return replace(made, shape=target, extent=tuple(small))


# --- sums and pooling --------------------------------------------------------------------------


@dataclass(frozen=True)
class Total(Deferred):
    """A sum over axes, written as a mean where it is divided by their size."""

    source: Value
    axes: tuple[int, ...]
    keep: bool = False

    @property
    def count(self) -> int:
        """How many numbers are added."""
        return math.prod(self.source.shape[axis] for axis in self.axes)

    def kept(self, target: tuple) -> Value | None:
        """Returns the value with a 1 for each axis, if that is what it is to become."""
        source = self.source
        wide = tuple(1 if i in self.axes else n for i, n in enumerate(source.shape))
        if wide != target:
            return None
        return Value(wide, source.dtype, perm=source.perm, later=replace(self, keep=True))

    def write(self, graph: Graph, value: Value) -> str:
        """Writes a pooling, a mean or a sum."""
        source = self.source
        name = graph.name(source, source.perm)
        sums = self.count > 1 and np.allclose(value.scale, self.count, 1e-6, 0)
        axes = [source.perm.index(axis) for axis in self.axes]
        if sums:
            value.scale = value.scale / self.count
        if not sums and len(source.shape) == 4 and sorted(axes) == [2, 3]:
            name = graph.emit("GlobalAveragePool", [name])
            return name if self.keep else graph.emit("Flatten", [name], axis=1)
        op = "ReduceSum" if sums else "ReduceMean"
        return graph.emit(op, [name, graph.integers(*sorted(axes))], keepdims=int(self.keep))


REDUCTIONS = {"reduce_max": "ReduceMax", "reduce_min": "ReduceMin", "reduce_sum": "ReduceSum"}
REDUCTIONS |= {"reduce_prod": "ReduceProd"}


def reduction(graph: Graph, step: Step, x: Value) -> Value:
    """Sums, products and extremes over axes."""
    axes, op = tuple(step.params["axes"]), REDUCTIONS[step.name]
    pools = isinstance(x.later, Split) and axes == (2, 4) and not x.waits
    if pools and op in ("ReduceMax", "ReduceSum"):
        return _pooled(graph, step, x.later.source, (x.shape[2], x.shape[4]))
    x = graph.settle(graph.full(x))
    perm = without(x.perm, axes)
    if op == "ReduceSum" and x.dtype.kind == "f":
        later = Total(x, axes)
        if isinstance(later.count, int):
            scale = np.full(1, float(later.count))
            return step.value(later=later, scale=scale, perm=perm)
    places = graph.integers(*sorted(x.perm.index(axis) for axis in axes))
    return step.value(name=graph.emit(op, [x.name, places], keepdims=0), perm=perm)


def _pooled(graph: Graph, step: Step, x: Value, sides: tuple[int, int]) -> Value:
    options = {"kernel_shape": list(sides), "strides": list(sides)}
    order = channels_first(4)
    if step.name == "reduce_max":
        name = graph.emit("MaxPool", [graph.name(x, order)], **options)
        return step.value(name=name, perm=order)
    name = graph.emit("AveragePool", [graph.name(x, order)], **options)
    return step.value(name=name, perm=order, scale=np.full(1, float(math.prod(sides))))


def window(graph: Graph, step: Step, x: Value) -> Value:
    """`reduce_window_max` and `reduce_window_sum` over the axes between batch and channels."""
    p, rank = step.params, len(x.shape)
    sides, strides = p["window_dimensions"], p["window_strides"]
    still = sides[0] == sides[-1] == strides[0] == strides[-1] == 1
    if (
        not still
        or rank < 3
        or set(p["base_dilation"]) != {1}
        or any(p["padding"][0] + p["padding"][-1])
    ):
        raise Unsupported("a pooling over images or channels")
    pads = [edge for side in zip(*p["padding"][1:-1], strict=True) for edge in side]
    options = {"kernel_shape": list(sides[1:-1]), "strides": list(strides[1:-1]), "pads": pads}
    options["dilations"] = list(p["window_dilation"][1:-1])
    order = channels_first(rank)
    taken = [graph.name(graph.full(x), order)]
    if step.name == "reduce_window_max":
        return step.value(name=graph.emit("MaxPool", taken, **options), perm=order)
    name = graph.emit("AveragePool", taken, count_include_pad=1, **options)
    return step.value(name=name, perm=order, scale=np.full(1, float(math.prod(sides))))
