"""One job: a process that trains one run, its log, and what can be seen of it from outside.

Imports no JAX, for a worker of Ray loads this too.
"""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from experiment.files import read_json
from experiment.machine import LAUNCHER

REPORT = "report"  # the job that trains nothing and writes the report


def log_file(workdir: Path, name: str) -> Path:
    """Returns where a job's output goes."""
    return workdir / name / "log.txt"


def start(command: list[str], log: Path, environ: Mapping[str, str]) -> subprocess.Popen:
    """Starts a job whose output is appended to a log; it is told to stop when this process dies.

    Ctrl-C at the terminal does not reach it: whoever started it passes the signal on, once.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        where = f"{socket.gethostname()}, {time.strftime('%Y-%m-%d %H:%M:%S')}"
        head = f"--- {where}: {shlex.join(command)}".replace("\n", " ")
        file.write(f"{head}\n".encode(errors="backslashreplace"))
        file.flush()
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**environ, LAUNCHER: str(os.getpid())},
            start_new_session=True,
        )


def share_memory(environ: dict[str, str], share: int) -> None:
    """Has each of several jobs on one GPU take its part; JAX would give 0.75 to the first."""
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is older
    if share > 1 and not any(name in environ for name in names):
        environ[names[0]] = f"{0.9 / share:.3f}"


def last_lines(log: Path, count: int = 8) -> str:
    """Returns the end of what a job's last try wrote, indented."""
    lines = _tail(log).rpartition("\n--- ")[2].splitlines()[-count:]
    return "\n".join(f"    {line}" for line in lines if not line.startswith("--- "))


def _tail(path: Path, size: int = 8192) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def outcome(run_dir: Path) -> str:
    """Returns what a run's summary says: its status with the accuracy or the error; "" if none."""
    try:
        summary = read_json(run_dir / "summary.json")
    except ValueError:
        return ""
    for part in ("test", "validation"):
        accuracy = summary.get("metrics", {}).get(part, {}).get("accuracy")
        if accuracy is not None:
            return f"{summary['status']} {percent(accuracy)} {part}"
    error = summary.get("error", "").partition("\n")[0]
    return summary.get("status", "") + (f": {error}" if error else "")


def percent(fraction: float) -> str:
    """Returns 0.994 as "99.4 %"."""
    return f"{100 * fraction:.1f} %"


def last_validation(run_dir: Path) -> str:
    """Returns the newest validation of a run, or of the newest trial of a search; "" if none."""
    files = [run_dir / "metrics.jsonl", *run_dir.glob("trial*/metrics.jsonl")]
    files = sorted((file for file in files if file.exists()), key=lambda file: file.stat().st_mtime)
    for text in reversed(_tail(files[-1]).splitlines()) if files else ():
        try:
            line = json.loads(text)
        except ValueError:  # cut short
            continue
        if line.get("split") == "validation" and line.get("accuracy") is not None:
            trial = f"{files[-1].parent.name}, " if files[-1].parent != run_dir else ""
            return f"{trial}epoch {line['epoch']:g}, validation {percent(line['accuracy'])}"
    return ""


class Table:
    """The states of all jobs: on a terminal drawn in place, else a line for each change."""

    def __init__(self, names: list[str], workdir: Path):
        self.workdir, self.states = workdir, dict.fromkeys(names, "waiting")
        self.began: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        self.drawn, self.live = 0, sys.stdout.isatty()

    def set(self, name: str, state: str, begins: bool = False, ends: bool = False) -> None:
        """Notes the state of a job, and whether it begins or ends with it."""
        if state == self.states[name] and not (begins or ends):
            return
        self.states[name] = state
        if begins:
            self.began[name] = time.monotonic()
        if ends:
            self.ended[name] = time.monotonic()
        if not self.live:
            number = f" ({len(self.ended)} of {len(self.states)})" if ends else ""
            took = f", {self._time(name)}" if ends and name in self.began else ""
            print(f"{name}: {state}{took}{number}", flush=True)

    def say(self, text: str) -> None:
        """Prints lines that stay, above the table."""
        self._erase()
        print(text, flush=True)
        self.draw()

    def draw(self) -> None:
        """Draws the table anew, as much of it as the terminal holds."""
        if not self.live:
            return
        width, height = shutil.get_terminal_size()
        order = sorted(self.states, key=lambda name: name in self.ended)  # what is to come, first
        shown = set(order[: max(1, height - 3)])
        lines = [self._row(name) for name in self.states if name in shown]
        lines.append(f"{len(self.ended)} of {len(self.states)} ended")
        self._erase()
        print("\n".join(line[: width - 1] for line in lines), flush=True)
        self.drawn = len(lines)

    def _erase(self) -> None:
        if self.drawn:
            print(f"\x1b[{self.drawn}F\x1b[J", end="")
        self.drawn = 0

    def _row(self, name: str) -> str:
        widest = max(map(len, self.states))
        seen = "" if name in self.ended else last_validation(self.workdir / name)
        state = self.states[name] + (f": {seen}" if seen else "")
        return f"{name:<{widest}}  {self._time(name):>7}  {state}"

    def _time(self, name: str) -> str:
        if name not in self.began:
            return ""
        seconds = int(self.ended.get(name, time.monotonic()) - self.began[name])
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
