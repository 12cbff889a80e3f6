"""Thirteen seeded image corruptions at five severities.

They are those of ImageNet-C that a small photo shows (Hendrycks & Dietterich 2019, "Benchmarking
neural network robustness to common corruptions and perturbations", with its constants), and
rotation, scale and occlusion. Each is a function `(draw, image, constant)` of a NumPy generator, an
image uint8 [H, W, 3] and what the table at the end has for a severity; `corrupt` rounds and clips
its values. Lengths in pixels are for a shorter side of 224, and shrink with it to a quarter.
"""

import io
import zlib

import numpy as np
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from numpy.random import Generator
from PIL import Image
from scipy import ndimage
from scipy.signal import fftconvolve

from errors import UserError, choose

SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(image: np.ndarray, name: str, severity: int, seed: int = 0) -> np.ndarray:
    """Corrupts one image, uint8 [H, W, 3], by draws of its pixels, the seed and the corruption."""
    choose("corruption", name, CORRUPTIONS)
    if severity not in SEVERITIES:
        raise UserError(f"severity of {name}: {severity!r} is not one of 1, 2, 3, 4, 5")
    number, (apply, constants) = list(CORRUPTIONS).index(name), CORRUPTIONS[name]
    # Of the pixels, so that a photo is corrupted alike whatever is measured beside it.
    draw = np.random.default_rng([seed, number, severity, zlib.crc32(image.tobytes())])
    changed = apply(draw, image, constants[severity - 1])
    return np.clip(np.round(changed), 0, 255).astype(np.uint8)


def gaussian_noise(draw: Generator, image: np.ndarray, deviation: float) -> np.ndarray:
    """Adds normal noise; its standard deviation is a share of 255."""
    return image + 255 * deviation * draw.standard_normal(image.shape)


def shot_noise(draw: Generator, image: np.ndarray, photons: float) -> np.ndarray:
    """Counts photons: Poisson with `photons` expected at 255, scaled back."""
    return draw.poisson(image / 255 * photons) / photons * 255


def impulse_noise(draw: Generator, image: np.ndarray, amount: float) -> np.ndarray:
    """Sets a share of the values to 0 or 255, as often the one as the other."""
    uniform = draw.random(image.shape)
    return np.where(uniform < amount / 2, 0, np.where(uniform > 1 - amount / 2, 255, image))


def length_scale(image: np.ndarray) -> float:
    """Returns the factor of lengths that are stated for a shorter side of 224 pixels."""
    return max(min(image.shape[:2]) / 224, 0.25)


def disc(radius: float) -> np.ndarray:
    """Returns a square with a disc that sums to 1; pixels on its rim count in part."""
    reach = int(np.ceil(radius))
    offset = np.arange(-reach, reach + 1)
    cover = np.clip(radius + 0.5 - np.hypot(offset[:, None], offset), 0, 1)
    return cover / cover.sum()


def streak(angle: float, length: float, deviation: float) -> np.ndarray:
    """Returns a square with a half-Gaussian trail from its centre that sums to 1.

    It has a tap a pixel along `angle` (radians), each shared out between its four neighbours.
    """
    tap, reach = np.arange(int(length) + 1), int(np.ceil(length))
    weight = np.exp(-((tap / deviation) ** 2) / 2)
    offset = np.arange(-reach, reach + 1)[:, None]

    def share(place: np.ndarray) -> np.ndarray:  # [taps] -> [offsets, taps]
        return np.clip(1 - np.abs(offset - place), 0, None)

    return share(np.sin(angle) * tap) * (weight / weight.sum()) @ share(np.cos(angle) * tap).T


