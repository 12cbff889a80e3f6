"""Read run directories: the contract between training and analysis."""

import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from analysis.criterion import criterion_of, values
from errors import UserError
from experiment.checks import why_incomplete
from experiment.files import read_json, read_lines, run_dirs
from experiment.grid import family


@dataclass(frozen=True)
class FinishedRun:
    """The directory of one trained model; `status` says whether its training is complete."""

    path: Path
    name: str  # relative to the workdir
    config: dict
    summary: dict
    model: str  # name of the architecture
    variant: str  # swept fields beside the model and the seed, "" for none
    seed: int
    folds: tuple["FinishedRun", ...] = ()  # see `folds.CrossValidated`

    @property
    def fold(self) -> int | None:
        """Which fold of a cross-validation this run is; None for none, and for all together."""
        data = self.config.get("data", {})
        return data.get("fold") if data.get("folds") and not self.folds else None

    @property
    def status(self) -> str:
        """`complete`, `diverged`, `failed`, or `not finished`."""
        return self.summary.get("status", "not finished")

    @property
    def state(self) -> str:
        """The status, and the error behind it."""
        error = self.summary.get("error", "").strip().split("\n")[0]
        return f"{self.status}: {error}" if error else self.status

    @property
    def label(self) -> str:
        """Model and variant, as a reader sees them."""
        return f"{self.model} ({self.variant})" if self.variant else self.model

    @property
    def train_fraction(self) -> float:
        """The share of the training images that it was trained on: see configs/base.py."""
        return self.config.get("data", {}).get("train_fraction", 1.0)

    @property
    def kind(self) -> str:
        """The label without the share of the training images."""
        parts = [p for p in self.variant.split(", ") if not p.startswith("train_fraction=")]
        variant = ", ".join(parts)
        return f"{self.model} ({variant})" if variant else self.model

    @property
    def cost(self) -> dict:
        """What the run cost; older versions stored a multiply-add as two operations."""
        cost = self.summary["cost"]
        old = cost.get("flops_per_image")
        return cost if old is None else {"multiply_adds_per_image": old / 2} | cost

    @cached_property
    def dataset(self) -> dict:
        """Content of dataset.json."""
        return self._read("dataset.json")

    @cached_property
    def environment(self) -> dict:
        """Content of environment.json."""
        return self._read("environment.json")

    @cached_property
    def metrics(self) -> list[dict]:
        """Lines of metrics.jsonl."""
        return read_lines(self.path / "metrics.jsonl")

    @cached_property
    def test(self) -> dict[str, np.ndarray]:
        """Test predictions: ids [N], labels int32 [N], logits float32 [N, K]."""
        return self._read("predictions_test.npz")

    @cached_property
    def validation(self) -> dict[str, np.ndarray]:
        """Validation predictions, as `test`."""
        return self._read("predictions_validation.npz")

    @cached_property
    def predicted(self) -> np.ndarray:
        """Classes predicted for the test images: int [N]."""
        return self.test["logits"].argmax(axis=1)

    @cached_property
    def correct(self) -> np.ndarray:
        """Which test images are classified correctly: bool [N]."""
        return self.predicted == self.test["labels"]

    @cached_property
    def clusters(self) -> np.ndarray | None:
        """Numbers of the groups of `data.groups` of the test images, int [N]; None without any."""
        return clusters_of(self.test)

    @property
    def criterion(self) -> str:
        """What models are compared by: see `criterion_of`."""
        return criterion_of(self.config)

    def validation_score(self, criterion: str) -> float:
        """Returns the criterion on the validation images, by which models are ranked."""
        return float(values_of([self], criterion, "validation").mean())

    @property
    def class_names(self) -> list[str]:
        """Names in the order of the logits."""
        return self.dataset["class_names"]

    def _read(self, name: str) -> dict:
        path = self.path / name
        try:
            if path.suffix == ".json":
                return json.loads(path.read_text(encoding="utf-8"))
            with np.load(path, allow_pickle=False) as file:
                content = dict(file)
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            if name == "predictions_test.npz" and not self.config.get("predict_test", True):
                why = "is the trial of a search, which never sees test images"
                raise UserError(f"{self.path} {why}: take a run of its winner") from error
            raise UserError(f"{path} cannot be read ({error}): train that run again") from error
        if not np.isfinite(content["logits"]).all():
            raise UserError(
                f"{path} holds logits that are not finite: the training diverged, so train "
                "that run again, for instance with a lower learning rate"
            )
        return content


Groups = dict[str, list[FinishedRun]]  # complete runs by label, the best on validation first


def load_run(run_dir: Path) -> FinishedRun:
    """Returns the complete run of one directory; raises UserError if it is none."""
    run = _read_run(run_dir)
    if run.status != "complete":
        why = why_incomplete(run_dir, run.state)
        raise UserError(f"{run_dir} is not the directory of a complete run ({why})")
    return run


def _read_run(run_dir: Path) -> FinishedRun:
    """Returns a run in any state; one whose files are damaged has failed."""
    try:
        config = read_json(run_dir / "config.json")
        summary = read_json(run_dir / "summary.json") if config else {}
    except ValueError as error:
        config, summary = {}, {"status": "failed", "error": f"unreadable JSON: {error}"}
    *_, model, name = run_dir.absolute().parts
    known = {"model": {"name": model}, "variant": "", "seed": -1}
    config |= {key: value for key, value in known.items() if key not in config}
    fields = config["model"]["name"], config["variant"], config["seed"]
    return FinishedRun(run_dir, f"{model}/{name}", config, summary, *fields)


def load_runs(workdir: Path) -> list[FinishedRun]:
    """Returns every run under a workdir, by model, variant and seed."""
    runs = [_read_run(path) for path in run_dirs(workdir) if (path / "config.json").exists()]
    return sorted(runs, key=by_name)


