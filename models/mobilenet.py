"""MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381): inverted residuals with ReLU6."""

from flax import nnx

from errors import choose
from models.classifier import Classifier
from models.efficientnet import TIMM_NAMES, ConvNormAct, inverted_residual_stages
from models.layers import PooledLinear


def _number(model: Classifier, stage: str, block: str) -> int:
    """Returns how many inverted residuals come before this one."""
    return sum(len(s.layers) for s in model.stages[1 : int(stage)]) + int(block)


def _torchvision_name(model: Classifier, stage: str, block: str, part: str, layer: str) -> str:
    number = _number(model, stage, block)
    order = ["expand", "depthwise", "project"][number == 0 :]
    place, kind = order.index(part), {"conv": 0, "norm": 1}[layer]
    last = f"{place + kind}" if part == "project" else f"{place}.{kind}"
    return f"features.{number + 1}.conv.{last}"


def _keras_name(model: Classifier, stage: str, block: str, part: str, layer: str) -> str:
    number = _number(model, stage, block)
    prefix = f"block_{number}" if number else "expanded_conv"
    return f"{prefix}_{part}" + ("_BN" if layer == "norm" else "")


class MobileNetV2(Classifier):
    """Stem, seven stages of inverted residuals, 1x1 convolution, pooled linear head.

    3.5 M parameters with 1,000 classes. Forms as in `models/efficientnet.py`: "torch" and "tf".
    """

    default_image_size = 224
    min_image_size = 32
    names = {
        "timm": TIMM_NAMES,
        "torchvision": {
            "0.conv": "features.0.0",
            "0.norm": "features.0.1",
            r"(\d).layers.(\d+).(\w+).(\w+)": _torchvision_name,
            "8.conv": "features.18.0",
            "8.norm": "features.18.1",
            "9.linear": "classifier.1",
        },
        "keras": {
            "0.conv": "Conv1",
            "0.norm": "bn_Conv1",
            r"(\d).layers.(\d+).(\w+).(\w+)": _keras_name,
            "8.conv": "Conv_1",
            "8.norm": "Conv_1_bn",
            "9.linear": "predictions",
        },
    }
    # expansion, channels, blocks, stride, kernel side
    plan = (
        (1, 16, 1, 1, 3),
        (6, 24, 2, 2, 3),
        (6, 32, 3, 2, 3),
        (6, 64, 4, 2, 3),
        (6, 96, 3, 1, 3),
        (6, 160, 3, 2, 3),
        (6, 320, 1, 1, 3),
    )

    def __init__(
        self, num_classes: int, image_size: int, *, form="torch", dropout=0.2, dtype, rngs
    ):
        del image_size  # any: the head averages over places
        tf = choose("mobilenet_v2: form", form, ("torch", "tf")) == "tf"
        settings = {"tf": tf, "act": nnx.relu6, "dtype": dtype, "rngs": rngs}
        stages = [
            ConvNormAct(3, 32, 3, 2, **settings),
            *inverted_residual_stages(32, self.plan, 0.0, squeeze_excite=False, **settings),
            ConvNormAct(320, 1280, 1, **settings),
            PooledLinear(1280, num_classes, dropout, rngs),
        ]
        self.stages = nnx.List(stages)
