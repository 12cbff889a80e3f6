"""Runs that differ in the seed alone share their programs, and no others do."""

import gc
import weakref
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from experiment.fields import flatten, unflatten
from models import create_model
from models.classifier import MISTAKES, split_model
from train import train_and_evaluate
from training import programs
from training.programs import Outline, settings, shared
from training.steps import Metrics, make_eval_step, train_program


@pytest.fixture
def compiled():
    """A list that grows by one whenever a program is compiled or loaded."""
    events, names = [], "/jax/core/compile/backend_compile_duration"

    def listen(event, duration, **_):
        events.extend([event] * (event == names))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def logits(run_dir):
    return np.load(run_dir / "predictions_test.npz")["logits"]


PHASES = {"phases": "head,all", "phase__head__augment_views": 1, "model__dropout": 0.3}


@pytest.mark.parametrize(("model", "changes"), [("knn", {}), ("cnn", PHASES)])
def test_a_second_seed_compiles_nothing(digits_run, tmp_path, compiled, model, changes):
    short = {f"phase__{name}__epochs": 1 for name in ("head", "all") if changes}
    runs = [digits_run(model, seed=seed, **changes | short) for seed in (0, 1)]
    programs._made.clear()
    train_and_evaluate(runs[0], tmp_path / "first")
    assert compiled
    compiled.clear()
    train_and_evaluate(runs[1], tmp_path / "second")
    assert not compiled
    programs._made.clear()
    train_and_evaluate(runs[1], tmp_path / "alone")
    np.testing.assert_array_equal(logits(tmp_path / "second"), logits(tmp_path / "alone"))


def test_every_field_of_a_config_but_the_seed_tells_programs_apart(digits_run):
    config = digits_run()
    flat, changed = flatten(config), 0
    for path, value in flat.items():
        other = ConfigDict(unflatten(flat | {path: f"not {value}"}))
        assert (settings(other) == settings(config)) == (path in ("seed", "variant")), path
        changed += settings(other) != settings(config)
    assert changed > 50


def outline(name, seed=0, classes=3, **fields):
    build = partial(create_model, name, classes, seed=seed, image_size=32, **fields)
    return Outline.of(nnx.eval_shape(build))


def test_models_that_differ_in_anything_but_the_seed_have_different_outlines():
    mistaken = outline("mlp").model()
    mistaken.preprocessing = MISTAKES["swapped"](mistaken.preprocessing)
    different = [
        outline("mlp"), outline("mlp", dropout=0.2), outline("mlp", hidden=(64,)),
        outline("mlp", classes=4), outline("mlp", dtype="bfloat16"), outline("linear"),
        Outline.of(mistaken),
    ]  # fmt: skip
    assert outline("mlp", seed=1) == different[0]
    for i, one in enumerate(different):
        assert [one == other for other in different].count(True) == 1, i


@pytest.mark.parametrize("name", ["cnn_deep", "vgg16_bn", "resnet18", "mobilenet_v2", "vit_s16"])
def test_the_seeds_of_an_architecture_have_one_outline(name):
    assert outline(name, seed=0) == outline(name, seed=1)


def test_programs_keep_no_arrays_of_a_run(digits_run):
    config, model = digits_run("mlp"), create_model("mlp", 10, image_size=8)
    _, params, stats = split_model(model)
    images = np.zeros((4, 8, 8, 3), np.uint8)
    batch = {"image": images, "label": np.zeros(4, np.int32), "mask": np.ones(4, bool)}
    make_eval_step(model)({"params": params, "stats": stats}, Metrics.empty(), batch)
    train_program(config, model, jax.numpy.ones(10), (5, 10))
    arrays = [weakref.ref(array) for array in params.values()]
    del model, params, stats
    gc.collect()
    assert [array() for array in arrays] == [None] * len(arrays)


def test_the_programs_kept_are_the_newest():
    made = []

    def ask(number):
        return shared(("number", number), lambda: made.append(number) or number)

    assert [ask(0), ask(0), ask(1)] == [0, 0, 1] and made == [0, 1]
    for number in range(programs.KEPT + 1):
        ask(number)
    assert ask(0) == 0 and made.count(0) == 2
    assert len(programs._made) == programs.KEPT
