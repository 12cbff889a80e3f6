"""What published files call our parameters, and how their arrays are laid out.

Three publishers: "timm" (safetensors), "torchvision" (.pth) and "keras" (.h5). Each architecture
has, per publisher, rules from the path of a layer here to its name there; the first whose pattern
matches the whole path decides. A rule's second half is a template of `re`, or a function of the
model and the match where numbers have to be computed.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np

from models.classifier import Classifier
from models.efficientnet import EfficientNet
from models.mobilenet import MobileNetV2
from models.resnet import ResNet
from models.vgg import Vgg
from models.vit import VisionTransformer

HEAD = {
    "timm": r"(fc|classifier|head|pre_logits|head\.fc)\..*|norm\..*",
    "torchvision": r"(fc|classifier|heads)\..*|encoder\.ln\..*",
    "keras": r"(fc\d|predictions)/.*",
}
LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
KERAS_LEAVES = {"scale": "gamma", "mean": "moving_mean", "var": "moving_variance"}
TOKENS = {
    ("timm", "class_token"): "cls_token",
    ("timm", "positions"): "pos_embed",
    ("torchvision", "class_token"): "class_token",
    ("torchvision", "positions"): "encoder.pos_embedding",
}


def _number(text: str, by: int) -> str:
    return str(int(text) + by)


def _letter(text: str) -> str:
    return chr(ord("a") + int(text))


def _vgg_flat(model: Vgg, match: re.Match) -> str:
    """All layers of torchvision's and timm's VGG are numbered through, ReLU and pooling too."""
    lengths = [len(stage.layers) for stage in model.stages[: int(match[1])]]
    return f"features.{sum(lengths) + int(match[2])}"


def _vgg_keras(model: Vgg, match: re.Match) -> str:
    return f"block{int(match[1]) + 1}_conv{int(match[2]) // 2 + 1}"


def _block_number(model: MobileNetV2, match: re.Match) -> int:
    """Returns how many inverted residuals lie before this one."""
    return sum(len(s.layers) for s in model.stages[1 : int(match[1])]) + int(match[2])


def _mobilenet_torchvision(model: MobileNetV2, match: re.Match) -> str:
    number, part, layer = _block_number(model, match), match[3], match[4]
    place = {"expand": 0, "depthwise": min(number, 1), "project": min(number, 1) + 1}[part]
    kind = {"conv": 0, "norm": 1}[layer]
    tail = f"{place + kind}" if part == "project" else f"{place}.{kind}"
    return f"features.{number + 1}.conv.{tail}"


def _mobilenet_keras(model: MobileNetV2, match: re.Match) -> str:
    number, part = _block_number(model, match), match[3]
    prefix = f"block_{number}" if number else "expanded_conv"
    return f"{prefix}_{part}" + ("_BN" if match[4] == "norm" else "")


def _efficientnet_torchvision(model: EfficientNet, match: re.Match) -> str:
    stage, block, part, layer = match.groups()
    order = ["expand", "depthwise", "gate", "project"][stage == "1" :]
    tail = {"conv": "0", "norm": "1", "reduce": "fc1", "expand": "fc2"}[layer]
    return f"features.{stage}.{block}.block.{order.index(part)}.{tail}"


def _resnet_torch(model: ResNet, match: re.Match) -> str:
    stage, block, place, layer = match.groups()
    kind = {"conv": "conv", "norm": "bn"}[layer]
    return f"layer{stage}.{block}.{kind}{int(place) + 1}"


def _resnet_shortcut_torch(model: ResNet, match: re.Match) -> str:
    return f"layer{match[1]}.{match[2]}.downsample.{int(match[3] == 'norm')}"


def _resnet_keras(model: ResNet, match: re.Match) -> str:
    stage, block, place, layer = match.groups()
    number = 0 if place == "shortcut" else int(place.removeprefix("convs.")) + 1
    kind = {"conv": "conv", "norm": "bn"}[layer]
    return f"conv{int(stage) + 1}_block{int(block) + 1}_{number}_{kind}"


def _efficientnet_keras(model: EfficientNet, match: re.Match) -> str:
    stage, block, part = match.groups()
    name = {
        "expand.conv": "expand_conv",
        "expand.norm": "expand_bn",
        "depthwise.conv": "dwconv",
        "depthwise.norm": "bn",
        "gate.reduce": "se_reduce",
        "gate.expand": "se_expand",
        "project.conv": "project_conv",
        "project.norm": "project_bn",
    }[part]
    return f"block{stage}{_letter(block)}_{name}"


def _inverted_residual_timm(model: Classifier, match: re.Match) -> str:
    """timm's first stage has no expanding layer, so its others move up by one number."""
    stage, block, part = match.groups()
    first = {
        "depthwise.conv": "conv_dw",
        "depthwise.norm": "bn1",
        "project.conv": "conv_pw",
        "project.norm": "bn2",
    }
    others = {
        "expand.conv": "conv_pw",
        "expand.norm": "bn1",
        "depthwise.conv": "conv_dw",
        "depthwise.norm": "bn2",
        "project.conv": "conv_pwl",
        "project.norm": "bn3",
    }
    gate = {"gate.reduce": "se.conv_reduce", "gate.expand": "se.conv_expand"}
    names = gate | (first if stage == "1" else others)
    return f"blocks.{int(stage) - 1}.{block}.{names[part]}"


