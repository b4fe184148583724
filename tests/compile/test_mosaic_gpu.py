"""Range attention compiled for H200: what ptxas says of registers and memory, and what is in the PTX. Nothing runs."""

import json
import re
from typing import NamedTuple

import jax
import pytest

from tests.compilers import needs_compilers, run_python

pytestmark = [needs_compilers, pytest.mark.slow]

# Forward and backward of the hybrid layout, Q = K = 2L, groups of blocks of 4.
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from sdar_jax import visibility
from sdar_jax.devices import chips
from sdar_jax.attention import api, attention
heads, kv_heads, dim, length = map(int, sys.argv[1:])
mesh = jax.sharding.Mesh(np.array(chips.topology("h200:1").devices), ("x",))
whole = jax.sharding.NamedSharding(mesh, jax.P())
array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=whole)
q, k = (array((1, 2 * length, n, dim), jnp.bfloat16) for n in (heads, kv_heads))

def gradients(q, k, v, d_out, segment_ids, group_start):
    ranges = visibility.hybrid(segment_ids, 4, group_start=group_start)
    call = lambda q, k, v: attention(q, k, v, ranges)
    out, pullback = jax.vjp(call, q, k, v)
    return out, pullback(d_out)

with api.override("mosaic_gpu"):
    ids = array((1, length), jnp.int32)
    compiled = jax.jit(gradients).lower(q, k, k, q, ids, ids).compile()
print("RESULT", json.dumps({"temporaries": compiled.memory_analysis().temp_size_in_bytes}))
"""

KERNELS = ("forward", "dq", "dkv")
LAYOUTS = {
    "1.7B": (16, 8, 128),
    "4B and 8B": (32, 8, 128),
    "30B-A3B": (32, 4, 128),
    "head_dim 64": (32, 8, 64),
}
# What an H200 has: a block's shared memory, a multiprocessor's registers and its threads.
SHARED, REGISTERS, THREADS = 227 * 1024, 65536, 2048
BLOCK = 384
# jax 0.11 does not print what shared memory a kernel takes.
PRINTS_SHARED = jax.__version_info__ >= (0, 12)


class Kernel(NamedTuple):
    """registers: per thread at launch. budgets: what warpgroups then take. serialised: ptxas gave up on async wgmma.

    shared: bytes, 0 where jax does not print them.
    """

    registers: int
    spilled: int
    shared: int
    budgets: tuple[int, ...]
    products: int
    copies: int
    serialised: bool

    def occupancy(self) -> int:
        """TileSizes a multiprocessor."""
        return min(
            REGISTERS // (self.registers * BLOCK), SHARED // max(self.shared, 1), THREADS // BLOCK
        )


def sections(text: str, name: str) -> dict[str, str]:
    """What is printed between one match of `name`, whose group is the kernel, and the next."""
    marks = [*re.finditer(name, text)]
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return {mark[1]: text[mark.start() : end] for mark, end in zip(marks, ends, strict=True)}


def parsed(output: str, errors: str) -> dict[str, Kernel]:
    text = output + errors
    ptxas = sections(text, r"Compiling entry function 'range_attention_(\w+)_mosaic_gpu_kernel'")
    ptx = sections(text, r"\.entry range_attention_(\w+)_mosaic_gpu_kernel")
    assert set(ptxas) == set(ptx) == set(KERNELS)
    found = {}
    for name, shared in zip(KERNELS, shared_memory(text), strict=True):
        report, code = ptxas[name], ptx[name]
        budgets = [int(n) for n in re.findall(r"setmaxnreg\.(?:inc|dec)\S*\s+(\d+)", code)]
        found[name] = Kernel(
            int(re.search(r"Used (\d+) registers", report)[1]),
            sum(
                map(
                    int,
                    re.search(
                        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", report
                    ).groups(),
                )
            ),
            shared,
            tuple(sorted(budgets)),
            code.count("wgmma.mma_async"),
            code.count("cp.async.bulk.tensor"),
            "serialized" in report,
        )
    return found


def shared_memory(text: str) -> list[int]:
    """Bytes of each kernel, barriers included. Printed without names as they are traced, so in order."""
    if not PRINTS_SHARED:
        return [0] * len(KERNELS)
    scratch = [int(size) for size in re.findall(r"smem_scratch_bytes=(\d+)", text)]
    barriers = [
        re.findall(r"num_barriers=(\d+)[^)]*\): (\d+)", line)
        for line in re.findall(r"Resources\(.*", text)
    ]
    return [
        size + 8 * sum(int(number) * int(times) for number, times in counts)
        for size, counts in zip(scratch, barriers, strict=True)
    ]


def compiled(heads: int, kv_heads: int, dim: int, length: int) -> tuple[dict[str, Kernel], int]:
    dumps = dict.fromkeys(
        ["MOSAIC_GPU_DUMP_PTXAS", "MOSAIC_GPU_DUMP_PTX", "MOSAIC_GPU_DUMP_RESOURCES"], "1"
    )
    done = run_python(PROGRAM, *map(str, (heads, kv_heads, dim, length)), **dumps)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(re.search(r"RESULT (.*)", done.stdout)[1])
    return parsed(done.stdout, done.stderr), result["temporaries"]


def check(kernels: dict[str, Kernel]) -> None:
    for name, kernel in kernels.items():
        print(name, kernel, "occupancy", kernel.occupancy())
        assert kernel.spilled == 0, name
        assert kernel.products and kernel.copies and not kernel.serialised, name
        assert kernel.shared <= SHARED and kernel.occupancy() == 1, name
        assert kernel.shared or not PRINTS_SHARED, name
        # A budget a warpgroup: two consumers and a producer.
        producer, consumer = kernel.budgets
        assert 2 * consumer + producer <= REGISTERS // 128, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_h200(layout):
    small, short = compiled(*LAYOUTS[layout], 4096)
    large, long = compiled(*LAYOUTS[layout], 20480)
    check(small)
    check(large)
    print(layout, "temporaries", short, long)
    # Linear, but for the lists of tiles: under 1 MB of each kernel.
    assert long <= 5 * short + len(KERNELS) * 2**20


@pytest.mark.ci
def test_h200_in_ci():
    check(compiled(*LAYOUTS["4B and 8B"], 20480)[0])
    check(compiled(*LAYOUTS["head_dim 64"], 4096)[0])
