"""VGG (Simonyan and Zisserman 2014, arXiv:1409.1556), plain and with BatchNorm."""

import jax
from flax import nnx

from models.classifier import Classifier
from models.layers import (
    BatchNorm,
    Dense,
    PooledLinear,
    adaptive_average_pool,
    conv,
    flatten,
    logits_layer,
)
from models.lowering import max_pool_2x2


class Head(nnx.Module):
    """Average pooling to 7x7 places (nothing at 224 pixels), two hidden layers, one linear."""

    def __init__(self, num_classes: int, hidden: int, dropout: float, *, dtype, rngs: nnx.Rngs):
        settings = {"dtype": dtype, "rngs": rngs}
        self.fc1 = Dense(7 * 7 * 512, hidden, **settings)
        self.fc2 = Dense(hidden, hidden, **settings)
        self.linear = logits_layer(hidden, num_classes, rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def condense(self, x: jax.Array) -> jax.Array:
        """[B, h, w, 512] -> [B, 7, 7, 512], all that this head needs of its input."""
        return adaptive_average_pool(x, 7)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, 512] -> [B, K]."""
        x = flatten(self.condense(x))  # rows, then columns, then channels
        x = self.dropout(nnx.relu(self.fc1(x)))
        x = self.dropout(nnx.relu(self.fc2(x)))
        return self.linear(x)


def _torch_name(model: Classifier, stage: str, layer: str) -> str:
    """PyTorch numbers all layers through, ReLU and pooling too."""
    before = sum(len(stage.layers) for stage in model.stages[: int(stage)])
    return f"features.{before + int(layer)}"


def _keras_name(model: Classifier, stage: str, layer: str) -> str:
    return f"block{int(stage) + 1}_conv{int(layer) // 2 + 1}"


class Vgg(Classifier):
    """Five stages of 3x3 convolutions, each ended by 2x2 max pooling, and a dense head.

    `hidden` is the width of the head's two hidden layers; 0 gives global average pooling and one
    linear layer instead, which leaves out 124 of 138 M parameters.
    """

    default_image_size = 224
    min_image_size = 32
    names = {
        "timm": {
            r"(\d).layers.(\d+)": _torch_name,
            "5.fc1": "pre_logits.fc1",
            "5.fc2": "pre_logits.fc2",
            "5.linear": "head.fc",
        },
        "torchvision": {
            r"(\d).layers.(\d+)": _torch_name,
            "5.fc1": "classifier.0",
            "5.fc2": "classifier.3",
            "5.linear": "classifier.6",
        },
        "keras": {
            r"(\d).layers.(\d+)": _keras_name,
            "5.fc1": "fc1",
            "5.fc2": "fc2",
            "5.linear": "predictions",
        },
    }
    flattened = {"stages.5.fc1.kernel": (7, 7, 512)}
    blocks: tuple[int, int, int, int, int] = (2, 2, 3, 3, 3)
    batch_norm = False

    def __init__(self, num_classes: int, image_size: int, *, hidden=4096, dropout=0.5, dtype, rngs):
        del image_size  # any: the head pools
        settings = {"dtype": dtype, "rngs": rngs}
        stages, channels = [], 3
        for count, width in zip(self.blocks, (64, 128, 256, 512, 512), strict=True):
            layers = []
            for _ in range(count):
                layers.append(conv(channels, width, 3, use_bias=True, **settings))
                if self.batch_norm:
                    layers.append(BatchNorm(width, momentum=0.9, **settings))
                layers.append(nnx.relu)
                channels = width
            stages.append(nnx.Sequential(*layers, max_pool_2x2))
        if hidden:
            head = Head(num_classes, hidden, dropout, **settings)
        else:
            head = PooledLinear(channels, num_classes, dropout, rngs)
        self.stages = nnx.List([*stages, head])


class Vgg16(Vgg):
    """138 M parameters with 1,000 classes."""


class Vgg16Bn(Vgg):
    """As `Vgg16`, each convolution followed by BatchNorm."""

    batch_norm = True


class Vgg19(Vgg):
    """144 M parameters with 1,000 classes."""

    blocks = (2, 2, 4, 4, 4)
