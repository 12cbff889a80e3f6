"""Weight files of every kind are read exactly; broken and malicious ones are refused by name."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from ml_dtypes import bfloat16

from errors import UserError
from models.weights.formats import read_metadata, read_weights, write_safetensors


def refused(path: Path, kind: str) -> str:
    """The message of the refusal, which names the file."""
    with pytest.raises(UserError) as caught:
        read_weights(path, kind)
    assert str(path) in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------ every kind


@pytest.mark.parametrize("kind", ["safetensors", "keras", "pytorch"])
def test_no_file_a_folder_an_empty_file_and_garbage(tmp_path, kind):
    path = tmp_path / "weights"
    assert "there is no file" in refused(path, kind)
    assert "is a folder" in refused(tmp_path, kind)
    path.write_bytes(b"")
    assert "fetch it again" in refused(path, kind)
    path.write_bytes(np.random.default_rng(0).bytes(1000))
    refused(path, kind)


def test_unknown_kind(tmp_path):
    with pytest.raises(UserError, match="Did you mean 'keras'"):
        read_weights(tmp_path, "keras3")


# ----------------------------------------------------------------------------------- safetensors


def test_safetensors_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    single = rng.standard_normal((2, 3)).astype(np.float32)
    halves = np.arange(6, dtype=np.float32).reshape(2, 3) / 4
    arrays = {
        "transposed": single.T,
        "half": halves.astype(np.float16),
        "bfloat16": halves.astype(bfloat16),
        "double": halves.astype(np.float64),
        "scalar": np.array(7, np.int64),
        "bool": np.array([True, False]),
    }
    path = tmp_path / "new" / "a.safetensors"
    write_safetensors(path, arrays, {"source": "test"})
    assert read_metadata(path) == {"source": "test"}
    read = read_weights(path, "safetensors")
    assert {name: array.dtype for name, array in read.items()} == {
        **dict.fromkeys(["transposed", "half", "bfloat16", "double"], np.float32),
        "scalar": np.int64,
        "bool": bool,
    }
    for name, array in arrays.items():
        assert read[name].shape == array.shape
        np.testing.assert_array_equal(read[name], array.astype(read[name].dtype))
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"]


def test_damaged_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": np.arange(100.0)}, {})
    data = path.read_bytes()
    assert read_metadata(path) == {}
    for bad in (data[:-1], data[:40], data[:4], b"\xff" * 8 + data[8:], data[:8] + b"x" + data[9:]):
        path.write_bytes(bad)
        assert "delete it and fetch it again" in refused(path, "safetensors")
        with pytest.raises(UserError, match="damaged"):
            read_metadata(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": np.ones(2, np.float32)}, {})
    with pytest.raises(UserError, match="cannot write weights"):
        write_safetensors(path, {"a": np.array(["text"])}, {})
    assert list(tmp_path.iterdir()) == [path]
    np.testing.assert_array_equal(read_weights(path, "safetensors")["a"], [1, 1])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write weights"):
        write_safetensors(tmp_path / "file" / "a.safetensors", {}, {})


# ----------------------------------------------------------------------------------------- Keras


def write_keras(path: Path, layers: dict[str, dict[str, np.ndarray]], root: str = "/") -> Path:
    with h5py.File(path, "w") as file:
        group = file.require_group(root)
        group.attrs["layer_names"] = [layer.encode() for layer in layers]
        for layer, weights in layers.items():
            group.create_group(layer).attrs["weight_names"] = [name.encode() for name in weights]
            for name, array in weights.items():
                group[layer][name] = array
    return path


@pytest.fixture
def vgg(tmp_path):
    """A Keras file with one layer, to be spoilt."""
    kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
    return write_keras(tmp_path / "vgg.h5", {"conv1": {"conv1/kernel:0": kernel}, "pool": {}})


@pytest.mark.parametrize("root", ["/", "model_weights"])
def test_keras_names_and_numbers(tmp_path, root):
    layers = {
        "conv1": {"conv1/kernel:0": np.ones((2, 2)), "conv1/bias:0": np.zeros(2, np.float16)},
        "block1_conv1": {"block1_conv1_W_1:0": np.full((1, 2), 3.0)},
        "conv1_conv": {"kernel:0": np.full(2, 4.0)},
        "stem_conv": {"stem_conv/stem_conv/kernel:0": np.full(2, 5.0)},
        "normalization": {"normalization/mean:0": np.full(3, 6.0), "count:10": np.array(7)},
        "pool": {},
    }
    read = read_weights(write_keras(tmp_path / "a.h5", layers, root), "keras")
    assert {name: array.ravel()[0] for name, array in read.items()} == {
        "conv1/kernel": 1,
        "conv1/bias": 0,
        "block1_conv1/block1_conv1_W_1": 3,
        "conv1_conv/kernel": 4,
        "stem_conv/kernel": 5,
        "normalization/mean": 6,
        "normalization/count": 7,
    }
    count = read.pop("normalization/count")
    assert isinstance(count, np.ndarray) and count.dtype == np.int64
    assert {array.dtype for array in read.values()} == {np.dtype(np.float32)}


def test_keras_splits_long_lists_of_names(vgg):
    with h5py.File(vgg, "a") as file:
        del file.attrs["layer_names"], file["conv1"].attrs["weight_names"]
        file.attrs["layer_names0"], file.attrs["layer_names1"] = ["pool"], ["conv1"]
        file["conv1"].attrs["weight_names0"] = ["conv1/kernel:0"]
    assert list(read_weights(vgg, "keras")) == ["conv1/kernel"]


def test_keras_files_may_be_compressed_and_have_circles(vgg):
    with h5py.File(vgg, "a") as file:
        file["conv1/loop"] = file["/"]
        del file["conv1/conv1/kernel:0"]
        file["conv1"].create_dataset("conv1/kernel:0", data=np.ones(10_000), compression="gzip")
    assert read_weights(vgg, "keras")["conv1/kernel"].sum() == 10_000


def test_keras_weights_that_would_share_a_name(tmp_path):
    layers = {"conv": {"a/kernel:0": np.ones(1), "b/kernel:0": np.ones(1)}}
    message = refused(write_keras(tmp_path / "a.h5", layers), "keras")
    assert "conv/kernel twice" in message and "b/kernel:0" in message


@pytest.mark.parametrize("where", ["/other", "/conv1/other", "/conv1/conv1/other"])
@pytest.mark.parametrize(
    "link", [h5py.ExternalLink("/etc/passwd", "/"), h5py.SoftLink("/conv1"), h5py.SoftLink("/no")]
)
def test_keras_files_with_links_are_refused(vgg, where, link):
    with h5py.File(vgg, "a") as file:
        file[where] = link
    message = refused(vgg, "keras")
    assert "is refused" in message and where in message


def test_keras_files_with_data_elsewhere_are_refused(vgg, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"12345678")
    with h5py.File(vgg, "a") as file:
        file.create_dataset("conv1/stolen:0", (2,), "f4", external=[(str(secret), 0, 8)])
    assert "/conv1/stolen:0 takes its data from elsewhere" in refused(vgg, "keras")
    with h5py.File(vgg, "a") as file:
        del file["conv1/stolen:0"]
        layout = h5py.VirtualLayout((2,), "f4")
        layout[:] = h5py.VirtualSource(str(secret), "x", (2,))
        file["conv1"].create_virtual_dataset("stolen:0", layout)
    assert "/conv1/stolen:0 takes its data from elsewhere" in refused(vgg, "keras")


def test_a_keras_dataset_made_to_exhaust_memory(vgg):
    with h5py.File(vgg, "a") as file:
        del file["conv1/conv1/kernel:0"]
        file.create_dataset("conv1/conv1/kernel:0", (1 << 40,), "f4", chunks=(1 << 16,))
    assert "holds no data" in refused(vgg, "keras")


def test_keras_3_and_other_hdf5_files(tmp_path):
    with h5py.File(tmp_path / "a.weights.h5", "w") as file:
        file["layers/conv2d/vars/0"] = np.ones(2)
    assert "legacy layout" in refused(tmp_path / "a.weights.h5", "keras")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["data"] = np.ones(2)
    assert "no attribute layer_names" in refused(tmp_path / "b.h5", "keras")
    assert "no weights" in refused(write_keras(tmp_path / "c.h5", {"pool": {}}), "keras")


def test_damaged_keras_files(vgg):
    whole = vgg.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 100):
        vgg.write_bytes(whole[:length])
        assert "fetch it again" in refused(vgg, "keras")
    vgg.write_bytes(whole)
    with h5py.File(vgg, "a") as file:
        file["conv1"].attrs["weight_names"] = ["conv1/bias:0"]
    assert "conv1/bias:0" in refused(vgg, "keras")
    with h5py.File(vgg, "a") as file:
        file["conv1/conv1/bias:0"] = "text"
    assert "not numbers" in refused(vgg, "keras")
    with h5py.File(vgg, "a") as file:
        file.attrs["layer_names"] = ["conv2"]
    assert "conv2" in refused(vgg, "keras")
