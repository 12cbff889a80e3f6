"""What machines lack that this code relies on: a home folder, locks, memory that is kept."""

import ctypes
import fcntl
import os
import sys
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
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed, unless ARCHCOMPARE_MALLOC=system.

    A step on a CPU asks for all of its arrays anew. By default large ones come from the kernel each
    time, whose zeroed pages cost up to half of the step: see docs/performance.md.
    """
    if not sys.platform.startswith("linux") or os.environ.get("ARCHCOMPARE_MALLOC") == "system":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another library, such as musl
        return
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # of <malloc.h>
    for option, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, -1)):
        mallopt(option, value)


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
