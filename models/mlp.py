"""Multilayer perceptron on the pixels: what depth gives without any notion of place."""

from flax import nnx

from errors import UserError
from models.classifier import Classifier
from models.layers import Dense, flatten, he_normal, logits_layer


class Mlp(Classifier):
    """Fully connected ReLU layers of the widths `hidden`, with dropout after each."""

    def __init__(
        self,
        num_classes: int,
        image_size: int,
        *,
        hidden: tuple[int, ...] = (256,),
        dropout: float = 0.0,
        dtype,
        rngs: nnx.Rngs,
    ):
        if any(width < 1 for width in hidden):
            raise UserError(f"mlp: hidden={tuple(hidden)} needs widths of at least 1")
        layers, inputs = [flatten], image_size * image_size * 3
        for width in hidden:
            layers += [
                Dense(inputs, width, kernel_init=he_normal, dtype=dtype, rngs=rngs),
                nnx.relu,
                nnx.Dropout(dropout, rngs=rngs),
            ]
            inputs = width
        layers.append(logits_layer(inputs, num_classes, rngs))
        self.stages = nnx.List([nnx.Sequential(*layers)])
