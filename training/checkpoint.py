"""Orbax behind a few functions: checkpoints that are whole, verified, and kept until replaced.

A checkpoint is a folder `<kind>-<step>` of named arrays and a small JSON record. Orbax writes it
under a temporary name and renames it, so a kill at any moment leaves whole checkpoints only.
"""

import functools
import hashlib
import logging
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from errors import UserError


class CheckpointError(UserError):
    """A checkpoint could not be written or read; the message names its path."""


def path_of(directory: Path, kind: str, step: int) -> Path:
    """Returns the folder of a checkpoint."""
    return directory.resolve() / f"{kind}-{step:09d}"


def save(directory: Path, kind: str, step: int, tree: Any, record: dict) -> Path:
    """Writes `<directory>/<kind>-<step>` and returns its path when it is safely there.

    A checkpoint of that step that is already there is kept: a resumed run comes past the same step
    with the same arrays.

    Args:
      directory: of the run's checkpoints.
      kind: such as "latest" or "best".
      step: names the folder.
      tree: nested dictionaries, tuples and dataclasses of arrays.
      record: plain values, stored as JSON beside them.

    Raises:
      CheckpointError: the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    path = path_of(directory, kind, step)
    if path.exists():
        return path
    arrays = {name: np.asarray(value) for name, value in flat(jax.device_get(tree)).items()}
    content = {"record": record, "digests": {name: _digest(a) for name, a in arrays.items()}}
    items = ocp.args.Composite(
        arrays=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(content)
    )
    try:
        _checkpointer().save(path, items)
    except Exception as error:  # noqa: BLE001 - a full disk surfaces as OSError, ValueError, ...
        for half in directory.glob(f"{path.name}.orbax*"):
            shutil.rmtree(half, ignore_errors=True)
        raise CheckpointError(
            f"cannot write the checkpoint {path}: {_reason(error)}\n"
            "Earlier checkpoints are untouched: make room or mend the disk, and run the same "
            "command again to go on from them."
        ) from error
    return path


def fit(template: Any, arrays: dict[str, np.ndarray], path: Path) -> Any:
    """Returns the arrays of the checkpoint at `path` in the structure of `template`.

    Raises:
      UserError: it holds other arrays than the template.
    """
    names = list(flat(template))
    if set(names) != set(arrays):
        different = sorted(set(names) ^ set(arrays))[:5]
        raise UserError(
            f"{path} was written by other code: {', '.join(different)} ... are on one side only. "
            f"Use that code, or delete {path.parent} to train anew"
        )
    return jax.tree.unflatten(jax.tree.structure(template), [arrays[n] for n in names])


def restore_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """Reads a checkpoint without a template: {"params/stages.0.kernel": array}, and its record.

    Raises:
      CheckpointError: it is damaged.
    """
    items = ocp.args.Composite(arrays=ocp.args.StandardRestore(), record=ocp.args.JsonRestore())
    try:
        loaded = _checkpointer().restore(path.resolve(), items)
        arrays = {name: np.asarray(value) for name, value in loaded.arrays.items()}
        wrong = [
            n for n, digest in loaded.record["digests"].items() if _digest(arrays[n]) != digest
        ]
    except Exception as error:  # noqa: BLE001 - damage surfaces as many types
        raise CheckpointError(f"cannot read the checkpoint {path}: {_reason(error)}") from error
    if wrong:
        raise CheckpointError(f"the checkpoint {path} is damaged: {wrong[0]} changed on disk")
    return arrays, loaded.record["record"]


def find(directory: Path, kind: str) -> list[Path]:
    """Returns the whole checkpoints of a kind, newest first."""
    found = (p for p in directory.glob(f"{kind}-*") if re.fullmatch(rf"{kind}-\d+", p.name))
    return sorted(found, reverse=True)


def keep(directory: Path, paths: list[Path]) -> None:
    """Deletes every other checkpoint, and whatever an interrupted save left behind."""
    names = {path.name for path in paths}
    for path in directory.iterdir():
        if path.name not in names:
            shutil.rmtree(path, ignore_errors=True)


def flat(tree: Any) -> dict[str, Any]:
    """Returns {path: leaf} for a nested tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}


@functools.cache
def _checkpointer() -> ocp.Checkpointer:
    # A failed write is raised to us; its parts report it again, one by one, by way of Orbax's log
    # and of an event loop that is closed.
    logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)
    usual = sys.unraisablehook

    def quiet(unraisable) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            usual(unraisable)

    sys.unraisablehook = quiet
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())


def _reason(error: Exception) -> str:
    text = str(error)
    if "RESOURCE_EXHAUSTED" in text or "No space left" in text:
        return "no space left on the disk"
    return text.strip().split("\n")[0][:300]


def _digest(array: np.ndarray) -> str:
    text = f"{array.dtype} {array.shape}".encode()
    return hashlib.sha256(text + np.ascontiguousarray(array).tobytes()).hexdigest()
