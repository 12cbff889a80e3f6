"""What a search for fields found: budgets, winners, and who wins with how many trials.

Expected best validation scores against the number of trials are those of Dodge et al. 2019
(arXiv:1909.03004), by the unbiased estimator of Tang et al. 2020 (arXiv:2004.13705).
"""

import itertools
import math
from collections import Counter

import numpy as np
import pandas as pd
from scipy.special import gammaln

from analysis.compare import Comparison
from analysis.page import figures
from analysis.page.chapters import DRAWN
from analysis.page.charts import plain_ticks
from analysis.page.figures import literal, plt
from analysis.page.section import Picture, Section, Table, as_table
from analysis.page.tables import NONE, decimal, percent
from analysis.runs import FinishedRun
from analysis.verdict import listed, plural
from experiment.fields import flatten, split_values
from experiment.files import read_json
from experiment.grid import label_of
from models import MODELS

METHODS = {"grid": "grid search", "random": "random search", "tpe": "Bayesian search (tpe)"}
EDGE = 0.05  # of a range: a winner so near its end may lie beyond it
ENDED = ("complete", "pruned", "diverged", "failed")


def expected_best(scores: np.ndarray) -> np.ndarray:
    """Returns the expected highest of k of n scores, for k = 1 .. n: float [n].

    The mean over all choices of k without replacement: unbiased for independent trials.
    """
    ordered, n = np.sort(scores), len(scores)
    k, i = np.arange(1, n + 1)[:, None], np.arange(1, n + 1)[None]

    def log_choose(of, number):
        return gammaln(of + 1) - gammaln(number + 1) - gammaln(of - number + 1)

    with np.errstate(invalid="ignore"):
        log_weights = log_choose(i - 1.0, k - 1.0) - log_choose(float(n), k)
    return np.where(i >= k, np.exp(log_weights), 0.0) @ ordered


def read_search(comparison: Comparison) -> dict:
    """Returns search.json with the labels of the report, {} where nothing was searched.

    Trials are those that ended within the budget.
    """
    content = read_json(comparison.workdir / "search" / "search.json")
    names = {_label(run): run.label for run in comparison.runs}
    labels = {}
    for label, of in content.get("labels", {}).items():
        trials = [t for t in of["trials"][: of["budget"]] if t.get("status") in ENDED]
        if trials:
            labels[names.get(label, label)] = of | {"trials": trials}
    order = [*comparison.groups, *labels]
    return content and content | {"labels": {x: labels[x] for x in order if x in labels}}


def _label(run: FinishedRun) -> str:
    return label_of(run.model, run.variant)


def note(comparison: Comparison) -> str:
    """Returns whether the models were tuned, and with which budget, to stand below the table."""
    labels, tuned, earlier, by_hand = read_search(comparison).get("labels", {}), [], [], []
    every = read_json(comparison.workdir / "search" / "search.json").get("labels", {})
    for label, runs in comparison.groups.items():
        if runs[0].model in MODELS and not MODELS[runs[0].model].trained_by_gradient:
            continue  # it has no rate
        if all("settings" in run.summary for run in runs):
            continue  # each run chose among settings
        winner = _winner(labels.get(label, {}))
        if winner and winner["parameters"]:
            trials = [winner, *every.get(_label(runs[0]), {}).get("trials", ())]
            held = [all(_holds(run.config, t["parameters"]) for run in runs) for t in trials]
            (tuned if held[0] else earlier if any(held) else by_hand).append(label)
        else:
            by_hand.append(label)
    if not tuned and not earlier:
        return "untuned: rates were chosen by hand" if by_hand else ""
    if not tuned:
        tuned = earlier
    budgets = sorted({labels[label]["budget"] for label in tuned})
    trials = plural(budgets[-1], "trial")
    if len(budgets) > 1:
        trials = f"{budgets[0]} to {trials}"
    text = f"tuned: {trials} of {METHODS[read_search(comparison)['method']]} for each model"
    text += f"; of an earlier winner: {listed(earlier)}" if earlier else ""
    return text + (f"; untuned, with rates chosen by hand: {listed(by_hand)}" if by_hand else "")


def _winner(of: dict) -> dict | None:
    number = of.get("winner")
    return next((t for t in of.get("trials", ()) if t["number"] == number), None)


def _holds(config: dict, parameters: dict) -> bool:
    """Returns whether a run's config has the fields of a trial."""
    stored = flatten(config)
    return all(stored.get(path, value) == value for path, value in parameters.items())


