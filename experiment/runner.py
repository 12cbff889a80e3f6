"""One group of runs after the other: their locks, the record of a failure, signals to stop."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from errors import Interrupted, UserError
from experiment.files import read_json, read_status, write_json
from experiment.grid import Run
from experiment.machine import locked

STOPPED = 75  # exit code, EX_TEMPFAIL: try again
FINAL = ("complete", "diverged", "pruned")  # statuses of runs that are not trained again
GROUP = "group.json"  # names the runs that a run was trained together with


class Signals:
    """Turns the first SIGTERM or Ctrl-C into a request to save and stop; a later one kills.

    What follows within a second is the same request: SLURM signals a job's shell, which passes it
    on, and may signal the job as well.
    """

    def __init__(self):
        self.requested, self._since = False, 0.0
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self._request)

    def _request(self, number: int, frame) -> None:
        if not self.requested:
            self.requested, self._since = True, time.monotonic()
        elif time.monotonic() > self._since + 1.0:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def agreed(self, value: Any) -> Any:
        """Returns `value`; of several hosts, that of the first: see `training/hosts.py`."""
        return value

    def all_failed(self, error: Exception) -> bool:
        """Returns whether the other hosts of a run failed too, so that the next run can begin."""
        return True


def prepare_workdir(workdir: Path) -> Path:
    """Returns the workdir, made and writable; raises UserError where it cannot be written."""
    probe = workdir / f".write-test-{os.getpid()}"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # of a process elsewhere, with the same number
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be written ({error.strerror}): choose another folder, or "
            "change its permissions"
        ) from error
    return workdir


def kin(config: ConfigDict) -> str:
    """Returns what runs that differ in their seed alone have in common."""
    return ConfigDict(config.to_dict() | {"seed": 0}).to_json()


def divide(runs: list[Run], workdir: Path, at_once: dict[str, int]) -> list[list[Run]]:
    """Returns the runs in groups that are trained at once, in order.

    An interrupted group comes together again, with those of its runs that are complete; the others
    of a kin that are not complete form new groups of at most `at_once[kin]`.
    """
    groups, kins = [], {}
    for run in runs:
        kins.setdefault(kin(run.config), {})[run.name] = run
    for key, kindred in kins.items():
        left = [name for name in kindred if read_status(workdir / name) not in FINAL]
        done = [[name] for name in kindred if name not in left]
        again, size = [], at_once[key]
        for name in left if size > 1 else ():
            names = _group_of(workdir, name)
            whole = bool(names) and names == _group_of(workdir, names[0])
            if whole and names not in again and kindred.keys() >= set(names):
                again.append(names)
        left = [name for name in left if not any(name in names for names in again)]
        new = [left[i : i + size] for i in range(0, len(left), size)]
        done = [names for names in done if not any(names[0] in group for group in again)]
        groups += [[kindred[name] for name in names] for names in (*done, *again, *new)]
    return groups


def _group_of(workdir: Path, name: str) -> list[str]:
    """Returns the runs that a run was trained together with, the first holds their state."""
    try:
        return read_json(workdir / name / GROUP).get("runs", [])
    except UserError:
        return []


def train_group(
    runs: list[Run], workdir: Path, titles: dict[str, str], train: Callable, stop: Signals
) -> set[str]:
    """Trains runs that belong together unless they are finished; records a failure.

    Returns the names of those that another process is training.

    Args:
      runs: of the grid, which differ in their seed alone.
      workdir: of the experiment.
      titles: of each run by name; begins each line that is printed.
      train: called with configs, run directories and `should_stop`; returns their summaries.
      stop: asked after every step.
    """
    left = []
    statuses = stop.agreed([read_status(workdir / run.name) for run in runs])
    for run, status in zip(runs, statuses, strict=True):
        if status in FINAL:
            print(f"{titles[run.name]}: {status} already", flush=True)
        else:
            left.append(run)
    if not left:
        return set()
    with ExitStack() as locks:
        ours, held = [], set()
        try:
            for run in runs:
                run_dir, title = workdir / run.name, titles[run.name]
                if run in left:
                    how = "going on" if (run_dir / "config.json").exists() else "training"
                    together = f", {len(runs)} seeds at once" if len(runs) > 1 else ""
                    print(f"{title}: {how}{together}", flush=True)
                run_dir.mkdir(parents=True, exist_ok=True)
                if stop.agreed(locks.enter_context(locked(run_dir / ".lock"))):
                    ours.append(run)
                elif run in left:
                    print(f"{title}: another process is training it; left to that one", flush=True)
                    held.add(run.name)
            left = [run for run in left if run in ours]
            if left:
                _train(ours, left, workdir, titles, train, stop)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other runs go on
            go_on = stop.all_failed(error)
            for run in left:
                if read_status(workdir / run.name) not in FINAL:
                    _record_failure(workdir / run.name, titles[run.name], error)
            if not go_on:
                raise
    return held


def _train(
    runs: list[Run], left: list[Run], workdir: Path, titles: dict, train: Callable, stop: Signals
) -> None:
    """Trains locked runs, and prints what became of those that were left to train."""
    began = time.monotonic()
    run_dirs = [workdir / run.name for run in runs]
    try:
        summaries = train([run.config for run in runs], run_dirs, lambda: stop.requested)
    except Interrupted as interrupted:
        for run in left:
            print(f"{titles[run.name]}: {interrupted}", flush=True)
        return
    seconds = (time.monotonic() - began) / len(left)
    for run, summary in zip(runs, summaries, strict=True):
        title = titles[run.name]
        if run not in left:
            continue
        if summary["status"] == "complete":
            part, scores = list(summary["metrics"].items())[-1]  # of trials, there is no test
            result = f"{part} accuracy {scores['accuracy']:.4f} on {scores['count']} images"
            print(f"{title}: {result}, {seconds:.1f} s", flush=True)
        elif summary["status"] == "pruned":
            print(f"{title}: pruned: {summary['error']}", flush=True)
        else:
            print(f"{title}: diverged: {summary['error']}", file=sys.stderr, flush=True)


def _record_failure(run_dir: Path, title: str, error: Exception) -> None:
    text, details = str(error), ""
    if not isinstance(error, UserError):
        text, details = f"{type(error).__name__}: {error}", traceback.format_exc()
    print(f"{title}: failed: {details or text}", file=sys.stderr, flush=True)
    try:
        summary = {"status": "failed", "error": text, "traceback": details}
        write_json(run_dir / "summary.json", summary)
    except OSError as also:
        print(f"{title}: the failure could not be recorded: {also}", file=sys.stderr)
