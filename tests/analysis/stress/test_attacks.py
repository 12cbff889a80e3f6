import jax.numpy as jnp
import numpy as np
import pytest

from analysis.forward import compiled
from analysis.stress import attacks
from analysis.stress.attacks import EPSILONS, attack, climb, step_up
from models import create_model
from models.classifier import merge_model, split_model

SIDE = 8


def random_model(name, classes, factor=1.0, seed=0):
    """A network of random weights, the logits multiplied by a factor."""
    model, draw = create_model(name, classes, image_size=SIDE), np.random.default_rng(seed)
    _, params, stats = split_model(model)
    params = {path: draw.normal(size=x.shape).astype(np.float32) for path, x in params.items()}
    params = {path: x * factor if x.shape[-1] == classes else x for path, x in params.items()}
    return merge_model(model, params, stats)


@pytest.fixture(scope="module")
def images():
    """Mid-grey, so that no small step is clipped."""
    return np.random.default_rng(1).integers(60, 190, (40, SIDE, SIDE, 3)).astype(np.uint8)


def classes_of(model, images):
    return np.asarray(model(model.preprocess(jnp.asarray(images)))).argmax(axis=1)


@pytest.fixture(scope="module")
def linear(images):
    """A linear model of two classes, its answers, and how far each is from being another.

    A change of at most that many grey levels, to all pixels at once, turns the answer.
    """
    model = random_model("linear", 2, 0.01)
    kernel = next(v for k, v in split_model(model)[1].items() if k.endswith("kernel"))
    per_level = model.preprocessing.scale / np.tile(model.preprocessing.std, SIDE * SIDE)
    norm = np.abs(per_level * (kernel[:, 0] - kernel[:, 1])).sum()
    logits = np.asarray(model(model.preprocess(jnp.asarray(images))))
    return model, logits.argmax(axis=1), np.abs(logits[:, 0] - logits[:, 1]) / norm


def test_both_attacks_find_the_optimum_of_a_linear_model(linear, images):
    model, labels, reach = linear
    found = attack(model, images, labels)
    assert set(found) == {(name, e) for name in ("FGSM", "PGD") for e in EPSILONS}
    for (_, epsilon), right in found.items():
        sure = np.abs(reach - epsilon) > 1e-3
        assert (right == (reach > epsilon))[sure].all()
    assert found["PGD", 1].any() and found["PGD", 4].mean() < 1  # the images tell


def test_what_is_wrong_already_stays_wrong(linear, images):
    model, labels, _ = linear
    wrong = np.arange(40) % 3 == 0
    found = attack(model, images, np.where(wrong, 1 - labels, labels))
    assert not any(right[wrong].any() for right in found.values())
    assert not any(right.any() for right in attack(model, images, 1 - labels).values())


@pytest.mark.parametrize("by_margin", [False, True])
def test_every_step_stays_within_epsilon_and_valid_pixels(linear, images, by_margin):
    model, labels, _ = linear
    extreme = np.where(images > 120, 254.0, 1.0).astype(np.float32)
    ends, _ = climb(compiled(model, step_up), extreme, extreme, labels, 4, 10, by_margin)
    assert ends.shape == extreme.shape and ends.min() == 0 and ends.max() == 255
    assert np.abs(ends - extreme).max() == 4


def test_an_image_that_falls_on_the_way_has_fallen(linear, images):
    model, labels, reach = linear
    origin, far = images.astype(np.float32), np.flatnonzero(reach > 2)
    step = compiled(model, step_up)
    fallen, _ = climb(
        step, origin[far], origin[far], 1 - labels[far], 1, 1
    )  # deeper into its class
    _, held = climb(step, fallen, origin[far], labels[far], 1, 0)
    assert held.all()
    assert not climb(step, origin[far], origin[far], 1 - labels[far], 8, 3)[1].any()


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_a_saturated_softmax_does_not_hide_from_the_margin(name, images):
    plain, masked = (random_model(name, 4, factor) for factor in (0.01, 10.0))
    labels = classes_of(plain, images)
    assert (classes_of(masked, images) == labels).all()
    found, hidden = attack(plain, images, labels), attack(masked, images, labels)
    for epsilon in EPSILONS:
        assert abs(found["PGD", epsilon].sum() - hidden["PGD", epsilon].sum()) <= 1
    # Cross-entropy alone finds less: where the softmax saturates, its gradient is 0.
    assert sum(hidden["FGSM", e].sum() - found["FGSM", e].sum() for e in EPSILONS) > 3


def test_pgd_is_never_above_fgsm_nor_rises_with_epsilon(images):
    model = random_model("mlp", 5, seed=3)
    found = attack(model, images, classes_of(model, images))
    for smaller, larger in zip(EPSILONS, EPSILONS[1:], strict=False):
        assert (found["PGD", larger] <= found["PGD", smaller]).all()
    assert all((found["PGD", e] <= found["FGSM", e]).all() for e in EPSILONS)
    assert found["PGD", 1].sum() > found["PGD", 8].sum()


def test_what_withstands_a_larger_epsilon_would_withstand_the_smaller(images, monkeypatch):
    model = random_model("mlp", 5, seed=3)
    labels = classes_of(model, images)
    together = attack(model, images, labels)
    for epsilon in EPSILONS:
        monkeypatch.setattr(attacks, "EPSILONS", (epsilon,))
        alone = attack(model, images, labels)["PGD", epsilon]
        assert abs(alone.sum() - together["PGD", epsilon].sum()) <= 1


def test_an_attack_does_not_depend_on_the_images_beside(images):
    model = random_model("mlp", 5, seed=3)
    labels = classes_of(model, images)
    found, some = attack(model, images, labels), np.array([33, 2, 17])
    alone = attack(model, images[some], labels[some])
    assert all((alone[key] == found[key][some]).all() for key in found)
