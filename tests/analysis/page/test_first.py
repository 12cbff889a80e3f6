from dataclasses import replace

import numpy as np
import pytest

from analysis.compare import compare
from analysis.page import first
from analysis.page.section import Section
from analysis.runs import load_runs
from tests.analysis.fabricate import write_run


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for model, seeds in (("a", 2), ("b", 1)):
        for seed in range(seeds):
            write_run(folder, model, seed)
    made = compare(folder, load_runs(folder))
    changed = {"group": ["a", "ab"], "rank": ["1", "2="], "planned": [2, 3]}
    changed |= {"state": ["", "1 of 3 seeds completed; 2 diverged"], "score": [0.9, 0.8]}
    changed |= {"ci95_low": [0.85, np.nan], "ci95_high": [0.95, np.nan], "seeds": [2, 1]}
    return replace(made, table=made.table.assign(**changed))


def test_the_header_says_what_was_compared(comparison):
    facts = dict(first.facts(comparison))
    assert facts["Images"] == "4 train, 4 validation, 4 test" and facts["Classes"] == "4"
    assert facts["Data"] == "data that is gone · folder" and facts["Seeds"] == "0, 1"
    assert facts["Fingerprint"] == "0" * 12 and facts["Device"] == "1 x cpu"


def test_columns_are_those_that_were_measured(comparison):
    labels = comparison.table.label.tolist()
    plain = first.summary(comparison, [])
    assert [column.title for column in plain.columns] == [
        "Accuracy", "Group", "Cost", "Calibration",
    ]  # fmt: skip
    assert not any(column.chapter for column in plain.columns)
    costs = Section("Accuracy and cost", data={labels[0]: {"milliseconds_at_1": 1.2345}})
    robust = Section("Robustness", data={label: {"corrupted": 0.5} for label in labels})
    full = first.summary(comparison, [costs, robust])
    assert len(full.columns) == 6  # and the model
    assert {c.title: c.chapter for c in full.columns}["Latency"] == "Accuracy and cost"
    assert [cell.text for cell in full.rows[0].cells[3:]] == [
        "1.23",
        full.rows[0].cells[4].text,
        "50.0",
    ]
    assert full.rows[1].cells[3].text == "–"


def test_a_row_says_its_rank_runs_and_interval(comparison):
    best, other, base = first.summary(comparison, []).rows
    assert base.runs == "majority class" and base.label.startswith("always ") and not base.interval
    assert (best.rank, best.runs, best.state) == ("1", "2 seeds", "")
    assert (other.rank, other.runs) == ("2=", "1 of 3 seeds") and "2 diverged" in other.state
    assert other.interval is None  # unknown, and not of zero width
    ends = best.interval
    assert 0 < ends.low < ends.mean < ends.high < first.WIDTH
    assert ends.mean - ends.low == pytest.approx(ends.high - ends.mean, abs=0.2)
    assert ends.words == "85.00 to 95.00"


@pytest.mark.parametrize("scores", [[0.5, 0.5], [0.0, 1.0], [0.999, 1.0]])
def test_the_scale_holds_every_interval(comparison, scores):
    table = comparison.table.assign(score=scores, ci95_low=scores, ci95_high=scores)
    made = first.summary(replace(comparison, table=table), [])
    assert all(0 < row.interval.mean < first.WIDTH for row in made.rows[:2])
    low, high = map(float, made.scale)
    assert low < high and low <= 100 * min(scores) <= 100 * max(scores) <= high
