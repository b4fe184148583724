"""The processes of a job on many hosts: they meet at the start, end together, and exchange a few messages.

A process is found to be one of several by what SLURM, Open MPI or a TPU pod say, as JAX reads it, or by variables:

    JAX_COORDINATOR_ADDRESS   host:port where process 0 listens
    JAX_NUM_PROCESSES         how many there are
    JAX_PROCESS_ID            which of them this is, from 0

Alone, or one of one, nothing here does anything. The processes meet at the coordinator's address before JAX does (which
aborts where it cannot connect) and stay connected to process 0: a process that is lost is known at once by its closed
connection, a machine by its silence, and one that fails says why. Whoever hears of it ends: no process waits in a
collective for one that will not come. (Where process 0 is killed JAX's service is too, and JAX may abort the others.)
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Container, Iterator
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from sdar_jax.compatibility import cluster_name, cluster_place
from sdar_jax.errors import ConfigError, SdarError

_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# Names that JAX gives to what it can read; others want packages, or to be asked for.
_CLUSTERS = ("ompi", "slurm", "gketpu", "gcetpu")
# JAX notices a process that hangs while its connection is open, and then aborts.
_HEARTBEAT_SECONDS = 60
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
_ANSWER_SECONDS = 5.0
_AGAIN = "start the job again, it resumes from its last checkpoint"


class _Place(NamedTuple):
    """This process in its job.

    Attributes:
        address: host:port of process 0.
        count: how many processes there are.
        index: this one's number.
        devices: the local ones that are this process' own, None for all.
    """

    address: str
    count: int
    index: int
    devices: list[int] | None = None

    @property
    def endpoint(self) -> tuple[str, int]:
        host, port = self.address.rsplit(":", 1)
        return host.strip("[]"), int(port)


@contextlib.contextmanager
def distributed(timeout: float = 300.0) -> Iterator[None]:
    """Connects the job's processes before any JAX computation; an error raised inside ends all of them.

    A process that fails prints one line and exits: 2 for an `SdarError`, 1 for another (with its traceback). The others
    print and exit likewise, wherever they are; with 1 where a process was lost. Alone, errors are simply raised.

    Args:
        timeout: seconds to wait for all processes.

    Raises:
        ConfigError: variables that are incomplete or contradict each other, or processes that did not come in time.
    """
    place = _place(timeout)
    if place is None or place.count == 1:
        yield
        return
    link = _Link(place, _meet(place, time.monotonic() + timeout))
    # JAX would take SIGTERM for itself.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        place.address,
        place.count,
        place.index,
        place.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(timeout),
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    )
    link.watch()
    try:
        yield
        barrier("the end of the job")
    except SystemExit:
        link.leave()
        raise
    except BaseException as error:
        link.fail(error)
    link.leave()


def is_main_process() -> bool:
    """Returns whether this is the process that writes what is written once."""
    # `jax.process_index` alone would start the devices.
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gather(value: Any) -> list[Any]:
    """Collects the values of all processes, in their order; JSON holds them. All processes call this, as a barrier."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(data)))
    # Few sizes, as each is compiled for.
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def broadcast(make: Callable[[], Any]) -> Any:
    """Sends make() of the main process to all; JSON holds it. The others do not call it."""
    return gather(make() if is_main_process() else None)[0]


