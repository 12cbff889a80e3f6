"""Decode images to RGB uint8 of one size, and note what an audit wants to know of them.

Every image once, into a cache; or, where the source noted all that and the images take too much
room, those of a batch whenever they are asked for.
"""

import hashlib
import json
import math
import os
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageOps, __version__
from scipy.fft import dctn
from tqdm import tqdm

from data.cache import put_in_place, sweep, temporary_folder
from data.formats import HEIF, open_image, printable
from data.lazy import LazyImages
from data.sources import UNREAD, Listing
from errors import UserError

VERSION = 1  # of the fingerprint; raise it when sound images get other pixels
ENTRY = 2  # of an entry of the cache; raise it when it holds other things
MAX_PIXELS = 100_000_000  # default of data.max_pixels
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
      images: uint8 [N, S, S, 3], mapped from disk, or decoded when they are asked for.
      facts: a structured array [N] with the fields of FACTS, or an array [N] by field.
      errors: N messages, "" for an image that was read.
      modes: N names of the pixel format as stored, such as RGB or L.
      fingerprint: SHA-256 over every image as stored and over how it is decoded.
      entry: name of all that the pixels depend on, what decodes them included.
    """

    images: np.ndarray | LazyImages
    facts: np.ndarray | dict[str, np.ndarray]
    errors: list[str]
    modes: list[str]
    fingerprint: str
    entry: str = ""


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


def to_rgb(
    data: bytes | np.ndarray,
    background: tuple[int, int, int],
    max_pixels: int = MAX_PIXELS,
    side: int = 0,
) -> tuple[Image.Image, str]:
    """Decodes any image to 8-bit RGB, upright.

    Grey, palette, CMYK and 16-bit images are converted (16 bits by division by 257), transparent
    ones are laid over `background`, and the EXIF orientation is applied. A JPEG of more than
    `max_pixels` is decoded at a half, quarter or eighth of its size if it stays larger than `side`,
    the size it is needed in (0: it is refused); `info["stored"]` holds its full size.

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
        image, mode = open_image(data, max_pixels, side)
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


def _opened(data: bytes | np.ndarray, config: ConfigDict) -> tuple[Image.Image, str]:
    limit = config.get("max_pixels", MAX_PIXELS)
    return to_rgb(data, tuple(config.background), limit, config.image_size)


def _resized(image: Image.Image, config: ConfigDict) -> np.ndarray:
    return np.asarray(resize(image, config.image_size, config.resize, config.interpolation))


