"""How long does an answer take where it will run? Percentiles of single calls, and memory.

    python -m deploy.profile RUN_OR_FILE... [--batches=1,8,32] [--threads=1,0] [--runtime=jax,onnx]
        [--photos=FOLDER] [--seconds=3] [--output=FILE.csv]

Of a run: JAX and, with the extra [onnx], ONNX Runtime, of the float32 file that `deploy.export`
would write, if it answers the photos as the run does; a file that `deploy.export` wrote: itself.
Each batch size and number of threads (0: all) is measured in a process of its own that may use so
many cores; all models and runtimes take turns. A call is pixels in, uint8, logits and features out:
preprocessing is part of the program, and measured alone beside it. Decoding is of one photo, bytes
to resized pixels, on one thread. A percentile is given if one call or more lies beyond it with 95 %
probability: p50 takes 5 calls, p90 29, p99 299; more --seconds give more calls. "CPU ms" is the
mean processor time of a call, which other processes do not lengthen.

The table goes into WORKDIR/deploy/latency.csv of the run, where it replaces older rows of the same
kind and `analysis.report` reads it, or beside the file. Rows of another model of the same name in
--output are a mistake. Exit codes: 0 all was measured, 1 something could not be, 2 a mistake.
"""

import itertools
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata, util
from pathlib import Path

import numpy as np
import pandas as pd
from absl import flags

from analysis.benchmark import cpu_model
from analysis.latency import FILE, KEY, PERCENTILES, disturbed, read_latencies, version_of
from analysis.page.tables import NONE
from analysis.predict import open_output
from analysis.runs import load_run
from analysis.speed.turns import Timing, time_in_turn
from deploy.load import load, package
from deploy.profile_onnx import write_onnx
from deploy.profile_photos import photos_in, write_photos
from deploy.profile_worker import Spec
from errors import UserError, choose
from experiment.command import arguments, output_folder, run_command
from experiment.machine import locked

RUNTIMES = {"jax": "jax", "onnx": "onnxruntime"}  # and their packages
ROUNDS = 5  # in which all take turns
SECONDS = 3.0  # of calls of a row, over all rounds
SURE = 0.95
FAIR = 1.05  # cores that one thread may keep busy, as far as clocks can tell


@dataclass(frozen=True)
class Subject:
    """A model in one runtime."""

    run: str  # its name, or that of a file and its folder
    model: str
    version: str
    runtime: str
    path: Path  # that `deploy.load` reads
    photos: Path  # folder of encoded photos
    decoded: str  # what these are
    table: Path
    source: Path  # the run or file, as it was given
    preprocess: Path | None = None  # preprocessing alone, where it is a file of its own


def percentile(seconds: list[float], share: float) -> float:
    """Returns a percentile of calls in milliseconds; NaN where there are too few of them."""
    enough = share ** len(seconds) <= 1 - SURE
    return 1000 * float(np.quantile(seconds, share)) if enough else math.nan


def row_of(subject: Subject, threads: int, batch: int, timing: Timing, about: dict) -> dict:
    """Returns what was measured of one model, runtime, batch size and number of threads."""
    spent: dict[str, list[float]] = {}
    for part in timing.parts:
        for what, seconds in part.items():
            spent.setdefault(what, []).extend(seconds)
    network, ready = spent["network"], timing.ready
    if ready["device"] != "cpu":
        about = about | {"machine": f"{about['machine']}, {ready['device']}"}
    shares = dict(zip(PERCENTILES, (0.5, 0.9, 0.99), strict=True))
    return {
        **{"run": subject.run, "model": subject.model, "runtime": subject.runtime},
        **{"threads": threads, "batch": batch, "calls": len(network)},
        **{name: percentile(network, share) for name, share in shares.items()},
        "cpu_ms": 1000 * sum(spent["cpu"]) / len(network),
        "images_per_second": batch / float(np.median(network)),
        "first_call_ms": 1000 * ready["compile_seconds"],
        "of_which_compiling_ms": 1000 * ready["compiled_seconds"],
        "load_ms": 1000 * ready["load_seconds"],
        "import_ms": 1000 * ready["import_seconds"],
        "preprocess_p50_ms": percentile(spent.get("preprocess", []), 0.5),
        **{f"decode_{name}": percentile(spent["decode"], x) for name, x in shares.items()},
        "decoded": subject.decoded,
        "memory_mb": ready["memory"] / 1e6,
        "memory_before_mb": ready["memory_before"] / 1e6,
        "device_memory_mb": (ready["device_memory"] or math.nan) / 1e6,
        "cores_used": sum(spent["cpu"]) / sum(network),
        **{"version": subject.version, "path": str(subject.source), "seconds": sum(network)},
        **about,
    }


