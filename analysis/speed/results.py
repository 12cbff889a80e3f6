"""The rows of a benchmark, the ratios to the best peer, and the files that hold them."""

import csv
import math
import statistics
from pathlib import Path

from analysis.speed.turns import Timing
from analysis.speed.worker import Spec
from experiment.files import write_json

# Dense peak in FLOP/s as published: {device: (bfloat16, float32)}. Of float32 as JAX multiplies it
# by default: NVIDIA in TF32, a TPU in bfloat16. The first name that fits counts.
PEAKS = {
    "H200": (989.4e12, 494.7e12),
    "H100 PCIe": (756e12, 378e12),
    "H100": (989.4e12, 494.7e12),
    "A100": (312e12, 156e12),
    "TPU v6": (918e12, 918e12),
    "TPU v5p": (459e12, 459e12),
    "TPU v5 lite": (197e12, 197e12),
    "TPU v5e": (197e12, 197e12),
    "TPU v5": (459e12, 459e12),
    "TPU v4": (275e12, 275e12),
    "TPU v3": (123e12, 123e12),
}
NONE = "–"
PART = " ms per step"  # ends the names of columns of parts of an epoch


def peak_of(device: str, dtype: str) -> float | None:
    """Returns the FLOP/s that a device could do at most, None where that is not known."""
    known = (peaks for name, peaks in PEAKS.items() if name.lower() in device.lower())
    peaks = next(known, None)
    return peaks and peaks[dtype == "float32"]


def rows_of(spec: Spec, timings: dict[str, Timing]) -> list[dict]:
    """Returns a row for each side of one network and mode, one of which knows the network."""
    about = next((t.ready for t in timings.values() if "device" in t.ready), {})
    work = about.get("multiply_adds_per_image")
    # Both gradients of a product cost as much as the product itself.
    work = work and work * spec.batch_size * (1 if spec.mode == "infer" else 3)
    peak, rows = peak_of(about.get("device", ""), spec.dtype), []
    for side, timing in timings.items():
        row = {
            "mode": spec.mode,
            "model": spec.model,
            "side": side,
            "image_size": spec.image_size,
            "batch_size": spec.batch_size,
            "dtype": spec.dtype,
            "device": about.get("device"),
            "multiply_adds_per_step": work,
            "error": timing.error,
        }
        if not timing.error:
            low, middle, high = timing.milliseconds()
            row |= {
                "images_per_second": 1000 * spec.batch_size / middle,
                "milliseconds_per_step": middle,
                "milliseconds_quartiles": [low, high],
                "first_step_seconds": timing.ready["compile_seconds"],
                "peak_memory_bytes": timing.memory,
                "share_of_peak": 2000 * work / middle / peak if work and peak else None,
                "steps_per_repeat": timing.steps,
                "seconds_of_repeats": timing.seconds,
            }
            for part in dict.fromkeys(part for each in timing.parts for part in each):
                each = [1000 * one.get(part, 0.0) / timing.steps for one in timing.parts]
                row[part + PART] = statistics.median(each)
        rows.append(row)
    return rows


def ratios_of(rows: list[dict]) -> list[dict]:
    """Returns the speed of ours / that of the best peer, wherever both were timed."""
    ratios = []
    for mode, model in dict.fromkeys((row["mode"], row["model"]) for row in rows):
        speeds = {
            row["side"]: row.get("images_per_second") or 1 / row["seconds"]
            for row in rows
            if (row["mode"], row["model"]) == (mode, model) and not row["error"]
        }
        peers = {side: speed for side, speed in speeds.items() if not side.startswith("ours")}
        if peers and "ours" in speeds:
            best = max(peers, key=peers.get)
            ratio = speeds["ours"] / peers[best]
            ratios.append({"mode": mode, "model": model, "best_peer": best, "ratio": ratio})
    return ratios


def summary_of(ratios: list[dict]) -> list[dict]:
    """Returns the geometric mean and the least of the ratios of each mode."""
    summary = []
    for mode in dict.fromkeys(ratio["mode"] for ratio in ratios):
        values = {r["model"]: r["ratio"] for r in ratios if r["mode"] == mode}
        least = min(values, key=values.get)
        mean = math.exp(sum(map(math.log, values.values())) / len(values))
        summary.append(
            {
                "mode": mode,
                "networks": len(values),
                "geometric_mean": mean,
                "least": values[least],
                "least_model": least,
            }
        )
    return summary


def write_files(folder: Path, content: dict) -> None:
    """Writes benchmark.json, and its rows as benchmark.csv."""
    write_json(folder / "benchmark.json", content)
    rows = content["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(folder / "benchmark.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in rows:
            flat = {
                key: " ".join(map(str, v)) if isinstance(v, list) else v for key, v in row.items()
            }
            writer.writerow(flat)


def table_of(rows: list[dict]) -> str:
    """Returns the rows as a reader sees them."""
    head = ["mode", "network", "batch", "side", "images/s", "ms a step", "quartiles"]
    head += ["first step s", "peak MB", "GMAC a step", "of peak", "ratio"]
    ratios = {(r["mode"], r["model"]): r["ratio"] for r in ratios_of(rows)}
    lines = [head]
    for row in (row for row in rows if "batch_size" in row):
        start = [row["mode"], row["model"], str(row["batch_size"]), row["side"]]
        if row["error"]:
            lines.append([*start, NONE, NONE, NONE, NONE, NONE, NONE, NONE, NONE])
            continue
        low, high = row["milliseconds_quartiles"]
        work, share = row["multiply_adds_per_step"], row["share_of_peak"]
        ratio = ratios.get((row["mode"], row["model"])) if row["side"] == "ours" else None
        lines.append(
            [
                *start,
                f"{row['images_per_second']:.4g}",
                f"{row['milliseconds_per_step']:.4g}",
                f"{low:.4g} to {high:.4g}",
                f"{row['first_step_seconds']:.1f}",
                f"{row['peak_memory_bytes'] / 1e6:.0f}",
                f"{work / 1e9:.3g}" if work else NONE,
                f"{share:.1%}" if share else NONE,
                f"{ratio:.2f}" if ratio else NONE,
            ]
        )
    return aligned(lines) if lines[1:] else ""


def durations_of(rows: list[dict]) -> str:
    """Returns the rows of whole commands as a reader sees them."""
    lines = [["mode", "what", "side", "seconds", "quartiles", "repeats", "until all runs"]]
    for row in rows:
        if "seconds" in row:
            low, high = row["seconds_quartiles"]
            runs = f"{row['runs_seconds']:.1f}" if "runs_seconds" in row else NONE
            lines.append(
                [
                    *(row["mode"], row["model"], row["side"], f"{row['seconds']:.1f}"),
                    *(f"{low:.1f} to {high:.1f}", str(len(row["seconds_of_repeats"])), runs),
                ]
            )
    return aligned(lines) if lines[1:] else ""


def aligned(lines: list[list[str]]) -> str:
    """Returns lines of cells as columns of text."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
