"""Which runs train together, and with which settings."""

import math

import jax
from ml_collections import ConfigDict

from errors import UserError
from experiment.fields import first_trained_stage, phase_config, phase_names
from input_pipeline import Dataset
from models import Classifier
from models.classifier import split_model
from training import hosts
from training.optimizer import make_optimizer, make_schedule
from training.steps import initial_state, trained
from training.stored_features import features_obstacle


def settings_of(config: ConfigDict) -> list[dict]:
    """Returns the settings that a phase tries: [{"learning_rate", "weight_decay"}]."""
    rates = config.try_learning_rates or (config.optimizer.learning_rate,)
    decays = config.try_weight_decays or (config.optimizer.weight_decay,)
    return [{"learning_rate": rate, "weight_decay": decay} for rate in rates for decay in decays]


def tries_settings(config: ConfigDict) -> bool:
    """Returns whether a phase of a run names settings to try."""
    phases = [phase_config(config, name) for name in phase_names(config)]
    return any(phase.try_learning_rates or phase.try_weight_decays for phase in phases)


def obstacle(config: ConfigDict, model: Classifier, dataset: Dataset) -> str:
    """Returns why a run's seeds and settings cannot train at once, and the cure; "" if they can.

    `model` may hold shapes in place of arrays.
    """
    names = phase_names(config)
    if hosts.several():
        return "the command runs on several hosts: run it on one"
    if not model.trained_by_gradient:
        return f"{model.name} is not trained by gradient"
    if len(names) > 1:
        return f"the run has several phases, {','.join(names)}: set phases=head"
    if config.weights == "none":
        return "frozen stages of weights=none differ from seed to seed: name pretrained weights"
    settings = phase_config(config, names[0])
    first = first_trained_stage(settings.train, len(model.stages))
    counts = (len(dataset.rows[part]) for part in ("train", "validation"))
    if why := features_obstacle(settings, model, first, *counts):
        return why
    if any(len(array.shape) == 4 for array in trained(split_model(model)[1], first).values()):
        return "stages that train hold convolutions, which gain nothing together: set train=head"
    return ""


def seeds_at_once(config: ConfigDict, model: Classifier, dataset: Dataset) -> int:
    """Returns how many seeds of a run may be trained at once; 1 where that cannot be.

    The state of their members stays below `runtime.feature_cache_mb`.

    Raises:
      UserError: the run tries several settings, but cannot.
    """
    why, tries = obstacle(config, model, dataset), tries_settings(config)
    if why and tries:
        raise UserError(
            f"{config.model.name}: try_learning_rates and try_weight_decays are for one phase on "
            f"stored features: {why}"
        )
    if why:
        return 1
    settings = phase_config(config, phase_names(config)[0])
    first = first_trained_stage(settings.train, len(model.stages))
    _, params, stats = split_model(model)
    weights = {"params": trained(params, first), "stats": trained(stats, first)}
    optimizer = make_optimizer(settings, make_schedule(settings, 1, 1), len(model.stages))
    state = jax.eval_shape(lambda w: initial_state(settings, w, optimizer, first), weights)
    arrays = jax.tree.leaves((state, weights, weights["params"]))  # and the best, and gradients
    size = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
    limit = config.runtime.feature_cache_mb * 2**20 / (size * len(settings_of(settings)))
    return int(max(1, min(limit, 1e6)))
