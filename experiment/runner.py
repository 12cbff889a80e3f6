"""One run after the other: the lock on each, the record of a failure, and signals to stop."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from errors import Interrupted, UserError
from experiment.files import read_status, write_json
from experiment.grid import Run
from experiment.machine import locked

STOPPED = 75  # exit code, EX_TEMPFAIL: try again


class Signals:
    """Turns the first SIGTERM or Ctrl-C into a request to save and stop; a second one kills."""

    def __init__(self):
        self.requested = False
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self._request)

    def _request(self, number: int, frame) -> None:
        self.requested = True
        signal.signal(number, signal.SIG_DFL)


def prepare_workdir(workdir: Path) -> Path:
    """Returns the workdir, made and writable; raises UserError where it cannot be written."""
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


def train_one(run: Run, workdir: Path, title: str, train: Callable, stop: Signals) -> bool:
    """Trains one run unless it is finished; records a failure.

    Returns False where another process is training it.

    Args:
      run: of the grid.
      workdir: of the experiment.
      title: begins each line that is printed.
      train: `train_and_evaluate`.
      stop: asked after every step.
    """
    run_dir = workdir / run.name
    status = read_status(run_dir)
    if status in ("complete", "diverged"):
        print(f"{title}: {status} already", flush=True)
        return True
    print(f"{title}: {'going on' if run_dir.exists() else 'training'}", flush=True)
    began = time.monotonic()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with locked(run_dir / ".lock") as ours:
            if not ours:
                print(f"{title}: another process is training it; left to that one", flush=True)
                return False
            summary = train(run.config, run_dir, lambda: stop.requested)
    except Interrupted as interrupted:
        print(f"{title}: {interrupted}", flush=True)
        return True
    except Exception as error:  # noqa: BLE001 - whatever it is, the other runs go on
        _record_failure(run_dir, title, error)
        return True
    if summary["status"] == "complete":
        accuracy, count = (summary["metrics"]["test"][key] for key in ("accuracy", "count"))
        seconds = time.monotonic() - began
        result = f"test accuracy {accuracy:.4f} on {count} images, {seconds:.1f} s"
        print(f"{title}: {result}", flush=True)
    else:
        print(f"{title}: diverged: {summary['error']}", file=sys.stderr, flush=True)
    return True


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
