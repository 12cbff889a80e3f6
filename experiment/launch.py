"""Launchers: every run is a process of its own, `main.py ... --only=RUN`, on a shared workdir.

A launcher takes stages of jobs: a stage starts when all jobs of the one before have ended. Which
runs are done is known from their directories alone, so one that dies loses nothing.
"""

import difflib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import jax
from absl import flags

from errors import UserError, choose
from experiment import jobs, on_ray, slurm
from experiment.files import read_status
from experiment.grid import Run, check_run_dir
from experiment.jobs import REPORT
from experiment.machine import LAUNCHER, check_locks, end_with_launcher, held
from experiment.on_devices import DevicePool
from experiment.runner import FINAL, STOPPED, Signals

TRIES = 4  # of a job that stops with 75 or is killed
# What concerns the launcher, not its jobs.
OWN = re.compile(r"--?(?:launch|workers|only|shard|slurm|ray_address)(=.*)?", re.DOTALL)
DRY_RUN = re.compile(r"--?(?:no)?dry_run(=.*)?")


@dataclass(frozen=True)
class Options:
    """What the command line says of launching."""

    launch: str
    only: str
    workers: int
    slurm: str
    ray_address: str


def define_flags() -> None:
    """Defines the flags of `Options`."""
    flags.DEFINE_string("launch", "", "local | slurm | ray: train each run in its own process")
    flags.DEFINE_string("only", "", "One job: a run such as cnn/seed0, search/cnn, or report")
    flags.DEFINE_integer("workers", 0, "Runs at a time under --launch; 0: one a device", 0)
    flags.DEFINE_string("slurm", "", "Options of sbatch: partition=gpu,gres=gpu:1,time=04:00:00")
    flags.DEFINE_string("ray_address", "", "auto or an address: the cluster of --launch=ray")


def options(shard: str) -> Options:
    """Returns the flags' values; raises UserError where they contradict each other or --shard."""
    given = Options(*(flags.FLAGS[field.name].value for field in fields(Options)))
    if sum(map(bool, (given.launch, given.only, shard))) > 1:
        raise UserError(
            "--launch takes the whole grid, --shard a part of it, --only one run: give one of them"
        )
    if given.launch:
        choose("--launch", given.launch, LAUNCHERS)
    if given.launch == "ray" and not importlib.util.find_spec("ray"):
        raise UserError("--launch=ray needs Ray: pip install -e '.[ray]'")
    for name, launcher in (("slurm", "slurm"), ("ray_address", "ray")):
        if getattr(given, name) and given.launch != launcher:
            raise UserError(f"--{name} is for --launch={launcher}")
    slurm.sbatch_options(given.slurm)
    if given.workers and not given.launch:
        raise UserError("--workers is for --launch=local, slurm or ray")
    if given.only:
        end_with_launcher()
    return given


def chosen(runs: list[Run], only: str, searches: Collection[str] = ()) -> list[Run]:
    """Returns the run that --only names, none for a search or the report, all for ""."""
    if not only or only == REPORT or only in searches:
        return [] if only else runs
    found = [run for run in runs if run.name == only]
    if not found:
        names = [*searches, *(run.name for run in runs)]
        near = difflib.get_close_matches(only, names, n=3, cutoff=0.0)
        if only.startswith("search/") and not searches:
            raise UserError(f"--only={only}: a search needs --tune=N, or config.search.trials")
        raise UserError(
            f"--only={only}: none of the {len(names)} jobs here. The nearest: {', '.join(near)}"
        )
    return found


def result(runs: list[Run], workdir: Path) -> int | None:
    """Returns the exit code of the run that --only names if it is finished, and says so."""
    for run in runs:
        check_run_dir(run, workdir)
        status = read_status(workdir / run.name)
        if status in FINAL:
            print(f"{run.name}: {status} already")
            return int(status != "complete")
    return None


def command(name: str) -> list[str]:
    """Returns the command line of a job: this process's, for one run."""
    words, kept = flags.FLAGS.read_flags_from_files(sys.argv[1:]), []
    while words:
        word = words.pop(0)
        match = OWN.fullmatch(word)
        if not match:
            kept += [] if DRY_RUN.fullmatch(word) else [word]
        elif match[1] is None:
            words[:1] = []  # its value
    return [sys.executable, os.path.abspath(sys.argv[0]), *kept, f"--only={name}"]


def prepare(options: Options, workdir: Path) -> None:
    """Keeps a launcher off its jobs' devices; raises UserError where no locks protect a run."""
    if options.launch:
        check_locks(workdir, hosts=options.launch == "slurm" or bool(options.ray_address))
        jax.config.update("jax_platforms", "cpu")


def launch(
    stages: list[list[str]], options: Options, workdir: Path, at_once: Mapping[str, int]
) -> int:
    """Runs stages of jobs, then the report; returns the exit code.

    Args:
      stages: names of jobs, which `main.py --only=NAME` knows.
      options: of the command line.
      workdir: which every job can read and write.
      at_once: how many seeds could be trained in one process.
    """
    if max(at_once.values(), default=1) > 1:
        print("note: heads of several seeds, which one process trains at once, train one by one")
    return LAUNCHERS[options.launch](stages, options, workdir)


# --- local and Ray: jobs that this process watches ----------------------------------------------


class Pool(Protocol):
    """Where jobs run: some places, of which each takes one job at a time."""

    places: list[str]
    verb: str  # "running on": what a job does there

    def start(self, name: str, place: int) -> Any:
        """Starts a job and returns its handle."""

    def poll(self, handle: Any) -> int | None:
        """Returns a job's exit code, negative if it was killed; None while it runs."""

    def stop(self, handle: Any) -> None:
        """Asks a job to save and stop."""


