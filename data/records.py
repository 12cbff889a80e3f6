"""Sharded files of images in the ArrayRecord format, and an index of what is known of them.

    DIR/NAME-00000-of-00032.array_record   a record an image: its bytes as the source stored them
    DIR/index.json                         class names, shards, what is broken; written last
    DIR/index/*.npy                        an array a column: ids, labels, parts, facts, digests

Nothing is decoded to open it, and the index is mapped, not read: it holds what splits, audits and
the data's identity need. So a run goes on with records in place of the source they were made of.
"""

import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np

from data.decoding import FACTS
from data.folders import PARTS
from data.sources import Listing, Noted
from errors import UserError

VERSION = 1  # of the format
INDEX, UNFINISHED = "index.json", ".unfinished"
ARRAY = b"\x93NUMPY"  # how a record of an array begins; no image file does
WORDS = ("", *PARTS)  # of the codes in the column `parts`


@dataclass
class Shard:
    """A file of records, as Grain asks for it (`FileInstruction`)."""

    filename: str
    take: int
    skip: int = 0

    @property
    def examples_in_shard(self) -> int:
        """Number of records."""
        return self.take


class Texts(Sequence):
    """N texts that lie one after the other in a mapped array; one is made when it is asked for."""

    def __init__(self, text: np.ndarray, ends: np.ndarray):
        self.text, self.ends = text, ends

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = self.ends[index - 1] if index else 0
        return self.text[start : self.ends[index]].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        for i in range(0, len(self), 4096):
            ends = self.ends[i : i + 4096].tolist()
            start = int(self.ends[i - 1]) if i else 0
            text = self.text[start : ends[-1]].tobytes()
            for first, last in zip([start, *ends], ends, strict=False):
                yield text[first - start : last - start].decode("utf-8", "surrogatepass")


# --- reading ------------------------------------------------------------------------------------


def open_records(folder: Path) -> Listing:
    """Returns what a folder of records offers; opens no shard before an image is read.

    Raises:
      UserError: the folder is none, unfinished or damaged, or a shard is missing.
    """
    try:
        notes = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except OSError as error:
        what = "is unfinished" if (folder / UNFINISHED).exists() else f"has no {INDEX}"
        raise UserError(
            f"config.data.path: {folder} {what}; write the records, or go on writing them, with "
            "python -m analysis.records"
        ) from error
    except ValueError as error:
        raise _damaged(folder, f"{INDEX} is no JSON") from error
    if notes.get("version") != VERSION:
        raise _damaged(folder, f"its format is {notes.get('version')}, not {VERSION}")
    for name, _, size in notes["shards"]:
        found = (folder / name).stat().st_size if (folder / name).exists() else None
        if found != size:
            what = "is missing" if found is None else f"has {found:,} bytes, not {size:,}"
            raise _damaged(folder, f"{name} {what}")
    columns = {name: _column(folder, name, crc) for name, crc in notes["columns"].items()}
    shards = [Shard(str(folder / name), count) for name, count, _ in notes["shards"]]
    source = grain.sources.ArrayRecordDataSource(shards)
    ends = np.cumsum([shard.take for shard in shards])

    def place(i: int) -> str:
        shard = int(np.searchsorted(ends, i, "right"))
        return f"record {i - ends[shard] + shards[shard].take} of {shards[shard].filename}"

    def read(i: int) -> bytes | np.ndarray:
        try:
            return unpacked(source[i])
        except Exception as error:
            raise OSError(f"{place(i)} is damaged: {error}") from error

    errors = [""] * len(columns["labels"])
    for i, text in notes["errors"].items():
        errors[int(i)] = text
    noted = Noted(
        facts={name: columns[name] for name in FACTS.names},
        digests=columns["digests"],
        errors=errors,
        modes=[notes["modes"][code] for code in columns["modes"].tolist()],
        settings=notes["settings"],
        place=place,
    )
    return Listing(
        ids=Texts(columns["ids"], columns["id_ends"]),
        labels=columns["labels"],
        parts=[WORDS[code] for code in columns["parts"].tolist()],
        class_names=notes["class_names"],
        read=read,
        groups=Texts(columns["groups"], columns["group_ends"]) if "groups" in columns else None,
        noted=noted,
    )


def _column(folder: Path, name: str, crc: int) -> np.ndarray:
    """Maps a column; thumbnails, two thirds of the index, are not checked before they are used."""
    try:
        column = np.asarray(np.load(folder / "index" / f"{name}.npy", mmap_mode="r"))
        sound = name == "thumbnail" or crc == crc_of(column)
    except (OSError, ValueError) as error:
        raise _damaged(folder, f"index/{name}.npy cannot be read ({error})") from error
    if not sound:
        raise _damaged(folder, f"index/{name}.npy changed since it was written")
    return column


def _damaged(folder: Path, why: str) -> UserError:
    return UserError(f"{folder}: {why}; bring the file back, or write the records anew elsewhere")


def crc_of(column: np.ndarray) -> int:
    """Returns the CRC-32 of a column."""
    return zlib.crc32(column.reshape(-1).view(np.uint8)) if column.size else 0


def packed(data: bytes | np.ndarray) -> bytes:
    """Returns the record of an image: a file as it is, an array with its shape."""
    if isinstance(data, bytes):
        return data
    file = io.BytesIO()
    np.save(file, data, allow_pickle=False)
    return file.getvalue()


def unpacked(record: bytes) -> bytes | np.ndarray:
    """Returns the image of a record."""
    return np.load(io.BytesIO(record), allow_pickle=False) if record.startswith(ARRAY) else record
