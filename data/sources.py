"""Where images come from: each source lists what it has, before anything is decoded."""

import hashlib
import os
import re
import struct
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from data.folders import ALIASES, PARTS, read_file, read_folder, unique_ids
from data.formats import SUFFIXES as SUFFIXES
from data.formats import printable
from errors import UserError


@dataclass
class Noted:
    """What a source knows of its N images without decoding them: see data/records.py."""

    facts: dict[str, np.ndarray]  # the fields of `decoding.FACTS`, each [N]
    digests: np.ndarray  # V32 [N], of each image as stored; UNREAD where there is none
    errors: list[str]  # "" for a sound image
    modes: list[str]
    settings: dict  # fields of `config.data` that facts and errors depend on
    place: Callable[[int], str]  # where an image lies, in words


UNREAD = b"unread".ljust(32)  # stands for the digest of a file that could not be read


@dataclass
class Listing:
    """What a source offers: N images, still encoded."""

    ids: list[str]  # unique; a path relative to the root, or a name such as digits/0007
    labels: np.ndarray  # int32 [N], indices into class_names
    parts: list[str]  # one of PARTS, or "" where the source leaves it open
    class_names: list[str]
    read: Callable[[int], bytes | np.ndarray]  # an encoded file, or [H, W] or [H, W, C] uint8
    release: Callable[[], None] = lambda: None  # frees what `read` holds; it can be read again
    groups: list[str] | None = None
    strays: list[str] = field(default_factory=list)  # files in class folders that are no image
    left_out: dict[str, list[str]] = field(default_factory=dict)  # images not read, by the reason
    notes: list[str] = field(default_factory=list)  # what else a reader should know
    digests: list[tuple[bytes, str]] | None = None  # of every image as stored, once they are known
    noted: Noted | None = None

    def remarks(self) -> list[str]:
        """Returns a line on each kind of image that is left out, and the notes."""
        lines = [
            f"{len(names)} files left out, such as {names[0]}: {reason}"
            for reason, names in self.left_out.items()
        ]
        return lines + self.notes

    def digest(self, index: int, data: bytes | np.ndarray | None = None) -> bytes:
        """Returns the SHA-256 of one image as stored, and of its shape if it is an array."""
        data = self.read(index) if data is None else data
        if isinstance(data, np.ndarray):
            shape = str(data.shape).encode()
            return hashlib.sha256(shape + np.ascontiguousarray(data).tobytes()).digest()
        return hashlib.sha256(data).digest()


def list_source(data: ConfigDict) -> Listing:
    """Returns what `config.data` names, and warns of what is left out of it.

    Raises:
      UserError: the source is missing, or its classes or parts cannot be used.
    """
    listing = SOURCES[data.source](data)
    where = f"{data.source} {data.path}".strip()
    if len(listing.class_names) < 2:
        raise UserError(
            f"{where}: found {len(listing.class_names)} class(es) {listing.class_names}; "
            "need at least two to tell apart; where folders are understood otherwise than they are "
            "meant, see config.data.layout"
        )
    counts = np.bincount(listing.labels, minlength=len(listing.class_names))
    empty = [name for name, n in zip(listing.class_names, counts, strict=True) if n == 0]
    if empty:
        raise UserError(
            f"{where}: no images of class {', '.join(map(repr, empty))}; add some, or remove it"
        )
    if data.groups:
        listing.groups = _groups(data.groups, listing.ids)
    for line in listing.remarks():
        print(f"warning: {line}", file=sys.stderr)
    return listing


def _groups(rule: str, ids: list[str]) -> list[str]:
    """Returns a group key for every id, by regular expression or from a .csv file."""
    if rule.endswith(".csv"):
        by_id = _groups_table(Path(rule).expanduser())
        groups = [by_id.get(name) for name in ids]
    else:
        try:
            pattern = re.compile(rule)
        except re.error as error:
            raise UserError(
                f"config.data.groups={rule!r} is no regular expression: {error}"
            ) from error
        if pattern.groups < 1:
            raise UserError(f"config.data.groups={rule!r} needs a group in parentheses: the key")
        matches = [pattern.search(name) for name in ids]
        groups = [match and match[1] for match in matches]
    missing = [name for name, group in zip(ids, groups, strict=True) if not group]
    if missing:
        raise UserError(
            f"config.data.groups={rule!r} names no group for {len(missing)} images, such as "
            f"{missing[0]}"
        )
    return groups


