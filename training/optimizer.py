"""The optax transformation and the learning-rate schedule that a config asks for."""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from models.classifier import stage_of


def make_schedule(
    config: ConfigDict, steps_per_epoch: int, total_steps: int, rate: jax.Array | None = None
) -> optax.Schedule:
    """Returns the learning rate as a function of the step; `plateau` is constant here.

    `rate`, which may be traced, stands in for `optimizer.learning_rate`.
    """
    schedule = config.schedule
    rate = config.optimizer.learning_rate if rate is None else rate
    warmup = min(round(schedule.warmup_epochs * steps_per_epoch), total_steps)
    if schedule.name == "cosine":
        main = optax.cosine_decay_schedule(rate, max(total_steps - warmup, 1), schedule.end_factor)
    elif schedule.name == "step":
        drops = {round(e * steps_per_epoch) - warmup: schedule.factor for e in schedule.step_epochs}
        main = optax.piecewise_constant_schedule(rate, drops)
    else:
        main = optax.constant_schedule(rate)
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), main], [warmup])


def is_kernel(params: dict) -> dict:
    """Returns which parameters weight decay applies to, by path.

    All but biases and norms, which are 1-D, and what is added to every image of a batch alike,
    [1, ...], as a transformer's class token and positions.
    """
    return {
        path: p.ndim > 1 and (p.shape[0] > 1 or path.rpartition(".")[2] == "kernel")
        for path, p in params.items()
    }


def l1_penalty(params: dict) -> jax.Array:
    """Returns the sum of absolute values of all kernels."""
    kernels = is_kernel(params)
    return sum((jnp.abs(p).sum() for path, p in params.items() if kernels[path]), jnp.zeros(()))


def scale_by_stage(decay: float, stages: int) -> optax.GradientTransformation:
    """Multiplies the update of stage i by decay ** (stages - 1 - i), so the head's by one."""

    def update(updates: dict, state, params=None) -> tuple[dict, optax.OptState]:
        del params
        factor = {path: decay ** (stages - 1 - stage_of(path)) for path in updates}
        return {path: factor[path] * u for path, u in updates.items()}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(
    config: ConfigDict, schedule: optax.Schedule, stages: int, weight_decay: jax.Array | None = None
) -> optax.GradientTransformation:
    """Returns clipping, weight decay and the update rule of `config.optimizer` in one chain.

    `weight_decay`, which may be traced, stands in for the one of the config.
    """
    optimizer = config.optimizer
    decay = optimizer.weight_decay if weight_decay is None else weight_decay
    decay = optax.add_decayed_weights(decay, mask=is_kernel)
    parts = [optax.clip_by_global_norm(optimizer.clip_norm)] if optimizer.clip_norm else []
    if optimizer.name == "adamw":
        parts += [optax.scale_by_adam(optimizer.b1, optimizer.b2), decay]
    elif optimizer.name == "adam":
        parts += [decay, optax.scale_by_adam(optimizer.b1, optimizer.b2)]
    else:
        parts += [decay, optax.trace(optimizer.momentum, optimizer.nesterov)]
    if config.layer_decay != 1:
        parts.append(scale_by_stage(config.layer_decay, stages))
    return optax.chain(*parts, optax.scale_by_learning_rate(schedule))


def make_plateau(config: ConfigDict) -> optax.GradientTransformationExtraArgs:
    """Returns the rule whose state's `scale` falls when the validation loss stands still."""
    schedule = config.schedule
    return optax.contrib.reduce_on_plateau(schedule.factor, schedule.patience)
