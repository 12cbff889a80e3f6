import math
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import matplotlib.image
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from scipy.signal import correlate
from sklearn.datasets import load_digits
from sklearn.metrics import log_loss

from analysis import inside as inspect
from analysis.explain import representations
from analysis.forward import load_classifier, load_test_images
from analysis.runs import group_runs, load_run, load_runs
from errors import UserError
from models import create_model
from models.classifier import in_mode
from models.vit import VisionTransformer
from tests.analysis.fabricate import train_digits, write_run
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def workdir(cache_dir, tmp_path_factory):
    """Nearest neighbours, softmax regression and two seeds of a CNN on 200 digits of 8x8 pixels."""
    folder, source = tmp_path_factory.mktemp("runs"), load_digits()
    images = np.round(source.images[:200] * (255 / 16)).astype(np.uint8)
    np.savez(folder / "few.npz", images=images, labels=source.target[:200])
    data = {"data__source": "npz", "data__path": str(folder / "few.npz")}
    settings = {"epochs": 2, "optimizer__name": "sgd"}
    return train_digits(folder, cache_dir, "knn,linear,cnn", "cnn", **settings, **data)


@pytest.fixture(scope="module")
def groups(workdir):
    return group_runs(load_runs(workdir))


@pytest.fixture(scope="module")
def cnn(groups):
    return load_classifier(groups["cnn"][0])


@pytest.fixture(scope="module")
def photos(groups):
    return load_test_images(groups["cnn"][0])


class TinyVit(VisionTransformer):
    width, heads, depth = 8, 2, 1


@pytest.fixture(scope="module")
def vit():
    """A vision transformer of ones, for to draw its weights takes seconds to compile."""
    shapes = nnx.eval_shape(lambda: TinyVit(4, 32, rngs=nnx.Rngs(0)))
    graph, keys, arrays = nnx.split(shapes, nnx.RngState, ...)
    ones = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), arrays)
    model = nnx.merge(graph, keys, ones)
    model = in_mode(model, training=False)
    return model


def words(figure):
    """Every text of a figure."""
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


# --- similarity of representations ----------------------------------------------------------------


def hsic(k, l):  # noqa: E741
    """Unbiased estimator of Song et al. 2012, equation 5, from its sums."""
    n = len(k)
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    one = np.ones(n)
    middle = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ l) + middle - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))


@pytest.mark.parametrize("widths", [(5, 7), (60, 3), (90, 200)])
def test_cka_is_that_of_its_definitions(widths):
    draw = np.random.default_rng(0)
    x = draw.normal(3, 2, size=(30, widths[0]))
    y = np.tanh(x @ draw.normal(size=widths)) + draw.normal(size=(30, widths[1]))
    k, l = x @ x.T, y @ y.T  # noqa: E741
    expected = hsic(k, l) / math.sqrt(hsic(k, k) * hsic(l, l))
    assert representations.linear_cka(x, y) == pytest.approx(expected, abs=1e-12)
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    plain = np.linalg.norm(y.T @ x) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
    assert representations.linear_cka(x, y, debiased=False) == pytest.approx(plain, abs=1e-12)


def test_cka_ignores_rotation_scale_and_shift():
    draw = np.random.default_rng(1)
    x, y = draw.normal(size=(40, 12)), draw.normal(size=(40, 6))
    y[:, 0] += x[:, 0]
    rotation = np.linalg.qr(draw.normal(size=(12, 12)))[0]
    value = representations.linear_cka(x, y)
    assert representations.linear_cka(-7 * x @ rotation + 100, 0.01 * y) == pytest.approx(value)
    stretched = x * np.linspace(1, 9, 12)  # not isotropic
    assert abs(representations.linear_cka(stretched, y) - value) > 0.01
    assert representations.linear_cka(x, x @ rotation) == pytest.approx(1)


def test_only_the_debiased_cka_of_unrelated_features_is_zero():
    draw = np.random.default_rng(2)
    pairs = [draw.normal(size=(2, 50, 500)) for _ in range(20)]
    values = [representations.linear_cka(x, y) for x, y in pairs]
    assert abs(np.mean(values)) < 0.02 and np.max(np.abs(values)) < 0.1
    assert representations.linear_cka(*pairs[0], debiased=False) > 0.8


