"""The trials of one model in an Optuna journal: what is tried next, and what came of it."""

import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from errors import UserError
from experiment.files import read_json, read_lines
from experiment.grid import Variant
from experiment.space import Choices, Space, points

STARTUP = 5  # random trials before tpe has something to go by


@dataclass(frozen=True)
class Plan:
    """The search of one model and variant: `trials` is its budget.

    `points` are all of its space, in the order in which they are tried; None where it has more than
    are tried.
    """

    label: str
    model: str
    variant: Variant
    space: Space
    trials: int
    points: list[dict[str, str]] | None
    epochs: int  # of a trial, at most

    def values(self, typed: dict[str, Any]) -> dict[str, Any]:
        """Returns the fields of a trial, by what the journal holds."""
        return {
            path: of.values[typed[path]] if isinstance(of, Choices) else typed[path]
            for path, of in self.space.items()
        }


def import_optuna():
    """Returns Optuna, silent but for warnings; raises a UserError where it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            "--tune needs the package optuna: pip install -c constraints.txt -e '.[search]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


class Study:
    """The trials of one plan in the journal. The search's lock is held at every call."""

    def __init__(self, plan: Plan, storage, options: ConfigDict):
        self.plan, self.storage, self.options, self.optuna = plan, storage, options, import_optuna()
        self.study = self.optuna.create_study(
            study_name=plan.label, storage=storage, load_if_exists=True, pruner=self._pruner()
        )

    def trials(self) -> list:
        """Returns all trials in order, as Optuna holds them."""
        return self.study.get_trials(deepcopy=False)

    def ask(self) -> int:
        """Draws what a new trial tries; returns its number."""
        kinds, trials = self.optuna.trial, self.trials()
        distributions = {path: self._distribution(path) for path in sorted(self.plan.space)}
        if self.plan.points is not None:
            tried = [trial.params for trial in trials]
            typed = next(point for point in self.plan.points if point not in tried)
        else:  # drawn in memory, so that the journal gets a trial in one line or not at all
            drawing = self.optuna.create_study(sampler=self._sampler(len(trials)))
            drawing.add_trials(trials)
            typed = drawing.ask(distributions).params
            tried = [trial.params for trial in trials]
            if typed in tried and all(isinstance(of, Choices) for of in self.plan.space.values()):
                left = [point for point in points(self.plan.space) if point not in tried]
                typed = left[self._seed(len(trials)) % len(left)]
        running = kinds.TrialState.RUNNING
        self.study.add_trial(
            kinds.create_trial(state=running, params=typed, distributions=distributions)
        )
        return len(trials)

    def is_worse(self, number: int, epoch: float, loss: float) -> bool:
        """Notes a validation loss; returns whether the trial is to be pruned."""
        key = self.storage.get_trial_id_from_study_id_trial_number(self.study._study_id, number)
        if self.storage.get_trial(key).state.is_finished():
            return  # by another process, where there are no locks
        step, known = max(1, round(epoch)), self.storage.get_trial(key)
        if known.user_attrs.get("pruned_at") == step:  # and killed before it could be told
            return True
        if step < (known.last_step or 0):  # a step that is trained again, and was decided
            return False
        if step not in known.intermediate_values:
            self.storage.set_trial_intermediate_value(key, step, loss)
        worse = self.study.pruner.prune(self.study, self.storage.get_trial(key))
        if worse:
            self.storage.set_trial_user_attr(key, "pruned_at", step)
        return worse

    def tell(self, number: int, record: dict) -> None:
        """Ends a trial. One that diverged is as bad as can be: tpe keeps away from there."""
        key = self.storage.get_trial_id_from_study_id_trial_number(self.study._study_id, number)
        for name, value in record.items():
            self.storage.set_trial_user_attr(key, name, value)
        status, states = record["status"], self.optuna.trial.TrialState
        if status in ("pruned", "failed"):
            self.study.tell(number, state=states.PRUNED if status == "pruned" else states.FAIL)
        else:
            self.study.tell(number, math.inf if status == "diverged" else record["loss"])

    def entries(self) -> list[dict]:
        """Returns what `search.json` holds of each trial."""
        keys = ("status", "loss", "accuracy", "epochs", "seconds", "error")
        return [
            {"number": trial.number, "parameters": self.plan.values(trial.params)}
            | ({} if trial.state.is_finished() else {"status": "running"})
            | {key: trial.user_attrs[key] for key in keys if key in trial.user_attrs}
            for trial in self.trials()
        ]

    def _distribution(self, path: str):
        of, kinds = self.plan.space[path], self.optuna.distributions
        if isinstance(of, Choices):
            return kinds.CategoricalDistribution(list(of.values))
        whole = isinstance(of.low, int)
        kind = kinds.IntDistribution if whole else kinds.FloatDistribution
        return kind(of.low, of.high, log=of.log)

    def _seed(self, number: int) -> int:
        return zlib.crc32(f"{self.options.seed}/{self.plan.label}/{number}".encode())

    def _sampler(self, number: int):
        """Returns what draws a trial, from a seed of its own: a restart draws the same."""
        samplers, seed = self.optuna.samplers, self._seed(number)
        if self.options.method == "tpe":
            return samplers.TPESampler(seed=seed, n_startup_trials=STARTUP)
        return samplers.RandomSampler(seed=seed)

    def _pruner(self):
        pruners, epochs = self.optuna.pruners, self.plan.epochs
        if self.options.prune == "median":
            return pruners.MedianPruner(n_startup_trials=STARTUP - 1, n_warmup_steps=epochs // 4)
        if self.options.prune == "halving":
            first = -(-epochs // 9)
            return pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=3)
        return pruners.NopPruner()


def mend(journal: Path) -> None:
    """Cuts off a last line that a killed process wrote half of: nobody has acted on it."""
    content = journal.read_bytes() if journal.exists() else b""
    if content and not content.endswith(b"\n"):
        with journal.open("rb+") as file:
            file.truncate(content.rfind(b"\n") + 1)


def best_of(trials: list[dict]) -> int | None:
    """Returns the number of the complete trial with the lowest validation loss, if there is one."""
    complete = [trial for trial in trials if trial.get("status") == "complete"]
    best = min(complete, key=lambda trial: (trial["loss"], trial["number"]), default=None)
    return best and best["number"]


def read_trial(run_dir: Path) -> dict:
    """Returns what became of a trial; of one that was pruned, its scores at its lowest loss."""
    summary, cost = read_json(run_dir / "summary.json"), {}
    cost = summary.get("cost", {})
    lines = [x for x in read_lines(run_dir / "metrics.jsonl") if x["split"] == "validation"]
    record = {
        "status": summary["status"],
        "epochs": lines[-1]["epoch"] if lines else 0.0,
        "seconds": cost.get("seconds", 0.0) + cost.get("compile_seconds", 0.0),
    }
    scores = {}
    if summary["status"] == "complete":
        scores = summary["metrics"]["validation"]
    elif summary["status"] == "pruned":
        scores = min(lines, key=lambda line: line["loss"])
    record |= {key: scores[key] for key in ("loss", "accuracy") if scores}
    return record | {key: summary[key] for key in ("error",) if key in summary}
