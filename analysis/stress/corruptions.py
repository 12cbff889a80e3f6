"""Thirteen seeded image corruptions at five severities, on the device, a batch at a time.

They are those of ImageNet-C that a small photo shows (Hendrycks & Dietterich 2019, "Benchmarking
neural network robustness to common corruptions and perturbations", with its constants), and
rotation, scale and occlusion with tables of our own.

Lengths in pixels (blur radius, motion length) are stated for 224 pixels and multiplied by
side / 224, by 1/4 at least: an image of fewer than 56 pixels is blurred like one of 56.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data.augmentation import resample
from errors import UserError, choose

SEVERITIES = (1, 2, 3, 4, 5)
REFERENCE_SIDE = 224  # pixels; what lengths in the tables below refer to
COUNTS = 128  # of photons a shot-noise pixel can have; the mean is 60 at most

# Annex K of the JPEG standard, as every encoder scales them by quality.
LUMA_TABLE = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)
CHROMA_TABLE = np.full((8, 8), 99)
CHROMA_TABLE[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
YCBCR = np.array(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
)  # JFIF; rows give Y, Cb - 128 and Cr - 128


class Corruption(NamedTuple):
    """`apply(keys [B], images [B, S, S, 3] in 0..255, *constants)`, and the constants by severity.

    Constants are arguments of the compiled program, so that all severities share one.
    """

    apply: Callable[..., jax.Array]
    constants: tuple[tuple[float, ...], ...]  # a row a severity


def corrupt(
    images: jax.Array,
    name: str,
    severity: int,
    key: jax.Array,
    indices: jax.Array | None = None,
) -> jax.Array:
    """Corrupts a batch of images; what an image gets does not depend on its batch.

    Args:
      images: [B, S, S, 3] uint8, or float in 0..255.
      name: one of `CORRUPTIONS`.
      severity: 1 to 5.
      key: of the experiment; an image's own is derived from it, the corruption, the severity and
        the image's index.
      indices: int [B], of the images in their data set; 0 .. B - 1 by default.

    Returns:
      float32 [B, S, S, 3], whole grey levels in 0..255.

    Raises:
      UserError: no such corruption or severity.
    """
    choose("corruption", name, CORRUPTIONS)
    if severity not in SEVERITIES:
        raise UserError(f"severity of {name}: {severity!r} is not one of 1, 2, 3, 4, 5")
    constants = jnp.asarray(CORRUPTIONS[name].constants[severity - 1], jnp.float32)
    number = list(CORRUPTIONS).index(name)
    key = jax.random.fold_in(jax.random.fold_in(key, number), severity)
    indices = jnp.arange(len(images)) if indices is None else jnp.asarray(indices)
    return _corrupt(jnp.asarray(images), constants, key, indices, name=name)


@partial(jax.jit, static_argnames="name")
def _corrupt(
    images: jax.Array, constants: jax.Array, key: jax.Array, indices: jax.Array, *, name: str
) -> jax.Array:
    keys = jax.vmap(partial(jax.random.fold_in, key))(indices)
    changed = CORRUPTIONS[name].apply(keys, images.astype(jnp.float32), *constants)
    return jnp.clip(jnp.round(changed), 0, 255)


# --- noise ----------------------------------------------------------------------------------------


def _uniform(keys: jax.Array, shape: tuple[int, ...] = (), low=0.0, high=1.0) -> jax.Array:
    """Draws [B, *shape], each row from its own key."""
    return jax.vmap(lambda key: jax.random.uniform(key, shape, minval=low, maxval=high))(keys)


def gaussian_noise(keys: jax.Array, images: jax.Array, deviation: jax.Array) -> jax.Array:
    """Adds normal noise to every value; its standard deviation is a share of 255."""
    noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))(keys)
    return images + 255 * deviation * noise


def shot_noise(keys: jax.Array, images: jax.Array, photons: jax.Array) -> jax.Array:
    """Counts photons: Poisson with `photons` expected at 255, and scaled back.

    A value is the smallest count whose cumulative probability reaches a uniform draw. There are
    only 256 distributions, so bisecting a table costs a tenth of JAX's rejection sampler.
    """
    means = jnp.arange(256)[:, None] / 255 * photons
    table = jnp.cumsum(jax.scipy.stats.poisson.pmf(jnp.arange(COUNTS), means), axis=1).ravel()
    draws = _uniform(keys, images.shape[1:])
    row = jnp.round(images).astype(jnp.int32) * COUNTS
    count, step = jnp.zeros_like(row), COUNTS // 2
    while step:
        count = jnp.where(table[row + count + step - 1] < draws, count + step, count)
        step //= 2
    return count / photons * 255


def impulse_noise(keys: jax.Array, images: jax.Array, amount: jax.Array) -> jax.Array:
    """Sets a share of the values to 0 or 255, as often the one as the other."""
    draws = _uniform(keys, images.shape[1:])
    return jnp.where(draws < amount / 2, 0, jnp.where(draws > 1 - amount / 2, 255, images))


# --- blur -----------------------------------------------------------------------------------------


def length_scale(side: int) -> float:
    """Returns what lengths stated for 224 pixels are multiplied by in an image of this side."""
    return max(side / REFERENCE_SIDE, 0.25)


def disc(radius: jax.Array, reach: int) -> jax.Array:
    """Returns [2 * reach + 1] * 2, a disc that sums to 1; pixels on its rim count in part."""
    offset = jnp.arange(-reach, reach + 1)
    cover = jnp.clip(radius + 0.5 - jnp.hypot(offset[:, None], offset), 0, 1)
    return cover / cover.sum()


def streak(angle: jax.Array, length: jax.Array, deviation: jax.Array, reach: int) -> jax.Array:
    """Returns [B, 2 * reach + 1, 2 * reach + 1], half-Gaussian trails that each sum to 1.

    A trail has a tap a pixel along `angle` (radians, [B]), each shared out between its four
    neighbours; it ends after `length` pixels.
    """
    tap = jnp.arange(reach + 1)
    weight = jnp.where(tap <= length, jnp.exp(-((tap / deviation) ** 2) / 2), 0)
    offset = jnp.arange(-reach, reach + 1)[:, None]

    def near(place: jax.Array) -> jax.Array:  # [B, taps] -> [B, offsets, taps]
        return jnp.clip(1 - jnp.abs(offset - place[:, None]), 0)

    rows, columns = near(jnp.sin(angle)[:, None] * tap), near(jnp.cos(angle)[:, None] * tap)
    weight = weight / weight.sum()
    return jnp.einsum("t,byt,bxt->byx", weight, rows, columns, precision="highest")


def blur(images: jax.Array, kernels: jax.Array) -> jax.Array:
    """Convolves images with a kernel each, [B or 1, K, K] of odd K; the outside mirrors the inside.

    By Fourier transform: the cost does not grow with the kernel, which differs by image.
    """
    size, half = kernels.shape[-1], kernels.shape[-1] // 2
    padded = jnp.pad(images, ((0, 0), (half, half), (half, half), (0, 0)), mode="reflect")
    planes = jnp.moveaxis(padded, -1, 1)  # [B, 3, P, P]
    shape = planes.shape[-2:]
    spectrum = jnp.fft.rfft2(planes) * jnp.fft.rfft2(kernels, s=shape)[:, None]
    valid = jnp.fft.irfft2(spectrum, s=shape)[..., size - 1 :, size - 1 :]
    return jnp.moveaxis(valid, 1, -1)


def defocus_blur(keys: jax.Array, images: jax.Array, radius: jax.Array) -> jax.Array:
    """Convolves with a disc; its rim is smoothed by coverage instead of a second small blur."""
    scale = length_scale(images.shape[1])
    reach = int(np.ceil(_largest("defocus_blur", 0) * scale))
    return blur(images, disc(radius * scale, reach)[None])


def motion_blur(
    keys: jax.Array, images: jax.Array, radius: jax.Array, deviation: jax.Array
) -> jax.Array:
    """Smears an image in one direction, up to 45 degrees from the horizontal, drawn per image.

    The trail is 2 * radius long and fades as a Gaussian.
    """
    scale = length_scale(images.shape[1])
    reach = int(np.ceil(2 * _largest("motion_blur", 0) * scale))
    angle = _uniform(keys, low=-jnp.pi / 4, high=jnp.pi / 4)
    return blur(images, streak(angle, 2 * radius * scale, deviation * scale, reach))


def _largest(name: str, column: int) -> float:
    return max(row[column] for row in CORRUPTIONS[name].constants)


# --- colour ---------------------------------------------------------------------------------------


def brightness(keys: jax.Array, images: jax.Array, added: jax.Array) -> jax.Array:
    """Adds a share of 255 to the V of HSV: hue and saturation stay."""
    value = images.max(axis=-1, keepdims=True)
    brighter = jnp.clip(value + 255 * added, 0, 255)
    return jnp.where(value > 0, images * (brighter / jnp.maximum(value, 1e-6)), brighter)


def contrast(keys: jax.Array, images: jax.Array, factor: jax.Array) -> jax.Array:
    """Draws values towards their channel's mean over the image."""
    mean = images.mean(axis=(1, 2), keepdims=True)
    return mean + factor * (images - mean)


