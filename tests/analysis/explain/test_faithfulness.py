import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from analysis.explain import faithfulness
from analysis.explain.methods import explainer
from analysis.page import figures
from models import create_model
from models.classifier import split_model

SIZE, CORNER = 8, 4


@pytest.fixture(scope="module")
def model():
    """A linear model that looks at the redness of the upper left corner, and nowhere else."""
    model = create_model("linear", 2, image_size=SIZE)
    kernel = np.zeros((SIZE, SIZE, 3, 2), np.float32)
    kernel[:CORNER, :CORNER, 0] = 0.1, -0.1
    model.stages[0].layers[1].kernel.set_value(jnp.asarray(kernel.reshape(-1, 2)))
    return model


@pytest.fixture(scope="module")
def images():
    """Random images with a red corner: of class 0."""
    images = np.random.default_rng(0).integers(0, 100, (12, SIZE, SIZE, 3), dtype=np.uint8)
    images[:, :CORNER, :CORNER, 0] = 255
    return images, np.zeros(12, int)


def corner_maps(count: int) -> np.ndarray:
    maps = np.zeros((count, SIZE, SIZE))
    maps[:, :CORNER, :CORNER] = 1
    return maps


def test_the_area_of_half_a_map():
    single, half = np.zeros((2, 4, 4))
    single[1, 2], half[:2] = 5, 0.1
    uneven = np.zeros((4, 4))
    uneven[0, :3] = 0.6, 0.3, 0.1
    maps = np.stack([single, half, np.ones((4, 4)), uneven, np.zeros((4, 4))])
    expected = [1 / 16, 4 / 16, 8 / 16, 1 / 16, math.nan]
    np.testing.assert_allclose(faithfulness.half_area(maps), expected)


def test_ranks_are_a_permutation_and_break_ties_at_random():
    maps = np.zeros((3, 10, 10))
    maps[:, 4, 7], maps[:, 0, 0] = 2, 1
    ranks = faithfulness.ranks(maps, seed=1)
    assert (np.sort(ranks.reshape(3, -1), axis=1) == np.arange(100)).all()
    assert (ranks[:, 4, 7] == 0).all() and (ranks[:, 0, 0] == 1).all()
    assert 30 < ranks[:, 5:].mean() < 70  # zeros of the lower half do not come last
    np.testing.assert_array_equal(ranks, faithfulness.ranks(maps, seed=1))
    assert (ranks != faithfulness.ranks(maps, seed=2)).any()


def test_curves_against_a_loop_over_pixels():
    draw = np.random.default_rng(3)
    images = draw.integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    maps, targets = draw.random((2, 4, 4)), np.array([1, 0])
    mean = lambda x: np.stack([x.mean(axis=(1, 2, 3)), x[:, 0, 0, 0]], axis=1)  # noqa: E731
    curves = faithfulness.deletion_and_insertion(mean, images, maps, targets)
    blurred = faithfulness.blurred(images)
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        places = sorted(np.ndindex(4, 4), key=lambda place: -maps[i][place])
        for number in range(faithfulness.STEPS + 1):  # as many steps as pixels
            gone, back = image.astype(float), blurred[i].copy()
            for place in places[:number]:
                gone[place], back[place] = blurred[i][place], image[place]
            for curve, mixed in zip(curves, (gone, back), strict=True):
                assert curve[i, number] == pytest.approx(mean(mixed[None])[0, target], rel=1e-5)


def test_a_perfect_map_beats_a_random_one(model, images):
    predict = lambda x: np.asarray(jax.nn.softmax(model(model.preprocess(jnp.asarray(x)))))  # noqa: E731
    areas = {}
    for name, maps in {
        "perfect": corner_maps(12),
        "random": np.random.default_rng(0).random((12, SIZE, SIZE)),
        "opposite": 1 - corner_maps(12),
    }.items():
        curves = faithfulness.deletion_and_insertion(predict, images[0], maps, images[1])
        areas[name] = [curve.mean(axis=1) for curve in curves]
    assert (areas["perfect"][0] < areas["random"][0]).all()  # deletion
    assert (areas["random"][0] < areas["opposite"][0]).all()
    assert (areas["perfect"][1] > areas["random"][1]).all()  # insertion
    assert (areas["random"][1] > areas["opposite"][1]).all()


