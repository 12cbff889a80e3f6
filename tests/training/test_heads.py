import numpy as np
import pytest

import train
from errors import Interrupted, UserError
from experiment.files import read_json, read_lines
from experiment.runner import GROUP
from models import MODELS, create_model
from models.classifier import stage_of
from models.vit import VisionTransformer
from models.weights.own import WEIGHTS, arrays_of, read_own, write_own
from train import check_run, train_and_evaluate, train_together
from training import heads


class TinyVit(VisionTransformer):
    """Its head has a LayerNorm."""

    width, heads, depth = 8, 2, 1


@pytest.fixture
def head_runs(digits_run, few_digits, tmp_path, monkeypatch):
    """Returns a function: configs of a head on stages with "pretrained" weights, one a seed."""
    monkeypatch.setitem(MODELS, "tiny_vit", TinyVit)

    def make(name="tiny_vit", seeds=(0, 1), **changes):
        path = tmp_path / f"{name}.safetensors"
        if not path.exists():
            model = create_model(name, 7, image_size=16, seed=5)
            facts = {"model": name, "fields": {}, "num_classes": 7}
            facts |= {"preprocessing": model.preprocessing.to_dict()}
            write_own(path, arrays_of(model), facts)
        options = {
            "weights": f"archcompare:{path}", "phases": "head", "preflight": "off",
            "phase__head__epochs": 3, "batch_size": 32, "runtime__log_every_steps": 4,
            "phase__head__early_stopping_patience": 0,
        }  # fmt: skip
        return [digits_run(name, seed, **few_digits | options | changes) for seed in seeds]

    return make


def folders(root, configs):
    return [root / config.model.name / f"seed{config.seed}" for config in configs]


def logits(run_dir):
    return np.load(run_dir / "predictions_test.npz")["logits"]


