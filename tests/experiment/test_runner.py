import json

import pytest
from ml_collections import ConfigDict

from errors import Interrupted, UserError
from experiment.grid import Run
from experiment.machine import locked
from experiment.runner import train_one

RUN = Run("cnn/seed0", ConfigDict())
DONE = {"status": "complete", "metrics": {"test": {"accuracy": 0.5, "count": 4}}}


class Never:
    requested = False


def train(tmp_path, outcome):
    """Trains with a stand-in that writes and returns a summary, or raises."""

    def stand_in(config, run_dir, should_stop):
        assert not should_stop()
        if isinstance(outcome, Exception):
            raise outcome
        (run_dir / "summary.json").write_text(json.dumps(outcome))
        return outcome

    return train_one(RUN, tmp_path, "[1/1]", stand_in, Never())


def test_a_run_held_by_another_process_is_left_to_it(tmp_path, capsys):
    (tmp_path / RUN.name).mkdir(parents=True)
    with locked(tmp_path / RUN.name / ".lock"):
        assert not train(tmp_path, DONE)
    assert "another process" in capsys.readouterr().out
    assert train(tmp_path, DONE)
    assert "0.5000 on 4 images" in capsys.readouterr().out
    assert train(tmp_path, ValueError("never called"))
    assert "complete already" in capsys.readouterr().out


@pytest.mark.parametrize("error", [UserError("the disk is full"), ValueError("odd")])
def test_a_failure_is_recorded_and_tried_again(tmp_path, capsys, error):
    assert train(tmp_path, error)
    summary = json.loads((tmp_path / RUN.name / "summary.json").read_text())
    assert summary["status"] == "failed" and str(error) in summary["error"]
    assert bool(summary["traceback"]) == isinstance(error, ValueError)
    assert train(tmp_path, DONE)


def test_an_interruption_records_nothing(tmp_path, capsys):
    assert train(tmp_path, Interrupted("stopped at step 3"))
    assert "stopped at step 3" in capsys.readouterr().out
    assert not (tmp_path / RUN.name / "summary.json").exists()
