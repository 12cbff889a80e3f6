"""Attacks: can a change of at most epsilon per value make a model err?"""

import itertools
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from analysis.forward import compiled, in_batches
from models import Classifier

EPSILONS = (1, 2, 4, 8)  # how far a value may move, in grey levels of 255
STEPS = 10
RESTARTS = 2  # from FGSM's point, and from a random one
BATCH = 32  # images; a gradient of a large network takes far more memory than its prediction
ATTACKS = ("FGSM", "PGD")

Outcomes = dict[tuple[str, int], np.ndarray]  # right or wrong by attack and epsilon: bool [N]


def step_up(
    model: Classifier,
    images: jax.Array,
    origin: jax.Array,
    labels: jax.Array,
    epsilon: float,
    length: float,
    by_margin: bool,
) -> tuple[jax.Array, jax.Array]:
    """Moves each value of images [B, S, S, 3] in 0..255 by `length` up the sign of its gradient.

    The loss is cross-entropy, or `by_margin` the lead of the best wrong logit over the right one:
    its gradient does not vanish where the softmax saturates (Carlini and Wagner 2017).

    Returns:
      The images within epsilon of their origin, and whether they were classified rightly before.
    """

    def loss(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model(model.preprocess(x))
        right = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
        wrong = jnp.max(logits, axis=-1, where=~right, initial=-jnp.inf)
        margin = wrong - jnp.sum(logits, axis=-1, where=right)
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.where(by_margin, margin, entropy).sum(), logits.argmax(axis=-1) == labels

    gradient, right = jax.grad(loss, has_aux=True)(images)
    low, high = jnp.maximum(origin - epsilon, 0), jnp.minimum(origin + epsilon, 255)
    return jnp.clip(images + length * jnp.sign(gradient), low, high), right


def climb(
    step: Callable,
    start: np.ndarray,
    origin: np.ndarray,
    labels: np.ndarray,
    epsilon: float,
    steps: int,
    by_margin: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Takes steps of 2.5 epsilon in all, or of epsilon if it is one, from float32 [n, S, S, 3].

    Returns:
      The last images, and which of them were classified rightly at every step: bool [n].
    """
    epsilon, count = float(epsilon), len(labels)
    length = epsilon if steps == 1 else 2.5 * epsilon / max(steps, 1)
    if not count:
        return start, np.zeros(0, bool)

    def follow(images: jax.Array, origin: jax.Array, labels: jax.Array) -> tuple:
        held = True
        for _ in range(steps):
            images, right = step(images, origin, labels, epsilon, length, by_margin)
            held &= right
        return images, held & step(images, origin, labels, epsilon, 0.0, by_margin)[1]

    filled = np.minimum(np.arange(-(-count // BATCH) * BATCH), count - 1)  # one shape, one program
    images, held = in_batches(follow, start[filled], origin[filled], labels[filled], size=BATCH)
    return images[:count], held[:count]


def attack(model: Classifier, images: np.ndarray, labels: np.ndarray) -> Outcomes:
    """Returns which of the images uint8 [N, S, S, 3] stay right under each attack and epsilon.

    FGSM is one step of cross-entropy (Goodfellow et al. 2015). PGD (Madry et al. 2018) counts an
    image as right if it withstands FGSM and every step of both losses from every start, or if it
    does so at a larger epsilon: then smaller ones are not tried. What is wrong already is not
    attacked.
    """
    step, origin, every = (
        compiled(model, step_up),
        images.astype(np.float32),
        np.arange(len(labels)),
    )
    _, clean = climb(step, origin, origin, labels, 0, steps=0)
    right, points, outcomes = every[clean], {}, {}
    for epsilon in EPSILONS:
        points[epsilon] = origin.copy()
        ends, held = climb(step, origin[right], origin[right], labels[right], epsilon, steps=1)
        points[epsilon][right] = ends
        outcomes["FGSM", epsilon] = np.isin(every, right[held])
    robust = np.zeros(0, int)  # at the epsilon above
    for epsilon in reversed(EPSILONS):
        within = [outcomes["FGSM", smaller] for smaller in EPSILONS if smaller <= epsilon]
        standing = np.setdiff1d(every[np.all(within, axis=0)], robust)
        starts = [
            points[epsilon],
            *(_random_starts(origin, epsilon, i) for i in range(1, RESTARTS)),
        ]
        for start, by_margin in itertools.product(starts, (True, False)):
            there = start[standing], origin[standing], labels[standing]
            _, held = climb(step, *there, epsilon, STEPS, by_margin)
            standing = standing[held]
        robust = np.union1d(robust, standing)
        outcomes["PGD", epsilon] = np.isin(every, robust)
    return outcomes


def _random_starts(images: np.ndarray, epsilon: int, restart: int) -> np.ndarray:
    starts = np.empty_like(images)
    for start, image in zip(starts, images, strict=True):
        draw = np.random.default_rng([restart, epsilon, zlib.crc32(image.tobytes())])
        start[:] = np.clip(image + draw.uniform(-epsilon, epsilon, image.shape), 0, 255)
    return starts
