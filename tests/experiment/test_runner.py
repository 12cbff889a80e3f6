import json
import signal

import pytest
from ml_collections import ConfigDict

from errors import Interrupted, UserError
from experiment import runner
from experiment.grid import Run
from experiment.machine import locked
from experiment.runner import GROUP, Signals, divide, kin, train_group

RUN = Run("cnn/seed0", ConfigDict())
SEEDS = [Run(f"cnn/seed{seed}", ConfigDict({"seed": seed, "epochs": 1})) for seed in range(5)]
DONE = {"status": "complete", "metrics": {"test": {"accuracy": 0.5, "count": 4}}}


class Never(Signals):
    requested = False

    def __init__(self):
        """Leaves the signals of the tests alone."""


def train(tmp_path, outcome, runs=(RUN,)):
    """Trains with a stand-in that writes and returns a summary, or raises; returns what is held."""

    def stand_in(configs, run_dirs, should_stop):
        assert not should_stop()
        if isinstance(outcome, Exception):
            raise outcome
        for run_dir in run_dirs:
            (run_dir / "summary.json").write_text(json.dumps(outcome))
        return [outcome for _ in configs]

    titles = {run.name: f"[{run.name}]" for run in runs}
    return train_group(runs, tmp_path, titles, stand_in, Never())


def test_a_run_held_by_another_process_is_left_to_it(tmp_path, capsys):
    (tmp_path / RUN.name).mkdir(parents=True)
    with locked(tmp_path / RUN.name / ".lock"):
        assert train(tmp_path, DONE) == {RUN.name}
    assert "another process" in capsys.readouterr().out
    assert train(tmp_path, DONE) == set()
    assert "0.5000 on 4 images" in capsys.readouterr().out
    assert train(tmp_path, ValueError("never called")) == set()
    assert "complete already" in capsys.readouterr().out


@pytest.mark.parametrize("error", [UserError("the disk is full"), ValueError("odd")])
def test_a_failure_is_recorded_and_tried_again(tmp_path, capsys, error):
    assert train(tmp_path, error) == set()
    summary = json.loads((tmp_path / RUN.name / "summary.json").read_text())
    assert summary["status"] == "failed" and str(error) in summary["error"]
    assert bool(summary["traceback"]) == isinstance(error, ValueError)
    assert train(tmp_path, DONE) == set()
    assert json.loads((tmp_path / RUN.name / "summary.json").read_text()) == DONE


def test_an_interruption_records_nothing(tmp_path, capsys):
    assert train(tmp_path, Interrupted("stopped at step 3")) == set()
    assert "stopped at step 3" in capsys.readouterr().out
    assert not (tmp_path / RUN.name / "summary.json").exists()


def test_a_group_is_locked_and_recorded_run_by_run(tmp_path, capsys):
    """A run held elsewhere is left to that process; a finished one is not written again."""
    (tmp_path / "cnn/seed1").mkdir(parents=True)
    (tmp_path / "cnn/seed2").mkdir(parents=True)
    (tmp_path / "cnn/seed2/summary.json").write_text(json.dumps(DONE))
    with locked(tmp_path / "cnn/seed1/.lock"):
        assert train(tmp_path, DONE, SEEDS[:3]) == {"cnn/seed1"}
    out = capsys.readouterr().out
    assert "[cnn/seed0]: test accuracy" in out and "[cnn/seed2]: complete already" in out
    assert "[cnn/seed1]: another process" in out and "[cnn/seed2]: test accuracy" not in out
    assert train(tmp_path, ValueError("odd"), SEEDS[:3]) == set()
    status = [
        json.loads((tmp_path / run.name / "summary.json").read_text())["status"]
        for run in SEEDS[:3]
    ]
    assert status == ["complete", "failed", "complete"]


def names(groups):
    return ["".join(run.name[-1] for run in group) for group in groups]


def test_runs_are_divided_by_kin_and_interrupted_groups_come_together(tmp_path):
    other = Run("cnn/seed0_b", ConfigDict({"seed": 0, "epochs": 2}))
    at_once = {kin(SEEDS[0].config): 3, kin(other.config): 1}
    assert names(divide([*SEEDS, other], tmp_path, at_once)) == ["012", "34", "b"]

    def note(seeds, **files):
        for seed in seeds:
            folder = tmp_path / f"cnn/seed{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                (folder / f"{name}.json").write_text(json.dumps(content))

    note("1", summary=DONE)
    assert names(divide(SEEDS, tmp_path, at_once)) == ["1", "023", "4"]
    group = {"runs": ["cnn/seed1", "cnn/seed2", "cnn/seed4"]}
    note("124", group=group)
    assert GROUP == "group.json"
    assert names(divide(SEEDS, tmp_path, at_once)) == ["124", "03"]
    assert names(divide(SEEDS[:4], tmp_path, at_once)) == ["1", "023"]  # other seeds than then
    assert names(divide(SEEDS, tmp_path, at_once | {kin(SEEDS[0].config): 1})) == list("10234")
    note("1", group={"runs": ["cnn/seed1"]})  # its state is of another group by now
    assert names(divide(SEEDS, tmp_path, at_once)) == ["1", "023", "4"]
    note("02", summary=DONE | {"status": "diverged"})
    note("34", summary={"status": "failed"})
    assert names(divide(SEEDS, tmp_path, at_once)) == ["0", "1", "2", "34"]


def test_a_signal_that_comes_twice_at_once_is_one_request(monkeypatch):
    now, sent, handlers = [0.0], [], {}
    monkeypatch.setattr(
        runner.signal, "signal", lambda number, handler: handlers.update({number: handler})
    )
    monkeypatch.setattr(runner.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(runner.os, "kill", lambda pid, number: sent.append(number))
    stop = Signals()
    assert not stop.requested
    for now[0] in (10.0, 10.5):
        handlers[signal.SIGTERM](signal.SIGTERM, None)
        assert stop.requested and not sent
    now[0] = 12.0
    handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert sent == [signal.SIGTERM] and handlers[signal.SIGTERM] == signal.SIG_DFL
