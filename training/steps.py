"""The jitted steps of training and evaluation, and the loss they share."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import metrics
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from data.augmentation import augment
from data.randomness import view_key
from errors import UserError
from input_pipeline import Dataset
from models import Classifier
from models.classifier import in_mode, merge_model, split_model, stage_of
from training import hosts
from training.optimizer import l1_penalty, make_optimizer, make_plateau, make_schedule
from training.programs import Outline, settings, shared


@flax.struct.dataclass
class Metrics(metrics.Collection):
    """Sums and counts over images, masked ones left out."""

    loss: metrics.Average.from_output("loss")
    accuracy: metrics.Accuracy


def initial_state(
    config: ConfigDict, weights: dict, optimizer: optax.GradientTransformation, first: int
) -> dict:
    """Returns everything that a phase changes, as one tree of arrays.

    It starts from `weights`, {"params", "stats"}; the optimizer knows stage `first` and later ones.
    """
    moving = {kind: trained(arrays, first) for kind, arrays in weights.items()}
    return {
        "step": jnp.zeros((), jnp.int32),
        **copy_arrays(weights),
        "optimizer": optimizer.init(trained(weights["params"], first)),
        "moving_average": copy_arrays(moving) if config.ema_decay else {},
        "rate_scale": make_plateau(config).init({}),
        "metrics": Metrics.empty(),
        "bad_step": jnp.full((), -1, jnp.int32),  # the first whose loss was not finite
    }


def trained(arrays: dict, first: int) -> dict:
    """Returns the arrays of stage `first` and those after it."""
    return {path: array for path, array in arrays.items() if stage_of(path) >= first}


def evaluated_weights(state: dict) -> dict:
    """Returns the weights that are evaluated: {"params", "stats"}, averaged if that is on."""
    moving = state["moving_average"]
    return {kind: state[kind] | moving.get(kind, {}) for kind in ("params", "stats")}


copy_arrays = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


def step_keys(key: jax.Array, step: int | jax.Array) -> jax.Array:
    """Returns the two keys of a step: of augmentation and of dropout."""
    return jax.random.split(jax.random.fold_in(key, step))


def augment_views(
    images: jax.Array, rows: jax.Array, views: jax.Array, config: ConfigDict
) -> jax.Array:
    """Augments images [B, H, W, 3] as their rows and views, int [B], decide, whatever the batch.

    Nor does the run's seed matter: runs that differ in it share the views.
    """
    key = view_key()

    def one(image: jax.Array, row: jax.Array, view: jax.Array) -> jax.Array:
        drawn = jax.random.fold_in(jax.random.fold_in(key, view), row)
        size = config.data.image_size
        return augment(drawn, image[None], jnp.ones((1, 1)), config.augment, size)[0][0]

    return jax.vmap(one)(images, rows, views)


def make_train_step(*arguments, **options) -> Callable[[dict, dict, jax.Array], dict]:
    """Returns the step of `train_step_of`, jitted; it donates the state.

    Over several hosts the state stays whole on every device, so that the first can save it alone.
    """
    outputs = {}
    if hosts.several():
        outputs["out_shardings"] = NamedSharding(Mesh(jax.devices(), ("data",)), PartitionSpec())
    return jax.jit(train_step_of(*arguments, **options), donate_argnums=0, **outputs)


@dataclass(frozen=True)
class TrainProgram:
    """What trains a phase; runs that differ in the seed alone share it."""

    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    step: Callable[[dict, dict, jax.Array], dict]  # as `make_train_step` returns it


def train_program(
    config: ConfigDict,
    model: Classifier,
    weights: jax.Array,
    steps: tuple[int, int],
    *,
    first: int = 0,
    cached: bool = False,
    teach: Callable | None = None,
) -> TrainProgram:
    """Returns the program of a phase of `steps` (per epoch, in all); see `train_step_of`."""
    outline, stages = Outline.of(model), len(model.stages)

    def make() -> TrainProgram:
        schedule = make_schedule(config, *steps)
        optimizer = make_optimizer(config, schedule, stages)
        hollow, options = outline.model(), {"first": first, "cached": cached, "teach": teach}
        step = make_train_step(config, hollow, optimizer, weights, **options)
        return TrainProgram(schedule, optimizer, step)

    key = (settings(config), outline, weights.tolist(), steps, first, cached, teach)
    return shared(("train_step", *key), make)


def train_step_of(
    config: ConfigDict,
    model: Classifier,
    optimizer: optax.GradientTransformation,
    weights: jax.Array,
    *,
    first: int = 0,
    cached: bool = False,
    teach: Callable | None = None,
) -> Callable[..., dict]:
    """Returns the step of training, (state, batch, key) -> state, or with `taught` as the last.

    A step whose loss or gradient is not finite changes nothing but `bad_step`, and neither do the
    steps after it: so the first bad step is known exactly without waiting for the device at each.

    Args:
      config, model: of one phase of a run; the model gives structure, its parameters are not read.
      optimizer: of the parameters that train.
      weights: [K] of the classes in the loss.
      first: the first stage that trains; the arrays before it pass through untouched.
      cached: whether a batch's "image" is what stage `first` takes instead of an image.
      teach: (taught, inputs, batch) -> logits [B, T, K] of the teachers: see `distillation.py`.
    """
    modes = {"batch_norm": config.batch_norm, "frozen_batch_norm": config.frozen_batch_norm}
    structure = in_mode(model, training=True, first=first, **modes)

    def train_step(state: dict, batch: dict, key: jax.Array, taught: dict | None = None) -> dict:
        augment_key, dropout_key = step_keys(key, state["step"])
        inputs, targets = _inputs(config, augment_key, batch, len(weights), cached)
        soft = teach and softened(teach(taught, inputs, batch), config.distill.temperature)

        def loss_of(params: dict):
            merged = merge_model(structure, state["params"] | params, state["stats"], dropout_key)
            logits = forward(merged, inputs, first if cached else 0)  # [B, K]
            losses = criterion(config, logits, targets, soft)  # [B]
            weight = targets @ weights
            loss = (losses * weight).sum() / weight.sum()
            if config.optimizer.l1:
                loss += config.optimizer.l1 * l1_penalty(params)
            return loss, (losses, logits, split_model(merged)[2])

        old = trained(state["params"], first)
        (loss, (losses, logits, stats)), gradient = jax.value_and_grad(loss_of, has_aux=True)(old)
        updates, optimizer_state = optimizer.update(gradient, state["optimizer"], old)
        updates = jax.tree.map(lambda u: u * state["rate_scale"].scale, updates)
        params = state["params"] | optax.apply_updates(old, updates)
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
        return _unless_broken(state, changed, finite)

    return train_step


def _unless_broken(state: dict, changed: dict, finite: jax.Array) -> dict:
    """Returns the changed state, or the old one from the first step on that was not finite."""
    fine = state["bad_step"] < 0

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return old if new is old else jnp.where(fine & finite, new, old)

    changed = jax.tree.map(choose, changed, state)
    changed["bad_step"] = jnp.where(fine & ~finite, state["step"], state["bad_step"])
    changed["step"] = state["step"] + 1
    return changed


def _inputs(
    config: ConfigDict, key: jax.Array, batch: dict, num_classes: int, cached: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns the inputs of a batch and targets [B, K].

    Images are augmented, anew or as their epoch's view; what is `cached` stays as it is.
    """
    targets = jax.nn.one_hot(batch["label"], num_classes)
    if cached:
        return batch["image"], targets
    if not config.augment_views:
        size = config.data.image_size
        return augment(key, batch["image"], targets, config.augment, size)
    views = batch["epoch"] % config.augment_views
    return augment_views(batch["image"], batch["row"], views, config), targets


