"""Paged attention and page writes compiled for H200, v5e, v5p and v6e: spills, instructions, memory."""

import json
import re
from itertools import product
from typing import NamedTuple

import pytest

from tests.compilers import needs_compilers, run_python

pytestmark = [needs_compilers, pytest.mark.slow]

TOPOLOGIES = {"h200": "h200:1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


class Config(NamedTuple):
    batch: int
    window: int
    heads: int
    kv_heads: int
    page: int
    context: int
    dim: int = 128


# The layouts of 1.7B, 4B and 8B, and 30B-A3B.
LAYOUTS = [(16, 8), (32, 8), (32, 4)]
PAGES_AND_CONTEXTS = [(16, 4096), (128, 4096), (16, 32768), (32, 32768), (64, 32768)]
GRID = [
    Config(batch, window, *layout, page, context)
    for batch, window, layout, (page, context) in product(
        [1, 8, 128], [4, 64], LAYOUTS, PAGES_AND_CONTEXTS
    )
]
REPRESENTATIVE = [
    Config(1, 4, 16, 8, 16, 4096),
    Config(1, 64, 32, 4, 64, 32768),
    Config(128, 4, 32, 8, 16, 32768),
    Config(128, 4, 16, 8, 64, 4096),
    Config(128, 64, 32, 4, 128, 32768),
    Config(7, 128, 32, 4, 32, 4096),
    Config(8, 16, 16, 8, 32, 4096, 64),
]

# Prints a line of JSON a config: bytes of temporaries, aliased, and of one pool. What the compilers print is theirs.
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding
from sdar_jax.attention import api
from sdar_jax.attention.paged import paged_attention, write_pages
from sdar_jax.devices.chips import topology

what, name = sys.argv[1:3]
one = SingleDeviceSharding(topology(name).devices[0])
implementation = "mosaic_gpu" if name.startswith("h") else "mosaic_tpu"
for batch, window, heads, kv_heads, page, context, dim in json.loads(sys.argv[3]):
    pool = min(max(batch * context // page, 2**26 // (kv_heads * page * dim * 2)), 2**30 // (kv_heads * page * dim))
    array = lambda dtype, *shape, format=one: jax.ShapeDtypeStruct(shape, dtype, sharding=format)
    # Row-major, as the kernels take them; for head_dim 64 XLA would choose another.
    rows_first = Format(Layout((0, 1, 2, 3)), one)
    pages = array(jnp.bfloat16, pool, kv_heads, page, dim, format=rows_first)
    table, row = array(jnp.int32, batch, context // page), array(jnp.int32, batch)
    if what == "attend":
        q, visible = array(jnp.bfloat16, batch, window, heads, dim), array(jnp.int32, batch, window)
        with api.override(implementation):
            compiled = jax.jit(paged_attention).lower(q, pages, pages, table, visible).compile()
    else:
        new = array(jnp.bfloat16, batch, window, kv_heads, dim)
        write = jax.jit(write_pages, donate_argnums=(0, 1), out_shardings=(rows_first, rows_first))
        compiled = write.lower(pages, pages, new, new, table, row, row).compile()
    memory, size = compiled.memory_analysis(), 2 * pool * kv_heads * page * dim
    print("REPORT", json.dumps([memory.temp_size_in_bytes, memory.alias_size_in_bytes, size]))
"""


def compiled(
    what: str, chip: str, configs: list[Config], **environment: str
) -> tuple[list[list[int]], str]:
    """(temporaries, aliased, bytes of one pool) of each, and all that the compilers printed."""
    done = run_python(PROGRAM, what, TOPOLOGIES[chip], json.dumps(configs), **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [
        json.loads(line.removeprefix("REPORT "))
        for line in done.stdout.splitlines()
        if "REPORT" in line
    ]
    assert len(reports) == len(configs)
    return reports, done.stdout + done.stderr


def allowed_temporaries(config: Config, chip: str) -> int:
    """Bytes: nothing grows with the pool, and with the context only the page table, padded to tiles of 8.

    Queries and outputs folded and unfolded, rows padded to 16; on GPUs the parts of split keys, at most two tiles of 64
    rows an SM; on TPUs the limits of the rows, padded to 128 lanes.
    """
    rows = max(16, config.window * config.heads // config.kv_heads)
    queries = config.batch * config.kv_heads * rows * config.dim * 2
    table = config.batch * config.context // config.page * 4
    parts = 132 * 2 * 64 * (config.dim + 1) * 4 if chip == "h200" else 0
    limits = config.batch * rows * 128 * 4
    return 3 * queries + 8 * table + parts + limits + 2**20


def check_memory(reports: list[list[int]], configs: list[Config], chip: str) -> None:
    for (temporaries, _, pool), config in zip(reports, configs, strict=True):
        assert temporaries <= allowed_temporaries(config, chip), config
        assert pool >= 2**26


def check_ptxas(output: str, kernels: int) -> None:
    spills = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", output
    )
    assert len(spills) >= kernels and set(spills) == {("0", "0", "0")}


@pytest.mark.ci
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_compiles(chip):
    reports, output = compiled("attend", chip, REPRESENTATIVE, MOSAIC_GPU_DUMP_PTXAS="1")
    check_memory(reports, REPRESENTATIVE, chip)
    if chip == "h200":
        check_ptxas(output, len(REPRESENTATIVE))


@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_compiles_for_every_shape(chip):
    reports, output = compiled("attend", chip, GRID, MOSAIC_GPU_DUMP_PTXAS="1")
    check_memory(reports, GRID, chip)
    if chip == "h200":
        check_ptxas(output, len(GRID))


@pytest.mark.ci
@pytest.mark.parametrize("config", [Config(8, 4, 16, 8, 16, 4096), Config(8, 64, 32, 4, 64, 4096)])
def test_uses_the_tensor_cores_and_the_copy_engine(config):
    _, ptx = compiled("attend", "h200", [config], MOSAIC_GPU_DUMP_PTX="1")
    assert "wgmma.mma_async" in ptx
    assert "cp.async.bulk.tensor" in ptx


@pytest.mark.ci
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_writes_in_place(chip):
    """No second pool, however many positions are written."""
    configs = [
        Config(8, 4, 16, 8, 16, 4096),
        Config(128, 64, 16, 8, 16, 4096),
        Config(7, 128, 16, 4, 64, 4096),
        Config(8, 4, 16, 8, 32, 4096, 64),
    ]
    reports, _ = compiled("write", chip, configs)
    for (temporaries, aliased, pool), config in zip(reports, configs, strict=True):
        assert aliased >= 2 * pool, config
        new = config.batch * config.window * config.kv_heads * config.dim * 2
        assert temporaries <= 4 * new + 2**20, config
