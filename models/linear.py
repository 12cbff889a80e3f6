"""Softmax regression on the pixels: the baseline that any network must beat."""

from flax import nnx

from models.classifier import Classifier
from models.layers import flatten, logits_layer


class Linear(Classifier):
    """logits = W x + b, with x the flattened image; W starts at zero, so the loss at log K."""

    def __init__(self, num_classes: int, image_size: int, *, dtype, rngs: nnx.Rngs):
        del dtype  # the only layer is the last one
        inputs, zeros = image_size * image_size * 3, nnx.initializers.zeros
        dense = logits_layer(inputs, num_classes, rngs, kernel_init=zeros)
        self.stages = nnx.List([nnx.Sequential(flatten, dense)])
