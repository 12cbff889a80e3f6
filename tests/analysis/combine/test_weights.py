from dataclasses import asdict

import numpy as np
import pytest

from analysis.combine import weights
from analysis.combine.gains import by_validation, figures
from analysis.compare import compare
from analysis.ensembles import averages_section
from analysis.evaluate import softmax
from analysis.forward import load_classifier, load_images
from analysis.runs import group_runs, load_runs
from errors import UserError
from experiment.files import write_json
from models.weights.own import read_own
from tests.analysis.fabricate import write_run
from training.weights import find_weights


@pytest.fixture
def runs(digits_workdir):
    return {run.name: run for run in load_runs(digits_workdir)}


@pytest.fixture
def cnns(runs):
    return [runs["cnn/seed0"], runs["cnn/seed1"]]


def arrays_of(run):
    return read_own(find_weights(run.path))["arrays"]


def test_the_average_of_equal_weights_is_the_run_bit_for_bit(cnns):
    run, stored = cnns[0], arrays_of(cnns[0])
    averaged = weights.average_weights([run] * 3)
    assert stored.keys() == averaged.keys()
    for path, array in stored.items():
        assert averaged[path].dtype == array.dtype and averaged[path].tobytes() == array.tobytes()
    images = load_images(run, "test")[:20]
    expected = weights.probabilities_of(load_classifier(run), images)
    assert (weights.probabilities_of(weights.soup([run] * 3), images) == expected).all()


def test_the_average_is_the_mean_of_every_array(cnns):
    averaged, (first, second) = weights.average_weights(cnns), map(arrays_of, cnns)
    for path, array in averaged.items():
        np.testing.assert_allclose(array, (first[path] + second[path]) / 2, rtol=1e-6, atol=1e-9)
    assert any((first[path] != second[path]).any() for path in first)


def test_other_architectures_are_refused(runs):
    with pytest.raises(UserError, match=r"seed0.* cannot be averaged: they differ in model"):
        weights.average_weights([runs["cnn/seed0"], runs["linear/seed0"]])


def made_up(run, right, seed=0):
    """Probabilities of a run's validation images, the first `right` of which are right."""
    labels = run.validation["labels"]
    predicted = np.where(np.arange(len(labels)) < right, labels, (labels + 1) % 4)
    return softmax(5.0 * np.eye(4)[predicted])


@pytest.fixture
def three(tmp_path):
    """Three seeds that get 150, 160 and 140 of 200 validation images right."""
    for seed in range(3):
        write_run(tmp_path, "linear", seed)
    runs = load_runs(tmp_path)
    for run, right in zip(runs, (150, 160, 140), strict=True):
        run.validation["logits"] = np.log(made_up(run, right)).astype(np.float32)
    return runs


@pytest.mark.parametrize(
    ("all_right", "pair_right", "chosen", "text"),
    [
        (165, 160, [0, 1, 2], "82.50 > 80.00: yes"),
        (150, 162, [1, 0], "81.00 > 80.00: yes"),
        (160, 159, [0, 1, 2], "80.00 = 80.00: yes"),
        (20, 30, [], "10.00 < 80.00: no"),
    ],
)
def test_validation_chooses_between_all_seeds_some_and_none(
    three, monkeypatch, all_right, pair_right, chosen, text
):
    def predict(members, images):
        return made_up(three[0], {2: pair_right, 3: all_right}[len(members)])

    monkeypatch.setattr(weights, "soup", lambda members: members)
    monkeypatch.setattr(weights, "probabilities_of", predict)
    assert [run.seed for run in by_validation(three)] == [1, 0, 2]
    members, said = weights.choose_soup(three, None)
    assert [run.seed for run in members] == chosen and said == text
    row = weights.soup_row("linear", three, {"validation": None, "test": None})
    shown = figures([row]).iloc[0]
    assert shown.used == bool(chosen) and np.isnan(shown.accuracy) == (not chosen)
    assert shown.gains_tested == 2 * bool(chosen)


@pytest.mark.parametrize("right", [190, 100])
def test_validation_decides_on_mirror_images(three, monkeypatch, right):
    seen = []

    def predict(model, images):
        seen.append(images)
        return made_up(three[0], right) ** 3  # surer than the run itself

    monkeypatch.setattr(weights, "load_classifier", lambda run: run)
    monkeypatch.setattr(weights, "probabilities_of", predict)
    images = np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3)
    row = weights.flip_row("linear", three, {"validation": images, "test": images})
    assert (seen[0] == images[:, :, [3, 2, 1, 0]]).all()
    assert (row.correct.shape == (3, 200)) == (right == 190)
    assert row.validation.endswith(": no") == (right == 100)
    assert len(row.over_best) == 0 and row.cost == 2


def test_the_chapter_and_test_labels_that_change_no_choice(digits_workdir, tmp_path):
    def choices():
        comparison = compare(digits_workdir, load_runs(digits_workdir))
        for runs in comparison.groups.values():
            for run in runs:
                run.test["labels"] = change(run.test["labels"])
                run.__dict__.pop("correct", None)
        made = averages_section(comparison)
        by_what = {row["what"]: row for row in made.data["rows"]}
        keep = ("members", "validation", "used")
        return made, {what: [row[k] for k in keep] for what, row in by_what.items()}

    change = np.asarray
    made, before = choices()
    write_json(tmp_path / "section.json", asdict(made))  # as the report keeps it
    assert set(before) == {
        "cnn: weight average",
        "cnn: flip averaging",
        "linear: flip averaging",
    }
    assert "Left out (not trained by gradient): knn." in " ".join(made.text)
    assert made.finding.startswith("On validation, averaged weights hold up for ")
    assert made.tables[0].columns[2] == "on validation, %" and "nan" not in str(made.tables)
    change = np.random.default_rng(0).permutation
    assert choices()[1] == before


def test_a_workdir_of_neighbours_alone_has_no_chapter(digits_workdir):
    groups = group_runs(run for run in load_runs(digits_workdir) if run.model == "knn")
    assert weights.model_rows(groups)[0] == []
