import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import input_pipeline
from errors import UserError
from experiment.files import read_json, read_lines
from experiment.grid import Run
from experiment.runner import train_group
from input_pipeline import Feed, batch_rows, load_dataset, places_here
from tests.conftest import ROOT
from tests.experiment.test_runner import Never
from train import device_mesh, train_and_evaluate
from training import hosts
from training.checkpoint import Checkpoints
from training.place import Place, find_place

SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-4]", "SLURM_NTASKS": "4", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip
MPI = {
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.0.0.1:34911",
}  # fmt: skip
A_NODE_EACH = {"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_LOCALID": "0"}


@pytest.fixture
def environment(monkeypatch):
    """Sets what a launcher tells its processes, and nothing else that speaks of hosts."""

    def launched(variables):
        told = ("SLURM_", "OMPI_", "KUBERNETES_", "JOB_COMPLETION_", "JAX_COORD", "CUDA_VISIBLE")
        for name in [name for name in os.environ if name.startswith(told)]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launched


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, None),
        (SLURM, Place(None, 4, 3, (1,))),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "1"}, Place(None, 4, 3)),  # bound to one by SLURM
        (SLURM | A_NODE_EACH, Place(None, 4, 3)),  # with all devices of its node
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),  # srun -n1 in a job of 4 tasks
        ({k: v for k, v in SLURM.items() if "STEP" not in k}, None),  # the script of sbatch
        (MPI, Place(None, 2, 1)),
        (SLURM | MPI, Place(None, 2, 1)),  # mpirun in a job of SLURM
        (SLURM | MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # any pod
    ],
)
def test_a_launcher_with_several_tasks_makes_several_hosts(environment, variables, place):
    environment(variables)
    assert find_place(None, None, None) == place
    assert find_place(None, 1, None) is None  # --hosts=1: runs of their own


