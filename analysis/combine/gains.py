"""Ensembles beside their members: what they gain on test images, with simultaneous intervals."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from analysis import evaluate
from analysis.page.section import Table, as_table
from analysis.page.tables import NONE, decimal, intervals, percent, percents, points
from analysis.runs import FinishedRun, correctness
from analysis.uncertainty import LEVEL, Family, Interval, ends
from analysis.verdict import listed
from training.steps import selection_score


@dataclass(frozen=True)
class Row:
    """One ensemble beside its members, on the test images; N is 0 where validation refused it."""

    kind: str
    label: str
    members: str
    cost: float  # times the prediction of its best member
    correct: np.ndarray  # bool [A, N]; A is 1, or the seeds that are changed one by one
    over_mean: np.ndarray  # gain over the mean of its members, image by image: [N]
    over_best: np.ndarray  # over the member that is best on validation: [N], or [0] for none
    nll: tuple[float, float]  # mean of the members, ensemble
    clusters: np.ndarray | None = None  # groups of the test images: int [N]
    validation: str = ""  # what decided

    @property
    def what(self) -> str:
        """How a reader is told of it."""
        return f"{self.label}: {self.kind}" if self.label else self.kind


def gain_interval(gain: np.ndarray, clusters: np.ndarray | None = None, tests: int = 1) -> Interval:
    """Returns the interval of a mean gain over images (or their groups), gain in -1..1: [N].

    Two made-up images, one for and one against, keep it honest where no outcome differs (Bonett
    and Price 2012); `tests` of them hold together in 95 % (Bonferroni).
    """
    family = Family({"": gain[None]}, clusters)
    mean, variance = family.of_images(gain, 1.0)
    half = stats.t.isf((1 - LEVEL) / 2 / tests, family.units + 1) * math.sqrt(variance)
    return max(-1.0, float(mean - half)), min(1.0, float(mean + half))


def loss_of(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean negative log-likelihood in nats of probabilities [N, K]."""
    own = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(own, np.finfo(float).tiny)).mean())


def validation_score(probabilities: np.ndarray, run: FinishedRun) -> list[float]:
    """Returns [metric, -loss] of predictions for a run's validation images; more is better.

    The metric is that of `config.select`, and accuracy in place of the loss.
    """
    select, labels = run.config.get("select", "loss"), run.validation["labels"]
    metric = "accuracy" if select == "loss" else select
    return selection_score(metric, loss_of(probabilities, labels), probabilities, labels)


def by_validation(runs: Sequence[FinishedRun]) -> list[FinishedRun]:
    """Returns runs by their validation score, the best first; ties go by order."""
    scores = [validation_score(evaluate.softmax(run.validation["logits"]), run) for run in runs]
    order = sorted(range(len(runs)), key=lambda i: scores[i], reverse=True)
    return [runs[i] for i in order]


def measure(
    kind: str,
    label: str,
    members: Sequence[FinishedRun],
    after: Sequence[np.ndarray],
    cost: float | None = None,
    text: str = "",
    validation: str = "",
) -> Row:
    """Compares predictions with those of their members on the test images.

    `after` holds probabilities [N, K]: one array of all, or one for each member changed by itself,
    which is compared with that member alone.
    """
    first, labels = members[0], members[0].test["labels"]
    right = np.array([x.argmax(axis=1) == labels for x in after])
    before = correctness(list(members))
    best = by_validation(distinct(members))[0] if len(after) < len(members) else None
    equal = all(np.array_equal(run.test["logits"], first.test["logits"]) for run in members[1:])
    mean = right.mean(axis=0)
    return Row(
        kind,
        label,
        text or f"{len(members)}{', all equal' * equal}",
        _cost(members, best) if cost is None else cost,
        right,
        mean - before.mean(axis=0),
        mean - best.correct if best else np.zeros(0),
        (
            float(np.mean([evaluate.losses(labels, run.test["logits"]).mean() for run in members])),
            float(np.mean([loss_of(x, labels) for x in after])),
        ),
        first.clusters,
        validation,
    )


