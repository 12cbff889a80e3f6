"""Which image belongs to which part, and which copies tie images together."""

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from data.decoding import Decoded
from data.folders import PARTS
from data.randomness import Purpose
from data.sources import Listing
from errors import UserError

SMALL = 100  # images of a class; below, one image is more than one per cent


def missing_parts(listing: Listing) -> list[str]:
    """Returns the parts that the source does not give."""
    return [part for part in PARTS if part not in listing.parts]


def exact_duplicates(decoded: Decoded) -> list[np.ndarray]:
    """Returns groups of rows, two or more each, whose decoded pixels are the same."""
    readable = np.flatnonzero([not error for error in decoded.errors])
    pixels = decoded.facts["pixels"][readable]
    heads = pixels.view(np.uint64).reshape(-1, 4)[:, 0]  # numbers are sorted much faster
    _, key, counts = np.unique(heads, return_inverse=True, return_counts=True)
    several = np.flatnonzero(counts[key] > 1)
    _, key = np.unique(pixels[several].view("S32"), return_inverse=True)
    order = np.argsort(key, kind="stable")
    groups = np.split(readable[several[order]], np.flatnonzero(np.diff(key[order])) + 1)
    return [group for group in groups if len(group) > 1]


def divided_groups(listing: Listing, parts: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the groups of `data.groups` that lie in several parts, each with its rows.

    Only parts that the source gives can do that; `parts` int [N] is as `split_parts` returns it.
    """
    if not listing.groups:
        return {}
    used = np.flatnonzero(parts >= 0)
    names, key = np.unique(np.array(listing.groups, object)[used].astype(str), return_inverse=True)
    held = np.zeros((len(names), len(PARTS)), bool)
    held[key, parts[used]] = True
    order = np.argsort(key, kind="stable")
    rows = np.split(used[order], np.flatnonzero(np.diff(key[order])) + 1)
    return {str(names[i]): rows[i] for i in np.flatnonzero(held.sum(axis=1) > 1)}


def leaks(listing: Listing, parts: np.ndarray, duplicates: list[np.ndarray]) -> dict[int, str]:
    """Returns the rows that `exclude_leaks` leaves out of training and validation, and why.

    Of images or groups in several parts, those outside the last of them; of images with
    contradictory labels, all outside the test part.
    """
    labels, test = listing.labels, PARTS.index("test")
    found = {}
    for name, rows in divided_groups(listing, parts).items():
        last = parts[rows].max()
        why = f"its group {name} is also in the {PARTS[last]} part"
        found |= {int(row): why for row in rows if parts[row] < last}
    for group in duplicates:
        last, contradict = parts[group].max(), len(set(labels[group])) > 1
        for row in group:
            if parts[row] in (-1, test):
                continue
            if contradict:
                found[int(row)] = "an exact copy carries another label"
            elif parts[row] < last:
                found[int(row)] = f"an exact copy is in the {PARTS[last]} part"
    return found


def split_parts(
    listing: Listing,
    usable: np.ndarray,
    duplicates: list[np.ndarray],
    fractions: tuple[float, ...],
    seed: int,
) -> np.ndarray:
    """Assigns every image to a part: int [N], an index into PARTS, -1 for one that is not used.

    Parts the source gives are kept. The rest is drawn from its training images (or from all),
    stratified by class, so that exact duplicates and images of one group stay together. It depends
    on ids, labels and the seed alone, not on their order.

    Raises:
      UserError: two fractions where the source has no test part.
    """
    missing = missing_parts(listing)
    parts = np.array([PARTS.index(part) if part else 0 for part in listing.parts])
    parts[~usable] = -1
    if "test" in missing and len(fractions) < 3:
        raise UserError(
            f"config.data.split={fractions} names no test fraction, and the source has no test "
            "part: give three fractions, such as (0.7, 0.15, 0.15)"
        )
    drawn = ["train", *(part for part in ("validation", "test") if part in missing)]
    if len(drawn) == 1:
        return parts
    weights = np.array([fractions[PARTS.index(part)] for part in drawn])
    pool = np.flatnonzero(parts == 0)
    pool = pool[np.argsort(np.array(listing.ids, object)[pool])]
    units = _units(pool, duplicates, listing.groups)
    chosen = _stratify(listing.labels[pool], units, weights / weights.sum(), seed)
    parts[pool] = [PARTS.index(drawn[i]) for i in chosen]
    return parts


def assign_folds(
    listing: Listing, usable: np.ndarray, duplicates: list[np.ndarray], folds: int, seed: int
) -> np.ndarray:
    """Returns the fold that tests each image: int [N], -1 for images of a given part and unusable.

    Stratified by class; exact duplicates and images of one group stay together. It depends on ids,
    labels and the seed alone.

    Raises:
      UserError: a class has too few images, or groups of them, for one in every fold.
    """
    pool = np.flatnonzero(usable & np.isin(listing.parts, ("", "train")))
    pool = pool[np.argsort(np.array(listing.ids, object)[pool])]
    labels, units = listing.labels[pool], _units(pool, duplicates, listing.groups)
    chosen = _stratify(labels, units, np.full(folds, 1 / folds), seed, small=np.inf)
    for label in np.unique(labels):
        if len(np.unique(chosen[labels == label])) < folds:
            images, together = (labels == label).sum(), len(np.unique(units[labels == label]))
            groups = f" in {together} groups that stay together" if together < images else ""
            raise UserError(
                f"config.data.folds={folds}: class {listing.class_names[label]!r} has {images} "
                f"images{groups}, too few for some in every fold: use fewer folds, or add images"
            )
    fold_of = np.full(len(listing.ids), -1)
    fold_of[pool] = chosen
    return fold_of


def fold_parts(
    listing: Listing,
    fold_of: np.ndarray,
    usable: np.ndarray,
    duplicates: list[np.ndarray],
    fractions: tuple[float, ...],
    seed: int,
    fold: int,
) -> np.ndarray:
    """Assigns every image to a part in one fold: int [N], an index into PARTS, -1 for not used.

    The images of the fold are the test part; a test part of the source is not used. The validation
    part is the source's, or drawn from the other folds in the proportion of the first two
    fractions, stratified, so that duplicates and groups stay together.
    """
    parts = np.where(fold_of == fold, PARTS.index("test"), np.where(fold_of >= 0, 0, -1))
    given = np.array(listing.parts) == "validation"
    parts[given & usable] = PARTS.index("validation")
    if given.any():
        return parts
    rest = np.flatnonzero(parts == 0)
    rest = rest[np.argsort(np.array(listing.ids, object)[rest])]
    units, weights = _units(rest, duplicates, listing.groups), np.array(fractions[:2])
    parts[rest] = _stratify(listing.labels[rest], units, weights / weights.sum(), [seed, fold])
    return parts


def subset(
    listing: Listing, rows: np.ndarray, duplicates: list[np.ndarray], fraction: float, seed: int
) -> np.ndarray:
    """Returns the training images, of `rows` int [N], that `data.train_fraction` keeps: ascending.

    They are the first of one order of all of them, so that of one seed a smaller fraction is part
    of a larger one. In it the classes take turns in proportion to their images (Webster's method),
    after an image of each class; exact duplicates and images of one group follow each other, and
    all are in or out. It depends on ids, labels and the seed alone.
    """
    pool = rows[np.argsort(np.array(listing.ids, object)[rows])]
    units, labels = _units(pool, duplicates, listing.groups), listing.labels[pool]
    sizes = np.bincount(units)
    order = np.random.default_rng([Purpose.SUBSET, seed]).permutation(len(sizes))
    place = np.argsort(order)[units]  # of each image's unit
    content = coo_array((np.ones(len(pool)), (place, labels))).tocsr()
    kind = pd.Series(sizes[order]).groupby(np.asarray(content.argmax(axis=1)).ravel())
    turn = ((kind.cumsum() - sizes[order] / 2) / kind.transform("sum")).to_numpy(copy=True)
    first = pd.Series(place).groupby(labels).min().unique()  # units that hold each class
    turn[first] = -1
    order = order[np.argsort(turn, kind="stable")]
    count = np.argmin(np.abs(sizes[order].cumsum() - fraction * len(pool))) + 1
    return np.sort(pool[np.isin(units, order[: max(count, len(first))])])


def _units(pool: np.ndarray, duplicates: list[np.ndarray], groups: list[str] | None) -> np.ndarray:
    """Numbers the rows of `pool` so that rows that must stay together share a number."""
    position = {row: i for i, row in enumerate(pool)}
    ties = [[position[row] for row in group if row in position] for group in duplicates]
    if groups:
        by_key: dict[str, list[int]] = {}
        for i, row in enumerate(pool):
            by_key.setdefault(groups[row], []).append(i)
        ties += by_key.values()
    pairs = [(tie[0], other) for tie in ties for other in tie[1:]]
    left, right = np.array(pairs, int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(pairs)), (left, right)), shape=(len(pool), len(pool)))
    return connected_components(graph, directed=False)[1]


def _stratify(
    labels: np.ndarray,
    units: np.ndarray,
    weights: np.ndarray,
    seed: int | list[int],
    small: float = SMALL,
) -> np.ndarray:
    """Gives each unit, the large ones first, to the part that lacks most of its classes."""
    count, num_classes = units.max(initial=-1) + 1, labels.max(initial=-1) + 1
    content = coo_array((np.ones(len(units)), (units, labels)), (count, num_classes)).tocsr()
    order = np.random.default_rng(seed).permutation(count)
    sizes = np.bincount(units, minlength=count)
    order = order[np.argsort(-sizes[order], kind="stable")]
    target = _quotas(np.bincount(labels, minlength=num_classes), weights, small)  # [K, P]
    have = np.zeros_like(target)
    chosen = np.zeros(count, int)
    starts, classes, numbers = content.indptr, content.indices, content.data
    for unit in order:
        here = slice(starts[unit], starts[unit + 1])
        names, n = classes[here], numbers[here]
        lack = n @ ((target[names] - have[names]) / np.maximum(target[names], 1e-9))
        chosen[unit] = np.argmax(lack)
        have[names, chosen[unit]] += n
    return chosen[units]


def _quotas(counts: np.ndarray, weights: np.ndarray, small: float) -> np.ndarray:
    """Returns how many images [K, P] of each class each part should get.

    Classes below `small` images get whole numbers: each part its share rounded down, and what is
    left by the largest remainder, to which the remainders of earlier classes are added, so that
    over all classes the parts get their shares too. The first part, of training images, gets at
    least one.
    """
    quotas = counts[:, None] * weights
    carried = np.zeros(len(weights))
    for label in np.flatnonzero((counts > 0) & (counts < small)):
        share = quotas[label]
        whole = np.floor(share + 1e-9)
        whole[0] = max(whole[0], 1)
        carried += share - whole
        left = round(counts[label] - whole.sum())
        due = np.where(share - whole > 1e-9, np.round(carried, 9), -np.inf)  # not a whole share
        for part in np.argsort(-due, kind="stable")[:left]:
            whole[part] += 1
            carried[part] -= 1
        quotas[label] = whole
    return quotas
