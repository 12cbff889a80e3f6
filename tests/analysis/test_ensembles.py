import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis import ensembles
from analysis.combine.gains import by_validation
from analysis.compare import compare, compare_workdir
from analysis.evaluate import mean_probability, softmax
from analysis.runs import group_runs, load_runs
from errors import UserError
from tests.analysis.fabricate import write_run
from tests.conftest import ROOT


def fabricate(workdir, seeds=2, models=("a <b>", "b $x$", "c"), **options):
    for model in models:
        for seed in range(seeds):
            write_run(workdir, model, 10 * ord(model[0]) + seed, 0.7, **options)
    return load_runs(workdir)


def with_logits(run, change):
    """The run with other logits, change(part's arrays, part's name)."""
    changed = replace(run)
    for part in ("test", "validation"):
        arrays = dict(getattr(run, part))
        arrays["logits"] = change(arrays, part).astype(np.float32)
        changed.__dict__[part] = arrays
    return changed


def rows_of(runs):
    rows, notes = ensembles.stored_rows(group_runs(runs))
    return ensembles.figures(rows).set_index("what"), notes


def test_the_mean_probability_by_hand(tmp_path):
    runs = fabricate(tmp_path, seeds=2, models=("a",))
    row = rows_of(runs)[0].loc["a: seed ensemble"]
    mean = (softmax(runs[0].test["logits"]) + softmax(runs[1].test["logits"])) / 2
    right, labels = mean.argmax(axis=1) == runs[0].test["labels"], runs[0].test["labels"]
    singles = np.array([run.correct.mean() for run in runs])
    assert row.accuracy == right.mean() and row.cost == 2 and row.members == "2"
    assert row.over_mean == pytest.approx(right.mean() - singles.mean())
    on_validation = [
        (r.validation["logits"].argmax(1) == r.validation["labels"]).mean() for r in runs
    ]
    assert on_validation[0] != on_validation[1]
    assert row.over_best == pytest.approx(right.mean() - singles[np.argmax(on_validation)])
    assert row.nll == pytest.approx(-np.log(mean[np.arange(len(labels)), labels]).mean())
    assert row.gains_tested == 2


def test_equal_members_gain_nothing_and_the_interval_says_how_sure(tmp_path):
    first, *others = fabricate(tmp_path, seeds=3, models=("a",))
    runs = [
        first,
        *(with_logits(run, lambda _, part: getattr(first, part)["logits"]) for run in others),
    ]
    row = rows_of(runs)[0].iloc[0]
    assert row.over_mean == row.over_best == 0 and row.members == "3, all equal"
    assert row.over_mean_ci95_low < -0.005 and row.over_mean_ci95_high > 0.005
    assert row.nll == pytest.approx(row.nll_before, abs=1e-6)


def test_independent_errors_gain_what_the_binomial_says(tmp_path):
    def independent(run):
        def vote(arrays, part):  # two classes, equal confidence: the majority decides
            labels = arrays["labels"]
            right = np.random.default_rng([run.seed, len(part)]).random(len(labels)) < 0.8
            return 4.0 * np.eye(2)[np.where(right, labels, 1 - labels)]

        return with_logits(run, vote)

    runs = fabricate(tmp_path, seeds=3, models=("a",), count=5000, classes=["x", "y"])
    row = rows_of([independent(run) for run in runs])[0].iloc[0]
    expected = 0.8**3 + 3 * 0.8**2 * 0.2 - 0.8
    assert row.over_mean == pytest.approx(expected, abs=0.012)
    assert row.over_mean_ci95_low < expected < row.over_mean_ci95_high
    assert row.over_mean_ci95_low > 0


