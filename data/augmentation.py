"""Random changes to training images, on the device under jit: one resample, colour, then mixing.

Geometry is one affine map an image, sampled bilinearly once: flips, rotation, zoom, shift and
random resized crop cost the same together as any one of them alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

GREY = (0.299, 0.587, 0.114)  # luma of ITU-R BT.601, as Pillow converts to grey


def augment(
    key: jax.Array, images: jax.Array, targets: jax.Array, config: ConfigDict, size: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Applies what `config.augment` turns on; every image draws its own numbers.

    Args:
      key: decides every draw.
      images: [B, H, W, 3] in 0..255.
      targets: [B, K] float32, mixed where mixup or cutmix is on.
      config: `config.augment`.
      size: of the images returned, where they are cropped from larger ones; 0 for their own.
    """
    geometry, colour, mix = jax.random.split(key, 3)
    images = images.astype(jnp.float32)
    if _resamples(config):
        matrix, offset = random_affine(geometry, *images.shape[:3], config)
        images = resample(images, matrix, offset, size or images.shape[1])
    else:  # exact, and cheaper
        keys = jax.random.split(geometry)
        for axis, key, on in (
            (2, keys[0], config.flip_horizontal),
            (1, keys[1], config.flip_vertical),
        ):
            if on:
                flipped = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
                images = jnp.where(flipped, jnp.flip(images, axis), images)
    images = random_colour(colour, images, config)
    return _mix(mix, images, targets, config)


def changes_nothing(config: ConfigDict) -> bool:
    """Returns whether `config.augment` leaves images as they are."""
    flips, colours = ("flip_horizontal", "flip_vertical"), ("brightness", "contrast", "saturation")
    others = any(config[name] for name in (*flips, *colours, "mixup", "cutmix"))
    return not (others or _resamples(config))


def crops(config: ConfigDict) -> bool:
    """Returns whether `config.augment` crops at random."""
    return tuple(config.crop_area) != (1.0, 1.0)


def _resamples(config: ConfigDict) -> bool:
    return bool(crops(config) or config.rotation or config.zoom or config.shift)


def random_affine(
    key: jax.Array, batch: int, height: int, width: int, config: ConfigDict
) -> tuple[jax.Array, jax.Array]:
    """Draws matrices [B, 2, 2] and offsets [B, 2]: input = matrix @ output + offset.

    Coordinates are (y, x) in pixels from the image's centre.
    """
    keys = jax.random.split(key, 8)

    def uniform(key, low, high, *shape):
        return jax.random.uniform(key, (batch, *shape), minval=low, maxval=high)

    # Random resized crop: a box of the drawn area and aspect ratio, anywhere inside the image.
    area = uniform(keys[0], *config.crop_area)
    low, high = config.crop_aspect
    aspect = jnp.exp(uniform(keys[1], jnp.log(low), jnp.log(high)))
    aspect = jnp.where(area == 1, 1.0, aspect)
    box = jnp.sqrt(jnp.stack([area / aspect, area * aspect], axis=-1)).clip(max=1.0)  # [B, 2]
    place = uniform(keys[2], -0.5, 0.5, 2) * (1 - box)
    shift = uniform(keys[3], -config.shift, config.shift, 2)
    offset = (place + shift) * jnp.array([height, width])

    angle = jnp.deg2rad(uniform(keys[4], -config.rotation, config.rotation))
    zoom = uniform(keys[5], 1 - config.zoom, 1 + config.zoom)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    rotation = jnp.stack([jnp.stack([cos, -sin], -1), jnp.stack([sin, cos], -1)], -2)  # [B, 2, 2]
    flips = jnp.stack(
        [
            jnp.where(jax.random.bernoulli(key, 0.5, (batch,)) & on, -1.0, 1.0)
            for key, on in ((keys[6], config.flip_vertical), (keys[7], config.flip_horizontal))
        ],
        axis=-1,
    )
    return rotation * (box * flips / zoom[:, None])[:, None, :], offset


