"""The jitted steps of training and evaluation, and the loss they share."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import metrics
from ml_collections import ConfigDict

from augmentation import augment
from errors import UserError
from input_pipeline import Dataset
from models import Classifier
from models.classifier import merge_model, set_mode, split_model
from optimizer import l1_penalty, make_plateau


@flax.struct.dataclass
class Metrics(metrics.Collection):
    """Sums and counts over images, masked ones left out."""

    loss: metrics.Average.from_output("loss")
    accuracy: metrics.Accuracy


def initial_state(
    config: ConfigDict, model: Classifier, optimizer: optax.GradientTransformation
) -> dict:
    """Returns everything that training changes, as one tree of arrays."""
    _, params, stats = split_model(model)
    moving = {"params": params, "stats": stats} if config.ema_decay else {}
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "stats": stats,
        "optimizer": optimizer.init(params),
        "moving_average": jax.tree.map(jnp.copy, moving),
        "rate_scale": make_plateau(config).init({}),
        "metrics": Metrics.empty(),
        "bad_step": jnp.full((), -1, jnp.int32),  # the first whose loss was not finite
    }


def evaluated_weights(state: dict) -> dict:
    """Returns the weights that are evaluated: {"params", "stats"}, averaged if that is on."""
    return state["moving_average"] or {"params": state["params"], "stats": state["stats"]}


copy_arrays = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


def step_keys(key: jax.Array, step: int | jax.Array) -> jax.Array:
    """Returns the two keys of a step: of augmentation and of dropout."""
    return jax.random.split(jax.random.fold_in(key, step))


def make_train_step(
    config: ConfigDict,
    model: Classifier,
    optimizer: optax.GradientTransformation,
    weights: jax.Array,
) -> Callable[[dict, dict, jax.Array], dict]:
    """Returns the jitted (state, batch, key) -> state, which takes the state's memory over.

    A step whose loss or gradient is not finite changes nothing but `bad_step`, and neither do the
    steps after it: so the first bad step is known exactly without waiting for the device at each.

    Args:
      config: one run's config.
      model: gives structure; its parameters are not read.
      optimizer: as `make_optimizer` returns it.
      weights: [K] of the classes in the loss.
    """
    structure = _in_mode(model, training=True)

    def train_step(state: dict, batch: dict, key: jax.Array) -> dict:
        augment_key, dropout_key = step_keys(key, state["step"])
        targets = jax.nn.one_hot(batch["label"], len(weights))  # [B, K]
        images, targets = augment(augment_key, batch["image"], targets, config.augment)

        def loss_of(params: dict):
            trained = merge_model(structure, params, state["stats"], dropout_key)
            logits = trained(trained.preprocess(images))  # [B, K]
            losses = criterion(config, logits, targets)  # [B]
            weight = targets @ weights
            loss = (losses * weight).sum() / weight.sum()
            if config.optimizer.l1:
                loss += config.optimizer.l1 * l1_penalty(params)
            return loss, (losses, logits, split_model(trained)[2])

        value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
        (loss, (losses, logits, stats)), gradient = value_and_grad(state["params"])
        updates, optimizer_state = optimizer.update(gradient, state["optimizer"], state["params"])
        updates = jax.tree.map(lambda u: u * state["rate_scale"].scale, updates)
        params = optax.apply_updates(state["params"], updates)
        measured = Metrics.single_from_model_output(
            loss=losses, logits=logits, labels=batch["label"], mask=batch["mask"]
        )
        changed = state | {
            "params": params,
            "stats": stats,
            "optimizer": optimizer_state,
            "moving_average": _moving_average(config, state, {"params": params, "stats": stats}),
            "metrics": state["metrics"].merge(measured),
        }
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(gradient))
        fine = state["bad_step"] < 0
        changed = jax.tree.map(lambda new, old: jnp.where(fine & finite, new, old), changed, state)
        changed["bad_step"] = jnp.where(fine & ~finite, state["step"], state["bad_step"])
        changed["step"] = state["step"] + 1
        return changed

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(config: ConfigDict, model: Classifier) -> Callable:
    """Returns the jitted (weights, metrics, batch) -> (logits [B, K], metrics)."""
    structure = _in_mode(model, training=False)

    def eval_step(weights: dict, total: Metrics, batch: dict) -> tuple[jax.Array, Metrics]:
        evaluated = merge_model(structure, weights["params"], weights["stats"])
        logits = evaluated(evaluated.preprocess(batch["image"]))
        targets = jax.nn.one_hot(batch["label"], logits.shape[-1])
        measured = Metrics.single_from_model_output(
            loss=criterion(config, logits, targets, smoothing=False),
            logits=logits,
            labels=batch["label"],
            mask=batch["mask"],
        )
        return logits, total.merge(measured)

    return jax.jit(eval_step)


def _in_mode(model: Classifier, *, training: bool) -> Classifier:
    """Returns a copy of the model in one mode; the model itself ends in evaluation mode."""
    set_mode(model, training=training)
    _, params, stats = split_model(model)
    copy = merge_model(model, params, stats)
    set_mode(model, training=False)
    return copy


def _moving_average(config: ConfigDict, state: dict, weights: dict) -> dict:
    """Returns the averaged weights after this step; the first steps average over fewer."""
    if not config.ema_decay:
        return {}
    step = state["step"].astype(jnp.float32)
    decay = jnp.minimum(config.ema_decay, (1 + step) / (10 + step))
    mix = lambda old, new: decay * old + (1 - decay) * new  # noqa: E731
    return jax.tree.map(mix, state["moving_average"], weights)


def criterion(
    config: ConfigDict, logits: jax.Array, targets: jax.Array, smoothing: bool = True
) -> jax.Array:
    """Returns the loss of each image: logits [B, K] and targets [B, K] -> [B]."""
    if config.loss.name == "hinge":
        return optax.losses.multiclass_hinge_loss(logits, targets.argmax(axis=-1))
    if smoothing and config.loss.label_smoothing:
        targets = optax.smooth_labels(targets, config.loss.label_smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def class_weights(config: ConfigDict, dataset: Dataset) -> jax.Array:
    """Returns the weight of each class in the loss: float32 [K].

    Raises:
      UserError: another number of weights than classes, or one that is not positive.
    """
    rule, num_classes = config.loss.class_weights, dataset.num_classes
    if rule == "none":
        return jnp.ones(num_classes)
    if rule == "balanced":
        counts = np.bincount(dataset.labels("train"), minlength=num_classes)
        return jnp.asarray(counts.sum() / (num_classes * counts), jnp.float32)
    try:
        values = [float(text) for text in rule.split(",")]
    except ValueError:
        values = []
    if len(values) != num_classes or not all(0 < value < float("inf") for value in values):
        raise UserError(
            f'config.loss.class_weights={rule!r}: give "none", "balanced", or {num_classes} '
            f"positive numbers, for {', '.join(dataset.class_names)}"
        )
    return jnp.asarray(values, jnp.float32)
