"""A smaller model, and what that cost: size, accuracy and speed, each beside the float32 model.

    python -m deploy.compress RUN OUT --method=int8|int8_dynamic|float16|bfloat16
        [--calibration=128] [--data=PATH]

OUT gets model.onnx and its model card, and is used as an export is. `int8` calibrates on
--calibration training images. Float32 and compressed model both answer the whole test part in ONNX
Runtime; size, accuracy with the paired difference and its interval, and times are printed, stored
in the file and in WORKDIR/deploy/compression.csv, of which `analysis.report` makes a chapter.
Temperature, review thresholds and sets of classes are fitted anew, to the compressed model's
answers to the validation images. A loss of accuracy is shown and is no error.
Exit codes: 0 compressed, 2 a mistake.
"""

import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
from absl import flags

from analysis.benchmark import cpu_model
from analysis.compression import (
    BATCHES,
    FILE,
    SIDES,
    THREADS,
    WHAT,
    factor,
    milliseconds,
    outcome,
    paired,
    read_rows,
    speed_name,
    weights_digest,
)
from analysis.costs import time_in_turn
from analysis.evaluate import temperature_of
from analysis.forward import load_data, load_images
from analysis.latency import FILE as LATENCY
from analysis.latency import busy, version_of
from analysis.page.tables import p_value, percent
from analysis.predict import CARD, Predictor, predictor_of
from analysis.runs import FinishedRun, load_run
from analysis.verdict import plural
from data.splits import subset
from deploy.card import model_card
from deploy.export import export_run
from deploy.load import ONNX, facts_in, load, package
from deploy.proof import Answer, answered
from errors import UserError, choose
from experiment.command import arguments, output_folder, run_command
from experiment.files import plain
from experiment.machine import locked
from input_pipeline import Dataset
from models.weights.own import KEY

METHODS = ("int8", "int8_dynamic", "float16", "bfloat16")
COMPUTED = {"int8": "int8", "int8_dynamic": "int8"}  # the others store weights, no more
FITTED = ("temperature", "review_thresholds", "sets")  # to answers to the validation images
CALIBRATION = 128  # images
ROUNDS = 15  # of timing
SETTLE = 0.1  # seconds between turns on all cores: ONNX Runtime's threads spin for a while
ANSWERED = 64  # images at once


def compress_run(
    run: FinishedRun, folder: Path, method: str, data_path: str = "", calibration: int = CALIBRATION
) -> dict:
    """Writes the compressed model of a complete run into a folder; returns its row of FILE.

    `calibration` is about how many training images int8 looks at.
    """
    choose("--method", method, METHODS)
    check_folder(folder, method, run)
    for name in ("onnx", "onnxruntime"):
        package(name, "onnx")
    workdir = run.path.resolve().parents[1]
    with saying(f"cannot write to {workdir / FILE}"):  # said now, not after minutes
        place = output_folder((workdir / FILE).parent, "WORKDIR/deploy")
        tempfile.TemporaryFile(dir=place).close()
    read_rows(workdir)
    with saying(f"cannot read the images of {run.path}"):
        dataset = data_of(run, data_path)
        images = calibration_images(dataset, calibration) if method == "int8" else None
    existed = folder.exists()
    try:
        with saying(f"cannot write to {folder}"):
            place = tempfile.TemporaryDirectory(dir=output_folder(folder, "OUT"), prefix=".part")
        with place:
            files = {"before": Path(place.name, ONNX), "after": Path(place.name, "smaller.onnx")}
            export_run(run, Path(place.name), "onnx", data_path=data_path)
            make_smaller(run, files, method, images)
            with saying(f"cannot read the images of {run.path}"):
                row, smaller = measure(run, files, method, data_path)
            row["calibration_images"] = 0 if images is None else len(images)
            with saying(f"cannot write to {folder}"):
                publish(files, folder, smaller, row)
        with saying(f"cannot write to {workdir / FILE}"):
            write_row(workdir, row)
    finally:
        if not existed and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return row


@contextmanager
def saying(what: str) -> Iterator[None]:
    """Raises UserError with what could not be done where the system refuses it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {error}") from error


def publish(files: dict[str, Path], folder: Path, smaller: FinishedRun, row: dict) -> None:
    """Puts the compressed file and its card into the folder, and its last size into the row."""
    row["bytes_after"], facts = write_facts(files, predictor_of(smaller), row)
    card = files["after"].with_name(CARD)
    known = replace(predictor_of(smaller), facts=facts)
    text = model_card(smaller, known, facts["licence"], {ONNX: facts})
    card.write_text(f"{text}\n## Compression\n\n```text\n{describe(row)}\n```\n", "utf-8")
    os.replace(files["after"], folder / ONNX)
    os.replace(card, folder / CARD)


def data_of(run: FinishedRun, data_path: str) -> Dataset:
    """Returns the run's images; raises UserError with the option that says where they are."""
    try:
        return load_data(run, data_path)
    except UserError as error:
        raise UserError(
            f"compression needs the run's images: {error}\nSay where they lie now with --data=PATH."
        ) from error


