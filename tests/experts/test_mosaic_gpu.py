"""The grouped matmuls for Hopper: in the interpreter, with races looked for, against loops in float64; and compiled."""

import re
from functools import partial
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdar_jax.experts import grouped, mosaic_gpu
from sdar_jax.experts.low_rank import LowRank, plus_low_rank
from sdar_jax.experts.mlp import mlp
from tests.attention.mosaic_gpu_interpreter import extended_interpreter
from tests.compilers import needs_compilers, run_python
from tests.experts import oracle

SLOW_IN_CI = [pytest.mark.slow, pytest.mark.ci]
INTERPRETED = SimpleNamespace(
    product=lambda *a, **k: mosaic_gpu.product(*a, **k, interpret=True),
    weight_gradient=lambda *a, **k: mosaic_gpu.weight_gradient(*a, **k, interpret=True),
)


def drawn(seed: int, rows: int, depth: int, columns: int, groups: int) -> list[jax.Array]:
    """x, weights and the gradient of the output, bfloat16."""
    random = np.random.default_rng(seed)
    shapes = ((rows, depth), (groups, depth, columns), (rows, columns))
    return [jnp.asarray(random.normal(size=shape), jnp.bfloat16) for shape in shapes]


def loops(x, weights, d_out, sizes: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The output and the gradients of x and of the weights, in float64."""
    x, weights, d_out = (np.asarray(array, np.float64) for array in (x, weights, d_out))
    out, d_x, d_weights = np.zeros_like(d_out), np.zeros_like(x), np.zeros_like(weights)
    begin = 0
    for group, size in enumerate(sizes):
        own = slice(begin, begin + size)
        out[own], d_x[own] = x[own] @ weights[group], d_out[own] @ weights[group].T
        d_weights[group] = x[own].T @ d_out[own]
        begin += size
    return out, d_x, d_weights


def check(
    sizes: list[int], x: jax.Array, weights: jax.Array, d_out: jax.Array, function, exact=None
) -> None:
    """Sums are in float32: what is left is the rounding of the result. Args: exact: by default of the loops."""

    def gradients(x, weights, d_out, sizes):
        out, pullback = jax.vjp(lambda x, weights: function(x, weights, sizes), x, weights)
        return out, *pullback(d_out)

    with mock.patch.object(grouped, "_kernels", lambda *_: INTERPRETED), extended_interpreter():
        found = jax.jit(gradients)(x, weights, d_out, jnp.asarray(sizes, jnp.int32))
    for ours, theirs in zip(found, exact or loops(x, weights, d_out, sizes), strict=True):
        assert ours.dtype == x.dtype
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, rtol=2**-8, atol=1e-4)


FILLED = {
    "tiles of many groups, one empty": (256, [30, 0, 60, 37, 129], 128, 128),
    "groups of whole tiles": (256, [128, 128], 128, 256),
    "rows that no tile is full of": (77, [5, 72], 256, 128),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=SLOW_IN_CI * ("whole" in name)) for name in FILLED]
)
def test_equal_the_loops(name):
    rows, sizes, depth, columns = FILLED[name]
    check(sizes, *drawn(0, rows, depth, columns, len(sizes)), grouped.grouped_dot)


@pytest.mark.parametrize(
    "sizes",
    [[0, 70, 3], *(pytest.param(sizes, marks=SLOW_IN_CI) for sizes in ([0, 0, 0], [0, 0, 300]))],
)
def test_rows_after_the_last_group_are_zero_and_not_read(sizes):
    x, weights, d_out = drawn(1, 300, 128, 128, 3)
    unread = (np.arange(300) >= -(-sum(sizes) // 128) * 128)[:, None]
    poisoned = [jnp.where(unread, jnp.nan, array) for array in (x, d_out)]
    partly = lambda x, weights, sizes: grouped.grouped_dot(x, weights, sizes, True)
    check(sizes, poisoned[0], weights, poisoned[1], partly, loops(x, weights, d_out, sizes))


@pytest.mark.slow
@pytest.mark.ci
def test_the_experts_through_them_equal_the_loops():
    """With values and gradients of the gates and both matrices, in bfloat16."""
    random = np.random.default_rng(2)
    chosen = np.stack([random.permutation(4)[:2] for _ in range(90)]).astype(np.int32)
    shapes = ((90, 128), (90, 2), (4, 128, 2, 128), (4, 128, 128))
    arrays = [
        jnp.asarray(random.normal(size=shape) / shape[-2] ** 0.5, jnp.bfloat16) for shape in shapes
    ]

    def run(function, experts, arrays):
        loss = lambda x, *weights: (function(x, experts, *weights).astype(jnp.float32) ** 2).sum()
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*arrays)

    with mock.patch.object(grouped, "_kernels", lambda *_: INTERPRETED), extended_interpreter():
        found = [np.asarray(part, np.float32) for part in run(mlp, jnp.asarray(chosen), arrays)]
    exact = run(oracle.expert_mlp, chosen, [array.astype(jnp.float32) for array in arrays])
    for ours, theirs in zip(found, exact, strict=True):
        assert np.linalg.norm(ours - theirs) < 2**-6 * np.linalg.norm(theirs)


@pytest.mark.slow
@pytest.mark.ci
def test_low_rank_matrices_through_them_equal_the_loops():
    """Of a rank that they do not take, which is padded."""
    random = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape) / shape[-1] ** 0.5, jnp.bfloat16)
    sizes, out, x, pair = (
        [30, 0, 60],
        draw(90, 256),
        draw(90, 128),
        LowRank(draw(3, 5, 128), draw(3, 256, 5)),
    )

    def squares(product, out, x, pair):
        return (product(out, x, pair).astype(jnp.float32) ** 2).sum()

    def loops(out, x, pair):
        group = np.repeat(np.arange(3), sizes)
        return out + jnp.einsum("mnr,mrk,mk->mn", pair.b[group], pair.a[group], x)

    def kernels(out, x, pair):
        return plus_low_rank(out, x, pair, jnp.asarray(sizes, jnp.int32), partly=False)

    run = lambda product, *arrays: jax.jit(jax.grad(partial(squares, product), (0, 1, 2)))(*arrays)
    with (
        mock.patch.object(grouped, "_kernels", lambda *_: INTERPRETED),
        mock.patch.object(grouped, "choose", lambda *_: "mosaic_gpu"),
        extended_interpreter(),
    ):
        found = run(kernels, out, x, pair)
    exact = run(loops, *jax.tree.map(lambda array: array.astype(jnp.float32), (out, x, pair)))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert ours.dtype == jnp.bfloat16 and ours.shape == theirs.shape
        assert np.linalg.norm(np.asarray(ours, np.float32) - theirs) < 2**-6 * np.linalg.norm(
            theirs
        )


@pytest.mark.parametrize(
    ("dtype", "depth", "columns", "taken"),
    [
        ("bfloat16", 256, 128, 1),
        ("float16", 128, 128, 1),
        ("float32", 128, 128, 0),
        ("bfloat16", 128, 96, 0),
    ],
)
def test_what_they_take(dtype, depth, columns, taken):
    operands = jnp.zeros((8, depth), dtype), jnp.zeros((2, depth, columns), dtype)
    assert (mosaic_gpu.unsupported(*operands) is None) == bool(taken)


COMPILED = """
import jax, jax.numpy as jnp
from sdar_jax.devices.chips import compiling_for, topology
from sdar_jax.experts.grouped import grouped_dot

device = topology("h200:1").devices[0]
place = jax.sharding.SingleDeviceSharding(device)
shape = lambda *sizes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

def gradients(x, weights, d_out, sizes):
    out, pullback = jax.vjp(lambda x, weights: grouped_dot(x, weights, sizes), x, weights)
    return out, *pullback(d_out)

with compiling_for(device):
    arguments = shape(65536, 2048), shape(128, 2048, 1536), shape(65536, 1536), shape(128, dtype=jnp.int32)
    text = jax.jit(gradients).lower(*arguments).compile().as_text()
print("CALLS", text.count('custom_call_target="mosaic_gpu'))
"""


@needs_compilers
@pytest.mark.slow
@pytest.mark.ci
def test_compiled_for_h200():
    """The experts of 30B-A3B: no register spilled, no product waited for as it is issued, and shared memory enough."""
    dumps = dict.fromkeys(
        ["MOSAIC_GPU_DUMP_PTXAS", "MOSAIC_GPU_DUMP_PTX", "MOSAIC_GPU_DUMP_RESOURCES"], "1"
    )
    child = run_python(COMPILED, **dumps)
    assert child.returncode == 0, child.stderr[-4000:]
    told = child.stdout + child.stderr
    assert "CALLS 3" in told and "serialized" not in told
    spilled = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", told)
    assert len(spilled) == 3 and set(spilled) == {("0", "0", "0")}
    assert all(int(size) <= 227 * 1024 for size in re.findall(r"smem_scratch_bytes=(\d+)", told))
    assert told.count("wgmma.mma_async") >= 12
