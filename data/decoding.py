"""Decode every image once, to RGB uint8 of one size, and note what an audit wants to know of it."""

import hashlib
import io
import json
import os
import shutil
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageOps
from scipy.fft import dctn
from tqdm import tqdm

from data.sources import Listing
from errors import UserError

VERSION = 1  # of the cache; raise it when decoding gives other pixels or facts
MAX_PIXELS = 100_000_000  # a larger image is refused: decoding it could take all memory
Image.MAX_IMAGE_PIXELS = None  # in place of Pillow's limit, whose message names no size
THUMBNAIL = 16  # side of the grey thumbnail that near duplicates are compared by
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass
class Decoded:
    """N decoded images and a row of facts for each; rows with an `error` hold zeros.

    Attributes:
      images: uint8 [N, S, S, 3], mapped from disk.
      facts: a structured array [N] with the fields of FACTS.
      errors: N messages, "" for an image that was read.
      modes: N names of the pixel format as stored, such as RGB or L.
      fingerprint: SHA-256 over every image as stored and over how it is decoded.
    """

    images: np.ndarray
    facts: np.ndarray
    errors: list[str]
    modes: list[str]
    fingerprint: str


FACTS = np.dtype(
    [
        ("width", np.int32),
        ("height", np.int32),
        ("low", np.uint8),  # smallest and largest channel value
        ("high", np.uint8),
        ("pixels", "V32"),  # SHA-256 of size and RGB pixels, before resizing
        ("hash", np.uint64),  # perceptual
        ("thumbnail", np.uint8, (THUMBNAIL, THUMBNAIL)),  # grey
    ]
)


def to_rgb(data: bytes | np.ndarray, background: tuple[int, int, int]) -> tuple[Image.Image, str]:
    """Decodes any image to 8-bit RGB, upright.

    Grey, palette, CMYK and 16-bit images are converted (16 bits by division by 257), transparent
    ones are laid over `background`, and the EXIF orientation is applied.

    Returns:
      The image, and the pixel format as stored.

    Raises:
      ValueError: the data is no image, broken, too large, or of float pixels without a range.
    """
    if isinstance(data, np.ndarray):
        image = Image.fromarray(
            data.squeeze(-1) if data.ndim == 3 and data.shape[-1] == 1 else data
        )
        mode = image.mode
    else:
        try:
            image = Image.open(io.BytesIO(data))
        except Image.UnidentifiedImageError as error:
            raise ValueError("this is no image file") from error
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width}x{height} pixels is over the limit of {MAX_PIXELS:,} pixels")
        mode = image.mode
        image.load()
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"pixels of mode {mode} go beyond 16 bits; convert the file")
        image = Image.fromarray(np.round(values / 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("float pixels have no stated range; convert the file to 8 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        below = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(below, image)
    return image.convert("RGB"), mode


def resize(image: Image.Image, size: int, how: str, interpolation: str) -> Image.Image:
    """Returns the image at size x size: squashed, or its shorter side fitted and its centre cut."""
    if image.size == (size, size):
        return image
    if how == "crop":
        return ImageOps.fit(image, (size, size), FILTERS[interpolation])
    return image.resize((size, size), FILTERS[interpolation])


def perceptual_hash(image: Image.Image) -> np.uint64:
    """Returns 64 bits: which low frequencies of the grey image lie above their median (pHash)."""
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BILINEAR), np.float32)
    low = dctn(grey, norm="ortho")[:8, :8].ravel()
    bits = low > np.median(low[1:])
    return np.packbits(bits).view(np.uint64)[0]


def _decode_one(data: bytes | np.ndarray, config: ConfigDict) -> tuple[np.ndarray, np.void, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata that changes no pixel
        image, mode = to_rgb(data, tuple(config.background))
    fact = np.zeros((), FACTS)
    raw = np.asarray(image)
    fact["width"], fact["height"] = image.size
    fact["low"], fact["high"] = raw.min(), raw.max()
    digest = hashlib.sha256(str(image.size).encode() + raw.tobytes()).digest()
    fact["pixels"] = np.frombuffer(digest, "V32")[0]
    fact["hash"] = perceptual_hash(image)
    fact["thumbnail"] = np.asarray(
        image.convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    )
    resized = resize(image, config.image_size, config.resize, config.interpolation)
    return np.asarray(resized), fact, mode


def decode_all(listing: Listing, config: ConfigDict, cache_dir: str) -> Decoded:
    """Decodes all images of a listing as `config.data` says, or maps them from the cache.

    The cache is keyed by the content of every image and by how it is decoded, so a changed file or
    another size makes a new entry, and a second start decodes nothing.

    Raises:
      UserError: the cache cannot be written.
    """
    settings = [VERSION, config.image_size, config.resize, config.interpolation]
    key = hashlib.sha256(json.dumps([*settings, list(config.background)]).encode())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for digest in pool.map(listing.digest, range(len(listing.ids)), chunksize=64):
            key.update(digest)
        fingerprint = key.hexdigest()
        entry = Path(cache_dir).expanduser() / "images" / fingerprint[:24]
        if not entry.exists():
            try:
                entry.parent.mkdir(parents=True, exist_ok=True)
                _fill_entry(entry, listing, config, pool)
            except OSError as error:
                raise UserError(
                    f"cannot write decoded images to {entry.parent}: {error}\n"
                    "Make room there, or name another folder with --config.runtime.cache_dir=..."
                ) from error
    notes = json.loads((entry / "notes.json").read_text())
    return Decoded(
        images=np.load(entry / "images.npy", mmap_mode="r"),
        facts=np.load(entry / "facts.npy"),
        errors=notes["errors"],
        modes=notes["modes"],
        fingerprint=fingerprint,
    )


def _fill_entry(
    entry: Path, listing: Listing, config: ConfigDict, pool: ThreadPoolExecutor
) -> None:
    """Decodes into a temporary folder and renames it, so an entry is whole or absent."""
    count, size = len(listing.ids), config.image_size
    work = Path(tempfile.mkdtemp(dir=entry.parent, prefix=".part-"))
    try:
        shape = (count, size, size, 3)
        images = np.lib.format.open_memmap(work / "images.npy", "w+", np.uint8, shape)
        with open(work / "images.npy", "r+b") as file:  # a full disk is an error now, not a SIGBUS
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        facts = np.zeros(count, FACTS)
        errors, modes = [""] * count, [""] * count

        def decode(i: int) -> None:
            try:
                images[i], facts[i], modes[i] = _decode_one(listing.read(i), config)
            except Exception as error:  # noqa: BLE001 - Pillow raises many types on broken files
                errors[i] = f"{error}" or type(error).__name__

        done = pool.map(decode, range(count))
        print(f"decoding {count} images", flush=True)
        for _ in tqdm(done, "decoding", count, unit=" images", leave=False, disable=None):
            pass
        images.flush()
        np.save(work / "facts.npy", facts)
        (work / "notes.json").write_text(json.dumps({"errors": errors, "modes": modes}))
        try:
            work.rename(entry)
        except OSError:
            if not entry.exists():  # otherwise another process was faster, with the same content
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
