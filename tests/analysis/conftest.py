"""Trained runs that several tests of the analysis read, and never change."""

import matplotlib
import numpy as np
import pytest
from sklearn.datasets import load_digits

from analysis.runs import group_runs, load_run, load_runs
from configs import base
from experiment.grid import expand
from tests.analysis.fabricate import train_digits
from train import train_and_evaluate

SIZE, PATCH = 16, 5


def corner_images(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Grey noise, and a red, green or blue square in the upper left corner, which is the class."""
    draw = np.random.default_rng(seed)
    images = draw.integers(110, 145, (count, SIZE, SIZE, 3), dtype=np.uint8)
    labels = draw.integers(0, 3, count)
    images[:, :PATCH, :PATCH] = 255 * np.eye(3, dtype=np.uint8)[labels][:, None, None]
    return images, labels


@pytest.fixture(scope="session")
def corner_workdir(cache_dir, tmp_path_factory):
    """Three models trained on images of which one corner tells the class."""
    folder = tmp_path_factory.mktemp("corner")
    images, labels = corner_images(300, seed=0)
    np.savez(folder / "corner.npz", images=images, labels=labels)
    config = base.get_config("cnn,linear,knn")
    config.data.source, config.data.path = "npz", str(folder / "corner.npz")
    config.data.image_size, config.seeds, config.epochs = SIZE, (0,), 6
    config.runtime.cache_dir, config.runtime.tensorboard = cache_dir, False
    for run in expand(config):
        run.config.augment.update(flip_horizontal=False, rotation=0.0, zoom=0.0, shift=0.0)
        train_and_evaluate(run.config, folder / run.name)
    return folder


@pytest.fixture(scope="session")
def corner_run(corner_workdir):
    """A network that gets the corner right."""
    run = load_run(corner_workdir / "cnn" / "seed0")
    assert run.correct.mean() > 0.95
    return run


@pytest.fixture(scope="session")
def digits_workdir(cache_dir, tmp_path_factory):
    """Nearest neighbours, softmax regression and two seeds of a CNN on 200 digits of 8x8 pixels."""
    folder, source = tmp_path_factory.mktemp("runs"), load_digits()
    images = np.round(source.images[:200] * (255 / 16)).astype(np.uint8)
    np.savez(folder / "few.npz", images=images, labels=source.target[:200])
    data = {"data__source": "npz", "data__path": str(folder / "few.npz")}
    settings = {"epochs": 2, "optimizer__name": "sgd"}
    return train_digits(folder, cache_dir, "knn,linear,cnn", "cnn", **settings, **data)


@pytest.fixture(scope="session")
def digits_groups(digits_workdir):
    return group_runs(load_runs(digits_workdir))


def words(figure) -> list[str]:
    """Every text of a figure."""
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]
