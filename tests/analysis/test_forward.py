from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from analysis import forward
from analysis.runs import load_run
from analysis.stress import photos as stored
from configs import base
from errors import UserError
from tests.analysis.fabricate import write_run
from tests.conftest import paint
from train import train_and_evaluate


@pytest.mark.parametrize("model", ["linear", "cnn", "knn"])
def test_a_run_gives_its_saved_logits_again(digits_workdir, model):
    run = load_run(digits_workdir / model / "seed0")
    images = forward.load_test_images(run)
    assert images.dtype == np.uint8 and len(images) == len(run.test["labels"])
    logits = forward.predict_logits(forward.load_classifier(run), images, size=20)
    np.testing.assert_allclose(logits, run.test["logits"], atol=1e-4)
    images = forward.load_images(run, "validation")
    logits = forward.predict_logits(forward.load_classifier(run), images, size=20)
    np.testing.assert_allclose(logits, run.validation["logits"], atol=1e-4)


def test_images_that_a_review_left_out_do_not_move_the_others(digits_workdir):
    run = load_run(digits_workdir / "linear" / "seed0")
    images, photos = forward.load_test_images(run), stored.TestPart.of(run)
    every, kept = np.arange(len(images)), np.delete(np.arange(len(images)), [0, 3])
    fewer = replace(run)
    fewer.__dict__["test"] = {name: values[kept] for name, values in run.test.items()}
    np.testing.assert_array_equal(forward.load_test_images(fewer), images[kept])
    some = np.array([0, 2, 5])
    np.testing.assert_array_equal(
        stored.TestPart.of(fewer).clean(some), photos.clean(every[kept][some])
    )
    for one, other in zip(
        stored.TestPart.of(fewer).stored(some), photos.stored(kept[some]), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    fewer.__dict__["test"]["ids"] = fewer.test["ids"][::-1]
    with pytest.raises(UserError, match="are not those"):
        forward.load_test_images(fewer)


def test_changed_images_are_refused(tmp_path, make_folder, digits_run):
    root = make_folder({"train/a": 8, "train/b": 8, "test/a": 3, "test/b": 3})
    changes = {"data__source": "folder", "data__path": str(root)}
    train_and_evaluate(digits_run("linear", epochs=1, **changes), tmp_path / "run")
    run = load_run(tmp_path / "run")
    moved = root.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="gone"):
        forward.load_test_images(run, str(tmp_path / "gone"))
    assert len(forward.load_test_images(run, str(moved))) == 6
    Image.Image.save(paint(99), moved / "test" / "a" / "0.png")
    other = moved.rename(tmp_path / "changed")
    with pytest.raises(UserError, match="fingerprint differs"):
        forward.load_test_images(run, str(other))


def test_a_run_from_elsewhere_uses_the_cache_folder_of_this_machine(tmp_path):
    run = load_run(write_run(tmp_path, "cnn", 0))
    assert forward.cache_dir_of(run) == str(tmp_path)
    (tmp_path / "file").write_text("")
    run.config["runtime"]["cache_dir"] = str(tmp_path / "file" / "cache")
    assert forward.cache_dir_of(run) == base.get_config().runtime.cache_dir


def test_batches_are_padded_and_cut():
    seen = []

    def double(x, y):
        seen.append(x.shape)
        return {"sum": x.sum(axis=1) + y, "x": 2 * x}

    x, y = np.arange(14.0).reshape(7, 2), np.arange(7.0)
    out = forward.in_batches(double, x, y, size=3)
    assert set(seen) == {(3, 2)} and len(seen) == 3
    np.testing.assert_allclose(out["sum"], x.sum(axis=1) + y)
    np.testing.assert_allclose(out["x"], 2 * x)
    assert forward.in_batches(lambda x: jnp.sqrt(x), x, size=100).shape == (7, 2)