def on_host(array: jax.Array) -> np.ndarray:
    """Gathers an array, wherever its parts are. All processes that hold a part call this."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def _place(timeout: float) -> _Place | None:
    """Finds this process in its job; None if it is alone."""
    given = {name: os.environ[name] for name in (_ADDRESS, _COUNT, _INDEX) if os.environ.get(name)}
    if _COUNT in given or _INDEX in given:
        return _plain_place(given)
    named = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    devices = [int(number) for number in named.split(",")] if named else None
    name = None
    try:
        name = cluster_name(_CLUSTERS)
        if name is not None:
            return _Place(*cluster_place(name, given.get(_ADDRESS), devices, timeout))
    # What is missing or garbled in an environment makes its readers raise anything.
    except Exception as error:
        raise ConfigError(
            f"what {name or 'the cluster'} says of this job cannot be read ({type(error).__name__}: {error}); set "
            f"{_ADDRESS}, {_COUNT} and {_INDEX} in each process"
        ) from None
    return _plain_place(given) if given else None


def _plain_place(given: dict[str, str]) -> _Place | None:
    if given.get(_COUNT) == "1":
        return None
    missing = [name for name in (_ADDRESS, _COUNT, _INDEX) if name not in given]
    if missing:
        raise ConfigError(
            f"{' and '.join(given)} are set without {' and '.join(missing)}; set all three in each process, or none"
        )
    host, _, port = given[_ADDRESS].rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ConfigError(
            f"{_ADDRESS} is {given[_ADDRESS]!r}; give host:port of process 0, such as 10.0.0.1:8476"
        )
    count, index = given[_COUNT], given[_INDEX]
    if not count.isdigit() or int(count) < 1:
        raise ConfigError(f"{_COUNT} is {count!r}; give the number of processes")
    if not index.isdigit() or int(index) >= int(count):
        raise ConfigError(
            f"{_INDEX} is {index!r}; give a number from 0 to {int(count) - 1}, {_COUNT} - 1"
        )
    return _Place(given[_ADDRESS], int(count), int(index))


def _meet(place: _Place, deadline: float) -> dict[int, socket.socket]:
    """Connects process 0 with all others; gives the connections by the process at their other end."""
    return _listen(place, deadline) if place.index == 0 else {0: _connect(place, deadline)}


def _listen(place: _Place, deadline: float) -> dict[int, socket.socket]:
    wide = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if wide else socket.AF_INET
    try:
        server = socket.create_server(
            ("", place.endpoint[1]),
            family=family,
            dualstack_ipv6=wide,
            backlog=max(128, place.count),
        )
    except OSError as error:
        raise ConfigError(
            f"{_ADDRESS} {place.address}: process 0 cannot listen there ({os.strerror(error.errno or 0)}); give a free "
            f"port of the machine of process 0, and each process its own {_INDEX}"
        ) from None
    found: dict[int, socket.socket] = {}
    problem = None
    # JAX's own service listens here next.
    with server:
        while len(found) < place.count - 1 and problem is None:
            problem = _admit(server, place, found, deadline)
    for connection in found.values():
        _send(connection, {"problem": problem})
        if problem is not None:
            connection.close()
    if problem is not None:
        raise ConfigError(problem)
    return found


def _admit(
    server: socket.socket, place: _Place, found: dict[int, socket.socket], deadline: float
) -> str | None:
    """Accepts the next process; or says why there is no job."""
    try:
        server.settimeout(max(0.01, deadline - time.monotonic()))
        connection, _ = server.accept()
    except TimeoutError:
        missing = ", ".join(
            [str(index) for index in range(1, place.count) if index not in found][:5]
        )
        return (
            f"{_COUNT} is {place.count} and processes {missing} did not come to {place.address} in time; start all of "
            "them, with the same values"
        )
    message = _receive(connection)
    if message is None or "index" not in message:
        connection.close()
        return None
    index = message["index"]
    problem = _contradiction(place, found, index, message["count"])
    if problem is None:
        found[index] = _keep_alive(connection)
    else:
        _send(connection, {"problem": problem})
        connection.close()
    return problem


def _contradiction(place: _Place, found: Container[int], index: int, count: int) -> str | None:
    if count != place.count:
        counts = f"process {index} was told of {count} processes and process 0 of {place.count}"
        return f"{counts}; give all the same {_COUNT}"
    if index in found or index == 0:
        return f"two processes are number {index}; give each a {_INDEX} of its own"
    return None


def _connect(place: _Place, deadline: float) -> socket.socket:
    reason = "it did not answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection(place.endpoint, timeout=left)
            _send(connection, {"index": place.index, "count": place.count})
            # Process 0 answers at its own deadline, which may be a little later.
            reply = _receive(connection, max(0.0, deadline - time.monotonic()) + _ANSWER_SECONDS)
            if reply == {"problem": None}:
                return _keep_alive(connection)
            connection.close()
            if reply is not None and "problem" in reply:
                raise ConfigError(reply["problem"])
        except OSError as error:
            reason = error.strerror or str(error)
        # It may not have been started yet; or a job that is about to end listens there.
        time.sleep(0.2)
    raise ConfigError(
        f"{_ADDRESS} {place.address}: process 0 cannot be reached there ({reason}); start it, or correct the address"
    )


class _Link:
    """The connections of this process, and a thread that listens to them."""

    def __init__(self, place: _Place, connections: dict[int, socket.socket]):
        self._place = place
        self._connections = connections
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="processes", daemon=True)

    def watch(self) -> None:
        self._thread.start()

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for index, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, index)
            while selector.get_map():
                for key, _ in selector.select():
                    self._handle(key, selector)

    def _handle(self, key: selectors.SelectorKey, selector: selectors.BaseSelector) -> None:
        """Reads a message: an empty one says that the process leaves in peace, another why the job ends."""
        message = _receive(key.fileobj)
        if message is None:
            self._end(f"process {key.data} of {self._place.count} was lost; {_AGAIN}", 1)
        if "why" in message:
            self._end(message["why"], message["status"])
        selector.unregister(key.fileobj)

    def leave(self) -> None:
        """Tells the others that this process is done, and waits until they are: it may end then."""
        for connection in self._connections.values():
            _send(connection, {})
        self._thread.join(_ANSWER_SECONDS)
        if self._thread.is_alive():
            return
        for connection in self._connections.values():
            connection.close()

    def fail(self, error: BaseException) -> NoReturn:
        """Ends this process and with it the job."""
        # Another process may have failed, which made this one fail: then the thread receives its message first.
        time.sleep(1)
        if isinstance(error, SdarError):
            self._end(str(error), 2, error)
        self._end(f"{type(error).__name__}: {error}", 1, error)

    def _end(self, why: str, status: int, error: BaseException | None = None) -> NoReturn:
        # Never released: only the first one reports.
        self._ending.acquire()
        try:
            self._report(why, status, error)
        finally:
            os._exit(status)

    def _report(self, why: str, status: int, error: BaseException | None) -> None:
        """Prints why the job ends, and sends it to the others."""
        # Where nothing can be printed, as on a full disk, the others are told all the same.
        with contextlib.suppress(OSError):
            if error is not None and not isinstance(error, SdarError):
                traceback.print_exception(error)
            # One write: `print` makes two, and what other threads print could come between them.
            sys.stderr.write(f"error: {why}\n")
            sys.stderr.flush()
            sys.stdout.flush()
        if error is not None:
            why = f"process {self._place.index} of {self._place.count}: " + " ".join(why.split())
        for connection in self._connections.values():
            _send(connection, {"why": why, "status": status})
        if self._place.index == 0:
            self._wait_for_others()

    def _wait_for_others(self) -> None:
        """Returns when the others have gone: with process 0 JAX's service ends, which makes those left abort."""
        deadline = time.monotonic() + _ANSWER_SECONDS
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.settimeout(max(0.01, deadline - time.monotonic()))
                while connection.recv(4096):
                    pass


def _keep_alive(connection: socket.socket) -> socket.socket:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Sends one line of JSON; nothing if the connection is gone."""
    with contextlib.suppress(OSError):
        connection.settimeout(_ANSWER_SECONDS)
        connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: Any, timeout: float = _ANSWER_SECONDS) -> dict[str, Any] | None:
    """Receives one line of JSON; None if the connection is gone, or sends something else."""
    line = b""
    try:
        connection.settimeout(timeout)
        # Byte by byte: what follows the line is for the next call.
        while not line.endswith(b"\n"):
            byte = connection.recv(1)
            if not byte or len(line) > 2**16:
                return None
            line += byte
        message = json.loads(line)
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) else None
