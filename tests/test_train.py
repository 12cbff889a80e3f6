import json
import os
import subprocess
import sys

import numpy as np
import pytest
from sklearn.metrics import log_loss

from errors import Interrupted, Pruned, UserError
from experiment.files import read_json, read_lines
from experiment.runner import FINAL
from input_pipeline import load_dataset
from models.classifier import merge_model
from models.weights.own import WEIGHTS, read_own
from tests.conftest import ROOT
from train import build_model, train_and_evaluate
from training import checkpoint, phase
from training.phase import next_pause


def predictions(run_dir, part="test"):
    with np.load(run_dir / f"predictions_{part}.npz") as file:
        return dict(file)


def lines(run_dir, split):
    return [line for line in read_lines(run_dir / "metrics.jsonl") if line["split"] == split]


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """A finished run of softmax regression and its config."""
    from configs import digits
    from experiment.grid import expand

    folder = tmp_path_factory.mktemp("linear")
    overrides = {"epochs": 5, "runtime.cache_dir": str(folder / "cache")}
    config = expand(digits.get_config("linear"), overrides)[0].config
    return config, folder / "run", train_and_evaluate(config, folder / "run")


def test_a_run_directory_holds_what_the_analysis_needs(linear):
    config, run_dir, summary = linear
    names = {path.name for path in run_dir.iterdir()}
    assert names >= {
        "config.json", "environment.json", "dataset.json", "metrics.jsonl", "checkpoints",
        "summary.json", "predictions_validation.npz", "predictions_test.npz", "tensorboard",
        "augmented_batch.png", "weights.safetensors",
    }  # fmt: skip
    stored = json.loads((run_dir / "summary.json").read_text())
    assert stored["status"] == summary["status"] == "complete"
    dataset = json.loads((run_dir / "dataset.json").read_text())
    assert dataset["class_names"] == [str(i) for i in range(10)]
    assert sum(sum(by_class.values()) for by_class in dataset["counts"].values()) == 1797
    assert list((run_dir / "tensorboard").glob("events.out.tfevents*"))
    assert "tensorflow" not in sys.modules
    assert stored["preprocessing"]["mean"] == [0.5, 0.5, 0.5]


def test_metrics_are_those_of_the_saved_predictions(linear):
    config, run_dir, summary = linear
    dataset = load_dataset(config.data, config.runtime.cache_dir)
    for part in ("validation", "test"):
        saved, measured = predictions(run_dir, part), summary["metrics"][part]
        assert saved["ids"].tolist() == dataset.ids(part)
        assert np.array_equal(saved["labels"], dataset.labels(part))
        assert measured["count"] == len(saved["labels"])
        accuracy = (saved["logits"].argmax(axis=1) == saved["labels"]).mean()
        assert measured["accuracy"] == pytest.approx(accuracy)
        shifted = np.exp(saved["logits"].astype(float))
        theirs = log_loss(saved["labels"], shifted / shifted.sum(axis=1, keepdims=True))
        assert measured["loss"] == pytest.approx(theirs, rel=1e-4)


def test_the_best_weights_give_the_saved_predictions(linear):
    config, run_dir, summary = linear
    validation = lines(run_dir, "validation")
    best = min(validation, key=lambda line: line["loss"])
    assert summary["best_step"] == best["step"]
    assert summary["metrics"]["validation"]["loss"] == pytest.approx(best["loss"])
    arrays, content = checkpoint.restore(run_dir / f"checkpoints/best/{best['step']}")
    assert content["step"] == best["step"]
    params = {k.removeprefix("params/"): v for k, v in arrays.items() if k.startswith("params/")}
    handed_on = read_own(run_dir / WEIGHTS)
    assert handed_on["class_names"] == [str(i) for i in range(10)]
    assert handed_on["arrays"].keys() == params.keys()
    assert all(np.array_equal(array, params[k]) for k, array in handed_on["arrays"].items())
    merged = merge_model(build_model(config, 10), params, {})
    dataset = load_dataset(config.data, config.runtime.cache_dir)
    logits = merged(merged.preprocess(dataset.images("test")))
    np.testing.assert_allclose(logits, predictions(run_dir)["logits"], atol=1e-4)


