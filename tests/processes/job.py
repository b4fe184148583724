"""Jobs of several real processes on this machine: `train.py` once a process, on virtual CPU devices."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import yaml

from tests.training.conftest import Values

ROOT = Path(__file__).parents[2]
# Optimised machine code would cost more than it gives, as in the other tests.
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={}"
SECONDS = 300.0


class Ended(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """What it says of its end, of which one line is right."""
        words = ("error", "Traceback", "Check failure", "Terminating process")
        return [
            line for line in self.err.splitlines() if line.startswith(words) or " client.h:" in line
        ]


class Job:
    """`train.py` with these values in so many processes; in a `with`, behind which none is left."""

    def __init__(
        self,
        values: Values,
        count: int,
        directory: Path,
        *arguments: str,
        devices: int = 1,
    ):
        directory.mkdir(parents=True, exist_ok=True)
        config = directory / "train.yaml"
        config.write_text(yaml.safe_dump(values))
        self.run_dir = Path(values["run_dir"])
        self._directory = directory
        self.processes, self._listeners = [], []
        address = f"127.0.0.1:{free_port()}"
        for index in range(count):
            places = {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": count,
                "JAX_PROCESS_ID": index,
            }
            self._start(index, [str(config), *arguments], places, devices)

    def _start(self, index: int, arguments: list[str], places: Values, devices: int) -> None:
        cache = {
            "JAX_COMPILATION_CACHE_DIR": ROOT / ".cache" / "xla-tests",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0,
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": -1,
        }
        flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": XLA_FLAGS.format(devices)}
        environment = {
            **os.environ,
            **{name: str(value) for name, value in {**cache, **flags, **places}.items()},
        }
        warnings = ("-W", "error", "-W", "ignore:Error reading persistent compilation cache entry")
        with self._file(index, "out").open("w") as out, self._file(index, "err").open("w") as err:
            # Errors go through a pipe: where the files of a process are limited, what it says is not.
            listener = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=err)
            command = [sys.executable, *warnings, "train.py", *arguments]
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=out, stderr=listener.stdin
            )
            listener.stdin.close()
        self.processes.append(process)
        self._listeners.append(listener)

    def _file(self, index: int, suffix: str) -> Path:
        return self._directory / f"{index}.{suffix}"

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.kill()
        for process in [*self.processes, *self._listeners]:
            process.wait()

    def wait_for(self, path: Path) -> None:
        """Until it is there, while all processes run."""
        limit = time.monotonic() + SECONDS
        while not path.exists():
            assert all(process.poll() is None for process in self.processes), self.said()
            assert time.monotonic() < limit, self.said()
            time.sleep(0.02)

    def send(self, index: int, number: signal.Signals) -> None:
        self.processes[index].send_signal(number)

    def ended(self, within: float = SECONDS) -> list[Ended]:
        """How all of them end, by themselves."""
        limit = time.monotonic() + within
        for process in self.processes:
            try:
                process.wait(max(0.01, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"a process did not end: {self.said()}") from None
        for listener in self._listeners:
            listener.wait()
        return self.said()

    def said(self) -> list[Ended]:
        read = lambda index, suffix: self._file(index, suffix).read_text()
        return [
            Ended(p.returncode, read(i, "out"), read(i, "err"))
            for i, p in enumerate(self.processes)
        ]

    def finish(self) -> list[Ended]:
        """All of it, to the end."""
        ended = self.ended()
        assert [process.status for process in ended] == [0] * len(ended), ended
        return ended


def run(
    values: Values, count: int, directory: Path, *arguments: str, devices: int = 1
) -> list[Ended]:
    with Job(values, count, directory, *arguments, devices=devices) as job:
        return job.finish()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
