"""Published names and layouts: golden outputs of the reference libraries, which need not be here.

`python -m tests.models.parity --golden` writes golden/*.npz; its weights come from names and shapes.
"""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from models import MODELS
from models.classifier import Preprocessing, split_model
from models.weights import loading
from models.weights.names import resize_positions, source_names, to_our_layout
from tests.models.filled import unfilled
from tests.models.parity import GOLDEN, PAIRS, SAMPLES
from tests.models.reference import images_for, our_stages, relative_error
from tests.models.synthetic import FILE_NAMES, random_weights, write_weights

cached = functools.cache(unfilled)  # whose networks are not changed here
FILES = sorted(path.stem for path in GOLDEN.glob("*.npz"))
BY_NAME = {pair.name: pair for pair in PAIRS}


def test_the_golden_files_cover_every_architecture_publisher_and_form():
    """Except what torchvision publishes in large networks only, and VGG, of which there is no small."""
    kinds = {(MODELS[p.model].__module__, p.family, p.form) for p in PAIRS}
    covered = {(MODELS[p.model].__module__, p.family, p.form) for p in map(BY_NAME.get, FILES)}
    large = {kind for kind in kinds if kind[0] == "models.vgg"}
    assert kinds - covered == large | {("models.vit", "torchvision", "")}
    assert {name for name, model in MODELS.items() if model.names} == {p.model for p in PAIRS}


@pytest.mark.parametrize("name", FILES)
def test_golden_outputs(tmp_path, name):
    """The publisher's file is written, read and run; logits and every stage are the publisher's."""
    pair = BY_NAME[name]
    with np.load(pair.golden) as file:
        golden = dict(file)
    shapes = json.loads(golden["shapes"].tobytes())
    # The file is of the smaller size's network; the larger resizes positions, where there are any.
    for size in pair.sizes[-1:]:
        path = tmp_path / FILE_NAMES[pair.family]
        write_weights(path, random_weights(shapes, pair.family), pair.family)
        source = loading.find(f"{pair.family}:{path}", pair.model, pair.fields)
        fields = pair.fields | source.fields
        model = loading.load(cached(pair.model, 1000, size, **fields), source)
        stages, logits = our_stages(model, images_for(size))
        assert relative_error(logits, golden[f"logits{size}"]) < 1e-4
        for i, stage in enumerate(stages):
            flat = stage.reshape(-1)
            assert np.abs(flat).max() == pytest.approx(golden[f"largest{size}.{i}"], rel=1e-4)
            kept = flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES]
            error = np.abs(kept - golden[f"stage{size}.{i}"]).max() / np.abs(flat).max()
            assert error < 1e-4, f"stage {i}"
        assert f"stage{size}.{len(stages)}" not in golden


ONE_FORM = {(pair.family, pair.model): pair for pair in PAIRS}.values()


@pytest.mark.parametrize("pair", ONE_FORM, ids=lambda pair: pair.name)
def test_every_path_has_one_name(pair):
    model = cached(pair.model, 1000, pair.sizes[-1], **pair.fields)
    paths = [path for part in split_model(model)[1:] for path in part]
    names = source_names(model, pair.family, paths)
    assert set(names) == set(paths) and len(set(names.values())) == len(paths)


def test_layouts():
    rng = np.random.default_rng(0)
    conv = rng.normal(size=(8, 3, 5, 7))  # [O, I, H, W]
    ours = to_our_layout(conv, "timm", "a.kernel", (5, 7, 3, 8))
    assert ours.shape == (5, 7, 3, 8) and ours[4, 6, 2, 1] == conv[1, 2, 4, 6]
    depthwise = rng.normal(size=(3, 3, 8, 1))  # Keras: [H, W, C, 1]
    ours = to_our_layout(depthwise, "keras", "a.kernel", (3, 3, 1, 8))
    assert ours.shape == (3, 3, 1, 8) and ours[1, 2, 0, 5] == depthwise[1, 2, 5, 0]
    linear = rng.normal(size=(8, 3))
    assert np.array_equal(to_our_layout(linear, "timm", "a.kernel", (3, 8)), linear.T)
    assert np.array_equal(to_our_layout(linear, "keras", "a.kernel", (8, 3)), linear)
    assert to_our_layout(linear[0], "timm", "a.scale", (3,)) is not None
    fc1 = rng.normal(size=(4, 512 * 49))  # of a map with channels first; ours has them last
    ours = to_our_layout(fc1, "torchvision", "a.kernel", (49 * 512, 4), (7, 7, 512))
    expected = fc1.reshape(4, 512, 49)[3, 77, 15]
    assert ours.shape == (49 * 512, 4) and ours[15 * 512 + 77, 3] == expected


@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("path", ["a.kernel", "a.positions"])
@pytest.mark.parametrize("flattened", [(), (7, 7, 512)])
@pytest.mark.parametrize("publisher", list(FILE_NAMES))
def test_arrays_of_any_rank_come_back_for_the_report(publisher, path, shape, flattened):
    array = to_our_layout(np.zeros(shape), publisher, path, (3, 3, 1, 8), flattened)
    assert array.size == np.zeros(shape).size


