"""Orbax behind four functions: checkpoints that are whole, verified, and kept until replaced.

A checkpoint is a folder `<kind>-<step>` of named arrays and a small JSON record. Orbax writes it
under a temporary name and renames it, so a kill at any moment leaves whole checkpoints only.
"""

import hashlib
import logging
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from errors import UserError

logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class CheckpointError(UserError):
    """A checkpoint could not be written or read; the message names its path."""


def save(directory: Path, kind: str, step: int, arrays: dict, record: dict) -> Path:
    """Writes `<directory>/<kind>-<step>`; returns when it is safely there.

    Args:
      arrays: a flat dictionary of arrays.
      record: plain values, stored as JSON beside them.

    Raises:
      CheckpointError: the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    path = (directory / f"{kind}-{step:08d}").resolve()
    if path.exists():  # a resumed run comes past the same step with the same state
        return path
    host = {name: np.asarray(value) for name, value in jax.device_get(arrays).items()}
    content = {"record": record, "digests": {name: _digest(value) for name, value in host.items()}}
    items = ocp.args.Composite(
        arrays=ocp.args.StandardSave(host), record=ocp.args.JsonSave(content)
    )
    try:
        with _checkpointer() as checkpointer:
            checkpointer.save(path, items)
    except Exception as error:  # noqa: BLE001 - a full disk surfaces as OSError, ValueError or other
        for half in directory.glob(f"{path.name}.orbax*"):
            shutil.rmtree(half, ignore_errors=True)
        reason = str(error).strip().split("\n")[0][:300]
        raise CheckpointError(
            f"cannot write the checkpoint {path}: {reason}\nEarlier checkpoints are untouched: make "
            "room or mend the disk, and run the same command again to go on from them."
        ) from error
    return path


def restore(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """Reads a checkpoint written by `save`: its arrays and its record.

    Raises:
      CheckpointError: it is damaged; every array is compared with its stored SHA-256.
    """
    try:
        with _checkpointer() as checkpointer:
            items = ocp.args.Composite(
                arrays=ocp.args.StandardRestore(), record=ocp.args.JsonRestore()
            )
            loaded = checkpointer.restore(path.resolve(), items)
        content = loaded.record
        arrays = {name: np.asarray(value) for name, value in loaded.arrays.items()}
    except Exception as error:  # noqa: BLE001
        raise CheckpointError(f"cannot read the checkpoint {path}: {error}") from error
    wrong = [name for name, digest in content["digests"].items() if _digest(arrays[name]) != digest]
    if wrong:
        raise CheckpointError(
            f"the checkpoint {path} is damaged: {', '.join(wrong)} changed on disk"
        )
    return arrays, content["record"]


def find(directory: Path, kind: str) -> list[Path]:
    """Returns the whole checkpoints of a kind, newest first."""
    pattern = re.compile(rf"{kind}-\d+")
    return sorted(
        (p for p in directory.glob(f"{kind}-*") if pattern.fullmatch(p.name)), reverse=True
    )


def keep(directory: Path, paths: list[Path]) -> None:
    """Deletes every other checkpoint, and whatever an interrupted save left behind."""
    names = {path.name for path in paths}
    for path in directory.iterdir():
        if path.name not in names:
            shutil.rmtree(path, ignore_errors=True)


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())


def _digest(array: np.ndarray) -> str:
    text = f"{array.dtype} {array.shape}".encode()
    return hashlib.sha256(text + np.ascontiguousarray(array).tobytes()).hexdigest()
