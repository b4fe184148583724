"""How well the TPU attention kernels use the matrix units (MXU), counted in the compiler's schedule. No TPU is needed.

    python benchmarks/tpu_bundles.py                     every chip, ours and JAX's splash attention with the same mask
    python benchmarks/tpu_bundles.py --chips v5p --splash False

A TPU core issues one bundle of instructions a cycle, and the compiler fixes which: the bundles of a loop's body are its
time, DMA stalls apart. So this compares kernels and is a lower bound on time; it is not a timing. For each body that
multiplies matrices it prints

    bundles    of the body
    MXU busy   matmul instructions, times the cycles that each holds an MXU, over bundles and MXUs
    of peak    multiply-adds of the body over those that the chip could do in as many cycles; less than "MXU busy" where
               a head is narrower than the MXU (v6e's are 256 wide)

and last, as "rest", the bundles of a grid step outside of the bodies; a step that neither starts nor ends an output
tile skips part of them. Needs libtpu (`make compilers`).
"""

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

ROOT = Path(__file__).resolve().parents[1]
COMPILERS = ROOT / ".cache" / "compilers"
LENGTH, BLOCK_SIZE, HEADS, KV_HEADS = 4096, 4, 32, 8
SPLASH_TILE = 512

Family = Literal["ours", "splash"]


class Core(NamedTuple):
    """cycles: that one bfloat16 matmul instruction (16 rows) holds an MXU. peak: multiply-adds a cycle."""

    topology: str
    units: int
    cycles: int
    peak: int


CORES = {
    "v5e": Core("v5e:2x2", 4, 16, 4 * 128**2),
    "v5p": Core("v5p:2x2x1", 4, 16, 4 * 128**2),
    "v6e": Core("v6e:2x2", 2, 8, 2 * 256**2 * 2),
}


class Region(NamedTuple):
    """Bundles between two targets of control flow, and the matmul instructions in them."""

    bundles: int
    matmuls: int

    def busy(self, core: Core) -> float:
        return self.matmuls * core.cycles / core.units / self.bundles


class Kernel(NamedTuple):
    """The schedule of one kernel. bodies: regions with matmuls, the full tile's first."""

    name: str
    bodies: tuple[Region, ...]
    rest: int


def compiler_environment(dump: Path) -> dict[str, str]:
    """What a child process needs to compile for chips that are not here; TPU schedules are written to `dump`."""
    return {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(COMPILERS), str(ROOT)]),
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "XLA_FLAGS": "",
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true",
    }


def kernels(
    chip: str, family: Family = "ours", head_dim: int = 128, timeout: float = 900
) -> list[Kernel]:
    """Compiles forward and backward for `chip` in a child process and reads the schedules of their kernels."""
    with tempfile.TemporaryDirectory() as dump:
        environment = compiler_environment(Path(dump))
        command = [sys.executable, __file__, "--compile", chip, family, str(head_dim)]
        child = subprocess.run(
            command,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=ROOT,
        )
        if child.returncode:
            raise RuntimeError(f"compiling {family} for {chip} failed:\n{child.stderr[-4000:]}")
        found = [_kernel(path) for path in sorted(Path(dump).glob("*packed-bundles-post-ra.txt"))]
    return [kernel for kernel in found if kernel.bodies]


def _kernel(path: Path) -> Kernel:
    name = re.sub(r"^\d+-|\.\d+-.*$", "", path.name)
    if "schedule-analysis" in path.name or "attention" not in name and "splash" not in name:
        return Kernel(name, (), 0)
    regions = _regions(path.read_text())
    bodies = tuple(region for region in regions if region.matmuls)
    # The first region is run once, before the grid.
    return Kernel(name, bodies, sum(region.bundles for region in regions[1:] if not region.matmuls))


def _regions(schedule: str) -> list[Region]:
    regions: list[Region] = []
    for line in schedule.splitlines():
        bundle = re.match(r"\s*(?:0x[0-9a-f]+|0)\s*([A-Z ]*):", line)
        if bundle is None:
            continue
        if bundle[1].strip() or not regions:
            regions.append(Region(0, 0))
        last = regions[-1]
        regions[-1] = Region(last.bundles + 1, last.matmuls + line.count("vmatmul."))
    return regions


def _compile(chip: str, family: Family, head_dim: int) -> None:
    import jax
    import jax.numpy as jnp

    from sdar_jax.devices.chips import topology

    device = jax.sharding.SingleDeviceSharding(topology(CORES[chip].topology).devices[0])
    shape = lambda *size, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(size, dtype, sharding=device)
    q, k = (shape(1, 2 * LENGTH, heads, head_dim) for heads in (HEADS, KV_HEADS))
    step = {"ours": _ours, "splash": _splash}[family]
    jax.jit(step).lower(q, k, k, q, shape(1, LENGTH, dtype=jnp.int32)).compile()


