import math

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


def test_entropy_and_area():
    single, half = np.zeros((2, 4, 4))
    single[1, 2], half[:2] = 5, 0.1
    uneven = np.zeros((4, 4))
    uneven[0, :3] = 0.6, 0.3, 0.1
    maps = np.stack([single, half, np.ones((4, 4)), uneven, np.zeros((4, 4))])
    expected = [0, math.log(8) / math.log(16), 1, stats.entropy([0.6, 0.3, 0.1], base=16), math.nan]
    np.testing.assert_allclose(faithfulness.entropy(maps), expected, atol=1e-12)
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
    found = faithfulness.deletion_and_insertion(mean, images, maps, targets, steps=4)
    blurred = faithfulness.blurred(images)
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        places = sorted(np.ndindex(4, 4), key=lambda place: -maps[i][place])
        for number in (0, 4, 8, 12, 16):
            gone, back = image.astype(float), blurred[i].copy()
            for place in places[:number]:
                gone[place], back[place] = blurred[i][place], image[place]
            for curve, mixed in zip(found, (gone, back), strict=True):
                assert curve[i, number // 4] == pytest.approx(
                    mean(mixed[None])[0, target], rel=1e-5
                )


def test_area_under_known_curves():
    curves = np.array([[1.0, 1.0, 1.0], [1.0, 0.5, 0.0], [0.0, 0.0, 1.0]])
    np.testing.assert_allclose(faithfulness.area_under(curves), [1, 0.5, 0.25])


def test_a_perfect_map_beats_a_random_one(model, images):
    predict = faithfulness.probabilities_of(model)
    areas = {}
    for name, maps in {
        "perfect": corner_maps(12),
        "random": faithfulness.uninformed_maps("random", 12, SIZE),
        "opposite": 1 - corner_maps(12),
    }.items():
        curves = faithfulness.deletion_and_insertion(predict, images[0], maps, images[1])
        areas[name] = [faithfulness.area_under(curve) for curve in curves]
    assert (areas["perfect"][0] < areas["random"][0]).all()  # deletion
    assert (areas["random"][0] < areas["opposite"][0]).all()
    assert (areas["perfect"][1] > areas["random"][1]).all()  # insertion
    assert (areas["random"][1] > areas["opposite"][1]).all()


def test_uninformed_maps():
    random = faithfulness.uninformed_maps("random", 2, 6, seed=4)
    assert random.shape == (2, 6, 6) and (random[0] != random[1]).any()
    np.testing.assert_array_equal(random, faithfulness.uninformed_maps("random", 2, 6, seed=4))
    (centre,) = faithfulness.uninformed_maps("centre", 1, 7)
    assert centre[3, 3] == centre.max() == 1 and centre[0, 0] == centre.min()
    np.testing.assert_allclose(centre, centre[::-1, ::-1].T)
    assert centre[3, 0] == pytest.approx(math.exp(-0.5 * (3 / (7 / 4)) ** 2))


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
    found = faithfulness.rank_correlation(first, second)
    for i in range(3):
        expected = stats.spearmanr(first[i].ravel(), second[i].ravel()).statistic
        assert found[i] == pytest.approx(expected)
    assert math.isnan(found[3])


def test_one_row_of_a_model(model, images):
    explain = explainer(model, SIZE, "gradient")
    measured = faithfulness.measure(model, explain, *images, steps=8)
    assert measured["deletion_map"].shape == (12, 9) and not measured["zero"].any()
    row = faithfulness.summarise(measured)
    half_of_the_corner = CORNER**2 / 2 / SIZE**2
    assert row["half_area"] == (pytest.approx(half_of_the_corner), pytest.approx(0, abs=1e-9))
    areas = faithfulness.area_under(measured["deletion_random"])
    low, high = stats.t.interval(0.95, 11, areas.mean(), stats.sem(areas))
    assert row["deletion_random"] == (pytest.approx(areas.mean()), pytest.approx((high - low) / 2))
    assert row["gain"][0] > row["gain"][1] > 0
    assert row["deletion_map"][0] < row["deletion_centre"][0]
    assert abs(row["similarity"][0]) < 0.5
    again = faithfulness.measure(model, explain, *images, steps=8)
    for key, values in measured.items():
        np.testing.assert_array_equal(values, again[key])


