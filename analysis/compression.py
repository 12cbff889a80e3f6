"""What did making a model smaller cost? Size, accuracy and speed of compressed models.

The chapter of WORKDIR/deploy/compression.csv, which `python -m deploy.compress` writes.
"""

import hashlib
import math
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from analysis.compare import Comparison
from analysis.latency import busy
from analysis.page.section import Details, Section, as_table
from analysis.page.tables import NONE, decimal, intervals, p_value, percent, points
from analysis.runs import FinishedRun
from analysis.uncertainty import Family
from analysis.verdict import listed
from errors import UserError
from training.weights import find_weights

FILE = Path("deploy/compression.csv")  # in a workdir
BATCHES, THREADS = (1, 32), (1, 0)  # at which speed is measured; 0 threads are all cores
SIDES = ("before", "after")
TEXTS = ("run", "method", "weights", "cpu", "onnxruntime", "date")  # columns
SMALLER = 1.05  # times: a file that is closer to the old one is not called smaller
WHAT = {
    "int8": "weights, by channel, and activations, by ranges of calibration images, are 8-bit "
    "integers; so is the arithmetic",
    "int8_dynamic": "weights are 8-bit integers, and activations become such at each call, by the "
    "range of the batch: an answer may depend on the images beside it",
    "float16": "weights are stored in 16 bits, with a fraction of 10, and become float32 when the "
    "file is opened: a smaller file, but the same arithmetic, memory and speed",
    "bfloat16": "weights are stored in 16 bits, with a fraction of 7 and the range of float32, and "
    "become float32 when the file is opened: a smaller file, but the same arithmetic, memory and "
    "speed",
}
CAPTION = (
    "Before → after, on the test images; points: the difference of the accuracies; changed: other "
    "predictions; ms: one image, one thread."
)
QUARTILES = "Before → after: median, and in brackets quartiles."
HOW = (
    "Before: the float32 ONNX model of the run, in ONNX Runtime; after: the compressed one, there "
    "as well. Both answer the whole test part; MB are 1,000,000 bytes.",
    "The difference is paired: the same images, one training. Its interval is over other test "
    "images, with two made-up images that differ in opposite ways (Bonett and Price 2012), and for "
    "each row alone. p is McNemar's exact test of the images that one of the two gets right, left "
    "out for images in groups, which it would take as independent. A difference that is not "
    "established may still be there: the interval says how large.",
    "Temperature, review thresholds and sets of classes of a compressed model are fitted anew, to "
    "its own answers to the validation images.",
    "Times are those of whole answers, from pixels to logits and features, of {cpu} with ONNX "
    "Runtime {versions} ({dates}): before and after take turns; median, and in brackets quartiles.",
)


def weights_digest(run: FinishedRun) -> str:
    """Returns 16 hexadecimal digits that change with the weights of a run."""
    with open(find_weights(run.path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def paired(
    labels: np.ndarray, before: np.ndarray, after: np.ndarray, clusters: np.ndarray | None = None
) -> dict:
    """Returns what logits [N, K] `after` compression changed beside those `before` it.

    Accuracies and their difference are shares in 0..1; `lost` and `won` count the images that only
    the model before, or only that after, gets right; `changed` counts other predictions. `p` is
    NaN with clusters, int [N], for McNemar's test takes images as independent.
    """
    said = {"before": before.argmax(axis=1), "after": after.argmax(axis=1)}
    right = {side: (classes == labels)[None] for side, classes in said.items()}
    pair = Family(right, clusters, fixed=SIDES).pair("after", "before")
    lost, won = (int((right[a] & ~right[b]).sum()) for a, b in (SIDES, SIDES[::-1]))
    p = float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0
    return {
        "test_images": len(labels),
        "accuracy_before": float(right["before"].mean()),
        "accuracy_after": float(right["after"].mean()),
        "difference": float(pair.difference),
        "ci95_low": float(pair.ci95_low),
        "ci95_high": float(pair.ci95_high),
        "established": bool(pair.established),
        "lost": lost,
        "won": won,
        "p": p if clusters is None else math.nan,
        "changed": int((said["before"] != said["after"]).sum()),
        "largest_difference": float(np.abs(after - before).max(initial=0)),
    }


def speed_name(batch: int, threads: int, side: str) -> str:
    """Returns the column of a median in milliseconds; `_q25` and `_q75` follow it."""
    return f"ms_{side}_batch{batch}_threads{threads or '_all'}"


def milliseconds(value: float) -> str:
    """Returns three digits, thousands in full."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"


def outcome(row: dict | pd.Series) -> str:
    """Returns in words whether accuracy changed, and how sure that is."""
    ends = f"{points(row['ci95_low'])} to {points(row['ci95_high'])}"
    kind = "loss" if row["difference"] < 0 else "gain" if row["difference"] > 0 else "change"
    state = "established" if row["established"] else "not established"
    return f"{points(row['difference'])} points (95 %: {ends}): a {kind} is {state}"


def factor(row: dict | pd.Series) -> str:
    """Returns in words how the size of the file changed."""
    ratio = row["bytes_before"] / row["bytes_after"]
    if ratio >= SMALLER:
        size = 10 ** (2 - math.floor(math.log10(ratio)))  # to three digits, never upwards
        return f"{math.floor(ratio * size + 1e-9) / size:,.10g} times smaller"
    return "not smaller" if ratio > 1 / SMALLER else f"{milliseconds(1 / ratio)} times larger"


def read_rows(workdir: Path) -> pd.DataFrame:
    """Returns the rows of a workdir's file, none where there is none; raises UserError."""
    path = workdir / FILE
    if not path.exists():
        return pd.DataFrame()
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(TEXTS, str))
        _ = table[["run", "method", "weights", "bytes_before", "bytes_after", "difference"]]
        return table.reindex(columns=table.columns.union([*TEXTS, "cores_had"], sort=False))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): delete it, and compress the runs again"
        ) from error