_INVERTED_TIMM = [
    (r"stages\.0\.conv", "conv_stem"),
    (r"stages\.0\.norm", "bn1"),
    (r"stages\.(\d)\.layers\.(\d+)\.(\w+\.\w+)", _inverted_residual_timm),
    (r"stages\.8\.conv", "conv_head"),
    (r"stages\.8\.norm", "bn2"),
    (r"stages\.9\.linear", "classifier"),
]
_INVERTED_BLOCK = r"stages\.(\d)\.layers\.(\d+)\.(\w+)\.(\w+)"
_RESNET_TORCH = [
    (r"stages\.0\.conv\.conv", "conv1"),
    (r"stages\.0\.conv\.norm", "bn1"),
    (r"stages\.(\d)\.layers\.(\d+)\.convs\.(\d)\.(\w+)", _resnet_torch),
    (r"stages\.(\d)\.layers\.(\d+)\.shortcut\.(\w+)", _resnet_shortcut_torch),
    (r"stages\.5\.linear", "fc"),
]

RULES = {
    (Vgg, "timm"): [
        (r"stages\.(\d)\.layers\.(\d+)", _vgg_flat),
        (r"stages\.5\.(fc\d)", r"pre_logits.\1"),
        (r"stages\.5\.linear", "head.fc"),
    ],
    (Vgg, "torchvision"): [
        (r"stages\.(\d)\.layers\.(\d+)", _vgg_flat),
        (r"stages\.5\.fc1", "classifier.0"),
        (r"stages\.5\.fc2", "classifier.3"),
        (r"stages\.5\.linear", "classifier.6"),
    ],
    (Vgg, "keras"): [
        (r"stages\.(\d)\.layers\.(\d+)", _vgg_keras),
        (r"stages\.5\.(fc\d)", r"\1"),
        (r"stages\.5\.linear", "predictions"),
    ],
    (ResNet, "timm"): _RESNET_TORCH,
    (ResNet, "torchvision"): _RESNET_TORCH,
    (ResNet, "keras"): [
        (r"stages\.0\.conv\.conv", "conv1_conv"),
        (r"stages\.0\.conv\.norm", "conv1_bn"),
        (r"stages\.(\d)\.layers\.(\d+)\.(convs\.\d|shortcut)\.(\w+)", _resnet_keras),
        (r"stages\.5\.linear", "predictions"),
    ],
    (EfficientNet, "timm"): _INVERTED_TIMM,
    (EfficientNet, "torchvision"): [
        (r"stages\.(0|8)\.conv", r"features.\1.0"),
        (r"stages\.(0|8)\.norm", r"features.\1.1"),
        (_INVERTED_BLOCK, _efficientnet_torchvision),
        (r"stages\.9\.linear", "classifier.1"),
    ],
    (EfficientNet, "keras"): [
        (r"stages\.0\.conv", "stem_conv"),
        (r"stages\.0\.norm", "stem_bn"),
        (r"stages\.(\d)\.layers\.(\d+)\.(\w+\.\w+)", _efficientnet_keras),
        (r"stages\.8\.conv", "top_conv"),
        (r"stages\.8\.norm", "top_bn"),
        (r"stages\.9\.linear", "predictions"),
    ],
    (MobileNetV2, "timm"): _INVERTED_TIMM,
    (MobileNetV2, "torchvision"): [
        (r"stages\.0\.conv", "features.0.0"),
        (r"stages\.0\.norm", "features.0.1"),
        (_INVERTED_BLOCK, _mobilenet_torchvision),
        (r"stages\.8\.conv", "features.18.0"),
        (r"stages\.8\.norm", "features.18.1"),
        (r"stages\.9\.linear", "classifier.1"),
    ],
    (MobileNetV2, "keras"): [
        (r"stages\.0\.conv", "Conv1"),
        (r"stages\.0\.norm", "bn_Conv1"),
        (_INVERTED_BLOCK, _mobilenet_keras),
        (r"stages\.8\.conv", "Conv_1"),
        (r"stages\.8\.norm", "Conv_1_bn"),
        (r"stages\.9\.linear", "predictions"),
    ],
    (VisionTransformer, "timm"): [
        (r"stages\.0\.patches", "patch_embed.proj"),
        (r"stages\.13\.norm", "norm"),
        (r"stages\.13\.linear", "head"),
        (r"stages\.(\d+)\.(norm\d)", lambda model, m: f"blocks.{_number(m[1], -1)}.{m[2]}"),
        (r"stages\.(\d+)\.qkv", lambda model, m: f"blocks.{_number(m[1], -1)}.attn.qkv"),
        (r"stages\.(\d+)\.out", lambda model, m: f"blocks.{_number(m[1], -1)}.attn.proj"),
        (r"stages\.(\d+)\.(fc\d)", lambda model, m: f"blocks.{_number(m[1], -1)}.mlp.{m[2]}"),
    ],
    (VisionTransformer, "torchvision"): [
        (r"stages\.0\.patches", "conv_proj"),
        (r"stages\.13\.norm", "encoder.ln"),
        (r"stages\.13\.linear", "heads.head"),
        *(
            (rf"stages\.(\d+)\.{ours}", lambda model, m, theirs=theirs: _encoder_layer(m, theirs))
            for ours, theirs in {
                "norm1": "ln_1",
                "norm2": "ln_2",
                "qkv": "self_attention.in_proj",
                "out": "self_attention.out_proj",
                "fc1": "mlp.0",
                "fc2": "mlp.3",
            }.items()
        ),
    ],
}


