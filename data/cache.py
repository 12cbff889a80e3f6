"""Entries of a cache on disk: folders that are whole or absent, whatever is killed meanwhile."""

import hashlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def temporary_folder(entry: Path) -> Iterator[Path]:
    """Makes a folder to fill beside an entry, for `put_in_place`; what is left of it is deleted."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".part-{machine()}-{os.getpid()}-"
    work = Path(tempfile.mkdtemp(dir=entry.parent, prefix=prefix))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def put_in_place(work: Path, entry: Path, sound: Callable[[], bool]) -> None:
    """Renames a finished folder to its entry.

    One in its way stays if it is `sound`: another process was faster, with the same content. A
    damaged one is moved aside and deleted.
    """
    try:
        work.rename(entry)
    except OSError:
        if sound():
            return
        aside = Path(tempfile.mkdtemp(dir=entry.parent, prefix=f"{work.name}-"))
        try:
            entry.rename(aside / "damaged")
            work.rename(entry)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def machine() -> str:
    """Returns a name of this machine; containers on it, which number processes anew, differ."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = 0
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]


def sweep(folder: Path) -> None:
    """Deletes what killed processes left behind: of this machine at once, of others after a day."""
    for path in folder.glob(".part-*"):
        where, _, rest = path.name.removeprefix(".part-").partition("-")
        pid = rest.partition("-")[0]
        try:
            if where == machine() and pid.isdigit():
                gone = not _alive(int(pid))
            else:
                newest = max(file.stat().st_mtime for file in (path, *path.iterdir()))
                gone = time.time() - newest > 86400
        except OSError:  # it went away meanwhile
            continue
        if gone:
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
