"""EfficientNet (Tan and Le 2019, arXiv:1905.11946) and the inverted residual block it is made of.

Two forms are published. "torch": explicit padding, BatchNorm epsilon 1e-5. "tf" (TensorFlow's own
weights, also Keras'): `SAME` padding, epsilon 1e-3.

EfficientNet-Lite (tensorflow/tpu) has ReLU6 for SiLU and no squeeze-excite, and scales neither stem
and head nor the number of blocks in the first and the last stage.
"""

import math

import jax
from flax import nnx

from errors import choose
from models.classifier import Classifier
from models.layers import BatchNorm, PooledLinear, SqueezeExcite, conv, stochastic_depth


class ConvNormAct(nnx.Module):
    """Convolution, BatchNorm and an activation (None for a linear layer)."""

    def __init__(
        self, inputs: int, outputs: int, side: int, stride: int = 1, *, tf: bool, act, **settings
    ):
        norm = {"momentum": 0.9, "epsilon": 1e-3 if tf else 1e-5}
        norm |= {key: settings[key] for key in ("dtype", "rngs")}
        self.conv = conv(inputs, outputs, side, stride, same=tf, **settings)
        self.norm = BatchNorm(outputs, **norm)
        self.act = act

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, h, w, O]."""
        x = self.norm(self.conv(x))
        return x if self.act is None else self.act(x)


class InvertedResidual(nnx.Module):
    """Expand 1x1, depthwise, squeeze-excite, project 1x1; a shortcut where shapes agree.

    With an expansion of 1 there is no expanding layer; `drop` is the rate of stochastic depth.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        side: int,
        stride: int,
        expansion: int,
        squeeze_excite: bool,
        drop: float,
        act,
        tf: bool,
        **settings,
    ):
        inner, form = inputs * expansion, {"tf": tf, **settings}
        self.expand = ConvNormAct(inputs, inner, 1, act=act, **form) if expansion > 1 else None
        self.depthwise = ConvNormAct(inner, inner, side, stride, act=act, groups=inner, **form)
        reduced = inputs // 4 if squeeze_excite else 0
        self.gate = SqueezeExcite(inner, reduced, act=act, **settings) if reduced else None
        self.project = ConvNormAct(inner, outputs, 1, act=None, **form)
        self.drop = stochastic_depth(drop, settings["rngs"])
        self.has_shortcut = stride == 1 and inputs == outputs

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H / stride, W / stride, O]."""
        y = x if self.expand is None else self.expand(x)
        y = self.depthwise(y)
        y = self.project(y if self.gate is None else self.gate(y))
        return x + self.drop(y) if self.has_shortcut else y


def inverted_residual_stages(channels: int, plan: list[tuple], drop_rate: float, **options) -> list:
    """Returns a stage per row of `plan`: (expansion, outputs, blocks, stride, side).

    Stochastic depth grows linearly from 0 to `drop_rate` over the blocks.
    """
    total, done, stages = sum(row[2] for row in plan), 0, []
    for expansion, outputs, count, stride, side in plan:
        blocks = []
        for i in range(count):
            options |= {"side": side, "stride": stride if i == 0 else 1, "expansion": expansion}
            drop = drop_rate * done / total
            blocks.append(InvertedResidual(channels, outputs, drop=drop, **options))
            channels, done = outputs, done + 1
        stages.append(nnx.Sequential(*blocks))
    return stages


def round_channels(channels: float, divisor: int = 8) -> int:
    """Rounds to a multiple of `divisor`, never down by more than a tenth."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def _timm_name(model: Classifier, stage: str, block: str, part: str) -> str:
    """timm numbers convolutions through; the first stage has no expanding layer."""
    parts = TIMM_PARTS if stage == "1" else TIMM_PARTS | TIMM_EXPANDING
    return f"blocks.{int(stage) - 1}.{block}.{parts[part]}"


TIMM_PARTS = {
    "depthwise.conv": "conv_dw",
    "depthwise.norm": "bn1",
    "gate.reduce": "se.conv_reduce",
    "gate.expand": "se.conv_expand",
    "project.conv": "conv_pw",
    "project.norm": "bn2",
}
TIMM_EXPANDING = {
    "expand.conv": "conv_pw",
    "expand.norm": "bn1",
    "depthwise.norm": "bn2",
    "project.conv": "conv_pwl",
    "project.norm": "bn3",
}
TIMM_NAMES = {
    "0.conv": "conv_stem",
    "0.norm": "bn1",
    r"(\d).layers.(\d+).(\w+.\w+)": _timm_name,
    "8.conv": "conv_head",
    "8.norm": "bn2",
    "9.linear": "classifier",
}


def _torchvision_name(model: Classifier, stage: str, block: str, part: str, layer: str) -> str:
    order = ["expand", "depthwise", "gate", "project"][stage == "1" :]
    number = {"conv": "0", "norm": "1", "reduce": "fc1", "expand": "fc2"}[layer]
    return f"features.{stage}.{block}.block.{order.index(part)}.{number}"


LUKEMELAS_PARTS = {
    "expand.conv": "expand_conv",
    "expand.norm": "bn0",
    "depthwise.conv": "depthwise_conv",
    "depthwise.norm": "bn1",
    "gate.reduce": "se_reduce",
    "gate.expand": "se_expand",
    "project.conv": "project_conv",
    "project.norm": "bn2",
}


