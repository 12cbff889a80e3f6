"""Softmax regression on the pixels: the baseline that any network must beat."""

from flax import nnx

from models.classifier import Classifier
from models.layers import flatten


class Linear(Classifier):
    """logits = W x + b, with x the flattened image; W starts at zero, so the loss at log K."""

    def __init__(self, num_classes: int, image_size: int, *, dtype, rngs: nnx.Rngs):
        inputs, zeros = image_size * image_size * 3, nnx.initializers.zeros
        dense = nnx.Linear(inputs, num_classes, kernel_init=zeros, dtype=dtype, rngs=rngs)
        self.stages = nnx.List([nnx.Sequential(flatten, dense)])
