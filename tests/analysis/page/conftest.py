"""A report of made-up runs, with photos that are noise."""

import numpy as np
import pytest

from analysis import report
from analysis.page import gallery
from tests.analysis.fabricate import write_run

COUNT = 200


def give_photos(monkeypatch, side=16, count=COUNT):
    """Lets every run have photos: noise, each another."""
    photos = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    monkeypatch.setattr(gallery, "load_test_images", lambda run, path: photos)
    return photos


@pytest.fixture(scope="session")
def page(tmp_path_factory):
    """The page of three models, one of them with two seeds."""
    folder = tmp_path_factory.mktemp("page")
    write_run(folder, "cnn", 0, 0.9)
    write_run(folder, "mlp", 0, 0.7)
    write_run(folder, "mlp", 1, 0.7)
    write_run(folder, "<b>net", 0, 0.8)
    with pytest.MonkeyPatch.context() as patch:
        give_photos(patch)
        return report.write_report(folder, models=False).page
