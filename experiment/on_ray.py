"""Jobs as tasks of Ray, each of which starts a process and waits for it. Imports no JAX."""

import contextlib
import os
import re
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from errors import UserError
from experiment import jobs
from experiment.machine import held, locked

LOST_WORKERS = 3  # times that Ray starts a task again whose worker or node is lost
CARRIED = ("JAX_", "XLA_", "TF_", "HF_", "ARCHCOMPARE_")  # of the environment, to every node


def run_job(command: list[str], log: str, cwd: str, environ: dict[str, str], share: int) -> int:
    """Runs one job in a worker of Ray, on the GPU that Ray chose; returns its exit code."""
    os.chdir(cwd)
    environ = {
        key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"
    } | environ
    jobs.share_memory(environ, share)
    process = jobs.start(command, Path(log), environ)
    try:
        while process.poll() is None:  # in steps, for Ray's cancelling ends no system call
            time.sleep(0.2)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    return process.returncode


def sees(workdir: str, plan: str) -> str:
    """Returns what a node lacks: the workdir, or locks that this machine's hold against."""
    folder = Path(workdir)
    if (
        not (folder / "experiment.json").exists()
        or (folder / "experiment.json").read_text() != plan
    ):
        return "does not see the workdir"
    return "" if held(folder / ".lock-test") else "sees no locks of other hosts there"


class RayPool:
    """Tasks of Ray, each with a GPU where the cluster has any."""

    verb = "given to"  # which starts it when a node is free

    def __init__(self, ray, command: Callable[[str], list[str]], workdir: Path, places: int, share):
        self.ray, self.command, self.workdir = ray, command, workdir.absolute()
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        self.share = max(1, -(-share // gpus)) if gpus else 1
        kind = "gpu" if gpus else "cpu"
        self.places = [f"ray ({kind})"] * places
        use = {"num_gpus": 1 / self.share} if gpus else {"num_cpus": 1}
        self.task = ray.remote(max_retries=LOST_WORKERS, **use)(run_job)

    def start(self, name: str, place: int):
        """Submits a job."""
        environ = {k: v for k, v in os.environ.items() if k.startswith(CARRIED)}
        log = str(jobs.log_file(self.workdir, name))
        return self.task.remote(self.command(name), log, os.getcwd(), environ, self.share)

    def poll(self, handle) -> int | None:
        """Returns a job's exit code; None while it runs or waits for a node."""
        if not self.ray.wait([handle], timeout=0)[0]:
            return None
        try:
            return self.ray.get(handle)
        except self.ray.exceptions.RayError:  # cancelled, or workers were lost too often
            return -9

    def stop(self, handle) -> None:
        """Interrupts a task, which passes it on to its process."""
        self.ray.cancel(handle)


@contextlib.contextmanager
def pool(
    command: Callable[[str], list[str]], workdir: Path, workers: int, address: str, most: int
) -> Iterator[RayPool]:
    """Opens Ray, on this machine or at an address, and a pool of `workers` places, or `most`.

    Raises:
      UserError: no cluster at the address, or a node that does not share the workdir.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray starts its processes by fork and exec, about which JAX warns.
    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
    import ray

    quiet = {"log_to_driver": False, "logging_level": "error", "configure_logging": True}
    try:
        if address:
            if at := re.fullmatch(r"([\w.-]+):(\d+)", address):  # for which Ray waits minutes
                socket.create_connection((at[1], int(at[2])), timeout=10).close()
            ray.init(address=address, **quiet)
        else:
            ray.init(
                num_cpus=workers or None,
                include_dashboard=False,
                object_store_memory=100 * 2**20,
                **quiet,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--ray_address={address}: no cluster of Ray could be reached: {error}"
        ) from error
    try:
        check_nodes(ray, workdir.absolute())
        yield RayPool(ray, command, workdir, min(workers or most, most), workers)
    finally:
        ray.shutdown()


def check_nodes(ray, workdir: Path) -> None:
    """Raises a UserError unless every node sees the workdir, and in it the locks of this host."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    plan = (workdir / "experiment.json").read_text()
    with locked(workdir / ".lock-test"):
        for node in ray.nodes():
            if not node["Alive"]:
                continue
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(num_cpus=0, scheduling_strategy=there)(sees)
            if lacks := ray.get(task.remote(str(workdir), plan)):
                raise UserError(
                    f"--launch=ray: the node {node['NodeManagerHostname']} {lacks}: {workdir} must "
                    "lie on a file system that all nodes share, with locks"
                )
