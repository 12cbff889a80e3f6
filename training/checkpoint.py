"""Orbax behind a few functions: checkpoints that are whole, verified, and kept until replaced."""

import hashlib
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from errors import UserError
from training import hosts

KEPT = {"latest": 1, "best": 2}  # the older best belongs to the latest state until that is saved
# A failed write is raised to us; Orbax reports each of its parts again in the log.
logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)


class CheckpointError(UserError):
    """A checkpoint could not be written or read; the message names its path."""


class Checkpoints:
    """The latest state of a run, to go on from, and its best weights so far.

    Each is a folder `<directory>/<kind>/<step>` of named arrays and a small JSON record, which
    Orbax writes under a temporary name: a kill at any moment leaves whole ones only. Of several
    hosts, the first alone has any; it waits for no other.
    """

    def __init__(self, directory: Path):
        self.directory, self.managers = directory.resolve(), {}
        for kind, count in KEPT.items() if hosts.is_first() else ():
            (self.directory / kind).mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(
                max_to_keep=count,
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,
                create=False,
                **_alone(),
            )
            self.managers[kind] = ocp.CheckpointManager(self.directory / kind, options=options)

    def save(self, kind: str, step: int, tree: Any, record: dict) -> None:
        """Saves a tree of arrays and a record of plain values; a step already there is kept.

        Raises:
          CheckpointError: the disk is full or cannot be written; earlier checkpoints are untouched.
        """
        manager = self.managers.get(kind)
        if manager is None or step in manager.all_steps():
            return
        arrays = {name: np.asarray(value) for name, value in flat(jax.device_get(tree)).items()}
        content = {"record": record, "digests": {name: _digest(a) for name, a in arrays.items()}}
        items = ocp.args.Composite(
            arrays=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(content)
        )
        try:
            manager.save(step, args=items, force=True)
        except Exception as error:  # noqa: BLE001 - a full disk surfaces as OSError, ValueError, ...
            raise CheckpointError(
                f"cannot write the checkpoint {self.directory / kind / str(step)}: "
                f"{_reason(error)}\nEarlier checkpoints are untouched: make room or mend the disk, "
                "and run the same command again to go on from them."
            ) from error

    def path(self, kind: str, step: int) -> Path:
        """Returns the folder of a checkpoint."""
        return self.directory / kind / str(step)

    def steps(self, kind: str) -> list[int]:
        """Returns the steps of the whole checkpoints of a kind, newest first."""
        manager = self.managers.get(kind)
        return sorted(manager.all_steps(), reverse=True) if manager else []

    def delete(self, kind: str, step: int) -> None:
        """Deletes a checkpoint, damaged or not."""
        shutil.rmtree(self.path(kind, step), ignore_errors=True)
        self.managers[kind].reload()

    def close(self) -> None:
        """Ends Orbax' threads."""
        for manager in self.managers.values():
            manager.close()


def restore(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """Returns {"params/stages.0.kernel": array, ...} and the record; raises CheckpointError."""
    items = ocp.args.Composite(arrays=ocp.args.StandardRestore(), record=ocp.args.JsonRestore())
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(), **_alone()) as checkpointer:
            loaded = checkpointer.restore(path.resolve(), items)
        arrays = {name: np.asarray(value) for name, value in loaded.arrays.items()}
        digests = loaded.record["digests"].items()
        wrong = [name for name, digest in digests if _digest(arrays[name]) != digest]
    except Exception as error:  # noqa: BLE001 - damage surfaces as many types
        raise CheckpointError(f"cannot read the checkpoint {path}: {_reason(error)}") from error
    if wrong:
        raise CheckpointError(f"the checkpoint {path} is damaged: {wrong[0]} changed on disk")
    return arrays, loaded.record["record"]


def fit(template: Any, arrays: dict[str, np.ndarray], directory: Path) -> Any:
    """Returns arrays of a checkpoint in the structure of `template`; raises UserError if others."""
    names = list(flat(template))
    if set(names) != set(arrays):
        different = sorted(set(names) ^ set(arrays))[:5]
        raise UserError(
            f"{directory} was written by other code: {', '.join(different)} ... are on one side "
            "only. Use that code, or delete that folder to train anew"
        )
    return jax.tree.unflatten(jax.tree.structure(template), [arrays[n] for n in names])


def flat(tree: Any) -> dict[str, Any]:
    """Returns {path: leaf} for a nested tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}


def _alone() -> dict:
    """Returns options by which Orbax waits for no other host."""
    if not hosts.several():
        return {}
    alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
    return {"multiprocessing_options": alone}


def _reason(error: Exception) -> str:
    text = str(error)
    if "RESOURCE_EXHAUSTED" in text or "No space left" in text:
        return "no space left on the disk"
    return text.strip().split("\n")[0][:300]


def _digest(array: np.ndarray) -> str:
    text = f"{array.dtype} {array.shape}".encode()
    return hashlib.sha256(text + np.ascontiguousarray(array).tobytes()).hexdigest()
