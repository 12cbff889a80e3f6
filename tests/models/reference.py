"""The same networks in other libraries, to hold ours against; needs those libraries.

reference = build("timm", "resnet50", {"form": "torch"}, 1000, 224)
reference.load(path)                    # with the library's own loader
stages, logits = reference.run(images)  # preprocessed as our network takes them
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from errors import UserError
from models import MODELS, Classifier

RESNET = ["maxpool", "layer1", "layer2", "layer3", "layer4"]
TIMM_INVERTED = ["bn1", *(f"blocks.{i}" for i in range(7)), "bn2"]
TIMM_VIT = ["pos_drop", *(f"blocks.{i}" for i in range(12))]


def _vgg(name: str, keras: str) -> dict:
    ends, end = [], -1
    for count in MODELS[name].blocks:
        end += count * (3 if MODELS[name].batch_norm else 2) + 1
        ends.append(f"features.{end}")
    both = {"timm": (name, ends), "torchvision": (name, ends)}
    return both | ({"keras": (keras, [f"block{i}_pool" for i in range(1, 6)])} if keras else {})


def _resnet(name: str, keras: str) -> dict:
    ends = [f"conv{i}_block{count}_out" for i, count in enumerate(MODELS[name].blocks, start=2)]
    both = {"timm": (name, RESNET), "torchvision": (name, RESNET)}
    return both | ({"keras": (keras, ["pool1_pool", *ends])} if keras else {})


def _efficientnet(number: int) -> dict:
    name = f"efficientnet_b{number}"
    counts = [math.ceil(row[2] * MODELS[name].depth) for row in MODELS[name].plan]
    ends = [
        f"block{i}{'abcdefgh'[count - 1]}_{'add' if count > 1 else 'project_bn'}"
        for i, count in enumerate(counts, start=1)
    ]
    return _lukemelas(name, counts) | {
        "timm": (name, TIMM_INVERTED),
        "torchvision": (name, [f"features.{i}" for i in range(9)]),
        "keras": (f"EfficientNetB{number}", ["stem_activation", *ends, "top_activation"]),
    }


def _efficientnet_lite(number: int) -> dict:
    name = f"efficientnet_lite{number}"
    _, *inner, _ = (math.ceil(row[2] * MODELS[name].depth) for row in MODELS[name].plan)
    return _lukemelas(name, [1, *inner, 1]) | {"timm": (name, TIMM_INVERTED)}


def _lukemelas(name: str, counts: list[int]) -> dict:
    """One activation ends stem and head alike; blocks are numbered through."""
    ends = [f"_blocks.{end - 1}" for end in accumulate(counts)]
    return {"lukemelas": (name.replace("_", "-"), ["_swish", *ends])}


# What each library calls a network, and its layers that end our stages but the head.
NETWORKS: dict[str, dict[str, tuple[str, list[str]]]] = {
    "vgg16": _vgg("vgg16", "VGG16"),
    "vgg16_bn": _vgg("vgg16_bn", ""),
    "vgg19": _vgg("vgg19", "VGG19"),
    "resnet18": _resnet("resnet18", ""),
    "resnet34": _resnet("resnet34", ""),
    "resnet50": _resnet("resnet50", "ResNet50"),
    "resnet101": _resnet("resnet101", "ResNet101"),
    "resnet152": _resnet("resnet152", "ResNet152"),
    **{f"efficientnet_b{number}": _efficientnet(number) for number in range(4)},
    **{f"efficientnet_lite{number}": _efficientnet_lite(number) for number in range(5)},
    "mobilenet_v2": {
        "timm": ("mobilenetv2_100", TIMM_INVERTED),
        "torchvision": (
            "mobilenet_v2",
            [f"features.{i}" for i in (0, 1, 3, 6, 10, 13, 16, 17, 18)],
        ),
        "keras": (
            "MobileNetV2",
            ["Conv1_relu", "expanded_conv_project_BN"]
            + [f"block_{i}_add" for i in (2, 5, 9, 12, 15)]
            + ["block_16_project_BN", "out_relu"],
        ),
    },
    "vit_s16": {"timm": ("vit_small_patch16_224", TIMM_VIT)},
    "vit_b16": {
        "timm": ("vit_base_patch16_224", TIMM_VIT),
        "torchvision": (
            "vit_b_16",
            ["encoder.dropout", *(f"encoder.layers.encoder_layer_{i}" for i in range(12))],
        ),
    },
}


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
      family: timm, torchvision, lukemelas or keras.
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
    if family not in NETWORKS.get(name, {}):
        raise UserError(f"{family} has no {name}")
    theirs, places = NETWORKS[name][family]
    if family == "keras":
        return _keras(theirs, places, num_classes, image_size)
    options = {"num_classes": num_classes}
    if hasattr(MODELS[name], "patch"):
        options |= {"img_size" if family == "timm" else "image_size": image_size}
    if family == "timm":
        return _timm(f"tf_{theirs}" if fields.get("form") == "tf" else theirs, places, options)
    if family == "lukemelas":
        return _efficientnet_pytorch(theirs, places, options | {"image_size": image_size})
    return _torchvision(theirs, places, options)


def require(family: str) -> None:
    """Raises UserError unless the library of `family` is installed."""
    try:
        if family == "keras":
            os.environ.setdefault("KERAS_BACKEND", "jax")
            import keras  # noqa: F401
        elif family == "lukemelas":
            import efficientnet_lite_pytorch  # noqa: F401
        else:
            import_torchvision()
        if family == "timm":
            import timm  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{error.name or family} is not installed: pip install -e '.[parity]'"
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


def _timm(name: str, places: list[str], options: dict) -> Reference:
    import timm
    from safetensors.torch import load_file

    return _torch(timm.create_model(name, **options), places, load_file)


def _torchvision(name: str, places: list[str], options: dict) -> Reference:
    import torch
    from torchvision import models

    return _torch(models.__dict__[name](**options), places, partial(torch.load, weights_only=True))


def _efficientnet_pytorch(name: str, places: list[str], options: dict) -> Reference:
    """The Lite package holds the networks of efficientnet_pytorch as well, and comes as a wheel."""
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    read = partial(torch.load, weights_only=True)
    return _torch(EfficientNet.from_name(name, **options), places, read)


def _torch(network, places: list[str], read: Callable[[Path], dict]) -> Reference:
    import torch

    def load(path: Path) -> None:
        network.load_state_dict(read(path), strict=True)

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


def _keras(name: str, places: list[str], num_classes: int, image_size: int) -> Reference:
    import keras

    network = getattr(keras.applications, name)(
        weights=None, input_shape=(image_size, image_size, 3), include_top=num_classes > 0,
        **({"classes": num_classes, "classifier_activation": None} if num_classes else {}),
    )  # fmt: skip
    inspect = keras.Model(network.input, [network.get_layer(p).output for p in places])

    def run(images: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        for layer in network.layers:  # EfficientNet normalises inside: undo it beforehand
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
