"""Which of several hosts this process is: told by options, or by what launched it."""

import os
import re
from dataclasses import dataclass

from jax._src import clusters

from errors import UserError


@dataclass
class Place:
    """Which of several hosts this process is."""

    coordinator: str | None  # host:port of the first; None where JAX finds it
    count: int
    index: int
    devices: tuple[int, ...] = ()  # of this host that are its own; () for all


def find_place(coordinator: str | None, count: int | None, index: int | None) -> Place | None:
    """Returns this process' place among hosts, from three options or what launched it.

    None if it is alone: a job with one task is, whatever else the environment says.

    Raises:
      UserError: the options are not complete, or it cannot be known where the first host is.
    """
    options = {"--coordinator": coordinator, "--hosts": count, "--host": index}
    given = [name for name, value in options.items() if value is not None]
    if given == ["--hosts"] and count == 1:
        return None
    if len(given) == 3:
        if not re.fullmatch(r".+:\d+", coordinator):
            raise UserError(f"--coordinator={coordinator}: write HOST:PORT of the first host")
        if index >= count:
            raise UserError(f"--host={index}: of {count} hosts, the last one is {count - 1}")
        return Place(coordinator, count, index) if count > 1 else None
    place = None if given not in ([], ["--coordinator"]) else _launched(coordinator)
    if given and place is None:
        raise UserError(
            f"{', '.join(given)} alone: several hosts need --coordinator=HOST:PORT, --hosts=N and "
            "--host=I; under SLURM, Open MPI, Kubernetes or on a TPU pod, none"
        )
    return place


def _launched(address: str | None) -> Place | None:
    """Returns the place that SLURM, Open MPI, Kubernetes or a TPU pod gave this process."""
    env = os.environ
    if "OMPI_COMM_WORLD_SIZE" in env:  # asked first: mpirun itself may run under SLURM
        count, index, local, beside = (
            int(env.get(f"OMPI_COMM_WORLD_{name}", 0))
            for name in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")
        )
        address = address or env.get("JAX_COORDINATOR_ADDRESS")
        if count > 1 and not address and not clusters.OmpiCluster.is_env_present():
            raise UserError(  # Open MPI 5
                f"Open MPI runs {count} processes and does not say where the first one is: add "
                "--coordinator=HOST:PORT, or --hosts=1 for runs of their own"
            )
        place = Place(address, count, index, _own_device(local, beside > 1))
    elif clusters.SlurmCluster.is_env_present():
        count = int(env.get("SLURM_STEP_NUM_TASKS", 1))  # of this step, not of the job
        tasks = env.get("SLURM_STEP_TASKS_PER_NODE", "1")  # such as 4(x2),1
        several = any(int(n) > 1 for n in re.findall(r"(?:^|,)(\d+)", tasks))
        local = _own_device(int(env["SLURM_LOCALID"]), several)
        place = Place(address, count, int(env["SLURM_PROCID"]), local)
    else:
        kinds = [clusters.GkeTpuCluster, clusters.GceTpuCluster]
        if "JOB_COMPLETION_INDEX" in env:  # of an indexed job; any pod is in Kubernetes
            kinds.append(clusters.K8sCluster)
        cluster = next((kind for kind in kinds if kind.is_env_present()), None)
        if cluster is None:
            return None
        place = Place(address, cluster.get_process_count(), cluster.get_process_id())
    return place if place.count > 1 else None


def _own_device(local: int, several: bool) -> tuple[int, ...]:
    """Returns the device of one of `several` processes on a machine; () where it sees no other."""
    bound = len(os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")) == 1
    return (local,) if several and not bound else ()
