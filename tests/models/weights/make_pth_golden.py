"""Writes tests/models/golden/*.pth with PyTorch, which the tests then read without it.

Run from the repository root with any PyTorch: python -m tests.models.weights.make_pth_golden
"""

from collections import OrderedDict
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden"


def values() -> dict[str, np.ndarray]:
    """The arrays in the files; those of a half type are exact in it."""
    rng = np.random.default_rng(0)
    small = rng.integers(-64, 64, (3, 4)).astype(np.float32) / 8
    return {
        "conv.weight": rng.standard_normal((4, 3, 2, 2)).astype(np.float32),
        "conv.transposed": rng.standard_normal((5, 2)).astype(np.float32).T,
        "conv.slice": rng.standard_normal((6, 3)).astype(np.float32)[2:4, 1:],
        "half": small,
        "bfloat16": small * 2,
        "double": rng.standard_normal(3).astype(np.float32),
        "bn.num_batches_tracked": np.array(1234, np.int64),
        "uint8": np.arange(7, dtype=np.uint8),
        "bool": np.array([True, False, True]),
        "empty": np.zeros((0, 3), np.float32),
    }


def main() -> None:
    """Writes each format, and a checkpoint that holds the state dict beside other things."""
    import torch

    arrays = values()
    slice_base = np.random.default_rng(1).standard_normal((6, 3)).astype(np.float32)
    slice_base[2:4, 1:] = arrays["conv.slice"]
    dtypes = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}
    state = OrderedDict()
    for name, array in arrays.items():
        if name == "conv.transposed":
            state[name] = torch.from_numpy(np.ascontiguousarray(array.T)).T
        elif name == "conv.slice":
            state[name] = torch.from_numpy(slice_base)[2:4, 1:]
        else:
            tensor = torch.from_numpy(np.array(array))
            state[name] = tensor.to(dtypes.get(name, tensor.dtype))
    state["conv.weight"] = torch.nn.Parameter(state["conv.weight"])
    state["shared"] = state["conv.weight"].detach()[0]
    state._metadata = OrderedDict({"": {"version": 1}, "bn": {"version": 2}})
    momentum = torch.ones(300)  # a storage that no entry of the state dict needs
    checkpoint = {"epoch": 3, "note": "x", "state_dict": state, "optimizer": {0: momentum}}

    GOLDEN.mkdir(exist_ok=True)
    for suffix, is_zip in (("zip", True), ("legacy", False)):
        torch.save(state, GOLDEN / f"{suffix}.pth", _use_new_zipfile_serialization=is_zip)
        torch.save(
            checkpoint, GOLDEN / f"checkpoint_{suffix}.pth", _use_new_zipfile_serialization=is_zip
        )


if __name__ == "__main__":
    main()
