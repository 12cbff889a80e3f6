"""Flags of fields that a config need not mention."""

import sys

import pytest
from absl import flags
from ml_collections import config_flags

from experiment import command
from tests.conftest import ROOT


@pytest.fixture
def parsed(monkeypatch):
    """Returns a function: the overrides of a command line, and what sys.argv was afterwards."""

    def parse(*arguments: str) -> dict:
        values = flags.FlagValues()
        monkeypatch.setattr(flags, "FLAGS", values)
        monkeypatch.setattr(command, "_given", {})
        config = config_flags.DEFINE_config_file("config", None, flag_values=values)
        argv = ["main.py", f"--config={ROOT}/configs/digits.py:cnn", *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        assert command._parse_flags(argv) == ["main.py"] and sys.argv == argv
        return command.config_overrides(config)

    return parse


def test_open_fields_are_taken_out_before_absl_sees_them(parsed, tmp_path):
    (tmp_path / "flags").write_text("--config.phase.all.train=head\n")
    overrides = parsed(
        "--config.per_model.cnn.optimizer.learning_rate=0.01",
        "--config.per_model.cnn.weights", "run:a=b",
        "--config.per_model.cnn.data.exclude_leaks",
        "--noconfig.per_model.cnn.runtime.tensorboard",
        "-config.model.dropout=-1",
        "--config.epochs=3",
        f"--flagfile={tmp_path / 'flags'}",
    )  # fmt: skip
    assert overrides == {
        "per_model.cnn.optimizer.learning_rate": "0.01",
        "per_model.cnn.weights": "run:a=b",
        "per_model.cnn.data.exclude_leaks": "true",
        "per_model.cnn.runtime.tensorboard": "false",
        "model.dropout": "-1",
        "epochs": 3,
        "phase.all.train": "head",
    }


def test_an_unknown_field_ends_with_the_nearest(parsed, capsys):
    with pytest.raises(SystemExit, match="2"):
        parsed("--config.per_model.cnn.epochs=3", "--config.epoch=3")
    assert "no such config field: 'epoch'. Did you mean 'epochs'" in capsys.readouterr().err
