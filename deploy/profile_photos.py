"""The photos that `deploy.profile` decodes: of a folder, of the run's test part, or drawn."""

import io
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from analysis.predict import decode_image, find_images
from analysis.runs import FinishedRun, evenly_spaced
from data.decoding import to_rgb
from data.sources import list_source
from errors import UserError

MOST = 32  # evenly spaced among those that there are


def photos_in(folder: str) -> list[bytes]:
    """Returns image files of a folder, whole; raises UserError where it holds none."""
    if not Path(folder).expanduser().is_dir():
        raise UserError(f"--photos={folder} is no folder")
    paths = find_images([folder])
    return [Path(paths[i]).read_bytes() for i in evenly_spaced(len(paths), MOST)]


def write_photos(
    folder: Path, facts: dict, run: FinishedRun | None, given: list[bytes]
) -> tuple[Path, str]:
    """Writes the photos that a model shall decode into a new folder, and says what they are.

    `facts` are those of `predict.decode_image`. Raises UserError if none given can be read.
    """
    images, what, why = given, "photos of --photos", "for a file has no photos"
    if not given and run:
        images, what, why = _test_photos(run)
    sound = [image for image in images if _sound(facts, image)]
    if given and not sound:
        raise UserError("--photos: none of the images looked at can be read; give other photos")
    if not sound:
        side, draw = facts["image_size"], np.random.default_rng(0)
        noise = draw.integers(0, 256, (8, side, side, 3), np.uint8)
        sound = [_jpeg(image) for image in noise]
        what = f"random JPEG, {side}x{side}, {why}; --photos=FOLDER gives others"
    folder.mkdir()
    for i, image in enumerate(sound):
        (folder / f"{i:03d}").write_bytes(image)
    return folder, what


def _test_photos(run: FinishedRun) -> tuple[list[bytes], str, str]:
    """Returns test images as stored, arrays as JPEG, in words, too; none without data, and why."""
    why = "for no test image can be read"
    try:
        listing = list_source(ConfigDict(run.config["data"]))
        rows = {name: row for row, name in enumerate(listing.ids)}
        known = [rows[name] for name in run.test["ids"].tolist() if name in rows]
        images = [listing.read(known[i]) for i in evenly_spaced(len(known), MOST)]
    except (UserError, OSError) as error:
        return [], "", f"{why} ({' '.join(str(error).split())[:200]})"
    what = "the run's test images" + ", as JPEG" * any(not isinstance(x, bytes) for x in images)
    return [x if isinstance(x, bytes) else _jpeg(x) for x in images], what, why


def _jpeg(image: np.ndarray) -> bytes:
    rgb, _ = to_rgb(image, (255, 255, 255))
    rgb.save(file := io.BytesIO(), "JPEG", quality=90)
    return file.getvalue()


def _sound(facts: dict, image: bytes) -> bool:
    try:
        decode_image(facts, image)
    except Exception:  # noqa: BLE001 - Pillow raises many types on broken files
        return False
    return True
