import colorsys
import io

import jax
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from scipy.stats import poisson

from analysis.stress import corruptions
from analysis.stress.corruptions import CORRUPTIONS, SEVERITIES, corrupt, disc, length_scale, streak
from errors import UserError

SIDE = 32
KEY = jax.random.key(7)


def photos(count=6, side=SIDE):
    """Smooth images with edges, of muted colours (HSV saturation below 0.4), uint8."""
    draw = np.random.default_rng(3)
    grey = ndimage.gaussian_filter(draw.normal(size=(count, side, side)), (0, 2, 2))
    grey = 120 + 45 * grey / grey.std() + 40 * (np.arange(side) // 11 % 2)
    tint = ndimage.gaussian_filter(draw.normal(size=(count, side, side, 3)), (0, 3, 3, 0))
    return np.clip(grey[..., None] + 12 * tint / tint.std(), 50, 230).round().astype(np.uint8)


@pytest.fixture(scope="module")
def images():
    return photos()


@pytest.fixture(scope="module")
def corrupted(images):
    return {
        (name, severity): np.asarray(corrupt(images, name, severity, KEY))
        for name in CORRUPTIONS
        for severity in SEVERITIES
    }


def constant(name, severity):
    return CORRUPTIONS[name].constants[severity - 1]


def test_there_are_thirteen_at_five_severities():
    assert len(CORRUPTIONS) == 13
    assert all(len(corruption.constants) == 5 for corruption in CORRUPTIONS.values())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_harm_grows_with_severity(name, images, corrupted):
    harm = [np.mean((corrupted[name, s] - images.astype(float)) ** 2) for s in SEVERITIES]
    assert harm[0] > 1
    assert (np.diff(harm) > 0).all(), harm


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_whole_grey_levels_in_range(name, images, corrupted):
    for severity in SEVERITIES:
        result = corrupted[name, severity]
        assert result.shape == images.shape and result.dtype == np.float32
        assert result.min() >= 0 and result.max() <= 255
        assert (result == result.round()).all()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_gets_the_same_wherever_it_is(name, images, corrupted):
    order = np.array([3, 1, 5, 0, 2, 4])
    shuffled = np.asarray(corrupt(images[order], name, 3, KEY, order))
    assert (shuffled == corrupted[name, 3][order]).all()


@pytest.mark.parametrize("name", ["gaussian_noise", "motion_blur", "jpeg", "rotation"])
def test_an_image_gets_the_same_whatever_the_size_of_its_batch(name, images, corrupted):
    alone = np.asarray(corrupt(images[4:5].astype(np.float32), name, 3, KEY, np.array([4])))
    together = corrupted[name, 3][4:5]
    # Programs of two sizes may add in another order, which moves a value that is nearly a tie.
    assert np.abs(alone - together).max() <= 1 and (alone != together).mean() < 1e-3


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "impulse_noise", "occlusion"])
def test_draws_follow_the_key_and_differ_between_images(name, images, corrupted):
    grey = np.full((6, SIDE, SIDE, 3), 100, np.uint8)
    first, second = np.asarray(corrupt(grey, name, 3, KEY))[:2]
    assert (first != second).any()
    again = np.asarray(corrupt(images, name, 3, KEY))
    other = np.asarray(corrupt(images, name, 3, jax.random.key(8)))
    assert (again == corrupted[name, 3]).all() and (other != again).any()


def test_unknown_names_and_severities_are_refused(images):
    with pytest.raises(UserError, match="'pixellate' is not known.*Did you mean 'pixelate'"):
        corrupt(images, "pixellate", 1, KEY)
    with pytest.raises(UserError, match="severity of jpeg: 6"):
        corrupt(images, "jpeg", 6, KEY)


def test_gaussian_noise_has_the_stated_deviation():
    grey = np.full((6, SIDE, SIDE, 3), 128, np.uint8)
    for severity in (1, 2):  # beyond, values are cut at 0 and 255
        noise = np.asarray(corrupt(grey, "gaussian_noise", severity, KEY)) - 128
        assert noise.std() == pytest.approx(255 * constant("gaussian_noise", severity)[0], rel=0.02)
        assert abs(noise.mean()) < 0.5


def test_shot_noise_counts_poisson_photons():
    for severity in (1, 5):
        (photons,) = constant("shot_noise", severity)
        grey = np.full((6, SIDE, SIDE, 3), 85, np.uint8)
        counts = np.asarray(corrupt(grey, "shot_noise", severity, KEY)) * photons / 255
        share = [np.mean(counts < k + 0.5) for k in range(int(photons))]
        expected = poisson.cdf(np.arange(int(photons)), photons / 3)
        np.testing.assert_allclose(share, expected, atol=0.012)


def test_impulse_noise_sets_the_stated_share():
    grey = np.full((6, SIDE, SIDE, 3), 128, np.uint8)
    noisy = np.asarray(corrupt(grey, "impulse_noise", 4, KEY))
    assert set(np.unique(noisy)) == {0, 128, 255}
    assert (noisy == 0).mean() == pytest.approx(0.085, abs=0.01)
    assert (noisy == 255).mean() == pytest.approx(0.085, abs=0.01)


