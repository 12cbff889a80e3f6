"""Which test images are shown: spread over the classes, by disagreement, or by their ids."""

import difflib
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from analysis.runs import FinishedRun
from errors import UserError


def in_turn(
    rows: Sequence[int], labels: np.ndarray, count: int, taken: Sequence[int] = ()
) -> list[int]:
    """Returns up to `count` of the rows: the first of each class not yet `taken`, and so on."""
    classes = pd.Series(labels[[*taken, *rows]])
    turns = classes.groupby(classes).cumcount().to_numpy()[len(taken) :]
    return [int(rows[i]) for i in np.argsort(turns, kind="stable")[:count]]


def sample_images(labels: np.ndarray, count: int) -> list[int]:
    """Returns up to `count` rows, drawn with a fixed seed and spread over the classes."""
    return in_turn(np.random.default_rng(0).permutation(len(labels)), labels, count)


def by_disagreement(votes: np.ndarray, labels: np.ndarray, count: int) -> list[int]:
    """Returns rows: half where the votes [M, N] disagree most, the rest where all of them agree."""
    dissent = len(votes) - stats.mode(votes, axis=0).count  # [N]
    order = np.random.default_rng(0).permutation(len(labels))
    order = order[np.argsort(-dissent[order], kind="stable")]
    disputed = in_turn(order[dissent[order] > 0], labels, count // 2)
    rest = in_turn(order[dissent[order] == 0], labels, count - len(disputed), disputed)
    return disputed + rest


def find_image(run: FinishedRun, image_id: str) -> int:
    """Returns the row of a test image; raises UserError with the nearest id if there is none."""
    ids = run.test["ids"].tolist()
    if image_id in ids:
        return ids.index(image_id)
    near = difflib.get_close_matches(image_id, ids, n=1, cutoff=0) or ids[:1]
    raise UserError(
        f"{run.path} was not tested on an image {image_id!r}; the nearest id is {near[0]!r}"
    )


def find_images(run: FinishedRun, images: str) -> list[int]:
    """Returns the rows of test images, given how many or their ids separated by commas."""
    if images.isdigit():
        rows = sample_images(run.test["labels"], int(images))
    else:
        rows = [find_image(run, part.strip()) for part in images.split(",") if part.strip()]
    if not rows:
        raise UserError(f"--images={images}: give at least one image, by number or id")
    return rows