def test_maps_of_zeros_are_counted_and_left_out_of_means(model, images):
    zeros = lambda images, targets, other=None: np.zeros(images.shape[:3], np.float32)  # noqa: E731
    measured = faithfulness.measure(model, zeros, *images, steps=4)
    assert measured["zero"].all()
    row = faithfulness.summarise(measured)
    assert math.isnan(row["entropy"][0]) and not math.isnan(row["gain"][0])
    first, second = faithfulness.tables({"x": measured}, [0.5], ["8x8"], "Grad-CAM")
    assert second.rows[0][-1] == "12 of 12" and second.rows[0][3] == "–"
    assert len(first.rows[0]) == len(first.columns) and first.rows[0][:2] == ["x", "50.00"]


def test_mean_and_interval():
    assert faithfulness.mean_and_interval(np.array([math.nan, 2.0]))[0] == 2.0
    assert math.isnan(faithfulness.mean_and_interval(np.array([math.nan]))[0])
    mean, half = faithfulness.mean_and_interval(np.array([1.0, math.nan, 2.0, 4.0]))
    low, high = stats.t.interval(0.95, 2, 7 / 3, stats.sem([1, 2, 4]))
    assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))


def test_rank_test_is_exact_for_few():
    values = [0.5, 0.6, 0.7, 0.8, 0.9]
    assert faithfulness.rank_test(values, values) == (pytest.approx(1), pytest.approx(2 / 120))
    found, p = faithfulness.rank_test(values, [3, 1, 2, 5, 4])
    assert found == pytest.approx(stats.spearmanr(values, [3, 1, 2, 5, 4]).statistic)
    assert p > 0.1
    for one in ([1, 2], [1, 1, 1], [1, 2, math.nan]):
        assert math.isnan(faithfulness.rank_test(values[: len(one)], one)[0])


def test_the_answer_says_no_more_than_the_numbers():
    row = lambda area, gain: {"half_area": (area, 0.0), "gain": (gain, 0.0)}  # noqa: E731
    rising = [row(0.5 - i / 20, i / 10) for i in range(5)]
    accuracies = [0.5, 0.6, 0.7, 0.8, 0.9]
    text = faithfulness.answer(accuracies, rising)
    assert "maps that are more focused, and more faithful" in text and "+1.00" in text
    text = faithfulness.answer(accuracies[:3], rising[:3])  # p = 1/3
    assert "neither clearly more nor less focused, and neither clearly" in text
    assert "cannot be said of 2" in faithfulness.answer(accuracies[:2], rising[:2])


def test_the_centre_must_be_beaten_in_both():
    keys = ("deletion_map", "deletion_centre", "insertion_map", "insertion_centre")
    areas = [(0.1, 0.2, 0.5, 0.4), (0.1, 0.2, 0.4, 0.5), (0.3, 0.2, 0.5, 0.4)]
    rows = [{key: (area, 0.1) for key, area in zip(keys, row, strict=True)} for row in areas]
    assert "The maps of 1 of 3 models beat" in faithfulness.against_centre(rows)


def test_the_chart_has_a_line_per_model_and_order():
    curve = np.linspace(1, 0, 5)[None].repeat(3, axis=0)
    values = {f"{k}_{n}": curve for k in ("deletion", "insertion") for n in ("map", "random")}
    figure = faithfulness.draw_faithfulness(
        {"a": values, "b $": values}, "Grad-CAM", {"a": "red", "b $": "blue"}
    )
    assert [len(axis.lines) for axis in figure.axes] == [6, 4]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["by Grad-CAM", "in random order", "a", r"b \$"]
    figures.plt.close(figure)
