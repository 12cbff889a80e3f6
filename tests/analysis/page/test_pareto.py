import re
from dataclasses import replace

import numpy as np
import pytest

from analysis.compare import compare
from analysis.page import pareto
from analysis.page.section import Section
from analysis.runs import load_runs
from tests.analysis.fabricate import write_run


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for model in "abcd":
        write_run(folder, model, 0)
    made = compare(folder, load_runs(folder))
    changed = {"score": [0.9, 0.8, 0.7, 0.6], "parameters": [400, 10, 20, 0]}
    ends = {"ci95_low": [0.85, 0.7, 0.6, 0.5], "ci95_high": [0.95, 0.9, np.nan, 0.7]}
    return replace(made, table=made.table.assign(**changed, **ends))


def test_points_lie_where_their_numbers_are(comparison):
    labels = comparison.table.label.tolist()
    latency = Section(data={labels[0]: {"milliseconds_at_1": 2.0}, labels[1]: {"other": 1}})
    plots = {plot.title: plot for plot in pareto.plots(comparison, [latency])}
    assert "latency, ms per image" not in plots  # measured of one model alone
    plot = plots["parameters"]
    assert plot.missing == labels[3:]  # no parameters, no place on a logarithm
    assert [point.model for point in plot.points] == labels[:3]
    assert [point.front for point in plot.points] == [True, True, False]
    first, second, third = plot.points
    assert second.x < third.x < first.x and first.y < second.y < third.y
    assert first.high < first.y < first.low
    assert third.x - second.x == pytest.approx((first.x - third.x) / np.log2(20), abs=0.2)
    assert f"{second.x},{second.y} {first.x},{second.y} {first.x},{first.y}" in plot.front


def test_names_do_not_cover_each_other_and_ticks_are_few(comparison):
    rows = comparison.table.sample(60, replace=True, random_state=0).reset_index(drop=True)
    draw = np.random.default_rng(0)
    rows = rows.assign(
        label=[f"model {i}" for i in range(60)],
        parameters=10 ** draw.uniform(1, 8, 60),
        score=draw.uniform(0.2, 0.9, 60),
    )
    plots = pareto.plots(replace(comparison, table=rows), [])
    plot = next(plot for plot in plots if plot.title == "parameters")
    named = [point for point in plot.points if point.name]
    assert 1 <= len(named) <= sum(point.front for point in plot.points)
    assert 3 <= len(plot.ticks_x) <= 9 and 3 <= len(plot.ticks_y) <= 8
    assert all(re.fullmatch(r"[\d.]+( [kMG])?", text) for _, text in plot.ticks_x)


def test_equal_models_are_drawn(comparison):
    equal = comparison.table.assign(score=0.5, ci95_low=0.5, ci95_high=0.5, parameters=7)
    plots = pareto.plots(replace(comparison, table=equal), [])
    assert all(np.isfinite([p.x, p.y, p.low, p.high]).all() for plot in plots for p in plot.points)
