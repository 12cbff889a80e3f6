"""One run: train a model, keep its best weights, evaluate them once, write the run directory.

Every number drawn comes from (seed, purpose, step), so an interrupted run that goes on from a
checkpoint ends with the same bits as one that was never interrupted.
"""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import metrics, parameter_overview
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

import checkpoint
from augmentation import augment
from errors import UserError
from experiment import stored_config
from input_pipeline import Dataset, Feed, load_dataset, steps_per_epoch
from models import Classifier, create_model
from models.classifier import merge_model, set_mode, split_model
from optimizer import l1_penalty, make_optimizer, make_plateau, make_schedule
from recorder import Recorder, environment, write_json

SAY_EVERY_SECONDS = 10.0  # a line of progress where there is no terminal for a bar


class Interrupted(Exception):
    """The run was asked to stop; its state is saved and it can go on."""


class Diverged(Exception):
    """The loss or its gradient stopped being finite."""


@flax.struct.dataclass
class Metrics(metrics.Collection):
    """Sums and counts over images, masked ones left out."""

    loss: metrics.Average.from_output("loss")
    accuracy: metrics.Accuracy


@dataclass
class Progress:
    """What the host knows of a run beside the arrays; part of every checkpoint."""

    step: int = 0
    finished: bool = False
    best_step: int = -1
    best_loss: float = float("inf")
    evaluations_since_best: int = 0
    seconds: float = 0.0  # of training and validation, summed over interruptions
    seconds_to_best: float = 0.0
    timed_images: int = 0  # trained on, without the steps that compile
    timed_seconds: float = 0.0


def train_and_evaluate(
    config: ConfigDict, run_dir: Path, should_stop: Callable[[], bool] = lambda: False
) -> dict:
    """Trains one model as `config` says, or goes on where an interrupted run stopped.

    Args:
      config: one run's config, as `experiment.expand` returns it.
      run_dir: where everything is written; DESIGN names the files.
      should_stop: asked after every step; when true the state is saved.

    Returns:
      What `summary.json` holds; its `status` is "complete" or "diverged".

    Raises:
      Interrupted: `should_stop` was true, and the state is saved.
      UserError: the config, the data or the disk is at fault.
    """
    run_dir = Path(run_dir)
    dataset = load_dataset(config.data, config.runtime.cache_dir)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    check_batches(config, mesh)
    model = build_model(config, dataset.num_classes)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "config.json", stored_config(config))
    write_json(run_dir / "environment.json", environment())
    write_json(run_dir / "dataset.json", dataset.to_dict(config.data))

    summary = {
        "model": config.model.to_dict(),
        "image_size": config.data.image_size,
        "preprocessing": model.preprocessing.to_dict(),
    }
    run = TrainingRun(config, run_dir, dataset, model, mesh, should_stop)
    try:
        weights = run.train() if model.trained_by_gradient else run.fit()
    except Diverged as error:
        summary |= {"status": "diverged", "error": str(error), "cost": run.cost()}
    else:
        summary |= {"status": "complete", "metrics": run.predict(weights), "cost": run.cost()}
        summary["best_step"] = run.progress.best_step
        summary["steps"] = run.progress.step
    finally:
        run.recorder.close()
    write_json(run_dir / "summary.json", summary)
    return summary


def build_model(config: ConfigDict, num_classes: int) -> Classifier:
    """Returns the model of a run's config, freshly initialised from its seed."""
    fields = config.model.to_dict()
    return create_model(
        fields.pop("name"),
        num_classes,
        seed=config.seed,
        image_size=config.data.image_size,
        dtype=config.compute_dtype,
        **fields,
    )


def check_batches(config: ConfigDict, mesh: Mesh) -> None:
    """Raises a UserError if a batch cannot be divided over the devices."""
    for name in ("batch_size", "eval_batch_size"):
        if config[name] % mesh.size:
            raise UserError(
                f"config.{name}={config[name]} cannot be divided over {mesh.size} devices: "
                f"use a multiple of {mesh.size}"
            )