def _lukemelas_name(model: Classifier, stage: str, block: str, part: str) -> str:
    """efficientnet_pytorch numbers the blocks of all stages through."""
    number = sum(len(s.layers) for s in list(model.stages)[1 : int(stage)]) + int(block)
    return f"_blocks.{number}._{LUKEMELAS_PARTS[part]}"


KERAS_PARTS = {
    "expand.conv": "expand_conv",
    "expand.norm": "expand_bn",
    "depthwise.conv": "dwconv",
    "depthwise.norm": "bn",
    "gate.reduce": "se_reduce",
    "gate.expand": "se_expand",
    "project.conv": "project_conv",
    "project.norm": "project_bn",
}


class EfficientNet(Classifier):
    """Stem, seven stages of inverted residuals, 1x1 convolution, pooled linear head."""

    min_image_size = 32
    names = {
        "timm": TIMM_NAMES,
        "torchvision": {
            "(0|8).conv": r"features.\1.0",
            "(0|8).norm": r"features.\1.1",
            r"(\d).layers.(\d+).(\w+).(\w+)": _torchvision_name,
            "9.linear": "classifier.1",
        },
        "lukemelas": {
            "0.conv": "_conv_stem",
            "0.norm": "_bn0",
            r"(\d).layers.(\d+).(\w+.\w+)": _lukemelas_name,
            "8.conv": "_conv_head",
            "8.norm": "_bn1",
            "9.linear": "_fc",
        },
        "keras": {
            "0.conv": "stem_conv",
            "0.norm": "stem_bn",
            r"(\d).layers.(\d+).(\w+.\w+)": lambda model, stage, block, part: (
                f"block{stage}{'abcdefgh'[int(block)]}_{KERAS_PARTS[part]}"
            ),
            "8.conv": "top_conv",
            "8.norm": "top_bn",
            "9.linear": "predictions",
        },
    }
    width, depth, lite = 1.0, 1.0, False
    # expansion, channels, blocks, stride, kernel side: of B0
    plan = (
        (1, 16, 1, 1, 3),
        (6, 24, 2, 2, 3),
        (6, 40, 2, 2, 5),
        (6, 80, 3, 2, 3),
        (6, 112, 3, 1, 5),
        (6, 192, 4, 2, 5),
        (6, 320, 1, 1, 3),
    )

    def __init__(
        self,
        num_classes: int,
        image_size: int,
        *,
        form: str = "torch",
        dropout: float = 0.2,
        stochastic_depth: float = 0.2,
        dtype,
        rngs: nnx.Rngs,
    ):
        del image_size  # any: the head averages over places
        tf = choose("efficientnet: form", form, ("torch", "tf")) == "tf"
        act = nnx.relu6 if self.lite else nnx.silu
        settings = {"tf": tf, "act": act, "dtype": dtype, "rngs": rngs}
        plan = []
        for expansion, channels, count, stride, side in self.plan:
            scaled = not self.lite or 0 < len(plan) < len(self.plan) - 1
            count = math.ceil(count * self.depth) if scaled else count
            plan.append((expansion, round_channels(channels * self.width), count, stride, side))
        width, last = 1.0 if self.lite else self.width, plan[-1][1]
        stem, top = (round_channels(channels * width) for channels in (32, 1280))
        options = {"squeeze_excite": not self.lite, **settings}
        blocks = inverted_residual_stages(stem, plan, stochastic_depth, **options)
        stages = [
            ConvNormAct(3, stem, 3, 2, **settings),
            *blocks,
            ConvNormAct(last, top, 1, **settings),
            PooledLinear(top, num_classes, dropout, rngs),
        ]
        self.stages = nnx.List(stages)


class EfficientNetB0(EfficientNet):
    """5.3 M parameters with 1,000 classes."""

    default_image_size = 224


class EfficientNetB1(EfficientNet):
    """7.8 M parameters with 1,000 classes."""

    default_image_size = 240
    depth = 1.1


class EfficientNetB2(EfficientNet):
    """9.1 M parameters with 1,000 classes."""

    default_image_size = 260
    width, depth = 1.1, 1.2


class EfficientNetB3(EfficientNet):
    """12.2 M parameters with 1,000 classes."""

    default_image_size = 300
    width, depth = 1.2, 1.4


class EfficientNetLite0(EfficientNet):
    """4.7 M parameters with 1,000 classes."""

    default_image_size = 224
    lite = True


class EfficientNetLite1(EfficientNetLite0):
    """5.4 M parameters with 1,000 classes."""

    default_image_size = 240
    depth = 1.1


class EfficientNetLite2(EfficientNetLite0):
    """6.1 M parameters with 1,000 classes."""

    default_image_size = 260
    width, depth = 1.1, 1.2


class EfficientNetLite3(EfficientNetLite0):
    """8.2 M parameters with 1,000 classes."""

    default_image_size = 280
    width, depth = 1.2, 1.4


class EfficientNetLite4(EfficientNetLite0):
    """13.0 M parameters with 1,000 classes."""

    default_image_size = 300
    width, depth = 1.4, 1.8
