import io
import sys
import tracemalloc

import numpy as np
import pytest
import tensorflow_datasets as tfds

from configs import base
from data.decoding import decode_all
from data.sources import list_source
from errors import UserError
from tests.conftest import paint


def test_flat_folder(make_folder, folder_config):
    root = make_folder({"cat": 2, "dög & co": 3})
    (root / "cat" / "notes.txt").write_text("no image")
    (root / "cat" / ".hidden.png").write_bytes(b"")
    listing = list_source(folder_config(root))
    assert listing.class_names == ["cat", "dög & co"]
    assert listing.ids == ["cat/0.png", "cat/1.png"] + [f"dög & co/{i}.png" for i in range(3)]
    assert listing.labels.tolist() == [0, 0, 1, 1, 1]
    assert set(listing.parts) == {""}
    assert listing.strays == ["cat/notes.txt"]
    assert listing.read(0) == (root / "cat/0.png").read_bytes()


@pytest.mark.parametrize(
    ("train", "test"),
    [("train", "test"), ("Training", "TEST"), ("seg_train/seg_train", "seg_test/seg_test")],
)
def test_folders_of_parts(make_folder, folder_config, train, test):
    root = make_folder({f"{train}/a": 2, f"{train}/b": 2, f"{test}/a": 1, f"{test}/b": 1})
    (root / "seg_pred").mkdir()
    listing = list_source(folder_config(root))
    assert listing.class_names == ["a", "b"]
    assert sorted(listing.parts) == ["test"] * 2 + ["train"] * 4


def test_a_class_named_train_is_a_class(make_folder, folder_config):
    listing = list_source(folder_config(make_folder({"bus": 1, "train": 1})))
    assert listing.class_names == ["bus", "train"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": 2, "b": 0}, "b holds no images"),
        ({"a": 2}, "at least two"),
        ({}, "does not exist"),
        ({"train/a": 1, "train/b": 1, "test/a": 0, "test/b": 0}, "test holds no images"),
        ({"train/a": 1, "train/b": 1, "test/a": 1, "test/c": 1}, "class 'c' is not in"),
        ({"train/a": 1, "train/b": 0, "test/a": 1, "test/b": 1}, "b holds no images"),
        ({"val/a": 1, "test/a": 1}, "no train folder"),
        ({"val/a": 1, "valid/a": 1, "train/a": 1}, "both hold the validation"),
    ],
)
def test_unusable_folders_are_named(make_folder, folder_config, tmp_path, content, message):
    root = make_folder(content) if content else tmp_path / "absent"
    with pytest.raises(UserError, match=message):
        list_source(folder_config(root))


def test_groups_by_expression_and_by_table(make_folder, folder_config, tmp_path):
    root = make_folder({"a": 2, "b": 2})
    assert list_source(folder_config(root, groups=r"/(\d+)")).groups == ["0", "1", "0", "1"]
    table = tmp_path / "groups.csv"
    table.write_text("id,group\na/0.png,x\na/1.png,x\nb/0.png,y\nb/1.png,z\n")
    assert list_source(folder_config(root, groups=str(table))).groups == ["x", "x", "y", "z"]
    for separator in ",;\t":  # as spreadsheets write it
        text = "id,group,note\r\na/0.png,007,\r\na/1.png,NA,x\r\nb/0.png,y y,\r\nb/1.png,y y,\r\n"
        table.write_bytes(b"\xef\xbb\xbf" + text.replace(",", separator).encode())
        found = list_source(folder_config(root, groups=str(table))).groups
        assert found == ["007", "NA", "y y", "y y"]
    table.write_text("id,group\na/0.png,x\na/1.png,\nb/0.png,x\nb/1.png,x\n")
    with pytest.raises(UserError, match="names no group for 1 images, such as a/1.png"):
        list_source(folder_config(root, groups=str(table)))
    table.write_text("id,group\na/0.png,x\na/0.png,y\n")
    with pytest.raises(UserError, match="a/0.png is in two groups, x and y"):
        list_source(folder_config(root, groups=str(table)))
    table.write_bytes("id,group\nä,x\n".encode("latin-1"))
    with pytest.raises(UserError, match="a table in UTF-8"):
        list_source(folder_config(root, groups=str(table)))
    table.write_text("id,group\na/0.png,x\n")
    for rule, message in (
        (str(table), "names no group for 3"),
        (r"\d", "in parentheses"),
        ("(zzz)", "names no group"),
        ("(", "no regular expression"),
        (str(tmp_path / "absent.csv"), "id,group"),
    ):
        with pytest.raises(UserError, match=message):
            list_source(folder_config(root, groups=rule))


def npz(tmp_path, **arrays):
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    config = base.get_config().data
    config.source, config.path = "npz", str(path)
    return config


