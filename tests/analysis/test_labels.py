import csv
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import labels
from analysis.compare import compare
from analysis.page.section import Section
from analysis.report import write_report
from analysis.review import COLUMNS, read_review, stored_review
from analysis.runs import load_runs
from errors import UserError
from tests.analysis.fabricate import CLASSES, write_run

COUNT = 200


@pytest.fixture
def workdir(tmp_path):
    """Three models, of which one is worse, on photos of which ten have a wrong label."""
    for model, accuracy in (("a", 0.95), ("b", 0.94), ("worse", 0.7)):
        for seed in range(2):
            path = write_run(tmp_path, model, seed, accuracy, count=COUNT)
            data = dict(np.load(path / "predictions_test.npz"))
            data["labels"][:10] = (data["labels"][:10] + 1) % 4
            np.savez(path / "predictions_test.npz", **data)
            data = dict(np.load(path / "predictions_validation.npz"))
            data["ids"] = np.array([f"train/{i}.png" for i in range(COUNT)])
            np.savez(path / "predictions_validation.npz", **data)
    return tmp_path


def comparison_of(workdir):
    comparison = compare(workdir, load_runs(workdir))
    comparison.output.mkdir(exist_ok=True)
    return comparison


def write_review(path, rows, separator=",", encoding="utf-8"):
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    return path


def row(number, verdict, new_label="", likely=""):
    return {
        "id": f"test/{number}.png",
        "verdict": verdict,
        "new_label": new_label,
        "likely": likely,
    }


def test_what_a_person_fills_in_is_written_kept_and_taken_back(workdir):
    comparison, folder = comparison_of(workdir), workdir / "labels"
    folder.mkdir()
    text = "\n".join(labels.write_suspects(comparison, folder, 60))
    assert "of the test labels look wrong; if they are, no model can be expected above" in text
    assert "without photos" in text  # the data are gone
    file = folder / "suspects.csv"
    table = pd.read_csv(file, keep_default_na=False)
    assert list(table) == list(COLUMNS) and set(table.verdict) == {""}
    with pytest.raises(UserError, match="no row has a verdict"):
        labels.take_review(comparison, file)
    flipped = {f"test/{i}.png" for i in range(10)}
    tested = set(table["id"][table["part"] == "test"])
    assert len(tested) >= 4 and tested <= flipped
    table["verdict"] = np.where(table["id"].isin(flipped), "wrong", "ok")
    table.loc[table["part"] == "validation", "verdict"] = ""
    table.to_csv(file, index=False)
    labels.write_suspects(comparison, folder, 60)  # verdicts not yet taken in are kept
    assert pd.read_csv(file, keep_default_na=False).verdict.tolist() == table.verdict.tolist()
    text = "\n".join(labels.take_review(comparison, file))
    wrong = (table.verdict == "wrong").sum()
    assert f"{wrong} labels are wrong" in text and "The ranking" in text
    assert f"Of {wrong} clear cases among the reviewed suspects" in text
    stored = stored_review(workdir, comparison.runs)
    assert (stored.verdict == "wrong").sum() == wrong
    file.unlink()
    labels.write_suspects(comparison, folder, 60)
    assert pd.read_csv(file, keep_default_na=False).verdict.tolist() == table.verdict.tolist()


def test_a_review_that_is_not_there_is_named(workdir):
    with pytest.raises(UserError, match="^missing.csv does not exist: give the filled-in"):
        labels.take_review(comparison_of(workdir), Path("missing.csv"))


def test_the_whole_report_can_be_of_the_reviewed_labels(workdir):
    with pytest.raises(UserError, match="has no reviewed labels"):
        write_report(workdir, reviewed=True)
    write_run(workdir, "b", 2, status="diverged")
    comparison = comparison_of(workdir)
    before = comparison.table.set_index("label").score
    run = comparison.runs[0]
    rows = [row(i, "wrong", CLASSES[(run.test["labels"][i] - 1) % 4]) for i in range(10)]
    file = write_review(workdir / "r.csv", [*rows, row(20, "unclear")])
    labels.take_review(comparison, file)
    made = write_report(workdir, models=False, reviewed=True)
    assert made.page == workdir / "reviewed" / "index.html" and "b/seed2" in made.not_complete
    after = pd.read_csv(workdir / "reviewed" / "table.csv").set_index("label")
    assert (after.test_images == COUNT - 1).all() and (after.score > before + 0.02).all()
    page = made.page.read_text()
    assert "The labels are those of a review" in page and "Label errors</h2>" not in page
    assert not (workdir / "report" / "table.csv").exists()


