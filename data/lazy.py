"""Images that are decoded whenever they are asked for, and indexed as an array of them is."""

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np


@functools.cache
def _workers() -> ThreadPoolExecutor:
    """The threads that decode: Pillow lets go of Python's lock while it does."""
    return ThreadPoolExecutor(os.cpu_count(), "decode")


class LazyImages:
    """Images uint8 [N, S, S, 3], of which none is kept.

    Args:
      decode: gives image i as uint8 [S, S, 3]; it runs in threads, and what it raises is passed on.
      shape: (N, S, S, 3). `nbytes` is what all images would take.
      rows: the images that `decode` knows as others than 0 .. N - 1.
    """

    dtype, ndim = np.dtype(np.uint8), 4

    def __init__(
        self,
        decode: Callable[[int], np.ndarray],
        shape: tuple[int, int, int, int],
        rows: np.ndarray | None = None,
    ):
        self.decode, self.shape, self.rows = decode, shape, rows
        self.nbytes = math.prod(shape)

    def __len__(self) -> int:
        return self.shape[0]

    def select(self, rows: np.ndarray) -> "LazyImages":
        """Returns some of the images, still to be decoded."""
        rows = rows if self.rows is None else self.rows[rows]
        return LazyImages(self.decode, (len(rows), *self.shape[1:]), rows)

    def __getitem__(self, index) -> np.ndarray:
        """Decodes the images at a number, a slice, a mask, or an array of numbers.

        What indexes further axes, as `images[:, :, ::-1]` does, needs all of them.
        """
        if isinstance(index, tuple) or index is Ellipsis or index is None:
            return np.asarray(self)[index]
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        places = np.asarray(index)
        if places.dtype == bool:
            places = np.flatnonzero(places)
        if places.size and not -len(self) <= places.min() <= places.max() < len(self):
            raise IndexError(f"{index} is out of range for {len(self)} images")
        places = places.astype(int) % max(1, len(self))
        rows = places if self.rows is None else self.rows[places]
        images = np.empty((rows.size, *self.shape[1:]), np.uint8)

        def fill(some: np.ndarray) -> None:
            for place in some.tolist():
                images[place] = self.decode(int(rows.flat[place]))

        # A few images at once, for handing them over one by one costs as much as a small one.
        list(_workers().map(fill, np.array_split(np.arange(rows.size), 1 + rows.size // 8)))
        return images.reshape(*rows.shape, *self.shape[1:])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:].astype(dtype or np.uint8, copy=False)
