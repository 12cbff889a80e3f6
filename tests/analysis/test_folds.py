import itertools
import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.model_selection import PredefinedSplit, cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from analysis import audit, evaluate, labels
from analysis.compare import compare, compare_workdir
from analysis.confidence import fit_temperature, softmax
from analysis.folds import FoldFamily, first_folds, merge_folds
from analysis.forward import load_classifier, load_test_images, predict_logits
from analysis.labels import labels_section
from analysis.report import CHAPTERS, Chapter, make_section, write_report
from analysis.runs import group_runs, load_runs
from configs import digits
from experiment.grid import expand
from tests.analysis.fabricate import predictions, write_run
from train import check_runs, train_and_evaluate

FOLDS, COUNT = 5, 40


def write_folds(workdir, model, seed, accuracies, folds=FOLDS, **kwargs):
    """Writes the runs of all folds; fold f tests f, f + J, ... and validates on the next fold's."""
    for fold, accuracy in enumerate(accuracies):
        run_dir = write_run(workdir, model, seed, accuracy, count=COUNT, **kwargs)
        run_dir = run_dir.rename(run_dir.with_name(f"fold{fold}_{run_dir.name}"))
        config = json.loads((run_dir / "config.json").read_text())
        config["data"] |= {"folds": folds, "fold": fold}
        (run_dir / "config.json").write_text(json.dumps(config))
        for part, of in (("test", fold), ("validation", (fold + 1) % folds)):
            data = predictions(seed, accuracy, COUNT, stream=of)
            data["ids"] = np.array([f"{of + folds * i:04d}" for i in range(COUNT)])
            if (run_dir / "predictions_test.npz").exists():
                np.savez(run_dir / f"predictions_{part}.npz", **data)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Two models with two seeds in five folds, and a third whose second seed lost one."""
    folder = tmp_path_factory.mktemp("folds")
    for seed in (0, 1):
        write_folds(folder, "cnn", seed, (0.97, 0.9, 0.93, 0.99, 0.95))
        write_folds(folder, "linear", seed, (0.7, 0.75, 0.6, 0.72, 0.65))
        write_folds(folder, "mlp", seed, (0.8, 0.82, 0.9, 0.85, 0.8)[: FOLDS - seed])
    names = [f"{m}/fold{f}_seed{s}" for m, s, f in itertools.product(
        ("cnn", "linear", "mlp"), (0, 1), range(FOLDS))]  # fmt: skip
    (folder / "experiment.json").write_text(json.dumps({"runs": names}))
    return folder


@pytest.fixture(scope="module")
def comparison(workdir):
    return compare_workdir(str(workdir))


def test_folds_of_a_seed_are_one_run_in_the_order_of_ids(workdir):
    runs = load_runs(workdir)
    merged = {run.name: run for run in merge_folds(runs)}
    assert list(merged) == ["cnn/seed0", "cnn/seed1", "linear/seed0", "linear/seed1", "mlp/seed0"]
    run = merged["cnn/seed1"]
    assert (run.label, run.seed, run.fold, run.status) == ("cnn", 1, None, "complete")
    assert run.test["ids"].tolist() == [f"{i:04d}" for i in range(FOLDS * COUNT)]
    assert (run.test["fold"] == np.arange(FOLDS * COUNT) % FOLDS).all()
    single = [one for one in runs if one.model == "cnn" and one.seed == 1]
    assert [one.fold for one in single] == list(range(FOLDS))
    assert run.correct.mean() == pytest.approx(np.mean([one.correct.mean() for one in single]))
    for one, part in zip(single, run.parts, strict=True):
        assert np.array_equal(part.test["logits"], one.test["logits"])
        assert np.array_equal(part.validation["ids"], one.validation["ids"])
    assert np.array_equal(run.join([one.correct for one in single]), run.correct)
    assert len(run.validation["ids"]) == FOLDS * COUNT
    assert run.cost["seconds"] == 4 and run.cost["device"] == "1 x cpu"
    assert run.dataset["counts"]["train"]["plain"] == FOLDS
    assert [run.name for run in group_runs(runs)["mlp"]] == ["mlp/fold0_seed0", "mlp/fold0_seed1"]
    with pytest.raises(ValueError, match="several models"):
        load_classifier(run)


def test_a_review_reaches_an_image_in_the_validation_parts_of_several_folds(workdir):
    run = merge_folds(load_runs(workdir))[0]
    image, other = run.validation["ids"][3], (int(run.validation["labels"][3]) + 1) % 2
    twice = {key: np.concatenate([values] * 2) for key, values in run.validation.items()}
    run.__dict__["validation"] = twice
    row = {"id": image, "verdict": "wrong", "new_label": run.class_names[other]}
    reviewed = labels._reviewed(run, pd.DataFrame([row]))
    changed = reviewed.validation["labels"] != twice["labels"]
    assert reviewed.validation["ids"][changed].tolist() == [image, image]
    assert (reviewed.validation["labels"][changed] == other).all()


def test_a_run_of_a_later_fold_can_be_looked_at_alone(workdir):
    (run,) = [r for r in load_runs(workdir) if r.name == "cnn/fold3_seed1"]
    assert group_runs([run]) == {"cnn": [run]}


def test_a_seed_without_all_folds_does_not_count(comparison):
    found = comparison
    rows = found.table.set_index("label")
    assert rows.seeds.to_dict() == {"cnn": 2, "linear": 2, "mlp": 1} and found.folds == FOLDS
    assert rows.state["mlp"] == "1 of 2 seeds completed; 1 with 4 of 5 folds (1 not started)"
    assert rows.state["cnn"] == "" and found.reasons == {"mlp/fold4_seed1": "not started"}
    assert rows.test_images["cnn"] == FOLDS * COUNT


def test_intervals_are_those_of_nadeau_and_bengio(comparison):
    found = comparison
    of_fold = {
        label: np.mean([[part.correct.mean() for part in run.parts] for run in runs], axis=0)
        for label, runs in found.groups.items()
    }
    ratio = 1.0  # the fabricated runs tell of as many training as test images
    pair = found.pairs.set_index(["first", "second"]).loc["cnn", "linear"]
    difference = of_fold["cnn"] - of_fold["linear"]
    error = np.sqrt((1 / FOLDS + ratio) * difference.var(ddof=1))
    studentized = stats.studentized_range.isf(0.05, 4, FOLDS - 1) / np.sqrt(2)  # the baseline, too
    assert pair.difference == pytest.approx(difference.mean())
    assert pair.ci95_low == pytest.approx(difference.mean() - studentized * error)
    assert np.sqrt(pair.variance_seeds) == pytest.approx(error) and pair.variance_images == 0
    assert pair.freedom == FOLDS - 1 and np.isnan(pair.seeds_needed)
    family = FoldFamily({k: np.array([r.correct for r in v]) for k, v in found.groups.items()
                         }, found.groups["cnn"][0])  # fmt: skip
    low, high = family.interval("linear")
    half = stats.t.isf(0.025, FOLDS - 1) * np.sqrt(
        (1 / FOLDS + ratio) * of_fold["linear"].var(ddof=1)
    )
    assert high - low == pytest.approx(2 * half, rel=0.1)  # Wilson's form
    equal = FoldFamily({"a": np.ones((1, FOLDS * COUNT)), "b": np.ones((1, FOLDS * COUNT))},
                       found.groups["cnn"][0])  # fmt: skip
    assert not equal.pair("a", "b").established and equal.interval("a")[0] < 0.99
    settled = family.needed(family.pair("cnn", "mlp"))
    assert np.isnan(settled[0]) and settled[1] == pytest.approx(FOLDS * COUNT * settled[2])


def test_each_fold_has_its_own_temperature(workdir, tmp_path):
    run = merge_folds(load_runs(workdir))[0]
    changed = {part: dict(getattr(run, part)) for part in ("test", "validation")}
    for data in changed.values():  # fold 2 is far too sure of itself
        factor = np.where(data["fold"] == 2, 20, 1)[:, None].astype(np.float32)
        data["logits"] = data["logits"] * factor
    run.__dict__.update(changed)
    figures = evaluate.evaluate(run)
    temperatures = [fit_temperature(p.validation["logits"], p.validation["labels"])
                    for p in run.parts]  # fmt: skip
    assert temperatures[2] > 3 * temperatures[1]
    assert figures["temperature"] == pytest.approx(np.mean(temperatures))
    scaled = [softmax(p.test["logits"], t) for p, t in zip(run.parts, temperatures, strict=True)]
    own = run.join(scaled)[np.arange(len(run.correct)), run.test["labels"]]
    assert figures["nll_scaled"] == pytest.approx(-np.log(own).mean())
    alone = [evaluate.evaluate(part) for part in run.parts]
    for name in ("nll_scaled", "answered", "set90_size", "accuracy"):
        assert figures[name] == pytest.approx(np.mean([of[name] for of in alone])), name


def test_other_folds_are_other_test_images(tmp_path):
    write_folds(tmp_path, "cnn", 0, (0.9,) * 5)
    write_folds(tmp_path, "linear", 0, (0.9,) * 4, folds=4)
    comparison = compare(tmp_path, load_runs(tmp_path))
    assert comparison.pairs.empty and "not compared" in str(comparison.recommendation)


def test_the_report_says_what_intervals_are_over_and_runs_fold_0_alone(workdir, comparison):
    report = write_report(workdir, models=False)
    page = report.page.read_text()
    assert page.count("over folds (corrected resampled t, Nadeau &amp; Bengio 2003)") >= 3
    assert (
        "20 in 5 folds of 4; of the others 4 train, 4 validation" in page
        and "95 % interval over 5 folds" in report.text
    )
    assert "1 with 4 of 5 folds (1 not started)" in page and "over 5 runs" not in page
    folds = pd.read_csv(report.page.parent / "folds.csv")
    assert len(folds) == 5 * FOLDS and folds.images.unique().tolist() == [COUNT]
    votes = labels_section(comparison).tables[0].rows
    assert [row[:2] for row in votes] == [["test", str(FOLDS * COUNT)]]
    seen = []

    def remember(comparison):
        seen.extend(comparison.runs)
        return next(c for c in CHAPTERS if c.title == "Confusion").make(comparison)

    slow = Chapter("Slow", remember, "slow.json", ("measure_speed",))
    section = make_section(slow, comparison, lambda text: None)
    assert {run.fold for run in seen} == {0} and len(seen) == 5
    assert "on no other photos than fold 0 tests" in section.text[-1]


@pytest.mark.parametrize("folds", [5, 10])
def test_intervals_hold_and_equal_models_are_rarely_told_apart(folds):
    """Cross-validation of nearest centroids on fresh draws; the truth is known from many images."""
    rng, draws, images, angle = np.random.default_rng(0), 40, 100, 2 * np.pi / 3

    def draw(count):
        labels = rng.integers(0, 3, count)
        centres = 1.4 * np.stack([np.cos(angle * labels), np.sin(angle * labels)], axis=1)
        return np.tile(centres, 4) + rng.normal(size=(count, 8)), labels

    def nearest(centres, points):
        return ((points[:, None] - centres) ** 2).sum(axis=-1).argmin(axis=1)

    columns = [[0, 1, 2 * m, 2 * m + 1] for m in (1, 2, 3)]  # three models, half alike
    many, held, established, truth = draw(3000), [], [], []
    for _ in range(draws):
        pixels, labels = draw(images)
        right, fold = np.zeros((3, images)), np.zeros(images, int)
        fold[np.argsort(labels, kind="stable")] = np.arange(images) % folds
        for number, (m, own) in itertools.product(range(folds), enumerate(columns)):
            test, rest = fold == number, [(fold != number) & (labels == k) for k in range(3)]
            centres = np.array([pixels[rows][:, own].mean(axis=0) for rows in rest])
            right[m, test] = nearest(centres, pixels[test][:, own]) == labels[test]
            if number == 0:
                truth.append((nearest(centres, many[0][:, own]) == many[1]).mean())

        class Run:
            test = {"fold": fold}

            def ratio(self, part):
                return 1 / (folds - 1)

        family = FoldFamily({str(m): row[None] for m, row in enumerate(right)}, Run())
        held.append([family.interval(label) for label in family.mean])
        established.append(family.pairs.established.any())
    low, high = np.moveaxis(np.array(held), -1, 0)
    assert ((low <= np.mean(truth)) & (np.mean(truth) <= high)).mean() >= 0.95
    assert np.mean(established) <= 0.05
    assert 0.05 < (high - low).mean() < 0.4


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache_dir):
    """Nearest neighbours on three folds of the digits."""
    folder, config = tmp_path_factory.mktemp("trained"), digits.get_config("knn")
    config.data.folds, config.seeds = 3, (0,)
    config.runtime.cache_dir, config.runtime.tensorboard = cache_dir, False
    configs = expand(config)
    datasets, _ = check_runs([run.config for run in configs], folder)
    for run in configs:
        train_and_evaluate(run.config, folder / run.name)
    check_runs([run.config for run in configs], folder)  # as when the command is repeated
    return folder, datasets


def test_neighbours_agree_with_scikit_learn_on_the_same_folds(trained):
    folder, datasets = trained
    (run,) = merge_folds(load_runs(folder))
    first = datasets[0]
    images = first.decoded.images.reshape(len(first.listing.ids), -1) / 255
    labels, theirs = first.listing.labels, []
    assert len(datasets) == 3 and run.test["ids"].tolist() == sorted(first.listing.ids)
    for dataset, one in zip(datasets, run.folds, strict=True):
        k = int(load_classifier(one).stages[-1].k[...])
        model = KNeighborsClassifier(k).fit(images[dataset.rows["train"]], dataset.labels("train"))
        theirs.append(model.predict(images[dataset.rows["test"]]))
        assert one.test["ids"].tolist() == dataset.ids("test")
    assert (run.join(theirs) == run.predicted).mean() > 0.999
    whole = cross_val_score(
        KNeighborsClassifier(1), images, labels, cv=PredefinedSplit(first.fold_of)
    )
    assert np.mean(whole) == pytest.approx(run.correct.mean(), abs=0.006)  # it has more to learn


def test_photos_are_those_of_the_predictions_and_one_audit_is_of_all_folds(trained):
    folder, datasets = trained
    (run,) = merge_folds(load_runs(folder))
    photos, alone = load_test_images(run), first_folds({"knn": [run]})["knn"][0]
    first = datasets[0]
    rows = pd.Index(first.listing.ids).get_indexer(run.test["ids"])
    assert np.array_equal(photos, first.decoded.images[rows])
    own = load_test_images(alone)
    logits = predict_logits(load_classifier(alone), own)
    assert np.allclose(logits, alone.test["logits"], atol=1e-5)
    found = audit.write_audit(datasets[1], folder / "audit")
    assert list(found["counts"]) == ["fold 0", "fold 1", "fold 2"]
    assert {sum(of.values()) for of in found["counts"].values()} == {599}