class TrainingRun:
    """The state of one run and the steps that change it."""

    def __init__(
        self,
        config: ConfigDict,
        run_dir: Path,
        dataset: Dataset,
        model: Classifier,
        mesh: Mesh,
        should_stop: Callable[[], bool],
    ):
        self.config, self.run_dir, self.dataset, self.mesh = config, run_dir, dataset, mesh
        self.should_stop = should_stop
        self.model = model
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.checkpoints = run_dir / "checkpoints"
        self.checkpoints.mkdir(exist_ok=True)
        self.progress = Progress()
        self.best: dict = {}
        self.compile_seconds = 0.0
        self.eval_step = make_eval_step(config, model)
        self.recorder: Recorder | None = None

    # --- training -----------------------------------------------------------------------------

    def train(self) -> dict:
        """Runs the phases and returns the best weights: {"params", "stats"}.

        A phase trains a part of the parameters under its own schedule; there is one, which trains
        all of them.
        """
        config, progress = self.config, self.progress
        feed = Feed(self.dataset, "train", self.mesh, config.runtime)
        per_epoch = steps_per_epoch(len(feed), config.batch_size)
        total_steps = config.epochs * per_epoch
        schedule = make_schedule(config, per_epoch, total_steps)
        optimizer = make_optimizer(config, schedule)
        state = self.initial_state(optimizer)
        state = self.resume(state)
        progress = self.progress
        self.recorder = Recorder(self.run_dir, progress.step, config.runtime.tensorboard)
        key = jax.random.key(config.seed)
        if progress.step == 0:
            self.save_augmented_batch(
                next(feed.training(config.seed, config.batch_size, 0, 1)), key
            )
        weights = class_weights(config, self.dataset)
        train_step = make_train_step(config, self.model, optimizer, weights)
        validation = Feed(self.dataset, "validation", self.mesh, config.runtime)

        batches = feed.training(config.seed, config.batch_size, progress.step, total_steps)
        stops = boundaries(progress.step, total_steps, per_epoch, config)
        saved_at = said_at = time.monotonic()
        bar = tqdm(total=total_steps, initial=progress.step, unit="step", leave=False, disable=None)
        with bar:
            for stop, evaluates in stops if not progress.finished else ():
                began = time.monotonic()
                state, timed = self._steps(state, train_step, batches, stop, key, bar)
                line = {"epoch": progress.step / per_epoch, "phase": "all"}
                rate = float(schedule(progress.step - 1)) * float(state["rate_scale"].scale)
                self._log_training(state, line, rate, timed)
                state["metrics"] = self.put(Metrics.empty())
                if evaluates:
                    measured = self.evaluate(validation, eval_weights(state))[0]
                    self.recorder.write("validation", progress.step, **line, **measured)
                    if bar.disable and time.monotonic() - said_at > SAY_EVERY_SECONDS:
                        said_at = time.monotonic()
                        print(
                            f"  step {progress.step}/{total_steps}: validation accuracy "
                            f"{measured['accuracy']:.4f}, loss {measured['loss']:.4f}",
                            flush=True,
                        )
                    bar.set_postfix(validation=f"{measured['accuracy']:.3f}")
                    state["rate_scale"] = self._lower_rate(state["rate_scale"], measured["loss"])
                progress.seconds += time.monotonic() - began
                if evaluates:
                    self._note_best(state, measured["loss"])
                progress.finished = progress.step == total_steps or self._out_of_patience()
                due = time.monotonic() - saved_at >= config.runtime.checkpoint_every_seconds
                if due or progress.finished:
                    self.save(state)
                    saved_at = time.monotonic()
                if progress.finished:
                    break
        return self.best

    def initial_state(self, optimizer: optax.GradientTransformation) -> dict:
        """Returns everything that training changes, as one dictionary of arrays on the devices."""
        _, params, stats = split_model(self.model)
        moving = {"params": params, "stats": stats} if self.config.ema_decay else {}
        state = {
            "step": jnp.zeros((), jnp.int32),
            "params": params,
            "stats": stats,
            "optimizer": optimizer.init(params),
            "moving_average": jax.tree.map(jnp.copy, moving),
            "rate_scale": make_plateau(self.config).init({}),
            "metrics": Metrics.empty(),
            "bad_step": jnp.full((), -1, jnp.int32),  # the first whose loss was not finite
        }
        return self.put(state)

    def put(self, tree):
        """Copies a tree of arrays to every device."""
        return jax.device_put(jax.tree.map(jnp.asarray, tree), self.replicated)

    def _steps(
        self,
        state: dict,
        train_step: Callable,
        batches: Iterator[dict],
        stop: int,
        key: jax.Array,
        bar: tqdm,
    ) -> tuple[dict, tuple[int, float]]:
        """Trains up to step `stop`; returns the state, and (images, seconds) without compilation."""
        progress, compiling = self.progress, not self.compile_seconds
        began, first = time.monotonic(), progress.step
        while progress.step < stop:
            state = train_step(state, next(batches), key)
            progress.step += 1
            bar.update()
            if compiling:
                jax.block_until_ready(state["step"])
                self.compile_seconds = time.monotonic() - began
                compiling, began, first = False, time.monotonic(), progress.step
            if self.should_stop():
                self.save(state)
                raise Interrupted(f"stopped at step {progress.step}; the state is saved")
        jax.block_until_ready(state["step"])
        images = (progress.step - first) * self.config.batch_size
        seconds = time.monotonic() - began
        progress.timed_images += images
        progress.timed_seconds += seconds if images else 0.0
        return state, (images, seconds)

    def _log_training(self, state: dict, line: dict, rate: float, timed: tuple) -> None:
        bad_step = int(state["bad_step"])
        if bad_step >= 0:
            self.recorder.write(
                "train", bad_step + 1, **line, loss=float("nan"), learning_rate=rate
            )
            raise Diverged(
                f"the loss or its gradient was not finite at step {bad_step + 1} (learning rate "
                f"{rate:.3g}); try a lower optimizer.learning_rate, schedule.warmup_epochs=1, or "
                "optimizer.clip_norm=1" + (", or compute_dtype=float32" * self._is_bfloat16())
            )
        images, seconds = timed
        measured = {name: float(value) for name, value in state["metrics"].compute().items()}
        speed = {"images_per_second": images / seconds} if images else {}
        self.recorder.write(
            "train", self.progress.step, **line, **measured, learning_rate=rate, **speed
        )

    def _is_bfloat16(self) -> bool:
        return self.config.compute_dtype == "bfloat16"

    def _lower_rate(self, state, loss: float):
        if self.config.schedule.name != "plateau":
            return state
        return self.put(make_plateau(self.config).update({}, state, value=loss)[1])

    def _note_best(self, state: dict, loss: float) -> None:
        """Keeps a copy of the weights if the validation loss is the lowest so far."""
        progress = self.progress
        if loss < progress.best_loss or not self.best:
            progress.best_loss, progress.best_step = loss, progress.step
            progress.seconds_to_best, progress.evaluations_since_best = progress.seconds, 0
            self.best = jax.tree.map(jnp.copy, eval_weights(state))
        else:
            progress.evaluations_since_best += 1

    def _out_of_patience(self) -> bool:
        patience = self.config.early_stopping_patience
        return bool(patience) and self.progress.evaluations_since_best >= patience

    # --- checkpoints --------------------------------------------------------------------------

    def save(self, state: dict) -> None:
        """Writes the best weights and then the whole state; deletes older ones after that."""
        progress, paths = self.progress, []
        if self.best:
            record = {"step": progress.best_step, "loss": progress.best_loss}
            arrays = flat(self.best)
            paths = [checkpoint.save(self.checkpoints, "best", progress.best_step, arrays, record)]
        record = asdict(progress) | {"best_loss": repr(progress.best_loss)}
        paths.append(
            checkpoint.save(self.checkpoints, "latest", progress.step, flat(state), record)
        )
        checkpoint.keep(self.checkpoints, paths)

    def resume(self, state: dict) -> dict:
        """Returns the newest state that can be read, or `state` where there is none."""
        for path in checkpoint.find(self.checkpoints, "latest"):
            try:
                arrays, record = checkpoint.restore(path)
                progress = Progress(**record | {"best_loss": float(record["best_loss"])})
                best = {}
                if progress.best_step >= 0:
                    best_path = self.checkpoints / f"best-{progress.best_step:08d}"
                    best = unflat(eval_weights(state), checkpoint.restore(best_path)[0])
                self.progress, self.best = progress, self.put(best)
                checkpoint.keep(self.checkpoints, [path, *([best_path] if best else [])])
                return self.put(unflat(state, arrays))
            except checkpoint.CheckpointError as error:
                print(f"warning: {error}\nIt is left out.", file=sys.stderr)
        checkpoint.keep(self.checkpoints, [])
        return state

    # --- models without gradient --------------------------------------------------------------

    def fit(self) -> dict:
        """Fits a model that has no gradient and returns its weights: {"params", "stats"}."""
        self.recorder = Recorder(self.run_dir, 0, self.config.runtime.tensorboard)
        parts = {
            part: (self.dataset.images(part), self.dataset.labels(part))
            for part in ("train", "validation")
        }
        began = time.monotonic()
        self.model.fit(parts["train"], parts["validation"], self.config.eval_batch_size)
        self.progress.seconds = self.progress.seconds_to_best = time.monotonic() - began
        _, params, stats = split_model(self.model)
        weights = self.put({"params": params, "stats": stats})
        self.eval_step = make_eval_step(self.config, self.model)
        validation = Feed(self.dataset, "validation", self.mesh, self.config.runtime)
        measured = self.evaluate(validation, weights)[0]
        self.progress.best_step, self.progress.best_loss = 0, measured["loss"]
        self.recorder.write("validation", 0, epoch=0.0, phase="all", **measured)
        record = {"step": 0, "loss": measured["loss"]}
        path = checkpoint.save(self.checkpoints, "best", 0, flat(weights), record)
        checkpoint.keep(self.checkpoints, [path])
        return weights

    # --- evaluation ---------------------------------------------------------------------------

    def evaluate(self, feed: Feed, weights: dict) -> tuple[dict, np.ndarray]:
        """Returns {"loss", "accuracy"} over every image of a feed once, and logits [N, K]."""
        total, logits = self.put(Metrics.empty()), []
        for batch in feed.evaluation(self.config.eval_batch_size):
            out, total = self.eval_step(weights, total, batch)
            logits.append(out)
        count = int(total.accuracy.count)
        assert count == len(feed), f"counted {count} of {len(feed)} images"
        measured = {name: float(value) for name, value in total.compute().items()}
        return measured, np.concatenate([np.asarray(part) for part in logits])[: len(feed)]

    def predict(self, weights: dict) -> dict:
        """Writes the predictions on validation and test images; returns the metrics of both."""
        result = {}
        for part in ("validation", "test"):
            feed = Feed(self.dataset, part, self.mesh, self.config.runtime)
            measured, logits = self.evaluate(feed, weights)
            labels = self.dataset.labels(part)
            path = self.run_dir / f"predictions_{part}.npz"
            np.savez(path, ids=np.array(self.dataset.ids(part)), labels=labels, logits=logits)
            correct = int((logits.argmax(axis=1) == labels).sum())
            result[part] = measured | {"correct": correct, "count": len(labels)}
        return result

    def cost(self) -> dict:
        """Returns parameters, FLOPs an image, seconds, images/s and peak memory; null if unknown."""
        progress, device = self.progress, jax.devices()[0]
        memory = device.memory_stats() or {}
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = memory.get("peak_bytes_in_use")
        timed = progress.timed_seconds
        return {
            "parameters": int(parameter_overview.count_parameters(split_model(self.model)[1])),
            "flops_per_image": flops_per_image(self.model, self.config.data.image_size),
            "train_images_per_second": progress.timed_images / timed if timed else None,
            "seconds": progress.seconds,
            "seconds_to_best": progress.seconds_to_best,
            "compile_seconds": self.compile_seconds,
            "peak_memory_bytes": peak if peak else host * (1 if sys.platform == "darwin" else 1024),
            "peak_memory_of": "device" if peak else "process",
            "device": f"{len(jax.devices())} x {device.device_kind}",
        }

    def save_augmented_batch(self, batch: dict, key: jax.Array) -> None:
        """Writes `augmented_batch.png`: up to 32 images of the first batch as the model sees them."""
        targets = jax.nn.one_hot(batch["label"], self.dataset.num_classes)
        images, _ = jax.jit(
            lambda key, images, targets: augment(key, images, targets, self.config.augment)
        )(step_keys(key, 0)[0], batch["image"], targets)
        shown = np.asarray(images)[:32].round().astype(np.uint8)
        shown = np.pad(shown, ((0, -len(shown) % 8), (1, 1), (1, 1), (0, 0)), constant_values=255)
        rows, (_, height, width, _) = len(shown) // 8, shown.shape
        sheet = shown.reshape(rows, 8, height, width, 3).swapaxes(1, 2)
        picture = Image.fromarray(sheet.reshape(rows * height, 8 * width, 3))
        factor = max(1, 64 // height)
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.NEAREST)
        picture.save(self.run_dir / "augmented_batch.png")


