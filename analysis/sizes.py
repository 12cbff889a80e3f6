"""What would more training images bring? Scores against the number of images, and power laws.

The chapter of a sweep over `data.train_fraction`: it reads the runs of all fractions, where the
rest of the report compares those of the largest. Writes sizes.csv and sizes_fits.csv.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from analysis import compare
from analysis.compare import Comparison
from analysis.page import charts, figures
from analysis.page.section import Details, Picture, Section, as_table
from analysis.page.tables import NONE, decimal, percent, percents, points
from analysis.power_law import LEAST, Law, Points, fit, interval, predict_last
from analysis.runs import FinishedRun, same_images, values_of
from analysis.uncertainty import Family, ends
from analysis.verdict import listed, plural

DRAWN = 10  # curves in the picture
SAID = 3  # models in the finding
HOW = [
    "Every model keeps its epochs, so a part of the images takes as many times fewer steps; "
    "a sweep of data.train_fraction and epochs gives each number of epochs its own curve.",
    "Of one seed, the images of a smaller part are among those of a larger one; each class keeps "
    "its share. Validation and test images are the same at all sizes.",
    "The law: error = floor + rest × (n / largest n)^-exponent, fitted by Bayesian averaging over "
    "its parameters, with and without a floor (as probable as each other beforehand), and over "
    "the scatter of runs (Hestness et al. 2017; Viering and Loog 2021). Sizes at which a model is "
    "not established to beat the most frequent class are left out, and so are seeds that are not "
    "complete at every size.",
    "Intervals of the points are for other seeds and test images. Those of the law are for other "
    "training images too, as far as the seeds' different parts tell of them: at the full size all "
    "seeds train on the same images.",
    "The check: the law of all sizes but the largest predicts what was measured at the largest, "
    "on the same test images.",
    "A change of rank is established if at the smallest size one model is established to be "
    "better, and at the largest the other (intervals that hold for all pairs of models at once).",
]


@dataclass(frozen=True)
class Curve:
    """One model at several sizes.

    Attributes:
      runs: by fraction of the training images, ascending.
      table: a row per fraction: images, seeds, score, its interval, and whether the fit uses it.
      points: what the law is fitted to; None if too few sizes have the same seeds.
    """

    kind: str
    runs: dict[float, list[FinishedRun]]
    table: pd.DataFrame
    points: Points | None

    @cached_property
    def law(self) -> Law | None:
        """The power law of its error."""
        return fit(self.points) if self.points else None

    @cached_property
    def predicted(self) -> np.ndarray | None:
        """Draws of the error at the largest size, as the others predict it."""
        enough = self.points and len(self.points.sizes) > LEAST
        return predict_last(self.points) if enough else None

    @property
    def largest(self) -> int:
        """The most training images."""
        return int(self.table.images.iloc[-1])


def families(comparison: Comparison) -> dict[float, tuple[dict, Family]]:
    """Returns by fraction, ascending, the runs of each kind and the family of these models."""
    first, by_fraction = comparison.runs[0], {}
    for run in (*comparison.runs, *comparison.smaller):
        if same_images(run, first):
            of_kind = by_fraction.setdefault(run.train_fraction, {}).setdefault(run.kind, {})
            of_kind.setdefault(run.seed, run)  # one that was also trained without a sweep is one
    baseline, criterion = comparison.baseline.label, comparison.criterion
    return {
        fraction: (groups, compare.make_families([groups], criterion, baseline)[0])
        for fraction, kinds in sorted(by_fraction.items())
        for groups in [{kind: list(runs.values()) for kind, runs in kinds.items()}]
    }


def make_curves(comparison: Comparison, of: dict[float, tuple[dict, Family]]) -> list[Curve]:
    """Returns a curve for each model that has several sizes, the best of the largest first."""
    runs = (*comparison.runs, *comparison.smaller)
    curves = []
    for kind in dict.fromkeys(run.kind for run in runs):
        own = {fraction: kinds[kind] for fraction, (kinds, _) in of.items() if kind in kinds}
        if len(own) < 2:
            continue
        rows = []
        for fraction, runs in own.items():
            family = of[fraction][1]
            counts = [
                sum(run.dataset["counts"]["train"].values()) / max(1, len(run.folds))
                for run in runs
            ]
            limits = ends("", family.interval(kind))
            rows.append(
                {"model": kind, "train_fraction": fraction, "images": round(np.mean(counts))}
                | {"seeds": len(runs), "score": family.mean[kind], **limits}
                | {"fitted": limits["ci95_low"] > comparison.baseline.score}
            )
        table = pd.DataFrame(rows)
        curves.append(Curve(kind, own, table, _points(own, table, comparison.criterion)))
    return curves


def _points(
    own: dict[float, list[FinishedRun]], table: pd.DataFrame, criterion: str
) -> Points | None:
    """Returns the sizes that a law is fitted to, of the seeds that all of them have."""
    chosen = table[table.fitted]
    of_sizes = [own[fraction] for fraction in chosen.train_fraction]
    seeds = set.intersection(*({run.seed for run in runs} for runs in of_sizes or [[]]))
    if len(of_sizes) < LEAST or not seeds:
        return None
    values = [
        values_of(
            [run for run in sorted(runs, key=lambda r: r.seed) if run.seed in seeds], criterion
        )
        for runs in of_sizes
    ]
    pool = table.images.iloc[-1] / table.train_fraction.iloc[-1]
    return Points(chosen.images.to_numpy(), np.stack(values), pool, of_sizes[0][0].clusters)


def fits_table(curves: list[Curve]) -> pd.DataFrame:
    """Returns sizes_fits.csv: a row per model with its law, what twice the images give, the check.

    Shares in 0..1. `gain_*` is of the score; `predicted_*` is what all sizes but the largest say
    of the largest, where `measured` is the score.
    """
    rows = []
    for curve in curves:
        if curve.law is None:
            continue
        law, n, measured = curve.law, curve.points.sizes[-1], 1 - curve.points.error[-1]
        floored = law.floor > 0 if law.has_floor > 0.5 else law.floor == 0
        twice, gain = 1 - law.error(2 * n), law.error(n) - law.error(2 * n)
        row = {
            "model": curve.kind,
            "images": int(n),
            "sizes": len(curve.points.sizes),
            "seeds": curve.points.seeds,
            "floor": np.median(law.floor[floored]),
            "rest": np.median(law.rest[floored]),
            "exponent": np.median(law.exponent[floored]),
            **ends("exponent_", interval(law.exponent)),
            "p_floor": law.has_floor,
            "measured": measured,
            "now": np.median(1 - law.error(n)),
            "twice": np.median(twice),
            **ends("twice_", interval(twice)),
            "gain": np.median(gain),
            **ends("gain_", interval(gain)),
        }
        if (predicted := curve.predicted) is not None:
            low, high = interval(1 - predicted)
            row |= {"predicted": np.median(1 - predicted), **ends("predicted_", (low, high))}
            row["held"] = bool(low <= measured <= high)
        rows.append(row)
    return pd.DataFrame(rows)


def printed_fits(fits: pd.DataFrame) -> pd.DataFrame:
    """Returns the fits as a reader sees them, in percent."""
    form = [
        f"{percent(r.floor)} + " * (r.p_floor > 0.5)
        + f"{percent(r.rest)} × (n / {r.images:,})^-{r.exponent:.2f}"
        for r in fits.itertuples()
    ]
    limits = fits[["exponent_ci95_low", "exponent_ci95_high"]].to_numpy()
    columns = {
        "model": fits.model,
        "error %": form,
        "exponent, 95 %": ["{:.2f} to {:.2f}".format(*pair) for pair in limits],
        "floor probable, %": fits.p_floor.map(lambda x: percent(x, 0)),
        "measured %": fits.measured.map(percent),
        "at twice %": _with_interval(fits, "twice", 1),
        "twice brings, points": _with_interval(fits, "gain", 1),
    }
    if "predicted" in fits:
        columns["predicted from smaller %"] = _with_interval(fits, "predicted", 1)
        place = fits.held.map({True: "within", False: "outside"})
        missed = (fits.measured - fits.predicted).map(lambda gap: points(gap, 1))
        columns["missed by"] = (missed + ", " + place).fillna(NONE)
    return pd.DataFrame(columns)


def _with_interval(table: pd.DataFrame, name: str, digits: int) -> list[str]:
    rows = table[[name, f"{name}_ci95_low", f"{name}_ci95_high"]].to_numpy(float)
    return [
        NONE if math.isnan(value) else f"{percent(value, digits)} ({percents(*limits, digits)})"
        for value, *limits in rows
    ]


# --- ranks --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """Two models that change places: one is better with few images, the other with many."""

    few: str
    many: str
    between: tuple[int, int]  # training images measured
    near: float  # where straight lines between the points cross
    established: bool

    def __str__(self) -> str:
        low, high = (f"{size:,}" for size in self.between)
        return f"{self.many} overtakes {self.few} between {low} and {high} training images"


def rank_changes(curves: list[Curve], of: dict[float, tuple[dict, Family]]) -> list[Change]:
    """Returns the pairs of models whose curves change places, the established first."""
    return sorted(_changes(curves, of), key=lambda change: not change.established)


def _changes(curves: list[Curve], of: dict[float, tuple[dict, Family]]) -> Iterator[Change]:
    for i, first in enumerate(curves):
        for second in curves[i + 1 :]:
            shared = [fraction for fraction in first.runs if fraction in second.runs]
            if len(shared) < 2:
                continue
            of_both = [of[fraction][1] for fraction in shared]
            gaps = np.array([f.mean[first.kind] - f.mean[second.kind] for f in of_both])
            if not gaps[0] * gaps[-1] < 0:
                continue
            sizes = first.table.set_index("train_fraction").images[shared].to_numpy()
            turns = np.flatnonzero(np.sign(gaps[:-1]) != np.sign(gaps[1:]))
            low, high = turns[0], turns[-1] + 1
            side = np.sign(gaps[0]) * np.array([gaps[low], gaps[high]])  # of one sign, then another
            near = np.exp(np.interp(0, -side, np.log(sizes[[low, high]])))
            names = (first.kind, second.kind)[:: 1 if gaps[0] > 0 else -1]
            sure = [of_both[i].pair(*names).established for i in (0, -1)]
            yield Change(*names, (int(sizes[low]), int(sizes[high])), float(near), all(sure))


# --- the chapter --------------------------------------------------------------------------------


def sizes_section(comparison: Comparison) -> Section | None:
    """Curves, laws, what twice the images would bring, the check, and changes of rank."""
    of = families(comparison)
    curves = make_curves(comparison, of)
    if not curves:
        return None
    fits, changes = fits_table(curves), rank_changes(curves, of)
    table = pd.concat([curve.table for curve in curves])
    table.to_csv(comparison.output / "sizes.csv", index=False)
    section = Section(
        text=_said(curves, fits),
        pictures_first=True,
        details=_details(table, bool(comparison.folds)),
    )
    section.finding = _finding(curves, fits, changes)
    if len(fits):
        fits.to_csv(comparison.output / "sizes_fits.csv", index=False)
        caption = "Error and scores in percent, with 95 % intervals; n: training images."
        section.tables.append(as_table(printed_fits(fits), caption))
        lost = fits[~fits.held.fillna(True).astype(bool)] if "held" in fits else fits[:0]
        section.warnings += [
            f"Data size: the sizes below the largest predicted {percent(r.predicted, 1)} % "
            f"({percents(r.predicted_ci95_low, r.predicted_ci95_high, 1)}) for {r.model}, measured "
            f"was {percent(r.measured, 1)} %: do not trust its extrapolation."
            for r in lost.itertuples()
        ]
    if changes:
        columns = {
            "better with few images": [change.few for change in changes],
            "better with many": [change.many for change in changes],
            "change places between": ["{:,} and {:,}".format(*c.between) for c in changes],
            "near": [f"{change.near:,.0f}" for change in changes],
            "established": ["yes" if change.established else "no" for change in changes],
        }
        section.tables.append(as_table(columns, "Changes of rank within the measured sizes."))
    figure = charts.draw_sizes(curves[:DRAWN], comparison.criterion)
    figure.tight_layout()
    figures.save(figure, comparison.output / "sizes.svg")
    caption = "Dots: mean over seeds, with 95 % intervals. Lines and bands: power laws and their "
    caption += "95 % intervals; dashed up to twice the images."
    caption += f" The first {DRAWN} of {len(curves)} models." * (len(curves) > DRAWN)
    section.pictures.append(Picture("sizes.svg", caption, wide=True))
    return section


def _details(table: pd.DataFrame, folds: bool) -> list[Details]:
    columns = {
        "model": table.model,
        "part": table.train_fraction.map("{:g}".format),
        "training images": table.images.map("{:,}".format),
        "seeds": table.seeds,
        "score %": table.score.map(percent),
        "95 % interval": [
            percents(*limits) for limits in table[["ci95_low", "ci95_high"]].to_numpy()
        ],
        "in the fit": table.fitted.map({True: "yes", False: "no"}),
    }
    how = HOW
    if folds:
        how = [
            *HOW,
            "Under cross-validation, intervals of the points are over folds instead, and "
            "those of the law, which knows of seeds and test images alone, are narrower.",
        ]
    return [
        Details("Scores at every size", table=as_table(columns)),
        Details("How it is fitted and checked", how),
    ]


def _said(curves: list[Curve], fits: pd.DataFrame) -> list[str]:
    """What twice the images would bring each model, and what remains a guess."""
    text = [
        f"Twice the training images, {2 * r.images:,} instead of {r.images:,}, would bring "
        f"{r.model} {_gain(r, ' points')}: by its law from {percent(r.now, 1)} to "
        f"{percent(r.twice, 1)} % ({percents(r.twice_ci95_low, r.twice_ci95_high, 1)})."
        for r in fits.itertuples()
    ]
    if text:
        text.append("What more than twice the images would bring is a guess.")
    checked = fits[fits.predicted.notna()] if "predicted" in fits else fits[:0]
    if len(checked):
        missed = [
            f"{points(r.measured - r.predicted, 1)} points for {r.model} "
            f"({'within' if r.held else 'outside'} its interval)"
            for r in checked.itertuples()
        ]
        text.append(f"Fitted without the largest size, the law missed it by {listed(missed)}.")
    missing = [curve.kind for curve in curves if curve.law is None]
    if missing:
        text.append(
            f"No law is fitted to {listed(missing)}: it takes {LEAST} sizes that share a seed, "
            "each established to be better than the most frequent class."
        )
    return text


def _gain(row, unit: str = "") -> str:
    limits = f"{decimal(100 * row.gain_ci95_low, 1)} to {decimal(100 * row.gain_ci95_high, 1)}"
    return f"{decimal(100 * row.gain, 1)}{unit} ({limits})"


def _finding(curves: list[Curve], fits: pd.DataFrame, changes: list[Change]) -> str:
    sure = [str(change) for change in changes if change.established]
    ranks = f"{listed(sure, SAID)}." if sure else "no change of rank is established."
    ranks = ranks if len(curves) > 1 else ""
    if fits.empty:
        text = f"{plural(len(curves), 'model')} at several sizes; too few for a law"
    else:
        best = fits.head(SAID)
        gains = [
            f"{r.model} {_gain(r, ' points' * (not i))}" for i, r in enumerate(best.itertuples())
        ]
        text = f"Twice the training images would bring {listed(gains)}"
    return f"{text}; {ranks}" if ranks else f"{text}."
