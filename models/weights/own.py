"""The project's own file of weights: a safetensors file whose metadata say how to use them.

A finished run writes one, `convert` and the export write others, and `run:DIR` and
`archcompare:FILE` read all of them alike.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from errors import UserError
from models.classifier import Classifier, Preprocessing, split_model
from models.weights.formats import read_metadata, read_weights, write_safetensors

WEIGHTS = "weights.safetensors"  # its name in a run directory
KEY = "archcompare"  # of the metadata


def arrays_of(model: Classifier) -> dict[str, np.ndarray]:
    """Returns every parameter and statistic of a model by path."""
    _, params, stats = split_model(model)
    return {path: np.asarray(array) for path, array in (params | stats).items()}


def write_own(path: Path, arrays: dict[str, np.ndarray], facts: dict) -> None:
    """Writes arrays, by path as `arrays_of` returns them, and what is known of them.

    `facts` are plain values; at least `model`, `fields`, `preprocessing` and `num_classes` (0 for
    weights without classifier).
    """
    facts = json.loads(json.dumps(facts))  # as they will be read: lists for tuples, text as keys
    stated = {"digest": _digest(arrays, facts)}
    write_safetensors(path, arrays, {KEY: json.dumps(facts | stated)})


def read_own(path: Path) -> dict:
    """Returns the facts that `write_own` was given, and the "arrays".

    Raises:
      UserError: there is no such file, it is damaged, or somebody else wrote it.
    """
    arrays = read_weights(path, "safetensors")
    try:
        facts = json.loads(read_metadata(path)[KEY])
        Preprocessing(**facts["preprocessing"])
        stated = facts.pop("digest", None)  # files of older versions state none
        changed = stated and stated != _digest(arrays, facts)
        facts = {key: facts[key] for key in ("model", "fields", "num_classes")} | facts
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} was not written by this project: name its publisher, as in timm:{path}"
        ) from error
    if changed:
        raise UserError(f"weights: {path} is damaged or was changed by hand: write it again")
    return facts | {"arrays": arrays}


def _digest(arrays: dict[str, np.ndarray], facts: dict) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
