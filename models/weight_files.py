"""Reads published weight files to numpy arrays, in the names and layouts of their publishers.

A weight file comes from a stranger: nothing in it is executed, it cannot make another file be read,
and one that is damaged is refused with a message that names it.
"""

import io
import math
import os
import pickle
import pickletools
import re
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO, NamedTuple

import h5py
import numpy as np
import safetensors
from ml_dtypes import bfloat16
from safetensors.numpy import save

from errors import UserError, choose
from models.download import digest


def read_weights(path: Path, kind: str) -> dict[str, np.ndarray]:
    """Reads every array of a weight file.

    Args:
      path: the file.
      kind: "safetensors", "keras" (legacy HDF5 of Keras Applications) or "pytorch" (a state dict).

    Returns:
      {name: array}; names and axes as published, floats as float32, other types as they are.

    Raises:
      UserError: the file is missing, empty, damaged, of another kind, or could run code.
    """
    readers = {"safetensors": _read_safetensors, "keras": _read_keras, "pytorch": _read_pytorch}
    reader = readers[choose("the kind of weights", kind, readers)]
    _check_file(path)
    try:
        return {name: _to_float32(array) for name, array in reader(path).items()}
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - broken files raise nearly any type
        raise _damaged(path, error) from error


def read_metadata(path: Path) -> dict[str, str]:
    """Returns the text fields in the header of a safetensors file.

    Raises:
      UserError: the file is missing, empty or damaged.
    """
    _check_file(path)
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def write_safetensors(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes arrays and text fields to a safetensors file, which is whole or absent at any moment.

    Raises:
      UserError: the folder cannot be written.
    """
    # The library writes memory as it lies, so a transposed view must be laid out first.
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(save(arrays, metadata))  # the library's own writing is private to us
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"cannot write weights to {path}: {error}\nMake room there, or name another folder."
        ) from error


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"weights: {path} is a folder; name the file in it")
    if not path.is_file():
        raise UserError(f"weights: there is no file {path}; check the path")
    if path.stat().st_size == 0:
        raise UserError(f"weights: {path} is empty; delete it and fetch it again")


def _damaged(path: Path, reason: object) -> UserError:
    return UserError(
        f"weights: {path} is damaged or cut short ({reason}); delete it and fetch it again"
    )


def _to_float32(array: np.ndarray) -> np.ndarray:
    if array.dtype == bfloat16 or array.dtype.kind == "f":
        return array.astype(np.float32, copy=False)
    return array


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    with safetensors.safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _read_keras(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path, "r", locking=False) as file:  # some network disks know no locks
        _refuse_links(path, file, set())
        return _read_layers(path, file)


def _refuse_links(path: Path, group: h5py.Group, seen: set[int]) -> None:
    """Raises unless every name in the tree is data of this very file.

    HDF5 would follow the rest without a word: to other files on this machine, into raw bytes of
    any file (external storage), or into datasets pieced together from other files (virtual).
    """
    address = h5py.h5o.get_info(group.id).addr
    if address in seen:  # hard links may form a circle
        return
    seen.add(address)
    for name in group:
        where = f"{group.name.rstrip('/')}/{name}"
        is_link = not isinstance(group.get(name, getlink=True), h5py.HardLink)
        member = None if is_link else group[name]
        if isinstance(member, h5py.Group):
            _refuse_links(path, member, seen)
        elif is_link or getattr(member, "external", None) or getattr(member, "is_virtual", False):
            raise UserError(
                f"weights: {path} is refused: {where} takes its data from elsewhere; only files"
                " that hold their own weights are read"
            )


def _read_layers(path: Path, file: h5py.File) -> dict[str, np.ndarray]:
    root = file.get("model_weights", file)
    layers = _names(root, "layer_names")
    if layers is None:
        if {"_layer_checkpoint_dependencies", "layers", "vars"} & set(root):
            raise UserError(
                f"weights: {path} has the layout of Keras 3 (.weights.h5), which is not read; save"
                " in the legacy layout: to a name that ends in .h5 but not in .weights.h5"
            )
        raise UserError(
            f"weights: {path} has no attribute layer_names; give an .h5 file with the weights of"
            " a Keras model, as Keras Applications publishes them"
        )
    arrays = {}
    for layer in layers:
        if not isinstance(root.get(layer), h5py.Group):
            raise _damaged(path, f"layer {layer!r} is listed and missing")
        for weight in _names(root[layer], "weight_names") or []:
            name = f"{layer}/{re.sub(r':[0-9]+$', '', weight).rsplit('/', 1)[-1]}"
            if name in arrays:
                raise UserError(
                    f"weights: {path} holds {name} twice (the second as {weight!r}); names must"
                    " differ, so give a file with one model"
                )
            arrays[name] = _read_dataset(path, root[layer].get(weight), f"{layer}: {weight}")
    if not arrays:
        raise UserError(f"weights: {path} lists {len(layers)} layers and no weights in them")
    return arrays


def _names(group: h5py.Group, attribute: str) -> list[str] | None:
    """Returns a list of names, which Keras splits into <attribute>0, 1, ... where it is long."""
    if attribute in group.attrs:
        parts = [group.attrs[attribute]]
    else:
        keys = [f"{attribute}{i}" for i in range(len(group.attrs))]
        parts = [group.attrs[key] for key in keys if key in group.attrs]
    if not parts:
        return None
    names = np.concatenate([np.ravel(part) for part in parts]).tolist()
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def _read_dataset(path: Path, dataset: object, name: str) -> np.ndarray:
    if not isinstance(dataset, h5py.Dataset):
        raise _damaged(path, f"weight {name!r} is listed and missing")
    if dataset.dtype.kind not in "fiu":
        raise UserError(f"weights: {path}: {name!r} holds {dataset.dtype}, not numbers")
    # No compression gains this much: such a dataset was never filled, or is made to exhaust memory.
    if dataset.nbytes > 2000 * dataset.id.get_storage_size():
        raise _damaged(path, f"weight {name!r} of {dataset.nbytes:,} bytes holds no data")
    return np.asarray(dataset[()])


# -------------------------------------------------------------------------------------- PyTorch

STORAGES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
GLOBALS = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor",  # PyTorch before 0.4
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    *(f"torch.{name}" for name in STORAGES),
}
# What pickles of state dicts are made of. Those that build instances of classes are not among it.
OPCODES = frozenset(
    """
    PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG
    LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE
    SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_LIST LIST APPEND
    APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS GET BINGET
    LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE BUILD PERSID BINPERSID
    """.split()  # noqa: SIM905
)
MAGIC = 0x1950A86A20F9469CFC6C  # opens the format before PyTorch 1.6


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    count: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Global(NamedTuple):
    """Stands for a name in a pickle; a tuple, so that no pickle can change what it does."""

    name: str

    def __call__(self, *args: object) -> object:
        if self.name == "collections.OrderedDict":
            return OrderedDict(*args)
        if self.name.startswith("torch._utils._rebuild_tensor"):
            return _checked_tensor(*args[:4])
        if self.name == "torch._utils._rebuild_parameter" and isinstance(args[0], _Tensor):
            return args[0]
        raise ValueError(f"{self.name} is called with what is no tensor")


def _checked_tensor(storage: object, offset: object, shape: object, stride: object) -> _Tensor:
    if not isinstance(storage, _Storage) or not isinstance(shape, tuple):
        raise ValueError("a tensor without storage or shape")
    if any(type(number) is not int or number < 0 for number in (offset, *shape, *stride)):
        raise ValueError(f"a tensor of shape {shape}, stride {stride}, offset {offset}")
    count = math.prod(shape)
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    end = offset + last + 1 if count else offset
    # A stride of zero would make a tensor of any size from one number, and exhaust memory.
    if end > storage.count or count > storage.count:
        raise ValueError(f"a tensor of shape {shape} lies outside its storage of {storage.count}")
    return _Tensor(storage, offset, shape, stride)


class _Unpickler(pickle.Unpickler):
    """Unpickles plain data and tensors without their numbers; executes nothing of the file's."""

    def __init__(self, file: BinaryIO, path: Path):
        super().__init__(file, encoding="utf-8")
        self.path, self.storages = path, {}

    def find_class(self, module: str, name: str) -> _Global:
        full = f"{module}.{name}"
        if full not in GLOBALS:
            raise UserError(
                f"weights: {self.path} is refused: it holds {full}, which could run code; only"
                " tensors are read. Save a state dict, or better a safetensors file."
            )
        return _Global(full)

    def persistent_load(self, pid: object) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise ValueError("a persistent id that is no storage")
        dtype = STORAGES.get(str(getattr(pid[1], "name", "")).removeprefix("torch."))
        if dtype is None or type(pid[4]) is not int or pid[4] < 0:
            raise ValueError("a storage of unknown type or size")
        if pid[5:] not in ((), (None,)):
            raise ValueError("a view of a storage, as PyTorch before 0.4 wrote")
        storage = _Storage(str(pid[2]), dtype, pid[4])
        if self.storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"storage {storage.key} is of two types or sizes")
        return storage