def forward(model: Classifier, inputs: jax.Array, start: int = 0) -> jax.Array:
    """Returns logits [B, K] of images [B, H, W, 3] in 0..255, or of what stage `start` takes."""
    if start:
        return model.run(inputs, start).astype(jnp.float32)
    return model(model.preprocess(inputs))


def make_eval_step(model: Classifier, start: int = 0) -> Callable:
    """Returns the jitted (weights, metrics, batch) -> (logits [B, K], metrics), shared by runs.

    The loss is the negative log-likelihood. A batch's "image" is what stage `start` takes.
    """
    outline = Outline.of(in_mode(model, training=False))
    return shared(("eval_step", outline, start), lambda: _eval_step(outline.model(), start))


def _eval_step(structure: Classifier, start: int) -> Callable:
    def eval_step(weights: dict, total: Metrics, batch: dict) -> tuple[jax.Array, Metrics]:
        evaluated = merge_model(structure, weights["params"], weights["stats"])
        logits = forward(evaluated, batch["image"], start)
        targets = jax.nn.one_hot(batch["label"], logits.shape[-1])
        measured = Metrics.single_from_model_output(
            loss=optax.softmax_cross_entropy(logits, targets),  # whatever the loss of training
            logits=logits,
            labels=batch["label"],
            mask=batch["mask"],
        )
        return logits, total.merge(measured)

    return jax.jit(eval_step)


