import itertools
import json
import sys

import numpy as np
import pytest

from analysis import report, tuning
from analysis.compare import compare
from analysis.runs import load_runs
from tests.analysis.fabricate import write_run

SPACE = {"optimizer.learning_rate": "log:0.0001..0.1", "augment.mixup": "0,0.2"}


def trial(number, accuracy=None, status="complete", rate=0.003, loss=None, **more):
    scores = {} if accuracy is None else {"accuracy": accuracy, "loss": loss or 1.5 - accuracy}
    parameters = {"optimizer.learning_rate": rate * (1 + number / 100), "augment.mixup": 0.2}
    base = {"number": number, "parameters": parameters, "status": status, "seconds": 30.0}
    return base | scores | more


def search(*trials, budget=None, winner=0, space=SPACE):
    budget = budget or len(trials)
    return {"space": space, "budget": budget, "trials": list(trials), "winner": winner}


def write_search(workdir, method="random", **labels):
    """Writes search.json, and the winners' fields into the configs of the runs."""
    (workdir / "search").mkdir()
    content = {"method": method, "seed": 0, "prune": "none", "budget": 4, "labels": labels}
    (workdir / "search/search.json").write_text(json.dumps(content))
    for label, of in labels.items():
        for path in workdir.glob(f"{label}/seed*/config.json"):
            config = json.loads(path.read_text())
            fields = of["trials"][of["winner"]]["parameters"] if of["space"] else {}
            config["optimizer"] = {"learning_rate": fields.get("optimizer.learning_rate")}
            config["augment"] = {"mixup": 0.2}
            path.write_text(json.dumps(config))


def compared(workdir):
    comparison = compare(workdir, load_runs(workdir))
    comparison.output.mkdir(exist_ok=True)
    return comparison


@pytest.fixture
def models(tmp_path):
    for model, accuracy in (("cnn", 0.9), ("mlp", 0.8), ("knn", 0.7)):
        write_run(tmp_path, model, 0, accuracy)
    return tmp_path


def test_expected_best_is_the_mean_over_all_choices():
    scores = np.random.default_rng(0).normal(size=7)
    scores[3] = scores[5]  # a tie
    found = tuning.expected_best(scores)
    for k in range(1, 8):
        brute = [max(chosen) for chosen in itertools.combinations(scores, k)]
        assert found[k - 1] == pytest.approx(np.mean(brute), abs=1e-12)
    assert tuning.expected_best(np.array([2.0])) == [2.0]
    many = tuning.expected_best(np.arange(2000.0))  # no overflow
    assert many[0] == pytest.approx(999.5) and many[-1] == pytest.approx(1999)


def test_expected_best_is_unbiased_for_independent_trials():
    """The highest of k uniform numbers is k / (k + 1) on average."""
    draws = np.random.default_rng(1).random((4000, 12))
    found = np.array([tuning.expected_best(scores) for scores in draws])
    error = found.mean(axis=0) - np.arange(1, 13) / np.arange(2, 14)
    assert (np.abs(error) < 4 * found.std(axis=0) / np.sqrt(len(draws))).all()


def test_the_page_says_whether_rates_were_chosen_by_hand(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)  # the page is made without it
    assert tuning.note(compared(models)) == "untuned: rates were chosen by hand"
    assert tuning.tuning_section(compared(models)) is None
    write_search(models, cnn=search(trial(0, 0.9), trial(1, 0.8)))
    made = report.write_report(models, models=False)
    text = (
        "tuned: 2 trials of random search for each model; untuned, with rates chosen by hand: mlp"
    )
    assert f"\n{text}\n" in made.text and text in made.page.read_text()
    assert "<h2>Tuning</h2>" in made.page.read_text()


def test_a_note_of_budgets_and_of_what_needs_none(models):
    write_search(
        models, "grid", cnn=search(trial(0, 0.9), trial(1, 0.8)), mlp=search(trial(0, 0.5))
    )
    assert tuning.note(compared(models)) == "tuned: 1 to 2 trials of grid search for each model"
    stored = models / "search/search.json"
    content = json.loads(stored.read_text())
    for changes in ({"winner": 1}, {"winner": 1, "budget": 1}):  # of more trials, or of fewer
        of = content["labels"]["cnn"]
        of |= changes | {"trials": [of["trials"][0], trial(1, 0.99)]}
        of["trials"] = of["trials"][:: -1 if "budget" in changes else 1]
        stored.write_text(json.dumps(content))
        assert tuning.note(compared(models)).endswith("for each model; of an earlier winner: cnn")
    path = models / "cnn/seed0/config.json"
    config = json.loads(path.read_text())
    config["optimizer"]["learning_rate"] = 0.5  # of a hand
    path.write_text(json.dumps(config))
    assert tuning.note(compared(models)).endswith("chosen by hand: cnn")
    for model in ("cnn", "mlp"):
        path = models / model / "seed0/summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"settings": {}}))
    assert tuning.note(compared(models)) == ""


