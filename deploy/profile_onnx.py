"""The ONNX file of a run that `deploy.profile` measures: in float32, as `deploy.export` does it."""

import json
from functools import partial
from pathlib import Path

import jax
import numpy as np

from analysis.answers import answering, answers
from analysis.predict import decode_image, predictor_of
from analysis.runs import FinishedRun
from deploy.load import ONNX, load, package
from deploy.proof import prove
from models.weights.own import KEY
from training.weights import classifier_from


def write_onnx(run: FinishedRun, photos: Path) -> tuple[Path, Path]:
    """Writes a run, and its preprocessing alone, beside the folder of its photos; returns both.

    Raises UserError if ONNX has no form for it, or other answers to the photos than the run.
    """
    package("onnx", "onnx")
    from deploy.onnx_convert import to_onnx  # an extra
    from deploy.onnx_graph import with_metadata

    predictor, folder = predictor_of(run), photos.parent
    facts = predictor.facts | {"compute_dtype": "float32"}
    model = classifier_from(predictor.file, facts)
    functions = {
        ONNX: partial(answers, model),
        "preprocess.onnx": lambda images: {"pixels": model.preprocess(images)},
    }
    for name, function in functions.items():
        content = to_onnx(function, facts["image_size"])
        (folder / name).write_bytes(with_metadata(content, {KEY: json.dumps(facts)}))
    images = np.stack([decode_image(facts, x.read_bytes()) for x in sorted(photos.iterdir())])
    with jax.default_matmul_precision("highest"):  # accelerators use fewer digits
        ours, theirs = answering(model), load(folder / ONNX).answer
        prove(ours, theirs, images, votes=not model.trained_by_gradient)
    return folder / ONNX, folder / "preprocess.onnx"
