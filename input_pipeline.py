"""From a data config to batches on the device: load, split, and feed.

The batch at step t is a pure function of (seed, t), whichever way it is fed, so a resumed run needs
to know nothing but its step.
"""

import functools
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import grain
import jax
import numpy as np
import pandas as pd
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from data.decoding import Decoded, decode_all
from data.folders import PARTS
from data.identity import fingerprint, identity_table
from data.randomness import Purpose
from data.sources import Listing, list_source
from data.splits import (
    assign_folds,
    divided_groups,
    exact_duplicates,
    fold_parts,
    leaks,
    missing_parts,
    split_parts,
    subset,
)
from errors import UserError

LISTED = ("source", "path", "tfds_dir", "layout", "groups")  # fields that a listing depends on


@dataclass
class Dataset:
    """Decoded images and which rows belong to which part."""

    listing: Listing
    decoded: Decoded
    rows: dict[str, np.ndarray]  # ascending row numbers of each part
    excluded: dict[str, str]  # ids left out, with the reason
    split_by_us: bool  # whether any part was drawn here rather than given by the source
    fold_of: np.ndarray | None = None  # fold that tests each image, int [N], -1 for none

    @property  # made anew each time, for it takes more memory than all else that is kept
    def identity_table(self) -> pd.DataFrame:
        """What every image is: see `data/identity.py`."""
        parts = np.full(len(self.listing.ids), "", object)
        for part, rows in self.rows.items():
            parts[rows] = part
        return identity_table(self.listing, self.decoded, parts.tolist())

    @functools.cached_property
    def identity(self) -> str:
        """The fingerprint of images, labels, parts and groups, wherever they lie."""
        return fingerprint(self.identity_table, self.class_names)

    @property
    def class_names(self) -> list[str]:
        """Names in the order of the labels."""
        return self.listing.class_names

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.listing.class_names)

    def labels(self, part: str) -> np.ndarray:
        """int32 [n] labels of a part."""
        return self.listing.labels[self.rows[part]]

    def ids(self, part: str) -> list[str]:
        """Ids of a part, in the order of its rows."""
        return [self.listing.ids[row] for row in self.rows[part]]

    def images(self, part: str) -> np.ndarray:
        """uint8 [n, S, S, 3] of a part, copied into memory; knn needs all training images there."""
        return self.decoded.images[self.rows[part]]

    def to_dict(self, config: ConfigDict) -> dict:
        """Returns what `dataset.json` holds."""
        counts = {}
        for part in PARTS:
            numbers = np.bincount(self.labels(part), minlength=self.num_classes).tolist()
            counts[part] = dict(zip(self.class_names, numbers, strict=True))
        return {
            "source": config.source,
            "path": config.path,
            "class_names": self.class_names,
            "counts": counts,
            "identity": self.identity,
            "fingerprint": self.decoded.fingerprint,
            "split_seed": config.split_seed,
            "split_by_us": self.split_by_us,
            "excluded": self.excluded,
        }


def load_dataset(config: ConfigDict, cache_dir: str, limit_mb: float = math.inf) -> Dataset:
    """Lists, decodes (or maps from the cache) and splits the images of `config.data`.

    A process looks at the files of one config once: later changes to them do not reach it. Images
    of `array_record` that take more than `limit_mb` decoded are decoded at every use instead.

    Raises:
      UserError: unreadable images, an empty part, or a class without training images.
    """
    try:
        return _load_dataset(config.to_json(), cache_dir, limit_mb)
    except UserError:
        _list_source.cache_clear()  # the user may mend the files and try again
        raise


@functools.lru_cache(maxsize=8)
def _list_source(config_json: str) -> Listing:
    return list_source(ConfigDict(json.loads(config_json)))


@functools.lru_cache(maxsize=256)  # of one listing, in all sizes of a grid; images are mapped
def _load_dataset(config_json: str, cache_dir: str, limit_mb: float) -> Dataset:
    config = ConfigDict(json.loads(config_json))
    if config.get("train_fraction", 1.0) < 1:
        return _smaller(config, cache_dir, limit_mb)
    listed = {name: config.get(name) for name in LISTED if name in config}
    listing = _list_source(json.dumps(listed))
    decoded = decode_all(listing, config, cache_dir, limit_mb)
    excluded = _check_readable(listing, decoded, config.unreadable)
    usable = np.array([not error for error in decoded.errors])
    groups = exact_duplicates(decoded)
    parts, fold_of = _divide(listing, usable, groups, config)
    if config.exclude_leaks:
        for row, reason in leaks(listing, parts, groups).items():
            excluded[listing.ids[row]] = reason
            parts[row] = -1
    elif divided := divided_groups(listing, parts):
        print(
            f"warning: {len(divided)} groups lie in several parts, such as {next(iter(divided))}: "
            "a leak; leave them out of training with --config.data.exclude_leaks",
            file=sys.stderr,
        )
    rows = {name: np.flatnonzero(parts == i) for i, name in enumerate(PARTS)}
    drawn = "" in listing.parts or missing_parts(listing) != [] or fold_of is not None
    dataset = Dataset(listing, decoded, rows, excluded, drawn, fold_of)
    _check_parts(dataset)
    return dataset