def test_features_that_say_nothing_have_no_similarity():
    x = np.random.default_rng(3).normal(size=(10, 4))
    assert math.isnan(representations.linear_cka(x, np.ones((10, 3))))
    with pytest.raises(ValueError, match="need 4"):
        representations.linear_cka(x[:3], x[:3])


def test_models_are_compared_on_the_same_images(groups, cnn, photos):
    found = representations.compare_representations(groups, images=24)
    assert sorted(found.labels) == ["cnn", "pixels"] and found.images == 24
    rows = np.linspace(0, len(photos) - 1, 24).round().astype(int)
    features = []
    for run in groups["cnn"]:
        model = load_classifier(run)
        maps = model.features(model.preprocess(jnp.asarray(photos[rows])))
        features.append(np.asarray(maps).mean(axis=(1, 2)))
    i, j = found.labels.index("cnn"), found.labels.index("pixels")
    assert found.matrix[i, i] == pytest.approx(representations.linear_cka(*features), abs=1e-4)
    between = representations.linear_cka(features[0], photos[rows].reshape(24, -1))
    assert found.matrix[i, j] == found.matrix[j, i] == pytest.approx(between, abs=1e-4)
    assert math.isnan(found.matrix[j, j])
    shown = set(words(representations.draw_similarity(found)))
    assert {"cnn", "pixels", "–", f"{between:.2f}"} <= shown
    pair = " and ".join(found.labels)
    assert f"those of {pair} ({between:.2f})." in representations.describe(found)


def test_runs_on_other_images_are_left_out(groups):
    run = groups["cnn"][0]
    other = SimpleNamespace(test={"ids": run.test["ids"][::-1]})
    found = representations.compare_representations({"cnn": [run], "other": [other]})
    assert found.labels == ["cnn"] and found.left_out == ["other"]
    text = representations.describe(found)
    assert text == "Left out, for they were tested on other images: other."


# --- first layer ----------------------------------------------------------------------------------


def test_filters_are_the_first_kernel(cnn, monkeypatch):
    filters = representations.first_filters(cnn)
    kernel = np.asarray(cnn.stages[0].layers[0].kernel[...])  # [3, 3, 3, 32]
    assert filters.shape == (32, 3, 3, 3)
    np.testing.assert_array_equal(filters[5, 1, 2], kernel[1, 2, :, 5])
    monkeypatch.setattr(cnn, "preprocessing", replace(cnn.preprocessing, channels="bgr"))
    swapped = representations.first_filters(cnn)
    np.testing.assert_array_equal(swapped[5, 1, 2], kernel[1, 2, ::-1, 5])


def test_templates_of_a_linear_model_explain_its_logits(groups, photos):
    model = load_classifier(groups["linear"][0])
    assert representations.has_one_layer(model)
    templates = representations.first_filters(model)
    assert templates.shape == (10, 8, 8, 3)
    x = model.preprocess(jnp.asarray(photos[:2]))
    change = np.asarray(model(x) - model(jnp.zeros_like(x)))
    np.testing.assert_allclose(
        np.einsum("nhwc,khwc->nk", np.asarray(x), templates), change, atol=1e-4
    )


def test_other_first_layers(groups, vit):
    mlp = create_model("mlp", 4, image_size=8, hidden=(70,))
    assert representations.first_filters(mlp).shape == (70, 8, 8, 3)
    assert not representations.has_one_layer(mlp)
    assert representations.first_filters(vit).shape == (8, 16, 16, 3)
    with pytest.raises(UserError, match="no weights on the image"):
        representations.first_filters(load_classifier(groups["knn"][0]))


def test_the_strongest_filters_keep_their_order():
    filters = np.ones((5, 2, 2, 3)) * np.array([1, -5, 2, 4, 0])[:, None, None, None]
    assert representations.strongest(filters, 3)[:, 0, 0, 0].tolist() == [-5, 2, 4]
    assert len(representations.strongest(np.ones((200, 1, 1, 3)))) == 64


