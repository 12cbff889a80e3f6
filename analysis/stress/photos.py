"""Test photos as they are stored, so that models of every image size meet the same one."""

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from analysis.forward import load_data, rows_of
from analysis.runs import FinishedRun
from analysis.stress.corruptions import corrupt
from data.decoding import MAX_PIXELS, resize, to_rgb
from input_pipeline import Dataset

LARGEST = (
    256  # shorter side of a photo that is corrupted, or the largest image size if that is more
)
FITTING = ("image_size", "store_size", "resize", "interpolation")  # fields of what follows


@dataclass(frozen=True)
class TestPart:
    """The test images of runs with one `config.data`, by their place in the predictions."""

    data: dict
    dataset: Dataset
    rows: np.ndarray  # of the dataset, int [N]

    @classmethod
    def of(cls, run: FinishedRun, data_path: str = "") -> "TestPart":
        """Returns that of a run; `data_path` is where the data lies now, "" for where it was."""
        dataset = load_data(run, data_path)
        return cls(run.config["data"], dataset, rows_of(dataset, run, "test"))

    @property
    def size(self) -> int:
        """Height and width in pixels of what the models see."""
        return self.data["image_size"]

    def clean(self, rows: np.ndarray) -> np.ndarray:
        """Returns images as the models see them: uint8 [n, S, S, 3]."""
        return self.dataset.decoded.images[self.rows[rows]]

    def stored(self, rows: np.ndarray, side: int = LARGEST) -> list[np.ndarray]:
        """Returns photos uint8 [H, W, 3] before resizing, their shorter side at most `side`."""
        background, limit = tuple(self.data["background"]), self.data.get("max_pixels", MAX_PIXELS)
        photos = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata that changes no pixel
            for row in self.rows[rows]:
                # A side of 1: what a run could decode in its own size is decoded in any.
                photo, _ = to_rgb(self.dataset.listing.read(row), background, limit, 1)
                photos.append(np.asarray(_at_most(photo, side)))
        self.dataset.listing.release()
        return photos

    def fitted(self, photo: np.ndarray) -> np.ndarray:
        """Resizes a photo uint8 [H, W, 3] as `config.data` says: [S, S, 3]."""
        how = self.data["resize"], self.data["interpolation"]
        return np.asarray(resize(Image.fromarray(photo), self.size, *how))


def _at_most(photo: Image.Image, side: int) -> Image.Image:
    shorter = min(photo.size)
    if shorter <= side:
        return photo
    width, height = (round(length * side / shorter) for length in photo.size)
    return photo.resize((width, height), Image.Resampling.BILINEAR)


def blocks(rows: np.ndarray, parts: dict[str, TestPart], limit: int) -> Iterator[np.ndarray]:
    """Yields the rows in blocks whose pixels take at most `limit` bytes in all parts together."""
    count = max(1, limit // sum(3 * part.size**2 for part in parts.values()))
    yield from np.array_split(rows, -(-len(rows) // count))


def corrupted(
    parts: dict[str, TestPart], rows: np.ndarray, conditions: Sequence[tuple[str, int]]
) -> dict[str, np.ndarray]:
    """Returns rows of each part under each corruption and severity: uint8 [C, n, S, S, 3].

    The stored photo is corrupted and then resized for each part.
    """
    side = max(LARGEST, *(part.size for part in parts.values()))
    by_source: dict[str, list[str]] = {}  # parts that differ in resizing alone
    for key, part in parts.items():
        stored = {name: value for name, value in part.data.items() if name not in FITTING}
        by_source.setdefault(json.dumps(stored, sort_keys=True), []).append(key)
    pixels = {
        key: np.empty((len(conditions), len(rows), part.size, part.size, 3), np.uint8)
        for key, part in parts.items()
    }
    for keys in by_source.values():
        for i, photo in enumerate(parts[keys[0]].stored(rows, side)):
            for c, condition in enumerate(conditions):
                changed = corrupt(photo, *condition)
                for key in keys:
                    pixels[key][c, i] = parts[key].fitted(changed)
    return pixels
