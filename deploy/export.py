"""A folder to hand on: a model that knows its use, proven to answer as its run does, and its card.

    python -m deploy.export RUN OUT --format=onnx        # runs with ONNX Runtime alone
    python -m deploy.export RUN OUT --format=stablehlo   # with jax and flatbuffers: CPU, CUDA, TPU
    python -m deploy.export RUN OUT                      # weights, for this project

ONNX and StableHLO take pixels, uint8 [B, S, S, 3] in batches of any size; preprocessing and weights
are inside, and with --probabilities the softmax with the run's temperature. Every file states class
names, how photos become pixels, temperature, review thresholds, sets, and where it comes from.
Before it appears, its answers to 128 test images are compared with the run's, and with those that
the run stored when it was trained: more than rounding is an error, and leaves what was there.
Formats may share a folder; README.md is the card of all.
Exit codes: 0 written and proven, 2 a mistake.
"""

import json
import os
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from absl import flags

from analysis.answers import answering, answers
from analysis.confidence import softmax
from analysis.forward import load_images
from analysis.predict import CARD, Predictor, predictor_of
from analysis.runs import FinishedRun, load_run
from deploy.card import licence_of, model_card, short_name
from deploy.load import FACTS, FILES, ONNX, PROGRAM, STABLEHLO, WEIGHTS, facts_in, load, package
from deploy.proof import BATCHES, describe, prove, some_images
from errors import UserError
from experiment.command import arguments, output_folder, run_command
from models import Classifier
from models.classifier import blame
from models.lowering import plain_lowering
from models.weights.own import KEY, arrays_of, write_own
from training.weights import classifier_from

FORMATS = {"safetensors": WEIGHTS, "onnx": ONNX, "stablehlo": STABLEHLO}
PLATFORMS = ("cpu", "cuda", "tpu")
Write = Callable[[Path, dict], None]  # to a file, with facts


def export_run(
    run: FinishedRun,
    folder: Path,
    form: str = "safetensors",
    *,
    probabilities: bool = False,
    data_path: str = "",
) -> dict:
    """Writes a complete run as one of FORMATS, and README.md, into a folder; returns the proof.

    `data_path` is where the run's images lie now. Raises UserError where the file would not answer
    as the run does, and then leaves the folder as it was.
    """
    if probabilities and form == "safetensors":
        raise UserError("--probabilities is of onnx and stablehlo: weights compute nothing")
    for name in ("onnx", "onnxruntime") if form == "onnx" else ():
        package(name, "onnx")
    made = predictor_of(run)
    facts = _facts_of(run, made, form)
    others = _others(folder, FORMATS[form], facts)
    images = _images_of(run, data_path)
    if form != "safetensors":
        facts |= {"compute_dtype": "float32", "probabilities": probabilities}
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    stored = some_images(run.test["logits"])
    try:
        with tempfile.TemporaryDirectory(dir=output_folder(folder, "OUT"), prefix=".part") as part:
            file = Path(part) / FORMATS[form]
            with _exactly():
                facts["proof"] = _write_proven(file, facts, made, images, stored, probabilities)
            load(file)
            card = Path(part) / CARD
            files = {**others, file.name: facts}
            text = model_card(run, made, facts["licence"], dict(sorted(files.items())))
            card.write_text(text, encoding="utf-8")
            os.replace(file, folder / file.name)
            os.replace(card, folder / CARD)
    except OSError as error:
        raise UserError(f"cannot export to {folder}: {error}") from error
    finally:
        for path in missing:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
    return facts["proof"]


def _write_proven(
    file: Path,
    facts: dict,
    made: Predictor,
    images: np.ndarray,
    stored: np.ndarray,
    probabilities: bool,
) -> dict:
    """Writes the file, compares, and writes it again with the proof among its facts."""
    model, temperature = classifier_from(made.file, facts), None
    if probabilities:
        temperature = facts["temperature"]
    prepare = {"safetensors": _safetensors, "onnx": _onnx, "stablehlo": _stablehlo}[facts["format"]]
    write = prepare(model, facts["image_size"], temperature)
    write(file, facts)
    ours, theirs = _expected(model, temperature), load(file).answer
    options = {"stored": stored, "dtype": made.facts["compute_dtype"]}
    if facts["format"] == "safetensors":  # weights, of one program
        options["batches"] = BATCHES[:1]
    proof = prove(ours, theirs, images, votes=not model.trained_by_gradient, **options)
    write(file, facts | {"proof": proof})
    return proof


