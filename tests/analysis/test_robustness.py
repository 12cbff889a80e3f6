import json
import shutil
import subprocess
import sys
from copy import copy, deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_digits

from analysis import robustness
from analysis.forward import load_classifier, load_test_images, predict_logits
from analysis.runs import group_runs, load_runs
from analysis.stress.attacks import ATTACKS, attack
from analysis.stress.corruptions import corrupt
from analysis.stress.summary import CLEAN
from errors import UserError
from tests.analysis.fabricate import train_digits
from tests.conftest import ROOT

SIDE = 8
CHEAP = ("contrast", "occlusion")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, cache_dir):
    """Runs of three models on the digits at 8x8 pixels: linear twice, mlp and knn once."""
    folder, digits = tmp_path_factory.mktemp("runs"), load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    np.savez(folder / "digits.npz", images=images, labels=digits.target)
    data = {"data__source": "npz", "data__path": str(folder / "digits.npz")}
    data["data__image_size"] = SIDE
    return train_digits(folder, cache_dir, "linear,mlp,knn", "linear", epochs=4, **data)


@pytest.fixture(scope="module")
def groups(workdir):
    return group_runs(load_runs(workdir))


@pytest.fixture(scope="module")
def section(groups, tmp_path_factory):
    output = tmp_path_factory.mktemp("report")
    made = robustness.robustness_section(groups, output, 50, corruptions=CHEAP)
    return made, output


# --- measurement ----------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [2**30, 10 * 5 * 3 * SIDE**2])  # at once, or ten by ten
def test_outcomes_are_those_of_a_plain_loop(groups, limit, monkeypatch):
    monkeypatch.setattr(robustness, "BYTES", limit)
    pair = {label: groups[label] for label in ("mlp", "knn")}
    rows = np.arange(3, 43)
    outcomes = robustness.group_outcomes(pair, rows, ("contrast",))
    for label, (run,) in pair.items():
        model, labels = load_classifier(run), run.test["labels"][rows]
        images = load_test_images(run)[rows]  # digits are stored at this size
        right = outcomes[label]
        for severity in range(1, 6):
            changed = np.stack([corrupt(image, "contrast", severity) for image in images])
            expected = predict_logits(model, changed).argmax(axis=1) == labels
            assert (right["contrast", severity] == expected).all()
        assert right[CLEAN].shape == (1, 40) and (right[CLEAN][0] == run.correct[rows]).all()
    expected = attack(load_classifier(groups["mlp"][0]), images, labels)
    for condition, right in expected.items():
        assert (outcomes["mlp"][condition] == right).all()
    assert not any(name in ATTACKS for name, _ in outcomes["knn"])
    assert expected["PGD", 8].mean() < run.correct[rows].mean()


def test_the_data_may_have_moved(groups, workdir, tmp_path):
    one, rows = {"knn": [copy(groups["knn"][0])]}, np.arange(10)
    before = robustness.group_outcomes(one, rows, CHEAP[:1])["knn"]
    config = deepcopy(one["knn"][0].config)
    config["data"]["path"] = str(tmp_path / "gone.npz")
    one["knn"] = [replace(one["knn"][0], config=config)]
    moved = shutil.copy(workdir / "digits.npz", tmp_path / "digits.npz")
    after = robustness.group_outcomes(one, rows, CHEAP[:1], data_path=str(moved))["knn"]
    assert all((after[condition] == before[condition]).all() for condition in before)
    with pytest.raises(UserError, match="gone.npz"):
        robustness.group_outcomes(one, rows, CHEAP[:1])


def test_only_the_seeds_asked_for_are_attacked(groups):
    one = {"linear": groups["linear"]}
    first = robustness.group_outcomes(one, np.arange(10), CHEAP[:1])["linear"]
    both = robustness.group_outcomes(one, np.arange(10), CHEAP[:1], attacked=2)["linear"]
    assert first["PGD", 2].shape == (1, 10) and both["PGD", 2].shape == (2, 10)
    assert (first["PGD", 2][0] == both["PGD", 2][0]).all()
    assert first["contrast", 5].shape == both["contrast", 5].shape == (2, 10)


def test_spread_takes_every_class_in_proportion():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [100, 60, 20]))
    rows = robustness.spread(labels, 45)
    assert (np.diff(rows) > 0).all()
    assert np.abs(np.bincount(labels[rows]) - [25, 15, 5]).max() <= 1
    assert robustness.spread(labels, 500).tolist() == list(range(180))


# --- the chapter and the command ------------------------------------------------------------------


