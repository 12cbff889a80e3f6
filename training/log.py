"""What a run writes down as it goes: metrics.jsonl, TensorBoard events, and where it ran."""

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jax
from tensorboardX import SummaryWriter

from experiment.files import plain, read_lines

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pillow", "grain")


class MetricsLog:
    """Appends lines to `metrics.jsonl` and, if asked, to TensorBoard event files.

    A run that goes on from `step` drops the lines of later steps, for they come again.
    """

    def __init__(self, run_dir: Path, step: int, tensorboard: bool):
        path = run_dir / "metrics.jsonl"
        kept = [line for line in read_lines(path) if line["step"] <= step] if step else []
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed in `close`
        self.writer = None
        if tensorboard:
            self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def write(self, split: str, step: int, **values) -> None:
        """Writes one line: the split, the step, and named numbers or strings."""
        line = {"step": step, "split": split, **values}
        self.file.write(json.dumps(plain(line)) + "\n")
        self.file.flush()
        if self.writer:
            for name, value in values.items():
                if isinstance(value, float):
                    self.writer.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Flushes and closes both files."""
        self.file.close()
        if self.writer:
            self.writer.close()


def environment() -> dict:
    """Returns versions, devices, flags, git commit and command line."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(
                ["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    status = git("status", "--porcelain")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "devices": [str(device) for device in jax.devices()],
        "device_kind": jax.devices()[0].device_kind,
        "hosts": jax.process_count(),
        "cpu_count": os.cpu_count(),
        "flags": {
            key: os.environ[key] for key in ("XLA_FLAGS", "JAX_PLATFORMS") if key in os.environ
        },
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "command": sys.argv,
    }
