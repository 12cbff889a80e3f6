import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from configs import base
from data.augmentation import augment, image_sheet, random_affine, random_colour, resample

KEY = jax.random.key(0)


def config(**changes):
    augmentation = base.get_config().augment
    augmentation.update(changes)
    return augmentation


def photos(batch=8, size=16):
    return np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)


def targets(batch=8, classes=4):
    return jnp.eye(classes)[jnp.arange(batch) % classes]


def test_nothing_on_changes_nothing():
    images, labels = augment(KEY, photos(), targets(), config())
    np.testing.assert_array_equal(images, photos())
    np.testing.assert_array_equal(labels, targets())


def test_flips_are_exact_and_fair():
    many = photos(batch=400, size=4)
    for field, axis in (("flip_horizontal", 2), ("flip_vertical", 1)):
        images, _ = augment(KEY, many, targets(400), config(**{field: True}))
        flipped = np.array(
            [np.array_equal(a, b) for a, b in zip(images, np.flip(many, axis), strict=True)]
        )
        kept = np.array([np.array_equal(a, b) for a, b in zip(images, many, strict=True)])
        assert (flipped ^ kept).all() and 150 < flipped.sum() < 250


@pytest.mark.parametrize(
    ("matrix", "offset", "expected"),
    [
        ([[1, 0], [0, 1]], [0, 0], lambda x: x),
        ([[1, 0], [0, -1]], [0, 0], lambda x: x[:, :, ::-1]),
        ([[0, 1], [-1, 0]], [0, 0], lambda x: np.rot90(x, 1, axes=(1, 2))),
        ([[1, 0], [0, 1]], [0, 1], lambda x: np.concatenate([x[:, :, 1:], x[:, :, -1:]], axis=2)),
        (
            [[1, 0], [0, 1]],
            [0, 0.5],
            lambda x: (x + np.concatenate([x[:, :, 1:], x[:, :, -1:]], 2)) / 2,
        ),
    ],
)
def test_resampling_known_maps(matrix, offset, expected):
    images = photos().astype(np.float32)
    many = lambda value: jnp.tile(jnp.array(value, jnp.float32)[None], (8,) + (1,) * np.ndim(value))  # noqa: E731
    out = resample(images, many(matrix), many(offset), images.shape[1])
    np.testing.assert_allclose(out, expected(images), atol=1e-2)


def test_everything_on_keeps_range_and_constant_images():
    strong = config(
        flip_horizontal=True, rotation=30.0, zoom=0.3, shift=0.2, crop_area=(0.3, 1.0),
        brightness=0.5, contrast=0.5, saturation=0.5,
    )  # fmt: skip
    images, _ = jax.jit(lambda key, x, y: augment(key, x, y, strong))(KEY, photos(), targets())
    assert images.shape == (8, 16, 16, 3) and images.dtype == jnp.float32
    assert images.min() >= 0 and images.max() <= 255 and np.isfinite(images).all()
    assert not np.allclose(images[0], photos()[0])
    grey = np.full((4, 9, 9, 3), 77, np.uint8)
    geometry = config(rotation=30.0, zoom=0.3, shift=0.2, crop_area=(0.3, 1.0))
    np.testing.assert_allclose(augment(KEY, grey, targets(4), geometry)[0], grey, atol=1e-3)