def blur(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolves an image with a square kernel of odd side; the outside mirrors the inside."""
    half = len(kernel) // 2
    padded = np.pad(image.astype(float), ((half, half), (half, half), (0, 0)), mode="reflect")
    # By Fourier transform: the kernels of large photos have thousands of taps.
    return fftconvolve(padded, kernel[..., None], mode="valid", axes=(0, 1))


def defocus_blur(draw: Generator, image: np.ndarray, radius: float) -> np.ndarray:
    """Convolves with a disc."""
    return blur(image, disc(radius * length_scale(image)))


def motion_blur(draw: Generator, image: np.ndarray, lengths: tuple[float, float]) -> np.ndarray:
    """Smears along a trail of twice the first length within 45 degrees; it fades by the second."""
    radius, deviation = length_scale(image) * np.array(lengths)
    return blur(image, streak(draw.uniform(-np.pi / 4, np.pi / 4), 2 * radius, deviation))


def brightness(draw: Generator, image: np.ndarray, added: float) -> np.ndarray:
    """Adds to the V of HSV: hue and saturation stay."""
    return 255 * hsv_to_rgb(np.clip(rgb_to_hsv(image / 255) + [0, 0, added], 0, 1))


def contrast(draw: Generator, image: np.ndarray, factor: float) -> np.ndarray:
    """Moves values towards their channel's mean over the image."""
    mean = image.mean(axis=(0, 1))
    return mean + factor * (image - mean)


def saturation(draw: Generator, image: np.ndarray, change: tuple[float, float]) -> np.ndarray:
    """Multiplies the S of HSV and adds to it; from severity 3 on it exaggerates colours."""
    factor, added = change
    return 255 * hsv_to_rgb(np.clip(rgb_to_hsv(image / 255) * [1, factor, 1] + [0, added, 0], 0, 1))


def jpeg(draw: Generator, image: np.ndarray, quality: int) -> np.ndarray:
    """Compresses as baseline JPEG with chroma at half resolution, and decompresses."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return np.asarray(Image.open(file))


def pixelate(draw: Generator, image: np.ndarray, share: float) -> np.ndarray:
    """Shrinks the sides to a share of them and enlarges again: each block becomes its mean."""
    height, width = image.shape[:2]
    blocks = max(int(width * share), 1), max(int(height * share), 1)
    shrunk = Image.fromarray(image).resize(blocks, Image.Resampling.BOX)
    return np.asarray(shrunk.resize((width, height), Image.Resampling.BOX))


def rotation(draw: Generator, image: np.ndarray, degrees: float) -> np.ndarray:
    """Rotates about the centre, to either side; bilinear, the outside mirrors the inside."""
    degrees = degrees * draw.choice([-1, 1])
    return ndimage.rotate(image.astype(float), degrees, reshape=False, order=1, mode="reflect")


def scale(draw: Generator, image: np.ndarray, factor: float) -> np.ndarray:
    """Enlarges or shrinks about the centre; bilinear, the outside mirrors the inside."""
    step = np.array([factor, factor, 1]) ** draw.choice([-1, 1])
    centre = (np.array(image.shape) - 1) / 2
    offset = centre - step * centre
    return ndimage.affine_transform(image.astype(float), step, offset, order=1, mode="reflect")


def occlusion(draw: Generator, image: np.ndarray, area: float) -> np.ndarray:
    """Covers a share of the image with one grey rectangle of its shape, anywhere inside it."""

    def covered(side: int, start: float) -> np.ndarray:
        edge = np.sqrt(area) * side
        place = np.arange(side) + 0.5 - start * (side - edge)
        return (place > 0) & (place < edge)

    rows, columns = map(covered, image.shape[:2], draw.random(2))
    return np.where((rows[:, None] & columns)[..., None], 128, image)


# --- the table ------------------------------------------------------------------------------------

# The function and its constants by severity. The order numbers the random streams: new corruptions
# go to the end.
CORRUPTIONS = {
    "gaussian_noise": (gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),  # of 255
    "shot_noise": (shot_noise, (60, 25, 12, 5, 3)),  # photons at white
    "impulse_noise": (impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),  # of values
    "defocus_blur": (defocus_blur, (3, 4, 6, 8, 10)),  # pixels of 224
    "motion_blur": (motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),  # pixels of 224
    "brightness": (brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),  # of 255
    "contrast": (contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "saturation": (saturation, ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))),
    "jpeg": (jpeg, (25, 18, 15, 10, 7)),  # quality
    "pixelate": (pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),  # of the side
    "rotation": (rotation, (5, 10, 15, 20, 30)),  # degrees
    "scale": (scale, (1.1, 1.2, 1.3, 1.45, 1.6)),
    "occlusion": (occlusion, (0.05, 0.1, 0.2, 0.3, 0.4)),  # of the area
}


def spoken(name: str) -> str:
    """Returns a corruption's name as a reader wants it."""
    return name.replace("_", " ").replace("jpeg", "JPEG").replace("gaussian", "Gaussian")
