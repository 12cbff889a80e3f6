"""Right and wrong answers of models whose true accuracies are known."""

import numpy as np
from scipy import stats

LEVEL = 1.2  # of the latent score; models of equal level have equal accuracy
SPREAD = np.sqrt(1 + 0.5**2 + 0.7**2)  # of difficulty, of a model's own view of it, of a seed
SLOPE = stats.norm.pdf(LEVEL / SPREAD) / SPREAD  # accuracy gained per unit of the latent score


def truth(scatter: float) -> float:
    """The accuracy of a model of no advantage, over all seeds and images."""
    return float(stats.norm.cdf(LEVEL / np.hypot(SPREAD, scatter / SLOPE)))


def draw(rng, seeds, images, scatter, advantage=(), group=1):
    """Answers float [S, N] of a model for each of `seeds`.

    Seeds of a model scatter by `scatter` (in accuracy, a number or one a model); `advantage` is the
    accuracy that the first models are better by; `group` images in a row are equally difficult.
    """
    units = images // group
    common = LEVEL + rng.normal(size=units)
    better = np.pad(np.asarray(advantage, float), (0, len(seeds) - len(advantage)))
    scatter = np.broadcast_to(scatter, len(seeds))
    answers = []
    for count, gain, own in zip(seeds, better, scatter, strict=True):
        view = np.repeat(common + 0.5 * rng.normal(size=units), group)
        shift = (gain + own * rng.normal(size=(count, 1))) / SLOPE
        answers.append((view + shift + 0.7 * rng.normal(size=(count, images)) > 0).astype(float))
    return answers
