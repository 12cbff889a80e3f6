import math

import numpy as np
import pytest

from analysis import confidence
from analysis.confidence import choose_threshold, fit_sets, fit_temperature, softmax

CLASSES = 6


def draw(seed, count, scale=3.0, classes=CLASSES, per_group=1):
    """Logits and labels of a perfectly calibrated model; an image is copied within its group."""
    random = np.random.default_rng(seed)
    logits = scale * random.normal(size=(count // per_group, classes))
    below = softmax(logits).cumsum(axis=1) < random.random((len(logits), 1))
    labels = below.sum(axis=1).clip(max=classes - 1)
    return logits.repeat(per_group, axis=0), labels.repeat(per_group)


# --- calibration error ----------------------------------------------------------------------------


def test_calibration_error_against_a_plain_loop():
    draw = np.random.default_rng(0)
    probabilities = draw.dirichlet(np.ones(4) * 0.5, size=500)
    labels = draw.integers(0, 4, 500)
    error, highest = 0.0, probabilities.max(axis=1)
    for low in np.arange(15) / 15:
        inside = (highest >= low) & ((highest < low + 1 / 15) | (low > 0.93))
        if inside.any():
            correct = (probabilities.argmax(axis=1) == labels)[inside].mean()
            error += inside.mean() * abs(correct - highest[inside].mean())
    assert confidence.calibration_error(probabilities, labels) == pytest.approx(error)
    sure = np.eye(4)[labels]
    assert confidence.calibration_error(sure, labels) == 0
    assert confidence.calibration_error(sure, (labels + 1) % 4) == 1
    assert confidence.reliability(probabilities, labels).images.sum() == 500


def test_the_error_of_a_perfect_model_is_what_chance_makes_it():
    for count, scale, per_group in ((30, 1, 1), (1000, 8, 1), (300, 3, 5)):
        errors, expected, p = [], [], []
        clusters = np.arange(count) // per_group if per_group > 1 else None
        for seed in range(100):
            logits, labels = draw(seed, count, scale, per_group=per_group)
            probabilities = softmax(logits)
            errors.append(confidence.calibration_error(probabilities, labels))
            found = confidence.error_by_chance(probabilities, errors[-1], clusters)
            expected.append(found[0])
            p.append(found[1])
        assert np.mean(expected) == pytest.approx(np.mean(errors), rel=0.08)
        assert np.mean(np.less(p, 0.05)) <= 0.1  # 0.05, and what 100 draws may add
        if (count, scale) == (30, 1):
            assert 0.1 < np.mean(errors) < 0.2


def test_an_overconfident_model_is_off_by_more_than_chance():
    logits, labels = draw(0, 1000)
    probabilities = softmax(2 * logits)
    error = confidence.calibration_error(probabilities, labels)
    expected, p = confidence.error_by_chance(probabilities, error)
    assert error > 2 * expected and p < 1e-4
    sure = np.eye(4)[labels % 4]
    assert confidence.error_by_chance(sure, 0.0) == (0, 1)
    assert confidence.error_by_chance(sure, 0.1) == (0, 0)


# --- temperature ----------------------------------------------------------------------------------


@pytest.mark.parametrize("spoiled", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("scale", [2.0, 8.0, 40.0])  # accuracies of 62, 89 and 98 %
def test_scaling_never_hurts_in_the_mean_and_helps_where_it_should(spoiled, scale):
    logits, _ = draw(10**6, 1000, scale)
    truth = softmax(logits)  # of which the expected loss can be computed

    def loss(temperature):
        return -(truth * np.log(softmax(spoiled * logits, temperature) + 1e-300)).sum(axis=1).mean()

    for count, draws in ((50, 100), (200, 40), (1000, 15)):
        gains = []
        for seed in range(draws):
            known, labels = draw(seed, count, scale)
            gains.append(loss(1) - loss(fit_temperature(spoiled * known, labels)))
        assert np.mean(gains) > -0.002  # nats; the possible gain is 0.01 to 0.2
        if spoiled != 1 and count == 1000:
            assert np.mean(gains) > 0.85 * (loss(1) - loss(spoiled))


def test_temperature_finds_the_one_that_spoiled_the_logits():
    logits, labels = draw(0, 20000)
    assert fit_temperature(logits, labels) == pytest.approx(1, abs=0.03)
    assert fit_temperature(3 * logits, labels) == pytest.approx(3, rel=0.03)
    assert fit_temperature(logits / 3, labels) == pytest.approx(1 / 3, rel=0.03)


def test_without_an_error_nothing_is_sharpened_and_no_fit_runs_to_a_bound():
    logits, labels = draw(0, 300, 4)
    right = logits.argmax(axis=1)
    assert fit_temperature(logits, right) == 1
    for seed in range(20):  # accurate models with an error or two, as of the digits
        assert 0.5 < fit_temperature(*draw(seed, 50, 40)) < 2
    assert fit_temperature(np.zeros((10, 3)), np.zeros(10, int)) == 1
    wrong = (right + 1) % CLASSES
    assert 1 < fit_temperature(logits, wrong) < 1000
    assert fit_temperature(np.repeat(logits, 50, 0), np.repeat(wrong, 50)) < math.exp(9)


def test_copies_of_an_image_are_no_evidence():
    logits, labels = draw(3, 40)
    copies = [array.repeat(25, axis=0) for array in (1.5 * logits, labels)]
    groups = np.arange(40).repeat(25)
    assert fit_temperature(*copies, groups) == pytest.approx(fit_temperature(1.5 * logits, labels))
    assert fit_temperature(*copies) != pytest.approx(fit_temperature(*copies, groups))


# --- review thresholds ----------------------------------------------------------------------------


def promises(count, target, per_group=1, scale=3.0, draws=200):
    """How often a promise is broken, the share answered, and what could have been."""
    logits, labels = draw(10**6, 40000, scale)
    probabilities = softmax(logits)
    highest = probabilities.max(axis=1)
    order = np.argsort(-highest)
    right = (probabilities.argmax(axis=1) == labels)[order]
    accuracy, level = right.cumsum() / np.arange(1, len(right) + 1), highest[order]
    possible = (np.flatnonzero(accuracy >= target).max() + 1) / len(right)
    broken, answered = 0, 0.0
    clusters = np.arange(count) // per_group if per_group > 1 else None
    for seed in range(draws):
        known, truth = draw(seed, count, scale, per_group=per_group)
        probabilities = softmax(known, fit_temperature(known, truth, clusters))
        chosen = choose_threshold(softmax(known), truth, target, clusters)
        images = np.searchsorted(-level, -chosen["confidence"], side="right")
        answered += images / len(right) / draws
        broken += bool(images and accuracy[images - 1] < target) / draws
    return broken, answered, possible


@pytest.mark.parametrize("target", [0.9, 0.95])
@pytest.mark.parametrize("count", [100, 300, 1000, 2000])
def test_a_promise_is_broken_in_a_tenth_of_draws_at_most(count, target):
    broken, answered, possible = promises(count, target)
    assert broken <= 0.14  # 0.1, and what 200 draws may add
    if count >= 1000:
        assert answered > 0.4 * possible > 0.1


def test_promises_hold_where_images_come_in_groups():
    broken, answered, _ = promises(2000, 0.9, per_group=5)
    assert broken <= 0.14 and answered > 0.2
    assert promises(2000, 0.9, per_group=1, draws=50)[1] > answered  # more is known


def test_thresholds_by_hand():
    sure = np.tile([0.9, 0.1], (44, 1))
    labels = np.zeros(44, int)
    assert choose_threshold(sure, labels)["confidence"] == math.inf  # 0.95**44 > 0.1
    enough = choose_threshold(np.tile([0.9, 0.1], (45, 1)), np.zeros(45, int))
    assert enough == {
        "confidence": 0.0, "accuracy": 1.0, "coverage": 1.0, "target": 0.95, "risk": 0.1
    }  # fmt: skip
    assert choose_threshold(1 - sure, labels, 0.01)["confidence"] == math.inf  # always wrong
    unsure = np.tile([0.6, 0.4], (100, 1))
    both = np.concatenate([np.tile([0.9, 0.1], (100, 1)), unsure])
    labels = np.r_[np.zeros(100, int), np.arange(100) % 2]
    chosen = choose_threshold(both, labels)
    assert chosen["confidence"] == 0.9 and chosen["coverage"] == 0.5 and chosen["accuracy"] == 1


def test_coverage_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.8, 0.2], [0.6, 0.4]])
    labels = np.array([0, 1, 1, 0])  # the third is wrong, and as sure as the second
    curve = confidence.coverage_curve(probabilities, labels)
    assert curve.threshold.tolist() == [0.9, 0.8, 0.6]
    assert curve.coverage.tolist() == [0.25, 0.75, 1]
    assert curve.accuracy.tolist() == pytest.approx([1, 2 / 3, 0.75])


