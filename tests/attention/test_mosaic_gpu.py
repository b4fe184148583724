"""The Hopper kernels in the interpreter, with races looked for, against naive attention in float64.

The specialised kernels run as they are compiled, accumulators and register operands included
(mosaic_gpu_interpreter.py); what only a GPU can show is speed, and that the compiler keeps to the model of memory.
"""

from functools import partial
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdar_jax import visibility
from sdar_jax.attention import api, attention, mosaic_gpu
from sdar_jax.attention.mosaic_gpu import layout, pipeline
from sdar_jax.attention.tile_sizes import TileSizes
from sdar_jax.errors import ConfigError
from sdar_jax.groups import GroupConfig, group_starts
from sdar_jax.visibility import Ranges
from tests.attention.mosaic_gpu_interpreter import extended_interpreter
from tests.attention.test_attention import Shape, naive, random_inputs, visible
from tests.bad_input import refused


def segments(*lengths: int) -> jax.Array:
    """Documents of these lengths one after the other; a negative length is padding."""
    ids = [np.full(abs(length), 0 if length < 0 else i + 1) for i, length in enumerate(lengths)]
    return jnp.asarray(np.concatenate(ids)[None].astype(np.int32))


def scattered(queries: int, keys: int, seed: int) -> Ranges:
    """Two disjoint ranges a row in either order, many of them empty, long or at an edge."""
    random = np.random.default_rng(seed)
    cuts = np.sort(
        random.integers(-keys // 2, keys + keys // 2, (1, queries, 4)).clip(0, keys), axis=-1
    )
    pairs = cuts.reshape(1, queries, 2, 2)
    pairs = np.where(random.random((1, queries, 1, 1)) < 0.5, pairs[:, :, ::-1], pairs)
    pairs[random.random((1, queries)) < 0.2] = 3
    return Ranges(jnp.asarray(pairs[..., 0], jnp.int32), jnp.asarray(pairs[..., 1], jnp.int32))


SLOW_IN_CI = [pytest.mark.slow, pytest.mark.ci]


class Case(NamedTuple):
    ranges: Ranges
    keys: int
    heads: int
    kv_heads: int
    dim: int

    def shape(self) -> Shape:
        return Shape(1, self.ranges.start.shape[1], self.keys, self.heads, self.kv_heads, self.dim)


def self_case(ranges: Ranges, heads: int, kv_heads: int, dim: int) -> Case:
    return Case(ranges, ranges.start.shape[1], heads, kv_heads, dim)


def grouped(length: int, block_size: int, seed: int) -> Ranges:
    """The hybrid layout of one document in random groups of up to four blocks."""
    ids = segments(length)
    starts = group_starts(
        ids, ids > 0, jax.random.key(seed), GroupConfig(4, 20), block_size=block_size
    )
    return visibility.hybrid(ids, block_size, group_start=starts)


CASES = {
    "hybrid of packed documents and padding": self_case(
        visibility.hybrid(segments(70, 30, -9, 31), 4), 2, 1, 64
    ),
    "groups of blocks": self_case(grouped(101, 4, 0), 2, 1, 64),
    "causal": self_case(visibility.causal(segments(200)), 1, 1, 128),
    "bidirectional": self_case(visibility.bidirectional(segments(130, 70)), 4, 1, 64),
    "scattered, more keys": Case(scattered(45, 301, 0), 301, 8, 1, 64),
    "scattered, more queries": Case(scattered(300, 131, 1), 131, 2, 2, 64),
    "three heads left over": Case(scattered(70, 140, 2), 140, 6, 1, 128),
}
SLOW_CASES = {
    f"{name}, {heads}/{kv_heads}, {dim}": self_case(ranges, heads, kv_heads, dim)
    for name, ranges, layouts in [
        ("hybrid", visibility.hybrid(segments(203), 16), [(2, 2, 128), (8, 1, 64)]),
        ("packed", visibility.hybrid(segments(100, 3, 64, 70, -19), 8), [(4, 2, 64), (4, 1, 128)]),
        ("groups", grouped(203, 16, 1), [(2, 2, 128), (8, 1, 64)]),
        ("causal", visibility.causal(segments(300, -5, 40)), [(2, 2, 64), (4, 2, 128)]),
        ("scattered", scattered(380, 380, 3), [(4, 2, 64), (4, 1, 128)]),
    ]
    for heads, kv_heads, dim in layouts
}


def inputs_of(case: Case, seed: int = 0) -> list[jax.Array]:
    return [jnp.asarray(x, jnp.bfloat16) for x in random_inputs(case.shape(), seed)]


def run(case: Case, inputs: list[jax.Array], scale: float | None = None) -> list[np.ndarray]:
    """Output and gradients for q, k and v, through the one door."""

    def gradients(q, k, v, d_out):
        out, pullback = jax.vjp(
            lambda q, k, v: attention(q, k, v, case.ranges, scale=scale), q, k, v
        )
        return out, *pullback(d_out)

    with extended_interpreter(), api.override("mosaic_gpu", interpret=True):
        return [np.asarray(x) for x in jax.jit(gradients)(*inputs)]


def check(case: Case, got: list[np.ndarray], inputs: list[jax.Array]) -> None:
    """What is left is a rounding (2^-9) each of the probabilities, or of a score's gradient, and of the result.

    For q and k also that of the output inside the gradient of a score, which weighs more as it is part of a difference.
    """
    exact = naive(
        *(np.asarray(x, np.float64) for x in inputs),
        visible(case.ranges, case.keys),
        case.dim**-0.5,
    )
    for ours, theirs, roundings in zip(got, exact, (2, 5, 5, 2), strict=True):
        assert ours.dtype == inputs[0].dtype
        error = np.linalg.norm(ours.astype(np.float64) - theirs) / np.linalg.norm(theirs)
        assert error < roundings * 2**-9
    empty = ~visible(case.ranges, case.keys).any(axis=-1)
    assert not got[0][empty].any() and not got[1][empty].any()


QUICK_CASES = ["hybrid of packed documents and padding", "three heads left over"]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK_CASES else SLOW_IN_CI) for n in CASES]
)
def test_equals_naive_attention(name):
    case, inputs = CASES[name], inputs_of(CASES[name])
    check(case, run(case, inputs), inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_CASES)