def _ours(q, k, v, d_out, segment_ids):
    from sdar_jax import visibility
    from sdar_jax.attention import mosaic_tpu

    ranges, scale = visibility.hybrid(segment_ids, BLOCK_SIZE), q.shape[-1] ** -0.5
    out, logsumexp = mosaic_tpu.forward(q, k, v, ranges, scale=scale)
    return out, mosaic_tpu.backward(q, k, v, ranges, out, logsumexp, d_out, scale=scale)


def _splash(q, k, v, d_out, segment_ids):
    import jax
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    mask = splash_attention_mask.MultiHeadMask([_hybrid_mask(splash_attention_mask)] * HEADS)
    tile = SPLASH_TILE
    sizes = splash_attention_kernel.BlockSizes(
        block_q=tile,
        block_kv=tile,
        block_q_dq=tile,
        block_kv_dq=tile,
        block_q_dkv=tile,
        block_kv_dkv=tile,
    )
    kernel = splash_attention_kernel.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1
    )
    out, pullback = jax.vjp(lambda *parts: kernel(*(x[0].swapaxes(0, 1) for x in parts)), q, k, v)
    return out, pullback(d_out[0].swapaxes(0, 1))


def _hybrid_mask(module):
    """visibility.hybrid for one document, as a mask that splash computes inside its kernel."""

    def visible(query, key):
        noisy_query, noisy_key = query < LENGTH, key < LENGTH
        shift = BLOCK_SIZE.bit_length() - 1
        block, key_block = ((x & (LENGTH - 1)) >> shift for x in (query, key))
        own = noisy_query & noisy_key & (block == key_block)
        return own | (~noisy_key & ((key_block < block) | (~noisy_query & (key_block == block))))

    class Hybrid(module._ComputableMask):
        def __hash__(self):
            return hash((type(self).__name__, self.shape))

    return Hybrid((2 * LENGTH, 2 * LENGTH), visible)


# Products of [rows, keys, head_dim] that each kernel's body makes.
_PRODUCTS = {"forward": 2, "fwd": 2, "dq": 3, "dkv": 4}


def _elements(kernel: Kernel, head_dim: int) -> int:
    """Scores in a full tile."""
    if kernel.name.startswith("splash"):
        return SPLASH_TILE**2
    from sdar_jax.attention.tile_sizes import tile_sizes_for

    tile_sizes = tile_sizes_for("mosaic_tpu", kernel.name.rpartition("_")[2], head_dim)
    return tile_sizes.query_tile * tile_sizes.key_tile


def of_peak(kernel: Kernel, core: Core, head_dim: int = 128) -> float:
    """Share of the chip's multiply-adds in the full tile's body."""
    products = next(count for name, count in _PRODUCTS.items() if name in kernel.name)
    return products * _elements(kernel, head_dim) * head_dim / core.peak / kernel.bodies[0].bundles


def _print(chip: str, kernel: Kernel, head_dim: int) -> None:
    core = CORES[chip]
    for number, body in enumerate(kernel.bodies):
        peak = f"{of_peak(kernel, core, head_dim):8.1%}" if number == 0 else " " * 8
        what = "full" if number == 0 else f"other {number}"
        print(f"{kernel.name:38} {chip:5} {what:8} {body.bundles:8} {body.busy(core):9.1%} {peak}")
    print(f"{kernel.name:38} {chip:5} {'rest':8} {kernel.rest:8}", flush=True)


@dataclass(frozen=True)
class Arguments:
    """What to compile. splash: JAX's splash attention too."""

    chips: tuple[str, ...] = tuple(CORES)
    head_dim: int = 128
    splash: bool = True


def main(arguments: Arguments) -> None:
    print(f"{'kernel':38} {'chip':5} {'body':8} {'bundles':>8} {'MXU busy':>9} {'of peak':>8}")
    for chip in arguments.chips:
        for family in ("ours", "splash")[: 1 + arguments.splash]:
            for kernel in kernels(chip, family, arguments.head_dim):
                _print(chip, kernel, arguments.head_dim)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compile"]:
        _compile(sys.argv[2], "splash" if sys.argv[3] == "splash" else "ours", int(sys.argv[4]))
    else:
        main(tyro.cli(Arguments, description=__doc__))