def _groups_table(path: Path) -> dict[str, str]:
    """Reads the columns id,group of a table, as any spreadsheet writes it."""
    try:  # a byte order mark is dropped
        with open(path, encoding="utf-8-sig") as file:
            head = file.readline()
        separator = max(",;\t", key=head.count)
        table = pd.read_csv(
            path, sep=separator, encoding="utf-8-sig", dtype=str, keep_default_na=False
        )
        pairs = zip(map(printable, table["id"]), table["group"], strict=True)
        pairs = [(name.replace("\\", "/"), group.strip()) for name, group in pairs]
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            f"config.data.groups={path}: need a table in UTF-8 with the columns id,group ({error})"
        ) from error
    by_id: dict[str, str] = {}
    for name, group in pairs:
        if by_id.setdefault(name, group) != group:
            raise UserError(
                f"config.data.groups={path}: {name} is in two groups, {by_id[name]} and {group}"
            )
    return by_id


def _digits(data: ConfigDict) -> Listing:
    """1,797 handwritten digits of 8x8 pixels that scikit-learn ships (UCI optdigits, test part)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)  # [N, 8, 8], from 0..16
    return Listing(
        ids=[f"digits/{i:04d}" for i in range(len(images))],
        labels=digits.target.astype(np.int32),
        parts=[""] * len(images),
        class_names=[str(name) for name in digits.target_names],
        read=lambda i: images[i],
    )


def _folder(data: ConfigDict) -> Listing:
    """A folder of images: see data/folders.py."""
    root = Path(data.path).expanduser()
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise UserError(f"config.data.path: {root} {what}; expected a folder of class folders")
    if (root / "index.json").exists() and any(root.glob("*.array_record")):
        raise UserError(
            f"config.data.path: {root} holds records: read them with "
            "--config.data.source=array_record, and audit them with --config=..."
        )
    found = read_folder(root, data.get("layout", "auto"))
    index = {name: i for i, name in enumerate(found.class_names)}
    paths = [path for _, _, path in found.files]
    return Listing(
        ids=unique_ids(paths, root),
        labels=np.array([index[name] for _, name, _ in found.files], np.int32),
        parts=[part for part, _, _ in found.files],
        class_names=found.class_names,
        read=lambda i: read_file(paths[i]),
        strays=found.strays,
        left_out=found.left_out,
        notes=found.notes,
    )


# --- arrays -------------------------------------------------------------------------------------


BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, NotImplementedError)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of an .npz; x_train, y_train, ... as images, labels and parts."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: _member(path, file, key) for key in file.files}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, *BROKEN_ZIP) as error:
        raise UserError(f"config.data.path: cannot read {path} as .npz: {error}") from error
    short = {"train": "train", "val": "validation", "test": "test"}
    found = [key for key in short if f"x_{key}" in arrays and f"y_{key}" in arrays]
    if "images" in arrays:
        arrays["images"] = np.atleast_1d(arrays["images"])
        return arrays
    if not found:
        raise UserError(f"{path} has {sorted(arrays)}; expected images and labels, or x_train ...")
    images = [np.atleast_1d(arrays.pop(f"x_{key}")) for key in found]
    labels = [arrays.pop(f"y_{key}").ravel() for key in found]
    for key, x, y in zip(found, images, labels, strict=True):
        if len(x) != len(y) or x.shape[1:] != images[0].shape[1:]:
            raise UserError(
                f"{path}: x_{key} {x.shape} must have as many images as y_{key} ({len(y)}), of the "
                f"shape of the other parts {images[0].shape[1:]}"
            )
    parts = np.repeat([short[key] for key in found], [len(y) for y in labels])
    images, labels = np.concatenate(images), np.concatenate(labels)
    return arrays | {"images": images, "labels": labels, "parts": parts}


def _member(path: Path, file: np.lib.npyio.NpzFile, key: str) -> np.ndarray:
    """Returns an array of an .npz; images that are not compressed are mapped, not copied."""
    names = file.zip.namelist()
    entry = file.zip.getinfo(f"{key}.npy" if f"{key}.npy" in names else key)
    if key != "images" or entry.compress_type != zipfile.ZIP_STORED:
        return file[key]
    with file.zip.open(entry) as stream:  # to its end: only there a wrong checksum is an error
        while stream.read(2**20):
            pass
    with open(path, "rb") as raw:
        raw.seek(entry.header_offset + 26)  # of the lengths of the name and of what follows it
        raw.seek(sum(struct.unpack("<HH", raw.read(4))), os.SEEK_CUR)
        version = np.lib.format.read_magic(raw)
        header = getattr(np.lib.format, "read_array_header_{}_{}".format(*version))
        shape, fortran, dtype = header(raw)
        if dtype != np.uint8 or not shape or 0 in shape:
            return file[key]
        return np.memmap(path, dtype, "r", raw.tell(), shape, "F" if fortran else "C")


class _NpzImages:
    """The images of an .npz; where they are compressed, in memory only while they are decoded."""

    def __init__(self, path: Path, images: np.ndarray):
        self.path, self.images, self.lock = path, images, threading.Lock()

    def read(self, i: int) -> np.ndarray:
        with self.lock:
            if self.images is None:
                self.images = _read_npz(self.path)["images"]
            return self.images[i]

    def release(self) -> None:
        with self.lock:
            self.images = None


def _npz(data: ConfigDict) -> Listing:
    """`images` [N, H, W] or [N, H, W, C] uint8 and `labels` [N], or x_train, y_train, x_test, ...

    Optional: `class_names` [K], `ids` [N], `groups` [N], `parts` [N] with the names in PARTS.
    """
    path = Path(data.path).expanduser()
    arrays = _read_npz(path)
    images, labels = arrays["images"], arrays.get("labels")
    parts = [str(part) for part in arrays.get("parts", [""] * len(images))]
    problem = None
    if labels is None or labels.ndim != 1 or len(labels) != len(images):
        problem = "labels must be one number an image"
    elif images.dtype != np.uint8 or images.ndim not in (3, 4):
        problem = (
            f"images must be uint8 [N, H, W] or [N, H, W, C], got {images.dtype} {images.shape}"
        )
    elif not np.issubdtype(labels.dtype, np.integer) or labels.min(initial=0) < 0:
        problem = f"labels must be whole numbers from 0, got {labels.dtype}"
    elif set(parts) - {"", *PARTS}:
        problem = f"parts must be among {PARTS}, got {sorted(set(parts))}"
    elif "class_names" in arrays and labels.max(initial=0) >= len(arrays["class_names"]):
        problem = f"label {labels.max()} has no class name"
    if problem:
        raise UserError(f"{path}: {problem}")
    count = int(labels.max(initial=0)) + 1
    ids = arrays.get(
        "ids", [f"{path.stem}/{i:0{len(str(len(images)))}d}" for i in range(len(images))]
    )
    groups = [str(group) for group in arrays["groups"]] if "groups" in arrays else None
    for name, values in (("ids", ids), ("groups", groups), ("parts", parts)):
        if values is not None and len(values) != len(images):
            raise UserError(f"{path}: {len(values)} {name} for {len(images)} images")
    if len({str(name) for name in ids}) < len(ids):
        raise UserError(f"{path}: ids repeat")
    return Listing(
        ids=[str(name) for name in ids],
        labels=labels.astype(np.int32),
        parts=parts,
        class_names=[str(name) for name in arrays.get("class_names", range(count))],
        read=(source := _NpzImages(path, images)).read,
        release=source.release,
        groups=groups,
    )


def _tfds(data: ConfigDict) -> Listing:
    """A tensorflow-datasets name, read at random as array_record, without TensorFlow."""
    import tensorflow_datasets as tfds

    where = {"data_dir": str(Path(data.tfds_dir).expanduser())} if data.tfds_dir else {}
    try:
        builder = tfds.builder(data.path, **where)
        info = builder.info
        if not info.splits:
            builder = tfds.builder(data.path, file_format="array_record", **where)
            builder.download_and_prepare()
            info = builder.info
        image_key, label_key = info.supervised_keys
        skip = {image_key: tfds.decode.SkipDecoding()}
        names = [name for name in info.splits if name in ALIASES]
        tables = [builder.as_data_source(name, decoders=skip) for name in names]
    except Exception as error:  # noqa: BLE001 - tfds raises many types; all mean "not available"
        text = str(error).split("\n")[0]
        raise UserError(
            f"config.data.path: tfds cannot give {data.path!r}: {text}\nPrepare it once, "
            "where there is a network and TensorFlow, with tfds.builder("
            f"{data.path!r}, file_format='array_record').download_and_prepare(), and name "
            "its folder with --config.data.tfds_dir=... "
            "Reading it needs neither."
        ) from error
    place = [(table, i) for table in tables for i in range(len(table))]
    return Listing(
        ids=[f"{n}/{i:07d}" for n, t in zip(names, tables, strict=True) for i in range(len(t))],
        labels=np.array([table[i][label_key] for table, i in place], np.int32),
        parts=[
            ALIASES[n] if len(names) > 1 else ""
            for n, t in zip(names, tables, strict=True)
            for _ in range(len(t))
        ],
        class_names=list(info.features[label_key].names),
        read=lambda i: place[i][0][place[i][1]][image_key],
    )


def _array_record(data: ConfigDict) -> Listing:
    """A folder that `python -m analysis.records` wrote."""
    from data.records import open_records

    return open_records(Path(data.path).expanduser())


SOURCES = {
    "digits": _digits,
    "folder": _folder,
    "npz": _npz,
    "tfds": _tfds,
    "array_record": _array_record,
}
