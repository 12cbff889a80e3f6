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
from training.checkpoint import CheckpointError, Checkpoints

TREE = {
    "params": {"stages.0.kernel": jnp.arange(6.0).reshape(2, 3)},
    "step": jnp.asarray(4, jnp.int32),
}


def saved(folder, kind="latest", step=4, tree=TREE, record=None):
    checkpoints = Checkpoints(folder)
    checkpoints.save(kind, step, tree, record or {})
    return checkpoints


def test_what_is_saved_comes_back(tmp_path):
    path = saved(tmp_path, record={"seconds": 1.5}).path("latest", 4)
    arrays, record = checkpoint.restore(path)
    assert sorted(arrays) == ["params/stages.0.kernel", "step"]
    tree = checkpoint.fit(TREE, arrays, path)
    np.testing.assert_array_equal(tree["params"]["stages.0.kernel"], np.arange(6.0).reshape(2, 3))
    assert tree["step"] == 4 and tree["step"].dtype == np.int32
    assert record == {"seconds": 1.5}


def test_the_newest_stay_and_what_a_kill_left_goes(tmp_path):
    checkpoints = saved(tmp_path, "best", 3)
    for kind, step in (("latest", 20), ("best", 40), ("latest", 100), ("best", 100)):
        checkpoints.save(kind, step, TREE, {})
    assert checkpoints.steps("latest") == [100] and checkpoints.steps("best") == [100, 40]
    half = tmp_path / "latest" / "200.orbax-checkpoint-tmp"
    half.mkdir()
    again = Checkpoints(tmp_path)
    assert again.steps("latest") == [100] and not half.exists()
    again.save("latest", 100, {"other": jnp.zeros(1)}, {})  # is there already: kept
    assert "step" in checkpoint.restore(again.path("latest", 100))[0]
    again.delete("latest", 100)
    assert again.steps("latest") == []


def test_damage_is_found(tmp_path):
    large = {"a": jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)))}
    path = saved(tmp_path, tree=large).path("latest", 4)
    files = [f for f in (path / "arrays").rglob("*") if f.is_file() and "/d/" in str(f)]
    biggest = max(files, key=lambda f: f.stat().st_size)
    data = bytearray(biggest.read_bytes())
    data[len(data) // 2] ^= 1
    biggest.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged|cannot read"):
        checkpoint.restore(path)
    biggest.write_bytes(data[:10])
    with pytest.raises(CheckpointError, match="cannot read"):
        checkpoint.restore(path)


def test_arrays_of_other_code_are_refused(tmp_path):
    path = saved(tmp_path).path("latest", 4)
    with pytest.raises(UserError, match="momentum.*one side only"):
        checkpoint.fit(TREE | {"momentum": jnp.zeros(1)}, checkpoint.restore(path)[0], path)


FULL = """
import resource, sys
from pathlib import Path
import numpy as np
from training import checkpoint
small, large = ({"a": np.random.default_rng(0).normal(size=n)} for n in (10, 10**6))
checkpoints = checkpoint.Checkpoints(Path(sys.argv[1]))
checkpoints.save("latest", 1, small, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))  # the next file over 1 MB fails
try:
    checkpoints.save("latest", 2, large, {})
except checkpoint.CheckpointError as error:
    print(error)
again = checkpoint.Checkpoints(Path(sys.argv[1]))
assert again.steps("latest") == [1], again.steps("latest")
assert (checkpoint.restore(again.path("latest", 1))[0]["a"] == small["a"]).all()
print("intact")
"""


def test_a_disk_without_room_names_the_path_and_keeps_the_previous_checkpoint(tmp_path):
    assert hasattr(resource, "RLIMIT_FSIZE")
    result = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert "intact" in result.stdout, result.stderr
    assert f"cannot write the checkpoint {Path(tmp_path).resolve()}/latest/2" in result.stdout
