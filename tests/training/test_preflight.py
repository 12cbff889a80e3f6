"""Networks trained here on crops of two photographs; then fed right pixels and wrong ones."""

from contextlib import nullcontext
from types import SimpleNamespace

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
from models.classifier import MISTAKES
from train import train_and_evaluate
from training.preflight import ABNORMAL, check_batch_norm, check_phases, divergence, inspect_pixels

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


def judge(trained, mistake=None, classes=4, **options):
    name, weights = trained
    model = create_model(name, classes, weights=weights, image_size=SIZE)
    if mistake:
        model.preprocessing = MISTAKES[mistake](model.preprocessing)
    return inspect_pixels(model, crops(128, seed=1)[0], weights, **options)


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
    assert "preprocessing does not match the weights run:" in message
    if mistake == "swapped":
        assert "red and blue swapped" in message
    else:
        assert found["first_abnormal"] == found["layers"][0]["layer"]
        assert found["layers"][0]["distance"] > 2 * ABNORMAL
        assert f"{found['first_abnormal']} is the first layer out of place" in message
    with pytest.raises(UserError, match="config.preprocessing=weights"):
        judge(trained, mistake, strict=True)


def test_grey_images_tell_nothing_of_channels(trained):
    name, weights = trained
    model = create_model(name, 4, weights=weights, image_size=SIZE)
    grey = np.repeat(crops(64, seed=1)[0].mean(axis=-1, keepdims=True).astype(np.uint8), 3, axis=-1)
    assert inspect_pixels(model, grey, weights)["channel_order"] == {}


def test_divergence_is_that_of_normal_distributions():
    mean, std, their_mean, their_std = 0.3, 1.2, -0.5, 0.8
    x = np.linspace(-12, 12, 20001)
    p, q = stats.norm(mean, std), stats.norm(their_mean, their_std)
    integral = np.trapezoid(p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), x)
    arrays = (np.full(3, v) for v in (mean, std**2, their_mean, their_std**2))
    assert divergence(*arrays, 0.0) == pytest.approx(integral, rel=5e-3)


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
