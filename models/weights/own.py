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
    write_safetensors(path, arrays, {KEY: json.dumps(facts | {"sha256": _digest(arrays)})})


def file_of_run(run_dir: Path) -> Path:
    """Returns the weights file of a finished run.

    Raises:
      UserError: it is no directory of a complete run, or one of an older version.
    """
    try:
        status = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError, KeyError, TypeError):
        status = None
    if status != "complete":
        raise UserError(f"run:{run_dir} is not the directory of a complete run")
    if not (run_dir / WEIGHTS).is_file():
        raise UserError(
            f"run:{run_dir} has no {WEIGHTS}, as an older version trained it: run the command of "
            "its experiment again, which writes that file"
        )
    return run_dir / WEIGHTS


def read_own(path: Path) -> dict:
    """Returns the facts that `write_own` was given, and the "arrays".

    Raises:
      UserError: there is no such file, it is damaged, or somebody else wrote it.
    """
    arrays = read_weights(path, "safetensors")
    try:
        facts = json.loads(read_metadata(path)[KEY])
        Preprocessing(**facts["preprocessing"])
        stated = facts.pop("sha256", None)  # files of older versions state none
        facts = {key: facts[key] for key in ("model", "fields", "num_classes")} | facts
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} was not written by this project: name its publisher, as in timm:{path}"
        ) from error
    if stated and stated != _digest(arrays):
        raise UserError(f"weights: {path} is damaged: its arrays changed since they were written")
    return facts | {"arrays": arrays}


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
