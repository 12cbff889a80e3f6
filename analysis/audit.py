"""Is the data fit to compare models on? Counts, broken files, duplicates, leaks, contradictions.

    python -m analysis.audit DATA_DIR [--json=FILE] [--output=DIR]
    python -m analysis.audit --config=configs/intel.py --config.data.path=...

Exit codes: 0 no leak and no contradictory label, 1 some, 2 a mistake in the command or the folder.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
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
from data.splits import divided_groups
from errors import UserError
from experiment.command import arguments, config_overrides, output_folder, run_command
from experiment.files import write_json
from experiment.grid import expand
from input_pipeline import PARTS, Dataset, exact_duplicates, load_dataset

HASH_DISTANCE = 8  # bits of 64 in which near duplicates may differ, and
THUMBNAIL_DISTANCE = 8.0  # root mean square difference of their thumbnails, in grey levels of 255
LEFT_OUT = "left out"  # the part of images that a config excludes: they can leak nowhere
BLOCK, CHUNK = 256, 100_000  # images and pairs compared at once, which bounds the memory
NEAR_LIMIT = 100_000  # images; comparing all pairs of more would take too long


def audit_images(listing: Listing, decoded: Decoded, parts: list[str]) -> dict:
    """Returns the findings on N images and their parts, as plain values for JSON.

    Duplicates are groups of ids: `label_conflicts` and `leaks` are those `exact_duplicates` that
    lie in several classes or parts; `group_leaks` are the groups of `data.groups` that do. Images
    left out by a config count as neither.
    """
    ids, labels = np.array(listing.ids, object), listing.labels
    part_of, readable = np.array(parts, object), np.array(decoded.errors) == ""
    width, height, low, high = (
        decoded.facts[name][readable] for name in ("width", "height", "low", "high")
    )
    exact = exact_duplicates(decoded)
    near = near_duplicates(decoded, exact)

    def named(groups: list[np.ndarray]) -> list[list[str]]:
        return [sorted(ids[group].tolist()) for group in groups]

    def across(groups: list[np.ndarray], values: Sequence) -> list[list[str]]:
        used = [group[part_of[group] != LEFT_OUT] for group in groups]
        return named([group for group in used if len({values[i] for i in group}) > 1])

    places = np.array([PARTS.index(part) if part in PARTS else -1 for part in parts])
    divided = divided_groups(listing, places)
    counts, imbalance = {}, {}
    folds = sorted(set(parts) - {*PARTS, "all", LEFT_OUT}, key=lambda part: (len(part), part))
    for part in [part for part in (*PARTS, *folds, "all", LEFT_OUT) if part in parts]:
        inside = labels[readable & (part_of == part)]
        numbers = np.bincount(inside, minlength=len(listing.class_names)).tolist()
        counts[part] = dict(zip(listing.class_names, numbers, strict=True))
        imbalance[part] = max(numbers) / min(numbers) if min(numbers) else None
    sizes = Counter(zip(width.tolist(), height.tolist(), strict=True))
    modes = Counter(decoded.modes[i] for i in np.flatnonzero(readable))
    constant = decoded.facts["low"] == decoded.facts["high"]
    return {
        "images": len(ids),
        "class_names": listing.class_names,
        "counts": counts,
        "imbalance": imbalance,
        "sizes": {f"{width}x{height}": n for (width, height), n in sizes.most_common(20)},
        "distinct_sizes": len(sizes),
        "modes": dict(modes.most_common()),
        "value_range": [int(low.min(initial=255)), int(high.max(initial=0))],
        "constant": ids[constant & readable].tolist(),
        "unreadable": ids[~readable].tolist(),
        "reasons": {ids[i]: decoded.errors[i] for i in np.flatnonzero(~readable)},
        "not_images": listing.strays,
        "left_out": listing.left_out,
        "notes": listing.notes,
        "exact_duplicates": named(exact),
        "label_conflicts": across(exact, labels),
        "leaks": across(exact, parts),
        "group_leaks": {name: ids[rows].tolist() for name, rows in divided.items()},
        "near_duplicates": named(near),
        "near_leaks": across(near, parts),
        "near_duplicates_checked": len(ids) <= NEAR_LIMIT,
    }


def near_duplicates(decoded: Decoded, exact: list[np.ndarray]) -> list[np.ndarray]:
    """Returns groups of rows whose hashes and thumbnails are alike; of exact copies, the first."""
    copies = [row for group in exact for row in group[1:]]
    rows = np.setdiff1d(np.flatnonzero(np.array(decoded.errors) == ""), copies)
    if not 2 <= len(rows) <= NEAR_LIMIT:
        return []
    bits = np.unpackbits(decoded.facts["hash"][rows, None].view(np.uint8), axis=1)  # [n, 64]
    signs = bits.astype(np.float32) * 2 - 1
    thumbnails = decoded.facts["thumbnail"][rows].astype(np.float32).reshape(len(rows), -1)
    group = np.arange(len(rows))
    for start in range(0, len(rows), BLOCK):
        distance = (64 - signs[start : start + BLOCK] @ signs[start:].T) / 2
        left, right = (start + one for one in np.nonzero(distance <= HASH_DISTANCE))
        for some in np.array_split(np.flatnonzero(right > left), 1 + len(left) // CHUNK):
            some = some[group[left[some]] != group[right[some]]]  # not yet known to be alike
            pair = left[some], right[some]
            difference = np.sqrt(((thumbnails[pair[0]] - thumbnails[pair[1]]) ** 2).mean(axis=1))
            alike = difference <= THUMBNAIL_DISTANCE
            if alike.any():  # unite the groups of both
                edges = group[pair[0][alike]], group[pair[1][alike]]
                graph = coo_array((np.ones(len(edges[0])), edges), shape=(len(rows), len(rows)))
                group = connected_components(graph, directed=False)[1][group]
    return [x.to_numpy() for _, x in pd.Series(rows).groupby(group) if len(x) > 1]


def is_unfit(findings: dict) -> bool:
    """Returns whether leaks or contradictory labels make accuracies wrong."""
    return any(findings.get(key) for key in ("leaks", "group_leaks", "label_conflicts"))


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
        for first in findings[key][:1]:
            first = first if isinstance(first, str) else " = ".join(first[:3])
            first += f": {findings['reasons'][first]}" if key == "unreadable" else ""
            lines.append(f"  {len(findings[key])} {what}, such as {first}")
    divided = findings.get("group_leaks", {})  # older files lack these three
    for name, members in list(divided.items())[:1]:
        lines.append(
            f"  {len(divided)} groups of data.groups across parts (leaks), such as "
            f"{name}: {', '.join(members[:3])}"
        )
    for reason, names in findings.get("left_out", {}).items():
        lines.append(f"  {len(names)} images left out ({reason}), such as {names[0]}")
    lines += [f"  note: {note}" for note in findings.get("notes", [])]
    if not findings["near_duplicates_checked"]:
        lines.append(f"  near duplicates were not looked for: more than {NEAR_LIMIT:,} images")
    if is_unfit(findings):
        lines.append(
            "  warning: leaks and contradictory labels make accuracies wrong; leave these images "
            "out of training with --config.data.exclude_leaks"
        )
    return "\n".join(lines)


def contact_sheet(listing: Listing, decoded: Decoded, path: Path) -> None:
    """Draws a row of samples a class, chosen evenly over its files; up to 20 classes."""
    readable = np.array(decoded.errors) == ""
    names, columns = listing.class_names[:20], 10
    figure, axes = small_multiples(len(names), 1, (columns, 1.2))
    for label, name in enumerate(names):
        rows, axis = np.flatnonzero((listing.labels == label) & readable), axes[label]
        chosen = decoded.images[rows[evenly_spaced(len(rows), columns)]]
        frame = ((0, columns - len(chosen)), (1, 1), (1, 1), (0, 0))
        framed = np.pad(chosen, frame, constant_values=255)
        axis.imshow(np.concatenate(framed, axis=1))  # one picture a class: axes are slow to draw
        axis.axis("off")
        axis.set_title(literal(name), loc="left", fontsize=9, pad=2)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def write_audit(dataset: Dataset, output: Path) -> dict:
    """Audits a split dataset into `audit.json` and `contact_sheet.png`; returns the findings.

    Under cross-validation the folds are its parts, so one audit is of them all.
    """
    parts = np.full(len(dataset.listing.ids), LEFT_OUT, object)
    for part in PARTS:
        parts[dataset.rows[part]] = part
    if dataset.fold_of is not None:
        parts = [f"fold {f}" if f >= 0 else p for f, p in zip(dataset.fold_of, parts, strict=True)]
        parts = np.array(parts, object)
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
    if config is not None:
        config = expand(config, config_overrides(CONFIG))[0].config
        config.data.unreadable = "skip"
        name = Path(config.data.path or config.data.source).name
    else:
        config = base.get_config()
        config.data.path, config.data.image_size = given[0], 128
        name = Path(given[0]).resolve().name
    data, cache_dir = config.data, config.runtime.cache_dir
    output = Path(OUTPUT.value or f"runs/audit/{name}")
    if given:
        listing = list_source(data)
        parts = [part or "all" for part in listing.parts]
        findings = _write(listing, decode_all(listing, data, cache_dir), parts, output)
    else:
        findings = write_audit(
            load_dataset(data, cache_dir, config.runtime.resident_limit_mb), output
        )
    print(f"{describe(findings)}\ncontact sheet: {output}/contact_sheet.png")
    if JSON.value:
        try:
            write_json(Path(JSON.value), findings)
        except OSError as error:
            raise UserError(f"cannot write --json={JSON.value}: {error.strerror}") from error
    return int(is_unfit(findings))


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", None, "Audit the data of this experiment")
    JSON = flags.DEFINE_string("json", None, "Also write the findings to this file")
    OUTPUT = flags.DEFINE_string("output", None, "Folder of audit.json and contact_sheet.png")
    run_command(main)
