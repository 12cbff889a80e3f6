"""The same networks in timm, torchvision and Keras, to hold ours against; needs those libraries.

reference = build("timm", "resnet50", {"form": "torch"}, 1000, 224)
reference.load(path)                    # with the library's own loader
stages, logits = reference.run(images)  # preprocessed as our network takes them
errors = compare(model, reference, images)
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from errors import UserError
from models import MODELS, Classifier

TIMM = {
    "mobilenet_v2": "mobilenetv2_100",
    "vit_s16": "vit_small_patch16_224",
    "vit_b16": "vit_base_patch16_224",
}
KERAS = {
    "vgg16": "VGG16", "vgg19": "VGG19", "resnet50": "ResNet50", "resnet101": "ResNet101",
    "resnet152": "ResNet152", "mobilenet_v2": "MobileNetV2",
    **{f"efficientnet_b{i}": f"EfficientNetB{i}" for i in range(4)},
}  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """A network of another library.

    Attributes:
      shapes: {name: shape} of its arrays, as its files hold them.
      load: reads a file with the library's own loader, strictly.
      run: images [B, H, W, 3] float32, preprocessed -> the output of each of our stages but the
        head, as [B, h, w, C] or tokens [B, T, C], and logits [B, K], None without classifier.
    """

    shapes: dict[str, tuple[int, ...]]
    load: Callable[[Path], None]
    run: Callable[[np.ndarray], tuple[list[np.ndarray], np.ndarray | None]]


def build(family: str, name: str, fields: dict, num_classes: int, image_size: int) -> Reference:
    """Returns the network that `family` calls the same as our `name`.

    Args:
      family: timm, torchvision or keras.
      name: key of `MODELS`.
      fields: of the architecture; its `form` counts.
      num_classes: 0 for a network without classifier, of Keras only.
      image_size: height and width.

    Raises:
      UserError: the library is not installed, or has no such network.
    """
    if not num_classes and family != "keras":
        raise UserError(f"{family}: only networks with a classifier can be compared")
    require(family)
    if family == "keras" and name not in KERAS:
        raise UserError(f"keras has no {name}")
    if family == "keras":
        return _keras(name, num_classes, image_size)
    return (_timm if family == "timm" else _torchvision)(name, fields, num_classes, image_size)


def require(family: str) -> None:
    """Raises UserError unless the library of `family` is installed."""
    try:
        if family == "keras":
            os.environ.setdefault("KERAS_BACKEND", "jax")
            import keras  # noqa: F401
        else:
            import_torchvision()
        if family == "timm":
            import timm  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{error.name or family} is not installed: pip install torch torchvision timm keras"
        ) from error


def images_for(size: int) -> np.ndarray:
    """Returns two seeded images of smooth colours, as if preprocessed: [2, size, size, 3]."""
    coarse = np.random.default_rng(size).normal(0, 1, (2, 6, 6, 3)).astype(np.float32)
    return np.asarray(jax.image.resize(coarse, (2, size, size, 3), "linear"))


def our_stages(model: Classifier, images: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns the output of every stage but the head, and logits, as exactly as float32 can."""

    # It runs once, so that optimising it would take longer than it gains.
    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(x):
        seen = []
        for stage in model.stages[:-1]:
            x = stage(x)
            seen.append(x)
        return seen, model.run(x, -1)

    with jax.default_matmul_precision("highest"):
        stages, logits = run(jnp.asarray(images))
    return [np.asarray(stage) for stage in stages], np.asarray(logits)


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Returns the largest difference as a fraction of the largest value; inf if incomparable."""
    if ours.shape != theirs.shape or not np.isfinite(theirs).all() or not theirs.any():
        return math.inf
    error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    return math.inf if math.isnan(error) else error


def compare(model: Classifier, reference: Reference, images: np.ndarray) -> list[float]:
    """Returns the relative error of each stage, and of the logits where the reference has them.

    Args:
      model: ours, in evaluation mode.
      reference: the same network with the same weights.
      images: [B, H, W, 3] float32, preprocessed.
    """
    stages, logits = our_stages(model, images)
    their_stages, their_logits = reference.run(images)
    pairs = list(zip(stages, their_stages, strict=True))
    pairs += [(logits, their_logits)] if their_logits is not None else []
    return [relative_error(*pair) for pair in pairs]


def import_torchvision() -> None:
    """Imports torchvision, also where its compiled operators do not match the installed torch."""
    from torch import library

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        operators = library.Library("torchvision", "DEF")
        operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_torchvision.kept = operators  # it is undone when collected
        import torchvision  # noqa: F401


def _timm(name: str, fields: dict, num_classes: int, image_size: int) -> Reference:
    import timm

    theirs = TIMM.get(name, name)
    options = {"img_size": image_size} if name.startswith("vit") else {}
    if fields.get("form") == "tf":
        theirs = f"tf_{theirs}"
    network = timm.create_model(theirs, num_classes=num_classes, **options)
    if name.startswith("vgg"):
        places = [f"features.{i}" for i in _pools(network)]
    elif name.startswith("resnet"):
        places = ["maxpool", "layer1", "layer2", "layer3", "layer4"]
    elif name.startswith("vit"):
        places = ["pos_drop", *(f"blocks.{i}" for i in range(12))]
    else:
        places = ["bn1", *(f"blocks.{i}" for i in range(7)), "bn2"]

    def load(path: Path) -> None:
        from safetensors.torch import load_file

        network.load_state_dict(load_file(path), strict=True)

    return _torch(network, places, load)


def _torchvision(name: str, fields: dict, num_classes: int, image_size: int) -> Reference:
    import torch
    from torchvision import models

    theirs = {"vit_b16": "vit_b_16"}.get(name, name)
    options = {"image_size": image_size} if name.startswith("vit") else {}
    network = models.__dict__[theirs](num_classes=num_classes, **options)
    if name.startswith("vgg"):
        places = [f"features.{i}" for i in _pools(network)]
    elif name.startswith("resnet"):
        places = ["maxpool", "layer1", "layer2", "layer3", "layer4"]
    elif name.startswith("efficientnet"):
        places = [f"features.{i}" for i in range(9)]
    elif name.startswith("mobilenet"):
        places = [f"features.{i}" for i in (0, 1, 3, 6, 10, 13, 16, 17, 18)]
    else:
        layers = (f"encoder.layers.encoder_layer_{i}" for i in range(12))
        places = ["encoder.dropout", *layers]

    def load(path: Path) -> None:
        network.load_state_dict(torch.load(path, weights_only=True), strict=True)

    return _torch(network, places, load)


def _pools(network) -> list[int]:
    return [i for i, m in enumerate(network.features) if type(m).__name__ == "MaxPool2d"]


def _torch(network, places: list[str], load: Callable[[Path], None]) -> Reference:
    import torch

    network.eval()

    def run(images: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        seen = []

        def keep(module, inputs, output) -> None:
            array = output.detach().numpy()
            seen.append(array.transpose(0, 2, 3, 1) if array.ndim == 4 else array)

        hooks = [network.get_submodule(place).register_forward_hook(keep) for place in places]
        with torch.no_grad():
            logits = network(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))))
        for hook in hooks:
            hook.remove()
        return seen, logits.numpy()

    shapes = {name: tuple(array.shape) for name, array in network.state_dict().items()}
    return Reference(shapes, load, run)


def _keras(name: str, num_classes: int, image_size: int) -> Reference:
    import keras

    network = getattr(keras.applications, KERAS[name])(
        weights=None, input_shape=(image_size, image_size, 3), include_top=num_classes > 0,
        **({"classes": num_classes, "classifier_activation": None} if num_classes else {}),
    )  # fmt: skip
    inspect = keras.Model(network.input, [network.get_layer(p).output for p in _keras_places(name)])

    def run(images: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        for (
            layer
        ) in network.layers:  # EfficientNet normalises inside: hand it what becomes `images`
            if isinstance(layer, keras.layers.Normalization):
                mean, variance = np.asarray(layer.mean), np.asarray(layer.variance)
                images = ((images * np.sqrt(variance) + mean) * 255).astype(np.float32)
        stages = [np.asarray(output) for output in inspect(images, training=False)]
        return stages, np.asarray(network(images, training=False)) if num_classes else None

    shapes = {}
    for layer in network.layers:
        for weight in layer.weights:
            depthwise = isinstance(layer, keras.layers.DepthwiseConv2D) and weight.name == "kernel"
            leaf = "depthwise_kernel" if depthwise else weight.name  # as the published files say
            shapes[f"{layer.name}/{leaf}"] = tuple(weight.shape)
    return Reference(shapes, network.load_weights, run)


def _keras_places(name: str) -> list[str]:
    """Returns the layers of a Keras network that end our stages, the head left out."""
    model = MODELS[name]
    if name.startswith("vgg"):
        return [f"block{i}_pool" for i in range(1, 6)]
    if name.startswith("resnet"):
        ends = (f"conv{i + 2}_block{count}_out" for i, count in enumerate(model.blocks))
        return ["pool1_pool", *ends]
    if name == "mobilenet_v2":
        ends = ["expanded_conv_project_BN", *(f"block_{i}_add" for i in (2, 5, 9, 12, 15))]
        return ["Conv1_relu", *ends, "block_16_project_BN", "out_relu"]
    counts = [-(-round(row[2] * model.depth * 10) // 10) for row in model.plan]
    ends = [
        f"block{i}{chr(ord('a') + count - 1)}_{'add' if count > 1 else 'project_bn'}"
        for i, count in enumerate(counts, start=1)
    ]
    return ["stem_activation", *ends, "top_activation"]
