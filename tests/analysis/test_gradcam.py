import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from analysis import gradcam
from analysis.explain.heatmaps import ExplainedRun
from analysis.explain.methods import explainer
from analysis.forward import load_classifier, load_test_images
from analysis.runs import group_runs, load_runs
from errors import UserError
from tests.analysis.conftest import SIZE
from tests.conftest import ROOT


def test_the_section_of_a_workdir(corner_workdir, tmp_path):
    groups = group_runs(load_runs(corner_workdir))
    section = gradcam.gradcam_section(groups, tmp_path, 4)
    assert all((tmp_path / picture.file).stat().st_size > 1000 for picture in section.pictures)
    names = [picture.file for picture in section.pictures]
    assert names[0] == "gradcam_models.png" and names[-1] == "gradcam_faithfulness.svg"
    text = " ".join(section.text)
    assert "knn is left out: it is not trained by gradient" in text
    assert "linear is left out: none of its stages returns 4x4 places" in text
    (table,) = section.tables
    (row,) = table.rows
    assert row[0] == "cnn" and len(row) == len(table.columns)
    gain, half = section.data["cnn"]["gain"]
    assert gain > half > 0  # better than a random map


def test_right_beside_wrong(corner_run, tmp_path):
    wrong = corner_run.test["logits"].copy()
    target = corner_run.test["labels"][:4]
    wrong[np.arange(4), target] = wrong.min() - 1  # as if the first four had been mistaken
    changed = replace(corner_run)
    changed.__dict__["test"] = corner_run.test | {"logits": wrong}
    explained = ExplainedRun(changed, "gradcam")
    pictures = gradcam.best_pictures("cnn", explained, tmp_path, "gradcam", 3)
    assert [picture.file for picture in pictures] == [
        "gradcam_right_wrong.png",
        "gradcam_confused.png",
    ]
    assert all((tmp_path / picture.file).exists() for picture in pictures)
    view, other = explained.views([0, 0], np.array([wrong[0].argmax(), target[0]]))
    assert view.title.startswith("✗") and other.title.startswith("for ")


def test_the_views_of_a_run(corner_run, tmp_path):
    ids = [str(name) for name in corner_run.test["ids"][[5, 2, 7]]]
    path, about = gradcam.explain_run(corner_run, tmp_path, ",".join(ids), target="2", stage=1)
    assert "8x8, stage 1 of 3" in about and path.exists()
    with np.load(tmp_path / "gradcam.npz") as file:
        stored = dict(file)
    assert stored["ids"].tolist() == ids and stored["targets"].tolist() == [2, 2, 2]
    expected = explainer(load_classifier(corner_run), SIZE, stage=1)(
        load_test_images(corner_run)[[5, 2, 7]], [2, 2, 2]
    )
    np.testing.assert_allclose(stored["maps"], expected, rtol=1e-4, atol=1e-6)
    assert stored["stage"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gradcan"}, "Did you mean 'gradcam'"),
        ({"target": "cat"}, "target: 'cat' is not known; choose one of 0, 1, 2"),
        ({"stage": 9}, "choose one of 0, 1, 2"),
        ({"images": "nothing.png,"}, "was not tested on an image 'nothing.png'"),
        ({"images": "0"}, "at least one image"),
        ({"data_path": "/nowhere.npz"}, "/nowhere.npz"),
    ],
)
def test_mistakes_are_named(corner_run, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        gradcam.explain_run(corner_run, tmp_path, **options)


def test_the_command_exits_with_two(tmp_path):
    command = [sys.executable, "-m", "analysis.gradcam", str(tmp_path / "gone")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "nor a workdir with a complete run" in done.stderr and "Traceback" not in done.stderr
