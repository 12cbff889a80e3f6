"""Vision Transformer (Dosovitskiy et al. 2020, arXiv:2010.11929) with a class token."""

import jax
import jax.numpy as jnp
from flax import nnx

from errors import UserError
from models.classifier import Classifier
from models.layers import Conv, Dense, logits_layer

EPSILON = 1e-6  # of LayerNorm, in timm and torchvision alike


class Embed(nnx.Module):
    """Patches as tokens after a class token, plus a learned embedding of each position."""

    def __init__(self, side: int, patch: int, width: int, dropout: float, *, dtype, rngs: nnx.Rngs):
        self.patches = Conv(
            3, width, (patch, patch), (patch, patch), padding="VALID", dtype=dtype, rngs=rngs
        )
        self.class_token = nnx.Param(jnp.zeros((1, 1, width)))
        small = nnx.initializers.truncated_normal(0.02)
        self.positions = nnx.Param(small(rngs.params(), (1, 1 + side * side, width)))
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, H, W, 3] -> [B, 1 + N, C]."""
        x = self.patches(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])  # [B, N, C]
        token = jnp.broadcast_to(self.class_token[...], (x.shape[0], 1, x.shape[-1]))
        tokens = jnp.concatenate([token.astype(x.dtype), x], axis=1)
        return self.dropout(tokens + self.positions[...])


class Block(nnx.Module):
    """Self-attention and a two-layer perceptron, each normalised before and added after."""

    def __init__(self, width: int, heads: int, dropout: float, *, dtype, rngs: nnx.Rngs):
        settings = {"dtype": dtype, "rngs": rngs}
        init = {"kernel_init": nnx.initializers.xavier_uniform(), **settings}
        self.heads = heads
        self.norm1 = nnx.LayerNorm(width, epsilon=EPSILON, **settings)
        self.qkv = Dense(width, 3 * width, **init)
        self.out = Dense(width, width, **init)
        self.norm2 = nnx.LayerNorm(width, epsilon=EPSILON, **settings)
        self.fc1 = Dense(width, 4 * width, **init)
        self.fc2 = Dense(4 * width, width, **init)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, C] -> [B, T, C]."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        attended = jax.nn.dot_product_attention(*(qkv[:, :, i] for i in range(3)))
        x = x + self.dropout(self.out(attended.reshape(x.shape)))
        y = self.fc2(self.dropout(nnx.gelu(self.fc1(self.norm2(x)), approximate=False)))
        return x + self.dropout(y)


class Head(nnx.Module):
    """LayerNorm, the class token, one linear layer."""

    def __init__(self, width: int, num_classes: int, *, dtype, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, epsilon=EPSILON, dtype=dtype, rngs=rngs)
        self.linear = logits_layer(width, num_classes, rngs)

    def condense(self, x: jax.Array) -> jax.Array:
        """[B, 1 + N, C] -> [B, 1, C], all that this head needs of its input."""
        return x[:, :1]

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, 1 + N, C] -> [B, K]."""
        return self.linear(self.norm(x)[:, 0])


def _blocks(prefix: str, **parts: str) -> dict:
    """Names of the parts of every block; publishers count blocks from 0."""
    return {
        rf"(\d+).{ours}": lambda model, stage, theirs=theirs: f"{prefix}{int(stage) - 1}.{theirs}"
        for ours, theirs in parts.items()
    }


class VisionTransformer(Classifier):
    """Embedding, twelve blocks, head; stages give tokens [B, 1 + N, C], the class token first.

    `features` stops before the last block, the last place where patches still reach the logits. Its
    map has 2 C channels: the patches' C, then the class token's C, repeated at every place.
    """

    default_image_size = 224
    min_image_size = 16
    names = {
        "timm": {
            "0.class_token": "cls_token",
            "0.positions": "pos_embed",
            "0.patches": "patch_embed.proj",
            **_blocks("blocks.", norm1="norm1", norm2="norm2", qkv="attn.qkv", out="attn.proj"),
            **_blocks("blocks.", fc1="mlp.fc1", fc2="mlp.fc2"),
            "13.norm": "norm",
            "13.linear": "head",
        },
        "torchvision": {
            "0.class_token": "class_token",
            "0.positions": "encoder.pos_embedding",
            "0.patches": "conv_proj",
            **_blocks(
                "encoder.layers.encoder_layer_",
                norm1="ln_1",
                norm2="ln_2",
                qkv="self_attention.in_proj",
                out="self_attention.out_proj",
                fc1="mlp.0",
                fc2="mlp.3",
            ),
            "13.norm": "encoder.ln",
            "13.linear": "heads.head",
        },
    }
    width: int
    heads: int
    depth, patch = 12, 16

    def __init__(
        self, num_classes: int, image_size: int, *, dropout: float = 0.0, dtype, rngs: nnx.Rngs
    ):
        if image_size % self.patch:
            raise UserError(
                f"a vision transformer with patches of {self.patch} pixels needs an image size "
                f"that is a multiple of it, got {image_size}: set data.image_size"
            )
        settings = {"dtype": dtype, "rngs": rngs}
        stages = [
            Embed(image_size // self.patch, self.patch, self.width, dropout, **settings),
            *(Block(self.width, self.heads, dropout, **settings) for _ in range(self.depth)),
            Head(self.width, num_classes, **settings),
        ]
        self.stages = nnx.List(stages)

    def features(self, images: jax.Array) -> jax.Array:
        """[B, H, W, 3] float32 -> [B, h, w, 2 C] before the last block."""
        tokens = self.run(images, 0, -2)
        token, patches = tokens[:, :1], tokens[:, 1:]
        both = jnp.concatenate([patches, jnp.broadcast_to(token, patches.shape)], axis=-1)
        side = round(patches.shape[1] ** 0.5)
        return both.reshape(both.shape[0], side, side, 2 * self.width)

    def classify(self, features: jax.Array) -> jax.Array:
        """[B, h, w, 2 C] -> logits [B, K] float32."""
        both = features.reshape(features.shape[0], -1, 2 * self.width)
        patches, token = jnp.split(both, 2, axis=-1)
        tokens = jnp.concatenate([token.mean(axis=1, keepdims=True), patches], axis=1)
        return self.run(tokens, -2).astype(jnp.float32)


class VitS16(VisionTransformer):
    """22.1 M parameters with 1,000 classes."""

    width, heads = 384, 6


class VitB16(VisionTransformer):
    """86.6 M parameters with 1,000 classes."""

    width, heads = 768, 12
