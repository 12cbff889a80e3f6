"""Train every run of an experiment and compare them.

    python main.py --config=configs/digits.py --workdir=runs/digits

The same command again skips finished runs, goes on with interrupted ones, and writes the report
anew. Exit codes: 0 all complete; 1 a run failed or diverged; 2 a mistake in config, data or
command; 75 stopped by a signal with the state saved, so run the same command again.
"""

import fcntl
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before JAX is imported: XLA's own notices

import jax
from absl import flags
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from analysis import audit, report
from analysis.forward import use_compilation_cache
from analysis.runs import load_runs, read_status
from errors import UserError
from experiment import grid
from experiment.command import config_overrides, run_command
from experiment.fields import stored_config
from input_pipeline import check_batches, load_dataset
from train import Interrupted, build_model, check_phases, train_and_evaluate
from training.recorder import write_json
from training.steps import class_weights

STOPPED = 75  # EX_TEMPFAIL: try again


def main(argv: list[str]) -> int:
    """Runs the experiment of --config; returns the exit code."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: options are written --name=value")
    config = CONFIG.value
    if config is None or not WORKDIR.value:
        raise UserError("--config=configs/... and --workdir=runs/... are both needed")
    every = grid.expand(config, config_overrides(CONFIG))
    runs = grid.shard(every, SHARD.value)
    if DRY_RUN.value:
        for run in runs:
            print(f"{run.name}\n{json.dumps(stored_config(run.config), indent=2)}")
        return 0
    workdir = prepare_workdir(Path(WORKDIR.value).expanduser())
    use_compilation_cache(config.runtime.cache_dir)
    check(runs, workdir)
    plan = {"command": sys.argv, "runs": [run.name for run in every]}
    plan["compare"] = stored_config(config.compare)
    write_json(workdir / "experiment.json", plan)

    stop = Signals()
    for number, run in enumerate(runs, start=1):
        train_one(run, workdir, f"[{number}/{len(runs)}] {run.name}", stop)
        if stop.requested:
            print("stopped by a signal; the same command goes on from here", file=sys.stderr)
            return STOPPED

    def tell(text: str) -> None:
        print(text, flush=True)
        if stop.requested:
            raise Interrupted("stopped while the report was made; its page holds what is there")

    left = bool(SHARD.value) and report.incomplete(workdir, load_runs(workdir))
    try:  # of several shards, the last one runs the models
        made = report.write_report(workdir, config.compare, models=not left, progress=tell)
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        return STOPPED
    print(f"\n{made.text}\n\nreport: {made.page}")
    ours = {run.name for run in runs}
    return 1 if any(name in ours for name in made.not_complete) else 0


def prepare_workdir(workdir: Path) -> Path:
    """Returns the workdir, made and writable.

    Raises:
      UserError: it cannot be written.
    """
    probe = workdir / f".write-test-{os.getpid()}"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be written ({error.strerror}): choose another folder, or "
            "change its permissions"
        ) from error
    return workdir


def check(runs: list[grid.Run], workdir: Path) -> None:
    """Finds every mistake that can be found before compute is spent; writes the audit.

    Raises:
      UserError: about configs, stored runs, data, or a model that does not fit the images.
    """
    for run in runs:
        grid.check_run_dir(run, workdir)
    mesh = Mesh(jax.devices(), ("data",))
    seen, sources = set(), set()
    for run in runs:
        settings = ConfigDict(run.config.to_dict())
        source = settings.data.to_json()
        settings.seed = 0
        if settings.to_json() in seen:
            continue
        seen.add(settings.to_json())
        dataset = load_dataset(run.config.data, run.config.runtime.cache_dir)
        check_batches(run.config, mesh)
        class_weights(run.config, dataset)
        model = nnx.eval_shape(lambda run=run, k=dataset.num_classes: build_model(run.config, k))
        check_phases(run.config, model)
        if not sources:
            print(audit.describe(audit.write_audit(dataset, workdir / "audit")), flush=True)
        sources.add(source)


def train_one(run: grid.Run, workdir: Path, title: str, stop: "Signals") -> None:
    """Trains one run unless it is finished; records a failure and returns."""
    run_dir = workdir / run.name
    status = read_status(run_dir)
    if status in ("complete", "diverged"):
        print(f"{title}: {status} already", flush=True)
        return
    print(f"{title}: {'going on' if run_dir.exists() else 'training'}", flush=True)
    began = time.monotonic()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with open(run_dir / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{title}: another process is training it; left to that one", flush=True)
                return
            summary = train_and_evaluate(run.config, run_dir, lambda: stop.requested)
    except Interrupted as interrupted:
        print(f"{title}: {interrupted}", flush=True)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other runs go on
        text, details = str(error), ""
        if not isinstance(error, UserError):
            text, details = f"{type(error).__name__}: {error}", traceback.format_exc()
        print(f"{title}: failed: {details or text}", file=sys.stderr, flush=True)
        record = {"status": "failed", "error": text, "traceback": details}
        try:
            write_json(run_dir / "summary.json", record)
        except OSError as also:
            print(f"{title}: the failure could not be recorded: {also}", file=sys.stderr)
    else:
        seconds = time.monotonic() - began
        if summary["status"] == "complete":
            test, count = (summary["metrics"]["test"][key] for key in ("accuracy", "count"))
            print(
                f"{title}: test accuracy {test:.4f} on {count} images, {seconds:.1f} s", flush=True
            )
        else:
            print(f"{title}: diverged: {summary['error']}", file=sys.stderr, flush=True)


class Signals:
    """Turns the first SIGTERM or Ctrl-C into a request to save and stop; a second one kills."""

    def __init__(self):
        self.requested = False
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self._request)

    def _request(self, number: int, frame) -> None:
        self.requested = True
        signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: configs/<name>.py")
    WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the runs and their report")
    SHARD = flags.DEFINE_string("shard", "", "i/n: train every n-th run, from the i-th on")
    DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Print the runs and their configs, and end")
    run_command(main)