# What torch.nn.functional.interpolate(mode="bicubic", antialias=True) makes of this grid.
GRID = [[0, 3, -2, 5], [1, 8, -4, 2], [7, -1, 0, 6], [-3, 4, 9, -5]]
TORCH = {
    2: [[2.31439, 0.99197], [2.34332, 2.13647]],
    3: [[1.52925, 0.94663, 1.93329], [4.50474, 0.29041, 2.29668], [0.14434, 5.03153, 0.4578]],
    6: [
        [-0.24584, 1.48916, 2.20124, -1.69923, 1.60526, 5.66222],
        [-0.26161, 3.36332, 5.04997, -2.3972, -0.2526, 3.78251],
        [1.55029, 5.0079, 6.07023, -2.72449, -1.11043, 2.84135],
        [7.32965, 3.61792, -0.74249, -1.41460, 2.70602, 6.59049],
        [2.12074, 1.38754, 1.58361, 4.78731, 2.79931, 0.10991],
        [-4.18334, -0.20898, 5.60195, 9.93735, 1.79334, -6.7313],
    ],
}


@pytest.mark.parametrize("side", list(TORCH))
def test_positions_are_resized_as_pytorch_does(side):
    grid = np.array(GRID, np.float32).reshape(1, 16, 1)
    positions = np.concatenate([np.full((1, 1, 1), 9, np.float32), grid], axis=1)
    positions = np.concatenate([positions, -positions], axis=-1)
    resized = resize_positions(positions, 1 + side * side)
    assert resized.shape == (1, 1 + side * side, 2) and resized[0, 0].tolist() == [9, -9]
    np.testing.assert_allclose(resized[0, 1:, 0].reshape(side, side), TORCH[side], atol=2e-5)
    np.testing.assert_array_equal(resized[..., 1], -resized[..., 0])


def test_positions_that_fit_or_are_no_grid_stay():
    positions = np.random.default_rng(0).normal(size=(1, 17, 4)).astype(np.float32)
    assert resize_positions(positions, 17) is positions
    no_grid = positions[:, :12]
    assert resize_positions(no_grid, 17) is no_grid


# --- pixels -------------------------------------------------------------------------------------


def keras_efficientnet(mean, variance) -> Preprocessing:
    source = loading.find("keras:x.h5", "efficientnet_b0", {})
    arrays = {"normalization/mean": np.array(mean), "normalization/variance": np.array(variance)}
    return loading.pixels_of(source, {name: a.astype(np.float32) for name, a in arrays.items()})


@pytest.mark.parametrize(
    ("variance", "std"),
    [
        ((0.229, 0.224, 0.225), (0.229, 0.224, 0.225)),  # published: a standard deviation
        ((0.25, 0.04, 1.0), (0.5, 0.2, 1.0)),  # of weights=None: a variance
        ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
    ],
)
def test_pixels_of_a_keras_efficientnet(variance, std):
    mean = (0.485, 0.456, 0.406)
    pixels = keras_efficientnet(mean, variance)
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 3, 3), dtype=np.uint8)
    expected = (images / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(pixels(jnp.asarray(images)), expected, rtol=1e-4, atol=1e-5)
    assert (pixels.size, pixels.channels) == (224, "rgb")


def test_pixels_of_other_weights_are_the_publishers():
    source = loading.find("keras:x.h5", "resnet50", {})
    assert loading.pixels_of(source, {}) is source.preprocessing
    blue = source.preprocessing(jnp.asarray([[[[10, 20, 30]]]], jnp.uint8))[0, 0, 0]
    np.testing.assert_allclose(blue, [30 - 103.939, 20 - 116.779, 10 - 123.68], rtol=1e-5)
    source = loading.find("keras:x.h5", "mobilenet_v2", {})
    ends = source.preprocessing(jnp.asarray([[[[0, 255, 127]]]], jnp.uint8))[0, 0, 0]
    np.testing.assert_allclose(ends, [-1, 1, 127 / 127.5 - 1], atol=1e-6)
    source = loading.find("timm:x.safetensors", "vit_s16", {})
    ends = source.preprocessing(jnp.asarray([[[[0, 255, 51]]]], jnp.uint8))[0, 0, 0]
    np.testing.assert_allclose(ends, [-1, 1, -0.6], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "model", "form", "mean", "std"),  # of pixels in 0..255
    [
        ("lukemelas:x.pth", "efficientnet_lite2", "tf", 127, 128),
        ("lukemelas:x.pth", "efficientnet_lite4", "tf", 127, 128),  # not listed
        ("timm:x.safetensors", "efficientnet_lite0", "tf", 127.5, 127.5),
        ("timm:x.safetensors", "efficientnet_lite0", "torch", 123.675, 58.395),
        ("lukemelas:efficientnet-b0-355c32eb.pth", "efficientnet_b0", "tf", 123.675, 58.395),
        ("lukemelas:y/adv-efficientnet-b0-b64d5a18.pth", "efficientnet_b0", "tf", 127.5, 127.5),
    ],
)
def test_pixels_of_files_of_one_network(name, model, form, mean, std):
    """Of one network, publishers expect other pixels than others, and than in another training."""
    source = loading.find(name, model, {"form": form})
    red = source.preprocessing(jnp.asarray([[[[0, 0, 0], [255, 0, 0]]]], jnp.uint8))[0, 0, :, 0]
    np.testing.assert_allclose(red, [-mean / std, (255 - mean) / std], rtol=1e-5)