def check_folder(folder: Path, method: str, run: FinishedRun) -> None:
    """Raises UserError for a folder that holds anything but an earlier result of the same."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is not a folder: name a new one")
    names = sorted(path.name for path in folder.glob("[!.]*"))  # .git may publish it
    others = sorted(set(names) - {ONNX, CARD, LATENCY.name})  # deploy.profile writes the last
    stated = facts_in(folder / ONNX) if ONNX in names else {}
    if others or (names and "method" not in stated):
        raise UserError(
            f"{folder} is not empty and no earlier result of deploy.compress (it holds "
            f"{', '.join((others or names)[:3])}): name a new folder, or empty it"
        )
    found = stated.get("run"), stated.get("method"), stated.get("run_version")
    if names and found[1:] != (method, version_of(run)):
        trained = " as it was trained before or elsewhere" * (found[:2] == (run.name, method))
        raise UserError(
            f"{folder / ONNX} is {found[0]} as {found[1]}{trained}, and would be replaced: "
            "name a new folder, or delete that file"
        )


def make_smaller(
    run: FinishedRun, files: dict[str, Path], method: str, images: np.ndarray | None
) -> None:
    """Writes the compressed file beside the other; raises UserError where it cannot be made."""
    from deploy.quantization import compress

    try:
        compress(files["before"], files["after"], method, images)
    except UserError as error:
        raise UserError(f"--method={method} cannot compress {run.path}: {error}") from error
    except Exception as error:  # ONNX Runtime raises types of its own
        raise UserError(
            f"ONNX Runtime cannot compress {run.path} with --method={method}: {error}"
        ) from error


def measure(
    run: FinishedRun, files: dict[str, Path], method: str, data_path: str
) -> tuple[dict, FinishedRun]:
    """Returns the row of FILE, and the run as it would be with the compressed model's answers."""
    images = {part: load_images(run, part, data_path) for part in ("test", "validation")}
    models = {side: load(file) for side, file in files.items()}
    before = answered(models["before"].answer, images["test"], ANSWERED)
    # In a batch, what int8_dynamic says of an image depends on the others.
    size = 1 if method == "int8_dynamic" else ANSWERED
    after = {part: answered(models["after"].answer, of, size) for part, of in images.items()}
    smaller = replace(run)
    for part, found in after.items():
        # Takes the place of what the cached property would read.
        vars(smaller)[part] = getattr(run, part) | {"logits": found["logits"]}
    features = zip(before["features"].T, after["test"]["features"].T, strict=True)
    logits = before["logits"], after["test"]["logits"]
    row = {
        "run": run.name,
        "method": method,
        "weights": weights_digest(run),
        "cpu": f"{cpu_model() or 'a CPU'}, {plural(os.cpu_count() or 1, 'core')}",
        "onnxruntime": metadata.version("onnxruntime"),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        **{f"bytes_{side}": file.stat().st_size for side, file in files.items()},
        **paired(run.test["labels"], *logits, run.clusters),
        "least_correlation_of_features": min(_correlation(*pair) for pair in features),
        "temperature_before": temperature_of(run),
        "temperature_after": temperature_of(smaller),
        **measure_speed(files, images["test"].shape[1]),
    }
    return row, smaller


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    with np.errstate(invalid="ignore"):  # NaN where one is constant
        return float(np.corrcoef(first, second)[0, 1])


def write_facts(files: dict[str, Path], fitted: Predictor, row: dict) -> tuple[int, dict]:
    """Writes what the file states into it; returns its size in bytes, and that."""
    import onnx

    model, size = onnx.load(files["after"]), row["bytes_after"]
    facts = load(files["before"]).facts | {key: fitted.facts[key] for key in FITTED}
    facts |= {"method": row["method"], "compute_dtype": COMPUTED.get(row["method"], "float32")}
    proof = {"images": row["test_images"], "changed_predictions": row["changed"]} | row
    for _ in range(2):  # the file states its own size
        facts["proof"] = plain(proof | {"bytes_after": size})
        onnx.helper.set_model_props(model, {KEY: json.dumps(facts)})
        onnx.save(model, files["after"])
        size = files["after"].stat().st_size
    return size, facts


def calibration_images(dataset: Dataset, count: int) -> np.ndarray:
    """Returns about `count` training images, uint8 [N, S, S, 3]: each class has its share."""
    rows = dataset.rows["train"]
    chosen = subset(dataset.listing, rows, [], min(1.0, count / len(rows)), seed=0)
    return dataset.decoded.images[chosen]


