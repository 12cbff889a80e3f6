import jax
import numpy as np
import pytest

from configs import base
from errors import Interrupted, UserError
from experiment.fields import phase_config
from experiment.files import read_lines
from input_pipeline import load_dataset
from models import create_model
from models.classifier import split_model, stage_of
from models.weights.own import WEIGHTS, read_own
from train import build_model, check_run, train_and_evaluate
from training.steps import selection_score
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
    config.runtime.cache_dir = str(tmp_path / "cache")  # without the features of the whole run
    calls = {"left": 0}

    def should_stop():
        calls["left"] -= 1
        return calls["left"] == 0

    reached = []
    # Twice in the first phase, the second time with its features at hand; while those of the second
    # are computed; in the second phase.
    for steps in (5, 13, 4, 6):
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
    with pytest.raises(UserError, match="pixels do not match the weights run:"):
        train_and_evaluate(config, tmp_path / "c")
    assert not (tmp_path / "c" / "metrics.jsonl").exists()
    config.preflight = "warn"
    wrong = train_and_evaluate(config, tmp_path / "d")
    assert wrong["preflight"]["first_abnormal"] == "stages.0.layers.1"
    assert "pixels do not match" in capsys.readouterr().err


def test_too_many_stages_are_named(tuned_run):
    config = tuned_run("tune", phase__tune__train="last:6")
    assert phase_config(config, "tune").train == "last:6"
    with pytest.raises(UserError, match="last:N with N from 1 to 5"):
        check_run(config)


OTHERWISE = {
    "cache_dir": None,  # a folder of the test's own
    "feed": "streaming",
    "resident_limit_mb": 0,
    "feature_cache_mb": 0.0,
    "checkpoint_every_seconds": 0.0,
    "log_every_steps": 3,
    "tensorboard": True,
}


def test_nothing_under_runtime_changes_a_result(digits_run, few_digits, tmp_path):
    """In two phases with stored views, where a key of the wrong phase would show."""
    options = few_digits | {
        "phases": "all,head", "phase__all__epochs": 1, "phase__head__epochs": 2, "batch_size": 32,
        "phase__head__augment_views": 4, "augment__rotation": 20.0, "augment__shift": 0.2,
    }  # fmt: skip
    config = digits_run("cnn", **options)
    assert set(OTHERWISE) == set(config.runtime)
    expected = train_and_evaluate(config, tmp_path / "as_it_is")
    for field, value in OTHERWISE.items():
        value = str(tmp_path / "cache") if field == "cache_dir" else value
        changed = digits_run("cnn", **options | {f"runtime__{field}": value})
        summary = train_and_evaluate(changed, tmp_path / field)
        np.testing.assert_allclose(
            logits(tmp_path / field), logits(tmp_path / "as_it_is"), atol=2e-3
        )
        assert summary["best_step"] == expected["best_step"]


def test_weights_are_selected_by_one_quantity_in_all_phases(tuned_run, tmp_path):
    """A phase with another loss is judged by the same one: hinge losses are far smaller."""
    config = tuned_run(
        "all,head", phase__all__epochs=3, phase__head__epochs=1,
        phase__head__optimizer={"learning_rate": 0.5}, phase__head__loss={"name": "hinge"},
    )  # fmt: skip
    summary = train_and_evaluate(config, tmp_path)
    lines = [x for x in read_lines(tmp_path / "metrics.jsonl") if x["split"] == "validation"]
    best = min(lines, key=lambda line: line["loss"])
    assert summary["best_step"] == best["step"]
    saved = np.load(tmp_path / "predictions_validation.npz")
    shifted = saved["logits"] - np.logaddexp.reduce(saved["logits"], axis=1)[:, None]
    assert best["loss"] == pytest.approx(
        -shifted[range(len(shifted)), saved["labels"]].mean(), 1e-4
    )


def test_selection_scores_are_scikit_learns():
    labels = np.array([0, 0, 0, 1, 2, 2])
    logits = np.eye(3)[[0, 0, 1, 1, 2, 0]]
    assert selection_score("loss", 0.7, logits, labels) == [-0.7, -0.7]
    assert selection_score("accuracy", 0.7, logits, labels) == [pytest.approx(4 / 6), -0.7]
    balanced = (2 / 3 + 1 + 1 / 2) / 3
    assert selection_score("balanced_accuracy", 0.7, logits, labels)[0] == pytest.approx(balanced)
    f1 = (2 / 3 + 2 / 3 + 2 / 3) / 3
    assert selection_score("macro_f1", 0.7, logits, labels)[0] == pytest.approx(f1)


