"""Host memory of the processes of a job while they load a checkpoint, each its part of it.

    python -m benchmarks.startup [--processes 2] [--layers 8] [--width 2048] [--vocabulary 32768]

Writes random bfloat16 weights in several files, loads them in so many processes of one CPU device each, `fsdp` over all
of them, joined as those of a job are (gloo), and prints what loading added to each at most, beside 1.2 times its part
of the weights and the largest tensor. It exits with 1 where one takes more.

Memory is RssAnon of /proc/PID/status, read a thousand times a second from outside. Files of weights are mapped: their
pages are not in it, as the kernel drops them where it wants memory. Nor is what JAX itself takes: each process has
loaded a model of one layer before.
"""

import argparse
import gc
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdar_jax import ModelConfig
from sdar_jax.devices import processes
from sdar_jax.devices.sharding import MeshConfig, make_mesh
from sdar_jax.hf.pretrained import load_pretrained, save_pretrained
from sdar_jax.hf.tensor_files import TensorReader
from sdar_jax.model import Model

ROOT = Path(__file__).parents[1]
MB = 1_000_000
READY, HOLDS = "ready", "holds"


class Loaded(NamedTuple):
    """Of one process, in bytes: its part of the weights, and what loading added at most."""

    part: int
    peak: int


def shape(layers: int, width: int, vocabulary: int) -> ModelConfig:
    """In the proportions of 8B: untied, four queries a key and value head, a feed-forward three times as wide."""
    return ModelConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_layers=layers,
        num_heads=width // 128,
        num_kv_heads=width // 512,
        head_dim=128,
        qk_norm=True,
    )


def write(config: ModelConfig, directory: Path) -> None:
    skeleton = jax.eval_shape(lambda: Model(config, jax.random.key(0), jnp.bfloat16))
    random = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(random.standard_normal(leaf.shape, np.float32), leaf.dtype)
    save_pretrained(jax.tree.map(draw, skeleton), directory, max_shard_bytes=256 * MB)


def largest_tensor(directory: Path) -> int:
    """Bytes of it, two a weight."""
    with TensorReader(directory) as tensors:
        return max(2 * int(np.prod(tensors.describe(name)[0])) for name in tensors.names())


def load(directory: str, small: str) -> None:
    """What each process does: tells when it is ready, loads when told, and tells the bytes that it holds."""
    with processes.distributed():
        mesh = make_mesh(MeshConfig())
        load_pretrained(small, dtype="bfloat16", mesh=mesh)
        processes.barrier("warm")
        gc.collect()
        print(READY, flush=True)
        sys.stdin.readline()
        model = load_pretrained(directory, dtype="bfloat16", mesh=mesh)
        shards = [shard for leaf in jax.tree.leaves(model) for shard in leaf.addressable_shards]
        print(HOLDS, sum(shard.data.nbytes for shard in shards), flush=True)
        sys.stdin.readline()


def measure(directory: Path, small: Path, count: int) -> list[Loaded]:
    """In `count` processes; `small` is what they load before."""
    address = f"127.0.0.1:{_free_port()}"
    job = [_start(directory, small, address, count, index) for index in range(count)]
    try:
        for process in job:
            _heard(process, READY)
        with _Peaks([process.pid for process in job]) as peaks:
            for process in job:
                _tell(process)
            parts = [int(_heard(process, HOLDS)) for process in job]
        for process in job:
            _tell(process)
        for process in job:
            process.wait(60)
    finally:
        for process in job:
            process.kill()
            process.communicate()
    return [Loaded(part, peak) for part, peak in zip(parts, peaks.added(), strict=True)]


def _start(
    directory: Path, small: Path, address: str, count: int, index: int
) -> subprocess.Popen[str]:
    places = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
    }
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    command = [
        sys.executable,
        "-c",
        f"from benchmarks.startup import load; load({str(directory)!r}, {str(small)!r})",
    ]
    environment = {**os.environ, **flags, **places}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _heard(process: subprocess.Popen[str], word: str) -> str:
    """What it says behind this word; gloo prints lines of its own."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(word):
            return line.removeprefix(word)
    raise RuntimeError(f"process {process.pid} ended, with status {process.wait()}")


def _tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


class _Peaks(threading.Thread):
    """The most memory of processes from the beginning of a `with` to its end."""

    def __init__(self, pids: list[int]):
        super().__init__(daemon=True)
        self._pids, self._done = pids, threading.Event()
        self._before = self._most = [anonymous(pid) for pid in pids]

    def run(self) -> None:
        while not self._done.is_set():
            self._most = [
                max(most, anonymous(pid)) for most, pid in zip(self._most, self._pids, strict=True)
            ]
            time.sleep(0.001)

    def __enter__(self) -> "_Peaks":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()

    def added(self) -> list[int]:
        return [most - before for most, before in zip(self._most, self._before, strict=True)]


def anonymous(pid: int) -> int:
    """Bytes of memory of a process that no file backs."""
    lines = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return 1024 * int(lines["RssAnon"].split()[0])


def limit(loaded: Loaded, largest: int) -> int:
    return int(1.2 * loaded.part) + largest


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32768)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        directory, small = Path(home, "model"), Path(home, "small")
        write(shape(args.layers, args.width, args.vocabulary), directory)
        write(shape(1, 512, 64), small)
        files, largest = list(directory.glob("*.safetensors")), largest_tensor(directory)
        size = sum(file.stat().st_size for file in files)
        print(f"{size / MB:.0f} MB in {len(files)} files, largest tensor {largest / MB:.0f} MB")
        found = measure(directory, small, args.processes)
    for index, loaded in enumerate(found):
        most = limit(loaded, largest)
        print(
            f"process {index}: part {loaded.part / MB:.0f} MB, loading adds {loaded.peak / MB:.0f} MB at most, "
            f"{loaded.peak / most:.2f} of {most / MB:.0f} MB"
        )
    return int(any(loaded.peak > limit(loaded, largest) for loaded in found))


if __name__ == "__main__":
    sys.exit(main())
