"""LIME and SHAP through the packages of these names (extra `[explain]`): which regions matter?

Both hide regions of one image behind its blur, as deletion and insertion do, ask the model for the
logit of a class, and share it out among the regions. Hiding behind the image's mean colour gives
less faithful maps (gain over a random map of a cnn_deep: Intel photos 0.35 against 0.46 for LIME
and 0.43 for SHAP, digits 0.49 and 0.48 against 0.56 and 0.61; 8 images, 512 evaluations).
"""

import contextlib
import io
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np

from analysis.explain.faithfulness import blurred
from errors import UserError

EVALUATIONS = 256  # of the model, an image
BATCH = 64  # of them at once
SEGMENTS = 64  # that LIME hides and shows, about
SMALLEST_SLIC = 32  # pixels a side; smaller images are cut into a grid of 8x8
INSTALL = "pip install -c constraints.txt -e '.[explain]'"


def installed(package: str) -> bool:
    """Returns whether a package can be imported; none: always."""
    return not package or find_spec(package) is not None


def need(package: str) -> None:
    """Raises UserError with the command that installs a missing package."""
    if not installed(package):
        raise UserError(f"method={package} needs the package {package!r}: {INSTALL}")


def segments(image: np.ndarray) -> np.ndarray:
    """Returns int [S, S], 0 .. n - 1: superpixels by SLIC, a grid where the image is tiny.

    On 8x8 digits, LIME's gain over a random map was 0.67 with the grid and 0.56 with SLIC.
    """
    from skimage.segmentation import slic  # lime depends on it

    size = len(image)
    if size >= SMALLEST_SLIC:
        return slic(image / 255, n_segments=SEGMENTS, compactness=10, start_label=0)
    side = min(size, round(SEGMENTS**0.5))
    places = np.arange(size) * side // size
    return places[:, None] * side + places


def lime_map(predict: Callable, image: np.ndarray, target: int) -> np.ndarray:
    """Returns LIME's positive weights [S, S] of an image's segments (1602.04938).

    `predict` gives logits [n, K] of images [n, S, S, 3] in 0..255, here and below.
    """
    from lime.lime_image import LimeImageExplainer

    image, parts = image.astype(np.float64), segments(image)
    explainer = LimeImageExplainer(feature_selection="none", random_state=0)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar an image
        found = explainer.explain_instance(
            image, predict, labels=(target,), top_labels=None, hide_color=blurred(image[None])[0],
            num_samples=EVALUATIONS, batch_size=BATCH, segmentation_fn=lambda _: parts,
        )  # fmt: skip
    weights = np.zeros(parts.max() + 1)
    for part, weight in found.local_exp[target]:
        weights[part] = weight
    return _positive(weights, found.intercept[target])[parts]


def shap_map(predict: Callable, image: np.ndarray, target: int) -> np.ndarray:
    """Returns the positive Owen values [S, S] of rectangles, split where it matters (1705.07874).

    Their sum with the negative ones is the logit's difference from that of the blurred image.
    """
    import shap

    image = image.astype(np.float64)
    masker = shap.maskers.Image(blurred(image[None])[0].astype(np.float64), image.shape)
    explainer = shap.PartitionExplainer(lambda images: predict(images)[:, target], masker)
    state = np.random.get_state()
    np.random.seed(0)  # shap breaks ties by numpy's global generator
    try:
        found = explainer(image[None], max_evals=EVALUATIONS, batch_size=BATCH, silent=True)
    finally:
        np.random.set_state(state)
    return _positive(found.values[0].sum(axis=-1), found.base_values[0])


def _positive(weights: np.ndarray, logit: float) -> np.ndarray:
    """Returns the positive weights that are more than the rounding of a logit."""
    return np.where(weights > 1e-6 * abs(logit), weights, 0)