def _encoder_layer(match: re.Match, theirs: str) -> str:
    return f"encoder.layers.encoder_layer_{_number(match[1], -1)}.{theirs}"


def normalise_names(arrays: dict[str, np.ndarray], publisher: str) -> dict[str, np.ndarray]:
    """Returns arrays under their published names.

    Keras 3 saves depthwise kernels as "kernel", and numbers the normalisation of a second network.
    """
    if publisher != "keras":
        return arrays

    def published(name: str) -> str:
        name = re.sub(r"^normalization_\d+/", "normalization/", name)
        return re.sub(r"(dwconv|depthwise)/kernel$", r"\1/depthwise_kernel", name)

    return {published(name): array for name, array in arrays.items()}


def published_by(model: Classifier) -> list[str]:
    """Returns the publishers whose files this architecture can read."""
    return [kind for (architecture, kind) in RULES if isinstance(model, architecture)]


def source_names(model: Classifier, publisher: str, paths: list[str]) -> dict[str, str]:
    """Returns {our path: the publisher's name} for parameters and statistics of a model.

    Args:
      model: gives architecture and structure.
      publisher: one of `published_by(model)`.
      paths: such as "stages.0.conv.kernel".
    """
    (rules,) = (r for (a, kind), r in RULES.items() if isinstance(model, a) and kind == publisher)
    norms = {path.rpartition(".")[0] for path in paths if path.endswith(".scale")}
    return {path: _source_name(model, publisher, rules, norms, path) for path in paths}


def _source_name(model, publisher: str, rules: list, norms: set[str], path: str) -> str:
    module, _, leaf = path.rpartition(".")
    if (publisher, leaf) in TOKENS:
        return TOKENS[publisher, leaf]
    for pattern, name in rules:
        match = re.fullmatch(pattern, module)
        if match:
            name = match.expand(name) if isinstance(name, str) else name(model, match)
            break
    else:
        raise KeyError(f"no rule of {publisher} names {path}")
    if publisher == "keras":
        if leaf == "kernel" and re.search(r"(dwconv|depthwise)$", name):
            return f"{name}/depthwise_kernel"
        if leaf == "bias" and module in norms:
            return f"{name}/beta"
        return f"{name}/{KERAS_LEAVES.get(leaf, leaf)}"
    separator = "_" if name.endswith("in_proj") else "."
    return f"{name}{separator}{LEAVES.get(leaf, leaf)}"


def to_our_layout(array: np.ndarray, publisher: str, path: str, shape: tuple) -> np.ndarray:
    """Returns a publisher's array in our layout, or as it is where that gives another shape.

    Args:
      array: as read from the file.
      publisher: of the file.
      path: ours.
      shape: ours.
    """
    leaf = path.rpartition(".")[2]
    if leaf == "positions":
        return resize_positions(array, shape[1])
    if leaf != "kernel":
        return array
    if publisher == "keras":  # [H, W, I, O], and [H, W, C, 1] where depthwise
        depthwise = array.ndim == len(shape) == 4 and shape[2] == 1 and array.shape[3] == 1
        return array.swapaxes(2, 3) if depthwise else array
    if path.endswith("fc1.kernel") and array.ndim == 2 and len(array.T) == 7 * 7 * 512:
        array = array.reshape(-1, 512, 7, 7)  # of VGG, whose flattened map has channels first
    if array.ndim == 4:  # [O, I, H, W] -> [H, W, I, O]
        array = array.transpose(2, 3, 1, 0)
        return array.reshape(-1, array.shape[-1]) if len(shape) == 2 else array
    return array.T


def resize_positions(positions: np.ndarray, count: int) -> np.ndarray:
    """Resizes position embeddings [1, 1 + n, C] to [1, count, C], bicubically; the token's stays.

    Both grids are square; what cannot be read as one is returned as it is.
    """
    if positions.ndim != 3:
        return positions
    old, new = (round(max(n - 1, 0) ** 0.5) for n in (positions.shape[1], count))
    if positions.shape[1] in (count, 0) or old**2 + 1 != positions.shape[1]:
        return positions
    width = positions.shape[-1]
    grid = jnp.asarray(positions[:, 1:]).reshape(1, old, old, width)
    grid = jax.image.resize(
        grid, (1, new, new, width), "cubic", antialias=True, precision="highest"
    )
    return np.concatenate([positions[:, :1], np.asarray(grid).reshape(1, -1, width)], axis=1)