def _unpickle(file: BinaryIO, path: Path) -> tuple[object, dict[str, _Storage]]:
    """Returns the next object of a file and its storages, after a look at every opcode of it."""
    start = file.tell()
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name not in OPCODES:
            raise UserError(
                f"weights: {path} is refused: its pickle uses {opcode.name}, which no state dict"
                " needs; only tensors are read. Of a whole model, save model.state_dict() alone."
            )
        # The memo grows to the largest index, so a huge one would exhaust memory.
        if "PUT" in opcode.name and argument > file.tell():
            raise ValueError(f"memo index {argument}")
    end = file.tell()
    file.seek(start)
    unpickler = _Unpickler(io.BytesIO(file.read(end - start)), path)
    return unpickler.load(), unpickler.storages


def _read_pytorch(path: Path) -> dict[str, np.ndarray]:
    stated = re.search(r"-([0-9a-f]{8})\.pth$", path.name)  # the habit of torchvision and timm
    if stated and (actual := digest(path, "sha256"))[:8] != stated[1]:
        raise _damaged(path, f"its name promises a SHA-256 of {stated[1]}..., it has {actual}")
    with open(path, "rb") as file:
        start = file.read(2)
        if start == b"PK":
            return _read_zip(file, path)
        file.seek(0)
        if start[:1] == b"\x80":
            return _read_legacy(file, path)
    raise UserError(
        f"weights: {path} is neither zip file nor pickle, so no file of torch.save; give a state"
        " dict, or better a safetensors file"
    )