# --- sets of classes ------------------------------------------------------------------------------


@pytest.mark.parametrize("count, per_group, spoiled", [(60, 1, 1), (300, 1, 4), (300, 4, 1)])
def test_sets_hold_the_true_class_as_often_as_promised(count, per_group, spoiled):
    clusters = np.arange(count) // per_group if per_group > 1 else None
    new, _ = draw(10**6, 5000, 2)
    truth = softmax(new)  # so that the share covered can be computed
    held, wide = {level: [] for level in confidence.LEVELS}, []
    for seed in range(200):
        known, labels = draw(seed, count, 2, per_group=per_group)
        fitted = fit_sets(spoiled * known, labels, clusters)
        for level, shares in held.items():
            sets = confidence.sets_of_classes(spoiled * new, fitted, level)
            shares.append((truth * sets).sum(axis=1).mean())
        wide.append(sets.sum(axis=1).mean())
    images = fitted["images"]
    assert images == count / per_group / 2 or per_group > 1
    for level, shares in held.items():
        slack = 3 * np.std(shares) / math.sqrt(len(shares))
        assert level - slack < np.mean(shares) < level + 1 / (images + 1) + slack
    assert np.mean(wide) < 0.9 * CLASSES


def test_too_few_images_promise_nothing():
    logits, labels = draw(0, 36)  # half of them cannot show 95 %
    fitted = fit_sets(logits, labels)
    assert fitted["images"] == 18 and fitted["levels"][1] == {"level": 0.95, "least": None}
    assert confidence.sets_of_classes(logits, fitted, 0.95) is None
    assert confidence.sets_of_classes(logits, fitted, 0.9).any(axis=1).all()
    assert fit_sets(logits[:1], labels[:1])["temperature"] == 1


