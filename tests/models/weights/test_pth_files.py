"""PyTorch's files are read exactly and without running anything; malicious ones are refused."""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from errors import UserError
from models.weights.download import digest
from models.weights.formats import read_weights
from models.weights.pytorch import MAGIC
from tests.models.weights.make_pth_golden import GOLDEN, values
from tests.models.weights.test_formats import refused


def check_golden(read: dict[str, np.ndarray]) -> None:
    expected = values()
    expected["shared"] = expected["conv.weight"][0]
    assert list(read) == list(expected)
    for name, array in expected.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


@pytest.mark.parametrize("name", ["zip", "legacy", "checkpoint_zip", "checkpoint_legacy"])
def test_files_of_real_pytorch(name):
    check_golden(read_weights(GOLDEN / f"{name}.pth", "pytorch"))


def test_a_big_endian_file(tmp_path):
    sizes = {"0": 4, "1": 4, "2": 4, "3": 2, "4": 2, "5": 8, "6": 8, "7": 1, "8": 1}
    with zipfile.ZipFile(GOLDEN / "zip.pth") as old, zipfile.ZipFile(tmp_path / "a", "w") as new:
        for name in old.namelist():
            data, (_, _, inner) = old.read(name), name.partition("/")
            if inner == "byteorder":
                data = b"big"
            elif inner.startswith("data/") and data:
                data = np.frombuffer(data, f"u{sizes[inner[5:]]}").byteswap().tobytes()
            new.writestr(name, data)
    check_golden(read_weights(tmp_path / "a", "pytorch"))


def as_zip(path: Path, state: bytes, data: bytes = bytes(16)) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", state)
        archive.writestr("archive/data/0", data)
    return path


