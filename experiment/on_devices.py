"""Jobs as processes of this machine, one on a device at a time, or as many as are asked for."""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from errors import UserError
from experiment import jobs


class DevicePool:
    """Processes on this machine; `share` of them on each device."""

    verb = "running on"

    def __init__(
        self,
        command: Callable[[str], list[str]],
        workdir: Path,
        workers: int,
        environ: Mapping[str, str] = os.environ,
    ):
        self.command, self.workdir, self.environ = command, workdir, environ
        self.devices = devices(environ)
        if ("tpu", "") in self.devices and workers > 1:
            raise UserError(
                "--workers: the TPUs of a host belong to one process at a time, which uses all of "
                "them: leave --workers out"
            )
        count = len(self.devices)
        self.share = -(-workers // count) if workers else 1
        self.places = [self.devices[i % count][0] for i in range(workers or count)]

    def environment(self, place: int) -> dict[str, str]:
        """Returns the environment of a job at a place: its device, its part of the memory."""
        changed, (_, visible) = dict(self.environ), self.devices[place % len(self.devices)]
        if visible:
            changed["CUDA_VISIBLE_DEVICES"] = visible
            jobs.share_memory(changed, self.share)
        return changed

    def start(self, name: str, place: int) -> subprocess.Popen:
        """Starts a job."""
        log = jobs.log_file(self.workdir, name)
        return jobs.start(self.command(name), log, self.environment(place))

    def poll(self, handle: subprocess.Popen) -> int | None:
        """Returns a job's exit code or None."""
        return handle.poll()

    def stop(self, handle: subprocess.Popen) -> None:
        """Passes SIGTERM on."""
        handle.terminate()


def devices(environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """Returns the devices that jobs divide: (name, its CUDA_VISIBLE_DEVICES, "" for none).

    Asks nvidia-smi, for JAX would take memory of every GPU that it looks at.
    """
    wanted = environ.get("JAX_PLATFORMS") or "any"
    if wanted.startswith("cpu"):
        return [("cpu", "")]
    if any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        if "CUDA_VISIBLE_DEVICES" in environ:
            ids = re.match(
                r"[^,\-\s][^,\s]*(?:,[^,\-\s][^,\s]*)*|", environ["CUDA_VISIBLE_DEVICES"]
            )
            found = [(f"gpu {id_}", id_) for id_ in ids[0].split(",") if id_]
        else:
            found = _gpus()
        if found:
            return found
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    if chips and importlib.util.find_spec("libtpu"):
        return [("tpu", "")]
    return [("cpu", "")]


def _gpus() -> list[tuple[str, str]]:
    """Returns what nvidia-smi lists; of a GPU that is divided (MIG), the parts."""
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    found: dict[str, list[tuple[str, str]]] = {}
    gpu = ""
    for kind, number, uuid in re.findall(r"^\s*(GPU|MIG).*?(\d+):.*UUID: ([^)]+)\)", listed, re.M):
        if kind == "GPU":
            gpu = f"gpu {number}"
            found[gpu] = [(gpu, uuid)]
        else:
            whole = [place for place in found[gpu] if place[0] != gpu]
            found[gpu] = [*whole, (f"{gpu}.{number}", uuid)]
    return [place for places in found.values() for place in places]