def _exactly() -> AbstractContextManager:
    """Computes on the processor: others multiply float32 with fewer digits."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # it was switched off by JAX_PLATFORMS
        return jax.default_matmul_precision("highest")


def _images_of(run: FinishedRun, data_path: str) -> np.ndarray:
    try:
        return some_images(load_images(run, "test", data_path))
    except UserError as error:
        raise UserError(
            f"the proof needs the run's test images: {error}\n"
            "Say where they lie now with --data=PATH."
        ) from error


def _facts_of(run: FinishedRun, predictor: Predictor, form: str) -> dict:
    about, weights = run.environment, run.summary.get("weights", "none")
    versions = {"python": about["python"], **about["packages"], "git_commit": about["git_commit"]}
    dataset = {key: run.dataset[key] for key in ("fingerprint", "identity") if key in run.dataset}
    return predictor.facts | {
        "began": short_name(weights),
        "licence": licence_of(weights),
        "versions": versions,
        "format": form,
        "run": run.name,
        "run_version": predictor.version,
        "dataset": dataset,
    }


def _others(folder: Path, name: str, facts: dict) -> dict[str, dict]:
    """Returns the facts of other formats in a folder; raises UserError unless they belong there."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is not a folder: name a new one")
    names = sorted(path.name for path in folder.glob("[!.]*"))  # .git may publish it
    found = {file: facts_in(folder / file) for file in FILES if file in names}
    if names and not any("review_thresholds" in stated for stated in found.values()):
        raise UserError(
            f"{folder} is not empty and no earlier export (it holds {names[0]!r}): name a new "
            "folder, or empty it"
        )
    for file, stated in found.items():
        if "method" in stated:
            raise UserError(
                f"{folder / file} is a model that deploy.compress made with --method="
                f"{stated['method']}: name another folder"
            )
        if file != name and stated.get("run_version") != facts["run_version"]:
            raise UserError(
                f"{folder / file} is an export of {stated.get('run', 'another model')}, and one "
                f"card cannot tell of two: name another folder, or delete that file"
            )
    return {file: stated for file, stated in found.items() if file != name}


# --- formats -----------------------------------------------------------------------------------


def _function(model: Classifier, temperature: float | None) -> Callable[[jax.Array], dict]:
    def function(images: jax.Array) -> dict[str, jax.Array]:
        with blame(type(model), "cannot be traced for batches of any size"):
            outputs = answers(model, images)
        if temperature is not None:
            outputs["probabilities"] = jax.nn.softmax(outputs["logits"] / temperature)
        return outputs

    return function


def _expected(model: Classifier, temperature: float | None) -> Callable[[Any], dict]:
    answer = answering(model)

    def expected(images: Any) -> dict:
        outputs = answer(images)
        if temperature is not None:
            outputs["probabilities"] = softmax(outputs["logits"], temperature)
        return outputs

    return expected


def _safetensors(model: Classifier, side: int, temperature: float | None) -> Write:
    arrays = arrays_of(model)
    return lambda file, facts: write_own(file, arrays, facts)


def _onnx(model: Classifier, side: int, temperature: float | None) -> Write:
    from deploy.onnx_convert import to_onnx  # an extra
    from deploy.onnx_graph import OPSET, with_metadata

    content = to_onnx(_function(model, temperature), side)

    def write(file: Path, facts: dict) -> None:
        stated = json.dumps(facts | {"opset": OPSET})
        file.write_bytes(with_metadata(content, {KEY: stated}))

    return write


def _stablehlo(model: Classifier, side: int, temperature: float | None) -> Write:
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.uint8)
    limit = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)  # paths of this machine
    try:
        with plain_lowering():
            function = jax.jit(_function(model, temperature))
            exported = jax.export.export(function, platforms=PLATFORMS)(images)
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)
    program = bytes(exported.serialize())

    def write(file: Path, facts: dict) -> None:
        with zipfile.ZipFile(file, "w", allowZip64=True) as members:
            for name, content in ((PROGRAM, program), (FACTS, json.dumps(facts).encode())):
                members.writestr(zipfile.ZipInfo(name), content)  # no date: the same bytes again

    return write


def main(argv: list[str]) -> int:
    """Exports a run into a folder."""
    usage = "deploy.export RUN OUT [--format=FORMAT] [--probabilities] [--data=PATH]"
    given = arguments(argv, usage, 2, 2)
    run_dir, folder = (Path(path).expanduser() for path in given)
    run, form = load_run(run_dir), FORMAT.value
    if form != "safetensors" and run.config.get("compute_dtype", "float32") != "float32":
        print(f"{run.config['compute_dtype']} in training; the file computes in float32")
    options = {"probabilities": PROBABILITIES.value, "data_path": DATA.value}
    proof = export_run(run, folder, form, **options)
    size = (folder / FORMATS[form]).stat().st_size
    print(f"{folder}: {FORMATS[form]} ({size / 1e6:.1f} MB), {CARD}\n{describe(proof)}")
    return 0


if __name__ == "__main__":
    FORMAT = flags.DEFINE_enum("format", "safetensors", list(FORMATS), "What to write")
    PROBABILITIES = flags.DEFINE_bool("probabilities", False, "Add the output probabilities")
    DATA = flags.DEFINE_string("data", "", "Where the run's images lie now, if they were moved")
    run_command(main)
