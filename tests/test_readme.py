"""The README's own code, run as it stands there, with small weights in place of downloaded ones."""

import re
import shlex
from functools import partial
from importlib import import_module

import jax
import numpy as np
import pytest

from experiment.fields import GRID_FIELDS, Text, parse
from experiment.grid import expand
from experiment.search import Search
from models import MODELS
from models.classifier import Classifier, in_mode, split_model
from models.weights import loading
from models.weights.formats import write_safetensors
from models.weights.names import source_names
from tests.conftest import ROOT
from tests.models.filled import filled

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def test_the_python_code_gives_the_logits_of_evaluation(monkeypatch, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    shallow = type("ResNet50", (MODELS["resnet50"],), {"blocks": (1, 1, 1, 1)})
    monkeypatch.setitem(MODELS, "resnet50", shallow)
    network = filled("resnet50", 1000, 32)
    arrays = {p: a for part in split_model(network)[1:] for p, a in part.items()}
    names = source_names(network, "timm", list(arrays))
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {names[p]: _published(p, a) for p, a in arrays.items()}, {})
    monkeypatch.setattr(loading, "fetch", lambda entry: path)
    for block in blocks:
        size = int(re.search(r"image_size=(\d+)", block)[1])
        images = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
        scope = {"images": images}
        exec(block, scope)
        model, logits = scope["model"], scope["logits"]
        assert isinstance(model, Classifier) and logits.shape == (2, 6)

        @partial(jax.jit, compiler_options=QUICK)
        def run(model, images):
            return model(model.preprocess(images))

        evaluated = run(in_mode(model, training=False), images)
        np.testing.assert_allclose(logits, evaluated, atol=1e-4 * np.abs(evaluated).max())
        trained = run(in_mode(model, training=True), images)
        assert np.abs(trained - evaluated).max() > 0.1 * np.abs(evaluated).max()


def _published(path: str, array) -> np.ndarray:
    """An array in the layout of PyTorch."""
    if not path.endswith("kernel"):
        return np.asarray(array)
    return np.asarray(array).transpose(3, 2, 0, 1) if array.ndim == 4 else np.asarray(array).T


def test_the_tests_run_elsewhere_as_the_readme_says():
    command = (ROOT / ".ci/run").read_text().splitlines()[-1]
    assert command.startswith("python3.11 -m venv") and command.endswith("-m pytest")
    assert command in (ROOT / "README.md").read_text().splitlines()


def commands() -> list[str]:
    """The whole commands that train, of the README, the docs and the configs' docstrings."""
    files = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("configs/*.py")]
    text = "\n".join(file.read_text() for file in files).replace("\\\n", " ")
    found = re.findall(r"python main\.py (--config=.*)", text)
    assert len(found) > 12
    return list(dict.fromkeys(" ".join(line.split("#")[0].split()) for line in found))


@pytest.mark.parametrize("command", commands())
def test_the_commands_make_a_grid(command, tmp_path):
    """As `--dry_run` would; whether the data is there shows later."""
    given = dict(
        word.removeprefix("--").split("=", 1) for word in shlex.split(command) if "=" in word
    )
    name, _, models = given.pop("config").partition(":")
    config = import_module(name.removesuffix(".py").replace("/", ".")).get_config(models)
    fields = {k.removeprefix("config."): v for k, v in given.items() if k.startswith("config.")}
    overrides = {path: Text(value) for path, value in fields.items()}
    for path, text in fields.items():
        if path.split(".")[0] in (*GRID_FIELDS, "search") and not path.startswith("per_model."):
            section, _, field = path.rpartition(".")
            of = config[section] if section else config
            of[field] = parse(text, of[field], path, "command line")
            del overrides[path]
    assert expand(config, overrides)
    assert given.keys() - {f"config.{path}" for path in fields} <= {"workdir", "tune"}
    if "tune" in given:
        pytest.importorskip("optuna")
        search = Search(config, overrides, tmp_path, int(given["tune"]))
        assert len(search.check()) > len(config.models) and not list(tmp_path.iterdir())