def test_kernels_sum_to_one_and_lie_where_they_should():
    np.testing.assert_allclose(disc(3.0, 4).sum(), 1, rtol=1e-6)
    assert np.count_nonzero(np.asarray(disc(3.0, 4))) == 37  # pixels nearer than 3.5
    angles = np.array([0.0, np.pi / 6, -np.pi / 4], np.float32)
    kernels = np.asarray(streak(angles, 6.0, 2.0, 8))
    np.testing.assert_allclose(kernels.sum(axis=(1, 2)), 1, rtol=1e-5)
    trail = np.exp(-(np.arange(7) ** 2) / 8)
    np.testing.assert_allclose(kernels[0, 8, 8:15], trail / trail.sum(), rtol=1e-5)
    reach = np.arange(-8, 9)
    for kernel, angle in zip(kernels, angles, strict=True):  # the centre of mass is on the ray
        y, x = (kernel * reach[:, None]).sum(), (kernel * reach).sum()
        assert np.arctan2(y, x) == pytest.approx(angle, abs=1e-4)


def test_blur_is_a_convolution_that_mirrors(images):
    kernels = np.asarray(streak(np.linspace(-0.7, 0.7, len(images)), 5.0, 3.0, 6))
    ours = np.asarray(corruptions.blur(images.astype(np.float32), kernels))
    for image, kernel, blurred in zip(images.astype(float), kernels, ours, strict=True):
        expected = ndimage.convolve(image, kernel[..., None], mode="mirror")
        np.testing.assert_allclose(blurred, expected, atol=0.02)


def test_lengths_shrink_with_the_image_to_a_quarter():
    assert [length_scale(side) for side in (448, 224, 112, 32)] == [2, 1, 0.5, 0.25]


@pytest.mark.parametrize("severity", SEVERITIES)
def test_brightness_and_saturation_equal_colorsys(severity, images, corrupted):
    def through_hsv(image, change):
        hsv = [change(*colorsys.rgb_to_hsv(*pixel)) for pixel in image.reshape(-1, 3) / 255]
        return 255 * np.array([colorsys.hsv_to_rgb(*pixel) for pixel in hsv]).reshape(image.shape)

    (added,) = constant("brightness", severity)
    expected = through_hsv(images[0], lambda h, s, v: (h, s, min(v + added, 1)))
    assert np.abs(corrupted["brightness", severity][0] - expected).max() < 0.51
    factor, added = constant("saturation", severity)
    expected = through_hsv(images[0], lambda h, s, v: (h, np.clip(s * factor + added, 0, 1), v))
    assert np.abs(corrupted["saturation", severity][0] - expected).max() < 0.51


def test_grey_and_black_pixels_keep_the_rules_of_hsv():
    grey = np.stack([np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 200, np.uint8)])
    brighter = np.asarray(corrupt(grey, "brightness", 2, KEY))
    assert (brighter[0] == 51).all() and (brighter[1] == 251).all()
    redder = np.asarray(corrupt(grey, "saturation", 5, KEY))
    assert (redder[0] == 0).all() and (redder[1] == [200, 160, 160]).all()


def test_contrast_shrinks_the_distance_from_the_mean(images, corrupted):
    means = images.mean(axis=(1, 2), keepdims=True)
    expected = means + 0.2 * (images - means)
    assert np.abs(corrupted["contrast", 3] - expected).max() < 0.51


def through_pillow(image, quality):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=int(quality), subsampling="4:2:0")
    return np.asarray(Image.open(file), float)


@pytest.mark.parametrize("side", [SIDE, 28, 13])
def test_jpeg_equals_pillows(side):
    images = photos(6, side)
    for severity in SEVERITIES:
        (quality,) = constant("jpeg", severity)
        ours = np.asarray(corrupt(images, "jpeg", severity, KEY))
        theirs = np.stack([through_pillow(image, quality) for image in images])
        # A coefficient that is nearly a tie rounds elsewhere here and there.
        assert np.abs(ours - theirs).mean() < 1
        assert np.abs(ours - theirs).mean() < np.abs(theirs - images).mean() / 6


def test_pixelate_equals_pillows_boxes(images, corrupted):
    for severity in SEVERITIES:
        small = int(SIDE * constant("pixelate", severity)[0])
        for image, blocks in zip(images, corrupted["pixelate", severity], strict=True):
            shrunk = Image.fromarray(image).resize((small, small), Image.BOX)
            theirs = np.asarray(shrunk.resize((SIDE, SIDE), Image.BOX), float)
            assert np.abs(blocks - theirs).max() <= 1  # Pillow rounds between the axes


def test_rotation_and_scale_equal_scipy(images, corrupted):
    centre = (SIDE - 1) / 2
    grid = np.stack(np.mgrid[:SIDE, :SIDE]) - centre
    angle = np.deg2rad(constant("rotation", 5)[0])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    (factor,) = constant("scale", 5)
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
        covered = (np.asarray(corrupt(white, "occlusion", severity, KEY)) == 128).all(axis=-1)
        side = np.sqrt(covered.sum(axis=(1, 2)))
        expected = SIDE * np.sqrt(constant("occlusion", severity)[0])
        assert (np.abs(side - expected) <= 1).all()
        assert len(np.unique(covered.reshape(6, -1), axis=0)) > 1  # anywhere