def as_legacy(path: Path, state: bytes, data: bytes = bytes(16)) -> Path:
    head = [pickle.dumps(value, 2) for value in (MAGIC, 1001, {"little_endian": True})]
    keys = pickle.dumps(["0"], 2)
    path.write_bytes(b"".join([*head, state, keys, struct.pack("<q", len(data) // 4), data]))
    return path


class Name:
    """Pickles as a global, whether it exists or not."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class Call:
    """Pickles as a call of a global."""

    def __init__(self, module: str, name: str, *args: object):
        self.function, self.args = Name(module, name), args


class Id:
    """Pickles as a persistent id."""

    def __init__(self, *pid: object):
        self.pid = pid


class _Pickler(pickle._Pickler):
    def save(self, value: object, *args: object, **kwargs: object) -> None:
        if isinstance(value, Name):
            self.write(f"c{value.module}\n{value.name}\n".encode())
        elif isinstance(value, Id):
            self.save(value.pid)
            self.write(pickle.BINPERSID)
        elif isinstance(value, Call):
            self.save(value.function)
            self.save(value.args)
            self.write(pickle.REDUCE)
        else:
            super().save(value, *args, **kwargs)


def pickled(value: object) -> bytes:
    """A pickle that may hold Name, Call and Id anywhere."""
    buffer = io.BytesIO()
    _Pickler(buffer, 2).dump(value)
    return buffer.getvalue()


FLOATS = Id("storage", Name("torch", "FloatStorage"), "0", "cpu", 4)


def tensor(offset=0, shape=(4,), stride=(1,), storage=FLOATS) -> Call:
    hooks = OrderedDict()
    return Call("torch._utils", "_rebuild_tensor_v2", storage, offset, shape, stride, False, hooks)


@pytest.mark.parametrize("write", [as_zip, as_legacy])
def test_a_handmade_file_is_read(tmp_path, write):
    data = np.arange(4, dtype=np.float32)
    old = Call("torch._utils", "_rebuild_tensor", FLOATS, 2, (2,), (1,))
    state = {"a": tensor(), "b": tensor(3, (), ()), "old": old, "none": tensor(4, (0,), (1,))}
    read = read_weights(write(tmp_path / "a.pth", pickled(state), data.tobytes()), "pytorch")
    np.testing.assert_array_equal(read["a"], data)
    np.testing.assert_array_equal(read["old"], data[2:])
    assert read["b"] == 3 and read["none"].shape == (0,)


@pytest.mark.parametrize("write", [as_zip, as_legacy])
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch", "load"),
        ("torch", "FloatStorage.__class__"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("numpy", "load"),
        ("models.weights.pytorch", "_Global"),
    ],
)
def test_code_in_a_pickle_is_refused(tmp_path, write, module, name):
    canary = tmp_path / "canary"
    for state in (Name(module, name), {"a": tensor(), "b": Call(module, name, f"touch {canary}")}):
        message = refused(write(tmp_path / "a.pth", pickled(state)), "pytorch")
        assert f"it holds {module}.{name}, which could run code" in message
    assert not canary.exists()


@pytest.mark.parametrize(
    ("opcode", "name"),
    [
        (b"(ios\nsystem\n", "INST"),
        (b"(cos\nsystem\nX\x02\x00\x00\x00lso", "OBJ"),
        (b"ccollections\nOrderedDict\n)\x81", "NEWOBJ"),
        (b"\x82\x01", "EXT1"),
        (b"\x97", "NEXT_BUFFER"),
    ],
)
def test_opcodes_that_no_state_dict_needs(tmp_path, opcode, name):
    path = as_zip(tmp_path / "a.pth", b"\x80\x02" + opcode + b".")
    assert f"its pickle uses {name}," in refused(path, "pytorch")


@pytest.mark.parametrize("target", [Name("torch._utils", "_rebuild_parameter"), FLOATS, tensor()])
@pytest.mark.parametrize("attribute", ["name", "dtype", "__class__", "__call__", "__setstate__"])
@pytest.mark.parametrize("slots", [True, False])
def test_a_pickle_cannot_change_what_its_parts_do(tmp_path, target, attribute, slots):
    """BUILD sets attributes of what it finds on the stack."""
    value = {attribute: Name("collections", "OrderedDict")}
    changes = pickled((None, value) if slots else value)[2:-1]
    path = as_zip(tmp_path / "a.pth", pickled(target)[:-1] + changes + b"b.")
    assert "damaged" in refused(path, "pytorch")


@pytest.mark.parametrize(
    "wrong",
    [
        tensor(1),
        tensor(-1),
        tensor(4, (1,), (1,)),
        tensor(0, (2, 2), (3, 1)),
        tensor(0, (2,), (-1,)),
        tensor(0, (-2,), (1,)),
        tensor(0, (-2, -2), (1, 1)),
        tensor(0, (1 << 40,), (0,)),
        tensor(0, (1 << 62, 1 << 62), (0, 0)),
        tensor(0, (4,), (1, 1)),
        tensor(5, (0,), (1,)),
        tensor(True),
        tensor(0.0),
        tensor(0, [4], (1,)),
        tensor(storage="0"),
        tensor(storage=Id("storage", Name("torch", "FloatStorage"), "0", "cpu", 5)),
        tensor(storage=Id("storage", Name("torch", "DoubleStorage"), "0", "cpu", 4)),
        tensor(storage=Id("storage", Name("torch", "FloatStorage"), "1", "cpu", 4)),
        tensor(storage=Id("storage", Name("torch", "FloatStorage"), "0", "cpu", -4)),
        tensor(storage=Id("storage", Name("collections", "OrderedDict"), "0", "cpu", 4)),
        tensor(storage=Id("storage", "FloatStorage", "0", "cpu", 4)),
        tensor(storage=Id("module", Name("torch", "FloatStorage"), "0", "cpu", 4)),
        tensor(storage=Id("storage", Name("torch", "FloatStorage"))),
        tensor(storage=Id("storage", Name("torch", "FloatStorage"), "0", "cpu", 4, ("1", 0, 2))),
        Call("torch._utils", "_rebuild_parameter", "x", False, None),
        Call("torch._utils", "_rebuild_tensor_v2"),
        Call("torch", "FloatStorage", 4),
        Call("collections", "OrderedDict", 5),
    ],
)
@pytest.mark.parametrize("write", [as_zip, as_legacy])
def test_tensors_outside_their_storage_and_other_nonsense(tmp_path, write, wrong):
    message = refused(write(tmp_path / "a.pth", pickled({"a": tensor(), "b": wrong})), "pytorch")
    assert "damaged" in message


def test_a_memo_index_made_to_exhaust_memory(tmp_path):
    path = as_zip(tmp_path / "a.pth", b"\x80\x02Nr\xff\xff\xff\x7f.")
    assert "memo index" in refused(path, "pytorch")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([tensor()], "holds a list"),
        ({}, "not a dict of tensors"),
        ({"epoch": 3, "net": tensor()}, "holds int at 'epoch'"),
        ({"model": {"a": {"b": tensor()}}}, "holds dict at 'a'"),
        ({3: tensor()}, "at 3"),
    ],
)
def test_pickles_of_other_things(tmp_path, state, message):
    assert message in refused(as_zip(tmp_path / "a.pth", pickled(state)), "pytorch")
    (tmp_path / "b.pth").write_bytes(pickled(state)[:2] + pickle.dumps(5, 2)[2:])
    assert "none that torch.save wrote" in refused(tmp_path / "b.pth", "pytorch")


def test_other_zip_files(tmp_path):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "x")
    assert "without data.pkl" in refused(path, "pytorch")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickled({"a": tensor()}))
    assert "compressed" in refused(path, "pytorch")


@pytest.mark.parametrize("name", ["zip", "legacy"])
def test_a_cut_file_is_refused(tmp_path, name):
    path, whole = tmp_path / "a.pth", (GOLDEN / f"{name}.pth").read_bytes()
    for length in [*range(1, len(whole) - 1, 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert refused(path, "pytorch")


@pytest.mark.filterwarnings("ignore:invalid escape sequence", "ignore:overflow")
@pytest.mark.parametrize("name", ["zip", "legacy"])
def test_changed_bytes_are_refused_or_numbers(tmp_path, name):
    """Whatever is in a file, the answer is arrays or a UserError."""
    path, whole = tmp_path / "a.pth", (GOLDEN / f"{name}.pth").read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(whole), 250):
        changed = bytearray(whole)
        changed[position] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        try:
            read = read_weights(path, "pytorch")
        except UserError:
            continue
        assert all(isinstance(array, np.ndarray) for array in read.values())


def test_the_digest_in_a_name_is_checked(tmp_path):
    data = (GOLDEN / "zip.pth").read_bytes()
    start = digest(GOLDEN / "zip.pth", "sha256")[:8]
    path = tmp_path / f"resnet18-{start}.pth"
    path.write_bytes(data)
    check_golden(read_weights(path, "pytorch"))
    path.write_bytes(data[:2000] + bytes([data[2000] ^ 1]) + data[2001:])
    message = refused(path, "pytorch")
    assert f"promises a SHA-256 of {start}" in message
    assert digest(path, "sha256") in message and "fetch it again" in message
