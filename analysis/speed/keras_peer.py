"""Keras's side of the benchmark, on JAX: networks of keras.applications, and the function of `fit`.

The step is the one that `fit` and `evaluate` compile and call, without their callbacks.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import numpy as np
from keras import layers

from analysis.speed.worker import NUM_CLASSES, Side, Spec
from errors import UserError

APPLICATIONS = {
    "resnet50": "ResNet50",
    "efficientnet_b0": "EfficientNetB0",
    "mobilenet_v2": "MobileNetV2",
    "vgg16": "VGG16",
}


def build(spec: Spec) -> Side:
    """Returns the step of training or evaluation of a network, on images on the device."""
    keras.utils.set_random_seed(0)
    if spec.dtype == "bfloat16":
        keras.mixed_precision.set_global_policy("mixed_bfloat16")
    model = keras.Sequential([layers.Input((spec.image_size,) * 2 + (3,)), *network(spec)])
    model.compile(
        optimizer=keras.optimizers.AdamW(1e-4, weight_decay=1e-4),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    draw = np.random.default_rng(0)
    shape = (spec.images, spec.image_size, spec.image_size, 3)
    images = jax.device_put(draw.integers(0, 256, shape, np.uint8))
    labels = jax.device_put(draw.integers(0, NUM_CLASSES, spec.images).astype(np.int32))
    gather = jax.jit(lambda rows: (images[rows], labels[rows], None))

    def batches():
        while True:
            order = draw.permutation(spec.images)
            for start in range(0, spec.images, spec.batch_size):
                yield gather(order[start : start + spec.batch_size])

    feed, logs = batches(), {}
    model.build((None, *shape[1:]))
    model.optimizer.build(model.trainable_variables)
    model._symbolic_build(data_batch=next(feed))  # as `fit` does
    kinds = ["trainable_variables", "non_trainable_variables", "metrics_variables"]
    if spec.mode == "train":
        kinds.insert(2, "optimizer_variables")
        model.make_train_function()
    else:
        model.make_test_function()
    step = model.train_function if spec.mode == "train" else model.test_function
    state = model._get_jax_state(**dict.fromkeys(kinds, True), purge_model_variables=False)

    def run(steps: int) -> None:
        nonlocal logs, state
        for _ in range(steps):
            logs, state = step(state, feed)
        jax.block_until_ready((logs, state))

    def device_memory() -> int | None:
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

    def check() -> None:
        if not np.isfinite(float(logs["loss"])):
            raise UserError("the loss was not finite")

    return Side(run, device_memory, check)


def network(spec: Spec) -> list[layers.Layer]:
    """Returns the layers from [B, H, W, 3] in 0..255 to logits, without weights from elsewhere."""
    scale = layers.Rescaling(1 / 63.75, offset=-2.0)  # (x / 255 - 0.5) / 0.25
    shape = (spec.image_size, spec.image_size, 3)
    last = layers.Dense(NUM_CLASSES, dtype="float32")
    options = {"weights": None, "input_shape": shape}
    whole = options | {"classes": NUM_CLASSES, "classifier_activation": None}
    if spec.model == "cnn":
        return [scale, *cnn(), last]
    if spec.model == "cnn_deep":
        return [scale, *cnn_deep(), last]
    if spec.model not in APPLICATIONS:
        raise UserError(f"keras.applications has no {spec.model}")
    application = getattr(keras.applications, APPLICATIONS[spec.model])
    if spec.model == "vgg16":  # with the head of the others, whatever the image size
        hidden = [layers.Dense(4096, "relu"), layers.Dropout(0.5)]
        hidden += [layers.Dense(4096, "relu"), layers.Dropout(0.5)]
        pool = layers.AdaptiveAveragePooling2D(7)
        body = application(include_top=False, **options)
        return [scale, body, pool, layers.Flatten(), *hidden, last]
    own = [] if spec.model == "efficientnet_b0" else [scale]  # that one scales by itself
    return [*own, application(**whole)]


def cnn() -> list[layers.Layer]:
    """The same as models/cnn.py but for its last layer."""
    convs = [layers.Conv2D(width, 3, padding="same", activation="relu") for width in (32, 64)]
    pools = [layers.MaxPooling2D(), layers.MaxPooling2D()]
    return [convs[0], pools[0], convs[1], pools[1], layers.Flatten(), layers.Dense(128, "relu")]


def cnn_deep() -> list[layers.Layer]:
    """The same as models/cnn_deep.py but for its last layer."""
    stack = []
    for width in (32, 64, 128, 256):
        for _ in range(2):
            stack += [layers.Conv2D(width, 3, padding="same", use_bias=False)]
            stack += [layers.BatchNormalization(momentum=0.9), layers.ReLU()]
        stack += [layers.MaxPooling2D(), layers.Dropout(0.1)]
    return [*stack, layers.GlobalAveragePooling2D(), layers.Dense(256, "relu"), layers.Dropout(0.5)]