def compression_section(comparison: Comparison) -> Section | None:
    """What each compressed model is, beside what it was.

    Rows of weights that are not the run's, and of runs that are gone, are left out with a warning.
    """
    try:
        rows = read_rows(comparison.workdir)
    except UserError as error:
        return Section(finding=f"Not made: {error}")
    if rows.empty or comparison.folder != "report":  # measured by the labels before a review
        return None
    runs = {run.name: run for every in comparison.runs for run in every.folds or (every,)}
    runs |= {run.name: run for run in comparison.smaller}
    rows, warnings = _current(rows, runs)
    if rows.empty:
        return Section(finding="Not shown.", warnings=warnings)
    places = {name: place for place, name in enumerate(runs)}
    methods = {name: place for place, name in enumerate(dict.fromkeys([*WHAT, *rows.method]))}
    rows = rows.assign(place=rows.run.map(places), way=rows.method.map(methods))
    rows = rows.sort_values(["place", "way"]).reset_index(drop=True)
    known = rows[list(TEXTS)].astype(object).fillna("unknown")  # rows of older versions
    said = {"cpu": known.cpu, "versions": known.onnxruntime, "dates": known.date.str[:10]}
    said = {name: listed(dict.fromkeys(of)) for name, of in said.items()}
    warnings += filter(None, [busy(rows.cores_had)])
    return Section(
        text=[
            f"{method}: {what}." for method, what in WHAT.items() if (rows.method == method).any()
        ],
        tables=[as_table(_columns(rows), CAPTION)],
        details=[
            Details("Predictions that changed", table=as_table(_changed(rows))),
            Details("Speed at other batches and threads", table=as_table(_speeds(rows), QUARTILES)),
            Details("How it is measured", [line.format(**said) for line in HOW]),
        ],
        warnings=warnings,
        finding=_finding(rows),
    )


def _columns(rows: pd.DataFrame) -> dict:
    megabytes = [rows[f"bytes_{side}"].map(_megabytes) for side in SIDES]
    ends = intervals(rows, "", points)
    return {
        "model": rows.run,
        "method": rows.method,
        "accuracy %": [
            f"{percent(r.accuracy_before)} → {percent(r.accuracy_after)}" for r in rows.itertuples()
        ],
        "points (95 %)": [
            f"{points(d)} ({of})" for d, of in zip(rows.difference, ends, strict=True)
        ],
        "established": rows.established.map({True: "yes", False: "no"}),
        "MB": [f"{a} → {b}" for a, b in zip(*megabytes, strict=True)],
        "size": [factor(row) for _, row in rows.iterrows()],
        "changed": rows.changed.map("{:,}".format),
        "ms": _times(rows, 1, 1),
        **({"machine": rows.cpu} if rows.cpu.nunique() > 1 else {}),
    }


