"""Live comparison with other libraries: pytest -m parity, where those are installed."""

import numpy as np
import pytest

from errors import UserError
from models import create_model
from models.classifier import in_mode
from tests.models.parity import PAIRS, compare
from tests.models.reference import build, relative_error, require
from tests.models.synthetic import random_weights, write_h5, write_weights

pytestmark = pytest.mark.parity
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def need(family: str) -> None:
    try:
        require(family)
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_logits_and_stages(tmp_path, pair):
    need(pair.family)
    logits, stages, _ = compare(pair, tmp_path)
    assert logits < 1e-4 and stages < 1e-4


# --- the whole way from pixels to logits --------------------------------------------------------


@pytest.mark.parametrize("weights", ["imagenet", None])
def test_a_keras_efficientnet_from_pixels(monkeypatch, tmp_path, weights):
    """Keras' network for "imagenet" divides once more than the one for other weights."""
    need("keras")
    import keras
    from keras.src.applications import efficientnet

    shapes = build("keras", "efficientnet_b0", {}, 1000, 64).shapes
    shapes = {name: s for name, s in shapes.items() if not name.startswith("normalization")}
    arrays = random_weights(shapes, "keras")
    variance = np.array(STD, np.float32) ** (1 if weights else 2)
    normalisation = {
        "normalization/mean": np.array(MEAN, np.float32),
        "normalization/variance": variance,
        "normalization/count": np.zeros((), np.int64),
    }
    path = tmp_path / "efficientnetb0.h5"
    # Keras reads layers in the order of the network, of which normalisation is the first.
    write_h5(path, normalisation | arrays)
    monkeypatch.setattr(efficientnet.file_utils, "get_file", lambda *a, **k: str(path))
    theirs = keras.applications.EfficientNetB0(
        weights=weights, input_shape=(224, 224, 3), classifier_activation=None
    )
    if not weights:
        theirs.load_weights(path)
    pixels = np.tile(PIXELS, (1, 4, 4, 1))[:, :224, :224]
    expected = np.asarray(theirs(pixels.astype(np.float32), training=False))
    model = create_model("efficientnet_b0", 1000, weights=f"keras:{path}", image_size=224)
    model = in_mode(model, training=False)
    assert model.preprocessing.std == pytest.approx(STD)
    assert relative_error(np.asarray(model(model.preprocess(pixels))), expected) < 1e-4


@pytest.mark.parametrize(
    ("model", "module", "name"),
    [
        ("vgg16", "vgg16", "VGG16"),
        ("resnet50", "resnet50", "ResNet50"),
        ("mobilenet_v2", "mobilenet_v2", "MobileNetV2"),
    ],
)
def test_other_keras_networks_from_pixels(tmp_path, model, module, name):
    need("keras")
    import keras

    size = 224 if model == "vgg16" else 64
    path = tmp_path / "weights.h5"
    shapes = build("keras", model, {}, 1000, size).shapes
    write_h5(path, random_weights(shapes, "keras"))
    theirs = getattr(keras.applications, name)(
        weights=None, input_shape=(size, size, 3), classifier_activation=None
    )
    theirs.load_weights(path)
    pixels = np.tile(PIXELS, (1, 4, 4, 1))[:, :size, :size]
    preprocess = getattr(keras.applications, module).preprocess_input
    expected = np.asarray(theirs(preprocess(pixels.astype(np.float32)), training=False))
    ours = create_model(model, 1000, weights=f"keras:{path}", image_size=size)
    ours = in_mode(ours, training=False)
    assert relative_error(np.asarray(ours(ours.preprocess(pixels))), expected) < 1e-4


@pytest.mark.parametrize("form", ["torch", "tf"])
def test_a_local_file_of_timm_from_pixels(tmp_path, form):
    """Of EfficientNet-Lite, timm's two forms expect other pixels, and none is listed."""
    need("timm")
    import timm

    reference, path = build("timm", "efficientnet_lite0", {"form": form}, 1000, 64), tmp_path / "x"
    write_weights(path, random_weights(reference.shapes, "timm"), "timm")
    reference.load(path)
    stated = timm.get_pretrained_cfg(f"{'tf_' if form == 'tf' else ''}efficientnet_lite0")
    pixels = (PIXELS / 255 - stated.mean) / stated.std
    expected = reference.run(pixels.astype(np.float32))[1]
    ours = create_model(
        "efficientnet_lite0", 1000, weights=f"timm:{path}", image_size=64, form=form
    )
    assert relative_error(np.asarray(ours(ours.preprocess(PIXELS))), expected) < 1e-4
