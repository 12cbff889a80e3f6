import jax
import numpy as np
import pytest

from errors import Interrupted, UserError
from experiment.fields import phase_config
from experiment.files import read_lines
from models import create_model
from models.classifier import split_model, stage_of
from models.weights.own import WEIGHTS, read_own
from train import build_model, check_run, train_and_evaluate
from training.stored_features import FeatureFeed

STAGES = 5  # of cnn_deep


@pytest.fixture
def tuned_run(digits_run, few_digits):
    """Returns a function: the config of cnn_deep in phases, from scratch unless told otherwise."""

    def make(phases="head,tune", **changes):
        options = {
            "phases": phases, "phase__head__epochs": 2, "phase__tune__epochs": 2, "batch_size": 16,
            "phase__tune__train": "last:2", "runtime__log_every_steps": 7,
        }  # fmt: skip
        return digits_run("cnn_deep", **few_digits | options | changes)

    return make


def best(run_dir):
    return read_own(run_dir / WEIGHTS)["arrays"]


def initial(config):
    _, params, stats = split_model(build_model(config, 10))
    return {name: np.asarray(array) for name, array in (params | stats).items()}


def logits(run_dir):
    return np.load(run_dir / "predictions_test.npz")["logits"]


@pytest.mark.parametrize("cache", [2048, 0])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_frozen_stage_is_bit_identical_statistics_included(tuned_run, tmp_path, cache, ema):
    config = tuned_run(
        "tune", runtime__feature_cache_mb=cache, ema_decay=ema, augment_views=2,
        optimizer__weight_decay=0.1, optimizer__l1=1e-5, batch_norm="batch",
    )  # fmt: skip
    summary = train_and_evaluate(config, tmp_path)
    assert summary["phases"][0]["stored_features"] == (cache > 0)
    before, after = initial(config), best(tmp_path)
    assert before.keys() == after.keys()
    for path, array in after.items():
        assert np.array_equal(array, before[path]) == (stage_of(path) < STAGES - 2), path


def test_batch_norm_modes(tuned_run, tmp_path):
    moved = {}
    for name, options in {
        "running": {"batch_norm": "running"},
        "batch": {"batch_norm": "batch"},
        "mistake": {"batch_norm": "running", "frozen_batch_norm": "batch"},
    }.items():
        config = tuned_run("tune", phase__tune__epochs=1, **options)
        summary = train_and_evaluate(config, tmp_path / name)
        assert not summary["phases"][0]["stored_features"] or name != "mistake"
        before, after = initial(config), best(tmp_path / name)
        stats = [path for path in before if path.endswith((".mean", ".var"))]
        moved[name] = {stage_of(p) for p in stats if not np.array_equal(before[p], after[p])}
    assert moved == {"running": set(), "batch": {3}, "mistake": {0, 1, 2}}


@pytest.mark.parametrize(
    "changes",
    [
        {"phases": "head"},
        {"phases": "head", "augment__rotation": 20.0, "augment__zoom": 0.2, "augment_views": 3},
        {"phases": "tune", "augment__flip_horizontal": True, "augment_views": 2},
    ],
)
def test_stored_features_give_the_result_of_images(tuned_run, tmp_path, changes):
    results = []
    for limit in (2048, 0):
        config = tuned_run(runtime__feature_cache_mb=limit, **changes)
        summary = train_and_evaluate(config, tmp_path / str(limit))
        assert summary["phases"][0]["stored_features"] == (limit > 0)
        results.append(logits(tmp_path / str(limit)))
    np.testing.assert_allclose(*results, atol=2e-3)
    assert results[0].std() > 0.05


def test_fresh_augmentation_and_a_small_limit_store_nothing(tuned_run, tmp_path):
    options = {"augment__rotation": 20.0, "phase__head__epochs": 1}
    for changes in ({"augment_views": 0}, {"augment_views": 2, "runtime__feature_cache_mb": 0.1}):
        summary = train_and_evaluate(
            tuned_run("head", **options, **changes), tmp_path / str(changes)
        )
        assert not summary["phases"][0]["stored_features"]


def test_views_follow_the_epochs(cache_dir):
    feed = object.__new__(FeatureFeed)
    feed.views, feed.rows = 3, np.arange(10)
    rows, epochs = np.array([4, 5, 6, 7]), np.array([0, 1, 2, 3])
    assert feed.places(rows, epochs).tolist() == [4, 15, 26, 7]


