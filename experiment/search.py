"""A search for fields: the same number of trials for every model, judged on validation images.

Trials are ordinary runs in WORKDIR/search/<label>/trial<k>; they never see test images, and their
seed is none of the experiment's. An Optuna journal is shared by all processes that run the same
command: each asks for a trial, trains it, and tells its loss. What a trial tries depends on
`search.seed`, its number and, with tpe, on those before it; so a search by one process is the same
however often it is stopped. `search.json` says it all without Optuna.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from errors import Interrupted, Pruned, UserError
from experiment.checks import TRIAL_SEED, check_config
from experiment.fields import phase_config, phase_names
from experiment.files import read_json, read_status, write_json
from experiment.grid import (
    Run,
    Variant,
    check_run_dir,
    expand,
    label_of,
    pairs,
    run_config,
    with_seed,
)
from experiment.machine import locked
from experiment.runner import FINAL, Signals, train_group
from experiment.space import check_space, corners, points, read_space, size
from experiment.study import STARTUP, Plan, Study, best_of, import_optuna, mend, read_trial

FAILURES = 3  # of one model's trials, after which a process leaves the others
WAIT = 1.0  # seconds between looks at the trials of other processes


class Search:
    """The search of an experiment: a study for each of its models and variants."""

    def __init__(self, config: ConfigDict, overrides: dict, workdir: Path, trials: int):
        """`trials` is the budget of each; raises a UserError for a mistake in the space."""
        import_optuna()
        if trials < 1:
            raise UserError(f"--tune={trials}: give a number of trials, 1 or more")
        self.config, self.overrides, self.workdir = config, overrides, workdir
        self.folder, self.budget, self.options = workdir / "search", trials, config.search
        self.plans: dict[str, Plan] = {}
        self.studies: dict[str, Study] = {}
        self.failed: set[tuple[str, int]] = set()  # trials that this process tries no more
        for model, variant in pairs(config):
            settings = run_config(config, model, variant, overrides, {})
            plan = self._plan(model, variant, settings)
            if plan.label in self.plans:
                raise UserError(f"two searches share the folder {plan.label}: rename the variant")
            self.plans[plan.label] = plan
        if not any(plan.space for plan in self.plans.values()):
            raise UserError(
                f"config.search.space={self.options.space!r} names no field that matters to "
                f"{', '.join(self.plans)}: name one, or leave --tune out"
            )

    def _plan(self, model: str, variant: Variant, settings: ConfigDict) -> Plan:
        if settings.data.folds:
            raise UserError(
                "--tune with config.data.folds would choose fields on images that other folds "
                "test: search without folds. Folds of a command with the winner's fields then look "
                "better than they are, as far as the search saw their images"
            )
        space = read_space(self.options.space, settings)
        check_space(space, settings, variant, self.overrides)
        whole = self.options.method == "grid" or size(space) <= self.budget  # each point once
        every = points(space) if whole else None
        trials = len(every) if whole else self.budget
        label = label_of(model, variant.name)
        return Plan(label, model, variant, space, trials, every, epochs_of(settings))

    def names(self) -> list[str]:
        """Returns the folders of all searches in the workdir: the names of their jobs."""
        return [f"search/{label}" for label in self.plans]

    def has_winner(self, name: str) -> bool:
        """Returns whether one of them ended with a winner."""
        labels = read_json(self.folder / "search.json").get("labels", {})
        of = labels.get(name.removeprefix("search/"), {"trials": [], "budget": 0})
        running = [t for t in of["trials"][: of["budget"]] if t.get("status") == "running"]
        whole = len(of["trials"]) >= of["budget"] and not running
        return whole and of.get("winner") is not None

    # --- before training --------------------------------------------------------------------------

    def describe(self) -> str:
        """Returns what is searched, a line a model; says where the budget is another."""
        lines = []
        for plan in self.plans.values():
            over = "; ".join(f"{path}={of}" for path, of in plan.space.items())
            what = f"{self.options.method} over {over}"
            if not plan.space:
                what = "no searched field matters to it"
            elif plan.trials != self.budget:
                what += f": each of its points once, in place of --tune={self.budget}"
            elif self.options.method == "tpe" and plan.trials <= STARTUP and plan.points is None:
                what += f", whose first {STARTUP} trials are random: give more"
            trials = f"{plan.trials} trial" + "s" * (plan.trials > 1)
            lines.append(f"search/{plan.label}: {trials}: {what}")
        return "\n".join(lines)

    def check(self) -> list[ConfigDict]:
        """Finds mistakes before compute is spent: ends of the space, what the workdir holds.

        Returns the configs at both ends of each space, to be checked with the data.
        """
        ends = []
        for plan in self.plans.values():
            at = [self._config(plan, values) for values in corners(plan.space)]
            ends += [at[0], at[-1]] if plan.space else at[:1]
        stored = self._check_stored()
        self._check_winners(stored)
        for run in expand(self.config, self.overrides):
            label = self.label(run)
            paths = self.plans[label].space
            free = {f"phase.{name}.{p}" for p in paths for name in phase_names(run.config)}
            check_run_dir(run, self.workdir, free=free | paths.keys())
            if (self.workdir / run.name / "config.json").exists() and label not in stored:
                raise UserError(
                    f"{self.workdir / run.name} holds a run that was not tuned: use another "
                    "--workdir for the search, or leave --tune out"
                )
        return ends

    def _check_winners(self, labels: dict) -> None:
        """Refuses fewer trials than before if another one wins than the runs were trained with."""
        chosen = {}
        for label in labels.keys() & self.plans.keys():
            trials, budget = labels[label]["trials"], self.plans[label].trials
            number = best_of(trials[:budget]) if budget <= len(trials) else None
            if number is not None:
                chosen[label] = trials[number]["parameters"]
        for run in expand(self.config, self.overrides, chosen):
            label = self.label(run)
            if label in chosen:
                cure = f"Of the first {self.plans[label].trials} trials, another wins than that of "
                cure += f"these runs: give --tune={labels[label]['budget']} as then, or delete them"
                check_run_dir(run, self.workdir, cure)

    def _check_stored(self) -> dict:
        """Refuses another space, method, seed or config; returns what is stored of each label."""
        stored = read_json(self.folder / "search.json")
        labels = stored.get("labels", {})
        lines = [
            f"  {key}: stored {stored[key]!r}, now {self.options[key]!r}"
            for key in ("method", "seed", "prune")
            if stored and stored[key] != self.options[key]
        ]
        for label in labels.keys() & self.plans.keys():
            old = labels[label]["space"]
            now = {path: str(of) for path, of in self.plans[label].space.items()}
            lines += [
                f"  {label}: {path}: stored {old.get(path, 'nothing')}, "
                f"now {now.get(path, 'nothing')}"
                for path in sorted(old.keys() | now.keys())
                if old.get(path) != now.get(path)
            ]
        cure = (
            f"Undo the change, use another --workdir, or delete {self.folder} and the runs of its "
            "winners. More trials, with a greater --tune=N, go on from there"
        )
        if lines:
            raise UserError("\n".join([f"{self.folder} holds another search:", *lines, cure]))
        for label in labels.keys() & self.plans.keys():
            plan = self.plans[label]
            for trial in labels[label]["trials"]:
                name = self._name(plan, trial["number"])
                if (self.workdir / name / "config.json").exists():  # or its fields do not fit
                    config = self._config(plan, trial["parameters"])
                    check_run_dir(Run(name, config), self.workdir, cure)
        return labels

    def _config(self, plan: Plan, values: dict[str, Any]) -> ConfigDict:
        """Returns the config of a trial."""
        values = {path: tuple(v) if isinstance(v, list) else v for path, v in values.items()}
        config = run_config(self.config, plan.model, plan.variant, self.overrides, values)
        config.predict_test = False
        check_config(config)
        # Trials have a seed of their own, of which there is no teacher.
        first = config.distill.teacher.replace("{seed}", str(self.config.seeds[0]))
        config.distill.teacher = first
        return with_seed(config, TRIAL_SEED + self.options.seed)

    # --- the trials -------------------------------------------------------------------------------

    def run(self, train: Callable, stop: Signals, labels: list[str] | None = None) -> dict:
        """Trains what is left of all trials; returns the winners' fields by label.

        A label without a winner is missing, and said why. Where other processes train the last
        trials, waits for them, and takes over those of a process that dies.

        Args:
          train: as `train.train_and_evaluate`.
          stop: asked after every step.
          labels: of the plans to go through, all of them by default.

        Raises:
          Interrupted: `stop` was requested, and the state is saved.
        """
        plans = [self.plans[label] for label in labels or self.plans]
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._exclusive():
            self._check_stored()
            self._write()
        waits = False
        while True:
            for plan in plans:
                while claim := self._claim(plan):
                    number, lock = claim
                    with lock:
                        self._train(plan, number, train, stop)
                    if stop.requested:
                        raise Interrupted("stopped by a signal; the same command goes on from here")
            with self._exclusive():
                left = {plan.label: self._left(plan) for plan in plans}
            if all(plan.label in self._given_up() or not left[plan.label] for plan in plans):
                break
            if not waits:
                print("search: waiting for the trials of other processes", flush=True)
            waits = True
            time.sleep(WAIT)
            if stop.requested:
                raise Interrupted("stopped while other processes train the last trials")
        return self._winners(plans, left)

    @staticmethod
    def label(run: Run) -> str:
        """Returns the label of a run's search."""
        return label_of(run.config.model.name, run.config.variant)

    def cure(self, run: Run) -> str:
        """Returns what to do where a run was trained with the fields of an earlier winner."""
        label = self.label(run)
        winner = read_json(self.folder / "search.json")["labels"][label]["winner"]
        return (
            f"Of {self.plans[label].trials} trials, trial {winner} is the winner of {label}; these "
            f"runs were trained with another's fields. Delete the {label} runs in "
            f"{self.workdir / run.config.model.name} to train the new one, or ask for as many "
            "trials as then, with --tune=N"
        )

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Keeps other processes from the journal, which a killed one may have left half written."""
        with locked(self.folder / ".lock", wait=True):
            journal = self.folder / "journal.log"
            mend(journal)
            if not self.studies:
                storages = import_optuna().storages
                backend = storages.journal.JournalFileBackend(str(journal))
                storage = storages.JournalStorage(backend)
                for label, plan in self.plans.items():
                    self.studies[label] = Study(plan, storage, self.options)
            yield

    def _name(self, plan: Plan, number: int) -> str:
        return f"search/{plan.label}/trial{number}"

    def _given_up(self) -> set[str]:
        """Returns the labels of which so many trials failed that the others are left."""
        labels = [label for label, _ in self.failed]
        return {label for label in labels if labels.count(label) >= FAILURES}

    def _left(self, plan: Plan) -> int:
        """Returns how many trials have not ended, but for those that failed here."""
        trials = self.studies[plan.label].trials()[: plan.trials]
        ended = sum(t.state.is_finished() or (plan.label, t.number) in self.failed for t in trials)
        return plan.trials - ended

    def _claim(self, plan: Plan) -> tuple[int, ExitStack] | None:
        """Returns a trial that no process works on, new or left by a dead one, and its lock."""
        if plan.label in self._given_up():
            return None
        with self._exclusive():
            study = self.studies[plan.label]
            trials = study.trials()[: plan.trials]
            numbers = [t.number for t in trials if not t.state.is_finished()]
            numbers = [number for number in numbers if (plan.label, number) not in self.failed]
            for number in numbers + [None] * (len(trials) < plan.trials):
                number = study.ask() if number is None else number
                run_dir, lock = self.workdir / self._name(plan, number), ExitStack()
                run_dir.mkdir(parents=True, exist_ok=True)
                if lock.enter_context(locked(run_dir / ".trial")):
                    return number, lock
                lock.close()
        return None

    def _train(self, plan: Plan, number: int, train: Callable, stop: Signals) -> None:
        """Trains a claimed trial and tells what became of it, unless it was interrupted.

        One that failed is tried again by the next command; if it fails then, it is spent.
        """
        study, name = self.studies[plan.label], self._name(plan, number)
        run_dir, title = self.workdir / name, f"[{number + 1}/{plan.trials}] search {plan.label}"
        with self._exclusive():
            values = plan.values(study.trials()[number].params)
        title += "".join(f", {path}={shown(value)}" for path, value in values.items())
        before = read_status(run_dir)
        try:
            run = Run(name, self._config(plan, values))
        except UserError as error:  # of values that do not go together
            self._tell(plan, number, {"status": "failed", "error": str(error)})
            print(f"{title}: failed: {error}", file=sys.stderr, flush=True)
            return

        last = epochs_of(run.config)

        def watch(epoch: float, loss: float) -> None:
            with self._exclusive():
                worse = study.is_worse(number, epoch, loss)
            if worse and epoch < last:
                raise Pruned(f"validation loss {loss:.4g} after epoch {epoch:g}")

        watching = watch if self.options.prune != "none" else None

        def train_one(configs: list, run_dirs: list[Path], should_stop: Callable) -> list[dict]:
            return [train(configs[0], run_dirs[0], should_stop, watching)]

        train_group([run], self.workdir, {name: title}, train_one, stop)
        status = read_status(run_dir)
        if status in FINAL or (status == before == "failed"):
            self._tell(plan, number, read_trial(run_dir))
        elif not stop.requested:
            self.failed.add((plan.label, number))

    def _tell(self, plan: Plan, number: int, record: dict) -> None:
        with self._exclusive():
            self.studies[plan.label].tell(number, record)
            self._write()

    def _write(self) -> None:
        """Writes search.json; of models that are not searched now, what it held."""
        labels = read_json(self.folder / "search.json").get("labels", {})
        for label, plan in self.plans.items():
            trials = self.studies[label].entries()
            labels[label] = {
                "space": {path: str(of) for path, of in plan.space.items()},
                "budget": plan.trials,
                "trials": trials,
                "winner": best_of(trials[: plan.trials]),
            }
        about = {key: self.options[key] for key in ("space", "method", "seed", "prune")}
        content = about | {"budget": self.budget, "labels": labels}
        write_json(self.folder / "search.json", content)

    def _winners(self, plans: list[Plan], left: dict[str, int]) -> dict[str, dict]:
        """Returns the fields of each winner, and says who it is."""
        winners = {}
        for plan in plans:
            with self._exclusive():
                trials = self.studies[plan.label].entries()[: plan.trials]
            number, name = best_of(trials), f"search/{plan.label}"
            failed = [number for label, number in self.failed if label == plan.label]
            if left[plan.label] or failed:
                why = f"trials {', '.join(map(str, sorted(failed)))} failed: see above. The same "
                print(f"{name}: {why}command tries them again, once", file=sys.stderr)
            elif number is None:
                why = f"none of {plan.trials} trials is complete: search in another space, with "
                print(f"{name}: {why}lower learning rates", file=sys.stderr)
            else:
                found = trials[number]
                winners[plan.label] = found["parameters"]
                fields = [f", {p}={shown(value)}" for p, value in found["parameters"].items()]
                print(
                    f"{name}: trial {number} of {plan.trials} wins with validation loss "
                    f"{found['loss']:.4f}, accuracy {found['accuracy']:.4f}{''.join(fields)}",
                    flush=True,
                )
        return winners


def search_cure(workdir: Path) -> str:
    """Returns what to do where the runs of a workdir, of which some were tuned, are others now."""
    if not (budget := read_json(workdir / "search" / "search.json").get("budget")):
        return ""
    return f"This workdir's runs were tuned: give --tune={budget} as then, or use another --workdir"


def epochs_of(config: ConfigDict) -> int:
    """Returns the epochs of all phases of a run."""
    return sum(phase_config(config, name).epochs for name in phase_names(config))


def shown(value: Any) -> str:
    """Returns a value with four digits, if it is a number."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