def local(stages: list[list[str]], options: Options, workdir: Path) -> int:
    """Runs jobs on the devices of this machine."""
    pool = DevicePool(command, workdir, options.workers)
    return watch(stages, pool, workdir, Signals())


def watch(stages: list[list[str]], pool: Pool, workdir: Path, stop: Signals) -> int:
    """Runs stages of jobs in a pool and then the report, under a table; returns the exit code."""
    names = [name for stage in stages for name in stage]
    print(
        f"{len(names)} jobs, {len(pool.places)} at a time: {', '.join(dict.fromkeys(pool.places))}"
    )
    table, codes = jobs.Table(names, workdir), {}
    for stage in stages:
        codes |= Watch(stage, pool, workdir, table, stop).run()
    if stop.requested:
        print("stopped by a signal; the same command goes on from here", file=sys.stderr)
        return STOPPED
    written = report(stop)
    failed = [code for code in codes.values() if code not in (0, STOPPED)]
    return 1 if failed else STOPPED if STOPPED in codes.values() else written


class Watch:
    """The jobs of a stage: `waiting`, `running` by place, and the exit codes of the others."""

    def __init__(
        self, names: list[str], pool: Pool, workdir: Path, table: jobs.Table, stop: Signals
    ):
        self.pool, self.workdir, self.table, self.stop = pool, workdir, table, stop
        self.waiting, self.running = list(names), {}
        self.codes, self.tries = {}, Counter()

    def run(self) -> dict[str, int]:
        """Returns the exit codes of all jobs by name, when all have ended."""
        looked = stopping = False
        while self.waiting or self.running:
            if self.stop.requested and not stopping:
                stopping = True
                for _, handle in self.running.values():
                    self.pool.stop(handle)
            for place, (name, handle) in list(self.running.items()):
                if (code := self.pool.poll(handle)) is not None:
                    del self.running[place]
                    self.ended(name, code)
            for name in list(self.waiting):
                if looked and len(self.running) == len(self.pool.places) and not stopping:
                    break
                self.look_at(name)
            looked = True
            self.table.draw()
            time.sleep(0.2 if self.running else 0.0 if not self.waiting else 1.0)
        return self.codes

    def look_at(self, name: str) -> None:
        """Starts a waiting job, if it is not done, nobody else trains it, and a place is free."""
        status = read_status(self.workdir / name)
        free = [i for i in range(len(self.pool.places)) if i not in self.running]
        if status in FINAL:
            self.end(name, int(status != "complete"), jobs.outcome(self.workdir / name))
        elif self.stop.requested:
            self.end(name, STOPPED, "stopped")
        elif held(self.workdir / name / ".lock"):
            self.table.set(name, "another process trains it")
        elif free:
            try:
                self.running[free[0]] = name, self.pool.start(name, free[0])
            except OSError as error:
                self.end(name, 1, f"failed: {error}")
                return
            self.waiting.remove(name)
            self.tries[name] += 1
            self.table.set(name, f"{self.pool.verb} {self.pool.places[free[0]]}", begins=True)

    def ended(self, name: str, code: int) -> None:
        """Notes that a process ended; what can go on waits for its next try."""
        run_dir = self.workdir / name
        what = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        if code == 0:
            self.end(name, 0, jobs.outcome(run_dir) or "complete")
        elif self.stop.requested:
            self.end(name, STOPPED, "stopped")
        elif (code < 0 or code == STOPPED) and self.tries[name] < TRIES:
            self.waiting.insert(0, name)
            self.table.set(name, f"waiting ({what}, try {self.tries[name]} of {TRIES})")
        else:
            known = jobs.outcome(run_dir) if code == 1 else ""
            self.end(name, code, known or f"failed: {what}")
            log = jobs.log_file(self.workdir, name)
            self.table.say(f"{log} ends with:\n{jobs.last_lines(log)}")

    def end(self, name: str, code: int, state: str) -> None:
        """Notes a job's exit code."""
        self.codes[name] = code
        if name in self.waiting:
            self.waiting.remove(name)
        self.table.set(name, state, ends=True)


def report(stop: Signals) -> int:
    """Has a process of its own write the report, with the devices; returns its exit code."""
    process = subprocess.Popen(
        command(REPORT), env={**os.environ, LAUNCHER: str(os.getpid())}, start_new_session=True
    )
    asked = False
    while process.poll() is None:
        if stop.requested and not asked:
            process.terminate()
            asked = True
        time.sleep(0.1)
    return STOPPED if stop.requested else process.returncode


def ray(stages: list[list[str]], options: Options, workdir: Path) -> int:
    """Runs jobs as tasks of Ray, on this machine or on a cluster."""
    count = max(map(len, stages))
    with on_ray.pool(command, workdir, options.workers, options.ray_address, count) as pool:
        return watch(stages, pool, workdir, Signals())


# --- SLURM: a script ----------------------------------------------------------------------------


def by_slurm(stages: list[list[str]], options: Options, workdir: Path) -> int:
    """Writes a job array, and submits it where there is sbatch."""
    left = [
        [name for name in stage if read_status(workdir / name) not in FINAL] for stage in stages
    ]
    stages = [stage for stage in (*left, [REPORT]) if stage]
    slurm.launch(stages, command, workdir, options.workers, options.slurm)
    return 0


def shown(stages: list[list[str]]) -> str:
    """Returns the command lines of jobs, stage by stage."""
    return "\n".join(
        f"stage {number}: {shlex.join(command(name))}"
        for number, stage in enumerate((*stages, [REPORT]), start=1)
        for name in stage
    )


LAUNCHERS: dict[str, Callable] = {"local": local, "slurm": by_slurm, "ray": ray}