def distinct(runs: Iterable[FinishedRun]) -> list[FinishedRun]:
    """Returns runs without repetitions."""
    return list({run.path: run for run in runs}.values())


def _cost(members: Sequence[FinishedRun], best: FinishedRun) -> float:
    """Times the computation of the best member; NaN where it is not known."""
    runs = distinct(members)
    if len({run.label for run in runs}) == 1:
        return float(len(runs))
    work = {run.path: run.cost.get("multiply_adds_per_image") or math.nan for run in runs}
    return sum(work.values()) / work[best.path]


def figures(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns a row per ensemble, shares in 0..1, NaN where validation refused it.

    Intervals of gains hold together for all gains of the table, that of accuracy by itself.
    """
    tests = sum(len(gain) > 0 for row in rows for gain in (row.over_mean, row.over_best))
    table = []
    for row in rows:
        used = row.correct.size > 0
        mean = row.correct.mean(axis=0)[None]
        own = Family({"": mean}, row.clusters).interval("") if used else (math.nan, math.nan)
        cells = {
            "what": row.what, "kind": row.kind, "label": row.label, "members": row.members,
            "validation": row.validation, "used": used,
            "accuracy": row.correct.mean() if used else math.nan,
            **ends("", own),
        }  # fmt: skip
        for name, gain in (("over_mean", row.over_mean), ("over_best", row.over_best)):
            known = len(gain) > 0
            own = gain_interval(gain, row.clusters, tests) if known else (math.nan, math.nan)
            cells |= {name: gain.mean() if known else math.nan, **ends(f"{name}_", own)}
        table.append(cells | {"nll_before": row.nll[0], "nll": row.nll[1], "cost": row.cost})
    return pd.DataFrame(table).assign(gains_tested=tests)


def printed(table: pd.DataFrame) -> Table:
    """Returns `figures` as a reader sees them."""

    def gains(name: str) -> list[str]:
        pairs = zip(table[name], intervals(table, f"{name}_", points), strict=True)
        return [NONE if math.isnan(mean) else f"{points(mean)} ({ends})" for mean, ends in pairs]

    columns = {
        "what": table.what,
        "members": table.members,
        "on validation, %": table.validation,
        "test acc. %": [
            f"{percent(r.accuracy)} ({percents(r.ci95_low, r.ci95_high)})" if r.used else NONE
            for r in table.itertuples()
        ],
        "gain over members, points": gains("over_mean"),
        "over best member, points": gains("over_best"),
        "NLL": [
            f"{decimal(r.nll_before)} → {decimal(r.nll)}" if r.used else NONE
            for r in table.itertuples()
        ],
        "cost": [f"{cost:.3g}×" if cost == cost else NONE for cost in table.cost],
    }
    if not any(table.validation):
        del columns["on validation, %"]
    tests = table.gains_tested.iloc[0]
    caption = (
        f"With 95 % intervals over test images, those of gains corrected (Bonferroni over the "
        f"{tests} gains of this table). Best member: by validation. NLL: mean of the members → "
        "after. Cost: computation, in multiples of the best member's."
    )
    return as_table(columns, caption)


def clearly(low: float, high: float) -> str:
    """Returns what an interval of gains says: better, worse or neither."""
    if low > 0:
        return "clearly better than"
    return "clearly worse than" if high < 0 else "not clearly different from"


def clear_gains(table: pd.DataFrame, kind: str) -> str:
    """Returns for which models a kind of ensemble is better than the mean of its members."""
    own = table[table.kind.eq(kind) & table.used]
    if own.empty:
        return ""
    above = own[own.over_mean_ci95_low > 0].label.tolist()
    below = own[own.over_mean_ci95_high < 0].label.tolist()
    count = f"any of {len(own)} models" if len(own) > 1 else own.label.iloc[0]
    text = f"gain clearly for {listed(above, 3)}" if above else f"do not clearly gain for {count}"
    return text + (f" and lose clearly for {listed(below, 3)}" if below else "")
