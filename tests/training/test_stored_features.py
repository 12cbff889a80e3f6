import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiment.fields import phase_config
from input_pipeline import Feed, load_dataset
from models import create_model
from models.classifier import split_model
from models.weights.own import arrays_of, write_own
from train import device_mesh, train_and_evaluate
from training.record import RunRecord
from training.steps import augment_views
from training.stored_features import FeatureFeed, FrozenStages


@pytest.fixture
def head_run(digits_run, few_digits, tmp_path):
    """Returns a function: the config of the head of a cnn, with a cache of its own."""

    def make(seed=0, **changes):
        options = {
            "phases": "head", "phase__head__epochs": 1, "augment__rotation": 10.0,
            "phase__head__augment_views": 2, "runtime__cache_dir": str(tmp_path / "cache"),
        }  # fmt: skip
        return digits_run("cnn", seed, **few_digits | options | changes)

    return make


@pytest.fixture
def computed(monkeypatch):
    """Lists the numbers of images whose features are computed."""
    counts, plain = [], FrozenStages._compute

    def compute(stages, feed, *arguments):
        counts.append(len(feed))
        return plain(stages, feed, *arguments)

    monkeypatch.setattr(FrozenStages, "_compute", compute)
    return counts


def logits(run_dir):
    return np.load(run_dir / "predictions_test.npz")["logits"]


def test_another_seed_runs_no_frozen_stage(head_run, tmp_path, computed, monkeypatch):
    evaluate = RunRecord.evaluate

    def evaluated(record, feed, *arguments):
        assert isinstance(feed, FeatureFeed)
        return evaluate(record, feed, *arguments)

    monkeypatch.setattr(RunRecord, "evaluate", evaluated)
    model = create_model("cnn", 7, image_size=16)
    facts = {"model": "cnn", "fields": {}, "num_classes": 7}
    facts |= {"preprocessing": model.preprocessing.to_dict()}
    write_own(tmp_path / "cnn.safetensors", arrays_of(model), facts)
    weights = {"weights": f"archcompare:{tmp_path}/cnn.safetensors", "preflight": "off"}
    train_and_evaluate(head_run(0, **weights), tmp_path / "first")
    assert computed == [130, 30, 40]
    train_and_evaluate(head_run(1, **weights), tmp_path / "second")
    assert len(computed) == 3
    assert not np.array_equal(logits(tmp_path / "first"), logits(tmp_path / "second"))


@pytest.fixture
def frozen(head_run):
    """Returns a function: frozen stages, and the feed of the training images."""
    config = phase_config(head_run(), "head")
    dataset = load_dataset(config.data, config.runtime.cache_dir)
    model = create_model("cnn", 10, image_size=16)
    _, params, stats = split_model(model)

    def make(path="", value=None, **replaced):
        changed = ConfigDict(config.to_dict())
        if path:
            changed.update_from_flattened_dict({path: value})
        weights = {"params": params | replaced, "stats": stats}
        feed = Feed(dataset, "train", device_mesh(), config.runtime)
        return FrozenStages(changed, model, weights, len(model.stages) - 1), feed

    return make


def test_an_entry_is_known_by_all_that_features_depend_on(frozen):
    stages, feed = frozen()
    names = [stages.entry(feed, 2), stages.entry(feed, 3), stages.entry(feed, 0)]
    for path, value in (("augment.rotation", 5.0), ("compute_dtype", "bfloat16")):
        names.append(frozen(path, value)[0].entry(feed, 2))
    kernels = [path for path in split_model(stages.model)[1] if path.endswith("kernel")]
    array = split_model(stages.model)[1][kernels[0]]
    names.append(frozen(**{kernels[0]: array + 1})[0].entry(feed, 2))
    feed.rows = feed.rows[::-1]
    names.append(stages.entry(feed, 2))
    feed.entry = "other images"
    names.append(stages.entry(feed, 2))
    assert len(set(names)) == len(names)
    stages, feed = frozen("seed", 7)
    assert stages.entry(feed, 2) == names[0]
    head = {kernels[-1]: split_model(stages.model)[1][kernels[-1]] + 1}
    assert frozen(**head)[0].entry(feed, 2) == names[0]
    assert frozen("augment.rotation", 5.0)[0].entry(feed, 0) == names[2]  # of images as they are


def test_a_damaged_entry_is_made_anew(frozen, computed):
    stages, feed = frozen()
    expected = np.asarray(stages.features(feed, 2).images)
    assert expected.shape[0] == 260 and len(computed) == 1
    file = stages.entry(feed, 2) / "features.bin"
    content = file.read_bytes()
    for damaged in (b"\1" + content[1:], content[:-1], b""):
        file.write_bytes(damaged)
        assert np.array_equal(stages.features(feed, 2).images, expected)
        assert file.read_bytes() == content
    assert len(computed) == 4
    assert np.array_equal(stages.features(feed, 2).images, expected) and len(computed) == 4
    assert [path.name for path in stages.folder.iterdir()] == [file.parent.name]


def test_a_disk_that_takes_nothing_is_a_warning(frozen, capsys):
    stages, feed = frozen()
    expected = np.asarray(stages.features(feed).images)
    stages.folder.rename(stages.folder.with_name("elsewhere"))
    stages.folder.write_text("in the way")
    assert np.array_equal(stages.features(feed).images, expected)
    assert "features cannot be kept" in capsys.readouterr().err


def test_half_precision_is_kept_as_it_is(head_run, frozen):
    stages, feed = frozen()
    stages.model = create_model("cnn", 10, image_size=16, dtype="bfloat16")
    first, again = (stages.features(feed).images for _ in range(2))
    assert first.dtype == again.dtype == jax.numpy.bfloat16
    assert np.array_equal(first, again)


def test_views_do_not_depend_on_the_seed(head_run):
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.float32)
    rows, views = np.array([4, 4, 5]), np.array([0, 1, 0])
    one, other, third = augment_views(images[[0, 0, 0]], rows, views, head_run())
    assert not np.allclose(one, other) and not np.allclose(one, third)
    again = augment_views(images[[0, 0, 0]], rows, views, head_run(1))
    assert np.array_equal(again[0], one)
