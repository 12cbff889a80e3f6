"""What machines lack that this code relies on: a home folder, locks, memory that is kept."""

import ctypes
import fcntl
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from errors import UserError

LAUNCHER = "ARCHCOMPARE_LAUNCHER"  # names the process that a job ends with
# Options of mounts whose locks hold on one host alone: NFS, then Lustre.
LOCAL_LOCKS = {"nolock", "local_lock=all", "local_lock=flock", "localflock"}
TRY_LOCK = """
import fcntl, sys
try:
    fcntl.flock(open(sys.argv[1], "w"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit(3)
"""


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


def held(path: Path) -> bool:
    """Returns whether another process holds a lock file; False if there is none."""
    if not path.exists():
        return False
    with locked(path) as free:
        return not free


def check_locks(folder: Path, hosts: bool = False) -> None:
    """Shows that a lock held by one process is refused to another; `hosts`: on another host too.

    Raises:
      UserError: they would train one run at once; it names the file system.
    """
    path = folder / ".lock-test"
    with locked(path) as ours:  # if not, another process shows the same at this moment
        asked = [sys.executable, "-I", "-c", TRY_LOCK, str(path)]
        refused = not ours or subprocess.run(asked, capture_output=True).returncode == 3
    kind, point, options = _mount(folder)
    local = sorted(LOCAL_LOCKS & options) if hosts else []
    if local or not refused:
        what = f"locks that hold on one host alone ({', '.join(local)})" if local else "no locks"
        raise UserError(
            f"--workdir={folder} lies on {kind} ({point}) with {what}, so two processes could "
            "train one run at once: choose a folder on another file system, or mount this one with "
            "locks (NFS: without nolock and local_lock; Lustre: with flock). Without --launch, one "
            "process trains all runs and needs none"
        )


def _mount(folder: Path) -> tuple[str, str, set[str]]:
    """Returns the type of a folder's file system, where it is mounted, and its options."""
    found, mounts = ("a file system", "unknown", set()), Path("/proc/self/mounts")
    lines = mounts.read_text(errors="replace").splitlines() if mounts.exists() else []
    for line in lines:
        _, point, kind, options, *_ = line.split()
        point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), point)
        inside = folder.resolve().is_relative_to(point)
        if inside and (found[1] == "unknown" or len(point) >= len(found[1])):
            found = kind, point, set(options.split(","))
    return found


def end_with_launcher() -> None:
    """Has Linux send SIGTERM to this job when the process that launched it dies, killed or not."""
    launcher = os.environ.pop(LAUNCHER, "")
    if not launcher or not sys.platform.startswith("linux"):
        return
    set_parent_death_signal = 1  # of <sys/prctl.h>
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != int(launcher):
        os.kill(os.getpid(), signal.SIGTERM)  # it died before
