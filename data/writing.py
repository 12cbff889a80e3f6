"""Write the images of any source as the files that data/records.py reads."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from ml_collections import ConfigDict
from PIL import __version__

from data.decoding import FACTS, describe, facts_settings, in_threads, message_of
from data.records import INDEX, UNFINISHED, VERSION, WORDS, crc_of, open_records, packed, unpacked
from data.sources import UNREAD, Listing
from errors import UserError

# Images of a shard. A reader takes an open file, of which a process may often have 1,024; one of
# many more images than this keeps its list of records on disk and is several times slower.
SHARD, SHARDS = 8192, 512
BLOCK = 256  # images in memory at once
CODE = np.dtype(np.uint8)


def write_records(
    listing: Listing,
    data: ConfigDict,
    folder: Path,
    name: str = "images",
    per_shard: int = 0,
    progress: Callable[[int], None] = lambda images: None,
) -> bool:
    """Writes a source as records, shard by shard, each read back and compared with the source.

    Stopped, it goes on with the first shard that is not there. A folder that is whole is compared
    with the source from its first record to its last. Broken images are written too, with what is
    wrong with them, as `data.unreadable` may be either in the runs.

    Args:
      listing: the source.
      data: `config.data`, for what facts depend on: see `decoding.facts_settings`.
      folder: where to.
      name: of the files.
      per_shard: images of a shard; 0: 8,192, or what makes 512 shards.
      progress: is told how many images were written or compared.

    Returns:
      Whether anything was written.

    Raises:
      UserError: the folder holds other things, the disk is full, or the source changed.
    """
    count = len(listing.ids)
    per_shard = per_shard or max(SHARD, -(-count // SHARDS))
    if (folder / INDEX).exists():
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)  # killed at the very end
        _compare(listing, open_records(folder), folder, progress)
        return False
    starts = range(0, count, per_shard)
    files = [f"{name}-{k:05d}-of-{len(starts):05d}.array_record" for k in range(len(starts))]
    with _unfinished(folder, _plan(listing, data, files)) as work:
        pieces = [work / f"{k:05d}.npz" for k in range(len(starts))]
        for start, file, piece in zip(starts, files, pieces, strict=True):
            rows = range(start, min(start + per_shard, count))
            if not piece.exists() or not (folder / file).exists():
                _write_shard(listing, data, rows, folder / file, piece, progress)
            else:
                progress(len(rows))
        _write_index(listing, data, folder, files, pieces)
    shutil.rmtree(work)
    return True


def _plan(listing: Listing, data: ConfigDict, files: list[str]) -> str:
    """Returns a digest of what is written, but for the images themselves."""
    digest = hashlib.sha256(json.dumps([listing.class_names, facts_settings(data), files]).encode())
    for texts in (listing.ids, listing.parts, listing.groups or ()):
        for text in texts:
            digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    digest.update(np.ascontiguousarray(listing.labels, np.int32))
    return digest.hexdigest()


@contextmanager
def _unfinished(folder: Path, plan: str) -> Iterator[Path]:
    """Gives the folder of what is not yet in the index; one process at a time has it."""
    work = folder / UNFINISHED
    try:
        if folder.exists() and any(folder.iterdir()) and not work.exists():
            raise UserError(f"{folder} is not empty: name a new folder for the records")
        work.mkdir(parents=True, exist_ok=True)
        with open(work / "plan", "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"another process writes to {folder}: wait for it") from error
            file.seek(0)
            if (known := file.read()) and known != plan:
                raise UserError(
                    f"{folder} was begun with other images, labels, parts or options: go on with "
                    "those, or delete it"
                )
            file.seek(0)
            file.truncate()
            file.write(plan)
            file.flush()
            yield work
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error}\nMake room there; what is written stays, and the "
            "same command goes on from there"
        ) from error


def _write_shard(
    listing: Listing,
    data: ConfigDict,
    rows: range,
    path: Path,
    piece: Path,
    progress: Callable[[int], None],
) -> None:
    """Writes the images of a shard, reads them back, and notes what is known of them."""
    facts, errors, modes = np.zeros(len(rows), FACTS), [""] * len(rows), [""] * len(rows)
    digests = np.zeros(len(rows), "V32")

    def look(k: int) -> bytes:
        try:
            stored = listing.read(rows[k])
            digests[k] = np.frombuffer(listing.digest(rows[k], stored), "V32")[0]
        except Exception as error:  # noqa: BLE001 - disks and sources raise many types
            digests[k], errors[k] = np.frombuffer(UNREAD, "V32")[0], message_of(error)
            return b""
        try:
            _, facts[k], modes[k] = describe(stored, data)
        except Exception as error:  # noqa: BLE001 - Pillow raises many types on broken files
            errors[k] = message_of(error)
        return packed(stored)

    part = piece.with_suffix(".array_record")
    writer = ArrayRecordWriter(str(part), "group_size:1,uncompressed")
    for start in range(0, len(rows), BLOCK):
        count = min(BLOCK, len(rows) - start)
        for record in in_threads(lambda k, first=start: look(first + k), count):
            writer.write(record)
        progress(count)
    writer.close()
    try:
        reader = ArrayRecordReader(str(part))
        for k, row in enumerate(rows):
            record = unpacked(reader.read([k])[0])
            if bytes(digests[k]) not in (UNREAD, listing.digest(row, record)):
                raise ValueError(f"{listing.ids[row]} reads otherwise than it was written")
        reader.close()
    except (RuntimeError, ValueError, IndexError) as error:  # what a full disk leaves
        raise OSError(f"{path.name} does not read as it was written: {error}") from error
    os.replace(part, path)
    noted = {"digests": digests, "errors": np.array(errors), "modes": np.array(modes)}
    with open(piece.with_suffix(".part"), "wb") as file:
        np.savez(file, facts=facts, **noted)
    os.replace(file.name, piece)


def _write_index(
    listing: Listing, data: ConfigDict, folder: Path, files: list[str], pieces: list[Path]
) -> None:
    """Joins what is known of each shard, column by column, and writes `index.json` last."""
    (folder / "index").mkdir(exist_ok=True)
    count = len(listing.ids)

    def new(name: str, dtype: np.dtype) -> np.ndarray:
        path, shape = folder / "index" / f"{name}.npy", (count, *dtype.shape)
        return np.lib.format.open_memmap(path, "w+", dtype.base, shape)

    columns = {name: new(name, FACTS[name]) for name in FACTS.names}
    columns["digests"], columns["modes"] = new("digests", np.dtype("V32")), new("modes", CODE)
    columns["labels"], columns["parts"] = new("labels", np.dtype(np.int32)), new("parts", CODE)
    columns["labels"][:] = listing.labels
    columns["parts"][:] = [WORDS.index(part) for part in listing.parts]
    for name, texts in (("id", listing.ids), ("group", listing.groups)):
        if texts is not None:
            encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
            columns[f"{name}_ends"] = new(f"{name}_ends", np.dtype(np.int64))
            columns[f"{name}_ends"][:] = np.cumsum([len(text) for text in encoded])
            text = np.frombuffer(b"".join(encoded), np.uint8)
            columns[f"{name}s"] = text
            np.save(folder / "index" / f"{name}s.npy", text)
    start, errors, modes, shards = 0, {}, {}, []
    for file, piece in zip(files, pieces, strict=True):
        with np.load(piece, allow_pickle=False) as noted:
            facts, digests, found = noted["facts"], noted["digests"], noted["modes"].tolist()
            broken = {i: text for i, text in enumerate(noted["errors"].tolist()) if text}
        stop = start + len(facts)
        for name in FACTS.names:
            columns[name][start:stop] = facts[name]
        columns["digests"][start:stop] = digests
        columns["modes"][start:stop] = [modes.setdefault(mode, len(modes)) for mode in found]
        errors |= {start + i: text for i, text in broken.items()}
        shards.append([file, len(facts), (folder / file).stat().st_size])
        start = stop
    notes = {
        "version": VERSION,
        "class_names": listing.class_names,
        "settings": facts_settings(data),
        "pillow": __version__,
        "shards": shards,
        "modes": list(modes),
        "errors": errors,
        "columns": {name: crc_of(column) for name, column in columns.items()},
    }
    for column in columns.values():
        if isinstance(column, np.memmap):
            column.flush()
    part = folder / UNFINISHED / INDEX
    part.write_text(json.dumps(notes, indent=1), encoding="utf-8")
    os.replace(part, folder / INDEX)


def _compare(
    listing: Listing, whole: Listing, folder: Path, progress: Callable[[int], None]
) -> None:
    """Raises a UserError unless a finished folder holds what a source does, to the byte."""
    for what in ("class_names", "ids", "labels", "parts", "groups"):
        ours, theirs = getattr(listing, what), getattr(whole, what)
        if (ours is None) != (theirs is None) or (ours is not None and [*ours] != [*theirs]):
            raise UserError(f"{folder} holds records of other {what}: name a new folder")

    def differs(i: int) -> str:
        known = bytes(whole.noted.digests[i])
        if known == UNREAD:
            return ""
        try:
            if whole.digest(i) != known:
                return f"{whole.noted.place(i)} is not what was written"
            return "" if listing.digest(i) == known else "the source changed since"
        except Exception as error:  # noqa: BLE001 - disks and sources raise many types
            return message_of(error)

    for start in range(0, len(listing.ids), BLOCK):
        count = min(BLOCK, len(listing.ids) - start)
        for k, why in enumerate(in_threads(lambda k, first=start: differs(first + k), count)):
            if why:
                raise UserError(
                    f"{listing.ids[start + k]}: {why}; write the records anew into a new folder"
                )
        progress(count)
