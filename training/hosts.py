"""One run on several hosts: how they find one another, agree, and end together.

Each host is one process. All run the same command and the same programs, each on its share of every
batch. The first one alone reads and writes the experiment's folder, so that folder need not be
shared; what the others write goes to a folder of their own, which is deleted.
"""

import atexit
import contextlib
import json
import os
import pickle
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from errors import UserError
from experiment.runner import STOPPED, Signals
from input_pipeline import to_devices
from training.place import Place, find_place

JOIN_SECONDS = 300  # for all hosts to start
HEARTBEAT_SECONDS = 60  # of silence until JAX ends all hosts, where no connection breaks before
FAILED_SECONDS = 30  # that a host whose run failed waits for the same from all others
END = "archcompare/end"  # key under which a host says why all end
BROKEN = re.compile("gloo|nccl|rccl|connection|coordination|heartbeat|unavailable", re.IGNORECASE)


_place: Place | None = None  # of this process, once it joined others
_own_folders: list[str] = []  # see `own_folder`


class Lost(Exception):
    """Another host ended, so this one cannot go on."""

    @classmethod
    def says(cls, error: BaseException) -> str:
        """Returns what broke, if an error tells of a broken connection, else ""."""
        text = f"{error}".split("\n")[0].split("dispatching computation: ")[-1]
        known = isinstance(error, (UserError, OSError)) or not BROKEN.search(f"{error}")
        return "" if known else text


# --- joining ------------------------------------------------------------------------------------


def among_hosts(main: Callable[[list[str]], int | None]) -> Callable[[list[str]], int | None]:
    """Returns `main(argv)` as one of several hosts, if options or the environment ask for it.

    Defines the options. A failure of one host ends all of them, each with a message.
    """
    coordinator = flags.DEFINE_string("coordinator", None, "HOST:PORT of the first of some hosts")
    count = flags.DEFINE_integer("hosts", None, "How many hosts train a run", lower_bound=1)
    index = flags.DEFINE_integer("host", None, "Which of them this one is, from 0", lower_bound=0)

    def joined(argv: list[str]) -> int | None:
        place = find_place(coordinator.value, count.value, index.value)
        if place is None:
            return main(argv)
        try:
            join(place)
            check_command()
            code = main(argv)
            leave()
        except BaseException as error:
            if not _connected():  # not yet, or no more
                raise
            _watch.over.set()
            end_all(error)
        return code

    return joined


def join(place: Place) -> None:
    """Waits for all hosts and connects them; must come before JAX looks for devices.

    Raises:
      UserError: they could not be connected; where that takes too long, the process ends with it.
    """
    global _place
    where = place.coordinator or "the place that the launcher names"
    missing = f"not all {place.count} hosts came to {where} within {JOIN_SECONDS} s"

    def give_up() -> None:  # JAX would end the process without a word on the cause
        print(f"error: {missing}: is each one started, and the address right?", file=sys.stderr)
        sys.stderr.flush()
        os._exit(2)

    if place.index:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the first host speaks for all
    elif place.coordinator:
        _check_port(int(place.coordinator.rpartition(":")[2]))
    print(f"waiting for {place.count} hosts at {where}", file=sys.stderr, flush=True)
    python_handler = signal.signal(signal.SIGINT, signal.SIG_DFL)  # JAX waits outside Python
    timer = threading.Timer(JOIN_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            *(place.coordinator, place.count, place.index, list(place.devices)),
            initialization_timeout=2 * JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
        _place = place
        total, own = jax.device_count(), jax.local_device_count()
        if total != place.count * own:
            raise UserError(
                f"host {place.index} has {own} of the {total} devices of {place.count} hosts: each "
                "needs the same number"
            )
        # The first collective connects the hosts, for which it waits half a minute at most.
        multihost_utils.sync_global_devices("joined")
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the hosts cannot be connected: {error}") from error
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, python_handler)
    _watch.start()


def _check_port(port: int) -> None:
    """Raises a UserError where another program uses it, for JAX would end without a word."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"--coordinator: port {port} of this host cannot be used ({error.strerror}): "
                "choose another, on all hosts"
            ) from error


def check_command() -> None:
    """Raises a UserError where this host was started with another command than the first."""
    of_this = r"(?:^|\0)--?(?:host|coordinator)[=\0][^\0]*"  # --host=1 and --host 1
    own = re.sub(of_this, "", "\0".join(sys.argv[1:])).split("\0")
    if own != (first := agreed(own)):
        different = sorted(set(own) ^ set(first))
        raise UserError(
            f"hosts of one run need the same command; these differ: {' '.join(different)}. "
            "Processes that train runs of their own need --hosts=1"
        )


# --- agreeing -----------------------------------------------------------------------------------


def several() -> bool:
    """Returns whether this process is one of several hosts."""
    return _place is not None


def is_first() -> bool:
    """Returns whether this process, alone or the first of several hosts, keeps the results."""
    return _place is None or _place.index == 0


def agreed(value: Any) -> Any:
    """Returns on all hosts what the first one passes, which pickles; all must call it."""
    if not several():
        return value
    data = np.frombuffer(pickle.dumps(value), np.uint8) if is_first() else np.zeros(0, np.uint8)
    length = np.array(divmod(len(data), 2**20), np.int32)
    mebibytes, rest = multihost_utils.broadcast_one_to_all(length).tolist()
    length = mebibytes * 2**20 + rest
    # Few sizes, for a program is compiled for each.
    size = (mebibytes + 1) * 2**20 if mebibytes else max(1024, 1 << length.bit_length())
    buffer = np.zeros(size, np.uint8)
    buffer[: len(data)] = data
    return pickle.loads(multihost_utils.broadcast_one_to_all(buffer)[:length].tobytes())


def all_have(found: bool) -> bool:
    """Returns whether `found` is true on every host."""
    return bool(multihost_utils.process_allgather(np.array(found)).all()) if several() else found


def in_same_order(groups: list[list]) -> list[list]:
    """Returns groups of runs in the order that they have on the first host."""
    runs = {run.name: run for group in groups for run in group}
    names = agreed([[run.name for run in group] for group in groups])
    return [[runs[name] for name in group] for group in names]


def whole(array: jax.Array) -> np.ndarray:
    """Returns all of an array that is divided over hosts, which all call this."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def put(tree: Any, everywhere: NamedSharding) -> Any:
    """Copies a tree of arrays, alike on all hosts, to every device."""
    if not several():
        return jax.device_put(jax.tree.map(jnp.asarray, tree), everywhere)
    return jax.tree.map(lambda array: to_devices(np.asarray(array), everywhere), tree)


