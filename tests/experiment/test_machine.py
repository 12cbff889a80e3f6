import errno
import fcntl
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from experiment import machine
from experiment.machine import locked
from tests.conftest import ROOT


def test_a_lock_is_had_once(tmp_path):
    with locked(tmp_path / "lock") as ours:
        assert ours
        with locked(tmp_path / "lock") as second:
            assert not second
    with locked(tmp_path / "lock", wait=True) as again:
        assert again


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "lock") as ours:
        assert ours


NOBODY = """
import os, pwd, sys
def unknown(uid):
    raise KeyError(uid)
pwd.getpwuid = unknown
import analysis.report
import matplotlib, pathlib
print(matplotlib.get_backend().lower(), pathlib.Path.home().is_dir())
"""


def test_neither_home_nor_user_nor_backend(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "MPLCONFIGDIR")}
    environment |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    environment |= {"TMPDIR": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", NOBODY], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.stdout.split() == ["agg", "True"], done.stderr


@pytest.mark.parametrize("library", ["glibc", "other", "switched off"])
def test_freed_memory_is_kept_where_glibc_can(monkeypatch, library):
    called = []
    functions = {} if library == "other" else {"mallopt": lambda *a: called.append(a)}
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: SimpleNamespace(**functions))
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setenv("ARCHCOMPARE_MALLOC", "system" if library == "switched off" else "")
    machine.keep_freed_memory()
    assert len(called) == (3 if library == "glibc" else 0)
