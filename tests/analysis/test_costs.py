"""Costs as they were stored, and speeds measured warm and in turn."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from analysis import costs
from analysis.compare import compare
from analysis.forward import load_classifier, load_test_images
from analysis.page.tables import NONE
from analysis.runs import load_runs
from tests.analysis.fabricate import write_run


def of_copy(workdir, output):
    """The comparison of a workdir, whose report goes elsewhere."""
    (output / "report").mkdir()
    return replace(compare(workdir, load_runs(workdir)), workdir=output)


def column(table, name):
    return {row[0]: row[table.columns.index(name)] for row in table.rows}


def test_models_take_turns_after_a_warm_up_and_slow_ones_sit_out(monkeypatch):
    now, log, takes = [0.0], [], {"a": 1 / 32, "b": 1 / 8, "slow": 7 / 8}
    monkeypatch.setattr(costs.time, "perf_counter", lambda: now[0])

    def call(name):
        log.append(name)
        now[0] += takes[name] * (10 if log.count(name) == 1 else 1)  # the first call compiles

    seconds = costs.time_in_turn({name: lambda name=name: call(name) for name in takes}, 5)
    assert {name: np.median(s) for name, s in seconds.items()} == pytest.approx(takes)
    assert {name: len(s) for name, s in seconds.items()} == {"a": 5, "b": 5, "slow": 3}
    rounds = log[6:]  # after two calls of each
    assert rounds[:8] == ["a"] * 6 + ["b", "slow"] and rounds[8:16] == ["b", "slow"] + ["a"] * 6
    assert now[0] < 20


def test_a_batch_fits_the_time():
    assert [costs.fitting_batch(s, 256) for s in (1e-6, 1 / 256, 0.01, 0.3, 0.6, 7.0)] == [
        256, 256, 64, 2, 1, 1,
    ]  # fmt: skip
    assert costs.fitting_batch(1e-3, 300) == 300


def test_a_timed_call_gives_the_logits_of_uint8_images(digits_workdir, monkeypatch):
    run = next(run for run in load_runs(digits_workdir) if run.model == "cnn")
    images = load_test_images(run)[:6]
    monkeypatch.setattr(costs.np.random, "default_rng", lambda seed: Fixed(images))
    logits = costs.compiled_prediction(load_classifier(run), 8, 6)()
    np.testing.assert_allclose(logits, run.test["logits"][:6], atol=1e-4)


class Fixed:
    """A generator that draws given images."""

    def __init__(self, images):
        self.images = images

    def integers(self, low, high, shape, dtype):
        assert (low, high, dtype, shape) == (0, 256, np.uint8, self.images.shape)
        return self.images


def test_the_chapter_measures_every_model(digits_workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "SECONDS", 0.05)
    comparison = of_copy(digits_workdir, tmp_path)
    section = costs.costs_section(comparison, rounds=3, batch=8)
    assert section.data.keys() == {"knn", "linear", "cnn"} and not section.warnings
    for speed in section.data.values():
        low, high = speed["milliseconds_quartiles"]
        assert 0 < low <= speed["milliseconds_at_1"] <= high
        assert speed["images_per_second"] > 0 and speed["batch"] <= 8
    json.dumps(section.data)
    (table,), (how,) = section.tables, section.details
    assert "latency, ms per image" in (tmp_path / "report" / "pareto.svg").read_text()
    assert column(table, "multiply-adds")["linear"] == "1.92 k"
    assert (
        column(table, "training step memory")["knn"]
        == NONE
        != column(table, "training step memory")["cnn"]
    )
    assert " to " in column(table, "prediction images/s")["cnn"]
    about = " ".join(how.lines)
    assert jax.devices()[0].device_kind in about and "uint8" in about
    assert "predicts fastest" in section.finding


def test_runs_of_an_older_version_and_lost_weights_are_shown(tmp_path):
    for model, name in (("linear", "old"), ("a<b>", "new")):
        path = write_run(tmp_path, model, 0) / "summary.json"
        if name == "old":
            summary = json.loads(path.read_text())
            summary["cost"] = {"parameters": 10, "flops_per_image": 3e6, "seconds": 4.0, "device": "1 x cpu"}  # fmt: skip
            path.write_text(json.dumps(summary))
    comparison = of_copy(tmp_path, tmp_path)
    for rounds, warned in ((0, 1), (3, 3)):  # the weights of both are gone
        section = costs.costs_section(comparison, rounds=rounds)
        (table,) = section.tables
        assert column(table, "multiply-adds") == {"linear": "1.5 M", "a<b>": "1 M"}
        assert column(table, "compilation, s")["linear"] == NONE
        assert not any(name.startswith(("latency", "prediction")) for name in table.columns)
        assert section.data == {} and len(section.warnings) == warned
        assert section.finding == "a<b> is both the cheapest and the most accurate model."
        assert "older version" in section.warnings[-1]
        text = (tmp_path / "report" / "pareto.svg").read_text()
        assert "memory of a training step, bytes" in text
    assert not any("nan" in cell for row in table.rows for cell in row)