# --- steps ----------------------------------------------------------------------------------------


def step_keys(key: jax.Array, step) -> jax.Array:
    """Returns the keys of augmentation and dropout for a step."""
    return jax.random.split(jax.random.fold_in(key, step))


def make_train_step(
    config: ConfigDict,
    model: Classifier,
    optimizer: optax.GradientTransformation,
    weights: jax.Array,
) -> Callable:
    """Returns the jitted (state, batch, key) -> state, which takes the state's memory over.

    A step whose loss or gradient is not finite changes nothing but `bad_step`, and neither do the
    steps after it.

    Args:
      weights: [K] of the classes in the loss.
    """
    set_mode(model, training=True)
    structure = copy_structure(model)
    set_mode(model, training=False)

    def train_step(state: dict, batch: dict, key: jax.Array) -> dict:
        augment_key, dropout_key = step_keys(key, state["step"])
        targets = jax.nn.one_hot(batch["label"], len(weights))  # [B, K]
        images, targets = augment(augment_key, batch["image"], targets, config.augment)

        def loss_of(params: dict):
            trained = merge_model(structure, params, state["stats"], dropout_key)
            logits = trained(trained.preprocess(images))  # [B, K]
            losses = criterion(config, logits, targets)
            weight = targets @ weights
            loss = (losses * weight).sum() / weight.sum()
            if config.optimizer.l1:
                loss += config.optimizer.l1 * l1_penalty(params)
            return loss, (losses, logits, split_model(trained)[2])

        grad = jax.value_and_grad(loss_of, has_aux=True)
        (loss, (losses, logits, stats)), gradient = grad(state["params"])
        updates, optimizer_state = optimizer.update(gradient, state["optimizer"], state["params"])
        updates = jax.tree.map(lambda u: u * state["rate_scale"].scale, updates)
        params = optax.apply_updates(state["params"], updates)
        measured = Metrics.single_from_model_output(
            loss=losses, logits=logits, labels=batch["label"], mask=batch["mask"]
        )
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.global_norm(gradient))
        fine = finite & (state["bad_step"] < 0)
        new = state | {
            "params": params,
            "stats": stats,
            "optimizer": optimizer_state,
            "moving_average": moving_average(config, state, params, stats),
            "metrics": state["metrics"].merge(measured),
        }
        new = jax.tree.map(lambda new, old: jnp.where(fine, new, old), new, state)
        new["bad_step"] = jnp.where(
            finite | (state["bad_step"] >= 0), state["bad_step"], state["step"]
        )
        new["step"] = state["step"] + 1
        return new

    return jax.jit(train_step, donate_argnums=0)


