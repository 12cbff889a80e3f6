"""Train every run of an experiment and compare them.

    python main.py --config=configs/digits.py --workdir=runs/digits

The same command again skips finished runs, goes on with interrupted ones, and writes the report
anew. Exit codes: 0 all complete; 1 a run failed or diverged; 2 a mistake in config, data or
command; 75 stopped by a signal with the state saved, so run the same command again.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before JAX is imported: XLA's own notices

from absl import flags
from ml_collections import ConfigDict, config_flags

from analysis import audit
from analysis.forward import use_compilation_cache
from analysis.runs import incomplete, load_runs
from errors import Interrupted, UserError
from experiment import launch
from experiment.command import config_overrides, run_command
from experiment.fields import stored_config
from experiment.files import read_json, read_status, write_json
from experiment.grid import Run, check_run_dir, expand, shard
from experiment.jobs import REPORT
from experiment.runner import STOPPED, Signals, divide, prepare_workdir, train_group
from train import check_runs, train_runs


def main(argv: list[str]) -> int:
    """Runs the experiment of --config; returns the exit code."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: options are written --name=value")
    config = CONFIG.value
    if config is None or not WORKDIR.value:
        raise UserError("--config=configs/... and --workdir=runs/... are both needed")
    options = launch.options(SHARD.value)
    grid = expand(config, config_overrides(CONFIG))
    runs = launch.chosen(shard(grid, SHARD.value), options.only)
    stages = [[run.name for run in runs]]
    if DRY_RUN.value:
        print(launch.shown(stages) if options.launch else shown(runs))
        return 0
    if not runs and SHARD.value:
        print(f"--shard={SHARD.value}: the grid of {len(grid)} runs leaves this shard without any")
        return 0
    workdir = prepare_workdir(Path(WORKDIR.value).expanduser())
    launch.prepare(options, workdir)
    use_compilation_cache(config.runtime.cache_dir)
    if options.only and (done := launch.result(runs, workdir)) is not None:
        return done
    if options.only != REPORT:
        identities, at_once = check(runs, workdir, alone=bool(options.only))
        if not options.only or not (workdir / "experiment.json").exists():
            plan = {"command": sys.argv, "runs": [run.name for run in grid]}
            plan |= {"identities": identities, "compare": stored_config(config.compare)}
            write_json(workdir / "experiment.json", plan)
    if options.launch:
        return launch.launch(stages, options, workdir, at_once)

    stop, held = Signals(), set()
    titles = {run.name: f"[{i}/{len(runs)}] {run.name}" for i, run in enumerate(runs, start=1)}
    for group in divide(runs, workdir, at_once) if runs else ():
        held |= train_group(group, workdir, titles, train_runs, stop)
        if stop.requested:
            print("stopped by a signal; the same command goes on from here", file=sys.stderr)
            return STOPPED
    if runs and options.only:
        return STOPPED if held else int(read_status(workdir / options.only) != "complete")
    if runs and len(held) == len(runs):
        print("other processes train all of these runs; the last of them writes the report")
        return 0
    ours = {run.name for run in runs or grid} - held  # --only=report is of the grid
    return write_report(workdir, config, ours, stop)


def shown(runs: list[Run]) -> str:
    """Returns the names of runs with their configs."""
    return "\n".join(
        f"{run.name}\n{json.dumps(stored_config(run.config), indent=2)}" for run in runs
    )


def write_report(workdir: Path, config: ConfigDict, ours: set[str], stop: Signals) -> int:
    """Writes the report; returns the exit code, 1 if one of our runs is not complete."""

    def progress(text: str) -> None:
        print(text, flush=True)
        if stop.requested:
            raise Interrupted("stopped while the report was made; its page holds what is there")

    from analysis import report  # statistics and plots, which training does not wait for

    left = bool(SHARD.value) and incomplete(workdir, load_runs(workdir))
    try:  # of several shards, the last one runs the models
        made = report.write_report(workdir, config.compare, models=not left, progress=progress)
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        return STOPPED
    print(f"\n{made.text}\n\nreport: {made.page}")
    return 1 if any(name in ours for name in made.not_complete) else 0


def check(runs: list[Run], workdir: Path, alone: bool = False) -> tuple[list[str], dict[str, int]]:
    """Finds every mistake that can be found before compute is spent; writes the audit.

    A run that is trained `alone` is one of an experiment that was audited, or will be.
    Returns the data's identities, and how many runs of a kin may be trained at once.
    """
    for run in runs:
        check_run_dir(run, workdir)
    datasets, at_once = check_runs([run.config for run in runs], workdir)
    if not alone:
        print(audit.describe(audit.write_audit(datasets[0], workdir / "audit")), flush=True)
    known = set(read_json(workdir / "experiment.json").get("identities", []))
    return sorted(known | {dataset.identity for dataset in datasets}), at_once


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: configs/<name>.py")
    WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the runs and their report")
    SHARD = flags.DEFINE_string("shard", "", "i/n: train every n-th run, from the i-th on")
    launch.define_flags()
    DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Print the runs and their configs, and end")
    run_command(main)
