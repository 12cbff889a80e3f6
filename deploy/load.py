"""Load a model in any form: the directory of a run, or what `deploy.export` wrote.

Every form answers alike: `Predictor.answer` takes uint8 [B, S, S, 3] and returns logits [B, K] and
features [B, 32].
"""

import importlib
import json
import os
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np

from analysis.predict import WEIGHTS, Predictor, load_predictor
from errors import UserError
from models.weights.formats import read_metadata
from models.weights.own import KEY

ONNX, STABLEHLO = "model.onnx", "model.stablehlo"  # names in an exported folder
FILES = (WEIGHTS, ONNX, STABLEHLO)
NEEDED = ("temperature", "review_thresholds", "class_names", "image_size", "data")  # facts
PROGRAM, FACTS = "program.bin", "facts.json"  # members of a .stablehlo file, which is a zip


def load(path: Path, target_accuracy: float = 0.95, threads: int = 0) -> Predictor:
    """Returns the model of a run directory, of an exported folder, or of one of its files.

    `threads` is of ONNX Runtime; 0 takes all cores. Raises UserError for what is none of these.
    """
    if path.is_dir() and not (path / "config.json").exists():
        found = [name for name in FILES if (path / name).is_file()]
        if len(found) > 1:
            raise UserError(f"{path} holds {' and '.join(found)}: name one of the files")
        path = path / found[0] if found else path
    readers = {".onnx": _read_onnx, ".stablehlo": _read_stablehlo}
    if path.suffix not in readers:
        return load_predictor(path, target_accuracy)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    predictor = readers[path.suffix](path, threads)
    predictor.threshold(target_accuracy)
    return predictor


def package(name: str, extra: str) -> ModuleType:
    """Imports an optional package; raises UserError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{name} is not installed ({error}): pip install -c constraints.txt -e '.[{extra}]'"
        ) from error


def _read_onnx(file: Path, threads: int) -> Predictor:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else its maker is told of its use
    runtime = package("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    try:
        session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises types of its own
        raise UserError(f"{file} cannot be read by ONNX Runtime: {error}") from error
    facts = _facts(file, session.get_modelmeta().custom_metadata_map.get(KEY))
    names = [output.name for output in session.get_outputs()]
    taken = session.get_inputs()[0].name

    def answer(images: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(names, session.run(names, {taken: images}), strict=True))

    return Predictor(facts, file, answer)


def _read_stablehlo(file: Path, threads: int) -> Predictor:
    import jax.export  # a command that serves ONNX needs no JAX

    try:
        with zipfile.ZipFile(file) as members:
            facts = _facts(file, members.read(FACTS).decode())
            program = jax.export.deserialize(bytearray(members.read(PROGRAM)))
    except UserError:
        raise
    except Exception as error:  # bytes that are no program raise nearly any type
        raise UserError(
            f"{file} is damaged, or no StableHLO file of this project ({error!r}): "
            "export the run again"
        ) from error
    call = jax.jit(program.call)
    return Predictor(facts, file, lambda images: jax.tree.map(np.asarray, call(images)))


def facts_in(file: Path) -> dict:
    """Returns what an exported file, or a file of weights, states; {} if it is gone or no such."""
    try:
        return _stated(file)
    except (UserError, OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile):
        return {}


def _stated(file: Path) -> dict:
    if file.suffix == ".onnx":
        onnx = package("onnx", "onnx")
        try:
            properties = onnx.load(file, load_external_data=False).metadata_props
        except Exception as error:  # protobuf's own type
            raise ValueError(f"{file} is no ONNX file") from error
        return dict(json.loads({entry.key: entry.value for entry in properties}[KEY]))
    if file.suffix == ".stablehlo":
        with zipfile.ZipFile(file) as members:
            return dict(json.loads(members.read(FACTS)))
    return dict(json.loads(read_metadata(file)[KEY]))


def _facts(file: Path, text: str | None) -> dict:
    try:
        facts = json.loads(text or "")
        return {key: facts[key] for key in NEEDED} | facts
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} does not say how to use it ({error!r}): it was not written by deploy.export"
        ) from error
