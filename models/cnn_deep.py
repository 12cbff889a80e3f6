"""Four convolutional blocks with BatchNorm and dropout: the same idea, deeper and regularised."""

from flax import nnx

from models.classifier import Classifier
from models.layers import BatchNorm, Conv, Dense, global_average_pool, he_normal, logits_layer
from models.lowering import max_pool_2x2


class CnnDeep(Classifier):
    """Blocks of 32, 64, 128, 256: (conv 3x3, BatchNorm, ReLU) twice, pool, dropout.

    Then global average pooling, dense 256, dropout `head_dropout`, dense K.
    """

    min_image_size = 16

    def __init__(
        self, num_classes: int, image_size: int, *, dropout=0.1, head_dropout=0.5, dtype, rngs
    ):
        del image_size  # any size from min_image_size on: the head averages over places
        settings = {"dtype": dtype, "rngs": rngs}

        def conv_norm(inputs: int, outputs: int) -> list:
            conv = Conv(inputs, outputs, (3, 3), use_bias=False, kernel_init=he_normal, **settings)
            return [conv, BatchNorm(outputs, momentum=0.9, **settings), nnx.relu]

        widths = (32, 64, 128, 256)
        blocks = [
            nnx.Sequential(
                *conv_norm(inputs, outputs),
                *conv_norm(outputs, outputs),
                max_pool_2x2,
                nnx.Dropout(dropout, rngs=rngs),
            )
            for inputs, outputs in zip((3, *widths), widths, strict=False)
        ]
        head = nnx.Sequential(
            global_average_pool,  # [B, 256]
            Dense(256, 256, kernel_init=he_normal, **settings),
            nnx.relu,
            nnx.Dropout(head_dropout, rngs=rngs),
            logits_layer(256, num_classes, rngs),
        )
        self.stages = nnx.List([*blocks, head])
