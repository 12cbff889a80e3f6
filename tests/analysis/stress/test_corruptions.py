import colorsys

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from scipy.stats import poisson

from analysis.stress.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    blur,
    corrupt,
    disc,
    length_scale,
    streak,
)
from errors import UserError

SIDE = 32
SEED = 7


def photos(count=6, side=SIDE):
    """Smooth images with edges, of muted colours (HSV saturation below 0.4), uint8."""
    draw = np.random.default_rng(3)
    grey = ndimage.gaussian_filter(draw.normal(size=(count, side, side)), (0, 2, 2))
    grey = 120 + 45 * grey / grey.std() + 40 * (np.arange(side) // 11 % 2)
    tint = ndimage.gaussian_filter(draw.normal(size=(count, side, side, 3)), (0, 3, 3, 0))
    return np.clip(grey[..., None] + 12 * tint / tint.std(), 50, 230).round().astype(np.uint8)


def corrupt_all(images, name, severity, seed):
    """Equal images get draws of their own."""
    return np.stack([corrupt(image, name, severity, seed + i) for i, image in enumerate(images)])


@pytest.fixture(scope="module")
def images():
    return photos()


@pytest.fixture(scope="module")
def corrupted(images):
    return {
        (name, severity): corrupt_all(images, name, severity, SEED)
        for name in CORRUPTIONS
        for severity in SEVERITIES
    }


def constant(name, severity):
    return CORRUPTIONS[name][1][severity - 1]


def test_there_are_thirteen_at_five_severities():
    assert len(CORRUPTIONS) == 13
    assert all(len(constants) == 5 for _, constants in CORRUPTIONS.values())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_harm_grows_with_severity(name, images, corrupted):
    harm = [np.mean((corrupted[name, s] - images.astype(float)) ** 2) for s in SEVERITIES]
    assert harm[0] > 1
    assert (np.diff(harm) > 0).all(), harm


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_shape_and_type_stay(name, images, corrupted):
    for severity in SEVERITIES:
        result = corrupted[name, severity]
        assert result.shape == images.shape and result.dtype == np.uint8


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (1, 3)])
def test_a_photo_need_not_be_square(name, shape):
    photo = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for severity in SEVERITIES:
        changed = corrupt(photo, name, severity)
        assert changed.shape == photo.shape and changed.dtype == np.uint8


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "impulse_noise", "occlusion"])
def test_draws_follow_the_seed_and_the_pixels(name, images, corrupted):
    grey = np.full((SIDE, SIDE, 3), 100, np.uint8)
    other = grey.copy()
    other[0, 0] = 101
    first, second = corrupt(grey, name, 3, SEED), corrupt(other, name, 3, SEED)
    assert (first[1:] != second[1:]).any()
    assert (corrupt(grey.copy(), name, 3, SEED) == first).all()
    assert (corrupt_all(images, name, 3, SEED + 1) != corrupted[name, 3]).any()


def test_unknown_names_and_severities_are_refused(images):
    with pytest.raises(UserError, match="'pixellate' is not known.*Did you mean 'pixelate'"):
        corrupt_all(images, "pixellate", 1, SEED)
    with pytest.raises(UserError, match="severity of jpeg: 6"):
        corrupt_all(images, "jpeg", 6, SEED)


def test_gaussian_noise_has_the_stated_deviation():
    grey = np.full((6, SIDE, SIDE, 3), 128, np.uint8)
    for severity in (1, 2):  # beyond, values are cut at 0 and 255
        noise = corrupt_all(grey, "gaussian_noise", severity, SEED) - 128.0
        assert noise.std() == pytest.approx(255 * constant("gaussian_noise", severity), rel=0.02)
        assert abs(noise.mean()) < 0.5


def test_shot_noise_counts_poisson_photons():
    for severity in (1, 5):
        photons = constant("shot_noise", severity)
        grey = np.full((6, SIDE, SIDE, 3), 85, np.uint8)
        counts = corrupt_all(grey, "shot_noise", severity, SEED) / 255 * photons
        share = [np.mean(counts < k + 0.5) for k in range(int(photons))]
        expected = poisson.cdf(np.arange(int(photons)), photons / 3)
        np.testing.assert_allclose(share, expected, atol=0.012)


def test_impulse_noise_sets_the_stated_share():
    grey = np.full((6, SIDE, SIDE, 3), 128, np.uint8)
    noisy = corrupt_all(grey, "impulse_noise", 4, SEED)
    assert set(np.unique(noisy)) == {0, 128, 255}
    assert (noisy == 0).mean() == pytest.approx(0.085, abs=0.01)
    assert (noisy == 255).mean() == pytest.approx(0.085, abs=0.01)


def test_kernels_sum_to_one_and_lie_where_they_should():
    assert np.count_nonzero(disc(3.0)) == 37  # pixels nearer than 3.5
    assert disc(3.0).sum() == pytest.approx(1) and disc(2.5).shape == (7, 7)
    trail = np.exp(-(np.arange(7) ** 2) / 8)
    np.testing.assert_allclose(streak(0.0, 6.0, 2.0)[6, 6:], trail / trail.sum())
    reach = np.arange(-6, 7)
    for angle in (0.0, np.pi / 6, -np.pi / 4):  # the centre of mass is on the ray
        kernel = streak(angle, 6.0, 2.0)
        assert kernel.sum() == pytest.approx(1)
        y, x = (kernel * reach[:, None]).sum(), (kernel * reach).sum()
        assert np.arctan2(y, x) == pytest.approx(angle, abs=1e-9)