def _read_zip(file: BinaryIO, path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if any(info.compress_type for name, info in entries.items() if name.startswith("data")):
            raise ValueError("a compressed entry, which PyTorch does not write")
        if "data.pkl" not in entries:
            raise UserError(f"weights: {path} is a zip file without data.pkl, so no state dict")
        swap = "byteorder" in entries and archive.open(entries["byteorder"]).read(3) == b"big"
        state, _ = _unpickle(io.BytesIO(archive.read(entries["data.pkl"])), path)
        tensors = _state_dict(state, path)
        storages = {}
        for storage in {tensor.storage for tensor in tensors.values()}:
            data = archive.read(entries[f"data/{storage.key}"])
            storages[storage] = _numbers(storage, data, swap)
    return {name: _view(tensor, storages[tensor.storage]) for name, tensor in tensors.items()}


def _read_legacy(file: BinaryIO, path: Path) -> dict[str, np.ndarray]:
    if _unpickle(file, path)[0] != MAGIC or _unpickle(file, path)[0] != 1001:
        raise UserError(f"weights: {path} is a pickle, but none that torch.save wrote")
    _unpickle(file, path)  # facts about the machine that saved it
    state, listed = _unpickle(file, path)
    tensors = _state_dict(state, path)
    storages = {}
    for key in _unpickle(file, path)[0]:
        storage, (count,) = listed[key], struct.unpack("<q", file.read(8))
        if count != storage.count:
            raise ValueError(f"storage {key} holds {count} numbers, not {storage.count}")
        data = file.read(count * storage.dtype.itemsize)
        storages[storage] = _numbers(storage, data, swap=False)  # always little-endian
    return {name: _view(tensor, storages[tensor.storage]) for name, tensor in tensors.items()}


def _state_dict(state: object, path: Path) -> dict[str, _Tensor]:
    """Returns the tensors by name, of a state dict or of a checkpoint that holds one."""
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not state:
        raise UserError(f"weights: {path} holds a {type(state).__name__}, not a dict of tensors")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise UserError(
                f"weights: {path} holds {type(tensor).__name__} at {name!r}, not a tensor; save"
                " model.state_dict() alone"
            )
    return dict(state)


def _numbers(storage: _Storage, data: bytes, swap: bool) -> np.ndarray:
    size = storage.dtype.itemsize
    if len(data) < storage.count * size:
        raise ValueError(f"storage {storage.key} of {storage.count} numbers has {len(data)} bytes")
    numbers = np.frombuffer(data, f"<u{size}", storage.count)
    return (numbers.byteswap() if swap else numbers).view(storage.dtype)


def _view(tensor: _Tensor, storage: np.ndarray) -> np.ndarray:
    strides = [step * storage.itemsize for step in tensor.stride]
    return np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.shape, strides).copy()
