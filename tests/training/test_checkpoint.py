import resource
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from errors import UserError
from tests.conftest import ROOT
from training import checkpoint
from training.checkpoint import CheckpointError

TREE = {
    "params": {"stages.0.kernel": jnp.arange(6.0).reshape(2, 3)},
    "step": jnp.asarray(4, jnp.int32),
}


def restore(path, template):
    arrays, record = checkpoint.restore_arrays(path)
    return checkpoint.fit(template, arrays, path), record


def test_what_is_saved_comes_back(tmp_path):
    path = checkpoint.save(tmp_path, "latest", 4, TREE, {"seconds": 1.5})
    tree, record = restore(path, TREE)
    np.testing.assert_array_equal(tree["params"]["stages.0.kernel"], np.arange(6.0).reshape(2, 3))
    assert tree["step"] == 4 and tree["step"].dtype == np.int32
    assert record == {"seconds": 1.5}
    arrays, _ = checkpoint.restore_arrays(path)
    assert sorted(arrays) == ["params/stages.0.kernel", "step"]


def test_newest_first_and_keep(tmp_path):
    paths = [
        checkpoint.save(tmp_path, kind, step, TREE, {})
        for kind, step in (("best", 3), ("latest", 20), ("latest", 100))
    ]
    (tmp_path / "latest-000000200.orbax-checkpoint-tmp-1").mkdir()
    assert checkpoint.find(tmp_path, "latest") == [paths[2], paths[1]]
    checkpoint.keep(tmp_path, [paths[0], paths[2]])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([paths[0].name, paths[2].name])


def test_damage_is_found(tmp_path):
    large = {"a": jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)))}
    path = checkpoint.save(tmp_path, "latest", 1, large, {})
    files = [f for f in (path / "arrays").rglob("*") if f.is_file() and "/d/" in str(f)]
    biggest = max(files, key=lambda f: f.stat().st_size)
    data = bytearray(biggest.read_bytes())
    data[len(data) // 2] ^= 1
    biggest.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged|cannot read"):
        restore(path, large)
    biggest.write_bytes(data[:10])
    with pytest.raises(CheckpointError, match="cannot read"):
        restore(path, large)


def test_arrays_of_other_code_are_refused(tmp_path):
    path = checkpoint.save(tmp_path, "latest", 1, TREE, {})
    with pytest.raises(UserError, match="momentum.*one side only"):
        restore(path, TREE | {"momentum": jnp.zeros(1)})


FULL = """
import resource, sys
from pathlib import Path
import numpy as np
from training import checkpoint
small, large = ({"a": np.random.default_rng(0).normal(size=n)} for n in (10, 10**6))
directory = Path(sys.argv[1])
first = checkpoint.save(directory, "latest", 1, small, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))  # the next file over 1 MB fails
try:
    checkpoint.save(directory, "latest", 2, large, {})
except checkpoint.CheckpointError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
assert checkpoint.find(directory, "latest") == [first], list(directory.iterdir())
assert (checkpoint.restore_arrays(first)[0]["a"] == small["a"]).all()
print("intact")
"""


def test_a_disk_without_room_names_the_path_and_keeps_the_previous_checkpoint(tmp_path):
    assert hasattr(resource, "RLIMIT_FSIZE")
    result = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert "intact" in result.stdout, result.stderr
    assert (
        f"cannot write the checkpoint {Path(tmp_path).resolve()}/latest-000000002" in result.stdout
    )