def test_reviewed_runs_have_the_labels_of_the_review(workdir):
    runs = load_runs(workdir)
    right = CLASSES[(runs[0].test["labels"][0] - 1) % 4]
    rows = [row(0, "wrong", likely=right), row(1, "wrong", "-"), row(2, "unclear"), row(3, "ok")]
    review = read_review(write_review(workdir / "r.csv", rows), runs)
    for run, other in zip(runs, labels.reviewed(runs, review), strict=True):
        assert len(other.test["ids"]) == len(other.predicted) == COUNT - 2
        assert CLASSES[other.test["labels"][0]] == right
        np.testing.assert_array_equal(other.test["labels"][1:], run.test["labels"][3:])
        np.testing.assert_array_equal(other.test["logits"][1:], run.test["logits"][3:])
        assert len(run.test["ids"]) == COUNT and other.path == run.path
        np.testing.assert_array_equal(other.validation["labels"], run.validation["labels"])
    assert (other.correct == (other.predicted == other.test["labels"])).all()


@pytest.mark.parametrize(("separator", "encoding"), [(";", "utf-8-sig"), ("\t", "utf-8")])
def test_a_review_is_read_as_any_spreadsheet_writes_it(workdir, separator, encoding):
    runs = load_runs(workdir)
    old = CLASSES[runs[0].test["labels"][5]]
    new = next(name for name in CLASSES if name != old)
    file = write_review(workdir / "r.csv", [row(5, "wrong ", new), {}], separator, encoding)
    review = read_review(file, runs)
    assert review.to_dict("records") == [
        {"id": "test/5.png", "label": old, "verdict": "wrong", "new_label": new}
    ]


def test_mistakes_in_a_review_are_named_by_their_lines(workdir):
    runs = load_runs(workdir)
    old = CLASSES[runs[0].test["labels"][4]]
    rows = [
        row(0, "ok"), row(999, "ok"), row(1, "bad"), row(2, "wrong", "nothing"), row(3, "", "plain"),
        row(4, "wrong", old), row(0, "unclear"), row(5, "ok", "plain"), row(6, "wrong"), row(777, ""),
    ]  # fmt: skip
    file = write_review(workdir / "r.csv", rows)
    with pytest.raises(UserError) as error:
        read_review(file, runs)
    text = str(error.value)
    for line, words in {
        3: "no image 'test/999.png'",
        4: "verdict 'bad' of test/1.png is not one of ok, wrong, unclear",
        5: "class 'nothing' of test/2.png is not one of plain, with space",
        6: "test/3.png has a new_label but no verdict",
        7: "its new label is the old one",
        8: "test/0.png has a verdict in line 2 already",
        9: "is ok but has the new_label",
        10: "class '' of test/6.png",
        11: "no image 'test/777.png'",
    }.items():
        assert f"line {line}: " in text and words in text.split(f"line {line}: ")[1].split("\n")[0]
    assert "line 2:" not in text
    (workdir / "r.csv").write_text("name,verdict\n")
    with pytest.raises(UserError, match="without the columns id"):
        read_review(workdir / "r.csv", runs)
    with pytest.raises(UserError, match="missing.csv"):
        read_review(workdir / "missing.csv", runs)


