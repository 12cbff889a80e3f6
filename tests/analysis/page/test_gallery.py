import base64
import io

import numpy as np
from PIL import Image

from analysis.compare import compare, mean_confusion
from analysis.page import gallery
from analysis.runs import load_runs
from tests.analysis.fabricate import write_run
from tests.analysis.page.conftest import COUNT, give_photos


def compared(folder, **changes):
    for model, accuracy in (("a", 0.5), ("b", 0.6)):
        for seed in (0, 1):
            write_run(folder, model, seed, accuracy, **changes)
    return compare(folder, load_runs(folder))


def cells_of(photo):
    """The cells of all matrices in which a photo belongs."""
    return {
        (model, photo.true, predicted)
        for model, said in photo.said.items()
        for predicted in said
        if predicted != photo.true
    }


def test_every_wrong_cell_has_its_photos_and_no_photo_comes_twice(tmp_path, monkeypatch):
    give_photos(monkeypatch)
    made = compared(tmp_path)
    shown = gallery.make_gallery(made)
    assert [matrix.model for matrix in shown.matrices] == list(made.groups)
    for matrix in shown.matrices:
        assert np.allclose(matrix.counts, mean_confusion(made.groups[matrix.model]), atol=0.01)
        for true, predicted in np.argwhere(matrix.counts):
            if true != predicted:
                cell = (matrix.model, true, predicted)
                assert any(cell in cells_of(photo) for photo in shown.photos)
    files = [photo.file for photo in shown.photos]
    wrong = ~np.all([run.correct for run in made.runs], axis=0)
    assert len(set(files)) == len(files) == len({photo.source for photo in shown.photos})
    assert set(files) <= set(made.runs[0].test["ids"][wrong])
    assert len(files) < wrong.sum() and f"of the {wrong.sum()} test images" in shown.note


def test_a_cell_gets_its_first_photo_before_another_gets_its_second(tmp_path, monkeypatch):
    made = compared(tmp_path)
    labels = made.runs[0].test["labels"]
    needed = len(gallery.choose(made.groups, labels)[0])
    monkeypatch.setattr(gallery, "PER_CELL", 1)
    first, _ = gallery.choose(made.groups, labels)
    monkeypatch.setattr(gallery, "PER_CELL", 12)
    monkeypatch.setattr(gallery, "PHOTOS", len(first))
    assert gallery.choose(made.groups, labels)[0] == first and len(first) < needed


def test_photos_stop_at_their_budget(tmp_path, monkeypatch):
    give_photos(monkeypatch, side=150)
    monkeypatch.setattr(gallery, "BYTES", 60_000)
    shown = gallery.make_gallery(compared(tmp_path))
    assert 1 <= len(shown.photos) < 20
    assert sum(len(photo.source) for photo in shown.photos) <= 60_000
    assert shown.note.startswith(f"{len(shown.photos)} of the ")


def test_without_data_or_errors_there_are_no_photos(tmp_path, monkeypatch):
    shown = gallery.make_gallery(compared(tmp_path / "gone"))
    assert shown.photos == [] and len(shown.matrices) == 2
    assert "No photos can be shown" in shown.note
    give_photos(monkeypatch)
    write_run(tmp_path / "perfect", "cnn", 0, 1.0, classes=["a", "b"])
    path = tmp_path / "perfect" / "cnn" / "seed0" / "predictions_test.npz"
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {"logits": 9 * np.eye(2, dtype=np.float32)[arrays["labels"]]})
    shown = gallery.make_gallery(compare(tmp_path, load_runs(tmp_path / "perfect")))
    assert shown.photos == [] and shown.note == "No run gets a test image wrong."


def test_many_classes_have_photos_and_no_matrix(tmp_path, monkeypatch):
    give_photos(monkeypatch)
    made = compared(tmp_path, classes=[f"class {i}" for i in range(40)])
    shown = gallery.make_gallery(made)
    assert shown.matrices == [] and 1 <= len(shown.photos) <= COUNT
    counts = mean_confusion(next(iter(made.groups.values())))
    images = [n for *_, n in shown.pairs]
    assert len(images) <= gallery.CONFUSED and images == sorted(images, reverse=True)
    assert all(counts[t, p] == n > 0 and t != p for t, p, n in shown.pairs)


def test_a_thumbnail_is_the_photo(monkeypatch):
    for side in (8, 300):
        photo = np.full((side, side, 3), (200, 30, 90), np.uint8)
        kind, content = gallery.thumbnail(photo).split(";base64,")
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
        assert kind == ("data:image/png" if side == 8 else "data:image/jpeg")
        assert len(image) == min(side, gallery.SIDE)
        assert abs(image.astype(int) - photo[0, 0]).max() < 8
