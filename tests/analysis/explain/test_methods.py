import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from analysis.explain import methods
from analysis.explain.methods import METHODS
from analysis.forward import load_classifier
from errors import UserError
from models import MODELS, create_model
from models.vit import VisionTransformer
from tests.analysis.conftest import SIZE, corner_images
from tests.models.filled import filled


def explain(model, images, targets, method="gradcam", **options) -> np.ndarray:
    return methods.explainer(model, images.shape[1], method, **options)(images, targets)


@pytest.fixture(scope="module")
def cnn(corner_run):
    """The trained network: two blocks, then flatten, dense 128, ReLU, dense 3."""
    return load_classifier(corner_run)


@pytest.fixture(scope="module")
def images():
    return corner_images(6, seed=1)


@pytest.fixture(scope="module")
def maps(cnn, images):
    """The maps of activations and of occlusion, with all images in one batch."""
    names = [n for n, method in METHODS.items() if method.kind != "pixels" and not method.package]
    return {name: explain(cnn, *images, method=name, batch=10**4) for name in names}


def head_gradient(cnn, x: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Central differences in float64 of the head written out: [B, h, w, C] -> the same shape."""
    layers = [cnn.stages[2].layers[i] for i in (1, 4)]
    (w1, b1), (w2, b2) = (
        [np.asarray(value[...], np.float64) for value in (layer.kernel, layer.bias)]
        for layer in layers
    )
    gradient, step = np.zeros((len(x), x[0].size)), 1e-6
    for row, (one, target) in enumerate(zip(x, targets, strict=True)):
        moved = one.reshape(-1) + step * np.concatenate([np.eye(one.size), -np.eye(one.size)])
        logits = (np.maximum(moved @ w1 + b1, 0) @ w2 + b2)[:, target]
        gradient[row] = (logits[: one.size] - logits[one.size :]) / (2 * step)
    return gradient.reshape(x.shape)


def enlarged(maps: np.ndarray, size: int) -> np.ndarray:
    """Bilinear enlargement by another library."""
    side = (size, size)
    return np.stack(
        [Image.fromarray(m.astype(np.float32)).resize(side, Image.BILINEAR) for m in maps]
    )


def test_activation_maps_against_finite_differences(cnn, images, maps):
    pixels, targets = images
    x = np.asarray(cnn.features(cnn.preprocess(jnp.asarray(pixels))), np.float64)  # [6, 4, 4, 64]
    gradient = head_gradient(cnn, x, targets)
    weights = {"gradcam": np.zeros((6, 64)), "gradcam++": np.zeros((6, 64))}
    for b, c in np.ndindex(6, 64):
        g, total = gradient[b, :, :, c], x[b, :, :, c].sum()
        weights["gradcam"][b, c] = g.sum() / 16
        for i, j in zip(*np.nonzero(g), strict=True):
            alpha = g[i, j] ** 2 / (2 * g[i, j] ** 2 + total * g[i, j] ** 3)
            weights["gradcam++"][b, c] += alpha * max(g[i, j], 0)
    expected = {name: np.einsum("bijc,bc->bij", x, w) for name, w in weights.items()}
    expected["hirescam"] = (x * gradient).sum(axis=-1)
    for name, cam in expected.items():
        reference = enlarged(np.maximum(cam, 0), SIZE)
        error = np.abs(maps[name] - reference).max() / reference.max()
        assert error < 1e-3, name


def test_gradients_of_a_linear_model_are_its_weights():
    model, draw = create_model("linear", 3, image_size=8), np.random.default_rng(0)
    kernel = draw.normal(size=(192, 3)).astype(np.float32)
    model.stages[0].layers[1].kernel.set_value(jnp.asarray(kernel))
    pixels = draw.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    targets = np.array([2, 0])
    slope = kernel.T[targets].reshape(2, 8, 8, 3) / 255 / 0.25
    for method in ("gradient", "smoothgrad"):
        expected = np.abs(slope).sum(axis=-1)
        np.testing.assert_allclose(explain(model, pixels, targets, method), expected, rtol=1e-4)
    expected = np.abs(slope * pixels).sum(axis=-1)
    maps = explain(model, pixels, targets, "integrated")
    np.testing.assert_allclose(maps, expected, rtol=1e-4)
    cam = np.maximum(
        (slope.mean(axis=(1, 2), keepdims=True) * 63.75 * (pixels / 63.75 - 2)).sum(-1), 0
    )
    np.testing.assert_allclose(explain(model, pixels, targets), cam, rtol=1e-3, atol=1e-3)


def test_integrated_gradients_are_complete(cnn, images):
    pixels, targets = (jnp.asarray(array) for array in images)
    pixels = pixels.astype(jnp.float32)
    shares = jax.jit(lambda x: methods.integrated_gradients(cnn, x, targets, 128))(pixels)
    ends = [np.asarray(cnn(cnn.preprocess(x))) for x in (pixels, 0 * pixels)]
    difference = (ends[0] - ends[1])[np.arange(6), images[1]]
    found = np.asarray(shares).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(found, difference, atol=0.01 * np.abs(difference).max())


def test_occlusion_against_a_loop_over_windows(cnn, images, maps):
    pixels, target, side = images[0][0], images[1][0], SIZE // 4
    starts = [(top, left) for top in range(0, 13, 2) for left in range(0, 13, 2)]
    places = [np.s_[top : top + side, left : left + side] for top, left in starts]
    covered = np.repeat(pixels[None].astype(np.float32), len(places) + 1, axis=0)
    for image, place in zip(covered, places, strict=False):
        image[place] = pixels.mean(axis=(0, 1))
    *logits, whole = np.asarray(cnn(cnn.preprocess(jnp.asarray(covered))))[:, target]
    total, count = np.zeros((2, SIZE, SIZE))
    for place, logit in zip(places, logits, strict=True):
        total[place] += whole - logit
        count[place] += 1
    expected = np.maximum(total / count, 0)
    np.testing.assert_allclose(maps["occlusion"][0], expected, atol=1e-4 * expected.max())


def test_maps_lie_on_the_corner_that_tells_the_class(maps):
    assert len(maps) == 4
    for method, heat in maps.items():
        share = heat[:, : SIZE // 2, : SIZE // 2].sum(axis=(1, 2)) / heat.sum(axis=(1, 2))
        assert share.min() > 0.5, (method, share)  # of a quarter of the image


@pytest.mark.parametrize("method", ["gradcam", "occlusion"])
def test_a_map_does_not_depend_on_the_batch(cnn, images, maps, method):
    assert maps[method].dtype == np.float32 and maps[method].min() >= 0
    few = explain(cnn, *images, method=method, batch=4 * METHODS[method].copies)  # 4 and 2
    np.testing.assert_allclose(few, maps[method], rtol=1e-4, atol=1e-5 * maps[method].max())


def test_smooth_gradients_do_not_depend_on_the_batch():
    model, (pixels, targets) = filled("mlp", 3, SIZE), corner_images(3, seed=2)
    first, same = (explain(model, pixels, targets, "smoothgrad", batch=batch) for batch in (32, 64))
    np.testing.assert_allclose(first, same, rtol=1e-4, atol=1e-6 * same.max())
    assert not np.allclose(first, explain(model, pixels, targets, "gradient"), rtol=1e-2)


@pytest.mark.parametrize(
    ("name", "size", "stage", "side"),
    [
        ("linear", 8, 0, 8),
        ("cnn", 16, 2, 4),
        ("cnn", 8, 1, 4),
        ("resnet18", 64, 4, 4),
        ("resnet18", 32, 3, 4),
    ],
)
def test_the_default_stage_is_the_last_with_a_map(name, size, stage, side):
    model = filled(name, 3, size, shallow=True)
    assert methods.default_stage(model, size) == stage
    assert methods.map_side(model, size, stage) == side


class SmallVit(VisionTransformer):
    width, heads, depth, patch = 32, 2, 2, 4


def test_a_vision_transformer_is_explained_by_its_patches(monkeypatch):
    monkeypatch.setitem(MODELS, "small_vit", SmallVit)
    model = filled("small_vit", 3, 16)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)

    @jax.jit
    def reference(images):
        tokens = model.run(model.preprocess(images), 0, -2)
        slope = jax.grad(lambda t: model.run(t, -2)[:, 1].sum())(tokens)[:, 1:]
        return jax.nn.relu((tokens[:, 1:] * slope.mean(axis=1, keepdims=True)).sum(axis=-1))

    assert methods.default_stage(model, 16) == 3
    found = explain(model, pixels, np.array([1, 1]))
    expected = enlarged(np.asarray(reference(pixels)).reshape(2, 4, 4), 16)
    assert expected.max(axis=(1, 2)).min() > 0
    np.testing.assert_allclose(found, expected, atol=1e-3 * expected.max())
    with pytest.raises(UserError, match="stage 2 of this SmallVit is given no map.*one of 0, 3"):
        explain(model, pixels, np.array([1, 1]), stage=2)
    assert methods.default_stage(filled("small_vit", 3, 8), 8) == 0  # 2x2 patches


def test_what_cannot_be_explained_is_refused(cnn, images):
    with pytest.raises(UserError, match="'gradcamm' is not known.*Did you mean 'gradcam'"):
        explain(cnn, *images, method="gradcamm")
    with pytest.raises(UserError, match="looks at pixels, not at a stage"):
        explain(cnn, *images, method="occlusion", stage=1)
    with pytest.raises(UserError, match="Knn has no layers.*use method=occlusion"):
        explain(create_model("knn", 3, image_size=SIZE), *images)


def test_neighbours_are_explained_by_occlusion():
    pixels, labels = np.full((2, 8, 8, 3), 100, np.uint8), np.array([0, 1])
    pixels[0, :2, :2], pixels[1, :2, :2] = 0, 255  # images differ in a corner alone
    knn = create_model("knn", 2, image_size=8, max_k=1)
    knn.fit((pixels, labels), (pixels, labels), batch_size=2)
    heat = explain(knn, pixels[1:], labels[1:], method="occlusion")[0]
    assert heat[0, 0] == heat.max() > 0 and not heat[3:, 3:].any()


@pytest.mark.parity
def test_grad_cam_equals_pytorchs(tmp_path):
    torch = pytest.importorskip("torch")
    from models.classifier import in_mode
    from tests.models.synthetic import random_weights, write_weights
    from tests.models.test_parity import need

    need("torchvision")
    from torchvision import models

    network = models.resnet18(num_classes=10).eval()
    shapes = {name: tuple(array.shape) for name, array in network.state_dict().items()}
    path = tmp_path / "weights.pth"
    write_weights(path, random_weights(shapes, "torchvision"), "torchvision")
    network.load_state_dict(torch.load(path, weights_only=True))
    model = create_model("resnet18", 10, weights=f"torchvision:{path}", image_size=64)
    model = in_mode(model, training=False)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    inputs = np.array(model.preprocess(jnp.asarray(pixels))).transpose(0, 3, 1, 2)
    for place, stage in (("layer3", 4), ("layer2", 3)):
        kept = []
        hook = network.get_submodule(place).register_forward_hook(
            lambda m, i, o, k=kept: k.append(o)
        )
        logits = network(torch.from_numpy(inputs))
        hook.remove()
        targets = logits.argmax(dim=1).numpy()
        (slope,) = torch.autograd.grad(logits[[0, 1], targets].sum(), kept)
        cam = torch.relu((kept[0] * slope.mean(dim=(2, 3), keepdim=True)).sum(dim=1, keepdim=True))
        cam = torch.nn.functional.interpolate(cam, size=(64, 64), mode="bilinear")[:, 0]
        expected = cam.detach().numpy()
        found = explain(model, pixels, targets, stage=stage)
        assert expected.max(axis=(1, 2)).min() > 0
        assert np.abs(found - expected).max() / expected.max() < 1e-3, place