def test_halves_are_drawn_by_class_and_leave_groups_whole(monkeypatch):
    logits, labels = draw(0, 400)
    logits[:, 0] += np.arange(400) * 1e-3  # so that each row is known again
    groups, halves = np.arange(400) // 4, []
    seen = lambda z, y, c=None: halves.append((z[:, 0], y)) or 1.0  # noqa: E731
    monkeypatch.setattr(confidence, "fit_temperature", seen)
    fit_sets(logits, labels)
    fit_sets(logits, labels, groups)
    counts = np.bincount(halves[0][1], minlength=CLASSES)
    assert (abs(counts - np.bincount(labels) / 2) <= 1).all()
    rest = np.isin(logits[:, 0], halves[1][0])
    assert set(rest.reshape(-1, 4).sum(axis=1)) == {0, 4} and rest.sum() == 200


def test_sets_equal_those_of_mapie(monkeypatch):
    mapie = pytest.importorskip("mapie.classification")
    from sklearn.linear_model import LogisticRegression

    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 900)
    points = np.eye(4)[labels] * 2 + random.normal(size=(900, 4))
    model = LogisticRegression().fit(points[:200], labels[:200])
    logits = model.decision_function(points)
    known = slice(200, 500)
    counted = []
    monkeypatch.setattr(confidence, "fit_temperature", lambda z, y, c=None: counted.append(z) or 1)
    fitted = fit_sets(logits[known], labels[known])
    rest = np.isin(logits[:, 0], counted[0][:, 0])
    half = np.flatnonzero(~rest[known]) + 200
    levels = list(confidence.LEVELS)
    theirs = mapie.SplitConformalClassifier(model, confidence_level=levels, prefit=True)
    theirs.conformalize(points[half], labels[half])
    sets = theirs.predict_set(points[500:])[1]
    for i, level in enumerate(levels):
        ours = confidence.sets_of_classes(logits[500:], fitted, level)
        filled = sets[..., i] | (sets[..., i].sum(axis=1, keepdims=True) == 0) & ours
        np.testing.assert_array_equal(ours, filled)  # ours are never empty
        print(f"{level}: covered {ours[np.arange(400), labels[500:]].mean():.4f}, "
              f"classes {ours.sum(axis=1).mean():.4f}, MAPIE {sets[..., i].sum(axis=1).mean():.4f}")  # fmt: skip