def resample(images: jax.Array, matrix: jax.Array, offset: jax.Array, size: int) -> jax.Array:
    """Samples images bilinearly at matrix @ output + offset; the outside mirrors the inside.

    Returns [B, size, size, C]. From larger images, a pixel is the mean over several places, so that
    nothing aliases where a crop is shrunk.
    """
    _, height, width, channels = images.shape
    places = -(-height // size)  # a pixel, each way
    side = size * places
    centre = jnp.array([(height - 1) / 2, (width - 1) / 2])
    rows, columns = jnp.mgrid[:side, :side]
    grid = jnp.stack([rows, columns], axis=-1).reshape(-1, 2) - (side - 1) / 2  # [side ** 2, 2]
    grid = grid if side == height else grid * (height / side)
    source = jnp.einsum("bij,pj->bpi", matrix, grid, precision="highest")
    source = source + (offset + centre)[:, None]
    y, x = (_mirror(source[..., i], size) for i, size in enumerate((height, width)))
    top, left = jnp.floor(y), jnp.floor(x)
    down, right = (y - top)[..., None], (x - left)[..., None]  # [B, H * W, 1]
    top, left = top.astype(jnp.int32), left.astype(jnp.int32)
    below, beside = jnp.minimum(top + 1, height - 1), jnp.minimum(left + 1, width - 1)
    flat = images.reshape(-1, height * width, channels)

    def pick(y, x):
        return jnp.take_along_axis(flat, (y * width + x)[..., None], axis=1)

    upper = pick(top, left) * (1 - right) + pick(top, beside) * right
    lower = pick(below, left) * (1 - right) + pick(below, beside) * right
    sampled = upper * (1 - down) + lower * down
    sampled = sampled.reshape(-1, size, places, size, places, channels)
    return sampled[:, :, 0, :, 0] if places == 1 else sampled.mean(axis=(2, 4))


def _mirror(position: jax.Array, size: int) -> jax.Array:
    """Reflects positions about the image's edges into 0 .. size - 1."""
    folded = jnp.mod(position + 0.5, 2 * size)
    return (jnp.minimum(folded, 2 * size - folded) - 0.5).clip(0, size - 1)


def random_colour(key: jax.Array, images: jax.Array, config: ConfigDict) -> jax.Array:
    """Scales brightness, contrast and saturation of [B, H, W, 3] in 0..255, in that order."""
    keys = jax.random.split(key, 3)
    for i, name in enumerate(("brightness", "contrast", "saturation")):
        strength = config[name]
        if not strength:
            continue
        low, high = 1 - strength, 1 + strength
        factor = jax.random.uniform(keys[i], (len(images), 1, 1, 1), minval=low, maxval=high)
        grey = (images * jnp.array(GREY)).sum(axis=-1, keepdims=True)
        anchor = {
            "brightness": 0.0,
            "contrast": grey.mean(axis=(1, 2), keepdims=True),
            "saturation": grey,
        }[name]
        images = (anchor + factor * (images - anchor)).clip(0, 255)
    return images


def _mix(
    key: jax.Array, images: jax.Array, targets: jax.Array, config: ConfigDict
) -> tuple[jax.Array, jax.Array]:
    """Mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019) with the batch in reverse order.

    Both draw their share once a batch; with both on, each batch takes one of them by a fair coin.
    """
    if not (config.mixup or config.cutmix):
        return images, targets
    kind, share_key, y_key, x_key = jax.random.split(key, 4)
    cuts = (
        jax.random.bernoulli(kind)
        if config.mixup and config.cutmix
        else jnp.array(config.cutmix > 0)
    )
    alpha = jnp.where(cuts, config.cutmix or 1.0, config.mixup or 1.0)
    share = jax.random.beta(share_key, alpha, alpha)  # of the first image
    height, width = images.shape[1:3]
    side = jnp.sqrt(1 - share)
    y = jnp.abs(jnp.arange(height) - jax.random.uniform(y_key) * height) < side * height / 2
    x = jnp.abs(jnp.arange(width) - jax.random.uniform(x_key) * width) < side * width / 2
    box = (y[:, None] & x[None, :]).astype(jnp.float32)
    weight = jnp.where(cuts, 1 - box, share)[..., None]  # [H, W, 1]
    share = weight.mean()
    images = images * weight + images[::-1] * (1 - weight)
    return images, targets * share + targets[::-1] * (1 - share)


def image_sheet(images: np.ndarray, columns: int = 8) -> Image.Image:
    """Returns [N, H, W, 3] uint8 as one picture, row by row; small images are enlarged."""
    framed = np.pad(
        images, ((0, -len(images) % columns), (1, 1), (1, 1), (0, 0)), constant_values=255
    )
    count, height, width, channels = framed.shape
    sheet = framed.reshape(count // columns, columns, height, width, channels).swapaxes(1, 2)
    picture = Image.fromarray(sheet.reshape(count // columns * height, columns * width, channels))
    factor = max(1, 64 // height)
    return picture.resize((picture.width * factor, picture.height * factor), Image.NEAREST)
