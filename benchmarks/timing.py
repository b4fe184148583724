"""Timing two ways: many calls on a device, and in turns with PyTorch in a process of its own."""

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Self

import jax

from sdar_jax.proof.speed import seconds as seconds

PEER = Path(__file__).with_name("torch_peer.py")

# Both sides' threads spin for a while when their work is done; the other side is not to pay for that.
SETTLE_SECONDS = 1.0


class Measured(NamedTuple):
    """seconds a run, and peak memory of the process in bytes."""

    seconds: float
    memory: int


class Peer:
    """A program in PyTorch that does one piece of work each time it is asked; it prints "ready" when it can."""

    def __init__(self, python: str, program: Path, *arguments: str):
        command = [python, str(program), *arguments]
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
        }
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdin is not None and process.stdout is not None
        self.process, self.requests, self.answers = process, process.stdin, process.stdout
        if self._line() != "ready":
            raise RuntimeError(
                f"{command[:3]} did not start; --torch-python takes a Python that has torch"
            )

    def ask(self, request: str = "") -> str:
        """Its answer, one line, to a line."""
        self.requests.write(request + "\n")
        self.requests.flush()
        return self._line()

    def _line(self) -> str:
        return self.answers.readline().strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_):
        self.requests.close()
        self.process.wait()


class TorchPeer(Peer):
    """torch_peer.py doing `work`."""

    def __init__(self, python: str, work: str, **arguments):
        super().__init__(python, PEER, work, json.dumps(arguments))

    def run(self) -> Measured:
        took, memory = self.ask().split()
        return Measured(float(took), int(memory))


class Ratio(NamedTuple):
    """Theirs over ours, pair by pair: how many times faster ours is."""

    median: float
    lowest: float
    highest: float
    ours: float
    theirs: float

    def __str__(self) -> str:
        return (
            f"ours {self.ours:.3f} s, theirs {self.theirs:.3f} s: {self.median:.2f}x "
            f"({self.lowest:.2f} to {self.highest:.2f})"
        )


def compare(ours: Callable[[], object], theirs: Callable[[], float], pairs: int) -> Ratio:
    """Interleaved pairs A B A B after one of each to warm up; `theirs` returns its own seconds."""
    jax.block_until_ready(ours())
    theirs()
    times = []
    for _ in range(pairs):
        time.sleep(SETTLE_SECONDS)
        start = time.perf_counter()
        jax.block_until_ready(ours())
        mine = time.perf_counter() - start
        time.sleep(SETTLE_SECONDS)
        times.append((mine, theirs()))
    ratios = [b / a for a, b in times]
    medians = (statistics.median(side) for side in zip(*times, strict=True))
    return Ratio(statistics.median(ratios), min(ratios), max(ratios), *medians)
