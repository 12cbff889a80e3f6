import json

import numpy as np
import pandas as pd
import pytest

from analysis.compare import compare, mean_confusion
from analysis.page import chapters
from analysis.page.figures import plt
from analysis.runs import load_runs
from tests.analysis.fabricate import CLASSES, write_run


@pytest.fixture
def comparison(tmp_path):
    """Two models and four classes; the last has no test image, and the first model says it never."""
    for model, accuracy in (("good", 0.9), ("poor", 0.6)):
        run = write_run(tmp_path, model, 0, accuracy)
        path = run / "predictions_test.npz"
        arrays = dict(np.load(path))
        arrays["labels"] = np.minimum(arrays["labels"], 2)
        arrays["logits"][:, 3] = -99
        np.savez(path, **arrays)
    made = compare(tmp_path, load_runs(tmp_path))
    made.output.mkdir()
    return made


def test_a_class_without_test_images_has_no_scores(comparison):
    section = chapters.classes(comparison)
    (table,) = [item.table for item in section.details if item.table]
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    missing, other = rows[CLASSES[3]], rows[CLASSES[0]]
    assert [missing[name] for name in ("precision", "recall", "F1")] == ["–"] * 3
    assert (missing["support"], missing["predicted"]) == ("0", "0") and other["recall"] != "–"
    assert f"good never predicts {CLASSES[3]}." in section.text
    assert section.finding.startswith("good most often confuses ")


def test_the_file_of_confusion_has_every_cell(comparison):
    chapters.classes(comparison)
    table = pd.read_csv(comparison.output / "confusion.csv")
    for label, runs in comparison.groups.items():
        counts = mean_confusion(runs)
        own = table[table.model == label]
        assert len(own) == (counts > 0).sum() and own.images.sum() == counts.sum()


def test_the_first_models_alone(comparison):
    one = chapters.best(comparison, 1)
    assert list(one.groups) == list(one.table.label) == ["good"] and one.pairs.empty
    assert list(chapters.best(comparison, 5).groups) == ["good", "poor"]


def test_a_chart_says_that_it_leaves_out_models(comparison):
    drawn = []

    def draw(of):
        drawn.extend(of.groups)
        return plt.figure()

    picture = chapters._chart(comparison, draw, "a.svg", "Caption.", most=1)
    assert picture.caption == "Caption. The first 1 of 2 models." and drawn == ["good"]
    assert chapters._chart(comparison, draw, "a.svg", "Caption.").caption == "Caption."


def test_configs_show_the_fields_that_differ(comparison):
    path = comparison.groups["poor"][0].path / "config.json"
    config = json.loads(path.read_text())
    config["model"] |= {"hidden": [256, 128]}
    config |= {"seed": 7, "runtime": {"cache_dir": "elsewhere"}}
    path.write_text(json.dumps(config))
    table = chapters.configs(compare(comparison.workdir, load_runs(comparison.workdir)))
    assert table.name == "configs" and table.columns == ["model", "model.name", "model.hidden"]
    assert table.rows == [["good", "good", "–"], ["poor", "poor", "[256, 128]"]]
    assert chapters.configs(chapters.best(comparison, 1)) is None


def test_the_worst_of_many_classes_are_drawn(comparison):
    figure = chapters.charts.draw_class_scores(comparison, most=2)
    scores = [chapters.compare.class_scores(runs).f1 for runs in comparison.groups.values()]
    names = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert len(names) == 2
    kept = pd.concat(scores, axis=1).mean(axis=1)[CLASSES[:3]].nsmallest(2).index
    assert [name.replace("\\$", "$")[:8] for name in names] == [
        name[:8] for name in CLASSES if name in kept
    ]
    plt.close(figure)
