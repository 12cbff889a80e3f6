import numpy as np
import pytest
from scipy import stats

from analysis.power_law import Points, fit, interval, predict_last

PARTS = np.array([0.05, 0.1, 0.25, 0.5, 1.0])
POOL = 2000


def draw(rng, law, seeds=3, images=400, scatter=0.1, choice=0.5, parts=PARTS):
    """Scores [J, S, N] of runs whose errors follow a law, (floor, rest, exponent).

    Each training image has an effect, those of a run their mean; a seed's parts are nested. Some
    test images are more difficult than others, and the same at all sizes.
    """
    floor, rest, exponent = law
    effect, counts = rng.normal(size=POOL), (parts * POOL).astype(int)
    orders = [rng.permutation(POOL) for _ in range(seeds)]
    chosen = [[np.sqrt(n) * effect[order[:n]].mean() for order in orders] for n in counts]
    drawn = np.sqrt(choice) * np.array(chosen)
    drawn += np.sqrt(1 - choice) * rng.normal(size=drawn.shape)
    error = (floor + rest * parts**-exponent)[:, None] * (1 + scatter * drawn)
    difficulty = np.sqrt(0.6) * rng.normal(size=images)
    difficulty = difficulty + np.sqrt(0.4) * rng.normal(size=(*error.shape, images))
    return (stats.norm.cdf(difficulty) > error[..., None]).astype(float)


def points_of(rng, law, parts=PARTS, **options):
    return Points(parts * POOL, draw(rng, law, parts=parts, **options), POOL)


def holds(draws, truth):
    low, high = interval(draws)
    return low <= truth <= high


@pytest.mark.parametrize("law", [(0.0, 0.05, 0.4), (0.1, 0.05, 0.8)])
def test_a_law_without_noise_is_found(law):
    error = law[0] + law[1] * PARTS ** -law[2]
    images = 5_000
    right = np.stack([np.arange(images) >= round(e * images) for e in error])
    found = fit(Points(PARTS * POOL, np.stack([right, right], axis=1), POOL))
    assert found.has_floor > 0.95 if law[0] else found.has_floor < 0.8
    for size in (100, POOL, 2 * POOL):
        truth = law[0] + law[1] * (size / POOL) ** -law[2]
        assert np.median(found.error(size)) == pytest.approx(truth, rel=0.04)
    assert holds(found.exponent, law[2])


def test_intervals_hold_the_truth_as_often_as_they_say():
    """A small part of what the module's figures come from, with a fixed seed."""
    rng, hits, widths = np.random.default_rng(3), [], []
    laws = [(a, b, c) for a in (0, 0.03) for b in (0.02, 0.08) for c in (0.2, 0.35, 0.6)]
    for law in laws * 2:
        points, (floor, rest, exponent) = points_of(rng, law), law
        part = fit(points.first(4), draws=1000)  # from 5 to 50 %
        now, twice = floor + rest, floor + rest * 2**-exponent
        predicted = predict_last(points, draws=1000)
        hits.append([holds(part.error(POOL), now), holds(part.error(2 * POOL), twice)])
        hits[-1].append(holds(predicted, points.error[-1]))
        widths.append(np.subtract(*interval(part.error(POOL))[::-1]) / now)
    assert len(hits) == 24
    assert (np.sum(hits, axis=0) >= 21).all()  # of 95 %, fewer have a probability of 3 %
    assert 0.2 < np.median(widths) < 1.2  # and they are of use


def test_the_largest_size_is_predicted_unless_the_law_breaks():
    rng = np.random.default_rng(0)
    values = draw(rng, (0.0, 0.05, 0.4), images=1000, scatter=0.03)
    points = Points(PARTS * POOL, values, POOL)
    assert holds(predict_last(points), points.error[-1])
    stuck = values.copy()
    stuck[-1] = stuck[2]  # no better than with a quarter
    points = Points(PARTS * POOL, stuck, POOL)
    assert not holds(predict_last(points), points.error[-1])


def test_what_is_known_less_well_has_wider_intervals():
    def width(points, size=2 * POOL):
        return np.subtract(*interval(fit(points).error(size))[::-1])

    values = draw(np.random.default_rng(1), (0.0, 0.05, 0.4), images=1000, scatter=0.05)
    sizes = PARTS * POOL
    plain = Points(sizes, values, POOL)
    assert width(plain.first(3)) > 1.3 * width(plain)  # fewer sizes
    assert width(plain) < width(plain, 8 * POOL)
    few = Points(sizes, values[:, :, :250], POOL)  # fewer test images
    assert width(few) > 1.3 * width(plain)
    copies = np.repeat(values[:, :, :250], 4, axis=2)  # and as many, but in groups of four
    grouped = Points(sizes, copies, POOL, np.repeat(np.arange(250), 4))
    assert width(grouped) == pytest.approx(width(few), rel=0.25)
    scattered = draw(np.random.default_rng(1), (0.0, 0.05, 0.4), images=1000, scatter=0.3)
    assert width(Points(sizes, scattered, POOL)) > 1.3 * width(plain)


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_models_without_errors_and_without_hits_have_a_law(score):
    values = np.full((4, 2, 50), score)
    found = fit(Points(np.array([10, 20, 40, 80]), values, 80))
    low, high = interval(found.error(160))
    assert 0 <= low <= high <= 1.1 and abs(np.mean([low, high]) - (1 - score)) < 0.1


def test_errors_that_rise_promise_nothing():
    values = draw(np.random.default_rng(2), (0.0, 0.3, -0.2), images=400)
    found = fit(Points(PARTS * POOL, values, POOL))
    gain = found.error(POOL) - found.error(2 * POOL)
    assert (gain >= 0).all() and np.median(gain) < 0.02
