"""The small files of a run directory: JSON that is whole or absent, and lines of metrics."""

import json
import math
import os
from pathlib import Path

from errors import UserError


def write_json(path: Path, content: dict) -> None:
    """Writes JSON so that the file is whole or absent; NaN and infinity become null."""
    half = path.with_name(f"{path.name}.{os.getpid()}.part")
    text = json.dumps(plain(content), indent=2, ensure_ascii=False)
    # A path need not be UTF-8; its odd bytes become escapes, which JSON reads again.
    half.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    os.replace(half, path)


class DamagedFile(UserError, ValueError):
    """A JSON file cannot be read."""


def read_json(path: Path) -> dict:
    """Returns the content of a JSON file, {} if there is none; raises DamagedFile."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        whole = path.name in ("config.json", "dataset.json", "summary.json")  # of a run directory
        cure = path.parent if whole else path
        raise DamagedFile(f"{path} is not valid JSON ({error}): delete {cure}") from error


def run_dirs(workdir: Path) -> list[Path]:
    """Returns the run directories of a workdir, in any state, by name."""
    return sorted(p for name in ("seed*", "fold*_seed*") for p in workdir.glob(f"*/{name}"))


def read_status(run_dir: Path) -> str | None:
    """Returns the status in a run's summary, None where there is no readable one."""
    try:
        return read_json(run_dir / "summary.json").get("status")
    except ValueError:
        return None


def plain(value):
    """Returns the value with every number that JSON cannot hold replaced by None."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_lines(path: Path) -> list[dict]:
    """Returns the lines of a metrics.jsonl; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
