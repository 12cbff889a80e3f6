"""MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381): inverted residuals with ReLU6."""

import jax.numpy as jnp
from flax import nnx

from errors import choose
from models.classifier import Classifier
from models.efficientnet import ConvNormAct, inverted_residual_stages
from models.layers import PooledLinear


class MobileNetV2(Classifier):
    """Stem, seven stages of inverted residuals, 1x1 convolution, pooled linear head.

    3.5 M parameters with 1,000 classes. Forms as in `models/efficientnet.py`: "torch" and "tf".
    """

    default_image_size = 224
    min_image_size = 32
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
        self,
        num_classes: int,
        image_size: int,
        *,
        form: str = "torch",
        dropout: float = 0.2,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        del image_size  # any: the head averages over places
        tf = choose("mobilenet_v2: form", form, ("torch", "tf")) == "tf"
        settings = {"tf": tf, "act": nnx.relu6, "dtype": dtype, "rngs": rngs}
        self.stages = nnx.List(
            [
                ConvNormAct(3, 32, 3, 2, **settings),
                *inverted_residual_stages(32, self.plan, 0.0, squeeze_excite=False, **settings),
                ConvNormAct(320, 1280, 1, **settings),
                PooledLinear(1280, num_classes, dropout, dtype=dtype, rngs=rngs),
            ]
        )