def copy_structure(model: Classifier) -> Classifier:
    """Returns a copy of the model in its present mode; later changes of mode do not reach it."""
    _, params, stats = split_model(model)
    return merge_model(model, params, stats)


def make_eval_step(config: ConfigDict, model: Classifier) -> Callable:
    """Returns the jitted (weights, metrics, batch) -> (logits [B, K], metrics)."""
    set_mode(model, training=False)
    structure = copy_structure(model)

    def eval_step(weights: dict, total: Metrics, batch: dict):
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
            f'config.loss.class_weights={rule!r}: give "none", "balanced", or {num_classes} positive '
            f"numbers, for {', '.join(dataset.class_names)}"
        )
    return jnp.asarray(values, jnp.float32)


def moving_average(config: ConfigDict, state: dict, params: dict, stats: dict) -> dict:
    """Returns the averaged weights after this step; the first steps average over fewer."""
    if not config.ema_decay:
        return {}
    step = state["step"].astype(jnp.float32)
    decay = jnp.minimum(config.ema_decay, (1 + step) / (10 + step))
    new = {"params": params, "stats": stats}
    return jax.tree.map(
        lambda old, new: decay * old + (1 - decay) * new, state["moving_average"], new
    )


def eval_weights(state: dict) -> dict:
    """Returns the weights that are evaluated: {"params", "stats"}, averaged if that is on."""
    return state["moving_average"] or {"params": state["params"], "stats": state["stats"]}