def test_the_same_key_gives_the_same_images():
    strong = config(rotation=10.0, mixup=0.2)
    first, second = (augment(KEY, photos(), targets(), strong)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert not np.allclose(first, augment(jax.random.key(1), photos(), targets(), strong)[0])


def test_affine_draws_lie_in_their_ranges():
    matrix, offset = random_affine(KEY, 2000, 10, 20, config(zoom=0.2, shift=0.1))
    scale = np.sqrt(np.abs(np.linalg.det(matrix)))
    assert 1 / 1.2 - 1e-3 <= scale.min() < 0.85 and 1.2 < scale.max() <= 1 / 0.8 + 1e-3
    assert np.abs(offset[:, 0]).max() <= 1 and 1 < np.abs(offset[:, 1]).max() <= 2
    matrix, _ = random_affine(KEY, 2000, 10, 10, config(rotation=15.0))
    angle = np.degrees(np.arctan2(matrix[:, 1, 0], matrix[:, 0, 0]))
    assert 14 < angle.max() <= 15.001 and -15.001 <= angle.min() < -14


def test_random_resized_crop_stays_inside_with_the_drawn_area():
    matrix, offset = random_affine(KEY, 2000, 100, 100, config(crop_area=(0.25, 0.5)))
    side = np.abs(np.stack([matrix[:, 0, 0], matrix[:, 1, 1]], axis=-1)) * 100
    assert (np.abs(offset) + side / 2 <= 50 + 1e-3).all()
    area = side.prod(axis=1) / 1e4
    assert 0.2499 <= area.min() < 0.27 and 0.48 < area.max() <= 0.5001
    ratio = side[:, 1] / side[:, 0]
    assert ratio.min() >= 0.7499 and ratio.max() <= 1.3334


def test_colour_by_hand():
    images = jnp.asarray(photos(), jnp.float32)
    for name in ("brightness", "contrast", "saturation"):
        out = random_colour(KEY, images, config(**{name: 0.3}))
        keys = jax.random.split(KEY, 3)
        key = keys[("brightness", "contrast", "saturation").index(name)]
        factor = jax.random.uniform(key, (8, 1, 1, 1), minval=0.7, maxval=1.3)
        grey = images @ jnp.array([0.299, 0.587, 0.114])
        anchor = {"brightness": 0.0, "saturation": grey[..., None]}.get(name)
        if name == "contrast":
            anchor = grey.mean((1, 2))[:, None, None, None]
        np.testing.assert_allclose(
            out, np.clip(anchor + factor * (images - anchor), 0, 255), atol=1e-2
        )


def test_mixup_mixes_images_and_targets_alike():
    black_white = np.zeros((2, 8, 8, 3), np.uint8)
    black_white[1] = 255
    images, labels = augment(KEY, black_white, jnp.eye(2), config(mixup=1.0))
    share = labels[0, 0]
    assert 0.01 < share < 0.99
    np.testing.assert_allclose(images[0], np.full((8, 8, 3), 255 * (1 - share)), rtol=1e-4)
    np.testing.assert_allclose(labels.sum(axis=1), 1, rtol=1e-6)


def test_cutmix_targets_follow_the_pasted_area():
    black_white = np.zeros((2, 32, 32, 3), np.uint8)
    black_white[1] = 255
    for seed in range(5):
        images, labels = augment(jax.random.key(seed), black_white, jnp.eye(2), config(cutmix=1.0))
        assert set(np.unique(images)) <= {0.0, 255.0}
        np.testing.assert_allclose((images[0] == 255).mean(), labels[0, 1], atol=1e-6)


def test_image_sheet_shows_every_image():
    images = photos(batch=5, size=16)
    sheet = np.asarray(image_sheet(images, columns=3))
    assert sheet.shape == (2 * 18 * 3, 3 * 18 * 3, 3)  # a frame of one pixel, three times as large
    np.testing.assert_array_equal(sheet[3 : 3 + 48 : 3, 3 + 54 : 3 + 54 + 48 : 3], images[1])


def test_crops_of_larger_images_are_sharp_and_do_not_alias():
    draw, middle = np.random.default_rng(0), jnp.zeros((1, 2))
    large = jnp.asarray(draw.integers(0, 256, (1, 32, 32, 3)), jnp.float32)
    means = large[0].reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))  # as if stored at half the size
    whole = resample(large, jnp.eye(2)[None], middle, 16)[0]  # nothing aliases: the mean of four
    np.testing.assert_allclose(whole, means, atol=1e-3)
    half = 0.5 * jnp.eye(2)[None]  # a crop of half the side, at the resolution of the larger image
    crop, expected = resample(large, half, middle, 16)[0], np.asarray(large[0])
    for axis in (0, 1):
        expected = ndimage.convolve1d(expected, [1 / 8, 6 / 8, 1 / 8], axis=axis)
    np.testing.assert_allclose(crop, expected[8:24, 8:24], atol=1e-2)
    blurred = resample(means[None], half, middle, 16)[0]
    steps = [float(np.abs(np.diff(image, axis=0)).mean()) for image in (crop, blurred)]
    assert steps[0] > 2 * steps[1]