def test_blur_is_a_convolution_that_mirrors(images):
    for image, angle in zip(images, np.linspace(-0.7, 0.7, len(images)), strict=True):
        kernel = streak(angle, 5.0, 3.0)
        expected = ndimage.convolve(image.astype(float), kernel[..., None], mode="mirror")
        np.testing.assert_allclose(blur(image, kernel), expected, atol=1e-6)


def test_lengths_shrink_with_the_image_to_a_quarter():
    scales = [length_scale(np.zeros((side, 500, 3))) for side in (448, 224, 112, 32)]
    assert scales == [2, 1, 0.5, 0.25]


@pytest.mark.parametrize("severity", SEVERITIES)
def test_brightness_and_saturation_equal_colorsys(severity, images, corrupted):
    def through_hsv(image, change):
        hsv = [change(*colorsys.rgb_to_hsv(*pixel)) for pixel in image.reshape(-1, 3) / 255]
        return 255 * np.array([colorsys.hsv_to_rgb(*pixel) for pixel in hsv]).reshape(image.shape)

    added = constant("brightness", severity)
    expected = through_hsv(images[0], lambda h, s, v: (h, s, min(v + added, 1)))
    assert np.abs(corrupted["brightness", severity][0] - expected).max() < 0.51
    factor, added = constant("saturation", severity)
    expected = through_hsv(images[0], lambda h, s, v: (h, np.clip(s * factor + added, 0, 1), v))
    assert np.abs(corrupted["saturation", severity][0] - expected).max() < 0.51


def test_grey_and_black_pixels_keep_the_rules_of_hsv():
    grey = np.stack([np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 200, np.uint8)])
    brighter = corrupt_all(grey, "brightness", 2, SEED)
    assert (brighter[0] == 51).all() and (brighter[1] == 251).all()
    redder = corrupt_all(grey, "saturation", 5, SEED)
    assert (redder[0] == 0).all() and (redder[1] == [200, 160, 160]).all()


def test_contrast_shrinks_the_distance_from_the_mean(images, corrupted):
    means = images.mean(axis=(1, 2), keepdims=True)
    expected = means + 0.2 * (images - means)
    assert np.abs(corrupted["contrast", 3] - expected).max() < 0.51


@pytest.mark.parametrize("side", [SIDE, 28, 13])
def test_jpeg_is_that_of_the_stated_quality(side, monkeypatch):
    images, saved = photos(6, side), []
    save = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", lambda *a, **k: (save(*a, **k), saved.append(a[1])))
    for severity in SEVERITIES:
        corrupted = corrupt_all(images, "jpeg", severity, SEED)
        quality = constant("jpeg", severity)
        for image, file in zip(corrupted, saved[-len(images) :], strict=True):
            compressed = Image.open(file)
            assert (np.asarray(compressed) == image).all()
            factor = 5000 // quality  # of the tables in the standard's annex K, in percent
            assert compressed.quantization[0][:3] == [
                (step * factor + 50) // 100 for step in (16, 11, 10)
            ]
            assert [layer[1:3] for layer in compressed.layer] == [(2, 2), (1, 1), (1, 1)]  # 4:2:0


def test_pixelate_makes_blocks_their_mean(images, corrupted):
    for severity, width in ((2, 2), (5, 4)):
        blocks = images.reshape(6, SIDE // width, width, SIDE // width, width, 3)
        means = np.broadcast_to(blocks.mean(axis=(2, 4), keepdims=True), blocks.shape)
        ours = corrupted["pixelate", severity]
        assert np.abs(ours - means.reshape(images.shape)).max() <= 1  # Pillow rounds between axes
    third = np.unique(corrupted["pixelate", 4][0].reshape(-1, 3), axis=0)
    assert len(third) <= int(SIDE * 0.3) ** 2


def test_rotation_and_scale_sample_where_they_should(images, corrupted):
    centre = (SIDE - 1) / 2
    grid = np.stack(np.mgrid[:SIDE, :SIDE]) - centre
    angle = np.deg2rad(constant("rotation", 5))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    factor = constant("scale", 5)
    for name, options in {
        "rotation": (turn, turn.T),
        "scale": (factor * np.eye(2), np.eye(2) / factor),
    }.items():
        chosen = set()
        for image, ours in zip(images, corrupted[name, 5], strict=True):
            errors = []
            for matrix in options:
                places = np.einsum("ij,jyx->iyx", matrix, grid) + centre
                theirs = [
                    ndimage.map_coordinates(
                        image[..., c].astype(float), places, order=1, mode="reflect"
                    )
                    for c in range(3)
                ]
                errors.append(np.abs(ours - np.stack(theirs, -1)).max())
            chosen.add(int(np.argmin(errors)))
            assert min(errors) < 0.51
        assert chosen == {0, 1}  # both directions are drawn


def test_occlusion_covers_the_stated_area():
    white = np.full((6, SIDE, SIDE, 3), 255, np.uint8)
    for severity in SEVERITIES:
        covered = (corrupt_all(white, "occlusion", severity, SEED) == 128).all(axis=-1)
        side = np.sqrt(covered.sum(axis=(1, 2)))
        expected = SIDE * np.sqrt(constant("occlusion", severity))
        assert (np.abs(side - expected) <= 1).all()
        assert len(np.unique(covered.reshape(6, -1), axis=0)) > 1  # anywhere
