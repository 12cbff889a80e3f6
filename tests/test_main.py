"""The command line as a user meets it: real processes, real kills."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import main
from configs import digits
from errors import UserError
from experiment.fields import stored_config
from experiment.grid import Run, expand
from experiment.machine import locked
from experiment.runner import prepare_workdir
from tests.conftest import ROOT, paint

DIGITS = (
    "--config=configs/digits.py:cnn",
    "--config.seeds=0",
    "--config.runtime.tensorboard=False",
)


QUICK_REPORT = (
    "--config.compare.robustness_images=0",
    "--config.compare.gradcam_images=0",
    "--config.compare.look_inside=False",
)


def command(workdir, cache_dir, *arguments):
    return [
        sys.executable,
        "main.py",
        f"--workdir={workdir}",
        *map(str, arguments),
        *QUICK_REPORT,
        f"--config.runtime.cache_dir={cache_dir}",
    ]


def run(workdir, cache_dir, *arguments):
    result = subprocess.run(
        command(workdir, cache_dir, *arguments), cwd=ROOT, capture_output=True, text=True
    )
    assert "Traceback" not in result.stderr, result.stderr
    return result


def logits(workdir, name="cnn/seed0"):
    with np.load(workdir / name / "predictions_test.npz") as file:
        return file["logits"]


SLOW = (
    *DIGITS,
    "--config.epochs=20",
    "--config.runtime.checkpoint_every_seconds=0",
    "--config.runtime.log_every_steps=20",
)


def wait_for_checkpoint(process, workdir, step):
    """Waits until a checkpoint of at least this step is whole."""
    folder, limit = workdir / "cnn" / "seed0" / "checkpoints", time.monotonic() + 120
    while time.monotonic() < limit and process.poll() is None:
        found = [int(path.name) for path in folder.glob("latest/*") if path.name.isdigit()]
        if found and max(found) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint of step {step}: {process.poll()}")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache_dir):
    workdir = tmp_path_factory.mktemp("whole")
    result = run(workdir, cache_dir, *SLOW)
    assert result.returncode == 0, result.stderr
    return workdir, result


def test_a_killed_run_ends_with_the_same_bits(uninterrupted, tmp_path, cache_dir):
    arguments = command(tmp_path, cache_dir, *SLOW)
    for step, pause in ((10, 0.0), (200, 0.013), (400, 0.037)):  # at any moment
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL)
        wait_for_checkpoint(process, tmp_path, step)
        time.sleep(pause)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "cnn/seed0/summary.json").exists()
    result = run(tmp_path, cache_dir, *SLOW)
    assert result.returncode == 0 and "going on" in result.stdout
    assert np.array_equal(logits(tmp_path), logits(uninterrupted[0]))


def test_sigterm_saves_and_exits_with_75(uninterrupted, tmp_path, cache_dir):
    arguments = command(tmp_path, cache_dir, *SLOW, "--config.runtime.checkpoint_every_seconds=1e6")
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    metrics, limit = tmp_path / "cnn/seed0/metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < limit and not (metrics.exists() and metrics.stat().st_size > 500):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "the state is saved" in output
    assert list((tmp_path / "cnn/seed0/checkpoints").glob("latest/*"))
    assert run(tmp_path, cache_dir, *SLOW).returncode == 0
    assert np.array_equal(logits(tmp_path), logits(uninterrupted[0]))


def test_the_report_is_printed_and_a_second_start_skips(uninterrupted, cache_dir):
    workdir, first = uninterrupted
    assert (
        "test accuracy %" in first.stdout and f"report: {workdir}/report/index.html" in first.stdout
    )
    table = pd.read_csv(workdir / "report" / "table.csv")
    assert table["model"].tolist() == ["cnn"] and table["seeds"].tolist() == [1]
    accuracy = json.loads((workdir / "cnn/seed0/summary.json").read_text())["metrics"]["test"][
        "accuracy"
    ]
    assert table["test_accuracy_mean"][0] == pytest.approx(accuracy) and accuracy > 0.97
    before = (workdir / "cnn/seed0/metrics.jsonl").stat().st_mtime_ns
    again = run(workdir, cache_dir, *SLOW)
    assert again.returncode == 0 and "complete already" in again.stdout
    assert (workdir / "cnn/seed0/metrics.jsonl").stat().st_mtime_ns == before
    other = run(workdir, cache_dir, *SLOW, "--config.optimizer.learning_rate=0.5")
    assert other.returncode == 2
    assert "optimizer.learning_rate: stored 0.003, now 0.5" in other.stderr


def test_shards_and_failures(tmp_path, cache_dir, make_folder):
    root = make_folder({"a": 30, "b & <i>": 30})
    arguments = (
        "--config=configs/folder.py:linear,knn",
        f"--config.data.path={root}",
        "--config.data.image_size=8",
        "--config.epochs=1",
        "--config.seeds=0,1",
    )
    first = run(tmp_path, cache_dir, *arguments, "--shard=0/2")
    assert first.returncode == 0, first.stderr
    assert {p.parent.parent.name for p in tmp_path.glob("*/*/summary.json")} == {"linear", "knn"}
    assert len(list(tmp_path.glob("*/*/summary.json"))) == 2
    assert "not complete: linear/seed1: not started" in first.stdout
    blocked = tmp_path / "knn" / "seed1"
    blocked.mkdir(parents=True)
    (blocked / "checkpoints").write_text("in the way")
    second = subprocess.run(
        command(tmp_path, cache_dir, *arguments), cwd=ROOT, capture_output=True, text=True
    )
    assert second.returncode == 1
    assert (
        "knn/seed1: failed" in second.stderr and "not complete: knn/seed1: failed" in second.stdout
    )
    assert json.loads((blocked / "summary.json").read_text())["status"] == "failed"
    table = pd.read_csv(tmp_path / "report" / "table.csv").set_index("model")
    assert table["seeds"].to_dict() == {"linear": 2, "knn": 1}
    (blocked / "checkpoints").unlink()
    third = run(tmp_path, cache_dir, *arguments, "--launch=local")
    assert third.returncode == 0 and "not complete" not in third.stdout
    assert "linear/seed0: complete" in third.stdout and "running on cpu" in third.stdout
    assert "[1/1] knn/seed1: going on" in (blocked / "log.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config.optimizer.learning_rat=1",), "Did you mean 'optimizer.learning_rate'"),
        (("--config.epochs=many",), "--config.epochs=many"),
        (("--config.optimizer.learning_rate=nan",), "learning_rate=nan is out of range"),
        (("--config.data.source=folder", "--config.data.path=/no/such/folder"), "does not exist"),
        (("--config.compare.margin=-1.0",), "must be 0 or more"),
        (("--config.compare.margin=nan",), "must be 0 or more"),
        (("--config.compare.baseline=cn",), "Did you mean 'cnn'"),
        (("--shard=4/4",), "0 <= i < n"),
        (("--confg=x",), "Did you mean 'config'"),
    ],
)
def test_mistakes_end_with_one_message(tmp_path, cache_dir, arguments, message):
    result = run(tmp_path / "w", cache_dir, *DIGITS, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stdout == "" and not list(tmp_path.glob("w/*/*"))


def test_a_missing_config_is_named(tmp_path, cache_dir):
    result = run(tmp_path, cache_dir, "--config=configs/absent.py")
    assert result.returncode == 2 and "absent.py" in result.stderr
    result = subprocess.run([sys.executable, "main.py"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and "--config=" in result.stderr


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        prepare_workdir(tmp_path / "file" / "w")
    if os.getuid() != 0:  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(UserError, match="change its permissions"):
            prepare_workdir(tmp_path / "locked")


def test_data_mistakes_come_before_any_run(digits_run, tmp_path, make_folder):
    root = make_folder({"one": 20, "two": 20})
    (root / "one" / "half.jpg").write_bytes(b"\xff\xd8\xff\xe0 half")
    config = digits_run("linear", data__source="folder", data__path=str(root))
    with pytest.raises(UserError, match="one/half.jpg"):
        main.check([Run("linear/seed0", config)], tmp_path)
    (root / "one" / "half.jpg").unlink()
    small = digits_run("cnn_deep", data__source="folder", data__path=str(root), data__image_size=8)
    with pytest.raises(UserError, match="at least 16 pixels"):
        main.check([Run("cnn_deep/seed0", small)], tmp_path)
    root = make_folder({"one": 20, "two": 20}, name="contradictory")
    paint(0).save(root / "two" / "copy.png")
    config = digits_run("linear", data__source="folder", data__path=str(root))
    main.check([Run("linear/seed0", config)], tmp_path)
    found = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert found["label_conflicts"] == [["one/0.png", "two/copy.png"]]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("timm/resnet18.tv_in1", "Did you mean 'timm/resnet18.tv_in1k'"),
        ("timm/resnet50.tv_in1k", "are of resnet50, not of resnet18"),
        ("timm/resnet18.tv_in1k", "model.safetensors"),  # no network: the file to fetch elsewhere
        ("timm:nowhere.safetensors", "nowhere.safetensors"),
        ("run:nowhere", "not the directory of a complete run"),
    ],
)
def test_weights_that_cannot_be_had_stop_before_training(
    digits_run, tmp_path, monkeypatch, weights, message
):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("ARCHCOMPARE_WEIGHTS", str(tmp_path / "weights"))
    config = digits_run("resnet18", weights=weights, data__image_size=32)
    with pytest.raises(UserError) as caught:
        main.check([Run("resnet18/seed0", config)], tmp_path)
    assert message in str(caught.value)
    assert not (tmp_path / "resnet18").exists()


def test_no_job_of_a_search_trains_beside_runs_of_an_earlier_winner(tmp_path):
    """Though it trains another seed: the means would be of two recipes."""
    config, path = digits.get_config("linear"), "optimizer.learning_rate"
    old = expand(config, {}, {"linear": {path: 0.001}})[0]
    (tmp_path / old.name).mkdir(parents=True)
    stored = json.dumps(stored_config(old.config))
    (tmp_path / old.name / "config.json").write_text(stored)
    search = SimpleNamespace(
        config=config, overrides={}, workdir=tmp_path, label=lambda run: "linear",
        cure=lambda run: "delete them", run=lambda *_: {"linear": {path: 0.002}},
    )  # fmt: skip
    runs = [run for run in expand(config) if run.config.seed == 1]
    with pytest.raises(
        UserError, match=r"(?s)linear/seed0 holds .*stored 0.001, now 0.002.*delete them"
    ):
        main.tuned(runs, search, "linear/seed1", None)


def test_nothing_to_do_is_said_and_is_no_failure(tmp_path, cache_dir, capsys):
    empty = run(tmp_path, cache_dir, *DIGITS, "--shard=1/2")
    assert empty.returncode == 0 and "leaves this shard without any" in empty.stdout
    assert not list(tmp_path.glob("*/*"))
    (tmp_path / "cnn/seed0").mkdir(parents=True)
    with locked(tmp_path / "cnn/seed0/.lock"):
        held = run(tmp_path, cache_dir, *DIGITS)
    assert held.returncode == 0 and "other processes train all of these runs" in held.stdout
    assert not (tmp_path / "report").exists()


def test_the_same_data_elsewhere_goes_on_and_other_data_is_refused(
    tmp_path, cache_dir, make_folder
):
    root = make_folder({"train/a": 12, "train/b": 12, "test/a": 4, "test/b": 4})
    options = (
        "--config=configs/folder.py:linear",
        "--config.epochs=1",
        "--config.data.image_size=8",
    )
    first = run(
        tmp_path / "w", cache_dir, *options, "--config.seeds=0,", f"--config.data.path={root}"
    )
    assert first.returncode == 0, first.stderr
    moved = root.rename(root.parent / "moved")
    options = (*options, f"--config.data.path={moved}")
    more = ("--config.seeds=0,1", "--config.eval_batch_size=8")
    second = run(tmp_path / "w", cache_dir, *options, *more)
    assert second.returncode == 0 and "complete already" in second.stdout, second.stderr
    paint(999).save(moved / "train/a/new.png")
    third = run(tmp_path / "w", cache_dir, *options, "--config.seeds=0,1,2")
    assert third.returncode == 2 and not (tmp_path / "w/linear/seed2").exists()
    assert "1 images added, such as train/a/new.png" in third.stderr
