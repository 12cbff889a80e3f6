"""Confusion matrices of the models, and photos of the mistakes in their cells, within a budget."""

import base64
import io
from collections import Counter

import numpy as np
from PIL import Image

from analysis import compare, evaluate
from analysis.compare import Comparison
from analysis.forward import load_test_images
from analysis.page.section import Gallery, Matrix, Photo
from analysis.runs import FinishedRun, same_images
from errors import UserError

CLASSES = 25  # of more, a matrix cannot be read
CONFUSED = 40  # pairs of classes in place of a matrix
CELLS = 12_000  # of all matrices; they go to the best models
PER_CELL = 12  # photos, of each model's matrix
PHOTOS = 1_000
BYTES = 8_000_000  # of all photos
SIDE = 112  # pixels of a thumbnail


def make_gallery(comparison: Comparison) -> Gallery:
    """Returns matrices (of up to 25 classes) of the best models, and photos of their mistakes."""
    first = comparison.runs[0]
    classes = len(first.class_names)
    compared = {
        label: runs for label, runs in comparison.groups.items() if same_images(runs[0], first)
    }
    shown = list(compared)[: max(1, CELLS // classes**2)]
    matrices = []
    if classes <= CLASSES:
        counts = {label: compare.mean_confusion(compared[label]) for label in shown}
        matrices = [Matrix(label, of.round(2).tolist()) for label, of in counts.items()]
    gallery = Gallery(first.class_names, matrices, [])
    if not matrices:
        gallery.pairs = most_confused(compare.mean_confusion(compared[shown[0]]))
    try:
        photos = load_test_images(first, comparison.data_path)
    except UserError as error:
        gallery.note = f"No photos can be shown: {error}"
        return gallery
    gallery.small = len(photos[0]) <= 24
    groups = {label: compared[label] for label in shown or list(compared)[:1]}
    rows, wrong = choose(groups, first.test["labels"])
    spent = 0
    for row in rows:
        source = thumbnail(photos[row])
        spent += len(source)
        if spent > BYTES:
            break
        gallery.photos.append(_photo(row, source, groups))
    if not wrong:
        gallery.note = "No run gets a test image wrong."
        return gallery
    gallery.note = f"All {wrong:,} test images that some run gets wrong."
    if len(gallery.photos) < wrong:
        gallery.note = (
            f"{len(gallery.photos):,} of the {wrong:,} test images that some run gets wrong, the "
            f"most often wrong first; while space lasts, at least {PER_CELL} for each cell."
        )
    gallery.note += " An image that every model gets wrong often has a wrong label."
    return gallery


def most_confused(counts: np.ndarray) -> list[tuple[int, int, float]]:
    """Returns (true, predicted, images) of the fullest wrong cells of a matrix [K, K]."""
    wrong = counts * (1 - np.eye(len(counts)))
    fullest = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSED]
    cells = zip(*np.unravel_index(fullest, wrong.shape), strict=True)
    return [(int(i), int(j), float(wrong[i, j])) for i, j in cells if wrong[i, j]]


def choose(groups: dict[str, list[FinishedRun]], labels: np.ndarray) -> tuple[list[int], int]:
    """Returns up to `PHOTOS` test images, those that most runs miss first, and how many are missed.

    Every cell of every model's matrix gets its first photo before any gets its second.
    """
    said = {label: np.array([run.predicted for run in runs]) for label, runs in groups.items()}
    share = np.mean([(classes != labels).mean(axis=0) for classes in said.values()], axis=0)
    wrong = np.flatnonzero(share)
    loss = evaluate.losses(labels, next(iter(groups.values()))[0].test["logits"])
    wrong = wrong[np.lexsort((-loss[wrong], -share[wrong]))]
    cells = {
        row: {
            (label, labels[row], predicted)
            for label, classes in said.items()
            for predicted in classes[:, row]
            if predicted != labels[row]
        }
        for row in wrong.tolist()
    }
    filled, chosen = Counter(), {}
    for enough in range(1, PER_CELL + 1):
        for row, of in cells.items():
            if row not in chosen and len(chosen) < PHOTOS and any(filled[c] < enough for c in of):
                chosen[row] = True
                filled.update(of)
    return list(chosen), len(wrong)


def _photo(row: int, source: str, groups: dict[str, list[FinishedRun]]) -> Photo:
    run = next(iter(groups.values()))[0]
    said = {label: dict(Counter(int(r.predicted[row]) for r in of)) for label, of in groups.items()}
    return Photo(source, str(run.test["ids"][row]), int(run.test["labels"][row]), said)


def thumbnail(photo: np.ndarray) -> str:
    """Returns a photo uint8 [S, S, 3] as a data URI: JPEG, or PNG of very few pixels."""
    image, file = Image.fromarray(photo), io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    kind = "png" if max(image.size) <= 24 else "jpeg"
    image.save(file, kind, quality=80, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
