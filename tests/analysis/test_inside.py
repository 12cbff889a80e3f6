import os
import subprocess
import sys
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest

from analysis import inside
from errors import UserError
from tests.analysis.conftest import words
from tests.conftest import ROOT


def test_colours_are_symmetric_about_zero():
    filters = np.zeros((3, 1, 2, 3))
    filters[0, 0, 0], filters[1, 0, 1] = [0.2, 0, -0.4], [8, -4, 0]
    shown = inside.as_colours(filters)
    np.testing.assert_allclose(shown[0, 0], [[0.75, 0.5, 0], [0.5, 0.5, 0.5]])
    np.testing.assert_allclose(shown[1, 0, 1], [1, 0.25, 0.5])
    assert (shown[2] == 0.5).all()


def test_a_mosaic_holds_every_tile_in_its_place():
    tiles = np.random.default_rng(0).random((5, 2, 3, 3)) / 2
    canvas = inside.mosaic(tiles, 2, gap=1)
    assert canvas.shape == (9, 8, 3)
    np.testing.assert_array_equal(canvas[3:5, 4:7], tiles[3])
    np.testing.assert_array_equal(canvas[6:8, 0:3], tiles[4])
    assert (canvas[6:, 4:] == 1).all() and (canvas[2] == 1).all() and (canvas[:, 3] == 1).all()


# --- feature maps ---------------------------------------------------------------------------------


def test_feature_maps_show_the_strongest_channels_and_name_dead_ones():
    maps = np.zeros((2, 2, 20), np.float32)
    maps[..., :5] = np.arange(1, 6)
    maps[..., 19] = -1
    shown = words(inside.draw_feature_maps(maps, np.zeros((4, 4, 3), np.uint8), "a $x$ b"))
    assert r"a \$x\$ b: 16 of 20 channels, maps of 2×2" in shown
    assert {"4", "0", "5: all zero", "15: all zero", "activation"} <= set(shown)
    assert not {"19", "16: all zero"} & set(shown)
    assert shown.index("4") < shown.index("3") < shown.index("0") < shown.index("5: all zero")


# --- predictions ----------------------------------------------------------------------------------


def test_predictions_say_right_and_wrong_in_words():
    logits = np.log(np.array([[0.7, 0.2, 0.06, 0.04], [0.1, 0.85, 0.02, 0.03]]))
    run = SimpleNamespace(
        test={"labels": np.array([0, 0]), "logits": logits},
        class_names=["cat", "dog", "a very long name", "$x$"],
    )
    photos = np.zeros((2, 4, 4, 3), np.uint8)
    shown = words(inside.draw_predictions(run, photos, np.array([0, 1])))
    assert {"cat: right", "cat: wrong", "70 % cat", "20 % dog", "85 % dog"} <= set(shown)
    assert {"6 % a very long n…", r"3 % \$x\$"} <= set(shown) and "4 % $x$" not in shown
    assert len(shown) == 8  # three classes each


# --- section and command --------------------------------------------------------------------------


def test_the_section_has_its_pictures(digits_groups, tmp_path):
    section = inside.inspect_section(digits_groups, tmp_path)
    assert section.title == "Looking inside"
    pictures = [*section.pictures, *(item.picture for item in section.details)]
    files = [picture.file for picture in pictures]
    assert len(section.pictures) == 1 and section.finding in section.text
    assert files == [
        "inspect_cka.svg", "inspect_predictions.png", "inspect_filters.png", "inspect_features.png"
    ]  # fmt: skip
    for file in files:
        assert (tmp_path / file).stat().st_size > 2000
    assert matplotlib.image.imread(tmp_path / "inspect_filters.png")[..., :3].std() > 0.1
    assert "Feature maps of cnn, seed 0" in pictures[3].caption
    matrix = section.data["cka"]["matrix"]
    assert len(matrix) == 2 and None in matrix[0] + matrix[1]
    assert pictures[1].caption.count("few/") == 12


def test_a_section_says_what_a_model_does_not_have(digits_groups, tmp_path):
    section = inside.inspect_section({"knn": digits_groups["knn"]}, tmp_path)
    assert [item.picture.file for item in section.details] == ["inspect_predictions.png"]
    text = " ".join(section.text)
    assert "two models" in text
    assert "no weights on the image" in text and "returns a feature map" in text


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Returns a function that runs the command with options, its pictures in tmp_path."""
    options = {"what": None, "stage": None, "image": "", "images": 12}
    options |= {"data": "", "output": str(tmp_path)}

    def run(path, **changes):
        for name, value in (options | changes).items():
            option = SimpleNamespace(value=value)
            monkeypatch.setattr(inside, name.upper(), option, raising=False)
        return inside.main(["inside", str(path)])

    return run


def test_the_command_shows_what_is_asked_for(
    digits_workdir, digits_groups, command, tmp_path, capsys
):
    name = digits_groups["cnn"][0].test["ids"][5]
    parts = ["features", "curves", "predictions"]
    assert command(digits_workdir / "cnn/seed0", what=parts, stage=1, image=name) == 0
    text = capsys.readouterr().out
    assert (
        f"for {name}: the output of stage 1" in text
        and "seed0: " in text
        and f"Files: {name}." in text
    )
    assert {path.name for path in tmp_path.iterdir()} == {
        "inspect_features.png",
        "inspect_predictions.png",
    }
    command(digits_workdir, what=["predictions"], images=3)
    assert capsys.readouterr().out.count("few/") == 3
    for changes, message in (
        ({"what": ["filter"]}, "Did you mean 'filters'"),
        ({"stage": 7}, "those that do: 0, 1"),
        ({"what": ["features"], "image": "few/none"}, "not tested on an image 'few/none'"),
        ({"what": ["cka"]}, "two models, or two seeds"),
    ):
        with pytest.raises(UserError, match=message):
            command(digits_workdir / "cnn/seed0", **changes)


def test_the_command_leaves_out_what_a_model_does_not_have(digits_workdir, command, capsys):
    assert command(digits_workdir / "knn/seed0") == 0
    text = capsys.readouterr().out
    assert "filters: left out: knn" in text and "predictions: Predictions of knn" in text


def test_a_mistake_exits_with_2(digits_workdir):
    done = subprocess.run(
        [sys.executable, "-m", "analysis.inside", digits_workdir, "--what=curves,filter", "--stage=1",
         "--image=a", "--images=3", "--data=d", "--output=o"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 2 and not done.stdout
    assert (
        done.stderr.startswith("error: --what: 'filter' is not known")
        and "'filters'" in done.stderr
    )