def test_equals_naive_attention_on_more_shapes(name):
    case, inputs = SLOW_CASES[name], inputs_of(SLOW_CASES[name])
    check(case, run(case, inputs), inputs)


@pytest.mark.slow
def test_float16():
    case = CASES["scattered, more keys"]
    inputs = [x.astype(jnp.float16) for x in inputs_of(case)]
    check(case, run(case, inputs), inputs)


@pytest.mark.slow
def test_every_block_of_the_table_in_two_batches():
    """Another batch entry has its own ranges and lists."""
    ranges = [scattered(150, 260, seed) for seed in (5, 6)]
    both = Ranges(*(jnp.concatenate(parts) for parts in zip(*ranges, strict=True)))
    shape = Shape(2, 150, 260, 4, 2, 64)
    inputs = [jnp.asarray(x, jnp.bfloat16) for x in random_inputs(shape, 4)]
    got = run(Case(both, 260, 4, 2, 64), inputs)
    for row, part in enumerate(ranges):
        alone = [x[row : row + 1] for x in inputs]
        check(Case(part, 260, 4, 2, 64), [x[row : row + 1] for x in got], alone)


@pytest.mark.slow
@pytest.mark.ci
def test_the_same_bits_each_time():
    case = CASES["hybrid of packed documents and padding"]
    inputs = inputs_of(case)
    for first, second in zip(run(case, inputs), run(case, inputs), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("list_bytes", [16, 2**20])
def test_short_lists_change_nothing(list_bytes):
    """Lists that are made coarser to stay short name the same keys."""
    case = CASES["scattered, more keys"]
    inputs = inputs_of(case)
    with mock.patch.object(layout, "_LIST_BYTES", list_bytes):
        check(case, run(case, inputs), inputs)


def test_logsumexp():
    case = CASES["scattered, more keys"]
    q, k, v, _ = inputs_of(case)
    with extended_interpreter():
        call = partial(mosaic_gpu.forward, scale=0.2, interpret=True, tile_sizes=TileSizes(128, 64))
        _, logsumexp = jax.jit(call)(q, k, v, case.ranges)
    scores = np.einsum("qhd,kd->qhk", *(np.asarray(x, np.float64)[0] for x in (q, k[:, :, 0])))
    exp = np.where(visible(case.ranges, case.keys)[0][:, None], np.exp(0.2 * scores), 0).sum(
        axis=-1
    )
    with np.errstate(divide="ignore"):
        wanted = np.where(exp == 0, np.inf, np.log(exp))
    assert np.isinf(wanted).any()
    np.testing.assert_allclose(logsumexp[0], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.ci
def test_tiles_that_no_query_sees_are_not_loaded():
    """A NaN that is loaded spreads: zero times NaN is NaN."""
    length = 128
    case = self_case(visibility.bidirectional(segments(length, length, length)), 1, 1, 64)
    inputs = inputs_of(case)
    clean = run(case, inputs)
    poisoned = [x.at[:, length : 2 * length].set(jnp.nan) for x in inputs]
    for ours, theirs in zip(run(case, poisoned), clean, strict=True):
        for part in (slice(length), slice(2 * length, None)):
            np.testing.assert_array_equal(ours[:, part], theirs[:, part])


def test_full_tiles_are_not_masked():
    case = self_case(visibility.bidirectional(segments(128, 128)), 1, 1, 64)
    inputs = inputs_of(case)
    with mock.patch.object(pipeline, "masked", lambda scores, *_: scores * jnp.nan):
        check(case, run(case, inputs), inputs)


@pytest.mark.slow
def test_huge_scores_do_not_overflow():
    """The largest of them in the first tile, then in the second."""
    case = self_case(visibility.bidirectional(segments(256)), 1, 1, 64)
    for part in (slice(128), slice(128, None)):
        q, k, v, d_out = inputs_of(case)
        inputs = [q, k.at[:, part].multiply(256), v, d_out]
        got = run(case, inputs)
        assert all(np.isfinite(x).all() for x in got)
        exact = naive(
            *(np.asarray(x, np.float64) for x in inputs), visible(case.ranges, case.keys), 0.125
        )[0]
        assert np.linalg.norm(got[0].astype(np.float64) - exact) / np.linalg.norm(exact) < 2 * 2**-9


def test_what_is_not_supported():
    q, k = (jnp.zeros((1, 8, heads, 64), jnp.bfloat16) for heads in (4, 2))
    assert mosaic_gpu.unsupported(q, k, k) is None
    assert "float32" in mosaic_gpu.unsupported(q.astype(jnp.float32), k, k)
    assert "float16" in mosaic_gpu.unsupported(q, k, k.astype(jnp.float16))
    assert "48" in mosaic_gpu.unsupported(*(x[..., :48] for x in (q, k, k)))
    assert "empty" in mosaic_gpu.unsupported(q[:, :0], k, k)
    with refused(ConfigError, "scale is 0"):
        run(CASES["causal"], inputs_of(CASES["causal"]), scale=0)