def _changed(rows: pd.DataFrame) -> dict:
    return {
        "model": rows.run,
        "method": rows.method,
        "test images": rows.test_images.map("{:,}".format),
        "other predictions": rows.changed.map("{:,}".format),
        "right only before": rows.lost.map("{:,}".format),
        "right only after": rows.won.map("{:,}".format),
        "p": rows.p.map(p_value),
        "largest difference of a logit": rows.largest_difference.map("{:.2g}".format),
    }


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.3g}" if count < 1e8 else f"{count / 1e6:,.0f}"


def _speeds(rows: pd.DataFrame) -> dict:
    columns = {"model": rows.run, "method": rows.method}
    columns |= {"machine": rows.cpu} if rows.cpu.nunique() > 1 else {}
    for batch in BATCHES:
        for threads in THREADS:
            images = "1 image" if batch == 1 else f"{batch} images"
            title = f"ms, {images}, {'1 thread' if threads else 'all cores'}"
            columns[title] = _times(rows, batch, threads, quartiles=True)
    return columns


def _times(rows: pd.DataFrame, batch: int, threads: int, quartiles: bool = False) -> list[str]:
    """Returns medians before and after, with their quartiles if asked for."""

    def text(row: pd.Series, side: str) -> str:
        median = speed_name(batch, threads, side)
        if pd.isna(row.get(median)):
            return NONE
        low, high = (milliseconds(row[f"{median}_{end}"]) for end in ("q25", "q75"))
        return milliseconds(row[median]) + f" ({low} to {high})" * quartiles

    return [" → ".join(text(row, side) for side in SIDES) for _, row in rows.iterrows()]


def _current(rows: pd.DataFrame, runs: dict[str, FinishedRun]) -> tuple[pd.DataFrame, list[str]]:
    """Returns the rows of weights that the workdir holds, and which runs it has others of."""
    now = {}
    for name in runs.keys() & set(rows.run):
        # Weights may have been deleted to save space: the run is the same.
        with suppress(OSError, UserError):
            now[name] = weights_digest(runs[name])
    gone = ~rows.run.isin(runs)
    old = rows.run.isin(now) & (rows.weights != rows.run.map(now))
    again = "it is not shown: compress again, or delete the rows"
    warnings = [
        f"Compression: {', '.join(rows.run[which].unique())}: measured of {what}: {again}."
        for which, what in ((old, "other weights than the run now has"), (gone, "a run not here"))
        if which.any()
    ]
    return rows[~old & ~gone], warnings


def _finding(rows: pd.DataFrame) -> str:
    """How much smaller each method makes files, what is not faster, and what lost accuracy."""
    ratio, sizes = rows.bytes_before / rows.bytes_after, []
    for method, of in ratio.groupby(rows.method, sort=False):
        least, most = (factor(rows.loc[of.agg(place)]) for place in ("idxmin", "idxmax"))
        sizes.append(f"{method} is {_span(least, most)}")
    lost = rows[rows.established & (rows.difference < 0)]
    names = [f"{r.run} as {r.method} ({points(r.difference)} points)" for r in lost.itertuples()]
    text = f"A loss of accuracy is established for {listed(names)}"
    open_rows = rows[~rows.established]
    if not names:
        text = "No loss of accuracy is established"
    if len(open_rows):
        of = "of the others" if names else "by the 95 % intervals"
        worst = decimal(100 * max(0.0, -open_rows.ci95_low.min()), 2)
        text += f"; {of}, it may be up to {worst} points"
    return f"{', '.join(sizes)}. {_not_faster(rows)}{text}."


def _span(least: str, most: str) -> str:
    """Returns two answers of `factor` as one."""
    if least == most:
        return most
    if "not smaller" in (least, most):
        return f"at most {most if least == 'not smaller' else least}"
    both = least.endswith("smaller") == most.endswith("smaller")
    return f"{least.rsplit(' times ', 1)[0] if both else least} to {most}"


def _not_faster(rows: pd.DataFrame) -> str:
    """Returns a sentence on methods that gain no time with one image and one thread, or ""."""
    before, after = (rows.get(speed_name(1, 1, side)) for side in SIDES)
    if before is None or after is None:  # rows of older versions
        return ""
    slow = rows[before / after < SMALLER]
    parts = []
    for method, of in slow.groupby("method", sort=False):
        every = len(of) == (rows.method == method).sum()
        parts.append(method if every else f"{method} of {', '.join(of.run)}")
    return f"Not faster with one image and one thread: {'; '.join(parts)}. " if parts else ""