def test_npz(tmp_path):
    images = np.arange(4 * 3 * 3, dtype=np.uint8).reshape(4, 3, 3)
    labels = np.array([0, 1, 0, 1])
    listing = list_source(npz(tmp_path, images=images, labels=labels, groups=labels))
    assert (listing.class_names, listing.groups) == (["0", "1"], ["0", "1", "0", "1"])
    assert np.array_equal(listing.read(2), images[2])
    keras = {"x_train": images, "y_train": labels[:, None], "x_test": images, "y_test": labels}
    listing = list_source(npz(tmp_path, **keras))
    assert listing.parts == ["train"] * 4 + ["test"] * 4
    for wrong, message in (
        ({"images": images.astype(float), "labels": labels}, "must be uint8"),
        ({"images": images, "labels": labels[:2]}, "one number an image"),
        ({"images": images, "labels": labels - 1}, "whole numbers from 0"),
        ({"pictures": images}, "expected images and labels"),
        ({"images": images, "labels": labels, "class_names": ["a"]}, "no class name"),
    ):
        with pytest.raises(UserError, match=message):
            list_source(npz(tmp_path, **wrong))


def test_npz_images_are_mapped(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 300, 300, 3), dtype=np.uint8)
    arrays = {"images": images, "labels": np.arange(40) % 2}
    config = npz(tmp_path, **arrays)
    tracemalloc.start()
    listing = list_source(config)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < images.nbytes / 2
    np.savez_compressed(tmp_path / "small.npz", **arrays)
    config.path = str(tmp_path / "small.npz")
    assert [listing.digest(i) for i in (0, 39)] == [list_source(config).digest(i) for i in (0, 39)]


def test_npz_images_do_not_stay_in_memory(tmp_path, cache_dir):
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
    config = npz(tmp_path, images=images, labels=np.arange(6) % 2)
    listing, config.image_size = list_source(config), 8
    source = listing.read.__self__
    for size in (8, 4):
        config.image_size = size
        decoded = decode_all(listing, config, cache_dir)
        assert source.images is None
    assert np.array_equal(listing.read(3), images[3])
    assert decoded.images.shape == (6, 4, 4, 3)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"words", b"\x93NUMPY\x01\x00v\x00{}"])
def test_damaged_npz_files_are_named(tmp_path, content):
    config = npz(tmp_path, images=np.zeros((2, 3, 3), np.uint8), labels=np.arange(2))
    path = tmp_path / "data.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot read .*data.npz"):
        list_source(config)


def test_a_cut_npz_and_odd_arrays_are_named(tmp_path):
    config = npz(tmp_path, images=np.zeros((99, 9, 9), np.uint8), labels=np.arange(99))
    path = tmp_path / "data.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + b"\1" + whole[len(whole) // 2 + 1 :])
    with pytest.raises(UserError, match="cannot read"):  # by its checksum
        list_source(config)
    np.save(tmp_path / "array.npy", np.zeros(3))
    config.path = str(tmp_path / "array.npy")
    with pytest.raises(UserError, match="cannot read"):
        list_source(config)
    for wrong in (
        {"images": np.uint8(3), "labels": np.uint8(3)},
        {"x_train": np.zeros((2, 3, 3), np.uint8)},
        {
            "x_train": np.zeros((2, 3, 3), np.uint8),
            "y_train": np.arange(3),
            "x_test": np.zeros((2, 3, 3), np.uint8),
            "y_test": np.arange(1),
        },
        {
            "x_train": np.zeros((2, 3, 3)),
            "y_train": np.arange(2),
            "x_test": np.zeros((2, 4, 4)),
            "y_test": np.arange(2),
        },
    ):
        with pytest.raises(UserError):
            list_source(npz(tmp_path, **wrong))


class TinyPhotos(tfds.core.GeneratorBasedBuilder):
    """Six random photos of two classes, made here."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=["no", "yes"]),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self, features=features, supervised_keys=("image", "label")
        )

    def _split_generators(self, manager):
        return {"train": self._generate_examples(4), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for i in range(count):
            file = io.BytesIO()
            paint(i).save(file, "PNG")
            file.seek(0)
            yield i, {"image": file, "label": i % 2}


def test_tfds_without_tensorflow(tmp_path):
    builder = TinyPhotos(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    config = base.get_config().data
    config.source, config.path, config.tfds_dir = "tfds", "tiny_photos", str(tmp_path)
    listing = list_source(config)
    assert listing.class_names == ["no", "yes"]
    assert listing.parts == ["train"] * 4 + ["test"] * 2
    assert sorted(listing.labels[:4]) == [0, 0, 1, 1]
    images = {}  # tfds shuffles when it prepares
    for i in range(4):
        file = io.BytesIO()
        paint(i).save(file, "PNG")
        images[file.getvalue()] = i % 2
    assert [images[listing.read(i)] for i in range(4)] == listing.labels[:4].tolist()
    assert "tensorflow" not in sys.modules
    config.path = "no_such_set"
    with pytest.raises(UserError, match="download_and_prepare"):
        list_source(config)
