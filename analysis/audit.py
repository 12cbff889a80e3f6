"""Is the data fit to compare models on? Counts, broken files, duplicates, leaks, contradictions.

    python -m analysis.audit DATA_DIR [--json=FILE] [--output=DIR]
    python -m analysis.audit --config=configs/intel.py --config.data.path=...

Exit codes: 0 no leak and no contradictory label, 1 some, 2 a mistake in the command or the folder.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from configs import base
from data.decoding import Decoded, decode_all
from data.sources import Listing, list_source
from errors import UserError
from experiment.command import config_overrides, run_command
from experiment.files import write_json
from experiment.grid import expand
from input_pipeline import PARTS, Dataset, exact_duplicates, load_dataset

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HASH_DISTANCE = 8  # bits of 64 in which near duplicates may differ, and
THUMBNAIL_DISTANCE = 8.0  # root mean square difference of their thumbnails, in grey levels of 255
LEFT_OUT = "left out"  # the part of images that a config excludes: they can leak nowhere
NEAR_LIMIT = 100_000  # images; comparing all pairs of more would take too long


def findings(listing: Listing, decoded: Decoded, parts: list[str]) -> dict:
    """Returns everything the audit knows, as plain values for JSON.

    Args:
      listing: N images.
      decoded: their facts.
      parts: the part of each image; images of one name belong together.

    Returns:
      `counts` by part and class; `unreadable` ids; and groups of ids: `exact_duplicates` (all of
      them), of which `label_conflicts` lie in several classes and `leaks` in several parts, and
      `near_duplicates`. Images left out by a config count as neither leak nor conflict. Further:
      sizes, modes, value ranges, imbalance, files that are no image.
    """
    ids, labels = np.array(listing.ids, object), listing.labels
    readable = np.array([not error for error in decoded.errors])
    facts = decoded.facts[readable]
    groups = exact_duplicates(decoded)
    near = near_duplicates(decoded, groups)

    def named(groups: list[np.ndarray]) -> list[list[str]]:
        return [sorted(ids[group].tolist()) for group in groups]

    def across(groups: list[np.ndarray], values: Sequence) -> list[np.ndarray]:
        used = [[i for i in group if parts[i] != LEFT_OUT] for group in groups]
        return [np.array(group) for group in used if len({values[i] for i in group}) > 1]

    order = [*PARTS, "all", LEFT_OUT]
    counts = {
        part: {name: 0 for name in listing.class_names}
        for part in sorted(set(parts), key=order.index)
    }
    for part, label, fine in zip(parts, labels, readable, strict=True):
        counts[part][listing.class_names[label]] += int(fine)
    sizes = Counter(f"{fact['width']}x{fact['height']}" for fact in facts)
    modes = Counter(mode for mode, fine in zip(decoded.modes, readable, strict=True) if fine)
    constant = decoded.facts["low"] == decoded.facts["high"]
    return {
        "images": len(ids),
        "class_names": listing.class_names,
        "counts": counts,
        "imbalance": {part: _imbalance(by_class) for part, by_class in counts.items()},
        "sizes": dict(sizes.most_common(20)),
        "distinct_sizes": len(sizes),
        "modes": dict(modes.most_common()),
        "value_range": [int(facts["low"].min(initial=255)), int(facts["high"].max(initial=0))],
        "constant": ids[constant & readable].tolist(),
        "unreadable": ids[~readable].tolist(),
        "reasons": {ids[i]: decoded.errors[i] for i in np.flatnonzero(~readable)},
        "not_images": listing.strays,
        "exact_duplicates": named(groups),
        "label_conflicts": named(across(groups, labels)),
        "leaks": named(across(groups, parts)),
        "near_duplicates": named(near),
        "near_leaks": named(across(near, parts)),
        "near_duplicates_checked": len(ids) <= NEAR_LIMIT,
    }


def _imbalance(by_class: dict[str, int]) -> float | None:
    """Returns the largest class count divided by the smallest."""
    low = min(by_class.values())
    return max(by_class.values()) / low if low else None


def near_duplicates(decoded: Decoded, exact: list[np.ndarray]) -> list[np.ndarray]:
    """Returns groups of rows that look alike but are not the same pixels.

    Two images are alike if their perceptual hashes and their thumbnails both are; exact copies are
    represented by the first of them.
    """
    copies = {row for group in exact for row in group[1:]}
    rows = np.array([i for i, e in enumerate(decoded.errors) if not e and i not in copies], int)
    if not 2 <= len(rows) <= NEAR_LIMIT:
        return []
    bits = np.unpackbits(decoded.facts["hash"][rows, None].view(np.uint8), axis=1)  # [n, 64]
    signs = bits.astype(np.float32) * 2 - 1
    thumbnails = decoded.facts["thumbnail"][rows].astype(np.float32).reshape(len(rows), -1)
    pairs = []
    for start in range(0, len(rows), 2048):
        distance = (64 - signs[start : start + 2048] @ signs[start:].T) / 2
        left, right = np.nonzero(distance <= HASH_DISTANCE)
        left, right = (left + start)[right > left], (right + start)[right > left]
        difference = np.sqrt(((thumbnails[left] - thumbnails[right]) ** 2).mean(axis=1))
        alike = difference <= THUMBNAIL_DISTANCE
        pairs.append(np.stack([left[alike], right[alike]]))
    left, right = np.concatenate(pairs, axis=1)
    graph = coo_array((np.ones(len(left)), (left, right)), shape=(len(rows), len(rows)))
    _, group = connected_components(graph, directed=False)
    members = np.argsort(group, kind="stable")
    groups = np.split(rows[members], np.flatnonzero(np.diff(group[members])) + 1)
    return [np.sort(g) for g in groups if len(g) > 1]


def describe(found: dict) -> str:
    """Returns the findings as a few lines of text."""
    lines = [f"data audit: {found['images']} images, {len(found['class_names'])} classes"]
    for part, by_class in found["counts"].items():
        if part == LEFT_OUT:
            lines.append(f"  {part}: {sum(by_class.values())}")
            continue
        ratio = found["imbalance"][part]
        ratio = "a class is empty" if ratio is None else f"largest/smallest class {ratio:.2f}"
        numbers = ", ".join(f"{name} {n}" for name, n in list(by_class.items())[:12])
        more = ", ..." if len(by_class) > 12 else ""
        lines.append(f"  {part}: {sum(by_class.values())} ({numbers}{more}; {ratio})")
    sizes = ", ".join(f"{size} ({n})" for size, n in list(found["sizes"].items())[:3])
    modes = ", ".join(f"{mode} ({n})" for mode, n in found["modes"].items())
    low, high = found["value_range"]
    lines.append(
        f"  {found['distinct_sizes']} size(s): {sizes}; modes: {modes}; values {low} to {high}"
    )
    for key, what in (
        ("unreadable", "unreadable files"),
        ("not_images", "files that are no image"),
        ("constant", "images of a single colour"),
        ("exact_duplicates", "groups of exact duplicates"),
        ("label_conflicts", "of them with contradictory labels"),
        ("leaks", "of them across parts (leaks)"),
        ("near_duplicates", "groups of near duplicates"),
        ("near_leaks", "of them across parts"),
    ):
        if found[key]:
            first = found[key][0]
            first = first if isinstance(first, str) else " = ".join(first[:3])
            first += f": {found['reasons'][first]}" if key == "unreadable" else ""
            lines.append(f"  {len(found[key])} {what}, such as {first}")
    if not found["near_duplicates_checked"]:
        lines.append(f"  near duplicates were not looked for: more than {NEAR_LIMIT:,} images")
    if found["leaks"] or found["label_conflicts"]:
        lines.append(
            "  warning: leaks and contradictory labels make accuracies wrong; leave the culprits "
            "out of training with --config.data.exclude_leaks"
        )
    return "\n".join(lines)


def contact_sheet(listing: Listing, decoded: Decoded, path: Path, columns: int = 10) -> None:
    """Draws a row of samples a class, chosen evenly over its files; up to 20 classes."""
    readable = np.array([not error for error in decoded.errors])
    names = listing.class_names[:20]
    figure, axes = plt.subplots(
        len(names), columns, figsize=(columns, len(names) * 1.05), squeeze=False
    )
    for label, name in enumerate(names):
        rows = np.flatnonzero((listing.labels == label) & readable)
        rows = (
            rows[np.linspace(0, len(rows) - 1, min(columns, len(rows))).astype(int)]
            if len(rows)
            else []
        )
        for axis in axes[label]:
            axis.axis("off")
        for axis, row in zip(axes[label], rows, strict=False):
            axis.imshow(decoded.images[row])
        axes[label, 0].set_title(name, loc="left", fontsize=9, pad=2, parse_math=False)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def write_audit(dataset: Dataset, output: Path) -> dict:
    """Audits a split dataset into `audit.json` and `contact_sheet.png`; returns the findings."""
    parts = np.full(len(dataset.listing.ids), LEFT_OUT, object)
    for part in PARTS:
        parts[dataset.rows[part]] = part
    return _write(dataset.listing, dataset.decoded, parts.tolist(), output)


def _write(listing: Listing, decoded: Decoded, parts: list[str], output: Path) -> dict:
    found = findings(listing, decoded, parts)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "audit.json", found)
    contact_sheet(listing, decoded, output / "contact_sheet.png")
    return found


def main(argv: list[str]) -> int:
    """Audits a folder, or the data of a config; returns the exit code."""
    config = CONFIG.value
    if (len(argv) == 2) == (config is not None):
        raise UserError("usage: python -m analysis.audit DATA_DIR | --config=configs/...")
    if config is None:
        config = base.get_config()
        config.data.path, config.data.image_size = argv[1], 128
        listing = list_source(config.data)
        decoded = decode_all(listing, config.data, config.runtime.cache_dir)
        parts = [part or "all" for part in listing.parts]
        name = Path(argv[1]).resolve().name
        found = _write(listing, decoded, parts, Path(OUTPUT.value or f"runs/audit/{name}"))
    else:
        settings: ConfigDict = expand(config, config_overrides(CONFIG))[0].config
        settings.data.unreadable = "skip"
        name = Path(settings.data.path or settings.data.source).name
        dataset = load_dataset(settings.data, settings.runtime.cache_dir)
        found = write_audit(dataset, Path(OUTPUT.value or f"runs/audit/{name}"))
    print(describe(found))
    print(f"contact sheet: {OUTPUT.value or f'runs/audit/{name}'}/contact_sheet.png")
    if JSON.value:
        try:
            write_json(Path(JSON.value), found)
        except OSError as error:
            raise UserError(f"cannot write --json={JSON.value}: {error.strerror}") from error
    return 1 if found["leaks"] or found["label_conflicts"] else 0


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", None, "Audit the data of this experiment")
    JSON = flags.DEFINE_string("json", None, "Also write the findings to this file")
    OUTPUT = flags.DEFINE_string("output", None, "Folder of audit.json and contact_sheet.png")
    run_command(main)
