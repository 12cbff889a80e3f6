"""The monitor's tests keep their false-alarm rate, and each finds what it is for."""

import numpy as np
import pytest
from scipy.stats import chi2_contingency, ks_2samp
from statsmodels.stats.multitest import multipletests

from deploy.drift import (
    Sample,
    accuracy_test,
    class_mix,
    compare_samples,
    kolmogorov_smirnov,
    strata,
    two_sample_classifier,
)

MIX = np.array([0.5, 0.3, 0.15, 0.04, 0.01])  # the last class is rare
RATE = 0.1


def drawn(draw, count, mix=MIX, least_sure=0.4, shift=0.0, spread=1.0) -> Sample:
    """Answers of a calibrated model; confidences are tied, features depend on the class."""
    classes = draw.choice(len(mix), count, p=mix / mix.sum())
    confidence = draw.uniform(least_sure, 1, count).round(2)
    features = draw.standard_normal((count, 32)) * spread + np.eye(5, 32)[classes]
    features[:, 7] += shift
    features[:, 31] = 0  # as of a channel that is dead
    correct = (draw.random(count) < confidence).astype(float)
    return Sample(classes, confidence, features.astype(np.float32), correct)


def unlabelled(sample: Sample) -> Sample:
    return Sample(sample.classes, sample.confidence, sample.features, sample.correct * np.nan)


def least_sure_corrected(sample: Sample, count: int) -> Sample:
    correct = sample.correct.copy()
    correct[np.argsort(sample.confidence)[count:]] = np.nan
    return Sample(sample.classes, sample.confidence, sample.features, correct)


@pytest.mark.parametrize("size", [20, 90])
def test_unchanged_windows_alarm_at_the_stated_rate(size):
    """Each test alone and all together, accuracy of the least sure answers among them."""
    found = []
    for seed in range(200):
        draw = np.random.default_rng(seed)
        reference, window = drawn(draw, 80), least_sure_corrected(drawn(draw, size), 15)
        found.append(compare_samples(reference, window, RATE, divisions=119, seed=seed))
    limit = RATE + 3 * np.sqrt(RATE * (1 - RATE) / 200)
    alarms = np.mean([any(test.alarm for test in tests) for tests in found])
    assert 0.02 <= alarms <= limit
    for tests in zip(*found, strict=True):
        small = np.mean([test.p <= RATE for test in tests])
        assert 0.01 <= small <= limit, tests[0].name
    assert [test.name for test in found[0]] == ["class mix", "confidence", "features", "accuracy"]


@pytest.mark.parametrize(
    ("change", "name"),
    [({"mix": MIX * [1, 3, 1, 1, 1]}, "class mix"), ({"least_sure": 0.2}, "confidence"),
     ({"shift": 0.8}, "features"), ({"spread": 1.4}, "features")],
)  # fmt: skip
def test_each_change_is_found_by_its_test(change, name):
    draw = np.random.default_rng(0)
    window = unlabelled(drawn(draw, 150, **change))
    tests = compare_samples(drawn(draw, 400), window, 0.05)
    strongest = min(tests, key=lambda test: test.p)
    assert strongest.name == name and strongest.alarm and strongest.effect > strongest.chance
    holm = multipletests([test.p for test in tests], 0.05, method="holm")
    assert [test.alarm for test in tests] == holm[0].tolist()
    np.testing.assert_allclose([test.adjusted for test in tests], holm[1])


def test_statistics_are_those_of_the_literature():
    draw = np.random.default_rng(1)
    sample = drawn(draw, 1000)
    labels = np.repeat([0, 1], [700, 300]).astype(np.float32)[:, None]
    table = [np.bincount(part, minlength=5) for part in np.split(sample.classes, [700])]
    squares, variation = class_mix(sample.classes)(labels)
    known = chi2_contingency(table).statistic
    # What decides is the second row's part of it, without the constant factor.
    assert squares[0] * 1000**2 / (700 * 300) == pytest.approx(known, rel=1e-3)
    shares = [row / row.sum() for row in table]
    assert variation[0] == pytest.approx(np.abs(shares[0] - shares[1]).sum() / 2, rel=1e-4)
    distance, _ = kolmogorov_smirnov(sample.confidence)(labels)
    parts = np.split(sample.confidence, [700])
    assert distance[0] == pytest.approx(ks_2samp(*parts).statistic, abs=1e-6)
    tests = compare_samples(sample.rows(np.arange(700)), unlabelled(sample.rows(np.arange(700, 1000))), 0.05)  # fmt: skip
    assert tests[0].p == pytest.approx(chi2_contingency(table).pvalue, abs=0.05)
    assert tests[1].p == pytest.approx(ks_2samp(*parts).pvalue, abs=0.08)


def test_the_classifier_is_perfect_where_it_can_be_and_knows_nothing_of_equal_images():
    labels = np.repeat([0, 1], [60, 30]).astype(np.float32)[:, None]
    apart = np.random.default_rng(0).standard_normal((90, 4)) + 20 * labels
    assert two_sample_classifier(apart)(labels)[0] == 1
    assert two_sample_classifier(np.ones((90, 4)))(labels)[0] == 0.5


def test_an_accuracy_that_falls_at_equal_confidence_is_found_and_a_lower_confidence_is_not():
    draw = np.random.default_rng(2)
    reference, window = drawn(draw, 800), drawn(draw, 200)
    of = strata(reference, least_sure_corrected(window, 100))
    assert of.images.sum() == 100 and of.right.sum() / 100 < 0.65 < reference.correct.mean()
    assert of.expected == pytest.approx(0.55, abs=0.07)  # as sure as these, 0.4 to 0.7
    assert accuracy_test(of, 999).p > 0.05
    worse = Sample(window.classes, window.confidence, None, window.correct * (draw.random(200) < 0.7))  # fmt: skip
    test = accuracy_test(strata(reference, least_sure_corrected(worse, 100)), 999)
    assert test.p < 0.01 and test.effect > test.chance > 0


def test_without_features_the_others_are_tested():
    draw = np.random.default_rng(3)
    reference = drawn(draw, 50)
    bare = Sample(reference.classes, reference.confidence, None, reference.correct)
    tests = compare_samples(bare, unlabelled(drawn(draw, 6000)), 0.05, divisions=99)
    assert [test.name for test in tests] == ["class mix", "confidence"]
    assert tests[0].images == 5000  # of a large window an even part is compared
