"""What is found out about weights before they are used: their form, their classes, their size."""

from dataclasses import replace

import numpy as np
import pytest

from errors import UserError
from models import create_model
from models.classifier import split_model
from models.weights import loading
from models.weights.download import digest
from models.weights.own import arrays_of, write_own
from models.weights.published import PUBLISHED

HEAD = ["stages.2.layers.4.bias", "stages.2.layers.4.kernel"]


# --- the form of a local file -------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tf_efficientnet_b0.safetensors"
    path.write_bytes(b"of either form")
    return path


@pytest.mark.parametrize("model", ["efficientnet_b0", "efficientnet_b1"])
def test_a_form_that_a_file_does_not_tell_is_asked_for(file, model):
    with pytest.raises(UserError, match=rf"config.per_model.{model}.model.form=torch\|tf"):
        loading.find(f"timm:{file}", model, {})
    for form in ("torch", "tf"):
        assert loading.find(f"timm:{file}", model, {"form": form}).fields == {"form": form}
    with pytest.raises(UserError, match="choose one of torch, tf"):
        loading.find(f"timm:{file}", model, {"form": "keras"})
    with pytest.raises(UserError, match="there is no file"):
        loading.find("timm:/nowhere/x", model, {})


def test_the_form_of_a_published_file_is_known_by_its_digest(file, monkeypatch):
    name = "timm/tf_efficientnet_b0.in1k"
    monkeypatch.setitem(PUBLISHED, name, replace(PUBLISHED[name], sha256=digest(file, "sha256")))
    assert loading.find(f"timm:{file}", "efficientnet_b0", {}).fields == {"form": "tf"}


@pytest.mark.parametrize(
    ("family", "model", "form"),
    [
        ("keras", "efficientnet_b1", "tf"),
        ("keras", "mobilenet_v2", "tf"),
        ("keras", "resnet50", "keras"),
        ("timm", "mobilenet_v2", "torch"),
        ("timm", "resnet101", "torch"),
        ("torchvision", "efficientnet_b3", "torch"),
        ("lukemelas", "efficientnet_b0", "tf"),
        ("timm", "vgg16", None),
        ("torchvision", "vit_b16", None),
    ],
)
def test_where_a_publisher_has_one_form_it_is_that(family, model, form):
    assert loading.find(f"{family}:x", model, {}).fields == ({"form": form} if form else {})


# --- classes ------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path):
    """Returns a function: the name of weights of a small network for classes, and its arrays."""

    def make(class_names, width=3):
        model = create_model("cnn", width, image_size=8, seed=1)
        path = tmp_path / "own.safetensors"
        facts = {"model": "cnn", "fields": {}, "preprocessing": model.preprocessing.to_dict()}
        facts |= {"num_classes": width, "image_size": 8}
        facts |= {"class_names": class_names} if class_names else {}
        write_own(path, arrays_of(model), facts)
        return f"archcompare:{path}", split_model(model)[1]

    return make


def build(name, classes):
    options = {"weights": name, "image_size": 8, "class_names": classes}
    return split_model(create_model("cnn", len(classes), **options))[1]


def test_a_classifier_of_the_same_classes_is_kept_in_their_order(weights, capsys):
    name, arrays = weights(["10", "2", "cafe\u0301"])
    loaded = build(name, ["2", "10", "caf\xe9"])
    for path, array in arrays.items():
        expected = array[..., [1, 0, 2]] if path in HEAD else array
        np.testing.assert_array_equal(loaded[path], expected)
    assert "the classifier is kept, for its classes are the same" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("theirs", "ours", "why"),
    [
        (["cat", "dog", "hen"], ["cat", "cow", "hen"], "for the old one tells apart cat, dog, hen"),
        (None, ["cat", "dog", "hen"], "for the file does not name its classes"),
        (["cat", "dog", "hen"], ["cat", "dog"], "(stages.2.layers.4.bias, "),
    ],
)
def test_a_classifier_of_other_classes_is_replaced(weights, capsys, theirs, ours, why):
    name, arrays = weights(theirs)
    loaded = build(name, ours)
    changed = [path for path in arrays if not np.array_equal(arrays[path], loaded[path])]
    assert set(changed) >= {HEAD[1]} and set(changed) <= set(HEAD)
    told = capsys.readouterr().out
    assert "the classifier is new" in told and why in told


def test_a_hidden_layer_as_wide_as_the_classes_is_kept(weights):
    name, arrays = weights(None, width=128)
    loaded = build(name, [f"class {i}" for i in range(128)])
    changed = [path for path in arrays if not np.array_equal(arrays[path], loaded[path])]
    assert changed == [HEAD[1]]


def test_the_folders_of_imagenet_are_in_the_order_of_its_weights(weights, capsys):
    name, arrays = weights(None, width=1000)
    loaded = build(name, [f"n{number:08}" for number in range(1000)])
    assert all(np.array_equal(arrays[path], loaded[path]) for path in arrays)
    assert "is kept" in capsys.readouterr().out


# --- size ---------------------------------------------------------------------------------------


def test_images_of_a_far_size_are_told_once(weights, capsys):
    name, _ = weights(["a", "b", "c"])
    source = loading.find(name, "cnn", {})
    for size in (8, 6, 12, 64, 64):
        loading.compare_size(source, size)
    assert capsys.readouterr().out.count("trained on images of 8 pixels, which here have 64") == 1
    loading.compare_size(loading.find("timm/resnet50.tv_in1k", "resnet50", {}), 64)
    assert "trained on images of 224 pixels, which here have 64" in capsys.readouterr().out