def boundaries(
    step: int, total_steps: int, per_epoch: int, config: ConfigDict
) -> Iterator[tuple[int, bool]]:
    """Yields the steps after `step` where training pauses to log, and whether it evaluates too."""
    every = per_epoch * config.eval_every_epochs
    while step < total_steps:
        log = step - step % config.runtime.log_every_steps + config.runtime.log_every_steps
        evaluation = step - step % every + every
        step = min(log, evaluation, total_steps)
        yield step, step == evaluation or step == total_steps


def flops_per_image(model: Classifier, image_size: int) -> float | None:
    """Returns the floating-point operations of one forward pass, as XLA counts them.

    XLA counts the body of a loop once, so a model that loops says the number itself.
    """
    if not model.trained_by_gradient:
        return float(model.flops_per_image())
    _, params, stats = split_model(model)
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.uint8)

    def forward(params: dict, stats: dict, images: jax.Array) -> jax.Array:
        merged = merge_model(model, params, stats)
        return merged(merged.preprocess(images))

    analysis = jax.jit(forward).lower(params, stats, image).cost_analysis() or {}
    return analysis.get("flops")


# --- trees as flat dictionaries -------------------------------------------------------------------


def flat(tree) -> dict[str, jax.Array]:
    """Returns {path: array} for a nested tree, as checkpoints hold it."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}


def unflat(template, arrays: dict):
    """Returns a tree like `template` with the arrays of `flat`.

    Raises:
      CheckpointError: the names differ.
    """
    names = list(flat(template))
    if set(names) != set(arrays):
        different = sorted(set(names) ^ set(arrays))[:5]
        raise checkpoint.CheckpointError(f"the checkpoint holds other arrays: {different} ...")
    return jax.tree.unflatten(jax.tree.structure(template), [arrays[name] for name in names])