def own_folder(workdir: Path) -> Path:
    """Returns the experiment's folder; on other hosts than the first, one that is deleted."""
    if is_first():
        return workdir
    folder = tempfile.mkdtemp(prefix="archcompare-host-")
    _own_folders.append(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


class HostSignals(Signals):
    """Signals to any host stop all of them at the same step.

    Every host asks `requested` equally often, so their questions are counted: JAX spreads the news
    of a SIGTERM in the background and finds the next question that none of them has asked yet.
    """

    def __init__(self):
        self._asked, self._failed, self._stopped = 0, 0, False
        signal.signal(signal.SIGINT, self._interrupt)  # that of SIGTERM is JAX's own

    @property
    def requested(self) -> bool:
        """Whether to save and stop now."""
        if not self._stopped:
            self._asked += 1
            self._stopped = multihost_utils.reached_preemption_sync_point(self._asked)
        return self._stopped

    def _interrupt(self, number: int, frame) -> None:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)

    agreed = staticmethod(agreed)

    def all_failed(self, error: Exception) -> bool:
        """Returns whether a run failed on every host, so that all go on with the next.

        Raises:
          Lost: it failed for want of another host.
        """
        if broken := Lost.says(error):
            raise Lost(broken) from error
        self._failed += 1
        try:
            name = f"archcompare/failed-{self._failed}"
            distributed.global_state.client.wait_at_barrier(name, FAILED_SECONDS * 1000)
        except Exception:  # noqa: BLE001 - whatever it is, they did not all come
            return False
        return True


def _connected() -> bool:
    return distributed.global_state.client is not None


def signals() -> Signals:
    """Returns what turns signals into requests to stop."""
    return HostSignals() if several() else Signals()


# --- leaving ------------------------------------------------------------------------------------


def leave(stop: Signals | None = None) -> Signals | None:
    """Parts the hosts, when all have come here; returns the signals of the first, which goes on.

    After that, `several` still holds, but a program must be of local devices. None on the others.
    """
    if not several() or not _connected():
        return stop
    # While all come, the watch sees a host that ended; JAX would wait a minute and abort.
    distributed.global_state.client.wait_at_barrier("archcompare/leave", JOIN_SECONDS * 1000)
    _watch.over.set()
    _watch.join()
    jax.distributed.shutdown()
    return Signals() if is_first() else None


class Watch(threading.Thread):
    """Looks every second whether a host said why all must end; ends this one then."""

    def __init__(self):
        super().__init__(daemon=True)
        self.over = threading.Event()

    def run(self) -> None:
        """Looks until `over` is set."""
        while not self.over.wait(1.0):
            if told := said():
                _exit(told["text"], told["code"])


_watch = Watch()


def said() -> dict | None:
    """Returns why all hosts end, {"text", "code"}, if one of them said so."""
    try:
        return json.loads(distributed.global_state.client.key_value_try_get(END))
    except Exception as error:  # noqa: BLE001 - JAX' errors differ in their text alone
        if "NOT_FOUND" in str(error):
            return None
        return {"text": "the first host is gone; start again to go on", "code": STOPPED}


def end_all(error: BaseException) -> NoReturn:
    """Ends this process for an error, and all others with a message that names it."""
    code, lost = 1, str(error) if isinstance(error, Lost) else Lost.says(error)
    if lost:
        text, code = f"another host is gone ({lost}); start again to go on", STOPPED
    elif isinstance(error, UserError):
        text, code = str(error), 2
    elif isinstance(error, KeyboardInterrupt):
        text, code = "stopped by Ctrl-C", 130
    else:
        traceback.print_exception(error)
        text = f"{type(error).__name__}: {error}"
    print(f"error: {text}", file=sys.stderr, flush=True)
    if lost and not is_first() and _first_is_gone():  # JAX aborts this one at any moment
        _exit("", code)
    if lost and (told := said()):  # why the other one ended
        _exit(told["text"], told["code"])
    told = {"text": f"host {distributed.global_state.process_id} ended: {text}", "code": code}
    with contextlib.suppress(RuntimeError):  # the first host is gone, or another said it before
        distributed.global_state.client.key_value_set(END, json.dumps(told))
    _exit("", code)


def _first_is_gone() -> bool:
    host, _, port = distributed.global_state.coordinator_address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=0.2).close()
    except OSError:
        return True
    return False


def _exit(text: str, code: int) -> NoReturn:
    """Ends this process, which may hang in a program, without waiting for other hosts."""
    if text:
        print(f"error: {text}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if is_first():  # the others read in its memory why all end
        time.sleep(3)
    for folder in _own_folders:  # functions at exit do not run, for one of JAX waits for all hosts
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(code)
