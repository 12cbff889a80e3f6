"""Attacks: the change of at most epsilon per value that raises a model's loss the most."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from models import Classifier

EPSILONS = (1, 2, 4, 8)  # how far a value may move, in grey levels of 255
PGD_STEPS = 10


def loss_gradient(model: Classifier, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the gradient of each image's cross-entropy by its pixels in 0..255, [B, S, S, 3]."""

    def loss(x: jax.Array) -> jax.Array:
        logits = model(model.preprocess(x))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()

    return jax.grad(loss)(images)


def fgsm(
    gradient: Callable, images: jax.Array, labels: jax.Array, epsilon: float, keys: jax.Array
) -> jax.Array:
    """Moves every value of 0..255 by epsilon up its gradient's sign (Goodfellow et al. 2015)."""
    return jnp.clip(images + epsilon * jnp.sign(gradient(images, labels)), 0, 255)


def pgd(
    gradient: Callable,
    images: jax.Array,
    labels: jax.Array,
    epsilon: float,
    keys: jax.Array,
    steps: int = PGD_STEPS,
) -> jax.Array:
    """Climbs in steps of 2.5 epsilon / steps from a random start in reach (Madry et al. 2018)."""
    low, high = jnp.clip(images - epsilon, 0), jnp.clip(images + epsilon, max=255)
    start = jax.vmap(lambda key: jax.random.uniform(key, images.shape[1:], minval=-1.0))(keys)
    attacked = jnp.clip(images + epsilon * start, low, high)
    for _ in range(steps):
        step = 2.5 * epsilon / steps * jnp.sign(gradient(attacked, labels))
        attacked = jnp.clip(attacked + step, low, high)
    return attacked


ATTACKS = {"FGSM": fgsm, "PGD": pgd}
