"""What models are compared by, image by image: accuracy, balanced accuracy or macro F1."""

import numpy as np

TITLES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
}


def criterion_of(config: dict) -> str:
    """Returns what a run's models are compared by: its `select`; accuracy where that is the loss.

    The loss chooses the weights of one model. Between models it would judge their calibration too.
    """
    select = config.get("select", "loss")
    return select if select in TITLES else "accuracy"


def values(labels: np.ndarray, predicted: np.ndarray, criterion: str = "accuracy") -> np.ndarray:
    """Returns a value per image, float [N], whose mean is the criterion.

    Of accuracy they are 1 and 0. Of the others they are the criterion and each image's influence on
    it (the linear term of its expansion, Hampel 1974), so that their spread gives its variance.
    """
    right = (labels == predicted).astype(float)
    if criterion == "accuracy":
        return right
    classes, label = np.unique(labels, return_inverse=True)  # those with images
    support = np.bincount(label).astype(float)
    hits = np.bincount(label, right)
    count = len(labels) / len(classes)
    if criterion == "balanced_accuracy":
        recall = hits / support
        return recall.mean() + count / support[label] * (right - recall[label])
    place = np.minimum(np.searchsorted(classes, predicted), len(classes) - 1)
    known = classes[place] == predicted
    total = support + np.bincount(place, known, len(classes))
    f1 = 2 * hits / total
    own = (2 * right - f1[label]) / total[label]
    taken = np.where(known, f1[place] / total[place], 0.0)
    return f1.mean() + count * (own - taken)


def weights(labels: np.ndarray, criterion: str = "accuracy") -> np.ndarray | None:
    """Returns how much each image counts, float [N]: each class the same; None for accuracy."""
    if criterion == "accuracy":
        return None
    _, label, support = np.unique(labels, return_inverse=True, return_counts=True)
    return len(labels) / len(support) / support[label]
