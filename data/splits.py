"""Which image belongs to which part, and which copies tie images together."""

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from data.decoding import Decoded
from data.sources import PARTS, Listing
from errors import UserError


def missing_parts(listing: Listing) -> list[str]:
    """Returns the parts that the source does not give."""
    return [part for part in PARTS if part not in listing.parts]


def exact_duplicates(decoded: Decoded) -> list[np.ndarray]:
    """Returns groups of rows, two or more each, whose decoded pixels are the same."""
    readable = np.flatnonzero([not error for error in decoded.errors])
    _, key = np.unique(decoded.facts["pixels"][readable].view("S32"), return_inverse=True)
    order = np.argsort(key, kind="stable")
    groups = np.split(readable[order], np.flatnonzero(np.diff(key[order])) + 1)
    return [group for group in groups if len(group) > 1]


def leaks(labels: np.ndarray, parts: np.ndarray, groups: list[np.ndarray]) -> dict[int, str]:
    """Returns the rows that `exclude_leaks` leaves out of training and validation, and why.

    Of images in several parts, the copies outside the last of them; of images with contradictory
    labels, all outside the test part.
    """
    test = PARTS.index("test")
    found = {}
    for group in groups:
        for row in group:
            if parts[row] in (-1, test):
                continue
            if len(set(labels[group])) > 1:
                found[int(row)] = "an exact copy carries another label"
            elif parts[row] < parts[group].max():
                found[int(row)] = f"an exact copy is in the {PARTS[parts[group].max()]} part"
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


def _stratify(labels: np.ndarray, units: np.ndarray, weights: np.ndarray, seed: int) -> np.ndarray:
    """Gives each unit, the large ones first, to the part that lacks most of its classes."""
    count, num_classes = units.max(initial=-1) + 1, labels.max(initial=-1) + 1
    content = np.zeros((count, num_classes), int)
    np.add.at(content, (units, labels), 1)
    order = np.random.default_rng(seed).permutation(count)
    order = order[np.argsort(-content.sum(axis=1)[order], kind="stable")]
    target = content.sum(axis=0)[:, None] * weights  # [K, P]
    have = np.zeros_like(target)
    chosen = np.zeros(count, int)
    for unit in order:
        lack = content[unit] @ ((target - have) / np.maximum(target, 1e-9))
        chosen[unit] = np.argmax(lack)
        have[:, chosen[unit]] += content[unit]
    return chosen[units]
