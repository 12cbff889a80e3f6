"""Reads published weight files to numpy arrays, in the names and layouts of their publishers.

A weight file comes from a stranger: nothing in it is executed, it cannot make another file be read,
and one that is damaged is refused with a message that names it.
"""

import os
import re
from pathlib import Path

import h5py
import numpy as np
import safetensors
from ml_dtypes import bfloat16
from safetensors.numpy import save

from errors import UserError, choose
from models.weights.pytorch import read_pytorch


def read_weights(path: Path, kind: str) -> dict[str, np.ndarray]:
    """Returns {name: array} as published, floats as float32, other types as they are.

    `kind` is "safetensors", "keras" (legacy HDF5 of Keras Applications) or "pytorch" (a state
    dict). A file that is missing, empty, damaged or could run code raises UserError.
    """
    readers = {"safetensors": _read_safetensors, "keras": _read_keras, "pytorch": read_pytorch}
    reader = readers[choose("the kind of weights", kind, readers)]
    check_file(path)
    try:
        return {name: _to_float32(array) for name, array in reader(path).items()}
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - broken files raise nearly any type
        raise _damaged(path, error) from error


def read_metadata(path: Path) -> dict[str, str]:
    """Returns the text fields in the header of a safetensors file."""
    check_file(path)
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def write_safetensors(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes a safetensors file of arrays and text fields, whole or absent at any moment."""
    # The library writes memory as it lies, so a transposed view must be laid out first.
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(save(arrays, metadata))  # the library's own writing is private to us
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"cannot write weights to {path}: {error}\nMake room there, or name another folder."
        ) from error


def check_file(path: Path) -> None:
    """Raises a UserError unless there is a file that holds something."""
    if path.is_dir():
        raise UserError(f"weights: {path} is a folder; name the file in it")
    if not path.is_file():
        raise UserError(f"weights: there is no file {path}; check the path")
    if path.stat().st_size == 0:
        raise UserError(f"weights: {path} is empty; delete it and fetch it again")


def _damaged(path: Path, reason: object) -> UserError:
    return UserError(
        f"weights: {path} is damaged or cut short ({reason}); delete it and fetch it again"
    )


def _to_float32(array: np.ndarray) -> np.ndarray:
    if array.dtype == bfloat16 or array.dtype.kind == "f":
        return array.astype(np.float32, copy=False)
    return array


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    with safetensors.safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _read_keras(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path, "r", locking=False) as file:  # some network disks know no locks
        _refuse_links(path, file, set())
        return _read_layers(path, file)


def _refuse_links(path: Path, group: h5py.Group, seen: set[int]) -> None:
    """Raises unless every name in the tree is data of this very file.

    HDF5 would follow the rest without a word: to other files on this machine, into raw bytes of
    any file (external storage), or into datasets pieced together from other files (virtual).
    """
    address = h5py.h5o.get_info(group.id).addr
    if address in seen:  # hard links may form a circle
        return
    seen.add(address)
    for name in group:
        where = f"{group.name.rstrip('/')}/{name}"
        is_link = not isinstance(group.get(name, getlink=True), h5py.HardLink)
        member = None if is_link else group[name]
        if isinstance(member, h5py.Group):
            _refuse_links(path, member, seen)
        elif is_link or getattr(member, "external", None) or getattr(member, "is_virtual", False):
            raise UserError(
                f"weights: {path} is refused: {where} takes its data from elsewhere; only files"
                " that hold their own weights are read"
            )


def _read_layers(path: Path, file: h5py.File) -> dict[str, np.ndarray]:
    root = file.get("model_weights", file)
    layers = _names(root, "layer_names")
    if layers is None:
        if {"_layer_checkpoint_dependencies", "layers", "vars"} & set(root):
            raise UserError(
                f"weights: {path} has the layout of Keras 3 (.weights.h5), which is not read; save"
                " in the legacy layout: to a name that ends in .h5 but not in .weights.h5"
            )
        raise UserError(
            f"weights: {path} has no attribute layer_names; give an .h5 file with the weights of"
            " a Keras model, as Keras Applications publishes them"
        )
    arrays = {}
    for layer in layers:
        if not isinstance(root.get(layer), h5py.Group):
            raise _damaged(path, f"layer {layer!r} is listed and missing")
        for weight in _names(root[layer], "weight_names") or []:
            name = f"{layer}/{re.sub(r':[0-9]+$', '', weight).rsplit('/', 1)[-1]}"
            if name in arrays:
                raise UserError(
                    f"weights: {path} holds {name} twice (the second as {weight!r}); names must"
                    " differ, so give a file with one model"
                )
            arrays[name] = _read_dataset(path, root[layer].get(weight), f"{layer}: {weight}")
    if not arrays:
        raise UserError(f"weights: {path} lists {len(layers)} layers and no weights in them")
    return arrays


def _names(group: h5py.Group, attribute: str) -> list[str] | None:
    """Returns a list of names, which Keras splits into <attribute>0, 1, ... where it is long."""
    if attribute in group.attrs:
        parts = [group.attrs[attribute]]
    else:
        keys = [f"{attribute}{i}" for i in range(len(group.attrs))]
        parts = [group.attrs[key] for key in keys if key in group.attrs]
    if not parts:
        return None
    names = np.concatenate([np.ravel(part) for part in parts]).tolist()
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def _read_dataset(path: Path, dataset: object, name: str) -> np.ndarray:
    if not isinstance(dataset, h5py.Dataset):
        raise _damaged(path, f"weight {name!r} is listed and missing")
    if dataset.dtype.kind not in "fiu":
        raise UserError(f"weights: {path}: {name!r} holds {dataset.dtype}, not numbers")
    # No compression gains this much: such a dataset was never filled, or is made to exhaust memory.
    if dataset.nbytes > 2000 * dataset.id.get_storage_size():
        raise _damaged(path, f"weight {name!r} of {dataset.nbytes:,} bytes holds no data")
    return np.asarray(dataset[()])