def test_who_wins_depends_on_the_number_of_trials(models):
    steady = search(*(trial(k, 0.8) for k in range(4)), winner=0)
    erratic = search(*(trial(k, a) for k, a in enumerate((0.5, 0.6, 0.55, 0.95))), winner=3)
    write_search(models, cnn=erratic, mlp=steady, knn=search(trial(0, 0.3), space={}))
    comparison = compared(models)
    section = tuning.tuning_section(comparison)
    # of 3 of the 4, three quarters hold 0.95: 0.95 * 0.75 + 0.6 * 0.25 = 0.8625
    curve = tuning._curves(comparison, {"cnn": erratic}, "accuracy")["cnn"]
    assert curve == pytest.approx([0.65, (3 * 0.95 + 0.6 + 0.6 + 0.55) / 6, 0.8625, 0.95])
    assert section.finding == (
        "Who has the best expected validation accuracy depends on the number of trials: "
        "with 1 to 2 mlp, from 3 on cnn."
    )
    assert [picture.file for picture in section.pictures] == ["tuning_budget.svg", "tuning_trials.svg"]  # fmt: skip
    assert all((comparison.output / picture.file).stat().st_size > 5000 for picture in section.pictures)  # fmt: skip
    (table,) = section.tables
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert rows["cnn"]["trials"] == "4" and rows["cnn"]["winner"] == "3"
    assert rows["cnn"]["learning_rate"] == "0.00309" and rows["knn"]["learning_rate"] == "–"
    assert rows["cnn"]["search"] == "2.0 min" and "pruned" not in table.columns
    assert "No searched field is of knn: one trial" in table.caption
    assert "The 9 trials took 4.5 min" in section.text[0] and "the 3 runs that" in section.text[0]


def test_trials_that_came_to_nothing_count(models):
    trials = (
        trial(0, 0.9), trial(1, status="diverged"), trial(2, 0.6, "pruned"),
        trial(3, status="failed"), trial(4, status="running"), trial(5, 0.99),
    )  # fmt: skip
    of = search(*trials, budget=5)
    write_search(models, "tpe", cnn=of, mlp=search(*(trial(k, 0.5) for k in range(5))))
    comparison = compared(models)
    section = tuning.tuning_section(comparison)
    found = tuning.read_search(comparison)["labels"]["cnn"]
    scores = tuning._scores(comparison, found, "accuracy")
    assert scores.tolist() == [0.9, 0.25, 0.6, 0.25]  # four classes of equal size
    losses = tuning._scores(comparison, found, "loss")
    assert -losses == pytest.approx([0.6, np.log(4), 0.9, np.log(4)])
    row = dict(zip(section.tables[0].columns, section.tables[0].rows[0], strict=True))
    assert row["trials"] == "4 of 5"
    assert [row[status] for status in ("complete", "pruned", "diverged", "failed")] == ["1"] * 4  # fmt: skip
    assert np.isnan(tuning._curves(comparison, {"cnn": found}, "accuracy")["cnn"][4])
    caption = section.pictures[0].caption
    assert (
        "Trials of tpe build on those before" in caption
        and "A trial that was pruned counts" in caption
    )
    assert "Hollow: pruned" in section.pictures[1].caption
    assert "Crosses at the top" in section.pictures[1].caption


@pytest.mark.parametrize(
    ("rate", "said"), [(0.00011, "low end"), (0.09, "high end"), (0.003, ""), (0.05, "")]
)
def test_a_winner_at_the_end_of_its_range_is_named(rate, said):
    text = " ".join(tuning._edges({"cnn": search(trial(0, 0.9, rate=rate))}))
    assert ("Near an end of their range" in text) == bool(said)
    assert not said or f"cnn (learning_rate at the {said})" in text
