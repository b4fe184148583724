"""A hash of each kernel as it is compiled, which shows whether a change of the code left the kernels alone.

    python -m benchmarks.kernel_hashes > before.txt

and again after the change; the two outputs differ where a kernel does. Hashed is the PTX of kernels for H200, and the
final schedule of instructions of those for TPU, without what says where in the source an instruction comes from. No
device is needed, but the compilers are (`make compilers`); another version of them gives other hashes.
"""

import argparse
import functools
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.tpu_bundles import CORES, compiler_environment

TOPOLOGIES = {"h200": "h200:1"} | {chip: core.topology for chip, core in CORES.items()}
LENGTH, BLOCK_SIZE = 4096, 4


def attention(shape: Callable, head_dim: int) -> tuple[Callable, tuple]:
    """Forward and backward of the hybrid layout with the heads of 8B."""
    import jax
    import jax.numpy as jnp

    from sdar_jax import visibility
    from sdar_jax.attention import attention

    def gradients(q, k, v, d_out, segment_ids):
        ranges = visibility.hybrid(segment_ids, BLOCK_SIZE)
        out, pullback = jax.vjp(lambda q, k, v: attention(q, k, v, ranges), q, k, v)
        return out, pullback(d_out)

    q = shape(1, 2 * LENGTH, 32, head_dim)
    k = shape(1, 2 * LENGTH, 8, head_dim)
    return gradients, (q, k, k, q, shape(1, LENGTH, dtype=jnp.int32))


def paged_attention(
    shape: Callable, batch: int, window: int, page: int, context: int
) -> tuple[Callable, tuple]:
    """Windows of 8B against a pool of pages."""
    import jax.numpy as jnp

    from sdar_jax.attention.paged import paged_attention

    pages = shape(batch * context // page, 8, page, 128)
    table = shape(batch, context // page, dtype=jnp.int32)
    visible = shape(batch, window, dtype=jnp.int32)
    return paged_attention, (shape(batch, window, 32, 128), pages, pages, table, visible)


def experts(shape: Callable) -> tuple[Callable, tuple]:
    """Grouped matmuls of 30B-A3B, forward and backward."""
    import jax
    import jax.numpy as jnp

    from sdar_jax.experts.grouped import grouped_dot

    def gradients(x, weights, d_out, sizes):
        out, pullback = jax.vjp(lambda x, weights: grouped_dot(x, weights, sizes), x, weights)
        return out, *pullback(d_out)

    sizes = shape(128, dtype=jnp.int32)
    return gradients, (shape(65536, 2048), shape(128, 2048, 1536), shape(65536, 1536), sizes)


CASES = {
    "attention": functools.partial(attention, head_dim=128),
    "attention of small heads": functools.partial(attention, head_dim=64),
    "paged attention": functools.partial(
        paged_attention, batch=128, window=4, page=16, context=4096
    ),
    "paged attention of one long row": functools.partial(
        paged_attention, batch=1, window=4, page=64, context=32768
    ),
    "paged attention of wide windows": functools.partial(
        paged_attention, batch=8, window=64, page=128, context=4096
    ),
    "experts": experts,
}
GPU_ONLY = {"experts"}


def hashes(chip: str, case: str, timeout: float = 900) -> Iterator[tuple[str, str]]:
    """(kernel, hash) of each kernel of a case, compiled for `chip` in a child process."""
    with tempfile.TemporaryDirectory() as dump:
        environment = compiler_environment(Path(dump)) | {"MOSAIC_GPU_DUMP_PTX": "1"}
        command = [sys.executable, "-m", "benchmarks.kernel_hashes", "--compile", chip, case]
        child = subprocess.run(
            command,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if child.returncode:
            raise RuntimeError(f"compiling {case} for {chip} failed:\n{child.stderr[-4000:]}")
        codes = (
            ptx_kernels(child.stdout + child.stderr) if chip == "h200" else tpu_kernels(Path(dump))
        )
    for name, code in sorted(codes):
        yield name, hashlib.sha256(code.encode()).hexdigest()[:16]


def ptx_kernels(printed: str) -> list[tuple[str, str]]:
    """(name, PTX) of each module that was printed, without comments, files, line numbers and debug sections."""
    found = []
    for text in re.split(r"(?m)^(?=\.version )", printed)[1:]:
        text = text.split("\n.section", 1)[0]
        name = re.search(r"\.entry (\w+)", text)
        lines = (re.sub(r"\s*//.*", "", line).rstrip() for line in text.splitlines())
        code = [line for line in lines if line and not re.match(r"\s*\.(loc|file)\b", line)]
        if name is not None:
            found.append((name[1], "\n".join(code)))
    return found


def tpu_kernels(dump: Path) -> list[tuple[str, str]]:
    """(name, schedule without comments) of each kernel in a compiler's dump; XLA's own fusions are no kernels."""
    found = []
    for path in dump.glob("*packed-bundles-post-ra.txt"):
        name = re.sub(r"^\d+-|\.\d+-.*$", "", path.name)
        if "attention" in name and "schedule-analysis" not in path.name:
            found.append((name, re.sub(r"/\*.*?\*/", "", path.read_text())))
    return found


def compile_case(chip: str, case: str) -> None:
    import jax
    import jax.numpy as jnp

    from sdar_jax.devices.chips import compiling_for, topology

    device = topology(TOPOLOGIES[chip]).devices[0]
    place = jax.sharding.SingleDeviceSharding(device)

    def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    function, arguments = CASES[case](shape)
    with compiling_for(device):
        jax.jit(function).lower(*arguments).compile()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--chips", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES), metavar="CHIP"
    )
    parser.add_argument("--compile", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile:
        compile_case(*arguments.compile)
        return
    for chip in arguments.chips:
        for case in CASES:
            if chip != "h200" and case in GPU_ONLY:
                continue
            for kernel, value in hashes(chip, case):
                print(f"{value}  {chip} {kernel} ({case})", flush=True)


if __name__ == "__main__":
    main()
