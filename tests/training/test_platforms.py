"""The steps of training and evaluation can be lowered for devices that are not here."""

import jax
import jax.numpy as jnp
import pytest

from configs import base
from experiment.grid import expand
from models import MODELS
from models.classifier import split_model
from tests.models.filled import keyed, unfilled
from tests.models.test_models import KINDS
from training.optimizer import make_optimizer, make_schedule
from training.steps import Metrics, initial_state, make_eval_step, make_train_step

TRAINED = [name for name in KINDS if MODELS[name].trained_by_gradient]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TRAINED)
def test_steps_lower_for_cuda_and_tpu(monkeypatch, name, dtype):
    """Of networks that differ in numbers alone there is one, and of its equal blocks fewer."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    config = base.get_config(name)
    config.data.path, config.compute_dtype = "x", dtype
    config = expand(config)[0].config
    size, count = 64, 4
    model = keyed(unfilled(name, 6, size, dtype=jnp.dtype(dtype), shallow=True))
    _, params, stats = split_model(model)
    weights = {"params": params, "stats": stats}
    optimizer = make_optimizer(config, make_schedule(config, 10, 100), len(model.stages))
    state = jax.eval_shape(lambda w: initial_state(config, w, optimizer, 0), weights)
    shape = jax.ShapeDtypeStruct
    batch = {
        "image": shape((count, size, size, 3), jnp.uint8),
        "label": shape((count,), jnp.int32),
        "mask": shape((count,), bool),
        "row": shape((count,), jnp.int32),
        "epoch": shape((count,), jnp.int32),
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = make_train_step(config, model, optimizer, jnp.ones(6)).trace(state, batch, key)
    metrics = jax.eval_shape(Metrics.empty)
    evaluation = make_eval_step(model).trace(weights, metrics, batch)
    for traced in (step, evaluation):
        for platform in ("cuda", "tpu"):
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            assert "stablehlo" in text
            assert ("bf16" in text) == (dtype == "bfloat16" and name != "linear"), platform
    assert "custom_vjp" not in str(step.jaxpr), "a lowering that is the CPU's own"