def _moving_average(config: ConfigDict, state: dict, weights: dict) -> dict:
    """Returns the averaged weights after this step; the first steps average over fewer."""
    if not config.ema_decay:
        return {}
    step = state["step"].astype(jnp.float32)
    decay = jnp.minimum(config.ema_decay, (1 + step) / (10 + step))
    return {
        kind: {
            path: decay * old + (1 - decay) * weights[kind][path] for path, old in arrays.items()
        }
        for kind, arrays in state["moving_average"].items()
    }


def criterion(
    config: ConfigDict, logits: jax.Array, targets: jax.Array, soft: jax.Array | None = None
) -> jax.Array:
    """Returns the loss of each image: logits [B, K] and targets [B, K] -> [B].

    With `soft` [B, K], the teachers' probabilities at a temperature, it is mixed with the distance
    from them; the square of the temperature keeps gradients as large as the labels' (Hinton et al.
    2015).
    """
    if soft is not None:
        teacher = config.distill
        student = jax.nn.log_softmax(logits / teacher.temperature)
        distance = teacher.temperature**2 * optax.losses.kl_divergence(student, soft)
        losses = criterion(config, logits, targets)
        return (1 - teacher.weight) * losses + teacher.weight * distance
    if config.loss.name == "hinge":
        return optax.losses.multiclass_hinge_loss(logits, targets.argmax(axis=-1))
    if config.loss.label_smoothing:
        targets = optax.smooth_labels(targets, config.loss.label_smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def softened(logits: jax.Array, temperature: float) -> jax.Array:
    """Returns the mean probabilities of T teachers at a temperature: [B, T, K] -> [B, K]."""
    return jax.nn.softmax(logits / temperature).mean(axis=1)


def selection_score(
    select: str, loss: float, logits: np.ndarray, labels: np.ndarray
) -> list[float]:
    """Returns what `config.select` compares weights by, the higher the better; ties go by loss."""
    from sklearn.metrics import balanced_accuracy_score, f1_score  # half a second, so not at start

    predicted = logits.argmax(axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes without validation images
        value = {
            "loss": lambda: -loss,
            "accuracy": lambda: float((predicted == labels).mean()),
            "balanced_accuracy": lambda: float(balanced_accuracy_score(labels, predicted)),
            "macro_f1": lambda: float(f1_score(labels, predicted, average="macro")),
        }[select]()
    return [value, -loss]


def class_weights(config: ConfigDict, dataset: Dataset) -> jax.Array:
    """Returns the weight of each class in the loss, float32 [K]; raises UserError if unusable."""
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
