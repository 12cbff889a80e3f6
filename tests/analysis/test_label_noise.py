import numpy as np
import pytest
from scipy.special import softmax

from analysis.label_noise import (
    confident_classes,
    contradicted,
    contradictions,
    thresholds,
    wrong_share,
)
from analysis.runs import group_runs, load_runs
from tests.analysis.fabricate import predictions, write_run

# cleanlab 2.9.0: compute_confident_joint(*example(), calibrate=False), and with calibrate=True.
FROZEN = [[15, 0, 1], [2, 19, 0], [0, 1, 15]]
FROZEN_CALIBRATED = [[17, 0, 1], [2, 20, 0], [0, 1, 19]]
CLASSES = 6
SIGNAL = {0.8: 2.17, 0.9: 2.71, 0.95: 3.16}  # of its own class, in standard deviations of the noise


def example(seed=0, count=60, classes=3):
    draw = np.random.default_rng(seed)
    true = draw.integers(0, classes, count)
    labels = np.where(draw.random(count) < 0.1, (true + 1) % classes, true)
    logits = draw.normal(size=(count, classes)) + 4 * np.eye(classes)[true]
    return labels, softmax(logits, axis=1)


def share_contradicted(labels, probabilities):
    confident = confident_classes(probabilities, thresholds(labels, probabilities))
    return contradicted(labels, confident, probabilities.shape[1]).value


def share_beside_the_diagonal(joint):
    joint = np.asarray(joint)
    return 1 - joint.trace() / joint.sum()


def counted(labels, probabilities):
    confident = confident_classes(probabilities, thresholds(labels, probabilities))
    pairs = zip(labels, confident, strict=True)
    counts = np.zeros((probabilities.shape[1],) * 2, int)
    for label, other in pairs:
        if other >= 0:
            counts[label, other] += 1
    return counts


def test_the_confident_joint_is_that_of_cleanlab_on_a_stored_example():
    labels, probabilities = example()
    assert counted(labels, probabilities).tolist() == FROZEN
    calibrated = share_beside_the_diagonal(FROZEN_CALIBRATED)
    assert share_contradicted(labels, probabilities) == pytest.approx(calibrated, abs=0.01)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("classes", [2, 7])
def test_the_confident_joint_is_that_of_cleanlab(seed, classes):
    count = pytest.importorskip("cleanlab.count")
    labels, probabilities = example(seed, 400, classes)
    given = thresholds(labels, probabilities)
    np.testing.assert_allclose(given, count.get_confident_thresholds(labels, probabilities))
    # Where several classes are confident but the top one is not, cleanlab takes the top one; the
    # paper and we take the best of the confident ones.
    usual = (probabilities >= given).sum(axis=1) < 2
    usual |= probabilities.argmax(axis=1) == confident_classes(probabilities, given)
    assert usual.mean() > 0.99
    options = {"thresholds": given, "calibrate": False}
    theirs = count.compute_confident_joint(labels[usual], probabilities[usual], **options)
    confident = confident_classes(probabilities[usual], given)
    pairs = np.bincount((labels[usual] * classes + confident)[confident >= 0], minlength=classes**2)
    np.testing.assert_array_equal(pairs.reshape(classes, classes), theirs)
    calibrated = share_beside_the_diagonal(count.compute_confident_joint(labels, probabilities))
    assert share_contradicted(labels, probabilities) == pytest.approx(calibrated, abs=0.005)


def simulated(draw, accuracy, noise, kind, images=1500, models=3, common=0.0):
    """True and given labels and mean probabilities of models of that accuracy; `common` is the part
    of their noise that is the same for all."""
    true = draw.integers(0, CLASSES, images)
    shared = draw.normal(size=(images, CLASSES))
    total = 0
    for _ in range(models):
        own = draw.normal(size=(images, CLASSES))
        logits = np.sqrt(common) * shared + np.sqrt(1 - common) * own
        logits[np.arange(images), true] += SIGNAL[accuracy]
        total = total + softmax(SIGNAL[accuracy] * logits, axis=1) / models
    if kind == "as models":  # people take the same photos for the same other class
        own = draw.normal(size=(images, CLASSES))
        seen = np.sqrt(0.7) * shared + np.sqrt(0.3) * own
        seen[np.arange(images), true] += SIGNAL[round(1 - noise, 2)]
        return true, seen.argmax(axis=1), total
    if kind == "random":
        other, rate = (true + draw.integers(1, CLASSES, images)) % CLASSES, noise
    else:  # three classes lose labels to their neighbour
        other, rate = true ^ 1, np.array([3, 2, 1, 0, 0, 0])[true] * noise
    flipped = draw.random(images) < rate
    return true, np.where(flipped, other, true), total


@pytest.mark.parametrize("kind", ["random", "by class"])
@pytest.mark.parametrize("noise", [0, 0.02, 0.05, 0.1])
def test_the_interval_holds_the_share_of_wrong_labels_where_errors_are_independent(noise, kind):
    """Coverage of 95 % is promised where label errors do not depend on the models' errors."""
    covered, widths = [], []
    for accuracy in SIGNAL:
        for seed in range(20):
            draw = np.random.default_rng([seed, int(100 * accuracy)])
            true, labels, probabilities = simulated(draw, accuracy, noise, kind)
            share, truth = wrong_share(labels, probabilities), (true != labels).mean()
            low, high = share.interval
            assert 0 <= low <= share.value < high <= 1
            covered.append(low <= truth <= high)
            widths.append(high - low)
    assert np.mean(covered) >= 0.9
    assert np.mean(widths) < 0.02 + 0.6 * noise  # and it says something


