"""Where images come from: each source lists what it has, before anything is decoded."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from errors import UserError

PARTS = ("train", "validation", "test")
ALIASES = {
    "train": "train",
    "training": "train",
    "seg_train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "seg_test": "test",
}
IGNORED = ("seg_pred", "pred", "__MACOSX")  # folders of images without labels
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


@dataclass
class Listing:
    """What a source offers: N images, still encoded."""

    ids: list[str]  # unique; a path relative to the root, or a name such as digits/0007
    labels: np.ndarray  # int32 [N], indices into class_names
    parts: list[str]  # one of PARTS, or "" where the source leaves it open
    class_names: list[str]
    read: Callable[[int], bytes | np.ndarray]  # an encoded file, or [H, W] or [H, W, C] uint8
    groups: list[str] | None = None
    strays: list[str] = field(default_factory=list)  # files in class folders that are no image

    def digest(self, index: int) -> bytes:
        """Returns the SHA-256 of one image as stored, and of its shape if it is an array."""
        data = self.read(index)
        if isinstance(data, np.ndarray):
            shape = str(data.shape).encode()
            return hashlib.sha256(shape + np.ascontiguousarray(data).tobytes()).digest()
        return hashlib.sha256(data).digest()


def list_source(data: ConfigDict) -> Listing:
    """Returns what `config.data` names.

    Raises:
      UserError: the source is missing, or its classes or parts cannot be used.
    """
    listing = {"digits": _digits, "folder": _folder, "npz": _npz, "tfds": _tfds}[data.source](data)
    where = f"{data.source} {data.path}".strip()
    if len(listing.class_names) < 2:
        raise UserError(
            f"{where}: found {len(listing.class_names)} class(es) {listing.class_names}; "
            "need at least two to tell apart"
        )
    counts = np.bincount(listing.labels, minlength=len(listing.class_names))
    empty = [name for name, n in zip(listing.class_names, counts, strict=True) if n == 0]
    if empty:
        raise UserError(
            f"{where}: no images of class {', '.join(map(repr, empty))}; add some, or remove it"
        )
    if data.groups:
        listing.groups = _groups(data.groups, listing.ids)
    return listing


def _groups(rule: str, ids: list[str]) -> list[str]:
    """Returns a group key for every id, by regular expression or from a .csv file."""
    if rule.endswith(".csv"):
        try:  # of any separator, with or without a byte order mark
            table = pd.read_csv(rule, sep=None, engine="python", encoding="utf-8-sig", dtype=str)
            by_id = dict(zip(table["id"], table["group"], strict=True))
        except (OSError, KeyError, ValueError) as error:
            raise UserError(
                f"config.data.groups={rule}: need columns id,group ({error})"
            ) from error
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
    missing = [name for name, group in zip(ids, groups, strict=True) if group is None]
    if missing:
        raise UserError(
            f"config.data.groups={rule!r} names no group for {len(missing)} images, such as "
            f"{missing[0]}"
        )
    return groups


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


# --- folders ------------------------------------------------------------------------------------


def _folder(data: ConfigDict) -> Listing:
    """root/<class>/..., or root/{train,val,test}/<class>/..., names as in ALIASES."""
    root = Path(data.path).expanduser()
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise UserError(f"config.data.path: {root} {what}; expected a folder of class folders")
    roots = _part_folders(root) or {"": root}
    files: list[tuple[str, str, Path]] = []  # (part, class, path)
    strays: list[str] = []
    names: dict[str, set[str]] = {}
    for part, folder in roots.items():
        names[part] = {child.name for child in _children(folder) if child.is_dir()}
        found = 0
        for class_name in sorted(names[part]):
            for path in sorted((folder / class_name).rglob("*")):
                hidden = any(p.startswith(".") for p in path.relative_to(root).parts)
                if hidden or path.is_dir():
                    continue
                if path.suffix.lower() in SUFFIXES:
                    files.append((part, class_name, path))
                    found += 1
                else:
                    strays.append(path.relative_to(root).as_posix())
        if not found:
            raise UserError(
                f"{folder} holds no images: expected {folder.name}/<class>/<image>, with one of "
                f"the endings {' '.join(sorted(SUFFIXES))}"
            )
    if "" not in roots and "train" not in roots:
        raise UserError(f"{root} has {', '.join(roots)} but no train folder")
    class_names = sorted(names.get("train", names.get("", set())))
    for part, found_names in names.items():
        extra = sorted(found_names - set(class_names))
        if extra:
            raise UserError(f"{roots[part]}: class {extra[0]!r} is not in {roots['train']}")
    index = {name: i for i, name in enumerate(class_names)}
    for part, class_name in (("train", name) for name in class_names):
        here = part if part in roots else ""
        if not any(p == here and c == class_name for p, c, _ in files):
            raise UserError(f"{roots[here] / class_name} holds no images: add some, or remove it")
    paths = [path for _, _, path in files]
    return Listing(
        ids=[path.relative_to(root).as_posix() for path in paths],
        labels=np.array([index[name] for _, name, _ in files], np.int32),
        parts=[part for part, _, _ in files],
        class_names=class_names,
        read=lambda i: paths[i].read_bytes(),
        strays=strays,
    )


def _children(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if not child.name.startswith("."))


def _part_folders(root: Path) -> dict[str, Path]:
    """Returns {part: folder} if every folder in `root` is a part, such as train/; else nothing.

    A folder that holds just one of its own name, as Kaggle nests them, is entered.
    """
    folders = [child for child in _children(root) if child.is_dir() and child.name not in IGNORED]
    parts: dict[str, Path] = {}
    for folder in folders:
        part = ALIASES.get(folder.name.lower())
        inner = [child for child in _children(folder) if child.is_dir()]
        if part is None or not inner:
            return {}
        if part in parts:
            raise UserError(f"{parts[part]} and {folder} both hold the {part} images: keep one")
        parts[part] = inner[0] if len(inner) == 1 and inner[0].name == folder.name else folder
    return parts


# --- arrays -------------------------------------------------------------------------------------


def _npz(data: ConfigDict) -> Listing:
    """`images` [N, H, W] or [N, H, W, C] uint8 and `labels` [N], or x_train, y_train, x_test, ...

    Optional: `class_names` [K], `ids` [N], `groups` [N], `parts` [N] with the names in PARTS.
    """
    path = Path(data.path).expanduser()
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (OSError, ValueError) as error:
        raise UserError(f"config.data.path: cannot read {path} as .npz: {error}") from error
    if "images" in arrays:
        images, labels = arrays["images"], arrays.get("labels")
        parts = [str(part) for part in arrays.get("parts", [""] * len(images))]
    elif "x_train" in arrays:
        short = {"train": "train", "val": "validation", "test": "test"}
        found = [key for key in short if f"x_{key}" in arrays and f"y_{key}" in arrays]
        images = np.concatenate([arrays[f"x_{key}"] for key in found])
        labels = np.concatenate([arrays[f"y_{key}"].ravel() for key in found])
        parts = [short[key] for key in found for _ in arrays[f"y_{key}"]]
    else:
        raise UserError(f"{path} has {sorted(arrays)}; expected images and labels, or x_train ...")
    problem = None
    if labels is None or len(labels) != len(images) or labels.ndim != 1:
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
        read=lambda i: images[i],
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
