import numpy as np
import pytest

from analysis.explain import packages
from analysis.explain.methods import METHODS, explainer
from analysis.forward import load_classifier
from errors import UserError
from models import create_model
from tests.analysis.conftest import SIZE, corner_images

NAMES = [name for name, method in METHODS.items() if method.package]


@pytest.mark.parametrize("size", [1, 3, 8, 16, 31])
def test_tiny_images_are_cut_into_a_grid(size):
    pytest.importorskip("skimage")
    parts = packages.segments(np.zeros((size, size, 3)))
    side = min(size, 8)
    assert sorted(set(parts.ravel().tolist())) == list(range(side**2))


@pytest.mark.parametrize("size", [32, 150])
def test_photos_are_cut_into_superpixels(size):
    pytest.importorskip("skimage")
    draw = np.random.default_rng(0)
    image = np.kron(draw.integers(0, 256, (8, 8, 3)), np.ones((20, 20, 1)))[:size, :size]
    parts = packages.segments(image)
    assert 16 <= parts.max() < 128 and sorted(set(parts.ravel())) == list(range(parts.max() + 1))


@pytest.mark.parametrize("name", NAMES)
def test_maps_lie_on_the_corner_and_are_the_same_again(corner_run, name):
    pytest.importorskip(name)
    model, (images, targets) = load_classifier(corner_run), corner_images(3, seed=1)
    explain = explainer(model, SIZE, name)
    maps = explain(images, targets)
    assert maps.shape == images.shape[:3] and maps.dtype == np.float32 and maps.min() >= 0
    share = maps[:, : SIZE // 2, : SIZE // 2].sum(axis=(1, 2)) / maps.sum(axis=(1, 2))
    assert share.min() > 0.5  # of a quarter of the image
    np.random.seed(5)  # neither what was drawn before nor the other images matter
    np.testing.assert_array_equal(explain(images[1:2], targets[1:2])[0], maps[1])


@pytest.mark.parametrize("name", NAMES)
def test_neighbours_are_explained(name):
    pytest.importorskip(name)
    images, labels = np.full((2, 8, 8, 3), 100, np.uint8), np.array([0, 1])
    images[1, 1, 1] = 255  # one spot tells the class; blurred, it is nearer to none
    knn = create_model("knn", 2, image_size=8, max_k=1)
    knn.fit((images, labels), (images, labels), batch_size=2)
    explain = explainer(knn, 8, name)
    heat = explain(images[1:], labels[1:])[0]
    assert heat[1, 1] == heat.max() > 0.5 * heat.sum()
    flat = np.full((1, 8, 8, 3), 100, np.uint8)
    assert not explain(flat, [0]).any()  # nothing that is hidden changes anything


def test_shares_of_a_linear_model_are_its_terms(monkeypatch):
    """Owen values of a linear model are weight x (pixel - blurred pixel), if all are resolved."""
    pytest.importorskip("shap")
    monkeypatch.setattr(packages, "EVALUATIONS", 4096)  # enough for every pixel of 16
    draw = np.random.default_rng(0)
    image, kernel = draw.integers(0, 256, (4, 4, 3)), draw.normal(size=(4, 4, 3))
    predict = lambda images: np.tensordot(images, kernel, 3)[:, None]  # noqa: E731
    terms = kernel * (image - packages.blurred(image[None])[0])
    found = packages.shap_map(predict, image.astype(np.uint8), 0)
    np.testing.assert_allclose(found, np.maximum(terms.sum(axis=-1), 0), rtol=1e-4, atol=1e-3)


def test_numpys_own_generator_is_left_as_it_was():
    pytest.importorskip("shap")
    np.random.seed(3)
    expected = np.random.random()
    np.random.seed(3)
    packages.shap_map(lambda images: images.mean((1, 2)), np.eye(4)[..., None].repeat(3, -1), 0)
    assert np.random.random() == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_is_named_with_its_command(monkeypatch, name):
    monkeypatch.setattr(packages, "find_spec", lambda package: None)
    message = rf"needs the package '{name}': pip install -c constraints.txt -e '\.\[explain\]'"
    with pytest.raises(UserError, match=message):
        explainer(create_model("linear", 3, image_size=8), 8, name)
