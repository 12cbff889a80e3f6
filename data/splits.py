"""Which image belongs to which part, and which copies tie images together."""

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from data.decoding import Decoded
from data.folders import PARTS
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
    content = coo_array((np.ones(len(units)), (units, labels)), (count, num_classes)).tocsr()
    order = np.random.default_rng(seed).permutation(count)
    sizes = np.bincount(units, minlength=count)
    order = order[np.argsort(-sizes[order], kind="stable")]
    target = _quotas(np.bincount(labels, minlength=num_classes), weights)  # [K, P]
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


def _quotas(counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns how many images [K, P] of each class each part should get.

    Classes below SMALL get whole numbers: each part its share rounded down, and what is left by the
    largest remainder, to which the remainders of earlier classes are added, so that over all
    classes the parts get their shares too. The first part, of training images, gets at least one.
    """
    quotas = counts[:, None] * weights
    carried = np.zeros(len(weights))
    for label in np.flatnonzero((counts > 0) & (counts < SMALL)):
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