def by_name(run: FinishedRun) -> tuple:
    """Returns what runs are sorted by: model, variant, seed, name."""
    return run.model, run.variant, run.seed, run.name


def chosen_runs(path: Path) -> list[FinishedRun]:
    """Returns the complete runs of a run directory or a workdir; raises UserError if none."""
    if (path / "config.json").exists():
        return [load_run(path)]
    runs = [run for run in load_runs(path) if run.status == "complete"]
    if not runs:
        raise UserError(f"{path} is neither a run directory nor a workdir with a complete run")
    return runs


def group_runs(runs: list[FinishedRun]) -> Groups:
    """Returns complete runs by label (model and variant), the best mean validation score first.

    Of folds that are not merged, the first alone: the others are tested on other images.
    """
    groups: Groups = {}
    for run in runs:
        if run.status == "complete":
            groups.setdefault(run.label, []).append(run)
    for label, group in groups.items():
        first = min(run.fold or 0 for run in group)
        groups[label] = [run for run in group if (run.fold or 0) == first]
    criterion = common_criterion(groups)
    mean = {
        label: np.mean([run.validation_score(criterion) for run in group])
        for label, group in groups.items()
    }
    return {label: groups[label] for label in sorted(groups, key=lambda k: (-mean[k], k))}


def clusters_of(part: dict[str, np.ndarray]) -> np.ndarray | None:
    """Returns the numbers of the groups of a part's predictions, int [N]; None without any."""
    groups = part.get("groups")
    return None if groups is None else np.unique(groups, return_inverse=True)[1]


def common_criterion(groups: Groups) -> str:
    """Returns what all runs are compared by; accuracy where they were selected by several."""
    of_runs = {run.criterion for runs in groups.values() for run in runs}
    return of_runs.pop() if len(of_runs) == 1 else "accuracy"


def same_images(first: FinishedRun, second: FinishedRun) -> bool:
    """Returns whether two runs were tested on the same images, in the same order and folds."""
    return all(np.array_equal(first.test.get(key), second.test.get(key)) for key in ("ids", "fold"))


def correctness(runs: list[FinishedRun]) -> np.ndarray:
    """Returns right or wrong, bool [S, N]; raises UserError where the runs' test images differ."""
    for run in runs[1:]:
        if not same_images(run, runs[0]):
            raise UserError(
                f"{run.path} and {runs[0].path} were tested on different images, so they cannot "
                "be compared: train them on one split, or in different workdirs"
            )
    return np.array([run.correct for run in runs])


def values_of(runs: list[FinishedRun], criterion: str, part: str = "test") -> np.ndarray:
    """Returns the criterion of each seed on each image of a part: float [S, N]."""
    stored = [getattr(run, part) for run in runs]
    return np.stack([values(of["labels"], of["logits"].argmax(axis=1), criterion) for of in stored])


def evenly_spaced(count: int, wanted: int) -> np.ndarray:
    """Returns up to `wanted` of the numbers 0 .. count - 1, evenly spaced: int [n]."""
    return np.linspace(0, count - 1, min(wanted, count)).round().astype(int)


def read_plan(workdir: Path) -> dict:
    """Returns experiment.json: command, runs and compare; {} where a workdir has none."""
    return read_json(workdir / "experiment.json")


def incomplete(workdir: Path, runs: list[FinishedRun]) -> dict[str, str]:
    """Returns {run: why} for every run that exists or was planned, and cannot be counted."""
    plan = read_plan(workdir)
    reasons = {name: "not started" for name in plan.get("runs", [])}
    for run in (single for every in runs for single in every.folds or (every,)):
        reasons.pop(run.name, None)
        if run.status != "complete":
            reasons[run.name] = run.state
            continue
        try:
            _ = run.test, run.validation, run.dataset, run.environment
        except UserError as error:
            reasons[run.name] = f"damaged: {error}"
            continue
        identity = run.dataset.get("identity")
        if identity and identity not in plan.get("identities", [identity]):
            reasons[run.name] = "its images, labels or parts are not those of the experiment"
    return reasons


def planned_seeds(groups: Groups, reasons: dict[str, str]) -> dict[str, tuple[int, str]]:
    """Returns the number of seeds that each label should have, and "" or what became of them."""
    families = {}  # by model and what follows the seed in a run's name
    for label, runs in groups.items():
        families |= {family(run.name): label for run in runs}
    missing: dict[str, Counter] = {label: Counter() for label in groups}
    for name, why in reasons.items():
        if label := families.get(family(name)):
            missing[label][why.partition(":")[0]] += 1
    states = {}
    for label, runs in groups.items():
        total, lost = len(runs) + missing[label].total(), missing[label]
        text = f"{len(runs)} of {total} seeds completed"
        text += "".join(f"; {number} {why}" for why, number in lost.items())
        states[label] = total, text if lost else ""
    return states


def without_seeds(
    groups: Groups, runs: list[FinishedRun], reasons: dict[str, str]
) -> dict[str, str]:
    """Returns the models of which no seed is complete, and what became of these."""
    labels = {family(run.name): run.label for run in runs}
    lost: dict[str, Counter] = {}
    for name, why in reasons.items():
        model, variant = family(name)
        label = labels.get((model, variant), f"{model} ({variant})" if variant else model)
        if label not in groups:
            lost.setdefault(label, Counter())[why.partition(":")[0]] += 1
    return {
        label: ", ".join(f"{number} {why}" for why, number in of.items())
        for label, of in lost.items()
    }


def read_audit(workdir: Path) -> dict | None:
    """Returns the content of audit.json, None where the images were not audited."""
    return read_json(workdir / "audit" / "audit.json") or None
