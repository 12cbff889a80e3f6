"""Load the model and the images of a run, and call the model in compiled batches."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from analysis.runs import FinishedRun
from configs import base
from data.lazy import LazyImages
from errors import UserError
from input_pipeline import Dataset, load_dataset
from models import Classifier
from models.weights.own import read_own
from training.weights import classifier_from, find_weights


def use_compilation_cache(cache_dir: str) -> None:
    """Keeps compiled programs on disk."""
    path = Path(cache_dir).expanduser() / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def cache_dir_of(run: FinishedRun) -> str:
    """Returns the cache folder of a run, or the default one where that cannot be made here."""
    path = Path(run.config["runtime"]["cache_dir"]).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:  # the run was moved here from another machine
        return base.get_config().runtime.cache_dir
    return str(path)


def load_classifier(run: FinishedRun) -> Classifier:
    """Returns the model of a complete run with its best weights, in evaluation mode."""
    if run.folds:
        raise ValueError(f"{run.name}: several models, trained on each other's test images")
    file = find_weights(run.path)
    return classifier_from(file, read_own(file))


def load_data(run: FinishedRun, data_path: str = "") -> Dataset:
    """Returns the dataset of a run, whose parts have the order of its predictions, or hold more.

    `data_path` is where the data lies now, "" for where it was. Raises UserError if it changed.
    """
    config = ConfigDict(run.config["data"])
    if data_path:
        config.path = str(Path(data_path).expanduser())
    cache_dir = cache_dir_of(run)
    use_compilation_cache(cache_dir)
    limit = run.config["runtime"].get("resident_limit_mb", math.inf)
    dataset = load_dataset(config, cache_dir, limit)
    same = dataset.decoded.fingerprint == run.dataset["fingerprint"]
    if not same or any(rows_of(dataset, run, part) is None for part in ("test", "validation")):
        raise UserError(
            f"the images in {config.path or config.source} are not those that {run.path} was "
            "trained on (their fingerprint differs): give the original data"
        )
    return dataset


def rows_of(dataset: Dataset, run: FinishedRun, part: str) -> np.ndarray | None:
    """Returns the rows of a run's predictions of a part, int [N]; None if some are not there."""
    known, wanted = dataset.ids(part), getattr(run, part)["ids"].tolist()
    if run.folds:  # of any part: each fold has its own
        rows = pd.Index(dataset.listing.ids).get_indexer(wanted)
        return rows if (rows >= 0).all() else None
    if known == wanted:
        return dataset.rows[part]
    places = pd.Index(known).get_indexer(wanted)  # a review leaves images out
    return dataset.rows[part][places] if (np.diff(places, prepend=-1) > 0).all() else None


def load_images(run: FinishedRun, part: str, data_path: str = "") -> np.ndarray:
    """Returns the images of a part, test or validation, in that order: uint8 [N, S, S, 3].

    Those of a source that is decoded at every use are decoded when they are asked for.
    """
    dataset = load_data(run, data_path)
    images, rows = dataset.decoded.images, rows_of(dataset, run, part)
    return images.select(rows) if isinstance(images, LazyImages) else images[rows]


def load_test_images(run: FinishedRun, data_path: str = "") -> np.ndarray:
    """Returns the test images of a run in that order: uint8 [N, S, S, 3]."""
    return load_images(run, "test", data_path)


def compiled(model: Classifier, function: Callable) -> Callable:
    """Returns `function(model, *arrays)`, compiled, as a function of the arrays alone."""
    # The weights are arguments of the program: as constants they would slow its compilation.
    return partial(jax.jit(function), model)


def in_batches(function: Callable, *arrays: np.ndarray, size: int = 128):
    """Returns the tree of arrays [N, ...] that a compiled function gives of batches [size, ...]."""
    count, outputs = len(arrays[0]), []
    size = min(size, count)
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)  # padded with the last
        out = function(*(jnp.asarray(array[rows]) for array in arrays))
        outputs.append(jax.tree.map(lambda x, n=count - start: np.asarray(x)[:n], out))
    return jax.tree.map(lambda *x: np.concatenate(x), *outputs)


def predict_logits(model: Classifier, images: np.ndarray, size: int = 128) -> np.ndarray:
    """Returns the logits float32 [N, K] of images uint8 [N, S, S, 3], or float in 0..255."""
    return in_batches(compiled(model, _logits), images, size=size)


def _logits(model: Classifier, images: jax.Array) -> jax.Array:
    return model(model.preprocess(images))
