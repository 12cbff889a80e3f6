"""An ONNX model in 8 or 16 bits, made by the tools of ONNX Runtime; needs the extra [onnx]."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from ml_dtypes import bfloat16
from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from errors import UserError

NUMBERS = {  # of the methods that store weights in 16 bits
    "float16": (np.float16, onnx.TensorProto.FLOAT16),
    "bfloat16": (bfloat16, onnx.TensorProto.BFLOAT16),
}
PRODUCTS = ("Conv", "Gemm", "MatMul")
KEPT = 0.05  # of all weights: a last product with fewer stays float32
CHUNK = 8  # calibration images at once
STORED = 64  # numbers: smaller arrays stay float32, for a cast takes as many bytes


class Images:
    """Calibration images, a few at a time, as ONNX Runtime reads them."""

    def __init__(self, images: np.ndarray):
        self.images, self.place, self.end = images, 0, -(-len(images) // CHUNK)

    def __len__(self) -> int:
        return -(-len(self.images) // CHUNK)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Chooses the chunks that `get_next` gives."""
        self.place, self.end = start_index, end_index

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Returns the next chunk, None after the last."""
        if self.place >= self.end:
            return None
        self.place += 1
        return {"images": self.images[(self.place - 1) * CHUNK : self.place * CHUNK]}


def compress(source: Path, target: Path, method: str, images: np.ndarray | None = None) -> None:
    """Writes the float32 ONNX model `source`, compressed by one method, to `target`.

    `images` uint8 [N, S, S, 3] calibrate int8. Raises UserError for a model without products with
    weights, and what ONNX Runtime raises.
    """
    model = onnx.load(source)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if method in NUMBERS:
        made = _stored(model, method)
    else:
        made = _in_integers(source, target, images if method == "int8" else None)
    onnx.helper.set_model_props(made, metadata)
    onnx.save(made, target)


def _in_integers(source: Path, target: Path, images: np.ndarray | None) -> onnx.ModelProto:
    """Returns the model in 8 bits; without images, the ranges are those of each batch."""
    with _quiet():
        # Folds constants, and moves transpositions out of the way.
        quant_pre_process(source, target, skip_symbolic_shape=True)
        model = onnx.load(target)
        left_out = _kept_in_float32(model)
        left_out += [f"{name}_MatMul" for name in left_out]  # what becomes of a Gemm
        options = {"nodes_to_exclude": left_out, "per_channel": True}
        options["weight_type"] = QuantType.QInt8
        if images is None:
            quantize_dynamic(model, target, op_types_to_quantize=list(PRODUCTS), **options)
        else:
            # One chunk after the other: all at once would take the memory of all activations.
            ranges = {"CalibStridedMinMax": 1, "WeightSymmetric": True}
            options |= {"activation_type": QuantType.QUInt8, "extra_options": ranges}
            quantize_static(model, target, Images(images), **options)
    return onnx.load(target)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what ONNX Runtime's tools advise from standard error."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _kept_in_float32(model: onnx.ModelProto) -> list[str]:
    """Names all nodes; returns those of the preprocessing, and the last product if it is small."""
    sizes = {array.name: np.prod(array.dims) for array in model.graph.initializer}
    weights, after, kept = {}, set(), []  # of each product, by its node's name
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
        size = max((sizes.get(name, 0) for name in node.input), default=0)
        if node.op_type in PRODUCTS and size:
            weights[node.name] = size
        if node.name in weights or after.intersection(node.input):
            after.update(node.output)
        else:
            kept.append(node.name)
    needed = {"logits"}
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            if node.name in weights:
                small = weights[node.name] < KEPT * sum(weights.values())
                return kept + [node.name] * bool(small)
            needed.update(node.input)
    raise UserError("its logits come from no convolution and no matrix product with weights")


def _stored(model: onnx.ModelProto, method: str) -> onnx.ModelProto:
    """Returns the model with weights of 16 bits, which become float32 when a session starts.

    What 16 bits cannot hold, such as numbers above 65,504 in float16, stays as it is.
    """
    (number, kind), casts = NUMBERS[method], []
    helper = onnx.helper
    for array in model.graph.initializer:
        if array.data_type != onnx.TensorProto.FLOAT or np.prod(array.dims) < STORED:
            continue
        with np.errstate(over="ignore"):
            short = onnx.numpy_helper.to_array(array).astype(number)
        if np.isfinite(short.astype(np.float32)).all():
            name, half = array.name, f"{array.name}_{method}"
            casts.append(helper.make_node("Cast", [half], [name], to=array.data_type))
            array.CopyFrom(helper.make_tensor(half, kind, short.shape, short.tobytes(), raw=True))
    if not casts:
        raise UserError("it has no weights")
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model
