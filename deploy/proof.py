"""Does a model give the same answers in another form? Images decide, not trust."""

from collections.abc import Callable, Sequence

import numpy as np

from analysis.runs import evenly_spaced
from errors import UserError

IMAGES, BATCHES = 128, (32, 7, 1)  # of the test part; images at once
ALONE = 3  # images that are asked one by one
TOLERANCE = 1e-3  # of the standard deviation of the numbers compared
ODD_ONES = 0.02  # share of the images whose neighbours may change: equal distances are rounded
# Of the standard deviation of the logits that a run stored, wherever it was trained: multiplying
# with the 10 bits of TF32 moved them by up to 0.003, with the 7 of bfloat16 by up to 0.02. Weights
# of another seed move nearly every image by more than 0.2.
OF_THE_RUN = {"float32": 0.05, "bfloat16": 0.2}
ODD_OF_THE_RUN, ODD_VOTES_OF_THE_RUN = 0.02, 0.1  # shares of the images that may be further off

Answer = Callable[[np.ndarray], dict[str, np.ndarray]]


def some_images(images: np.ndarray) -> np.ndarray:
    """Returns up to IMAGES of the images, or of what belongs to each, evenly spaced: [N, ...]."""
    return np.asarray(images[evenly_spaced(len(images), IMAGES)])


def answered(answer: Answer, images: np.ndarray, size: int) -> dict[str, np.ndarray]:
    """Returns answers to images, so many at once; the last batch is filled with its last image."""
    size, parts = min(size, len(images)), []
    for start in range(0, len(images), size):
        rows = np.minimum(np.arange(start, start + size), len(images) - 1)
        found = answer(images[rows])
        parts.append({key: array[: len(images) - start] for key, array in found.items()})
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def prove(
    ours: Answer,
    theirs: Answer,
    images: np.ndarray,
    *,
    batches: Sequence[int] = BATCHES,
    votes: bool = False,
    stored: np.ndarray | None = None,
    dtype: str = "float32",
) -> dict:
    """Compares two forms of a model on images; returns what was found, as plain values.

    Args:
      ours, theirs: as `answers.answers`, compiled.
      images: uint8 [N, S, S, 3].
      batches: images at once; the first of both, and of all images, the others of `theirs` alone.
      votes: of the model's answers, a few may differ: it counts votes of neighbours.
      stored: logits [N, K] that its run stored, wherever it computed, in `dtype`.

    Raises:
      UserError: they differ by more than rounding does.
    """
    expected, both = answered(ours, images, batches[0]), []
    for size in batches:
        count = len(images) if size == batches[0] else max(size, ALONE)
        wanted = {key: array[:count] for key, array in expected.items()}
        both.append((wanted, answered(theirs, images[:count], size)))
    spread = {key: float(array.std()) for key, array in expected.items()}
    largest = relative = 0.0
    odd = np.zeros(len(images), bool)
    for wanted, found in both:
        if set(found) != set(wanted):
            raise UserError(f"the file gives {', '.join(found)}, and not {', '.join(wanted)}")
        for key in wanted:
            gap = np.abs(found[key].astype(np.float64) - wanted[key]).max(axis=1)
            gap[~np.isfinite(gap)] = np.inf
            share = np.where(gap == 0, 0.0, gap / (spread[key] or 1.0))
            odd[: len(share)] |= share > TOLERANCE
            relative = max(relative, share.max())
            largest = max(largest, gap.max()) if key == "logits" else largest
    changed = expected["logits"].argmax(axis=1) != both[0][1]["logits"].argmax(axis=1)
    proof = {
        "images": len(images),
        "batch_sizes": sorted({min(size, len(images)) for size in batches}),
        "largest_difference": float(largest),
        "relative_difference": float(relative),
        "changed_predictions": int(changed.sum()),
        "tolerance": TOLERANCE,
    }
    if odd.sum() > (max(1, ODD_ONES * len(images)) if votes else 0):
        raise UserError(
            f"the exported file answers differently: the largest difference is {relative:.1e} of "
            f"the standard deviation (at most {TOLERANCE:.0e} is rounding), in {odd.sum()} of "
            f"{len(images)} images, {changed.sum()} predictions changed; nothing was written. "
            "Another format may be sound; please report the architecture"
        )
    if stored is not None:
        proof |= _against_the_run(both[0][1]["logits"], stored, OF_THE_RUN[dtype], votes)
    return proof


def _against_the_run(
    logits: np.ndarray, stored: np.ndarray, tolerance: float, votes: bool
) -> dict[str, float]:
    """Compares with what a run stored; raises UserError where that was another model."""
    gap = np.full(len(stored), np.inf)
    if logits.shape == stored.shape:
        gap = np.abs(logits.astype(np.float64) - stored).max(axis=1)
    odd = int((gap > tolerance * stored.std()).sum())
    changed = int((logits.argmax(axis=1) != stored.argmax(axis=1)).sum())
    share = ODD_VOTES_OF_THE_RUN if votes else ODD_OF_THE_RUN
    if odd > max(1, share * len(stored)):
        raise UserError(
            f"the run's weights do not give the answers that it stored: in {odd} of {len(stored)} "
            f"test images a logit differs by more than {100 * tolerance:.0f} % of the standard "
            f"deviation, {changed} predictions changed; nothing was written. weights.safetensors "
            "or predictions_test.npz is of another run: copy this one again, or train it again"
        )
    return {
        "stored_largest_difference": float(gap.max()),
        "stored_changed_predictions": changed,
        "stored_tolerance": tolerance,
    }


def describe(proof: dict) -> str:
    """Returns the proof as a sentence."""
    return (
        f"{proof['images']} test images: the largest difference of a logit is "
        f"{proof['largest_difference']:.2g}, of any output {proof['relative_difference']:.1e} of "
        f"its standard deviation (tolerance {proof['tolerance']:.0e}); "
        f"{proof['changed_predictions']} predictions changed. Of those that the run stored "
        f"when it was trained, {proof['stored_changed_predictions']} differ; the largest "
        f"difference of a logit is {proof['stored_largest_difference']:.2g}"
    )
