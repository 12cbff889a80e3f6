"""ResNet (He et al. 2015, arXiv:1512.03385) as published weights need it: v1.5 and Keras' v1."""

import jax
from flax import nnx

from errors import choose
from models.classifier import Classifier
from models.layers import BatchNorm, PooledLinear, conv
from models.lowering import max_pool_3x3


class ConvNorm(nnx.Module):
    """Convolution and BatchNorm; "keras": biased, epsilon 1.001e-5. No activation."""

    def __init__(self, inputs: int, outputs: int, side: int, stride: int, form: str, **settings):
        keras = form == "keras"
        epsilon = 1.001e-5 if keras else 1e-5
        self.conv = conv(inputs, outputs, side, stride, use_bias=keras, **settings)
        self.norm = BatchNorm(outputs, momentum=0.9, epsilon=epsilon, **settings)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, h, w, O]."""
        return self.norm(self.conv(x))


class Stem(nnx.Module):
    """7x7 convolution and 3x3 max pooling, each of stride 2 with padding on every edge."""

    def __init__(self, form: str, **settings):
        self.conv = ConvNorm(3, 64, 7, 2, form, **settings)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, 3] -> [B, H / 4, W / 4, 64]."""
        return max_pool_3x3(nnx.relu(self.conv(x)))


class Block(nnx.Module):
    """A residual block: two 3x3 convolutions, or a bottleneck 1x1, 3x3, 1x1.

    The bottleneck's stride lies on its 3x3 ("torch", v1.5) or on its first 1x1 ("keras", v1).
    """

    def __init__(
        self, inputs: int, width: int, stride: int, bottleneck: bool, form: str, **settings
    ):
        outputs = 4 * width if bottleneck else width
        first, second = (stride, 1) if form == "keras" or not bottleneck else (1, stride)
        if bottleneck:
            plan = [(inputs, width, 1, first), (width, width, 3, second), (width, outputs, 1, 1)]
        else:
            plan = [(inputs, width, 3, first), (width, width, 3, second)]
        self.convs = nnx.List([ConvNorm(*shape, form, **settings) for shape in plan])
        changes = stride != 1 or inputs != outputs
        self.shortcut = ConvNorm(inputs, outputs, 1, stride, form, **settings) if changes else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H / stride, W / stride, O]."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        for layer in self.convs[:-1]:
            x = nnx.relu(layer(x))
        return nnx.relu(self.convs[-1](x) + shortcut)


def _keras_name(model: Classifier, stage: str, block: str, place: str, part: str) -> str:
    number = 0 if place == "shortcut" else int(place[-1]) + 1
    return f"conv{int(stage) + 1}_block{int(block) + 1}_{number}_{PARTS[part]}"


PARTS = {"conv": "conv", "norm": "bn"}
TORCH_NAMES = {
    "0.conv.conv": "conv1",
    "0.conv.norm": "bn1",
    r"(\d).layers.(\d+).convs.(\d).(\w+)": lambda model, stage, block, place, part: (
        f"layer{stage}.{block}.{PARTS[part]}{int(place) + 1}"
    ),
    r"(\d).layers.(\d+).shortcut.conv": r"layer\1.\2.downsample.0",
    r"(\d).layers.(\d+).shortcut.norm": r"layer\1.\2.downsample.1",
    "5.linear": "fc",
}


class ResNet(Classifier):
    """Stem, four stages of residual blocks, pooled linear head."""

    default_image_size = 224
    min_image_size = 32
    names = {
        "timm": TORCH_NAMES,
        "torchvision": TORCH_NAMES,
        "keras": {
            "0.conv.conv": "conv1_conv",
            "0.conv.norm": "conv1_bn",
            r"(\d).layers.(\d+).(convs.\d|shortcut).(\w+)": _keras_name,
            "5.linear": "predictions",
        },
    }
    blocks: tuple[int, int, int, int]
    bottleneck = True

    def __init__(
        self, num_classes: int, image_size: int, *, form="torch", dropout=0.0, dtype, rngs
    ):
        del image_size  # any: the head averages over places
        choose("resnet: form", form, ("torch", "keras"))
        settings = {"dtype": dtype, "rngs": rngs}
        stages, channels = [Stem(form, **settings)], 64
        for i, count in enumerate(self.blocks):
            width, outputs = 64 * 2**i, 64 * 2**i * (4 if self.bottleneck else 1)
            blocks = []
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(Block(channels, width, stride, self.bottleneck, form, **settings))
                channels = outputs
            stages.append(nnx.Sequential(*blocks))
        self.stages = nnx.List([*stages, PooledLinear(channels, num_classes, dropout, rngs)])


class ResNet18(ResNet):
    """11.7 M parameters with 1,000 classes."""

    blocks, bottleneck = (2, 2, 2, 2), False


class ResNet34(ResNet):
    """21.8 M parameters with 1,000 classes."""

    blocks, bottleneck = (3, 4, 6, 3), False


class ResNet50(ResNet):
    """25.6 M parameters with 1,000 classes."""

    blocks = (3, 4, 6, 3)


class ResNet101(ResNet):
    """44.5 M parameters with 1,000 classes."""

    blocks = (3, 4, 23, 3)


class ResNet152(ResNet):
    """60.2 M parameters with 1,000 classes."""

    blocks = (3, 8, 36, 3)
