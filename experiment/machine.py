"""What machines lack that this code relies on: a home folder, locks, a backend for pictures."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def prepare() -> None:
    """Mends the environment before libraries read it.

    Pictures go to files, so the backend of a notebook does not matter. Caches go into a folder for
    temporary files where there is no home, as for an unknown user in a container.
    """
    os.environ["MPLBACKEND"] = "Agg"
    try:
        Path.home()
    except RuntimeError:
        folder = Path(tempfile.gettempdir()) / f"archcompare-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        os.environ["HOME"] = str(folder)


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Holds a lock file; yields False where another process holds it and `wait` is not set.

    On a file system without locks, it is always had.
    """
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass
        yield True