def test_options_name_the_place(environment):
    environment({})
    assert find_place("a:1", 2, 1) == Place("a:1", 2, 1)
    assert find_place("a:1", 1, 0) is None
    environment({k: v for k, v in MPI.items() if "orte" not in k})  # Open MPI 5
    assert find_place("a:1", None, None) == Place("a:1", 2, 1)
    with pytest.raises(UserError, match="add --coordinator=HOST:PORT"):
        find_place(None, None, None)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("a:1", None, None), "--coordinator alone: several hosts need"),
        ((None, 2, None), "--hosts alone"),
        ((None, 2, 0), "--hosts, --host alone"),
        (("a", 2, 0), "write HOST:PORT"),
        (("a:1", 2, 2), "the last one is 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(environment, options, text):
    environment({})
    with pytest.raises(UserError, match=text):
        find_place(*options)


class Sharding(SimpleNamespace):
    """Of a batch over devices, of which this host has some."""

    is_fully_addressable = False

    def __hash__(self):
        return id(self)

    def addressable_devices_indices_map(self, shape):
        size = shape[0] // self.devices
        return {d: (slice(d * size, (d + 1) * size),) for d in self.own}


def test_a_host_reads_the_images_of_its_own_devices():
    assert places_here(Sharding(devices=4, own=(2, 3)), 8).tolist() == [4, 5, 6, 7]
    assert places_here(Sharding(devices=4, own=(3, 0)), 8).tolist() == [0, 1, 6, 7]


@pytest.mark.parametrize("feed", ["streaming", "resident"])
def test_a_host_has_no_image_of_another_in_its_batches(feed, digits_run, monkeypatch):
    config = digits_run(runtime__feed=feed)
    dataset, read = load_dataset(config.data, config.runtime.cache_dir), []
    images = dataset.decoded.images

    class Images:
        nbytes = images.nbytes

        def __getitem__(self, rows):
            read.append(rows)
            return images[rows]

    dataset = replace(dataset, decoded=replace(dataset.decoded, images=Images()))
    monkeypatch.setattr(input_pipeline, "places_here", lambda _, size: np.arange(size // 2, size))
    fed = Feed(dataset, "train", device_mesh(), config.runtime)
    (batch,) = fed.training(0, 32, 5, 6)
    mine = batch_rows(0, 5, len(fed), 32)[16:]
    assert batch["row"].tolist() == mine.tolist()
    assert np.array_equal(batch["image"], images[fed.rows[mine]])
    assert np.array_equal(batch["label"], fed.labels[mine])
    assert read[0].tolist() == (fed.rows[mine] if feed == "streaming" else fed.rows).tolist()


@pytest.fixture
def second(monkeypatch):
    """Makes this process the second of two hosts, as far as it knows."""
    monkeypatch.setattr(hosts, "_place", Place("a:1", 2, 1))


def test_other_hosts_write_elsewhere_and_keep_no_checkpoints(second, tmp_path):
    folder = hosts.own_folder(tmp_path)
    assert folder != tmp_path and folder.is_dir()
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save("latest", 3, {"a": np.zeros(2)}, {})
    assert checkpoints.steps("latest") == [] and not list(folder.iterdir())


def test_hosts_stop_where_none_has_been(second, monkeypatch):
    asked = []
    monkeypatch.setattr(
        hosts.multihost_utils,
        "reached_preemption_sync_point",
        lambda number: asked.append(number) or number == 3,
    )
    monkeypatch.setattr(hosts.signal, "signal", lambda *_: None)
    stop = hosts.signals()
    assert [stop.requested for _ in range(5)] == [False, False, True, True, True]
    assert asked == [1, 2, 3]


class Barrier:
    def __init__(self, all_come: bool):
        self.all_come = all_come

    def wait_at_barrier(self, name, milliseconds):
        if not self.all_come:
            raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out")


def test_a_failure_ends_all_unless_all_failed(second, monkeypatch, tmp_path, digits_run):
    monkeypatch.setattr(hosts.signal, "signal", lambda *_: None)
    monkeypatch.setattr(hosts, "agreed", lambda value: value)
    run, stop = Run("cnn/seed0", digits_run()), hosts.HostSignals()
    stop.agreed = lambda value: value

    def train(error):
        def fail(*_):
            raise error

        train_group([run], tmp_path, {run.name: "[1/1]"}, fail, stop)
        return read_json(tmp_path / run.name / "summary.json")

    monkeypatch.setattr(hosts.distributed.global_state, "client", Barrier(True))
    assert train(UserError("no room"))["status"] == "failed"
    monkeypatch.setattr(hosts.distributed.global_state, "client", Barrier(False))
    with pytest.raises(UserError, match="no space"):
        train(UserError("no space"))
    assert read_json(tmp_path / run.name / "summary.json")["error"] == "no space"
    with pytest.raises(hosts.Lost):
        train(ValueError("Gloo all-reduce failed: Connection reset by peer"))
    assert read_json(tmp_path / run.name / "summary.json")["error"] == "no space"


def test_the_first_host_says_which_runs_are_finished_or_held(tmp_path, digits_run, capsys):
    runs = [Run(f"cnn/seed{seed}", digits_run(seed=seed)) for seed in (0, 1)]

    class Told(Never):
        def agreed(self, value):
            return ["complete", None] if isinstance(value, list) else False

    titles = {run.name: run.name for run in runs}
    assert train_group(runs, tmp_path, titles, None, Told()) == {"cnn/seed1"}
    assert "cnn/seed0: complete already" in capsys.readouterr().out


WORKER = """
import json, signal, sys, time
from pathlib import Path
from configs import digits
from errors import Interrupted
from experiment.command import run_command
from experiment.grid import expand
from analysis.forward import use_compilation_cache
from train import train_and_evaluate
from training import hosts

def main(argv):
    folder, stop, asked = hosts.own_folder(Path(argv[1])), hosts.signals(), []

    def should_stop():
        asked.append(time.sleep(0.05))
        if len(asked) == 10 and not hosts.is_first():
            signal.raise_signal(signal.SIGTERM)
        return stop.requested

    config = expand(digits.get_config("mlp"), json.loads(argv[2]))[0].config
    config.runtime.feed = "streaming"
    use_compilation_cache(config.runtime.cache_dir)
    try:
        train_and_evaluate(config, folder, should_stop)
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
    config.runtime.feed = "resident"
    train_and_evaluate(config, folder)

run_command(hosts.among_hosts(main))
"""


def test_two_hosts_train_as_one_process_does(tmp_path, few_digits, digits_run):
    """Each reads its half; a signal to one stops both; they go on with the state of the first."""
    changes = few_digits | {
        "augment__rotation": 10.0,
        "model__hidden": (16,),
        "eval_batch_size": 26,
    }
    changes |= {"epochs": 24, "eval_every_epochs": 12, "runtime__log_every_steps": 5}
    config = digits_run("mlp", **changes)
    overrides = {key.replace("__", "."): value for key, value in changes.items()}
    overrides |= {"seeds": [0], "runtime.tensorboard": False}
    overrides |= {"runtime.cache_dir": config.runtime.cache_dir}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-c", WORKER, str(tmp_path / "two"), json.dumps(overrides)]
    command += [f"--coordinator={address}", "--hosts=2"]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_NUM_CPU_DEVICES": "1",
    }
    options = {"cwd": ROOT, "env": environment, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([*command, f"--host={i}"], **options) for i in (1, 0)]
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    stops = [[line for line in text.splitlines() if "stopped at" in line] for text in errors]
    assert stops[0] == stops[1] and len(stops[0]) == 1

    alone = train_and_evaluate(config, tmp_path / "one")
    together = read_json(tmp_path / "two" / "summary.json")
    assert together["metrics"]["test"]["count"] == alone["metrics"]["test"]["count"] > 26
    one, two = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [(x["step"], x["split"]) for x in one] == [(x["step"], x["split"]) for x in two]
    losses = [[line["loss"] for line in lines] for lines in (one, two)]
    np.testing.assert_allclose(*losses, rtol=1e-3)