def test_section_compares_every_model(section, groups):
    made, output = section
    table = pd.read_csv(output / "robustness.csv")
    assert set(table.model) == {"linear", "mlp", "knn"} and set(table.images) == {50}
    corrupted = table[table.corruption.isin(CHEAP)]
    seeds = corrupted.groupby("model").seeds.unique().map(list).to_dict()
    assert seeds == {"linear": [2], "mlp": [1], "knn": [1]}
    attacked = table[table.corruption.isin(["FGSM", "PGD"])]
    assert set(attacked.model) == {"linear", "mlp"} and set(attacked.seeds) == {1}
    assert [picture.file for picture in made.pictures] == ["robustness.svg"]
    assert [item.picture.file for item in made.details if item.picture] == ["corruptions.png"]
    assert all((output / picture.file).stat().st_size > 5000 for picture in made.pictures)
    shown = pd.DataFrame(made.tables[0].rows, columns=made.tables[0].columns).set_index("model")
    assert len(made.tables[0].columns) <= 7
    pgd = "PGD 2/255, at most %"
    assert shown.loc["knn", pgd] == "–" != shown.loc["mlp", pgd]
    clean = table[table.corruption == "clean"].set_index("model").accuracy
    baseline = min(clean.index, key=lambda model: (clean[model], model))
    assert shown.loc[baseline, f"errors, % of {baseline}'s"] == "100"
    caption = made.tables[0].caption
    assert f"beside those of {baseline}" in caption and "over seeds and images" in caption
    assert "50 test images" in caption and "1 to 2 seeds of each model" in caption
    assert "has the highest accuracy under corruption" in made.finding
    assert json.loads(json.dumps(made.data, allow_nan=False))["knn"]["pgd"] is None
    for label, row in made.data.items():
        mean = corrupted[corrupted.model == label].accuracy.mean()
        assert row["corrupted"] == pytest.approx(mean)
        assert row["corrupted_low"] < row["corrupted"] < row["corrupted_high"]
        assert row["kept"] == pytest.approx(mean / clean[label])


def test_clean_accuracy_is_that_of_the_saved_predictions(section, groups):
    table = pd.read_csv(section[1] / "robustness.csv")
    clean = table[table.corruption == "clean"].set_index("model").accuracy
    for label, runs in groups.items():
        rows = robustness.spread(runs[0].test["labels"], 50)
        assert clean[label] == pytest.approx(np.mean([run.correct[rows].mean() for run in runs]))


def test_a_chosen_baseline_counts_as_all_errors(groups, tmp_path, monkeypatch):
    monkeypatch.setattr(robustness, "SHOWN_MODELS", 1)
    pair = {label: groups[label] for label in ("linear", "mlp")}
    made = robustness.robustness_section(pair, tmp_path, 40, "mlp", corruptions=CHEAP[:1])
    row = next(row for row in made.tables[0].rows if row[0] == "mlp")
    assert row[made.tables[0].columns.index("errors, % of mlp's")] == "100"
    assert "mean over one corruption at 5 severities" in made.tables[0].caption
    assert made.pictures[0].caption.endswith("Of 2 models, the 1 most accurate under corruption.")
    with pytest.raises(UserError, match="baseline: 'lineal' is not known.*Did you mean 'linear'"):
        robustness.robustness_section(pair, tmp_path, 40, "lineal", corruptions=CHEAP[:1])


def test_one_model_of_one_seed_is_sure_of_images_alone(groups, tmp_path):
    made = robustness.robustness_section(
        {"knn": groups["knn"]}, tmp_path, 40, corruptions=CHEAP[:1]
    )
    assert made.finding.startswith("knn has the highest") and "lead" not in made.finding
    assert "over images alone" in made.tables[0].caption


def test_groups_of_images_widen_the_interval(groups, tmp_path):
    def width(clusters):
        run = copy(groups["mlp"][0])
        run.__dict__["clusters"] = clusters
        made = robustness.robustness_section({"mlp": [run]}, tmp_path, 60, corruptions=CHEAP[:1])
        return made.data["mlp"]["corrupted_high"] - made.data["mlp"]["corrupted_low"]

    alike = np.argsort(np.argsort(~groups["mlp"][0].correct)) // 10  # right with right
    assert width(alike) > 1.1 * width(None)


def test_a_baseline_may_be_a_model_with_variants(groups):
    variants = {"mlp (a)": groups["mlp"], "linear (b)": groups["linear"]}
    assert robustness.baseline_labels("mlp", variants) == ["mlp (a)"]
    assert robustness.baseline_labels("linear (b)", variants) == ["linear (b)"]
    assert robustness.baseline_labels("", variants) == ["mlp (a)", "linear (b)"]
    with_cnn = variants | {"cnn": [SimpleNamespace(model="cnn")]}
    assert robustness.baseline_labels("", with_cnn) == ["cnn"]


def test_runs_of_different_test_images_are_refused(groups, tmp_path):
    other = load_runs(groups["mlp"][0].path.parent.parent)[-1]
    other.test["ids"] = other.test["ids"][::-1]
    with pytest.raises(UserError, match="tested on different images"):
        robustness.robustness_section({"mlp": [other], "knn": groups["knn"]}, tmp_path, 10)


def test_command(workdir, tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "analysis.robustness", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)  # noqa: S603

    wrong = run(str(workdir), "--corruptions=contrast,occlusions")
    assert wrong.returncode == 2
    assert "'occlusions' is not known" in wrong.stderr and "'occlusion'?" in wrong.stderr
    fine = run(
        str(workdir / "linear" / "seed0"), "--images=20", "--corruptions=contrast",
        f"--output={tmp_path / 'out'}",
    )  # fmt: skip
    assert fine.returncode == 0, fine.stderr
    assert "corrupted acc. %" in fine.stdout
    assert "linear has the highest accuracy under corruption" in fine.stdout
    assert (tmp_path / "out" / "robustness.csv").exists()