def measure_speed(files: dict[str, Path], side: int) -> dict[str, float]:
    """Returns medians and quartiles in milliseconds of two models that take turns.

    `_cpu` is the mean processor time of a call in milliseconds, which other processes do not
    lengthen; `cores_had` the least share of the cores asked for that the calls had, NaN if unknown.
    """
    columns, had = {}, []
    for threads in THREADS:
        models = {name: load(file, threads=threads) for name, file in files.items()}
        for batch in BATCHES:
            images = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), np.uint8)
            used: dict[str, list[float]] = {name: [] for name in models}
            calls = {
                name: partial(counted, model.answer, images, used[name])
                for name, model in models.items()
            }
            before = clocks()
            timed = time_in_turn(calls, ROUNDS, 0.0 if threads == 1 else SETTLE)
            wall, cpu, waited = clocks() - before
            had.append(cpu / (cpu + waited) if threads != 1 else min(1.0, cpu / wall))
            for name, seconds in timed.items():
                column = speed_name(batch, threads, name)
                quartiles = 1000 * np.quantile(seconds, (0.5, 0.25, 0.75))
                for suffix, value in zip(("", "_q25", "_q75"), quartiles, strict=True):
                    columns[column + suffix] = float(value)
                columns[f"{column}_cpu"] = 1000 * float(np.mean(used[name][1:]))  # the first warms
    return columns | {"cores_had": float(np.nanmin(had))}


def counted(answer: Answer, images: np.ndarray, used: list[float]) -> dict[str, np.ndarray]:
    """Returns the answer to images, and adds the processor seconds that it took to a list."""
    began = time.process_time()
    found = answer(images)
    used.append(time.process_time() - began)
    return found


def clocks() -> np.ndarray:
    """Returns seconds: passed, of processors, and in which threads waited for one, NaN if unknown.

    Threads that are ready and have no core, which Linux counts, are other processes' work.
    """
    waits = []
    for file in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # the thread ended
            waits.append(int(file.read_text().split()[1]) / 1e9)
    return np.array([time.perf_counter(), time.process_time(), sum(waits) if waits else math.nan])


def write_row(workdir: Path, row: dict) -> None:
    """Adds a row to the workdir's file, in place of an earlier one of the same run and method."""
    path = workdir / FILE
    output_folder(path.parent, "WORKDIR/deploy")
    with locked(path.with_suffix(".lock"), wait=True):
        rows = read_rows(workdir)
        if len(rows):
            rows = rows[(rows.run != row["run"]) | (rows.method != row["method"])]
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        pd.concat([rows, pd.DataFrame([row])]).to_csv(part, index=False)
        os.replace(part, path)


def describe(row: dict) -> str:
    """Returns in words what compression brought and cost."""
    sizes = " to ".join(f"{row[f'bytes_{side}']:,}" for side in SIDES)
    accuracy = " % to ".join(percent(row[f"accuracy_{side}"]) for side in SIDES)
    temperature = " to ".join(f"{row[f'temperature_{side}']:.3g}" for side in SIDES)
    exact = "" if math.isnan(row["p"]) else f" (McNemar's exact p {p_value(row['p'])})"
    lines = [
        f"{row['method']}: {WHAT[row['method']]}",
        f"size: {sizes} bytes, {factor(row)}",
        f"accuracy on {row['test_images']:,} test images: {accuracy} %, {outcome(row)}",
        f"other predictions: {row['changed']:,} of {row['test_images']:,}; right only before: "
        f"{row['lost']:,}, only after: {row['won']:,}{exact}",
        f"temperature: {temperature}; review thresholds and sets are fitted anew, too",
    ]
    if row["calibration_images"]:
        lines.insert(1, f"calibrated on {row['calibration_images']:,} training images")
    for batch in BATCHES:
        for threads in THREADS:
            names = [speed_name(batch, threads, side) for side in SIDES]
            times = " to ".join(
                "{} ({} to {})".format(
                    *(milliseconds(row[n + end]) for end in ("", "_q25", "_q75"))
                )
                for n in names
            )
            used = " to ".join(milliseconds(row[f"{n}_cpu"]) for n in names)
            where = "1 thread" if threads else "all cores"
            lines.append(
                f"ms (quartiles), {plural(batch, 'image')}, {where}: {times}; of processors: {used}"
            )
    return "\n".join([*lines, *filter(None, [busy(pd.Series([row["cores_had"]]))])])


def main(argv: list[str]) -> int:
    """Compresses a run into a folder."""
    given = arguments(argv, __doc__.split("python -m ")[1].split("\n\n")[0], 2, 2)
    run_dir, folder = (Path(path).expanduser() for path in given)
    run = load_run(run_dir)
    row = compress_run(run, folder, METHOD.value, DATA.value, CALIBRATION_FLAG.value)
    print(f"{folder}: {ONNX}, {CARD}\n{describe(row)}")
    return 0


if __name__ == "__main__":
    METHOD = flags.DEFINE_string("method", "int8", ", ".join(METHODS))
    DATA = flags.DEFINE_string("data", "", "Where the data lies now, if it was moved")
    CALIBRATION_FLAG = flags.DEFINE_integer(
        "calibration", CALIBRATION, "Training images that int8 looks at", lower_bound=1
    )
    run_command(main)
