"""The TPU attention kernels compiled for chips that are not here, and what their schedules say."""

import json

import pytest

from benchmarks import tpu_bundles
from tests.compilers import needs_compilers, run_python

pytestmark = [needs_compilers, pytest.mark.slow]

# Heads, kv heads and head size of 1.7B, 8B (and 4B), 30B-A3B, and of one with small heads.
LAYOUTS = [(16, 8, 128), (32, 8, 128), (32, 4, 128), (16, 4, 64)]
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}

# Arguments: topology, then [heads, kv heads, head size, dtype, [[length, batch], ...]]. Prints temporaries' bytes.
COMPILE = """
import json, sys
import jax, jax.numpy as jnp
from sdar_jax import visibility
from sdar_jax.attention import api, attention
from sdar_jax.devices.chips import topology

heads, kv_heads, dim, dtype, sizes = json.loads(sys.argv[2])
device = jax.sharding.SingleDeviceSharding(topology(sys.argv[1]).devices[0])
shaped = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=device)

# Groups of blocks: single blocks are those whose groups are one block long.
def step(q, k, v, d_out, segment_ids, group_start):
    ranges = visibility.hybrid(segment_ids, 4, group_start=group_start)
    out, pullback = jax.vjp(lambda q, k, v: attention(q, k, v, ranges), q, k, v)
    return out, pullback(d_out)

def temporaries(length, batch):
    q, k = (shaped((batch, 2 * length, count, dim), dtype) for count in (heads, kv_heads))
    with api.override("mosaic_tpu"):
        ids = shaped((batch, length), jnp.int32)
        lowered = jax.jit(step).lower(q, k, k, q, ids, ids)
    assert lowered.as_text().count("tpu_custom_call") == 3
    return lowered.compile().memory_analysis().temp_size_in_bytes

print(json.dumps([temporaries(*size) for size in sizes]))
"""


def temporaries(
    chip: str, layout: tuple[int, int, int], sizes: list[tuple[int, int]], dtype="bfloat16"
) -> list[int]:
    child = run_python(COMPILE, TOPOLOGIES[chip], json.dumps([*layout, dtype, sizes]), timeout=900)
    assert child.returncode == 0, child.stderr[-4000:]
    return json.loads(child.stdout.splitlines()[-1])


def query_bytes(layout: tuple[int, int, int], length: int, batch: int) -> int:
    """Of q, in bfloat16, for hybrid rows of `length` tokens; in memory, too, a head of 64 takes 128 lanes."""
    return batch * 2 * length * layout[0] * max(layout[2], 128) * 2


# In units of q: copies of q, the output, its gradient and dQ with heads first, and the smaller keys and values, some
# twice. A dense mask of bytes would be 5 more at length 20480 and 32 heads of 128.
MOST_COPIES = 7


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_compiles_and_its_memory_is_linear(chip, layout):
    sizes = [(4096, 1), (20480, 1), (4096, 2), (20480, 2)]
    for size, held in zip(sizes, temporaries(chip, layout, sizes), strict=True):
        assert held <= MOST_COPIES * query_bytes(layout, *size)


@pytest.mark.ci
def test_compiles_for_v5p():
    layout = (32, 8, 128)
    (held,) = temporaries("v5p", layout, [(4096, 1)])
    assert held <= MOST_COPIES * query_bytes(layout, 4096, 1)


@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_float32_compiles(chip):
    temporaries(chip, (32, 8, 128), [(4096, 1)], dtype="float32")


# Of each kernel's body for full tiles. v6e's units are 256 wide and a head is 128: scores fill half of one.
@pytest.mark.parametrize(
    ("chip", "forward", "dq", "dkv"),
    [
        pytest.param("v5p", 0.75, 0.95, 0.95, marks=pytest.mark.ci),
        ("v5e", 0.75, 0.95, 0.95),
        ("v6e", 0.55, 0.85, 0.85),
    ],
)
def test_matrix_units_are_busy(chip, forward, dq, dkv):
    wanted = {
        "range_attention_forward": forward,
        "range_attention_dq": dq,
        "range_attention_dkv": dkv,
    }
    found = {kernel.name: kernel for kernel in tpu_bundles.kernels(chip)}
    assert found.keys() == wanted.keys()
    core = tpu_bundles.CORES[chip]
    for name, least in wanted.items():
        assert found[name].bodies[0].busy(core) >= least