def tuning_section(comparison: Comparison) -> Section | None:
    """Budgets, winners, trials as pictures, and who wins with which budget."""
    search = read_search(comparison)
    labels = search.get("labels")
    if not labels:
        return None
    leaders = _leaders(_curves(comparison, labels, "accuracy"))
    method = METHODS[search["method"]]
    pictures = [_draw_budget(comparison, search), _draw_trials(comparison, search)]
    return Section(
        text=[_about(comparison, labels, method), *_edges(labels)],
        tables=[_table(labels)],
        pictures=[picture for picture in pictures if picture],
        finding=leaders,
    )


def _about(comparison: Comparison, labels: dict, method: str) -> str:
    trials = list(itertools.chain(*(of["trials"] for of in labels.values())))
    spent = sum(trial.get("seconds", 0) for trial in trials)
    costs = [run.cost for run in comparison.runs if run.label in labels]
    final = sum(cost["seconds"] + cost.get("compile_seconds", 0) for cost in costs)
    said = note(comparison)
    alone = ", and only those runs are compared" * ("; " not in said and "untuned" not in said)
    return (
        f"Fields were chosen by {method} on validation images, by the lowest loss; no trial saw a "
        "test image. Each model with a winner was then trained anew with its fields and other "
        f"seeds{alone}. The {plural(len(trials), 'trial')} took "
        f"{_time(spent)} of training and compiling, the {plural(len(costs), 'run')} that "
        f"{'is' if len(costs) == 1 else 'are'} compared {_time(final)}. Intervals of this page are "
        "for the chosen fields: what another search would choose is not in them."
    )


