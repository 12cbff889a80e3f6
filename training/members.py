"""The compiled steps of members: heads that differ in seed or setting and train at once.

Arrays of members are [S, G, ...], for S seeds and G settings. The step itself is that of
`training/steps.py`, under vmap: order of images and dropout are the seed's, whatever the setting.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from models import Classifier
from training.optimizer import make_optimizer, make_plateau, make_schedule
from training.steps import (
    Metrics,
    evaluated_weights,
    initial_state,
    make_eval_step,
    train_step_of,
    trained,
)


def initial_members(
    config: ConfigDict, heads: list[dict], settings: int, first: int, stages: int
) -> dict:
    """Returns the state of all members, from the weights of each seed that train.

    Its "step" is one number for all.
    """
    optimizer = make_optimizer(config, make_schedule(config, 1, 1), stages)
    weights = jax.tree.map(lambda *arrays: jnp.stack(arrays), *heads)
    seeds = jax.vmap(lambda w: initial_state(config, w, optimizer, first))(weights)
    state = jax.tree.map(lambda a: jnp.repeat(a[:, None], settings, axis=1), seeds)
    return state | {"step": jnp.zeros((), jnp.int32)}


def make_take_steps(
    config: ConfigDict, model: Classifier, first: int, per_epoch: int, total: int
) -> Callable[..., tuple[dict, dict]]:
    """Returns the jitted (state, constants, index, count, active) -> (state, report).

    It takes `count` steps on the features at `index`, int [L, S, B], L >= `count`; members
    that are not `active`, bool [S, G], stay as they are. The state is donated.

    `constants` are the frozen arrays, the features of a phase with their labels and, in a tuple,
    their teachers' logits, if any; the weights of classes, the keys of the S seeds, and the rates
    and decays of the G settings. The report is
    {"loss", "accuracy", "learning_rate", "bad_step"}, each [S, G].
    """
    teach = (lambda logits, *_: logits) if config.distill.teacher else None

    def schedule_of(rate: jax.Array) -> Callable:
        return make_schedule(config, per_epoch, total, rate)

    def take_steps(
        state: dict, constants: dict, index: jax.Array, count: int, active: jax.Array
    ) -> tuple[dict, dict]:
        frozen, labels = constants["frozen"], constants["labels"]

        def member(state: dict, rate: jax.Array, decay: jax.Array, batch: dict, key: jax.Array):
            optimizer = make_optimizer(config, schedule_of(rate), len(model.stages), decay)
            options = {"first": first, "cached": True, "teach": teach}
            step = train_step_of(config, model, optimizer, constants["classes"], **options)
            whole = state | {kind: frozen[kind] | state[kind] for kind in frozen}
            changed = step(whole, batch, key, batch.get("taught"))
            return changed | {kind: trained(changed[kind], first) for kind in frozen}

        axes = {name: None if name == "step" else 0 for name in state}
        of_seed = jax.vmap(member, (axes, 0, 0, None, None), axes)
        of_group = jax.vmap(of_seed, (axes, None, None, 0, 0), axes)

        def body(i: jax.Array, state: dict) -> dict:
            places = index[i]  # [S, B]
            batch = {
                "image": constants["features"][places],
                "label": labels[places % len(labels)],  # view after view
                "mask": jnp.ones(places.shape, bool),
            }
            if constants["taught"]:
                batch["taught"] = constants["taught"][0][places]
            rates, decays, keys = (constants[name] for name in ("rates", "decays", "keys"))
            return of_group(state, rates, decays, batch, keys)

        fresh = state | {"metrics": jax.tree.map(jnp.zeros_like, state["metrics"])}
        changed = jax.lax.fori_loop(0, count, body, fresh)
        step = changed.pop("step")
        report = of_members(lambda metrics: metrics.compute())(changed["metrics"])
        state = where(active, changed, {name: state[name] for name in changed}) | {"step": step}
        rates = jax.vmap(lambda rate: schedule_of(rate)(step - 1))(constants["rates"])
        report["learning_rate"] = rates * state["rate_scale"].scale
        return state, report | {"bad_step": state["bad_step"]}

    return jax.jit(take_steps, donate_argnums=0)


def make_settle(config: ConfigDict) -> Callable[..., tuple[dict, dict]]:
    """Returns the jitted (state, best, losses, active, better) -> (state, best weights).

    For after an evaluation: `losses`, `active` and `better` are [S, G].
    """

    def settle(
        state: dict, best: dict, losses: jax.Array, active: jax.Array, better: jax.Array
    ) -> tuple[dict, dict]:
        if config.schedule.name == "plateau":
            plateau, before = make_plateau(config), state["rate_scale"]
            update = of_members(lambda scale, loss: plateau.update({}, scale, value=loss)[1])
            state = state | {"rate_scale": where(active, update(before, losses), before)}
        return state, where(better, evaluated_weights(state), best)

    return jax.jit(settle, donate_argnums=(0, 1))


def make_eval_members(model: Classifier, first: int) -> Callable:
    """Returns the jitted (weights, metrics, batch, frozen) -> (logits [S, G, B, K], metrics)."""
    step = make_eval_step(model, first)

    def member(weights: dict, total: Metrics, batch: dict, frozen: dict):
        return step({kind: frozen[kind] | weights[kind] for kind in frozen}, total, batch)

    return jax.jit(of_members(member, (0, 0, None, None)))


def of_members(function: Callable, axes: int | tuple = 0) -> Callable:
    """Returns the function over the two axes of members."""
    return jax.vmap(jax.vmap(function, axes), axes)


def where(mask: jax.Array, new: dict, old: dict) -> dict:
    """Returns new arrays [S, G, ...] where the mask [S, G] is set, old ones elsewhere."""

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(mask.reshape(mask.shape + (1,) * (new.ndim - 2)), new, old)

    return jax.tree.map(choose, new, old)
