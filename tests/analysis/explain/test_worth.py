import numpy as np
import pytest
from scipy import stats

from analysis.explain import worth
from analysis.explain.faithfulness import STEPS, gains


def made_up(gain: np.ndarray, took: float) -> dict:
    """Scores whose gain over a random map is as given."""
    curve = lambda value: np.broadcast_to(np.reshape(value, (-1, 1)), (len(gain), STEPS + 1))  # noqa: E731
    return {
        "insertion_map": curve(gain), "deletion_map": curve(0.0), "zero": np.zeros(len(gain), bool),
        "insertion_random": curve(0.0), "deletion_random": curve(0.0), "seconds": np.array([took]),
    }  # fmt: skip


@pytest.fixture
def scores():
    draw, image = np.random.default_rng(0), np.random.default_rng(1).normal(0, 0.3, 12)
    given = {
        "Grad-CAM": (0.2, 0.001),
        "occlusion": (0.3, 0.02),
        "LIME": (0.6, 1.0),
        "SHAP": (0.3, 2.0),
    }
    return {
        name: made_up(mean + image + draw.normal(0, 0.05, 12), took)
        for name, (mean, took) in given.items()
    }


def test_differences_are_paired_and_simultaneous(scores):
    found = worth.differences(scores, ["LIME", "SHAP"])
    assert len(found) == 4
    paired = gains(scores["LIME"]) - gains(scores["occlusion"])
    low, high = stats.t.interval(1 - 0.05 / 4, 11, paired.mean(), stats.sem(paired))
    assert found["LIME", "occlusion"] == pytest.approx((paired.mean(), low, high))


def test_the_verdict_follows_the_intervals(scores):
    text, numbers = worth.sentences("cnn", scores, ["LIME", "SHAP"])
    assert text == "LIME is worth its time on cnn; SHAP is not shown to be."
    assert numbers.startswith("Over 12 images, the gain")
    assert "(occlusion, 0.02 s)" in numbers and "1 s per image" in numbers
    both, _ = worth.sentences("cnn", {**scores, "SHAP": scores["LIME"]}, ["LIME", "SHAP"])
    assert both == "LIME and SHAP are worth their time on cnn."
    none, _ = worth.sentences("cnn", {**scores, "LIME": scores["SHAP"]}, ["LIME", "SHAP"])
    assert none == "LIME and SHAP are not shown to be worth their time on cnn."
    one, _ = worth.sentences("cnn", scores, ["SHAP"])
    assert one == "SHAP is not shown to be worth its time on cnn."


def test_one_image_or_no_slow_method(scores):
    single = {name: made_up(gains(s)[:1], 1.0) for name, s in scores.items()}
    text, numbers = worth.sentences("cnn", single, ["LIME"])
    assert "not shown" in text and "nan" not in numbers and "Over 1 image, " in numbers
    quick = {name: scores[name] for name in ("Grad-CAM", "occlusion")}
    text, numbers = worth.sentences("cnn", quick, [])
    assert text == "Of 2 methods, occlusion has the most faithful maps of cnn."
    assert numbers.endswith(" by occlusion.")


def test_equal_methods_are_rarely_called_worth_their_time():
    """Six equal methods, 200 experiments: any interval without 0 is a false alarm."""
    draw, alarms = np.random.default_rng(0), 0
    for _ in range(200):
        values = draw.normal(0, 0.2, (6, 12)) + draw.normal(0, 0.3, 12)
        scores = {name: made_up(row, 1.0) for name, row in zip("abcdef", values, strict=True)}
        found = worth.differences(scores, ["a", "b"])
        alarms += any(low > 0 or high < 0 for _, low, high in found.values())
    assert alarms / 200 <= 0.06