def test_training_metrics_and_costs_are_logged(linear):
    config, run_dir, summary = linear
    training = lines(run_dir, "train")
    assert training[-1]["loss"] < training[0]["loss"] / 2
    assert training[-1]["step"] == summary["steps"] == 5 * -(-1163 // 32)
    assert training[-1]["epoch"] == 5
    assert all(line["learning_rate"] > 0 for line in training[:-1])
    cost = summary["cost"]
    assert cost["parameters"] == 8 * 8 * 3 * 10 + 10
    assert cost["multiply_adds_per_image"] == 8 * 8 * 3 * 10
    assert cost["train_images_per_second"] > 0 and cost["compile_seconds"] > 0
    batch = config.batch_size * 8 * 8 * 3  # bytes of images, which a step takes
    assert batch < cost["train_step_memory_bytes"] < 20 * batch + 50 * cost["parameters"]
    assert 0 < cost["seconds_to_best"] <= cost["seconds"]


def test_groups_are_kept_beside_the_predictions(linear, digits_run, make_folder, tmp_path):
    assert predictions(linear[1]).keys() == {"ids", "labels", "logits"}
    root = make_folder({f"{part}/{c}": 4 for part in ("train", "val", "test") for c in "ab"})
    data = {"data__source": "folder", "data__path": str(root), "data__groups": r"(\w/\d)\.png"}
    train_and_evaluate(digits_run("linear", epochs=1, **data), tmp_path / "run")
    for part in ("validation", "test"):
        saved = predictions(tmp_path / "run", part)
        keys = [name[-7:-4] for name in saved["ids"]]
        assert saved["groups"].tolist() == keys and len(set(keys)) == 8


def test_a_run_directory_may_be_named_by_one_word(digits_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train_and_evaluate(digits_run("linear", epochs=1), "run")["status"] == "complete"
    (tmp_path / "run/dataset.json").write_text("{half")
    with pytest.raises(UserError, match="dataset.json is not valid JSON .*: delete run"):
        train_and_evaluate(digits_run("linear", epochs=1), "run")


def test_cnn_learns_sixty_images_by_heart(digits_run, tmp_path, cache_dir):
    digits = load_dataset(digits_run().data, cache_dir)
    rows = np.concatenate(
        [digits.rows["train"][digits.labels("train") == k][:6] for k in range(10)]
    )
    images, labels = digits.decoded.images[rows], digits.listing.labels[rows]
    parts = np.array(["train"] * 60 + ["validation"] * 60 + ["test"] * 60)
    ids = np.array([f"{part}{i % 60}" for i, part in enumerate(parts)])
    path = tmp_path / "sixty.npz"
    np.savez(
        path, images=np.tile(images, (3, 1, 1, 1)), labels=np.tile(labels, 3), parts=parts, ids=ids
    )
    config = digits_run(
        data__source="npz", data__path=str(path), epochs=60, augment__rotation=0.0,
        augment__zoom=0.0, augment__shift=0.0, eval_every_epochs=10,
    )  # fmt: skip
    summary = train_and_evaluate(config, tmp_path / "run")
    assert summary["metrics"]["validation"]["correct"] == 60  # which are the training images


def test_an_interrupted_run_ends_with_the_same_bits(digits_run, few_digits, tmp_path):
    options = {
        "model": "cnn_deep", "epochs": 2, "ema_decay": 0.9, "schedule__name": "plateau",
        "augment__mixup": 0.2, "augment__rotation": 10.0, "runtime__log_every_steps": 7,
        "optimizer__clip_norm": 1.0, "batch_size": 16,
    }  # fmt: skip
    config = digits_run(**few_digits | options)
    whole = train_and_evaluate(config, tmp_path / "whole")
    steps = {"taken": 0}

    def stop_at(step):
        def should_stop():
            steps["taken"] += 1
            return steps["taken"] == step

        return should_stop

    # 9 steps an epoch: between pauses; where metrics are logged; where the model is evaluated
    for further, reached in ((3, 3), (4, 7), (2, 9)):
        steps["taken"] = 0
        with pytest.raises(Interrupted, match=f"stopped at step {reached};"):
            train_and_evaluate(config, tmp_path / "parts", stop_at(further))
        assert not (tmp_path / "parts" / "summary.json").exists()
    parts = train_and_evaluate(config, tmp_path / "parts")
    assert np.array_equal(
        predictions(tmp_path / "whole")["logits"], predictions(tmp_path / "parts")["logits"]
    )
    assert whole["metrics"] == parts["metrics"]
    logged = []
    for name in ("whole", "parts"):
        for line in read_lines(tmp_path / name / "metrics.jsonl"):
            line.pop("images_per_second", None)
            logged.append(line)
    assert logged[: len(logged) // 2] == logged[len(logged) // 2 :]


def test_a_damaged_checkpoint_is_passed_over(digits_run, tmp_path, capsys):
    config = digits_run("linear", epochs=3)
    whole = train_and_evaluate(config, tmp_path / "whole")
    calls = iter(range(1000))
    with pytest.raises(Interrupted):
        train_and_evaluate(config, tmp_path / "run", lambda: next(calls) == 60)
    (newest,) = (tmp_path / "run/checkpoints/latest").glob("[0-9]*")
    for file in newest.rglob("*"):
        if file.is_file() and "/d/" in str(file):
            file.write_bytes(b"broken")
    again = train_and_evaluate(config, tmp_path / "run")
    assert "cannot read the checkpoint" in capsys.readouterr().err
    assert again["metrics"] == whole["metrics"]


def test_divergence_stops_at_its_step(digits_run, tmp_path, monkeypatch):
    real = phase.Feed.training

    def poisoned(self, *arguments):
        for step, batch in enumerate(real(self, *arguments)):
            if step == 11:
                batch["image"] = batch["image"].astype(np.float32) * np.nan
            yield batch

    monkeypatch.setattr(phase.Feed, "training", poisoned)
    summary = train_and_evaluate(digits_run("linear"), tmp_path)
    assert summary["status"] == "diverged"
    assert "at step 12 " in summary["error"] and "lower optimizer.learning_rate" in summary["error"]
    assert not (tmp_path / "predictions_test.npz").exists()
    assert read_lines(tmp_path / "metrics.jsonl")[-1]["step"] == 12
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "diverged"


def test_an_absurd_rate_diverges(digits_run, tmp_path):
    config = digits_run("mlp", optimizer__name="sgd", optimizer__learning_rate=1e30)
    assert train_and_evaluate(config, tmp_path)["status"] == "diverged"


def test_early_stopping_keeps_the_best_weights(digits_run, tmp_path):
    config = digits_run(
        "mlp", epochs=60, early_stopping_patience=2, optimizer__learning_rate=0.02,
        schedule__name="constant",
    )  # fmt: skip
    summary = train_and_evaluate(config, tmp_path)
    validation = lines(tmp_path, "validation")
    losses = [line["loss"] for line in validation]
    assert len(losses) < 60 and losses.index(min(losses)) == len(losses) - 3
    assert summary["best_step"] == validation[-3]["step"]


@pytest.mark.parametrize(
    "changes",
    [
        {"loss__name": "hinge"},
        {"loss__class_weights": "balanced", "loss__label_smoothing": 0.1},
        {"loss__class_weights": "1,1,1,1,1,2,1,1,1,1", "ema_decay": 0.99},
        {"optimizer__name": "sgd", "optimizer__learning_rate": 0.05, "schedule__name": "step"},
        {"optimizer__name": "adam", "optimizer__l1": 1e-5, "optimizer__clip_norm": 1.0},
        {"compute_dtype": "bfloat16", "schedule__warmup_epochs": 0.5, "runtime__feed": "streaming"},
        {"augment__cutmix": 1.0, "augment__mixup": 0.2, "augment__crop_area": (0.8, 1.0)},
    ],
)
def test_every_option_learns(digits_run, tmp_path, changes):
    summary = train_and_evaluate(digits_run("mlp", epochs=4, **changes), tmp_path)
    assert summary["metrics"]["test"]["accuracy"] > 0.75


def test_l1_makes_small_kernels(digits_run, tmp_path):
    sums = []
    for l1 in (0.0, 0.01):
        run_dir = tmp_path / str(l1)
        train_and_evaluate(digits_run("linear", epochs=4, optimizer__l1=l1), run_dir)
        arrays = read_own(run_dir / WEIGHTS)["arrays"]
        sums.append(sum(np.abs(a).sum() for k, a in arrays.items() if k.endswith("kernel")))
    assert sums[1] < 0.7 * sums[0]


def test_knn_runs_without_training(digits_run, tmp_path):
    summary = train_and_evaluate(digits_run("knn"), tmp_path)
    assert summary["metrics"]["test"]["accuracy"] > 0.97
    assert summary["cost"]["train_images_per_second"] is None
    assert summary["cost"]["multiply_adds_per_image"] == 1163 * 192
    assert summary["cost"]["train_step_memory_bytes"] is None
    assert read_own(tmp_path / WEIGHTS)["arrays"]["stages.0.images"].shape == (1163, 192)


def test_wrong_class_weights_are_named(digits_run, tmp_path):
    with pytest.raises(UserError, match="10 positive numbers"):
        train_and_evaluate(digits_run("linear", loss__class_weights="1,2"), tmp_path)


def test_pauses():
    from ml_collections import ConfigDict

    config = ConfigDict({"eval_every_epochs": 2, "runtime": {"log_every_steps": 30}})
    found, step = [], 0
    while step < 100:
        step, evaluates = next_pause(step, 100, 20, config)
        found.append((step, evaluates))
    assert found == [(30, False), (40, True), (60, False), (80, True), (90, False), (100, True)]


EIGHT = """
import json, sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from input_pipeline import check_batches
from train import train_and_evaluate
config = ConfigDict(json.loads(Path(sys.argv[1]).read_text()))
print(train_and_evaluate(config, Path(sys.argv[2]))["cost"]["device"])
config.batch_size = 36
try:
    check_batches(config, Mesh(np.array(jax.devices()), ("data",)))
except Exception as error:
    print(error)
"""


def test_eight_devices_give_the_result_of_one(digits_run, few_digits, tmp_path):
    """BatchNorm, dropout and the loss see the whole batch, however it is divided."""
    config = digits_run("cnn_deep", epochs=1, batch_size=64, **few_digits)
    config.optimizer.name, config.optimizer.learning_rate = "sgd", 0.01
    train_and_evaluate(config, tmp_path / "one")
    (tmp_path / "config.json").write_text(config.to_json())
    result = subprocess.run(
        [sys.executable, "-c", EIGHT, tmp_path / "config.json", tmp_path / "eight"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
    )
    assert "8 x cpu" in result.stdout, result.stderr
    assert "batch_size=36 cannot be divided over 8 devices: use a multiple of 8" in result.stdout
    one, eight = (predictions(tmp_path / name)["logits"] for name in ("one", "eight"))
    np.testing.assert_allclose(one, eight, atol=2e-3)
    assert one.std() > 0.1


class Watched(np.ndarray):
    """Images that note how many are copied at once."""

    copied = []

    def __getitem__(self, key):
        taken = super().__getitem__(key)
        if not np.may_share_memory(taken, self):
            self.copied.append(taken.size // self[0].size)
        return taken


@pytest.mark.parametrize(("feed", "most"), [("streaming", 64), ("resident", 1163)])
def test_a_streamed_run_never_copies_more_images_than_a_batch(
    digits_run, cache_dir, tmp_path, monkeypatch, feed, most
):
    config = digits_run("linear", epochs=1, eval_batch_size=64, runtime__feed=feed)
    dataset = load_dataset(config.data, cache_dir, config.runtime.resident_limit_mb)
    monkeypatch.setattr(dataset.decoded, "images", dataset.decoded.images.view(Watched))
    monkeypatch.setattr(Watched, "copied", [])
    train_and_evaluate(config, tmp_path / "run")
    assert max(Watched.copied) == most  # of the training part, where it is resident


def test_a_pruned_run_says_when_and_is_final(digits_run, few_digits, tmp_path):
    seen = []

    def watch(epoch, loss):
        seen.append((epoch, loss))
        if len(seen) == 2:
            raise Pruned("worse than others")

    summary = train_and_evaluate(
        digits_run("linear", epochs=5, **few_digits), tmp_path, watch=watch
    )
    assert summary["status"] == read_json(tmp_path / "summary.json")["status"] == "pruned"
    assert summary["error"] == "worse than others" and summary["cost"]["seconds"] > 0
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [(x["epoch"], x["loss"]) for x in lines if x["split"] == "validation"] == seen
    assert [epoch for epoch, _ in seen] == [1.0, 2.0] and "pruned" in FINAL
