import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from models.classifier import split_model
from tests.models.filled import unfilled
from training.optimizer import is_kernel, l1_penalty, make_optimizer, make_plateau, make_schedule


def config(**changes):
    settings = base.get_config()
    for path, value in changes.items():
        section, field = path.split("__")
        settings[section][field] = value
    return settings


def rates(settings, steps=(0, 5, 10, 50, 99, 100), per_epoch=10, total=100):
    schedule = make_schedule(settings, per_epoch, total)
    return [float(schedule(step)) for step in steps]


def test_schedules():
    rate = {"optimizer__learning_rate": 1.0}
    assert rates(config(schedule__name="constant", **rate)) == [1.0] * 6
    cosine = rates(config(schedule__name="cosine", **rate))
    np.testing.assert_allclose(
        cosine, [(1 + np.cos(np.pi * s / 100)) / 2 for s in (0, 5, 10, 50, 99, 100)], atol=1e-6
    )
    ends = rates(config(schedule__name="cosine", schedule__end_factor=0.1, **rate))
    np.testing.assert_allclose(ends[-1], 0.1, rtol=1e-5)
    warm = rates(config(schedule__name="cosine", schedule__warmup_epochs=1.0, **rate))
    np.testing.assert_allclose(warm[:3], [0.0, 0.5, 1.0], atol=1e-6)
    np.testing.assert_allclose(warm[-1], 0.0, atol=1e-6)
    drops = {"schedule__name": "step", "schedule__step_epochs": (4, 8), "schedule__factor": 0.1}
    np.testing.assert_allclose(
        rates(config(**drops, **rate), (39, 40, 79, 80)), [1, 0.1, 0.1, 0.01], rtol=1e-5
    )
    late = config(**drops, **rate, schedule__warmup_epochs=1.0)
    np.testing.assert_allclose(rates(late, (5, 39, 40, 80)), [0.5, 1, 0.1, 0.01], rtol=1e-5)


def test_weight_decay_spares_biases_and_norms():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "scale": jnp.ones(2)}
    assert is_kernel(params) == {"kernel": True, "bias": False, "scale": False}
    zero = {name: jnp.zeros_like(p) for name, p in params.items()}
    for name in ("adamw", "sgd"):
        settings = config(
            optimizer__name=name, optimizer__weight_decay=0.1, optimizer__nesterov=False
        )
        optimizer = make_optimizer(settings, optax.constant_schedule(0.5), stages=3)
        updates, _ = optimizer.update(zero, optimizer.init(params), params)
        np.testing.assert_allclose(updates["kernel"], -0.05 * np.ones((2, 2)), rtol=1e-6)
        assert not updates["bias"].any() and not updates["scale"].any()


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_updates_by_hand(name):
    settings = config(optimizer__name=name, optimizer__weight_decay=0.1, optimizer__nesterov=False)
    optimizer = make_optimizer(settings, optax.constant_schedule(0.01), stages=3)
    p, m, v = np.array([[1.0, -2.0]]), 0.0, 0.0
    params = {"kernel": jnp.asarray(p)}
    state = optimizer.init(params)
    for step in range(1, 4):
        g = np.array([[0.5, step]])
        updates, state = optimizer.update({"kernel": jnp.asarray(g)}, state, params)
        params = optax.apply_updates(params, updates)
        if name == "sgd":
            m = 0.9 * m + g + 0.1 * p
            p = p - 0.01 * m
        else:
            coupled = g + (0.1 * p if name == "adam" else 0)
            m, v = 0.9 * m + 0.1 * coupled, 0.999 * v + 0.001 * coupled**2
            adam = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
            p = p - 0.01 * (adam + (0.1 * p if name == "adamw" else 0))
        np.testing.assert_allclose(params["kernel"], p, rtol=1e-5)


def test_clipping_bounds_the_gradient_norm():
    settings = config(optimizer__name="sgd", optimizer__clip_norm=1.0, optimizer__momentum=0.0)
    settings.optimizer.weight_decay = 0.0
    optimizer = make_optimizer(settings, optax.constant_schedule(1.0), stages=3)
    params = {"kernel": jnp.zeros((1, 2))}
    updates, _ = optimizer.update(
        {"kernel": jnp.array([[30.0, 40.0]])}, optimizer.init(params), params
    )
    np.testing.assert_allclose(updates["kernel"], [[-0.6, -0.8]], rtol=1e-5)


def test_l1_counts_kernels_only():
    params = {"a.kernel": jnp.array([[1.0, -2.0]]), "a.bias": jnp.array([5.0])}
    assert float(l1_penalty(params | {"positions": jnp.ones((1, 5, 2))})) == 3.0


def test_a_transformers_token_and_positions_do_not_decay():
    params = split_model(unfilled("vit_s16", 6, 32, shallow=True))[1]
    spared = {path.rpartition(".")[2] for path, decays in is_kernel(params).items() if not decays}
    assert spared == {"class_token", "positions", "bias", "scale"}
    assert all(is_kernel(params)[path] for path in params if path.endswith("kernel"))


def test_plateau_lowers_the_rate_after_patience_runs_out():
    plateau = make_plateau(config(schedule__factor=0.5, schedule__patience=2))
    state, scales = plateau.init({}), []
    for loss in (1.0, 0.9, 0.9, 0.9, 0.9, 0.9, 0.1):
        state = plateau.update({}, state, value=loss)[1]
        scales.append(float(state.scale))
    assert scales == [1, 1, 1, 0.5, 0.5, 0.25, 0.25]


def test_layer_decay_slows_earlier_stages():
    settings = config(optimizer__name="sgd", optimizer__momentum=0.0, optimizer__weight_decay=0.0)
    settings.layer_decay = 0.5
    optimizer = make_optimizer(settings, optax.constant_schedule(1.0), stages=3)
    params = {f"stages.{i}.kernel": jnp.zeros((2, 2)) for i in range(3)}
    gradient = {path: jnp.ones((2, 2)) for path in params}
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    assert [float(updates[path][0, 0]) for path in params] == [-0.25, -0.5, -1.0]