def describe(data: bytes | np.ndarray, config: ConfigDict) -> tuple[Image.Image, np.void, str]:
    """Decodes an image; returns it, its FACTS, and its pixel format as stored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata that changes no pixel
        image, mode = _opened(data, config)
    fact = np.zeros((), FACTS)
    raw = np.asarray(image)
    fact["width"], fact["height"] = image.info.get("stored", image.size)
    fact["low"], fact["high"] = raw.min(), raw.max()
    digest = hashlib.sha256(str(image.size).encode() + raw.tobytes()).digest()
    fact["pixels"] = np.frombuffer(digest, "V32")[0]
    fact["hash"] = perceptual_hash(image)
    fact["thumbnail"] = np.asarray(
        image.convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    )
    return image, fact, mode


def _decode_one(data: bytes | np.ndarray, config: ConfigDict) -> tuple[np.ndarray, np.void, str]:
    image, fact, mode = describe(data, config)
    return _resized(image, config), fact, mode


def facts_settings(config: ConfigDict) -> dict:
    """Returns the fields that facts and errors depend on, and the version of our decoding."""
    limit = config.get("max_pixels", MAX_PIXELS)
    return {"version": VERSION, "background": list(config.background), "max_pixels": limit}


# --- all images, and their cache ----------------------------------------------------------------


def decode_all(
    listing: Listing, config: ConfigDict, cache_dir: str, limit_mb: float = math.inf
) -> Decoded:
    """Decodes all images of a listing as `config.data` says, or maps them from the cache.

    The cache is keyed by the content of every image and by how it is decoded, so a changed file or
    another size makes a new entry, and a second start decodes nothing. An entry that is damaged is
    made anew. A file that cannot be read is an error of its row, as a broken image is.

    Images of more than `limit_mb` decoded, of a source that noted its facts, are not decoded.

    Raises:
      UserError: the cache cannot be written, or a file changes while it is read.
    """
    settings = [VERSION, config.image_size, config.resize, config.interpolation]
    key = hashlib.sha256(json.dumps([*settings, list(config.background)]).encode())
    unread, shape = {}, (len(listing.ids), config.image_size, config.image_size, 3)
    lazy = listing.noted is not None and math.prod(shape) > limit_mb * 2**20
    if lazy:
        key.update(listing.noted.digests.view(np.uint8))  # the same bytes, one after the other
    for i, (digest, error) in enumerate([] if lazy else _digests(listing)):
        key.update(digest)
        if error:
            unread[i] = error
    fingerprint = key.hexdigest()
    more = [ENTRY, fingerprint, config.get("max_pixels", MAX_PIXELS), __version__, HEIF]
    name = hashlib.sha256(json.dumps(more).encode()).hexdigest()[:24]
    entry = Path(cache_dir).expanduser() / "images" / name
    if lazy:
        decoded = _lazily(listing, config, shape)
        decoded.fingerprint, decoded.entry = fingerprint, name
        return decoded
    try:
        sweep(entry.parent)
        decoded = _read_entry(entry, shape)
        if decoded is None:
            _fill_entry(entry, listing, config, unread)
            decoded = _read_entry(entry, shape)
        if decoded is None:
            raise OSError("what was written there reads otherwise")
    except OSError as error:
        raise UserError(
            f"cannot write decoded images to {entry.parent}: {error}\n"
            "Make room there, or name another folder with --config.runtime.cache_dir=..."
        ) from error
    listing.release()
    decoded.fingerprint, decoded.entry = fingerprint, name
    for i, error in unread.items():  # it may have another reason today
        decoded.errors[i] = error
    return decoded


def _lazily(listing: Listing, config: ConfigDict, shape: tuple[int, ...]) -> Decoded:
    """Returns images that are decoded at every use, with what the source noted of them.

    Rows with an error are zeros, as in the cache.
    """
    noted, settings = listing.noted, facts_settings(config)
    for name, value in noted.settings.items():
        if value != settings[name]:
            raise UserError(
                f"{config.path} was written with data.{name}={value}, not with {settings[name]}: "
                f"set --config.data.{name} to the former, write the records anew with the latter, "
                "or decode all images into the cache with --config.runtime.resident_limit_mb="
                f"{math.ceil(math.prod(shape) / 2**20)}"
            )
    warnings.filterwarnings("ignore", module="PIL")  # of odd metadata that changes no pixel

    def decode(row: int) -> np.ndarray:
        if noted.errors[row]:
            return np.zeros(shape[1:], np.uint8)
        try:
            return _resized(_opened(listing.read(row), config)[0], config)
        except Exception as error:  # noqa: BLE001 - Pillow raises many types on broken files
            raise UserError(
                f"{listing.ids[row]} ({noted.place(row)}) cannot be read: {message_of(error)}. It "
                "could when the records were written: bring the file back, or write them anew"
            ) from error

    images = LazyImages(decode, shape)
    return Decoded(images, noted.facts, list(noted.errors), noted.modes, fingerprint="")


def _digests(listing: Listing) -> list[tuple[bytes, str]]:
    """Returns (digest, "") for each image as stored, or what stands for it and why it is unread."""

    def digest(i: int) -> tuple[bytes, str]:
        try:
            return listing.digest(i), ""
        except Exception as error:  # noqa: BLE001 - disks and sources raise many types
            return UNREAD, message_of(error)

    if listing.digests is None and (noted := listing.noted):
        digests = map(bytes, noted.digests)
        pairs = zip(digests, noted.errors, strict=True)
        listing.digests = [(known, error if known == UNREAD else "") for known, error in pairs]
    if listing.digests is None:
        listing.digests = list(in_threads(digest, len(listing.ids)))
    return listing.digests


def message_of(error: Exception) -> str:
    """Returns what is wrong with a file on one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return printable(" ".join(text.split()))


