import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from analysis import gradcam
from analysis.explain.heatmaps import ExplainedRun
from analysis.explain.methods import METHODS, explainer
from analysis.explain.packages import installed
from analysis.forward import load_classifier, load_test_images
from analysis.runs import group_runs, load_runs
from errors import UserError
from tests.analysis.conftest import SIZE
from tests.conftest import ROOT


def test_the_section_of_a_workdir(corner_workdir, tmp_path):
    groups = group_runs(load_runs(corner_workdir))
    section = gradcam.gradcam_section(groups, tmp_path, 4)
    folded = [item for item in section.details if item.picture]
    names = [picture.file for picture in (*section.pictures, *(item.picture for item in folded))]
    assert all((tmp_path / name).stat().st_size > 1000 for name in names)
    assert names[0] == "gradcam_models.png" and names[-1] == "gradcam_faithfulness.svg"
    assert names[1] == "heat_map_methods.png" and len(section.pictures) == 1
    text = " ".join(section.text)
    assert "Left out (not trained by gradient): knn." in text
    assert "Left out (no feature map of at least 4×4): linear." in text
    (methods,), models = section.tables, folded[-1].table
    (row,) = models.rows
    assert row[0] == "cnn" and len(row) == len(models.columns)
    gain, half = section.data["cnn"]["gain"]
    assert gain > half > 0  # better than a random map
    present = [name for name in gradcam.COMPARED if installed(METHODS[name].package)]
    assert [row[0] for row in methods.rows] == [METHODS[name].title for name in present]
    assert section.data["methods"]["occlusion"]["gain"][0] > 0
    assert "over a random map" in text and (
        "faithful" in section.finding or "time" in section.finding
    )
    assert ("can be compared, too: pip install" in text) == (len(present) < len(gradcam.COMPARED))


def test_only_the_best_models_are_drawn(corner_workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(gradcam, "MODELS_SHOWN", 1)
    monkeypatch.setattr(gradcam, "COMPARED", ())
    runs = group_runs(load_runs(corner_workdir))
    groups = {name: runs["cnn"] for name in ("a", "b", "c")}
    section = gradcam.gradcam_section(groups, tmp_path, 2)
    assert "Left out (behind the best 1): b, c." in section.text
    assert [row[0] for item in section.details if item.table for row in item.table.rows] == ["a"]


def test_a_photo_is_shown_again_only_where_there_is_no_other():
    rows = np.array([3, 5, 8])
    assert gradcam._new(rows, [5, 9]).tolist() == [3, 8]
    assert gradcam._new(rows, [3, 5, 8]).tolist() == [3, 5, 8]


def test_the_command_leaves_the_report_alone(corner_workdir, tmp_path):
    """It writes into WORKDIR/gradcam, whatever the report holds under the same names."""
    workdir = tmp_path / "work"
    shutil.copytree(corner_workdir, workdir)
    report = workdir / "report"
    report.mkdir()
    kept = ("index.html", "gradcam.json", "gradcam_models.png", "gradcam_faithfulness.svg")
    for name in kept:
        (report / name).write_bytes(name.encode())
    times = {path: path.stat().st_mtime_ns for path in report.iterdir()}
    command = [sys.executable, "-m", "analysis.gradcam", str(workdir), "--images=2"]
    data = f"--data={corner_workdir / 'corner.npz'}"
    done = subprocess.run([*command, data], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in report.iterdir()} == {
        name: name.encode() for name in kept
    }
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert (workdir / "gradcam" / "gradcam_models.png").stat().st_size > 1000


def test_right_beside_wrong(corner_run, tmp_path):
    wrong = corner_run.test["logits"].copy()
    target = corner_run.test["labels"][:4]
    wrong[np.arange(4), target] = wrong.min() - 1  # as if the first four had been mistaken
    changed = replace(corner_run)
    changed.__dict__["test"] = corner_run.test | {"logits": wrong}
    explained = ExplainedRun(changed, "gradcam")
    made = gradcam.best_pictures("cnn", explained, tmp_path, "gradcam", 3)
    pictures = [item.picture for item in made]
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