@pytest.mark.parametrize(
    ("name", "fields", "size"),
    [("resnet18", {}, 64), ("vgg16", {"hidden": 8}, 320), ("vit_s16", {}, 32)],
)
def test_a_head_needs_only_what_it_condenses_to(name, fields, size):
    """The head's input is drawn at random: the body before it is not needed."""
    model = create_model(name, 3, image_size=size, **fields)
    head = model.stages[-1]
    shape = {"resnet18": (2, 2, 2, 512), "vgg16": (2, 10, 10, 512), "vit_s16": (2, 5, 384)}[name]
    x = jax.random.normal(jax.random.key(0), shape)
    small = head.condense(x)
    assert small.size < x.size
    np.testing.assert_allclose(head(small), head(x), rtol=1e-5, atol=1e-5)


def test_phases_interrupted_anywhere_end_with_the_same_bits(tuned_run, tmp_path):
    config = tuned_run(
        augment__rotation=10.0, augment_views=2, ema_decay=0.9,
        phase__head__augment_views=2,
    )  # fmt: skip
    whole = train_and_evaluate(config, tmp_path / "whole")
    per_epoch = 9
    assert [phase["steps"] for phase in whole["phases"]] == [2 * per_epoch] * 2
    calls = {"left": 0}

    def should_stop():
        calls["left"] -= 1
        return calls["left"] == 0

    reached = []
    # In the first phase, twice; while the second one's features are stored; in the second phase.
    for steps in (5, 16, 7, 6):
        calls["left"] = steps
        with pytest.raises(Interrupted):
            train_and_evaluate(config, tmp_path / "parts", should_stop)
        (newest,) = (tmp_path / "parts/checkpoints/latest").glob("[0-9]*")
        reached.append(int(newest.name))
    parts = train_and_evaluate(config, tmp_path / "parts")
    assert reached == [2, 15, 18, 21]
    assert np.array_equal(logits(tmp_path / "whole"), logits(tmp_path / "parts"))
    assert whole["metrics"] == parts["metrics"]
    assert [p["best_validation_loss"] for p in whole["phases"]] == [
        p["best_validation_loss"] for p in parts["phases"]
    ]


def test_the_best_weights_of_all_phases_are_kept(tuned_run, tmp_path):
    """A second phase that only does harm leaves the first one's weights."""
    config = tuned_run(phase__tune__optimizer={"learning_rate": 10.0})
    summary = train_and_evaluate(config, tmp_path)
    lines = [
        line for line in read_lines(tmp_path / "metrics.jsonl") if line["split"] == "validation"
    ]
    assert {line["phase"] for line in lines} == {"head", "tune"}
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    lowest = min(lines, key=lambda line: line["loss"])
    assert lowest["phase"] == "head" and summary["best_step"] == lowest["step"]
    newest = max(int(p.name) for p in (tmp_path / "checkpoints/best").glob("[0-9]*"))
    assert newest == lowest["step"]
    assert summary["metrics"]["validation"]["loss"] == pytest.approx(lowest["loss"], rel=1e-5)


def test_weights_of_a_run_start_another(digits_run, few_digits, tuned_run, tmp_path, capsys):
    """And pixels that do not match them are found before training, and named in the report."""
    source = train_and_evaluate(
        digits_run("cnn_deep", **few_digits | {"epochs": 8}), tmp_path / "a"
    )
    config = tuned_run("head", weights=f"run:{tmp_path / 'a'}", preflight="warn")
    summary = train_and_evaluate(config, tmp_path / "b")
    assert "warning" not in capsys.readouterr().err
    assert summary["preflight"]["warnings"] == []
    assert (tmp_path / "b" / "preflight.json").exists()
    first = next(
        line for line in read_lines(tmp_path / "b" / "metrics.jsonl") if line["split"] == "train"
    )
    assert first["accuracy"] > 0.5  # the same digits, the same ten classes
    assert summary["metrics"]["test"]["accuracy"] >= source["metrics"]["test"]["accuracy"] - 0.1
    config.preprocessing, config.preflight = "raw", "error"
    with pytest.raises(UserError, match="preprocessing does not match the weights run:"):
        train_and_evaluate(config, tmp_path / "c")
    assert not (tmp_path / "c" / "metrics.jsonl").exists()
    config.preflight = "warn"
    wrong = train_and_evaluate(config, tmp_path / "d")
    assert wrong["preflight"]["first_abnormal"] == "stages.0.layers.1"
    assert "preprocessing does not match" in capsys.readouterr().err


def test_too_many_stages_are_named(tuned_run):
    config = tuned_run("tune", phase__tune__train="last:6")
    assert phase_config(config, "tune").train == "last:6"
    with pytest.raises(UserError, match="last:N with N from 1 to 5"):
        check_run(config)