def in_threads(function: Callable, count: int) -> Iterator:
    """Yields function(0), function(1), ...; when stopped, what has not begun is not done."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield from pool.map(function, range(count))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _read_entry(entry: Path, shape: tuple[int, ...]) -> Decoded | None:
    """Maps an entry of the cache; None if there is none, or any part of it is lost or changed."""
    try:
        notes = json.loads((entry / "notes.json").read_text(encoding="utf-8"))
        images = np.load(entry / "images.npy", mmap_mode="r")
        facts = np.load(entry / "facts.npy")
        whole = images.shape == shape and images.dtype == np.uint8
        whole &= facts.shape == shape[:1] and facts.dtype == FACTS
        whole &= len(notes["errors"]) == len(notes["modes"]) == shape[0]
        if whole and notes["checksums"] == _checksums(images, facts, notes):
            return Decoded(images, facts, notes["errors"], notes["modes"], fingerprint="")
    except Exception:  # noqa: BLE001 - damage has many faces, and all are mended alike
        pass
    return None


def _checksums(images: np.ndarray, facts: np.ndarray, notes: dict) -> list[int]:
    words = json.dumps([notes["errors"], notes["modes"]]).encode()
    return [zlib.crc32(images), zlib.crc32(facts.tobytes()), zlib.crc32(words)]


def _fill_entry(entry: Path, listing: Listing, config: ConfigDict, unread: dict[int, str]) -> None:
    """Decodes into a temporary folder and renames it, so an entry is whole or absent."""
    count, size = len(listing.ids), config.image_size
    facts = np.zeros(count, FACTS)
    errors, modes = [unread.get(i, "") for i in range(count)], [""] * count
    with temporary_folder(entry) as work:
        with open(work / "images.npy", "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
            np.lib.format.write_array_header_1_0(file, header)
            file.flush()
            start, length = file.tell(), size * size * 3
            os.ftruncate(file.fileno(), start + count * length)

            def decode(i: int) -> None:
                if errors[i]:
                    return
                image = _decode_row(listing, i, config, facts, errors, modes)
                # Written rather than mapped: a full disk is an error then, not a SIGBUS.
                if image is not None:
                    written = os.pwrite(file.fileno(), image.tobytes(), start + i * length)
                    if written != length:
                        raise OSError("no space left on device")

            print(f"decoding {count} images", flush=True)
            done = in_threads(decode, count)
            try:
                for _ in tqdm(done, "decoding", count, unit=" images", leave=False, disable=None):
                    pass
            finally:
                done.close()  # before the file is
        np.save(work / "facts.npy", facts)
        notes = {"errors": errors, "modes": modes}
        images = np.load(work / "images.npy", mmap_mode="r")
        notes["checksums"] = _checksums(images, facts, notes)
        (work / "notes.json").write_text(json.dumps(notes), encoding="utf-8")
        put_in_place(work, entry, lambda: _read_entry(entry, images.shape) is not None)


def _decode_row(
    listing: Listing,
    i: int,
    config: ConfigDict,
    facts: np.ndarray,
    errors: list[str],
    modes: list[str],
) -> np.ndarray | None:
    """Decodes image i and notes its facts, or its error."""
    try:
        data = listing.read(i)
        same = listing.digest(i, data) == listing.digests[i][0]
    except Exception as error:  # noqa: BLE001 - it could be read a moment ago
        raise UserError(f"{listing.ids[i]}: {message_of(error)}; start again") from error
    if not same:
        raise UserError(f"{listing.ids[i]} changed while it was read: start again")
    try:
        image, facts[i], modes[i] = _decode_one(data, config)
    except MemoryError as error:
        raise UserError(
            f"{listing.ids[i]}: too little memory to decode it; lower config.data.max_pixels"
        ) from error
    except Exception as error:  # noqa: BLE001 - Pillow raises many types on broken files
        errors[i] = message_of(error)
        return None
    return image