def saturation(
    keys: jax.Array, images: jax.Array, factor: jax.Array, added: jax.Array
) -> jax.Array:
    """Maps the S of HSV to S * factor + added; a grey pixel, of hue 0, turns red.

    Severities 1 and 2 fade colours and 3 to 5 exaggerate them, so that harm grows steadily only
    on photos of muted colours.
    """
    value = images.max(axis=-1, keepdims=True)
    lack = value - images  # of each channel, compared with the strongest
    most = lack.max(axis=-1, keepdims=True)  # V * S
    share = jnp.where(most > 0, lack / jnp.maximum(most, 1e-6), jnp.array([0.0, 1.0, 1.0]))
    new = jnp.clip(most / jnp.maximum(value, 1e-6) * factor + added, 0, 1)
    return value * (1 - new * share)


# --- compression ----------------------------------------------------------------------------------


def jpeg(keys: jax.Array, images: jax.Array, quality: jax.Array) -> jax.Array:
    """Compresses and decompresses as baseline JPEG with chroma at half resolution (4:2:0).

    The lossy steps alone: YCbCr, 2x2 means of chroma, the 8x8 cosine transform quantised with the
    tables of Annex K, and linear interpolation of chroma on the way back, as libjpeg does.
    """
    side = images.shape[1]
    margin = (0, -side % 16)
    padded = jnp.pad(images, ((0, 0), margin, margin, (0, 0)), mode="edge")
    batch, padded_side = padded.shape[:2]
    planes = jnp.round(jnp.einsum("bhwc,dc->bhwd", padded, YCBCR, precision="highest"))
    luma = _quantised(planes[..., 0] - 128, LUMA_TABLE, quality) + 128
    blocks = planes[..., 1:].reshape(batch, padded_side // 2, 2, padded_side // 2, 2, 2)
    ties = jnp.arange(padded_side // 2)[:, None] % 2 / 4 + 0.25  # down and up in turn, as libjpeg
    small = jnp.floor(blocks.mean(axis=(2, 4)) + ties)
    small = jnp.moveaxis(small, -1, 1)  # [B, 2, side / 2, side / 2]
    small = _quantised(small, CHROMA_TABLE, quality)
    used = -(-side // 2)  # what lies beyond would bleed into the last pixels
    small = small[..., :used, :used]
    chroma = jax.image.resize(small, (*small.shape[:2], 2 * used, 2 * used), "linear")
    parts = [luma[:, :side, :side], *jnp.moveaxis(chroma[..., :side, :side], 1, 0)]
    return jnp.einsum(
        "bhwd,cd->bhwc", jnp.stack(parts, -1), np.linalg.inv(YCBCR), precision="highest"
    )


def _quantised(planes: jax.Array, table: np.ndarray, quality: jax.Array) -> jax.Array:
    """Rounds the 8x8 cosine coefficients of [..., H, W], whose zero is grey, to quality's steps."""
    percent = jnp.where(quality < 50, jnp.floor(5000 / quality), 200 - 2 * quality)
    steps = jnp.clip(jnp.floor((table * percent + 50) / 100), 1, 255)
    wave, place = np.mgrid[:8, :8]
    cosines = np.cos((2 * place + 1) * wave * np.pi / 16) / 2
    cosines[0] /= np.sqrt(2)
    transform = partial(jnp.einsum, precision="highest")
    height, width = planes.shape[-2:]
    blocks = planes.reshape(*planes.shape[:-2], height // 8, 8, width // 8, 8)
    waves = transform("ui,...yixj,vj->...yuxv", cosines, blocks, cosines)
    kept = jnp.round(waves / steps[:, None, :]) * steps[:, None, :]
    values = transform("ui,...yuxv,vj->...yixj", cosines, kept, cosines)
    return jnp.clip(jnp.round(values), -128, 127).reshape(planes.shape)


def pixelate(keys: jax.Array, images: jax.Array, share: jax.Array) -> jax.Array:
    """Shrinks the side to a share of it and enlarges again: each block becomes its mean."""
    side = images.shape[1]
    blocks = jnp.maximum(jnp.floor(side * share), 1)
    block = jnp.floor((jnp.arange(side) + 0.5) * blocks / side)
    same = (block[:, None] == block).astype(jnp.float32)
    mean = same / same.sum(axis=1, keepdims=True)
    return jnp.einsum("yi,bijc,xj->byxc", mean, images, mean, precision="highest")


# --- geometry -------------------------------------------------------------------------------------


def _coin(keys: jax.Array) -> jax.Array:
    """Draws -1 or 1 per image, [B]."""
    return jnp.where(_uniform(keys) < 0.5, -1.0, 1.0)


def rotation(keys: jax.Array, images: jax.Array, degrees: jax.Array) -> jax.Array:
    """Rotates about the centre, to either side; bilinear, the outside mirrors the inside."""
    side, angle = _coin(keys), jnp.deg2rad(degrees)
    cos, sin = jnp.cos(angle) * jnp.ones_like(side), jnp.sin(angle) * side
    matrix = jnp.stack([jnp.stack([cos, -sin], -1), jnp.stack([sin, cos], -1)], -2)
    return resample(images, matrix, jnp.zeros((len(images), 2)))


def scale(keys: jax.Array, images: jax.Array, factor: jax.Array) -> jax.Array:
    """Enlarges or shrinks about the centre; bilinear, the outside mirrors the inside."""
    matrix = (factor ** _coin(keys))[:, None, None] * jnp.eye(2)
    return resample(images, matrix, jnp.zeros((len(images), 2)))


def occlusion(keys: jax.Array, images: jax.Array, area: jax.Array) -> jax.Array:
    """Covers a share of the image with one grey square, anywhere inside it."""
    side = images.shape[1]
    edge = jnp.sqrt(area) * side
    corner = _uniform(keys, (2,)) * (side - edge)  # [B, 2]
    place = jnp.arange(side) + 0.5 - corner[..., None]  # [B, 2, S]
    inside = (place > 0) & (place < edge)
    covered = inside[:, 0, :, None] & inside[:, 1, None, :]
    return jnp.where(covered[..., None], 128, images)


def _rows(*values: float) -> tuple[tuple[float, ...], ...]:
    return tuple((value,) for value in values)


# The order numbers the random streams: new corruptions go to the end.
CORRUPTIONS = {
    "gaussian_noise": Corruption(gaussian_noise, _rows(0.08, 0.12, 0.18, 0.26, 0.38)),  # of 255
    "shot_noise": Corruption(shot_noise, _rows(60, 25, 12, 5, 3)),  # photons at white
    "impulse_noise": Corruption(impulse_noise, _rows(0.03, 0.06, 0.09, 0.17, 0.27)),  # of values
    "defocus_blur": Corruption(defocus_blur, _rows(3, 4, 6, 8, 10)),  # pixels of 224
    "motion_blur": Corruption(motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "brightness": Corruption(brightness, _rows(0.1, 0.2, 0.3, 0.4, 0.5)),  # of 255
    "contrast": Corruption(contrast, _rows(0.4, 0.3, 0.2, 0.1, 0.05)),
    "saturation": Corruption(saturation, ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))),
    "jpeg": Corruption(jpeg, _rows(25, 18, 15, 10, 7)),  # quality
    "pixelate": Corruption(pixelate, _rows(0.6, 0.5, 0.4, 0.3, 0.25)),  # of the side
    "rotation": Corruption(rotation, _rows(5, 10, 15, 20, 30)),  # degrees
    "scale": Corruption(scale, _rows(1.1, 1.2, 1.3, 1.45, 1.6)),
    "occlusion": Corruption(occlusion, _rows(0.05, 0.1, 0.2, 0.3, 0.4)),  # of the area
}


def spoken(name: str) -> str:
    """Returns a corruption's name as a reader wants it."""
    return name.replace("_", " ").replace("jpeg", "JPEG").replace("gaussian", "Gaussian")