def cores() -> set[int]:
    """Returns the numbers of the cores that this process may use."""
    return getattr(os, "sched_getaffinity", lambda _: set(range(os.cpu_count() or 1)))(0)


def worded(threads: int) -> str:
    """Returns a number of threads in words."""
    return f"{threads} thread{'s' * (threads > 1)}" if threads else "all threads"


def surroundings() -> dict:
    """Returns the machine in words, versions, and when this is."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    processor = cpu_model() or platform.processor() or platform.machine()
    versions = {"python": platform.python_version()}
    for name in ("jax", "onnxruntime", "numpy", "pillow"):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "machine": f"{processor}, {len(cores())} cores, {memory:.0f} GiB, {platform.system()}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "load_average": round(os.getloadavg()[0], 2),
    }


def subjects_of(path: Path, runtimes: list[str], given: list[bytes], folder: Path) -> list[Subject]:
    """Returns a run in each runtime, or a file in its own; `folder` gets what they need.

    `given` are photos, none for the run's own.
    """
    run = load_run(path) if (path / "config.json").exists() else None
    if run:
        facts = {"data": run.config["data"], "image_size": run.config["data"]["image_size"]}
        name, model, version = run.name, run.label, version_of(run)
        table = path.parents[1] / FILE
    else:
        predictor = load(path)
        facts, path, version = predictor.facts, predictor.file, predictor.version
        method = f" ({facts['method']})" if "method" in facts else ""
        name, model = f"{path.parent.name}/{path.name}{method}", facts["model"] + method
        table = path.with_name(FILE.name)
        own = "onnx" if path.suffix == ".onnx" else "jax"
        if own not in runtimes:
            raise UserError(f"{path} runs in {own}, which --runtime leaves out")
        runtimes = [own]
    photos, decoded = write_photos(folder / "photos", facts, run, given)
    subject = Subject(name, model, version, "", path, photos, decoded, table, path)
    return [replace(subject, runtime=runtime) for runtime in runtimes]


def converted(subject: Subject) -> Subject:
    """Returns a run as its ONNX file, if it is to be measured so; raises UserError if it cannot."""
    if subject.runtime != "onnx" or subject.path.is_file():
        return subject
    program, preprocess = write_onnx(load_run(subject.path), subject.photos)
    return replace(subject, path=program, preprocess=preprocess)


def measure(
    subjects: list[Subject], threads: int, batch: int, seconds: float, say: Callable[[str], None]
) -> list[Timing]:
    """Times subjects in turn, each in a process of its own."""
    commands = {}

    def start(command: list[str], side: str, _: dict) -> list[str]:
        say(f"{side}: starts, and compiles")  # which may take minutes on an accelerator
        return command

    for i, subject in enumerate(subjects):
        paths = {"path": subject.path, "photos": subject.photos, "preprocess": subject.preprocess}
        paths = {key: str(path or "") for key, path in paths.items()}
        spec = Spec(threads=threads, batch=batch, seconds=seconds / ROUNDS, **paths)
        side = f"{i + 1} {subject.runtime} {subject.run}".replace("/", " ")[:200]  # names its log
        worker = [sys.executable, "-m", "deploy.profile_worker", json.dumps(asdict(spec))]
        commands[side] = partial(start, worker, side)
    with tempfile.TemporaryDirectory() as folder:
        timings = time_in_turn(commands, Path(folder), ROUNDS, seconds / ROUNDS, say)
    return list(timings.values())


def store(path: Path, rows: list[dict]) -> None:
    """Puts rows into a table, in place of those of the same kind; without rows, sees if it could.

    Raises UserError for a file that is no such table, or cannot be written.
    """
    output_folder(path.parent)
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"cannot write --output={path}: {error.strerror}") from error
    if not rows:
        read_latencies(path)
        return
    with locked(path.with_name(f".{path.name}.lock"), wait=True):
        table, new = read_latencies(path), pd.DataFrame(rows)
        table = pd.concat([table, new]) if len(table) else new
        with open_output(str(path)) as file:
            table.drop_duplicates(KEY, keep="last").to_csv(file, index=False, float_format="%.6g")


def printed(rows: list[dict]) -> str:
    """Returns the table as a reader sees it, and what its columns mean."""
    table = pd.DataFrame(rows)

    def digits(name: str) -> list[str]:
        return [
            NONE if math.isnan(x) else f"{x:.3g}" if x < 1000 else f"{x:.0f}" for x in table[name]
        ]

    columns = {
        "model": table.run,
        "runtime": table.runtime,
        "threads": table.threads.replace(0, "all"),
        "batch": table.batch,
        "calls": table.calls,
        "p50 ms": digits("p50_ms"),
        "p90 ms": digits("p90_ms"),
        "p99 ms": digits("p99_ms"),
        "CPU ms": digits("cpu_ms"),
        "images/s": digits("images_per_second"),
        "first call ms": digits("first_call_ms"),
        "load ms": digits("load_ms"),
        "preprocess ms": digits("preprocess_p50_ms"),
        "decode ms/photo": digits("decode_p50_ms"),
        "memory MB": digits("memory_mb"),
        "before MB": digits("memory_before_mb"),
        "device MB": digits("device_memory_mb"),
        "cores used": digits("cores_used"),
    }
    frame = pd.DataFrame(columns)
    frame = frame.loc[:, (frame != NONE).any()]
    last = rows[-1]
    decoded = table.groupby("decoded", sort=False).run.unique()
    lines = [
        frame.to_string(index=False),
        f"{last['machine']}; {last['versions']}; {last['date']}; load average "
        f"{last['load_average']} before.",
        *(f"Decoded for {', '.join(names)}: {text}." for text, names in decoded.items()),
        f"{NONE}: not known, or too few calls (p50 takes 5, p90 29, p99 299; more --seconds).",
    ]
    return "\n".join([*lines, *filter(None, [disturbed(table)])])


@dataclass(frozen=True)
class Plan:
    """What to measure of each model."""

    batches: list[int]
    threads: list[int]  # 0: all
    runtimes: list[str]
    seconds: float = SECONDS  # of calls of each row
    photos: str = ""  # folder; "" for the run's own
    output: str = ""  # "" for beside the run or file


def profile_models(paths: Sequence[str], plan: Plan) -> tuple[list[dict], list[str], list[Path]]:
    """Measures runs and files, and writes tables as it goes.

    Returns the rows, what could not be measured, and the tables' paths.
    """
    rows, lost, about = [], [], surroundings()
    given = photos_in(plan.photos) if plan.photos else []

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    # Workers share an accelerator with this process, which takes memory as it needs it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with tempfile.TemporaryDirectory() as name:
        subjects, tables = [], []
        for number, path in enumerate(dict.fromkeys(Path(x).expanduser().resolve() for x in paths)):
            (folder := Path(name, str(number))).mkdir()
            subjects += subjects_of(path, plan.runtimes, given, folder)
        if plan.output:
            table = Path(plan.output).expanduser().resolve()
            subjects = [replace(subject, table=table) for subject in subjects]
        check(subjects)
        if plan.output:
            check_output(table, subjects, about["machine"])
        for subject in subjects.copy():
            try:
                subjects[subjects.index(subject)] = converted(subject)
            except UserError as error:
                lost.append(f"not measured: {subject.run} in {subject.runtime}: {error}")
                subjects.remove(subject)
        for threads, batch in itertools.product(plan.threads, plan.batches):
            say(f"batch {batch}, {worded(threads)}")
            timings = measure(subjects, threads, batch, plan.seconds, say)
            for subject, timing in zip(subjects, timings, strict=True):
                what = f"{subject.run} in {subject.runtime}, batch {batch}, {worded(threads)}"
                if timing.error:
                    lost.append(f"not measured: {what}: {timing.error}")
                    continue
                rows.append(row := row_of(subject, threads, batch, timing, about))
                store(subject.table, [row])
                tables.append(subject.table)
                if threads and row["cores_used"] > FAIR * threads:
                    lost.append(f"not limited: {what} kept {row['cores_used']:.2f} cores busy")
    return rows, lost, list(dict.fromkeys(tables))


def check(subjects: list[Subject]) -> None:
    """Finds what would spoil the tables, before anything is measured."""
    kinds = [(subject.table, subject.run, subject.runtime) for subject in subjects]
    if twice := [kind for kind in kinds if kinds.count(kind) > 1]:
        table, run, _ = twice[0]
        raise UserError(f"{table} would hold two models called {run}: profile each in its own call")
    for table in dict.fromkeys(subject.table for subject in subjects):
        store(table, [])


def check_output(path: Path, subjects: list[Subject], machine: str) -> None:
    """Raises UserError for a table with another model's rows in the place of what is to come.

    A model that was trained again has its old path, one that was moved has its old version.
    """
    rows = read_latencies(path).reindex(columns=[*KEY, "version", "path"])
    rows = rows[rows.machine.str.startswith(machine)]
    for subject in subjects:
        other = rows[(rows.run == subject.run) & (rows.runtime == subject.runtime)]
        other = other[(other.version != subject.version) & (other.path != str(subject.source))]
        if len(other):
            raise UserError(
                f"--output={path} holds another model called {subject.run} "
                f"({other.path.iloc[0]}), whose rows would be replaced: give another file"
            )


def chosen_runtimes(names: list[str]) -> list[str]:
    """Returns the runtimes asked for, or those that are installed."""
    if not names:
        return [name for name, module in RUNTIMES.items() if util.find_spec(module)]
    for name in names:
        package(RUNTIMES[choose("--runtime", name, RUNTIMES)], name)
    return list(dict.fromkeys(names))


def numbers(option: str, texts: list[str], least: int, most: float = math.inf) -> list[int]:
    """Returns the whole numbers of an option, each once."""
    try:
        found = list(dict.fromkeys(map(int, texts)))
    except ValueError:
        found = []
    if not found or min(found) < least or max(found) > most:
        limits = f"{least} or more" if most == math.inf else f"from {least} to {most}"
        raise UserError(f"--{option}={','.join(texts)}: give whole numbers, {limits}")
    return found


def main(argv: list[str]) -> int:
    """Measures runs and files; returns 1 if one of them could not be."""
    if not math.isfinite(SECONDS_FLAG.value):
        raise UserError(f"--seconds={SECONDS_FLAG.value}: give a number")
    usage = __doc__.split("python -m ")[1].split("\n\n")[0]
    paths = arguments(argv, usage, least=1, most=None)
    plan = Plan(
        batches=numbers("batches", BATCHES.value, least=1),
        threads=numbers("threads", THREADS.value, least=0, most=len(cores())),
        runtimes=chosen_runtimes(RUNTIME.value),
        seconds=SECONDS_FLAG.value,
        photos=PHOTOS.value,
        output=OUTPUT.value,
    )
    rows, lost, tables = profile_models(paths, plan)
    print("\n".join([*([printed(rows)] if rows else []), *lost, *map("table: {}".format, tables)]))
    return 1 if lost else 0


if __name__ == "__main__":
    BATCHES = flags.DEFINE_list("batches", "1,8,32", "Images of one call")
    THREADS = flags.DEFINE_list("threads", "1,0", "Cores that a model may use; 0: all")
    RUNTIME = flags.DEFINE_list("runtime", "", "jax, onnx; those that are installed by default")
    PHOTOS = flags.DEFINE_string("photos", "", "Folder of photos to decode, not the run's own")
    SECONDS_FLAG = flags.DEFINE_float(
        "seconds", SECONDS, "Of the calls of each row of the table, over all rounds", lower_bound=0
    )
    OUTPUT = flags.DEFINE_string("output", "", "CSV file of the table")
    run_command(main)