def _time(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _titles(labels: dict) -> dict[str, str]:
    """Returns a short name for each searched field."""
    paths = list(dict.fromkeys(itertools.chain(*(of["space"] for of in labels.values()))))
    short = Counter(path.rpartition(".")[2] for path in paths)
    last = {path: path.rpartition(".")[2] for path in paths}
    return {path: last[path] if short[last[path]] == 1 else path for path in paths}


def _table(labels: dict) -> Table:
    """A row per model: its budget, what became of the trials, and the winner."""
    rows, titles = [], _titles(labels)
    for label, of in labels.items():
        count, winner = Counter(trial["status"] for trial in of["trials"]), _winner(of) or {}
        row = {"model": label, "trials": f"{len(of['trials'])}"}
        if len(of["trials"]) < of["budget"]:
            row["trials"] += f" of {of['budget']}"
        row |= {status: str(count[status]) for status in ENDED}
        row["winner"] = str(winner.get("number", NONE))
        row["validation loss"] = decimal(winner.get("loss", math.nan), 4)
        row["validation accuracy %"] = percent(winner.get("accuracy", math.nan))
        for path, title in titles.items():
            value = winner["parameters"][path] if winner and path in of["space"] else NONE
            row[title] = f"{value:.3g}" if isinstance(value, float) else str(value)
        row["search"] = _time(sum(trial.get("seconds", 0) for trial in of["trials"]))
        rows.append(row)
    frame = pd.DataFrame(rows)
    unused = [status for status in ENDED[1:] if (frame[status] == "0").all()]
    caption = "Budget, winner and time of each model's search."
    if single := [label for label, of in labels.items() if not of["space"]]:
        caption += f" No searched field is of {listed(single)}: one trial, with the config's own."
    return as_table(frame.drop(columns=unused), caption)


def _range(text: str) -> tuple[bool, float, float] | None:
    """Returns whether a range is logarithmic, and its ends; None of values."""
    log, _, ends = text.rpartition(":")
    low, dots, high = ends.partition("..")
    try:
        return (log == "log", float(low), float(high)) if dots else None
    except ValueError:  # a text, such as a path
        return None


def _edges(labels: dict) -> list[str]:
    """Says which winners lie at an end of their range, beyond which may be better ones."""
    found = []
    for label, of in labels.items():
        winner, titles = _winner(of), _titles(labels)
        for path, text in of["space"].items() if winner else ():
            if not (ends := _range(text)):
                continue
            scale = math.log if ends[0] else float
            low, high, value = map(scale, (*ends[1:], winner["parameters"][path]))
            place = (value - low) / (high - low)
            if not EDGE <= place <= 1 - EDGE:
                end = "low" if place < EDGE else "high"
                found.append(f"{label} ({titles[path]} at the {end} end)")
    if not found:
        return []
    return [f"Near an end of their range, so that a wider one may be better: {listed(found)}."]


def _scores(comparison: Comparison, of: dict, key: str) -> np.ndarray:
    """Returns a score of each trial, the higher the better: accuracies, or losses below 0.

    Where training broke off there is no model: it counts as always saying the most frequent class,
    or for the loss as saying that all classes are equally likely.
    """
    counts = np.array([*comparison.runs[0].dataset["counts"]["validation"].values()])
    worst = counts.max() / counts.sum() if key == "accuracy" else math.log(max(len(counts), 2))
    scores = np.array([t.get(key, worst) for t in of["trials"]], float)
    return scores if key == "accuracy" else -scores


def _curves(comparison: Comparison, labels: dict, key: str) -> dict[str, np.ndarray]:
    """Returns the expected best score of each model with 1, 2, ... trials; NaN where not known."""
    longest, curves = max(of["budget"] for of in labels.values()), {}
    for label, of in labels.items():
        best = expected_best(_scores(comparison, of, key))
        points = math.prod(
            math.inf if _range(t) else len(split_values(t, ",")) for t in of["space"].values()
        )
        whole = len(best) == of["budget"] == points < longest  # all points of its space
        rest = np.full(longest - len(best), best[-1] if whole else np.nan)
        curves[label] = np.concatenate([best, rest])
    return curves


def _leaders(curves: dict[str, np.ndarray]) -> str:
    """Says which model leads with how many trials, and so where the lines cross."""
    table = pd.DataFrame(curves, index=range(1, len(next(iter(curves.values()))) + 1))
    table = table.dropna()
    if table.empty or len(curves) < 2:
        (label, curve), *_ = curves.items()
        values = curve[~np.isnan(curve)]
        return (
            f"The expected best validation accuracy of {label} is {percent(values[0], 1)} % with "
            f"one trial and {percent(values[-1], 1)} % with {len(values)}."
        )
    leader, parts = table.idxmax(axis=1), []
    for above, row in itertools.pairwise(table.index):  # who is caught up with still leads
        if table[leader[above]][row] >= table.loc[row].max() - 1e-9:
            leader[row] = leader[above]
    for label, group in itertools.groupby(leader.items(), key=lambda item: item[1]):
        numbers = [number for number, _ in group]
        if numbers[-1] == table.index[-1]:
            text = f"from {numbers[0]} on" if len(numbers) > 1 else f"with {numbers[0]}"
        else:
            text = f"with {numbers[0]}" + f" to {numbers[-1]}" * (len(numbers) > 1)
        parts.append((text, label))
    if len(parts) == 1:
        up_to = f"with any number of trials up to {len(table)}"
        return f"{parts[0][1]} has the best expected validation accuracy {up_to}."
    said = ", ".join(f"{text} {label}" for text, label in parts)
    return f"Who has the best expected validation accuracy depends on the number of trials: {said}."


def _draw_budget(comparison: Comparison, search: dict) -> Picture:
    """Expected best validation accuracy and loss against the number of trials."""
    labels = dict(itertools.islice(search["labels"].items(), DRAWN))
    colours = figures.colours(dict.fromkeys([*comparison.groups, *labels]))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    in_order = search["method"] == "tpe"
    for axis, key in zip(axes, ("accuracy", "loss"), strict=True):
        sign = 100 if key == "accuracy" else -1
        for label, curve in _curves(comparison, labels, key).items():
            trials, style = np.arange(1, len(curve) + 1), {"color": colours[label]}
            axis.plot(trials, sign * curve, "o-", ms=3, label=literal(label), **style)
            if in_order and labels[label]["space"]:
                best = np.maximum.accumulate(_scores(comparison, labels[label], key))
                places = range(1, len(best) + 1)
                axis.step(places, sign * best, where="post", lw=0.8, ls=":", **style)
        axis.set(xlabel="trials", ylabel=f"best validation {key}" + ", %" * (key == "accuracy"))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid()
    _widen_the_top(axes[0])
    axes[1].set_yscale("log")
    low, high = axes[1].get_ylim()
    plain_ticks(axes[1].yaxis, high / low)
    figures.legend_beside(figure, axes)
    figure.tight_layout()
    figures.save(figure, comparison.output / "tuning_budget.svg")
    caption = (
        "Expected best validation accuracy and loss after so many trials (Dodge et al. 2019): the "
        "mean over all choices of that many trials; the right end rests on few of them. Where "
        "lines cross, the answer depends on the budget."
    )
    states = {trial["status"] for of in labels.values() for trial in of["trials"]}
    if "pruned" in states:
        caption += (
            " A trial that was pruned counts with its scores until then, though it would have gone "
            "on without the others."
        )
    if states & {"diverged", "failed"}:
        caption += (
            " One that diverged or failed counts as always saying the most frequent class, and for "
            "the loss as a uniform guess."
        )
    if in_order:
        caption += (
            " Trials of tpe build on those before: the lines, which take them as independent, are "
            "too good on the left; dotted is the best so far, in the order in which they ran."
        )
    return Picture("tuning_budget.svg", caption, wide=True)


def _widen_the_top(axis: plt.Axes) -> None:
    """Gives an axis of accuracies in percent more room, the nearer they are to 100."""
    low, high = axis.get_ylim()
    axis.set_yscale("function", functions=(lambda y: -np.log(102 - y), lambda z: 102 - np.exp(-z)))
    axis.set_ylim(max(low, 0), min(high, 100))
    ticks = [x for x in (0, 20, 40, 60, 80, 90, 95, 98, 100) if low <= x <= min(high, 100)]
    if len(ticks) > 2:
        axis.set_yticks(ticks)


def _draw_trials(comparison: Comparison, search: dict) -> Picture | None:
    """Validation loss of each trial against each searched field: a panel a field."""
    labels = dict(itertools.islice(search["labels"].items(), DRAWN))
    titles = _titles(labels)
    if not titles:
        return None
    colours = figures.colours(dict.fromkeys([*comparison.groups, *labels]))
    figure, axes = figures.small_multiples(len(titles), 3, (3.9, 3.4))
    losses = [t["loss"] for of in labels.values() for t in of["trials"] if "loss" in t]
    top = max(losses, default=1.0) * 1.5
    for axis, (path, title) in zip(axes, titles.items(), strict=True):
        searched = {label: of for label, of in labels.items() if path in of["space"]}
        ranges = [ends for of in searched.values() if (ends := _range(of["space"][path]))]
        tried = [t["parameters"][path] for of in searched.values() for t in of["trials"]]
        names = list(dict.fromkeys(map(str, sorted(tried, key=_order))))
        for i, (label, of) in enumerate(searched.items()):
            aside = 0.5 * ((i + 0.5) / len(searched) - 0.5)  # models side by side
            for trial in of["trials"]:
                value = trial["parameters"][path]
                x = value if ranges else names.index(str(value)) + aside
                _dot(axis, x, trial, trial["number"] == of["winner"], colours[label], top)
            axis.plot([], [], "o", color=colours[label], label=literal(label))
        axis.set_yscale("log")
        plain_ticks(axis.yaxis, np.divide(*axis.get_ylim()[::-1]))
        if ranges:
            ends = [pick(*tried, *(end for _, *of in ranges for end in of)) for pick in (min, max)]
            axis.set_xlim(*ends)
            if all(log for log, *_ in ranges) and min(tried) > 0:
                axis.set_xscale("log")
                plain_ticks(axis.xaxis, ends[1] / ends[0])
        else:
            axis.set_xticks(range(len(names)), map(literal, names))
            axis.set_xlim(-0.5, len(names) - 0.5)
        axis.set(xlabel=literal(title), ylabel="validation loss")
        axis.grid()
    figures.legend_beside(figure, axes)
    figure.tight_layout()
    figures.save(figure, comparison.output / "tuning_trials.svg")
    kinds = {trial["status"] for of in labels.values() for trial in of["trials"]}
    caption = "Validation loss of every trial against each searched field. Star: the winner."
    caption += " Hollow: pruned, at its lowest loss until then." * ("pruned" in kinds)
    caption += " Crosses at the top: diverged or failed." * bool(kinds & {"diverged", "failed"})
    return Picture("tuning_trials.svg", caption, wide=True)


def _dot(axis: plt.Axes, x: float, trial: dict, wins: bool, colour, top: float) -> None:
    """Draws one trial; crosses of those without a loss stand at the `top`."""
    marker, size = ("*", 14) if wins else ("o", 5)
    if trial["status"] in ("diverged", "failed"):
        marker = "x"
    fill = "none" if trial["status"] == "pruned" else colour
    style = {"color": colour, "mfc": fill, "ms": size, "alpha": 0.9}
    edge = {"mec": "black" if wins else colour, "clip_on": False}
    axis.plot(x, trial.get("loss", top), marker, **style, **edge)


def _order(value) -> tuple:
    """Sorts numbers by size, and whatever else by its name."""
    return (0, value, "") if isinstance(value, (int, float)) else (1, 0, str(value))