def test_shuffled_weights_are_the_same_values_in_another_order(model):
    _, params, _ = split_model(model)
    for seed, same in ((0, True), (1, False)):
        _, shuffled, _ = split_model(faithfulness.shuffled_model(model, seed))
        (_, again, _) = split_model(faithfulness.shuffled_model(model, 0))
        for path, array in params.items():
            assert sorted(np.ravel(shuffled[path])) == sorted(np.ravel(array))
            if array.ndim > 1:
                assert not np.array_equal(shuffled[path], array)
                assert np.array_equal(shuffled[path], again[path]) == same


def test_rank_correlation_equals_scipys():
    draw = np.random.default_rng(0)
    first = draw.integers(0, 5, (4, 6, 6))  # with ties
    second = first + draw.normal(size=first.shape)
    second[3] = 7
    correlations = faithfulness.rank_correlation(first, second)
    for i in range(3):
        expected = stats.spearmanr(first[i].ravel(), second[i].ravel()).statistic
        assert correlations[i] == pytest.approx(expected)
    assert math.isnan(correlations[3])


def test_one_row_of_a_model(model, images):
    explain = explainer(model, SIZE, "gradient")
    scores = faithfulness.score_maps(model, explain, *images)
    assert scores["deletion_map"].shape == (12, 17) and not scores["zero"].any()
    row = faithfulness.summarise(scores)
    half_of_the_corner = CORNER**2 / 2 / SIZE**2
    assert row["half_area"] == (pytest.approx(half_of_the_corner), pytest.approx(0, abs=1e-9))
    curves = scores["deletion_random"]
    areas = (curves[:, 1:] + curves[:, :-1]).mean(axis=1) / 2  # by trapezoids
    low, high = stats.t.interval(0.95, 11, areas.mean(), stats.sem(areas))
    assert row["deletion_random"] == (pytest.approx(areas.mean()), pytest.approx((high - low) / 2))
    assert row["gain"][0] > row["gain"][1] > 0
    assert abs(row["similarity"][0]) < 0.5
    again = faithfulness.score_maps(model, explain, *images)
    assert row["seconds"][0] > 0
    for key in scores.keys() - {"seconds"}:
        np.testing.assert_array_equal(scores[key], again[key])


def test_maps_of_zeros_are_counted_and_left_out_of_means(model, images):
    zeros = lambda images, targets, other=None: np.zeros(images.shape[:3], np.float32)  # noqa: E731
    scores = faithfulness.score_maps(model, zeros, *images)
    assert scores["zero"].all()
    row = faithfulness.summarise(scores)
    assert math.isnan(row["half_area"][0]) and not math.isnan(row["gain"][0])
    table = faithfulness.score_table({"x": scores}, ["model", "map"], {"x": ["8x8"]})
    (cells,) = table.rows
    assert len(cells) == len(table.columns) and cells[:2] == ["x", "8x8"]
    assert cells[4:6] == ["–", "–"] and cells[-1] == "12 of 12"


def test_the_gain_over_the_centre(model, images):
    """A map of the corner beats the centre, a map of the centre gains nothing over it."""
    maps = {"corner": corner_maps(12), "centre": faithfulness.centred((12, SIZE, SIZE))}
    for name, given in maps.items():
        explain = lambda images, targets, other=None, given=given: given - given.min()  # noqa: E731
        gain, half = faithfulness.summarise(faithfulness.score_maps(model, explain, *images))[
            "gain_centre"
        ]
        assert gain > half > 0 if name == "corner" else abs(gain) < 1e-9
    middle = maps["centre"][0]
    assert middle.argmax() in (27, 28, 35, 36) and middle[0, 0] == middle.min()


def test_mean_and_interval():
    assert faithfulness.mean_and_interval(np.array([math.nan, 2.0]))[0] == 2.0
    assert math.isnan(faithfulness.mean_and_interval(np.array([math.nan]))[0])
    mean, half = faithfulness.mean_and_interval(np.array([1.0, math.nan, 2.0, 4.0]))
    low, high = stats.t.interval(0.95, 2, 7 / 3, stats.sem([1, 2, 4]))
    assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))


def test_the_chart_has_a_line_per_model_and_order():
    curve = np.linspace(1, 0, 17)[None].repeat(3, axis=0)
    values = {f"{k}_{n}": curve for k in ("deletion", "insertion") for n in ("map", "random")}
    figure = faithfulness.draw_faithfulness(
        {"a": values, "b $": values}, "Grad-CAM", {"a": "red", "b $": "blue"}
    )
    assert [len(axis.lines) for axis in figure.axes] == [6, 4]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["by Grad-CAM", "in random order", "a", r"b \$"]
    figures.plt.close(figure)