def test_colours_are_symmetric_about_zero():
    filters = np.zeros((3, 1, 2, 3))
    filters[0, 0, 0], filters[1, 0, 1] = [0.2, 0, -0.4], [8, -4, 0]
    shown = inspect.as_colours(filters)
    np.testing.assert_allclose(shown[0, 0], [[0.75, 0.5, 0], [0.5, 0.5, 0.5]])
    np.testing.assert_allclose(shown[1, 0, 1], [1, 0.25, 0.5])
    assert (shown[2] == 0.5).all()


def test_a_mosaic_holds_every_tile_in_its_place():
    tiles = np.random.default_rng(0).random((5, 2, 3, 3)) / 2
    canvas = inspect.mosaic(tiles, 2, gap=1)
    assert canvas.shape == (9, 8, 3)
    np.testing.assert_array_equal(canvas[3:5, 4:7], tiles[3])
    np.testing.assert_array_equal(canvas[6:8, 0:3], tiles[4])
    assert (canvas[6:, 4:] == 1).all() and (canvas[2] == 1).all() and (canvas[:, 3] == 1).all()


# --- feature maps ---------------------------------------------------------------------------------


def test_feature_maps_are_the_convolution_written_out(cnn, photos):
    maps = representations.feature_maps(cnn, photos[3], 0)
    assert maps.shape == (4, 4, 32)
    kernel = np.asarray(cnn.stages[0].layers[0].kernel[...])
    bias = np.asarray(cnn.stages[0].layers[0].bias[...])
    x = np.pad(np.asarray(cnn.preprocess(photos[3])), ((1, 1), (1, 1), (0, 0)))
    for channel in (0, 31):
        y = correlate(x, kernel[..., channel], mode="valid")[..., 0] + bias[channel]
        pooled = np.maximum(y, 0).reshape(4, 2, 4, 2).max(axis=(1, 3))
        np.testing.assert_allclose(maps[..., channel], pooled, atol=1e-5)


def test_stages_without_maps_are_named(cnn, vit, photos):
    assert representations.map_shapes(cnn, 8) == {0: (4, 4, 32), 1: (2, 2, 64)}
    assert representations.telling_stage(cnn, 8) == 0
    with pytest.raises(UserError, match="stage 2 of this Cnn .* those that do: 0, 1"):
        representations.feature_maps(cnn, photos[0], 2)
    assert representations.telling_stage(vit, 32) is None  # its stages hand on tokens


def test_feature_maps_show_the_strongest_channels_and_name_dead_ones():
    maps = np.zeros((2, 2, 20), np.float32)
    maps[..., :5] = np.arange(1, 6)
    maps[..., 19] = -1
    shown = words(inspect.draw_feature_maps(maps, np.zeros((4, 4, 3), np.uint8), "a $x$ b"))
    assert r"a \$x\$ b: 16 of 20 channels, maps of 2×2" in shown
    assert {"4", "0", "5: all zero", "15: all zero", "activation"} <= set(shown)
    assert not {"19", "16: all zero"} & set(shown)
    assert shown.index("4") < shown.index("3") < shown.index("0") < shown.index("5: all zero")


# --- predictions ----------------------------------------------------------------------------------


def test_images_are_chosen_as_asked(tmp_path):
    run = load_run(write_run(tmp_path, "cnn", 0, count=50))
    assert inspect.select_images(run, "spread", 5).tolist() == [0, 12, 24, 37, 49]
    assert len(inspect.select_images(run, "spread", 500)) == 50
    worst = inspect.select_images(run, "worst", 50)
    losses = [
        log_loss([y], [np.exp(z) / np.exp(z).sum()], labels=range(4))
        for y, z in zip(run.test["labels"], run.test["logits"].astype(float), strict=True)
    ]
    assert (np.diff(np.array(losses)[worst]) <= 1e-6).all()
    drawn = inspect.select_images(run, "random", 10, seed=1)
    assert len(set(drawn)) == 10
    np.testing.assert_array_equal(drawn, inspect.select_images(run, "random", 10, seed=1))
    assert (drawn != inspect.select_images(run, "random", 10, seed=2)).any()
    assert inspect.find_image(run, "test/7.png") == 7
    with pytest.raises(UserError, match=r"nearest id is 'test/7\.png'"):
        inspect.find_image(run, "tests/7.png")
    with pytest.raises(UserError, match="Did you mean 'worst'"):
        inspect.select_images(run, "wrost", 3)
    with pytest.raises(UserError, match="at least 1"):
        inspect.select_images(run, "spread", 0)


