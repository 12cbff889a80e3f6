"""Several workers that are timed in turn, each in a process of its own."""

import contextlib
import json
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from analysis.speed.worker import PEERS, Spec

ROOT = Path(__file__).parents[2]
PATIENCE = 1800.0  # seconds for one answer
SETTLE = 0.2  # seconds until the threads of the side before have gone to sleep


class SideFailed(Exception):
    """A worker cannot be timed; the message says why."""


def worker_command(spec: Spec) -> list[str]:
    """Returns the command of the process that runs `spec`."""
    return [sys.executable, "-m", "analysis.speed.worker", json.dumps(asdict(spec))]


class Worker:
    """A process that answers lines of JSON, and its log."""

    def __init__(self, command: list[str], log: Path, keeps_memory: bool = True):
        self.log = log
        # JAX takes memory as it needs it: several workers share the device.
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        if not keeps_memory:  # see `experiment.machine.keep_freed_memory`
            environment["ARCHCOMPARE_MALLOC"] = "system"
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(log.with_suffix(".inductor"))
        with open(log, "wb") as errors:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def answer(self) -> dict:
        """Waits for the next answer; raises SideFailed with the reason if there is none."""
        if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
            raise SideFailed(f"no answer within {PATIENCE:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise SideFailed(f"ended with code {code}: {self.last_lines(1)}")
        answer = json.loads(line)
        if "error" in answer:
            raise SideFailed(answer["error"].strip().splitlines()[0])
        return answer

    def go(self, steps: int) -> dict:
        """Runs so many steps; returns {"seconds", "memory"}."""
        with contextlib.suppress(BrokenPipeError):  # `answer` says why
            print(json.dumps({"steps": steps}), file=self.process.stdin, flush=True)
        return self.answer()

    def last_lines(self, count: int = 20) -> str:
        """Returns the end of what the process wrote beside its answers."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return "\n".join(lines[-count:])

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.communicate()


@dataclass
class Timing:
    """What was measured of one side; `error` says why nothing was."""

    steps: int = 0  # of each repeat
    seconds: list[float] = field(default_factory=list)  # of each repeat
    memory: int | None = None  # bytes
    ready: dict = field(default_factory=dict)  # what the worker said when it was
    parts: list[dict] = field(default_factory=list)  # seconds of parts of each repeat, if it says
    error: str = ""

    def milliseconds(self) -> tuple[float, float, float]:
        """Returns the quartiles of a step's milliseconds, the median in the middle."""
        each = [1000 * seconds / self.steps for seconds in self.seconds]
        if len(each) == 1:
            return each[0], each[0], each[0]
        return tuple(statistics.quantiles(each, n=4, method="inclusive"))


def steps_within(seconds: float, ready: dict) -> int:
    """Returns how many steps a worker takes in about so many seconds, two at least."""
    return max(2, round(seconds / max(ready["step_seconds"], 1e-6)))


def time_in_turn(
    commands: dict[str, list[str] | Callable[[dict], list[str]]],
    folder: Path,
    repeats: int,
    seconds: float,
    say: Callable[[str], None] = lambda text: None,
    peers_keep_memory: bool = False,
) -> dict[str, Timing]:
    """Starts a worker for each side and times all of them, one after the other in every round.

    Args:
      commands: of the workers, by side; one may be a function of the timings of those before it.
      folder: of their logs.
      repeats: rounds; each begins with another side.
      seconds: about what a side takes in a round.
      say: is told what goes on.
      peers_keep_memory: whether glibc keeps what peers free, too, which is not their default.
    """
    timings, workers = {side: Timing() for side in commands}, {}

    def attempt(side: str, action: Callable[[], dict]) -> dict:
        try:
            return action()
        except SideFailed as failed:
            timings[side] = Timing(ready=timings[side].ready, error=str(failed))
            say(f"{side}: {failed}\n{workers[side].last_lines()}".rstrip())
            workers.pop(side).close()
            return {}

    try:
        for side, command in commands.items():
            if callable(command):
                command = command(timings)
            keeps = peers_keep_memory or side not in PEERS
            workers[side] = Worker(command, folder / f"{side}.log", keeps)
            ready = attempt(side, workers[side].answer).get("ready")
            if ready:
                steps = ready.get("steps") or steps_within(seconds, ready)
                timings[side] = Timing(steps=steps, ready=ready)
                say(f"{side}: ready, first call {ready['compile_seconds']:.2g} s")
        sides = list(commands)
        for number in range(repeats):
            first = number % len(sides)
            for side in sides[first:] + sides[:first]:
                if side not in workers:
                    continue
                time.sleep(SETTLE)
                timing = timings[side]
                answer = attempt(side, lambda side=side, t=timing: workers[side].go(t.steps))
                if answer:
                    timing.seconds.append(answer["seconds"])
                    timing.memory = max(timing.memory or 0, answer["memory"])
                    timing.parts += [answer["parts"]] if "parts" in answer else []
    finally:
        for worker in workers.values():
            worker.close()
    return timings
