"""Reads the tensors of a .pth file; nothing in it is executed."""

import io
import math
import pickle
import pickletools
import re
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from ml_dtypes import bfloat16

from errors import UserError
from models.weights.download import digest

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


def read_pytorch(path: Path) -> dict[str, np.ndarray]:
    """Returns {name: array} of a state dict, in the zip format or the one before PyTorch 1.6."""
    stated = re.search(r"-([0-9a-f]{8})\.pth$", path.name)  # the habit of torchvision and timm
    if stated and (actual := digest(path, "sha256"))[:8] != stated[1]:
        raise ValueError(f"its name promises a SHA-256 of {stated[1]}..., it has {actual}")
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
