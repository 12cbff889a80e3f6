"""Is the data fit to compare models on? Counts, broken files, duplicates, leaks, contradictions.

    python -m analysis.audit DATA_DIR [--json=FILE] [--output=DIR]
    python -m analysis.audit --config=configs/intel.py --config.data.path=...

Exit codes: 0 no leak and no contradictory label, 1 some, 2 a mistake in the command or the folder.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags
from matplotlib import pyplot as plt
from ml_collections import config_flags
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from analysis.page.figures import literal, small_multiples
from analysis.runs import evenly_spaced
from configs import base
from data.decoding import Decoded, decode_all
from data.sources import Listing, list_source
from errors import UserError
from experiment.command import arguments, config_overrides, output_folder, run_command
from experiment.files import write_json
from experiment.grid import expand
from input_pipeline import PARTS, Dataset, exact_duplicates, load_dataset

HASH_DISTANCE = 8  # bits of 64 in which near duplicates may differ, and
THUMBNAIL_DISTANCE = 8.0  # root mean square difference of their thumbnails, in grey levels of 255
LEFT_OUT = "left out"  # the part of images that a config excludes: they can leak nowhere
NEAR_LIMIT = 100_000  # images; comparing all pairs of more would take too long


def audit_images(listing: Listing, decoded: Decoded, parts: list[str]) -> dict:
    """Returns everything the audit knows, as plain values for JSON.

    These are numbers of images by part and class, sizes, modes, value range and imbalance; files
    that are unreadable or no image; and groups of ids: `exact_duplicates` (all of them), of which
    `label_conflicts` lie in several classes and `leaks` in several parts, and `near_duplicates`.
    Images left out by a config count as neither leak nor conflict.

    Args:
      listing: N images.
      decoded: their facts.
      parts: the part of each image.
    """
    ids, labels = np.array(listing.ids, object), listing.labels
    readable = np.array([not error for error in decoded.errors])
    facts = decoded.facts[readable]
    exact = exact_duplicates(decoded)
    near = near_duplicates(decoded, exact)

    def named(groups: list[np.ndarray]) -> list[list[str]]:
        return [sorted(ids[group].tolist()) for group in groups]

    def across(groups: list[np.ndarray], values: Sequence) -> list[np.ndarray]:
        used = [np.array([i for i in group if parts[i] != LEFT_OUT]) for group in groups]
        return [group for group in used if len({values[i] for i in group}) > 1]

    order = [part for part in (*PARTS, "all", LEFT_OUT) if part in parts]
    counts = {part: dict.fromkeys(listing.class_names, 0) for part in order}
    for i in np.flatnonzero(readable):
        counts[parts[i]][listing.class_names[labels[i]]] += 1
    sizes = Counter(f"{fact['width']}x{fact['height']}" for fact in facts)
    modes = Counter(decoded.modes[i] for i in np.flatnonzero(readable))
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
        "exact_duplicates": named(exact),
        "label_conflicts": named(across(exact, labels)),
        "leaks": named(across(exact, parts)),
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
    return [np.sort(rows) for rows in groups if len(rows) > 1]


def describe(findings: dict) -> str:
    """Returns what `audit_images` found as a few lines of text."""
    classes = len(findings["class_names"])
    lines = [f"data audit: {findings['images']} images, {classes} classes"]
    for part, by_class in findings["counts"].items():
        line = f"  {part}: {sum(by_class.values())}"
        if part != LEFT_OUT:
            ratio = findings["imbalance"][part]
            ratio = f"largest/smallest class {ratio:.2f}" if ratio else "a class is empty"
            numbers = ", ".join(f"{name} {n}" for name, n in list(by_class.items())[:12])
            line += f" ({numbers}{', ...' if classes > 12 else ''}; {ratio})"
        lines.append(line)
    sizes = ", ".join(f"{size} ({n})" for size, n in list(findings["sizes"].items())[:3])
    modes = ", ".join(f"{mode} ({n})" for mode, n in findings["modes"].items())
    low, high = findings["value_range"]
    lines.append(
        f"  {findings['distinct_sizes']} size(s): {sizes}; modes: {modes}; values {low} to {high}"
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
        if findings[key]:
            first = findings[key][0]
            first = first if isinstance(first, str) else " = ".join(first[:3])
            first += f": {findings['reasons'][first]}" if key == "unreadable" else ""
            lines.append(f"  {len(findings[key])} {what}, such as {first}")
    if not findings["near_duplicates_checked"]:
        lines.append(f"  near duplicates were not looked for: more than {NEAR_LIMIT:,} images")
    if findings["leaks"] or findings["label_conflicts"]:
        lines.append(
            "  warning: leaks and contradictory labels make accuracies wrong; leave these images "
            "out of training with --config.data.exclude_leaks"
        )
    return "\n".join(lines)


def contact_sheet(listing: Listing, decoded: Decoded, path: Path, columns: int = 10) -> None:
    """Draws a row of samples a class, chosen evenly over its files; up to 20 classes."""
    readable = np.array([not error for error in decoded.errors])
    names = listing.class_names[:20]
    figure, axes = small_multiples(len(names) * columns, columns, (1, 1.05))
    for axis in axes:
        axis.axis("off")
    for label, name in enumerate(names):
        row = axes[label * columns :]
        rows = np.flatnonzero((listing.labels == label) & readable)
        for axis, place in zip(row, evenly_spaced(len(rows), columns), strict=False):
            axis.imshow(decoded.images[rows[place]])
        row[0].set_title(literal(name), loc="left", fontsize=9, pad=2)
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
    findings, folder = audit_images(listing, decoded, parts), output_folder(output)
    write_json(folder / "audit.json", findings)
    contact_sheet(listing, decoded, folder / "contact_sheet.png")
    return findings


def main(argv: list[str]) -> int:
    """Audits a folder, or the data of a config; returns the exit code."""
    config, usage = CONFIG.value, "analysis.audit DATA_DIR | --config=configs/..."
    given = arguments(argv, usage, least=config is None, most=config is None)
    if config is None:
        config = base.get_config()
        config.data.path, config.data.image_size = given[0], 128
        output = OUTPUT.value or f"runs/audit/{Path(given[0]).resolve().name}"
        listing = list_source(config.data)
        decoded = decode_all(listing, config.data, config.runtime.cache_dir)
        parts = [part or "all" for part in listing.parts]
        findings = _write(listing, decoded, parts, Path(output))
    else:
        config = expand(config, config_overrides(CONFIG))[0].config
        config.data.unreadable = "skip"
        output = OUTPUT.value or f"runs/audit/{Path(config.data.path or config.data.source).name}"
        findings = write_audit(load_dataset(config.data, config.runtime.cache_dir), Path(output))
    print(f"{describe(findings)}\ncontact sheet: {output}/contact_sheet.png")
    if JSON.value:
        try:
            write_json(Path(JSON.value), findings)
        except OSError as error:
            raise UserError(f"cannot write --json={JSON.value}: {error.strerror}") from error
    return 1 if findings["leaks"] or findings["label_conflicts"] else 0


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", None, "Audit the data of this experiment")
    JSON = flags.DEFINE_string("json", None, "Also write the findings to this file")
    OUTPUT = flags.DEFINE_string("output", None, "Folder of audit.json and contact_sheet.png")
    run_command(main)
