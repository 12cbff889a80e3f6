"""Which files are images, by Pillow's registry; and their pixels, whatever their metadata say."""

import io
import unicodedata

from PIL import Image, JpegImagePlugin

try:  # an extra: pip install -e '.[heif]'
    import pillow_heif
except ImportError:
    HEIF = False
else:
    pillow_heif.register_heif_opener()
    HEIF = True

Image.MAX_IMAGE_PIXELS = None  # `open_image` has a limit of its own, whose message names the size
STUBS = {
    "BUFR",
    "EPS",
    "GRIB",
    "HDF5",
    "MPEG",
    "PDF",
    "WMF",
}  # Pillow needs other programs for them


def _endings() -> set[str]:
    Image.init()
    known = Image.registered_extensions().items()
    return {ending for ending, name in known if name in Image.OPEN and name not in STUBS}


SUFFIXES = _endings()  # in lower case, with the dot
_FORMATS = [name for name in Image.ID if name not in STUBS]  # whatever a file's name says
# Photos and drawings that stay unread: they are counted and named, with what would help.
_HEIF = (".heic", ".heif", ".hif")
_OTHER = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".jxl", ".svg", ".eps")
UNREAD = {
    **dict.fromkeys(_HEIF, "install pillow-heif (pip install -e '.[heif]')"),
    **dict.fromkeys(_OTHER, "convert it to JPEG or PNG"),
}
UNREAD = {ending: help for ending, help in UNREAD.items() if ending not in SUFFIXES}


def ending(name: str) -> str:
    """Returns the ending of a file's name as SUFFIXES has it."""
    return f".{name.rpartition('.')[2].lower()}" if "." in name else ""


def printable(name: str) -> str:
    """Returns a name as text that can be printed, stored and drawn: composed (NFC), \\xe9 escaped.

    Bytes that are no UTF-8, which Python holds as surrogates, become backslash escapes.
    """
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return unicodedata.normalize("NFC", text)


# --- pixels ---------------------------------------------------------------------------------------


class _TooLarge(ValueError):
    """More pixels than `data.max_pixels`."""


def open_image(data: bytes, max_pixels: int, side: int) -> tuple[Image.Image, str]:
    """Returns a decoded file, upright, and its pixel format as stored; see `decoding.to_rgb`.

    Where metadata are at fault, it is read without them.
    """
    try:
        return _load(data, max_pixels, side)
    except _TooLarge:
        raise
    except Exception as error:  # noqa: BLE001 - Pillow raises many types on odd metadata
        try:
            return _load(_without_metadata(data), max_pixels, side, bare=True)
        except Exception:  # noqa: BLE001 - so the pixels are broken too
            if isinstance(error, Image.UnidentifiedImageError):
                raise ValueError("this is no image file") from error
            raise error from None


def _load(data: bytes, max_pixels: int, side: int, bare: bool = False) -> tuple[Image.Image, str]:
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    width, height = image.size
    mode, stored = image.mode, image.size
    if width * height > max_pixels:
        for scale in (2, 4, 8) if isinstance(image, JpegImagePlugin.JpegImageFile) and side else ():
            smaller = (width // scale, height // scale)
            if smaller[0] * smaller[1] <= max_pixels and min(smaller) >= side:
                image.draft(None, smaller)
                break
        if image.size[0] * image.size[1] > max_pixels:
            raise _TooLarge(
                f"{width}x{height} pixels is over the limit of {max_pixels:,} pixels "
                "(config.data.max_pixels)"
            )
    if bare:  # a TIFF reads its metadata once more after its pixels
        image.load_end = lambda: None
    image.load()
    if image.size != stored:
        image.info["stored"] = stored
    return _upright(image), mode


ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation; Pillow's own way stops at EXIF that it cannot write again."""
    try:
        turn = ORIENTATIONS.get(image.getexif().get(0x0112))
    except Exception:  # noqa: BLE001 - broken EXIF says nothing of the pixels
        turn = None
    if turn is None:
        return image
    if "stored" in image.info and turn in list(ORIENTATIONS.values())[3:]:
        image.info["stored"] = image.info["stored"][::-1]
    return image.transpose(turn)


def _without_metadata(data: bytes) -> bytes:
    """Returns a PNG or JPEG without its profiles, texts and EXIF; other files as they are."""
    kept, place = [], 8
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        kept.append(data[:8])
        while place + 8 <= len(data):
            end = place + 12 + int.from_bytes(data[place : place + 4])
            if data[place + 4 : place + 8] not in (b"iCCP", b"iTXt", b"zTXt", b"tEXt", b"eXIf"):
                kept.append(data[place:end])
            place = end
        return b"".join(kept)
    if data.startswith(b"\xff\xd8"):
        kept.append(data[:2])
        place = 2
        while data[place : place + 1] == b"\xff" and data[place + 1 : place + 2] != b"\xda":
            kind, end = data[place + 1], place + 2 + int.from_bytes(data[place + 2 : place + 4])
            if not (0xE1 <= kind <= 0xEF and kind != 0xEE) and kind != 0xFE:  # 0xEE: the colours
                kept.append(data[place:end])
            place = end
        return b"".join([*kept, data[place:]])
    return data
