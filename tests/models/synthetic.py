"""Seeded random weights and the files that hold them, in each publisher's own format.

An array depends on its name and shape alone, so a test without PyTorch or Keras makes the very
weights that a reference was filled with.
"""

import io
import math
import pickle
import sys
import types
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from unittest import mock

import h5py
import numpy as np

from models.weights.formats import write_safetensors

FILE_NAMES = {
    "timm": "weights.safetensors",
    "torchvision": "weights.pth",
    "lukemelas": "weights.pth",
    "keras": "weights.h5",
}


def random_array(name: str, shape: tuple[int, ...], family: str) -> np.ndarray:
    """Values that keep activations of ordinary size, BatchNorm statistics included."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    leaf = name.replace("/", ".").rpartition(".")[2]
    if leaf in ("num_batches_tracked", "count"):
        return np.zeros(shape, np.int64)
    scales = leaf in ("running_var", "moving_variance", "variance", "gamma")
    if scales or (leaf == "weight" and len(shape) == 1):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if len(shape) < 2 or "pos_embed" in name or "token" in name:
        return rng.normal(0, 0.1, shape).astype(np.float32)
    if family == "keras":
        seen = math.prod(shape[:2]) if leaf == "depthwise_kernel" else math.prod(shape[:-1])
    else:
        seen = math.prod(shape[1:])
    # Half the gain where no activation follows, as after most 1x1 kernels: otherwise a deep network
    # amplifies rounding without limit.
    pointwise = len(shape) == 4 and shape[2 if family != "keras" else 0] == 1
    return rng.standard_normal(shape, np.float32) * np.float32(math.sqrt((2 - pointwise) / seen))


def random_weights(shapes: dict[str, tuple[int, ...]], family: str) -> dict[str, np.ndarray]:
    """Returns an array for every name."""
    return {name: random_array(name, tuple(shape), family) for name, shape in shapes.items()}


def write_weights(path, arrays: dict[str, np.ndarray], family: str) -> None:
    """Writes arrays in the publisher's format."""
    write = {".safetensors": write_safetensors_file, ".pth": write_pth, ".h5": write_h5}
    write[Path(FILE_NAMES[family]).suffix](path, arrays)


def write_safetensors_file(path, arrays: dict[str, np.ndarray]) -> None:
    write_safetensors(path, arrays, {"format": "pt"})


def write_h5(path, arrays: dict[str, np.ndarray]) -> None:
    """The layout of Keras Applications: a group a layer, `layer_names` and `weight_names`."""
    layers: dict[str, list[str]] = {}
    for name in arrays:
        layers.setdefault(name.partition("/")[0], []).append(name)
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [layer.encode() for layer in layers]
        file.attrs["backend"] = b"tensorflow"
        for layer, names in layers.items():
            group = file.create_group(layer)
            group.attrs["weight_names"] = [f"{name}:0".encode() for name in names]
            for name in names:
                group.create_dataset(f"{name}:0", data=arrays[name])


def write_pth(path, arrays: dict[str, np.ndarray]) -> None:
    """The zip format of `torch.save` for a state dict, without torch."""
    fake, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    storages = {np.dtype(np.float32): "FloatStorage", np.dtype(np.int64): "LongStorage"}
    for name in storages.values():
        setattr(fake, name, type(name, (), {"__module__": "torch", "__qualname__": name}))

    def rebuild(*arguments):
        raise NotImplementedError

    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2, fake._utils = rebuild, utils

    class Storage:
        def __init__(self, key, array):
            self.key, self.array = key, array

    class Tensor:
        def __init__(self, key, array):
            self.storage = Storage(key, array)

        def __reduce__(self):
            array = self.storage.array
            strides = tuple(s // array.itemsize for s in array.strides)
            return rebuild, (self.storage, 0, array.shape, strides, False, OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, item):
            if isinstance(item, Storage):
                kind = getattr(fake, storages[item.array.dtype])
                return ("storage", kind, item.key, "cpu", item.array.size)
            return None

    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    tensors = OrderedDict((name, Tensor(str(i), a)) for i, (name, a) in enumerate(arrays.items()))
    buffer = io.BytesIO()
    with mock.patch.dict(sys.modules, {"torch": fake, "torch._utils": utils}):
        Pickler(buffer, protocol=2).dump(tensors)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/data.pkl", buffer.getvalue())
        archive.writestr("weights/byteorder", "little")
        for tensor in tensors.values():
            archive.writestr(f"weights/data/{tensor.storage.key}", tensor.storage.array.tobytes())
        archive.writestr("weights/version", "3\n")
