"""Shared fixtures: a cache folder of the tests' own, small image folders, small configs."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import base, digits
from experiment.grid import expand
from input_pipeline import load_dataset
from main import use_compilation_cache

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory):
    """A cache of decoded images and compiled programs of this session's own."""
    folder = str(tmp_path_factory.mktemp("cache"))
    use_compilation_cache(folder)
    return folder


def paint(seed: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    """An image of random pixels, of (width, height); another for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def make_folder(tmp_path):
    """Returns a function that fills a folder: {"train/cat": 3} writes three distinct images."""

    def make(content: dict[str, int], name: str = "data", first_seed: int = 0) -> Path:
        root, seed = tmp_path / name, first_seed
        for folder, count in content.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                paint(seed).save(root / folder / f"{i}.png")
                seed += 1
        return root

    return make


@pytest.fixture
def folder_config(cache_dir):
    """Returns a function: the data config of a folder, with changes."""

    def make(root, **changes):
        config = base.get_config().data
        config.path, config.image_size = str(root), 8
        config.update(changes)
        return config

    return make


@pytest.fixture
def digits_run(cache_dir):
    """Returns a function: the config of one fast run on the digits, with changes by dotted path."""

    def make(model: str = "cnn", seed: int = 0, **changes):
        config = digits.get_config(model)
        config.seeds = (seed,)
        overrides = {
            "epochs": 2,
            "runtime.cache_dir": cache_dir,
            "runtime.tensorboard": False,
            **{path.replace("__", "."): value for path, value in changes.items()},
        }
        return expand(config, overrides)[0].config

    return make


@pytest.fixture
def few_digits(cache_dir, digits_run, tmp_path):
    """Changes to a config: 130 training digits of 16x16 pixels, not augmented."""
    digits = load_dataset(digits_run().data, cache_dir)
    path = tmp_path / "few.npz"
    rows = np.arange(200)
    np.savez(path, images=digits.decoded.images[rows], labels=digits.listing.labels[rows])
    plain = {f"augment__{name}": 0.0 for name in ("rotation", "zoom", "shift")}
    return {"data__source": "npz", "data__path": str(path), "data__image_size": 16, **plain}
