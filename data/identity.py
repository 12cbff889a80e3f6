"""What a data set is, wherever it lies: images, labels, parts and groups, and a fingerprint."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from data.decoding import Decoded
from data.sources import Listing
from errors import UserError


def identity_table(listing: Listing, decoded: Decoded, parts: list[str]) -> pd.DataFrame:
    """Returns a row an image, by id: class, part ("" for none), group, and a digest of its pixels.

    The digest is of the decoded image before it is resized, "" where it cannot be read. So neither
    the folder, the format of the files nor `data.image_size` matters.
    """
    digests = [
        "" if error else pixels.tobytes().hex()[:32]
        for pixels, error in zip(decoded.facts["pixels"], decoded.errors, strict=True)
    ]
    table = pd.DataFrame(
        {
            "class": np.array(listing.class_names, object)[listing.labels],
            "part": parts,
            "group": listing.groups or "",
            "pixels": digests,
        },
        index=pd.Index(listing.ids, name="id"),
        dtype=str,
    )
    return table.sort_index()


def fingerprint(table: pd.DataFrame, class_names: list[str]) -> str:
    """Returns the SHA-256 of an identity table and of the class names in order."""
    digest = hashlib.sha256("\0".join(class_names).encode(errors="surrogateescape"))
    for row in table.itertuples(name=None):
        digest.update(("\n" + "\0".join(row)).encode(errors="surrogateescape"))
    return digest.hexdigest()


def difference(old: pd.DataFrame, new: pd.DataFrame) -> str:
    """Returns what changed from one identity table to another, in words, with examples."""
    added, removed = new.index.difference(old.index), old.index.difference(new.index)
    common = old.index.intersection(new.index)
    changes = [("images added", added), ("images removed", removed)]
    changes += [
        (what, common[(old.loc[common, column] != new.loc[common, column]).to_numpy()])
        for what, column in (
            ("images changed", "pixels"),
            ("labels changed", "class"),
            ("images moved to another part", "part"),
            ("images in another group", "group"),
        )
    ]
    texts = [f"{len(ids)} {what}, such as {ids[0]}" for what, ids in changes if len(ids)]
    return "; ".join(texts) or "the names or the order of the classes changed"


def write_table(table: pd.DataFrame, folder: Path, identity: str) -> None:
    """Keeps an identity table, so that a later change can be named."""
    folder.mkdir(parents=True, exist_ok=True)
    path = _table_path(folder, identity)
    if not path.exists():
        part = path.with_name(f".{os.getpid()}.{path.name}")
        table.to_csv(part, errors="surrogateescape", compression="gzip")
        os.replace(part, path)


def read_table(folder: Path, identity: str) -> pd.DataFrame:
    """Returns a table that `write_table` kept; raises OSError or ValueError where it is lost."""
    return pd.read_csv(
        _table_path(folder, identity), index_col="id", dtype=str, keep_default_na=False,
        encoding_errors="surrogateescape", compression="gzip",
    )  # fmt: skip


def _table_path(folder: Path, identity: str) -> Path:
    return folder / f"images-{identity[:16]}.csv.gz"


def check_identity(
    stored: dict,
    current: dict,
    where: str,
    table: Callable[[], pd.DataFrame],
    folder: Path,
) -> None:
    """Raises a UserError, with what changed, if two contents of `dataset.json` are of other data.

    Runs of older versions, which stored no identity, are compared by their files' fingerprint.

    Args:
      stored, current: what a run directory holds, and what there is now.
      where: the run directory.
      table: gives the identity table of what there is now, where it is needed.
      folder: where `write_table` kept the older ones.
    """
    keys = ("identity",) if "identity" in stored else ("fingerprint", "class_names", "counts")
    if all(stored.get(key) in (None, current[key]) for key in keys):
        return
    try:
        changed = difference(read_table(folder, stored[keys[0]]), table())
    except (OSError, ValueError):  # it was never kept, or was deleted
        changed = _changed_counts(stored, current)
    raise UserError(
        f"{where} belongs to other images, labels or parts than there are now (another "
        f"fingerprint): {changed}. Bring the old data back, or use another --workdir for the new"
    )


def _changed_counts(stored: dict, current: dict) -> str:
    """Returns how many images each part had and has, where no table tells more."""
    texts = []
    for part, counts in stored.get("counts", {}).items():
        before, now = sum(counts.values()), sum(current["counts"][part].values())
        texts.append(f"{part} {before} images then, {now} now")
    return ", ".join(texts)
