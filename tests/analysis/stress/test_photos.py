import numpy as np
import pytest
from PIL import Image, ImageOps

from analysis.stress import photos
from analysis.stress.corruptions import corrupt
from configs import base
from input_pipeline import load_dataset
from tests.conftest import paint

SIZES = [(40, 30), (31, 57), (12, 12), (64, 64)]  # width, height


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photos of many shapes and kinds in two classes, parts given."""
    root, seed = tmp_path_factory.mktemp("photos") / "data", 0
    kinds = {
        "grey.png": lambda image: image.convert("L"),
        "clear.png": lambda image: image.convert("RGBA").rotate(30, expand=True),
        "lossy.jpg": lambda image: image,
        "turned.jpg": lambda image: image,
    }
    for part in ("train", "val", "test"):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for (kind, change), size in zip(kinds.items(), SIZES, strict=True):
                exif = Image.Exif()
                exif[0x0112] = 6 if kind.startswith("turned") else 1
                change(paint(seed, size)).save(root / part / name / kind, exif=exif)
                seed += 1
    return root


@pytest.fixture
def part(folder, cache_dir):
    """Returns a function: the test part as a run with these changes sees it."""

    def make(**changes):
        data = base.get_config().data
        data.path, data.background = str(folder), (9, 200, 30)
        data.update(changes)
        dataset = load_dataset(data, cache_dir)
        return photos.TestPart(data.to_dict(), dataset, dataset.rows["test"])

    return make


@pytest.mark.parametrize("how", ["squash", "crop"])
@pytest.mark.parametrize("interpolation", ["nearest", "bicubic"])
def test_clean_photos_become_the_runs_own_pixels(part, how, interpolation):
    rows = np.arange(8)[::-1]
    for size in (12, 32):
        tested = part(image_size=size, resize=how, interpolation=interpolation)
        fitted = [tested.fitted(photo) for photo in tested.stored(rows)]
        assert (np.stack(fitted) == tested.clean(rows)).all()
        assert (tested.clean(rows) == tested.dataset.images("test")[rows]).all()


def test_arrays_are_taken_as_they_are_stored(part, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (60, 9, 7, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(60) % 2)
    tested = part(source="npz", path=str(tmp_path / "a.npz"), image_size=16)
    rows = np.array([3, 0])
    assert (np.stack(tested.stored(rows)) == images[tested.dataset.rows["test"][rows]]).all()
    fitted = np.stack([tested.fitted(photo) for photo in tested.stored(rows)])
    assert (fitted == tested.clean(rows)).all()


def test_models_of_two_image_sizes_meet_the_same_corrupted_photo(part):
    parts = {
        "small": part(image_size=32),
        "large": part(image_size=64, resize="crop"),
        "other": part(image_size=32, background=(0, 0, 0)),
    }
    conditions, rows = [("gaussian_noise", 3), ("occlusion", 5)], np.array([5, 1, 0])
    pixels = photos.corrupted(parts, rows, conditions)
    assert pixels["small"].shape == (2, 3, 32, 32, 3) and pixels["large"].shape[2] == 64
    for c, condition in enumerate(conditions):
        for i, photo in enumerate(parts["small"].stored(rows)):
            changed = Image.fromarray(corrupt(photo, *condition))
            squashed = changed.resize((32, 32), Image.Resampling.BILINEAR)
            cut = ImageOps.fit(changed, (64, 64), Image.Resampling.BILINEAR)
            assert (pixels["small"][c, i] == np.asarray(squashed)).all()
            assert (pixels["large"][c, i] == np.asarray(cut)).all()
    seen = (pixels["other"] == pixels["small"]).all(axis=(0, 2, 3, 4))
    assert 0 < seen.sum() < 3  # a transparent photo is another on another background


def test_what_a_photo_looks_like_does_not_depend_on_its_row(part):
    parts, condition = {"a": part(image_size=32)}, [("shot_noise", 2)]
    together = photos.corrupted(parts, np.arange(8), condition)["a"][0]
    for row in (6, 2):
        alone = photos.corrupted(parts, np.array([row]), condition)["a"][0, 0]
        assert (alone == together[row]).all()


def test_large_photos_are_shrunk_to_the_stated_side(part, monkeypatch):
    tested, rows = part(image_size=8), np.arange(8)
    whole, shrunk = tested.stored(rows), tested.stored(rows, 20)
    for before, after in zip(whole, shrunk, strict=True):
        if min(before.shape[:2]) <= 20:
            assert (before == after).all()
        else:
            assert min(after.shape[:2]) == 20
            ratio = before.shape[0] / before.shape[1]
            assert after.shape[0] / after.shape[1] == pytest.approx(ratio, rel=0.05)
    sides = []
    monkeypatch.setattr(
        photos.TestPart, "stored", lambda self, rows, side: sides.append(side) or []
    )
    photos.corrupted({"a": tested, "b": part(image_size=400)}, rows, [("jpeg", 1)])
    photos.corrupted({"a": tested}, rows, [("jpeg", 1)])
    assert sides == [400, photos.LARGEST]  # never below what a model is shown


def test_blocks_cover_the_rows_and_bound_the_pixels(part):
    parts = {"a": part(image_size=8), "b": part(image_size=16)}
    rows = np.arange(3, 103)
    for limit, most in ((3 * (8**2 + 16**2) * 7, 7), (1, 1), (10**9, 100)):
        blocks = list(photos.blocks(rows, parts, limit))
        assert (np.concatenate(blocks) == rows).all()
        assert max(map(len, blocks)) <= most and (most < 100 or len(blocks) == 1)