def test_all_models_together_and_what_is_left_out(tmp_path):
    runs = fabricate(tmp_path)
    write_run(tmp_path, "few", 0, count=50)
    write_run(tmp_path, "lost", 0, status="failed")
    table, notes = rows_of(load_runs(tmp_path))
    every = np.mean([softmax(run.test["logits"]) for run in runs], axis=0)
    together = table.loc["all models together"]
    assert together.members == "6 (3 models)" and together.cost == 6
    assert together.accuracy == (every.argmax(axis=1) == runs[0].test["labels"]).mean()
    assert "No seed ensemble of a single seed: few." in notes
    assert any("their images differ: few/seed0" in note for note in notes)
    assert "lost" not in " ".join([*table.index, *notes])


def test_greedy_selection_finds_the_members_that_help():
    good = np.where(np.arange(100) < 50, 0.9, 0.3)
    own = np.array([good, good[::-1], np.full(100, 0.05)])  # two that complement each other
    assert ensembles.select_members(own) == [0, 1]
    assert ensembles.select_members(own[[0, 0, 2]]) == [0]
    helper = np.where(np.arange(100) < 50, 1e-4, 0.8)  # too bad to be a half
    bag = ensembles.select_members(np.array([good, helper]))
    assert bag.count(0) > bag.count(1) > 0
    assert ensembles.select_members(np.zeros((2, 10))) == [0]  # no infinite loss, no endless loop


def test_test_labels_change_no_choice(tmp_path):
    def choices(runs):
        rows, notes = ensembles.stored_rows(group_runs(runs))
        best = {row.what: row.over_best for row in rows}
        return [(row.what, row.members) for row in rows], notes, best

    runs = fabricate(tmp_path, seeds=3, models=("a",))
    order = np.random.default_rng(0).permutation(len(runs[0].test["labels"]))
    for run in runs:
        _ = run.validation
    before = choices(runs)
    for run in runs:
        run.test["labels"] = run.test["labels"][order]
        run.__dict__.pop("correct", None)
    after = choices(runs)
    assert before[:2] == after[:2]
    best = by_validation(runs)[0]
    mean = mean_probability(runs).argmax(axis=1) == best.test["labels"]
    assert (after[2]["a: seed ensemble"] == mean.astype(float) - best.correct).all()


def test_the_chapter(tmp_path):
    comparison = compare(tmp_path, fabricate(tmp_path))
    made = ensembles.ensembles_section(comparison)
    table = made.tables[0]
    assert table.columns[:3] == ["what", "members", "test acc. %"] and len(table.columns) == 7
    assert [row[0] for row in table.rows][-1] in ("all models together", "greedy selection")
    assert f"Bonferroni over the {2 * len(table.rows)} gains" in table.caption
    assert "established" not in str(made) and "nan" not in str(table.rows)
    assert made.finding.startswith("Seed ensembles ") and len(made.finding) < 200
    assert "all models together (" in made.finding and "the best of them." in made.finding
    assert len(made.data["rows"]) == len(table.rows)
    alone = compare(tmp_path, [run for run in comparison.runs[:1]])
    assert ensembles.ensembles_section(alone) is None


def test_groups_widen_the_intervals(tmp_path):
    class Grouped(type(fabricate(tmp_path, seeds=2, models=("a",))[0])):
        clusters = np.repeat(range(20), 10)

    runs = load_runs(tmp_path)
    alone = rows_of(runs)[0].iloc[0]
    grouped = rows_of(
        [
            Grouped(**{k: v for k, v in vars(run).items() if k in run.__dataclass_fields__})
            for run in runs
        ]
    )[0].iloc[0]
    assert grouped.over_mean == alone.over_mean
    assert grouped.over_mean_ci95_high - grouped.over_mean_ci95_low > (
        alone.over_mean_ci95_high - alone.over_mean_ci95_low
    )


def test_command(tmp_path):
    fabricate(tmp_path)
    command = [sys.executable, "-m", "analysis.ensembles", str(tmp_path), "--nomodels"]
    done = subprocess.run(  # noqa: S603
        [*command, f"--output={tmp_path / 'out'}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "a <b>: seed ensemble" in done.stdout and "gain over members" in done.stdout
    assert pd.read_csv(tmp_path / "out" / "ensembles.csv").used.all()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no complete run"):
        compare_workdir(str(tmp_path / "empty"))