def test_predictions_say_right_and_wrong_in_words():
    logits = np.log(np.array([[0.7, 0.2, 0.06, 0.04], [0.1, 0.85, 0.02, 0.03]]))
    run = SimpleNamespace(
        test={"labels": np.array([0, 0]), "logits": logits},
        class_names=["cat", "dog", "a very long name", "$x$"],
    )
    photos = np.zeros((2, 4, 4, 3), np.uint8)
    shown = words(inspect.draw_predictions(run, photos, np.array([0, 1])))
    assert {"cat: right", "cat: wrong", "70 % cat", "20 % dog", "85 % dog"} <= set(shown)
    assert {"6 % a very long n…", r"3 % \$x\$"} <= set(shown) and "4 % $x$" not in shown
    assert len(shown) == 8  # three classes each


# --- section and command --------------------------------------------------------------------------


def test_the_section_has_its_pictures(groups, tmp_path):
    section = inspect.inspect_section(groups, tmp_path)
    assert section.title == "Looking inside"
    files = [picture.file for picture in section.pictures]
    assert files == [
        "inspect_cka.svg", "inspect_predictions.png", "inspect_filters.png", "inspect_features.png"
    ]  # fmt: skip
    for file in files:
        assert (tmp_path / file).stat().st_size > 2000
    assert matplotlib.image.imread(tmp_path / "inspect_filters.png")[..., :3].std() > 0.1
    assert "Feature maps of cnn, seed 0" in section.pictures[3].caption
    matrix = section.data["cka"]["matrix"]
    assert len(matrix) == 2 and None in matrix[0] + matrix[1]
    assert section.pictures[1].caption.count("few/") == 12


def test_a_section_says_what_a_model_does_not_have(groups, tmp_path):
    section = inspect.inspect_section({"knn": groups["knn"]}, tmp_path)
    assert [picture.file for picture in section.pictures] == ["inspect_predictions.png"]
    text = " ".join(section.text)
    assert "two models" in text
    assert "no weights on the image" in text and "hands on a feature map" in text


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Returns a function that runs the command with options, its pictures in tmp_path."""
    options = {"what": None, "stage": None, "image": "", "images": 12, "select": "spread"}
    options |= {"seed": 0, "data": "", "output": str(tmp_path)}

    def run(path, **changes):
        for name, value in (options | changes).items():
            option = SimpleNamespace(value=value)
            monkeypatch.setattr(inspect, name.upper(), option, raising=False)
        return inspect.main(["inspect", str(path)])

    return run


def test_the_command_shows_what_is_asked_for(workdir, groups, command, tmp_path, capsys):
    name = groups["cnn"][0].test["ids"][5]
    parts = ["features", "curves", "predictions"]
    assert command(workdir / "cnn/seed0", what=parts, stage=1, image=name) == 0
    text = capsys.readouterr().out
    assert f"for {name}: what stage 1" in text and "seed0: " in text and f"Files: {name}." in text
    assert {path.name for path in tmp_path.iterdir()} == {
        "inspect_features.png",
        "inspect_predictions.png",
    }
    for changes, message in (
        ({"what": ["filter"]}, "Did you mean 'filters'"),
        ({"stage": 7}, "those that do: 0, 1"),
        ({"what": ["features"], "image": "few/none"}, "no such test image"),
        ({"what": ["cka"]}, "two models, or two seeds"),
    ):
        with pytest.raises(UserError, match=message):
            command(workdir / "cnn/seed0", **changes)


def test_the_command_leaves_out_what_a_model_does_not_have(workdir, command, capsys):
    assert command(workdir / "knn/seed0") == 0
    text = capsys.readouterr().out
    assert "filters: left out: knn" in text and "predictions: Predictions of knn" in text


def test_a_mistake_exits_with_2(workdir):
    done = subprocess.run(
        [sys.executable, "-m", "analysis.inspect", workdir, "--what=curves,filter", "--stage=1",
         "--image=a", "--images=3", "--select=worst", "--seed=1", "--data=d", "--output=o"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 2 and not done.stdout
    assert (
        done.stderr.startswith("error: --what: 'filter' is not known")
        and "'filters'" in done.stderr
    )
