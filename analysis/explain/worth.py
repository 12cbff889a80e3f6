"""Are slow explanations worth their time? Methods compared on one model and the same images."""

import numpy as np

from analysis.explain.faithfulness import Scores, gains, mean_and_interval, seconds


def differences(
    scores: dict[str, Scores], slow: list[str]
) -> dict[tuple[str, str], tuple[float, float, float]]:
    """Returns the paired difference in gain of every slow method and quick one, low, high.

    The 95 % t-intervals are simultaneous (Bonferroni) and NaN for one image.
    """
    pairs = [(a, b) for a in slow for b in scores if b not in slow]
    found = {}
    for a, b in pairs:
        paired = gains(scores[a]) - gains(scores[b])
        mean, half = mean_and_interval(paired, 1 - 0.05 / len(pairs))
        found[a, b] = mean, mean - half, mean + half
    return found


def sentences(label: str, scores: dict[str, Scores], slow: list[str]) -> tuple[str, str]:
    """Returns whether the slow methods are worth their time on a model, and the numbers."""
    gain = {name: gains(values).mean() for name, values in scores.items()}
    count = len(next(iter(scores.values()))["zero"])
    quick = max((name for name in scores if name not in slow), key=gain.get)
    over = f"Over {count} image{'s' * (count > 1)}, the gain over a random map is"
    if not slow:
        best = f"Of {len(scores)} methods, {quick} has the most faithful maps of {label}."
        return best, f"{over} {gain[quick]:.2f} by {quick}."
    compared = differences(scores, slow)
    worth = [a for a in slow if all(compared[pair][1] > 0 for pair in compared if pair[0] == a)]
    others = [name for name in slow if name not in worth]
    result = _verdict(worth or others, "worth" if worth else "not shown to be worth")
    result += f" on {label}" + (f"; {others[0]} is not shown to be" if worth and others else "")
    took = {name: seconds(values["seconds"].item()) for name, values in scores.items()}
    shown = [
        f"{gain[name]:.2f} by {name} ({took[name]} s per image{_more(*compared[name, quick])})"
        for name in slow
    ]
    return f"{result}.", (
        f"{over} {' and '.join(shown)}; the best quicker method reaches {gain[quick]:.2f} "
        f"({quick}, {took[quick]} s)."
    )


def _verdict(names: list[str], worth: str) -> str:
    verb, whose = ("is", "its") if len(names) == 1 else ("are", "their")
    return f"{' and '.join(names)} {verb} {worth} {whose} time"


def _more(mean: float, low: float, high: float) -> str:
    """Returns the interval of a difference, nothing where it is unknown."""
    return "" if np.isnan(low) else f"; {low:+.2f} to {high:+.2f} above the best quicker method"
