"""Two convolutional blocks and a dense layer: the network everybody writes first."""

from flax import nnx

from models.classifier import Classifier
from models.layers import Conv, Dense, flatten, he_normal, logits_layer
from models.lowering import max_pool_2x2


class Cnn(Classifier):
    """conv 32, pool, conv 64, pool, flatten, dense 128, dropout, dense K; 3x3 kernels, ReLU."""

    min_image_size = 4

    def __init__(
        self, num_classes: int, image_size: int, *, dropout: float = 0.0, dtype, rngs: nnx.Rngs
    ):
        settings = {"kernel_init": he_normal, "dtype": dtype, "rngs": rngs}

        def block(inputs: int, outputs: int) -> nnx.Sequential:
            conv = Conv(inputs, outputs, (3, 3), padding="SAME", **settings)
            return nnx.Sequential(conv, nnx.relu, max_pool_2x2)

        side = image_size // 2 // 2
        head = nnx.Sequential(
            flatten,  # [B, side * side * 64]
            Dense(side * side * 64, 128, **settings),
            nnx.relu,
            nnx.Dropout(dropout, rngs=rngs),
            logits_layer(128, num_classes, rngs),
        )
        self.stages = nnx.List([block(3, 32), block(32, 64), head])