def test_select_decides_which_weights_are_kept(digits_run, few_digits, tmp_path):
    chosen = {}
    for select in ("loss", "accuracy"):
        options = few_digits | {"epochs": 12, "optimizer__learning_rate": 0.03, "select": select}
        summary = train_and_evaluate(digits_run("mlp", **options), tmp_path / select)
        lines = read_lines(tmp_path / select / "metrics.jsonl")
        lines = [line for line in lines if line["split"] == "validation"]
        best = max(
            lines, key=lambda x: (-x["loss"] if select == "loss" else x["accuracy"], -x["loss"])
        )
        assert summary["best_step"] == best["step"]
        chosen[select] = best
    assert chosen["accuracy"]["accuracy"] >= chosen["loss"]["accuracy"]


def test_the_seconds_of_a_phase_survive_an_interruption(tuned_run, tmp_path, monkeypatch):
    config, calls = tuned_run("all", phase__all__epochs=2), iter(range(100))
    with pytest.raises(Interrupted):
        train_and_evaluate(config, tmp_path, lambda: next(calls) == 9)
    summary = train_and_evaluate(config, tmp_path)
    assert summary["phases"][0]["seconds"] == pytest.approx(summary["cost"]["seconds"], rel=0.2)


def test_costs_are_those_of_the_run_whatever_ran_before(digits_run, few_digits, tmp_path):
    """No phase counts its compiling as training, of steps and of stored features alike."""
    once = {"phases": "head,all", "phase__head__epochs": 1, "phase__all__epochs": 1}
    changes = few_digits | once | {"batch_size": 19}  # no other test's: this one compiles it
    config = digits_run("cnn", **changes)
    first, again = (train_and_evaluate(config, tmp_path / name) for name in ("first", "again"))
    assert [phase["stored_features"] for phase in first["phases"]] == [True, False]
    costs = first["cost"], again["cost"]
    saved = costs[0]["compile_seconds"] - costs[1]["compile_seconds"]
    assert saved > 0.5
    assert costs[0]["seconds"] - costs[1]["seconds"] < saved / 2
    assert costs[0]["seconds"] == pytest.approx(sum(p["seconds"] for p in first["phases"]), abs=0.1)
    small = train_and_evaluate(digits_run("linear", **few_digits | {"epochs": 1}), tmp_path / "c")
    for memory in ("train_step_memory_bytes", "predict_step_memory_bytes"):
        assert costs[0][memory] == costs[1][memory] > 5 * small["cost"][memory] > 0


def test_the_sample_of_the_preflight_spreads_over_all_classes(tmp_path, cache_dir):
    from train import sample

    labels = np.repeat(np.arange(30), [400] + [5] * 29)
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 4, 4, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = labels
    np.savez(tmp_path / "rare.npz", images=images, labels=labels)
    config = base.get_config().data
    config.source, config.path, config.image_size = "npz", str(tmp_path / "rare.npz"), 4
    config.split = (0.4, 0.3, 0.3)
    dataset = load_dataset(config, cache_dir)
    assert set(sample(dataset, 40)[:, 0, 0, 0]) == set(range(30))


def test_crops_come_from_larger_stored_images(digits_run, few_digits, tmp_path):
    """Where a phase crops; evaluation and phases without crops do not depend on it."""
    results = {}
    for store, area in ((0, (0.3, 1.0)), (16, (0.3, 1.0)), (32, (0.3, 1.0))):
        options = few_digits | {"augment__crop_area": area, "data__store_size": store, "epochs": 1}
        options |= {"phases": "all,head", "phase__head__augment": {"crop_area": (1.0, 1.0)}}
        options |= {"phase__head__epochs": 1}
        train_and_evaluate(digits_run("cnn", **options), tmp_path / str(store))
        results[store] = logits(tmp_path / str(store))
    assert np.array_equal(results[0], results[16]) and not np.array_equal(results[0], results[32])
    assert np.isfinite(results[32]).all()
    with pytest.raises(UserError, match="store_size=8 is for random crops"):
        digits_run("cnn", **few_digits | {"data__store_size": 8, "augment__crop_area": (0.3, 1.0)})
    with pytest.raises(UserError, match="crop_area below 1"):
        digits_run("cnn", **few_digits | {"data__store_size": 32})