def history(run_dir):
    lines = read_lines(run_dir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def assert_alike(alone, together):
    first, second = history(alone), history(together)
    assert len(first) == len(second) > 2
    for expected, line in zip(first, second, strict=True):
        assert [expected.pop(k) for k in ("split", "phase")] == [
            line.pop(k) for k in ("split", "phase")
        ]
        assert line == pytest.approx(expected, rel=2e-3)
    np.testing.assert_allclose(logits(alone), logits(together), atol=2e-3)
    before, after = (read_json(path / "summary.json") for path in (alone, together))
    for key in ("best_step", "steps", "model", "weights", "preprocessing"):
        assert before[key] == after[key], key
    assert before["phases"][0].keys() == after["phases"][0].keys()
    assert before["cost"].keys() == after["cost"].keys() - {"shared_by"}
    assert {p.name for p in alone.iterdir()} - {"checkpoints"} <= {
        p.name for p in together.iterdir()
    }


RICH = {
    "phase__head__augment_views": 2, "augment__rotation": 15.0, "ema_decay": 0.9,
    "phase__head__early_stopping_patience": 1, "phase__head__epochs": 5,
    "optimizer__clip_norm": 1.0, "optimizer__l1": 1e-4, "schedule__name": "plateau",
    "schedule__patience": 1, "loss__class_weights": "balanced", "loss__label_smoothing": 0.1,
    "optimizer__learning_rate": 0.03, "select": "macro_f1",
}  # fmt: skip


def test_seeds_trained_at_once_are_those_trained_alone(head_runs, tmp_path):
    """With a teacher, dropout, views, averaged weights and patience, which ends at another epoch."""
    (teacher,) = head_runs("cnn", seeds=(0,), phase__head__epochs=1)
    train_and_evaluate(teacher, tmp_path / "teacher")
    taught = {"distill__teacher": f"run:{tmp_path}/teacher", "distill__weight": 0.5}
    configs = head_runs("cnn", seeds=(0, 1, 2), model__dropout=0.5, **RICH, **taught)
    together = folders(tmp_path / "together", configs)
    summaries = train_together(configs, together)
    assert len({summary["steps"] for summary in summaries}) > 1
    train_and_evaluate(configs[1], tmp_path / "alone")
    assert_alike(tmp_path / "alone", together[1])
    assert summaries[0]["distill"]["teachers"][0]["model"] == "cnn"
    cost = summaries[0]["cost"]
    assert cost["shared_by"] == {"seeds": 3, "settings": 1}
    assert cost["seconds"] == summaries[1]["cost"]["seconds"] >= cost["seconds_to_best"] > 0
    arrays = [read_own(run_dir / WEIGHTS)["arrays"] for run_dir in together]
    for path, array in arrays[0].items():
        assert np.array_equal(array, arrays[1][path]) == (stage_of(path) < 2), path


def test_the_best_setting_is_that_of_runs_one_by_one(head_runs, tmp_path):
    rates, decays = (1e-3, 0.05), (0.0, 0.3)
    tries = {"try_learning_rates": rates, "phase__head__try_weight_decays": decays}
    configs = head_runs(**tries)
    summaries = train_together(configs, folders(tmp_path / "grid", configs))
    found = summaries[1]["settings"]
    settings = [(tried["learning_rate"], tried["weight_decay"]) for tried in found["tried"]]
    assert settings == [(rate, decay) for rate in rates for decay in decays]
    losses = [tried["validation_loss"] for tried in found["tried"]]
    chosen = tuple(found["chosen"][name] for name in ("learning_rate", "weight_decay"))
    assert chosen == settings[np.argmin(losses)] and len(set(losses)) == 4
    for setting in ((1e-3, 0.0), chosen):
        fields = ("optimizer__learning_rate", "optimizer__weight_decay")
        (config,) = head_runs(seeds=(1,), **dict(zip(fields, setting, strict=True)))
        summary = train_and_evaluate(config, tmp_path / str(setting))
        tried = found["tried"][settings.index(setting)]
        loss = summary["metrics"]["validation"]["loss"]
        assert tried["validation_loss"] == pytest.approx(loss, rel=1e-3)
        assert tried["best_epoch"] == summary["best_step"] / 5
    assert_alike(tmp_path / str(chosen), tmp_path / "grid/tiny_vit/seed1")


def test_a_group_stopped_anywhere_ends_with_the_same_bits(head_runs, tmp_path, monkeypatch):
    tries = {"try_learning_rates": (1e-3, 0.1), "phase__head__early_stopping_patience": 1}
    configs = head_runs(**tries, **{"runtime__cache_dir": str(tmp_path / "cache")})
    whole, parts = (folders(tmp_path / name, configs) for name in ("whole", "parts"))
    calls = {"left": 6}  # three while features are stored

    def should_stop():
        calls["left"] -= 1
        return calls["left"] == 0

    with pytest.raises(Interrupted):
        train_together(configs, parts, should_stop)
    plain = train.write_predictions

    def stop(record, part, *arguments):
        if (record.run_dir, part) == (parts[1], "test"):
            raise KeyboardInterrupt
        return plain(record, part, *arguments)

    monkeypatch.setattr(train, "write_predictions", stop)
    with pytest.raises(KeyboardInterrupt):
        train_together(configs, parts)
    monkeypatch.setattr(train, "write_predictions", plain)
    assert read_json(parts[0] / "summary.json") and not (parts[1] / "summary.json").exists()
    written = (parts[0] / "summary.json").stat().st_mtime_ns
    ended = train_together(configs, parts)
    assert (parts[0] / "summary.json").stat().st_mtime_ns == written
    expected = train_together(configs, whole)
    for summary, same, one, other in zip(expected, ended, whole, parts, strict=True):
        assert np.array_equal(logits(one), logits(other))
        assert history(one) == history(other)
        assert summary["settings"] == same["settings"] and summary["metrics"] == same["metrics"]
        assert read_json(one / GROUP)["runs"] == ["tiny_vit/seed0", "tiny_vit/seed1"]


def test_the_state_of_other_seeds_is_not_taken(head_runs, tmp_path):
    calls = iter(range(100))
    configs = head_runs(seeds=(0, 1, 2))
    run_dirs = folders(tmp_path, configs)
    with pytest.raises(Interrupted, match="at step "):
        train_together(configs, run_dirs, lambda: next(calls) == 4)
    summaries = train_together(configs[1:], run_dirs[1:]), train_together(configs[:2], run_dirs[:2])
    assert [summary["cost"]["shared_by"]["seeds"] for (summary, _) in summaries] == [2, 2]
    assert [line["step"] for line in history(run_dirs[0])] == [4, 5, 5, 8, 10, 10, 12, 15, 15]


def test_a_member_that_ended_changes_no_more(head_runs, tmp_path, monkeypatch):
    kept = {}
    plain = heads.HeadGroup._train_until

    def train_until(group, pause, constants):
        plain(group, pause, constants)
        kernel = np.asarray(group.state["params"]["stages.2.linear.kernel"])
        if pause == 4:
            group._end(1, 0)
            kept["ended"], kept["other"] = kernel[1, 0].copy(), kernel[0, 0].copy()
        kept["last"] = kernel

    monkeypatch.setattr(heads.HeadGroup, "_train_until", train_until)
    configs = head_runs(try_learning_rates=(0.02,))  # one alone is taken too
    summaries = train_together(configs, folders(tmp_path, configs))
    assert summaries[0]["settings"]["chosen"]["learning_rate"] == 0.02
    assert np.array_equal(kept["last"][1, 0], kept["ended"])
    assert not np.array_equal(kept["last"][0, 0], kept["other"])
    assert [summary["steps"] for summary in summaries] == [15, 4]


def test_a_setting_that_diverges_loses(head_runs, tmp_path):
    options = {"optimizer__name": "sgd", "try_learning_rates": (1e30, 0.01)}
    (config,) = head_runs(seeds=(0,), **options)
    summary = train_and_evaluate(config, tmp_path / "one/seed0")
    assert summary["settings"]["chosen"]["learning_rate"] == 0.01
    assert [tried["status"] for tried in summary["settings"]["tried"]] == ["diverged", "complete"]
    (config,) = head_runs(seeds=(0,), **options | {"try_learning_rates": (1e30, 1e29)})
    summary = train_and_evaluate(config, tmp_path / "all/seed0")
    assert summary["status"] == "diverged" and "not finite at step" in summary["error"]
    assert read_lines(tmp_path / "all/seed0/metrics.jsonl")[-1]["loss"] is None
    assert not (tmp_path / "all/seed0/predictions_test.npz").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phases": "head,tune"}, "several phases, head,tune: set phases=head"),
        ({"weights": "none"}, "name pretrained weights"),
        ({"train": "all", "phase__head__train": "all"}, "set train=head"),
        ({"augment__rotation": 5.0, "phase__head__augment_views": 0}, "set augment_views="),
        ({"frozen_batch_norm": "batch"}, "set frozen_batch_norm=running"),
        ({"runtime__feature_cache_mb": 0.01}, "raise runtime.feature_cache_mb"),
        ({"phase__head__train": "last:2"}, "hold convolutions"),
    ],
)
def test_a_grid_is_refused_where_it_cannot_be(head_runs, changes, message):
    (config,) = head_runs("cnn", seeds=(0,), try_learning_rates=(0.1, 0.2), **changes)
    with pytest.raises(UserError, match=message) as caught:
        check_run(config)
    assert "try_learning_rates" in str(caught.value)


def test_seeds_are_divided_by_what_their_state_takes(head_runs):
    found = [
        check_run(head_runs("cnn", seeds=(0,), **options)[0])
        for options in (
            {"runtime__feature_cache_mb": 16.0},
            {"runtime__feature_cache_mb": 16.0, "try_learning_rates": (0.1, 0.2)},
            {"runtime__feature_cache_mb": 1.0},
        )
    ]
    assert found[0] > found[1] > found[2] == 1
    assert check_run(head_runs(seeds=(0,), phases="head,tune")[0]) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"try_learning_rates": (0.1, 0.0)}, "try_learning_rates=0.0 is out of range"),
        ({"try_weight_decays": (0.1, -1)}, "try_weight_decays=-1 is out of range"),
        ({"try_learning_rates": (0.1, 0.1)}, "names a value twice"),
    ],
)
def test_impossible_settings_are_named(head_runs, changes, message):
    with pytest.raises(UserError, match=message):
        head_runs(**changes)