def test_errors_that_the_models_share_raise_the_estimate():
    """Without noise, photos that every model gets wrong are taken for wrong labels."""
    independent, shared = (
        [
            wrong_share(*simulated(np.random.default_rng(i), 0.8, 0, "random", common=part)[1:])
            for i in range(10)
        ]
        for part in (0.0, 0.8)
    )
    assert np.mean([s.value for s in independent]) < 0.001 < np.mean([s.value for s in shared])
    assert max(s.interval[1] for s in independent) < min(s.interval[1] for s in shared)


def test_labels_that_are_wrong_where_the_models_are_wrong_too_are_not_seen():
    """What the chapter says of such errors: the interval misses the truth, from below."""
    for seed in range(5):
        draw = np.random.default_rng(seed)
        true, labels, probabilities = simulated(draw, 0.8, 0.1, "as models", common=0.8)
        assert wrong_share(labels, probabilities).interval[1] < (true != labels).mean()


def test_images_of_one_cluster_count_together():
    draw = np.random.default_rng(0)
    _, labels, probabilities = simulated(draw, 0.95, 0.05, "random", images=500)
    once = wrong_share(labels, probabilities)
    clusters = np.tile(np.arange(500), 4)
    four = wrong_share(np.tile(labels, 4), np.tile(probabilities, (4, 1)), clusters)
    assert np.ptp(four.interval) == pytest.approx(np.ptp(once.interval), rel=0.15)
    free = wrong_share(np.tile(labels, 4), np.tile(probabilities, (4, 1)))
    assert np.ptp(free.interval) < 0.85 * np.ptp(once.interval)


@pytest.mark.parametrize(("classes", "images"), [(2, 30), (1000, 3000)])
def test_few_images_and_many_classes(classes, images):
    draw = np.random.default_rng(0)
    labels = draw.integers(0, max(2, classes - 1), images)  # one class without images
    probabilities = softmax(6 * np.eye(classes)[labels] + draw.normal(size=(images, classes)), 1)
    low, high = wrong_share(labels, probabilities).interval
    assert 0 <= low < high < 1


def with_wrong_labels(workdir, rows):
    """Gives test images of every run the next class as label."""
    for path in workdir.glob("*/*/predictions_test.npz"):
        data = dict(np.load(path))
        data["labels"][rows] = (data["labels"][rows] + 1) % 4
        np.savez(path, **data)


def test_the_images_that_models_and_seeds_contradict_come_first(tmp_path):
    for model in ("a", "b"):
        for seed in range(3):
            write_run(tmp_path, model, seed, 0.95)
    write_run(tmp_path, "near chance", 0, 0.3)
    runs = [run for run in load_runs(tmp_path) if run.model != "near chance"]
    own = [softmax(run.test["logits"], 1)[np.arange(200), run.test["labels"]] for run in runs]
    rows = np.argsort(np.min(own, axis=0))[-3:]  # of which every seed is sure
    with_wrong_labels(tmp_path, rows)
    votes = contradictions(group_runs(load_runs(tmp_path)))
    assert set(votes.suspects["id"].head(3)) == {f"test/{i}.png" for i in rows}
    row = votes.suspects.iloc[0]
    true = predictions(0, 0.95, 200)["labels"][int(row.id[5:-4])]
    names = load_runs(tmp_path)[0].class_names
    assert (row.label, row.likely) == (names[(true + 1) % 4], names[true])
    assert (row.models_agree, row.models, row.seeds) == (2, 2, 6) and row.seeds_agree >= 5
    assert sorted(votes.voters) == ["a", "b"] and list(votes.silent) == ["near chance"]
    assert "below" in votes.silent["near chance"]
    assert votes.suspects.margin.is_monotonic_increasing
    assert contradictions(group_runs(load_runs(tmp_path)), "validation").part == "validation"


def test_where_no_model_is_far_from_chance_none_votes(tmp_path):
    for model in ("a", "b"):
        write_run(tmp_path, model, 0, 0.4)
    votes = contradictions(group_runs(load_runs(tmp_path)))
    assert not votes.voters and set(votes.silent) == {"a", "b"} and votes.suspects.empty
    assert np.isnan(votes.wrong.value)


def test_always_the_class_of_most_images_is_no_vote(tmp_path):
    """95 of 100 images are of one class: its accuracy is high, and says nothing of labels."""
    path = write_run(tmp_path, "always", 0, 0.9)
    data = predictions(0, 0.9, 200)
    data["labels"] = (np.arange(200) % 20 == 0).astype(np.int32)
    data["logits"][:, 0] += 9
    for part in ("test", "validation"):
        np.savez(path / f"predictions_{part}.npz", **data)
    votes = contradictions(group_runs(load_runs(tmp_path)))
    assert not votes.voters and votes.suspects.empty


def test_predictions_near_one_for_every_image(tmp_path):
    """Nearest neighbours may give the same high probability to all."""
    for model in ("knn", "mlp"):
        path = write_run(tmp_path, model, 0, 0.9)
        data = predictions(0, 0.9, 200)
        data["logits"] = 9 * np.eye(4, dtype=np.float32)[data["logits"].argmax(axis=1)]
        np.savez(path / "predictions_test.npz", **data)
    votes = contradictions(group_runs(load_runs(tmp_path)))
    wrong = (data["logits"].argmax(axis=1) != data["labels"]).sum()
    assert len(votes.suspects) == wrong and (votes.suspects.models_agree == 2).all()