def test_the_chapter_without_and_with_a_review(workdir):
    section = labels.labels_section(comparison_of(workdir))
    assert isinstance(section, Section) and not section.pictures
    assert "no model can be expected above" in section.finding
    assert any(line.startswith("Without photos: ") for line in section.text)
    assert len(section.tables) == 1 and section.data["test"]["wrong"] > 0.01
    runs = load_runs(workdir)
    names = [CLASSES[(label - 1) % 4] for label in runs[0].test["labels"][:10]]
    file = write_review(workdir / "r.csv", [row(i, "wrong", n) for i, n in enumerate(names)])
    (workdir / "labels").mkdir()
    read_review(file, runs).to_csv(workdir / "labels" / "review.csv", index=False)
    section = labels.labels_section(comparison_of(workdir))
    assert "Of 10 reviewed labels 10 are wrong." in section.finding
    text = " ".join(section.text)
    assert "At least 5.0 % of the test labels are wrong" in text
    assert "errors in the models' favour" in text
    table = section.tables[1]
    cells = dict(zip(table.columns, next(r for r in table.rows if r[0] == "a"), strict=True))
    old, new = (float(x) for x in cells["accuracy %"].split(" → "))
    other = labels.reviewed([r for r in runs if r.model == "a"], read_review(file, runs))
    assert new == pytest.approx(100 * np.mean([r.correct for r in other]), abs=0.01)
    assert new > old
    assert "200 and 200 test images" in table.caption
    assert all("nan" not in cell for r in table.rows for cell in r)


def test_a_review_that_turns_the_ranking_says_so(tmp_path):
    """`b` is better by the labels as they are, `a` by those of the review."""
    for model in "ab":
        for seed in range(3):
            path = write_run(tmp_path, model, seed, count=COUNT)
            data = dict(np.load(path / "predictions_test.npz"))
            shown = data["labels"].copy()
            if model == "a":
                shown[:40] = (shown[:40] + 1) % 4
            else:
                shown[40:50] = (shown[40:50] + 1) % 4
            data["logits"] = 9 * np.eye(4, dtype=np.float32)[shown]
            data["logits"] += np.random.default_rng(seed).normal(size=(COUNT, 4))
            np.savez(path / "predictions_test.npz", **data)
            data["ids"] = np.array([f"train/{i}.png" for i in range(COUNT)])
            np.savez(path / "predictions_validation.npz", **data)
    before, runs = comparison_of(tmp_path), load_runs(tmp_path)
    rows = [row(i, "wrong", CLASSES[(runs[0].test["labels"][i] + 1) % 4]) for i in range(40)]
    review = read_review(write_review(tmp_path / "r.csv", rows), runs)
    after = compare(tmp_path, labels.reviewed(runs, review))
    text = labels.changes(before, after)
    assert "changes from b and a to a and b" in text and "now established: a above b" in text
    assert "no longer established: b above a" in text
    assert labels.changes(before, before) == (
        "The ranking on the test images stays as it was, with the same established differences."
    )
    table = labels.review_table(before, after)
    assert {r[0]: r[-2] for r in table.rows} == {"a": "2 → 1", "b": "1 → 2"}


def test_models_too_weak_to_judge_labels_give_a_chapter_that_says_so(tmp_path):
    for seed in range(2):
        write_run(tmp_path, "a", seed, 0.4)
    section = labels.labels_section(comparison_of(tmp_path))
    assert section.finding == "No model is good enough to judge the test labels."
    assert section.tables[0].rows[0][2:] == ["0", "–", "–"]
    assert any(text.startswith("Without a vote: a (balanced accuracy") for text in section.text)


def test_photos_are_those_of_the_data(digits_workdir, tmp_path):
    run = load_runs(digits_workdir)[0]
    ids = run.test["ids"][[3, 1]]
    with np.load(digits_workdir / "few.npz") as file:
        stored = [file["images"][int(name.rpartition("/")[2])] for name in ids]
    suspects = pd.DataFrame(
        {"id": ids, "label": "1", "likely": "7", "models_agree": 2, "models": 3}
    )
    shown = [axis.images[0].get_array() for axis in labels.draw_suspects(run, suspects).axes[:2]]
    for photo, pixels in zip(shown, stored, strict=True):
        np.testing.assert_array_equal(photo[..., 0], pixels)
    images = np.random.default_rng(0).integers(0, 256, (200, 8, 8), np.uint8)
    np.savez(tmp_path / "few.npz", images=images, labels=np.arange(200) % 10)
    with pytest.raises(UserError, match="give the original data"):
        labels.draw_suspects(run, suspects, str(tmp_path / "few.npz"))
