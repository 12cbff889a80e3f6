"""Train every run of an experiment and compare them.

    python main.py --config=configs/digits.py --workdir=runs/digits

With --tune=N, each model's fields are searched with N trials first: see experiment/search.py. The
same command again skips finished runs, goes on with interrupted ones, and writes the report
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
from experiment.checks import check_teachers
from experiment.command import config_overrides, run_command
from experiment.fields import stored_config
from experiment.files import read_json, read_status, write_json
from experiment.grid import Run, check_folds, check_run_dir, expand, shard
from experiment.jobs import REPORT
from experiment.runner import STOPPED, Signals, divide, prepare_workdir, train_group
from experiment.search import Search, search_cure
from train import check_runs, train_and_evaluate, train_runs
from training import hosts


def main(argv: list[str]) -> int:
    """Runs the experiment of --config; returns the exit code."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: options are written --name=value")
    config = CONFIG.value
    if config is None or not WORKDIR.value:
        raise UserError("--config=configs/... and --workdir=runs/... are both needed")
    options, overrides = launch.options(SHARD.value), config_overrides(CONFIG)
    workdir = Path(WORKDIR.value).expanduser()
    grid = expand(config, overrides)
    trials = config.search.trials if TUNE.value is None else TUNE.value
    search = Search(config, overrides, workdir, trials) if trials else None
    searches = search.names() if search else []
    runs = launch.chosen(shard(grid, SHARD.value), options.only, searches)
    if hosts.several() and (search or options.launch or options.only == REPORT):
        raise UserError("--tune, --launch and --only=report are for one host: several train runs")
    if search and not options.only:
        print(search.describe())
    stages = [stage for stage in (searches, [run.name for run in runs]) if stage]
    if DRY_RUN.value:
        for run in runs:
            check_teachers(run.config)
        print(launch.shown(stages) if options.launch else shown(runs))
        return 0
    if not runs and SHARD.value:
        print(f"--shard={SHARD.value}: the grid of {len(grid)} runs leaves this shard without any")
        return 0
    workdir = prepare_workdir(hosts.own_folder(workdir))
    launch.prepare(options, workdir)
    use_compilation_cache(config.runtime.cache_dir)
    if options.only == REPORT:
        return write_report(workdir, config, {run.name for run in grid}, Signals())
    early = bool(options.only) and not search and not hosts.several()
    if early and (done := launch.result(runs, workdir)) is not None:
        return done
    identities, at_once = check(runs, workdir, search, alone=bool(options.only))
    if not options.only or not (workdir / "experiment.json").exists():
        plan = {"command": sys.argv, "runs": [run.name for run in grid], "identities": identities}
        write_json(workdir / "experiment.json", plan | {"compare": stored_config(config.compare)})
    if options.launch:
        return launch.launch(stages, options, workdir, at_once)
    return train(runs, workdir, at_once, search, options.only)


def train(
    runs: list[Run], workdir: Path, at_once: dict[str, int], search: Search | None, only: str
) -> int:
    """Searches, trains every run, and writes the report unless it is `only` for one job."""
    stop, held, asked = hosts.signals(), set(), {run.name for run in runs}
    if search:
        try:
            runs, at_once = tuned(runs, search, only, stop)
        except Interrupted as interrupted:
            print(interrupted, file=sys.stderr)
            return STOPPED
        if only and not asked:  # the job is the search
            return 0 if search.has_winner(only) else 1
        if not runs:
            return 1
    titles = {run.name: f"[{i}/{len(runs)}] {run.name}" for i, run in enumerate(runs, start=1)}
    for group in hosts.in_same_order(divide(runs, workdir, at_once)):
        held |= train_group(group, workdir, titles, train_runs, stop)
        if stop.requested:
            print("stopped by a signal; the same command goes on from here", file=sys.stderr)
            return STOPPED
    if (stop := hosts.leave(stop)) is None:
        return 0  # of several hosts, the first one says how it ended
    if only:
        return STOPPED if held else int(read_status(workdir / only) != "complete")
    if len(held) == len(runs):
        print("other processes train all of these runs; the last of them writes the report")
        return int(len(runs) < len(asked))  # some have no winner
    return write_report(workdir, CONFIG.value, asked - held, stop) or int(len(runs) < len(asked))


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


def check(
    runs: list[Run], workdir: Path, search: Search | None = None, alone: bool = False
) -> tuple[list[str], dict[str, int]]:
    """Finds every mistake that can be found before compute is spent; writes the audit.

    A run that is trained `alone` is one of an experiment that was audited, or will be.
    Returns the data's identities, and how many runs of a kin may be trained at once.
    """
    configs = search.check() if search else [run.config for run in runs]
    check_folds(workdir, configs[0].data.folds)
    for run in runs if not search else ():
        check_run_dir(run, workdir, search_cure(workdir))
    datasets, at_once = check_runs(configs, workdir)
    if not alone:
        largest = max(datasets, key=lambda dataset: len(dataset.rows["train"]))
        print(audit.describe(audit.write_audit(largest, workdir / "audit")), flush=True)
    known = set(read_json(workdir / "experiment.json").get("identities", []))
    return sorted(known | {dataset.identity for dataset in datasets}), at_once


def tuned(
    runs: list[Run], search: Search, only: str, stop: Signals
) -> tuple[list[Run], dict[str, int]]:
    """Searches, and returns the runs with the winners' fields, and what `check` does.

    A run whose search has no winner, or a newer one, is left out. Of `only` one job, its model is
    searched alone.
    """
    labels = [search.label(run) for run in runs] or [only.removeprefix("search/")]
    chosen = search.run(train_and_evaluate, stop, list(dict.fromkeys(labels)) if only else None)
    names = {run.name for run in runs}
    grid = expand(search.config, search.overrides, chosen)
    grid = [run for run in grid if search.label(run) in chosen]
    stale: dict[str, UserError] = {}  # models with runs of an earlier winner, maybe of other jobs
    for run in grid:
        try:
            check_run_dir(run, search.workdir, search.cure(run))
        except UserError as error:
            stale[search.label(run)] = error
    for error in stale.values():
        if only or len(stale) == len(chosen):
            raise error
        print(f"error: {error}", file=sys.stderr)
    runs = [run for run in grid if run.name in names and search.label(run) not in stale]
    return runs, check_runs([run.config for run in runs], search.workdir)[1]


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: configs/<name>.py")
    WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the runs and their report")
    SHARD = flags.DEFINE_string("shard", "", "i/n: train every n-th run, from the i-th on")
    TUNE = flags.DEFINE_integer("tune", None, "Trials of a search for each model's fields")
    launch.define_flags()
    DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Print the runs and their configs, and end")
    run_command(hosts.among_hosts(main))