def _divide(
    listing: Listing, usable: np.ndarray, duplicates: list[np.ndarray], config: ConfigDict
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the part of every image, and under cross-validation the fold that tests it."""
    fractions, seed = tuple(config.split), config.split_seed
    if not config.get("folds"):
        return split_parts(listing, usable, duplicates, fractions, seed), None
    if stay_out := listing.parts.count("test"):
        _note(f"note: {stay_out} images of the source's test part stay out of cross-validation")
    fold_of = assign_folds(listing, usable, duplicates, config.folds, seed)
    parts = fold_parts(listing, fold_of, usable, duplicates, fractions, seed, config.fold)
    return parts, fold_of


@functools.cache
def _note(text: str) -> None:
    """Says something once, however many folds it holds for."""
    print(text, file=sys.stderr)


def _smaller(config: ConfigDict, cache_dir: str, limit_mb: float) -> Dataset:
    """Returns the data with `data.train_fraction` of its training images."""
    whole = ConfigDict({key: config[key] for key in config if key != "train_seed"})
    whole.train_fraction = 1.0
    data = _load_dataset(whole.to_json(), cache_dir, limit_mb)
    duplicates, seed = exact_duplicates(data.decoded), config.get("train_seed", 0)
    kept = subset(data.listing, data.rows["train"], duplicates, config.train_fraction, seed)
    return replace(data, rows=data.rows | {"train": kept})


def _check_readable(listing: Listing, decoded: Decoded, unreadable: str) -> dict[str, str]:
    """Returns why images are left out, by id; raises UserError under data.unreadable=error."""
    broken = [i for i, error in enumerate(decoded.errors) if error]
    if not broken:
        return {}
    lines = "\n".join(f"  {listing.ids[i]}: {decoded.errors[i]}" for i in broken[:20])
    more = f"\n  and {len(broken) - 20} more" if len(broken) > 20 else ""
    text = f"{len(broken)} of {len(listing.ids)} images cannot be used:\n{lines}{more}"
    if unreadable == "error":
        raise UserError(
            f"{text}\nRepair or delete them, or leave them out with --config.data.unreadable=skip"
        )
    print(f"warning: {text}\nThey are left out.", file=sys.stderr)
    return {listing.ids[i]: f"unreadable: {decoded.errors[i]}" for i in broken}


def _check_parts(dataset: Dataset) -> None:
    for part in PARTS:
        if not len(dataset.rows[part]):
            groups = dataset.listing.groups
            found = f"; found {len(set(groups))} group(s) by config.data.groups" if groups else ""
            raise UserError(
                f"the {part} part has no images ({len(dataset.listing.ids)} in all{found}): change "
                "config.data.split, or add images"
            )
        counts = np.bincount(dataset.labels(part), minlength=dataset.num_classes)
        absent = [dataset.class_names[i] for i in np.flatnonzero(counts == 0)]
        if absent and part == "train":
            raise UserError(f"no training image of class {', '.join(map(repr, absent))}: add some")
        if absent:
            print(f"warning: no {part} image of class {', '.join(absent)}", file=sys.stderr)


# --- batches ------------------------------------------------------------------------------------


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Returns how many batches show every one of `count` images once."""
    return -(-count // batch_size)


def check_batches(config: ConfigDict, mesh: Mesh) -> None:
    """Raises a UserError if a batch cannot be divided over the devices."""
    for name in ("batch_size", "eval_batch_size"):
        if config[name] % mesh.size:
            raise UserError(
                f"config.{name}={config[name]} cannot be divided over {mesh.size} devices: "
                f"use a multiple of {mesh.size}"
            )


def batch_rows(seed: int, step: int, count: int, batch_size: int) -> np.ndarray:
    """Returns the images of training batch `step`: int [batch_size], each below `count`."""
    return rows_at(seed, np.arange(step * batch_size, (step + 1) * batch_size), count)


def rows_at(seed: int, places: np.ndarray, count: int) -> np.ndarray:
    """Returns the images at places, ascending, of the order of training: int, each below `count`.

    Epochs of a fresh order each follow one another without a gap, so no image is dropped and all
    are seen equally often.
    """
    epochs, within = np.divmod(places, count)
    rows = np.empty(places.shape, int)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        here = epochs == epoch
        rows[here] = _order(seed, epoch, count)[within[here]]
    return rows


@functools.lru_cache(maxsize=8)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    seed, phase = seed % 2**32, seed >> 32
    # NumPy fills up with zeros: the phase stands last, or its orders would be another epoch's.
    order = np.random.default_rng([Purpose.ORDER, seed, epoch, phase]).permutation(count)
    return order.astype(np.int32)  # half the memory: up to eight are kept


def evaluation_rows(count: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (rows int [B], mask bool [B]) that cover 0..count-1 once; padding repeats row 0."""
    for start in range(0, count, batch_size):
        rows = np.arange(start, start + batch_size)
        mask = rows < count
        yield np.where(mask, rows, 0), mask


def _columns(plan: jax.Array) -> dict:
    """Returns what a batch holds beside images, of int32 [B, 4]: label, mask, row, epoch."""
    label, mask, row, epoch = plan.T
    return {"label": label, "mask": mask > 0, "row": row, "epoch": epoch}


@functools.lru_cache(maxsize=8)
def columns_program(sharding: NamedSharding) -> Callable[[jax.Array], dict]:
    """Returns `_columns`, jitted: one transfer a batch in place of four."""
    return jax.jit(_columns, out_shardings=sharding)


@functools.lru_cache(maxsize=8)
def gather_program(sharding: NamedSharding) -> Callable[[jax.Array, jax.Array], dict]:
    """Returns the jitted (images [N, ...], plan int32 [B, 5]) -> batch, one for all feeds.

    The first column of a plan says where the images lie, the others are those of `_columns`.
    """

    def gather(images: jax.Array, plan: jax.Array) -> dict:
        return {"image": images[plan[:, 0]], **_columns(plan[:, 1:])}

    return jax.jit(gather, out_shardings=sharding)


def to_devices(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Puts an array on the devices; of several hosts, each passes what its own devices hold."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_process_local_data(sharding, array)


@functools.lru_cache(maxsize=8)
def places_here(sharding: NamedSharding, batch_size: int) -> np.ndarray | slice:
    """Returns which images of a batch the devices of this host hold, ascending."""
    if sharding.is_fully_addressable:
        return slice(None)
    held = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.sort(np.concatenate([np.arange(batch_size)[places] for (places,) in held]))


Plan = tuple[np.ndarray, np.ndarray, np.ndarray]  # of a batch: rows int, mask bool, epochs int


class Feed:
    """Batches of one part on the devices of a mesh: {"image", "label", "mask", "row", "epoch"}.

    image: uint8 [B, S, S, 3]; label: int32 [B]; mask: bool [B], False for padding; row: int32 [B],
    places in the part; epoch: int32 [B]. Each is sharded over the mesh's "data" axis; a host looks
    at the images of its own devices alone. Both ways of feeding give the same batches.
    """

    def __init__(self, dataset: Dataset, part: str, mesh: Mesh, runtime: ConfigDict):
        self.rows, self.labels = dataset.rows[part], dataset.labels(part)
        self.stored, self.entry = dataset.decoded.images, dataset.decoded.entry
        self.sharding = NamedSharding(mesh, PartitionSpec("data"))
        fits = self.stored.nbytes <= runtime.resident_limit_mb * 2**20  # all parts together
        self.resident = runtime.feed == "resident" or (runtime.feed == "auto" and fits)
        self.gather = gather_program(self.sharding)

    @functools.cached_property
    def images(self) -> jax.Array:
        """The images of a resident feed, on every device from the first batch on."""
        everywhere = NamedSharding(self.sharding.mesh, PartitionSpec())
        return to_devices(self.stored[self.rows], everywhere)

    def __len__(self) -> int:
        return len(self.rows)

    def training(self, seed: int, batch_size: int, start: int, stop: int) -> Iterator[dict]:
        """Yields the batches of steps start .. stop - 1."""
        everything = np.ones(batch_size, bool)

        def plan(step: int) -> Plan:
            epochs = np.arange(step * batch_size, (step + 1) * batch_size) // len(self)
            return batch_rows(seed, step, len(self), batch_size), everything, epochs

        return self._batches(plan, start, stop)

    def evaluation(self, batch_size: int) -> Iterator[dict]:
        """Yields batches that cover the part once, in order, the last one padded."""
        plans = list(evaluation_rows(len(self), batch_size))
        first = np.zeros(batch_size, int)
        return self._batches(lambda i: (*plans[i], first), 0, len(plans))

    def _batches(self, plan: Callable[[int], Plan], start: int, stop: int) -> Iterator[dict]:
        def own(i: int) -> Plan:
            rows, mask, epochs = plan(i)
            here = places_here(self.sharding, len(rows))
            return rows[here], mask[here], epochs[here]

        if self.resident:
            for i in range(start, stop):
                rows, mask, epochs = own(i)
                columns = (self.places(rows, epochs), self.labels[rows], mask, rows, epochs)
                yield self.gather(self.images, self._columns(*columns))
            return

        def read(i: int) -> tuple[np.ndarray, np.ndarray]:
            rows, mask, epochs = own(i)
            return self.stored[self.rows[rows]], (self.labels[rows], mask, rows, epochs)

        # Grain reads ahead in threads and keeps the order.
        options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
        ahead = grain.MapDataset.range(start, stop).map(read).to_iter_dataset(options)
        columns = columns_program(self.sharding)
        for images, others in ahead:
            yield {"image": to_devices(images, self.sharding), **columns(self._columns(*others))}

    def places(self, rows: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Returns where in the resident array the images of a batch lie: int [B]."""
        del epochs
        return rows

    def _columns(self, *columns: np.ndarray) -> jax.Array:
        """Returns int32 [B, columns] on the devices."""
        plan = np.stack(columns, axis=1, dtype=np.int32, casting="unsafe")
        return to_devices(plan, self.sharding)
