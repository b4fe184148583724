"""Every implementation against naive attention in numpy: any two ranges a row, forward and gradients."""

from functools import partial
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar_jax import visibility
from sdar_jax.attention import api, attention, chunked
from sdar_jax.attention import tiles as tiles_module
from sdar_jax.attention.tiles import EMPTY, FULL, PARTIAL, tile_kinds, visit_lists, visits
from sdar_jax.errors import ConfigError
from sdar_jax.visibility import Ranges
from tests.bad_input import refused
from tests.jaxprs import largest_array

IMPLEMENTATIONS = ["reference", "chunked"]


class Shape(NamedTuple):
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    dim: int


# More and fewer queries than keys, neither a multiple of the tiles; groups of one, two and all heads.
SHAPES = [Shape(2, 13, 10, 4, 2, 8), Shape(1, 5, 17, 3, 3, 4), Shape(1, 16, 16, 4, 1, 6)]
TILES = [5, 16]


def random_inputs(shape: Shape, seed: int, dtype=np.float64) -> list[np.ndarray]:
    """q, k, v and the cotangent of the output."""
    random = np.random.default_rng(seed)
    q_like = (shape.batch, shape.queries, shape.heads, shape.dim)
    k_like = (shape.batch, shape.keys, shape.kv_heads, shape.dim)
    return [random.normal(size=size).astype(dtype) for size in (q_like, k_like, k_like, q_like)]


@st.composite
def random_ranges(draw, shape: Shape) -> Ranges:
    """Two disjoint ranges a row in either order, one or both of them empty at times."""
    cuts = st.lists(st.integers(0, shape.keys), min_size=4, max_size=4).map(sorted)
    rows = shape.batch * shape.queries
    ranges = np.array(draw(st.lists(cuts, min_size=rows, max_size=rows)), np.int32).reshape(
        rows, 2, 2
    )
    flip = np.array(draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    ranges = np.where(flip[:, None, None], ranges[:, ::-1], ranges)
    ranges = ranges.reshape(shape.batch, shape.queries, 2, 2)
    return Ranges(jnp.asarray(ranges[..., 0]), jnp.asarray(ranges[..., 1]))


def visible(ranges: Ranges, keys: int) -> np.ndarray:
    """[B, Q, K], from the definition."""
    start, end = np.asarray(ranges.start), np.asarray(ranges.end)
    key = np.arange(keys)
    first, second = ((start[..., i, None] <= key) & (key < end[..., i, None]) for i in (0, 1))
    return first | second


def naive(q, k, v, d_out, mask: np.ndarray, scale: float):
    """Output and gradients for q, k and v in float64, head by head."""
    q, k, v, d_out = (x.astype(np.float64) for x in (q, k, v, d_out))
    groups = q.shape[2] // k.shape[2]
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        g = h // groups
        scores = np.where(mask[b], q[b, :, h] @ k[b, :, g].T * scale, -np.inf)
        exp = np.exp(scores - np.max(scores, axis=-1, keepdims=True, initial=-1e300))
        probs = exp / np.where(mask[b].any(-1, keepdims=True), exp.sum(-1, keepdims=True), 1)
        out[b, :, h] = probs @ v[b, :, g]
        d_probs = d_out[b, :, h] @ v[b, :, g].T
        d_scores = probs * (d_probs - (probs * d_probs).sum(-1, keepdims=True)) * scale
        dq[b, :, h] = d_scores @ k[b, :, g]
        dk[b, :, g] += d_scores.T @ q[b, :, h]
        dv[b, :, g] += probs.T @ d_out[b, :, h]
    return out, dq, dk, dv


@partial(jax.jit, static_argnames=("implementation", "tile", "scale"))
def forward_and_gradients(q, k, v, d_out, ranges, implementation, tile=128, scale=None):
    with mock.patch.object(chunked, "_TILE", tile):
        call = lambda q, k, v: attention(
            q, k, v, ranges, implementation=implementation, scale=scale
        )
        out, pullback = jax.vjp(call, q, k, v)
        return out, *pullback(d_out)


@pytest.mark.xla_defaults
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_equals_naive_attention(implementation, data, seed):
    shape = data.draw(st.sampled_from(SHAPES))
    ranges = data.draw(random_ranges(shape))
    tile = data.draw(st.sampled_from(TILES)) if implementation == "chunked" else 128
    with jax.enable_x64(True):
        inputs = random_inputs(shape, seed)
        got = forward_and_gradients(*inputs, ranges, implementation, tile)
    wanted = naive(*inputs, visible(ranges, shape.keys), shape.dim**-0.5)
    for ours, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["causal", "bidirectional", "hybrid"])
def test_paradigms_across_tiles(kind, implementation, x64):
    """Real ranges at the real tile size, rows and keys past one tile, packed documents and padding."""
    segment_ids = jnp.asarray(np.repeat([1, 2, 0, 4], [70, 30, 9, 31])[None].astype(np.int32))
    ranges = {
        "causal": visibility.causal,
        "bidirectional": visibility.bidirectional,
        "hybrid": partial(visibility.hybrid, block_size=8),
    }[kind](segment_ids)
    length = ranges.start.shape[1]
    shape = Shape(1, length, length, 2, 1, 4)
    inputs = random_inputs(shape, 0)
    got = forward_and_gradients(*inputs, ranges, implementation)
    wanted = naive(*inputs, visible(ranges, length), 0.5)
    for ours, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_is_as_good_as_bfloat16(implementation):
    """Scores and sums are float32, though scores are large: what is left is one rounding (2^-9) each of a probability
    and of the result.

    For q and k, also of a score's gradient, and of the output in it, which weighs more as it is part of a difference.
    """
    shape = Shape(1, 64, 64, 4, 2, 16)
    q, *rest = random_inputs(shape, 3)
    inputs = [jnp.asarray(x, jnp.bfloat16) for x in (8 * q, *rest)]
    ranges = visibility.hybrid(jnp.asarray(np.repeat([1, 2], [20, 12])[None].astype(np.int32)), 4)
    got = forward_and_gradients(*inputs, ranges, implementation, 16)
    wanted = naive(*(np.asarray(x, np.float64) for x in inputs), visible(ranges, 64), 0.25)
    for ours, theirs, roundings in zip(got, wanted, (2, 5, 5, 2), strict=True):
        assert ours.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs)
        assert error < roundings * 2**-9


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_that_see_nothing_give_zero_and_take_no_gradient(implementation):
    shape = Shape(1, 6, 9, 2, 1, 4)
    q, k, v, d_out = random_inputs(shape, 5, np.float32)
    nothing = jnp.zeros((1, 6, 2), jnp.int32)
    ranges = Ranges(
        nothing.at[:, :, 0].set(4), nothing.at[:, :, 0].set(jnp.array([4, 9, 4, 4, 8, 4]))
    )
    # Large enough for 1 / tiny or exp to overflow, were an empty row ever divided by its sum.
    got = forward_and_gradients(q * 1e3, k, v, d_out * 1e6, ranges, implementation, 4)
    out, dq = (np.asarray(x)[0] for x in got[:2])
    empty = [0, 2, 3, 5]
    assert not out[empty].any() and not dq[empty].any()
    assert out[[1, 4]].all() and all(np.isfinite(x).all() for x in got)
    alone = forward_and_gradients(
        q * 1e3, k, v, 0 * d_out + 1e6 * d_out * (out != 0), ranges, implementation, 4
    )
    for ours, theirs in zip(got, alone, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("largest_first", [True, False])
def test_huge_scores_do_not_overflow(implementation, largest_first, x64):
    """Scores of +-1e5 in tiles that come one after the other: the running maximum must carry over."""
    shape = Shape(1, 4, 12, 1, 1, 4)
    q, k, v, d_out = random_inputs(shape, 8)
    k[0, :6] *= 1e5 if largest_first else 1
    k[0, 6:] *= 1 if largest_first else 1e5
    ranges = Ranges(jnp.zeros((1, 4, 2), jnp.int32), jnp.full((1, 4, 2), jnp.array([12, 0])))
    got = forward_and_gradients(q, k, v, d_out, ranges, implementation, 4, scale=2.0)
    wanted = naive(q, k, v, d_out, np.ones((1, 4, 12), bool), 2.0)
    for ours, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def kinds_by_definition(ranges: Ranges, query_tile: int, key_tile: int, keys: int) -> np.ndarray:
    """[B, query tiles, key tiles]; FULL only where one range covers the tile for every query."""
    tiles = -(-keys // key_tile)
    mask = visible(ranges, tiles * key_tile).reshape(2, -1, query_tile, tiles, key_tile)
    alone = [
        visible(Ranges(*(x.at[..., 1 - i].set(0) for x in ranges)), tiles * key_tile)
        for i in (0, 1)
    ]
    covered = [x.reshape(mask.shape).all(axis=4) for x in alone]
    full = (covered[0] | covered[1]).all(axis=2)
    return np.where(full, FULL, np.where(mask.any(axis=(2, 4)), PARTIAL, EMPTY))


@pytest.mark.parametrize("compared", [1, 2**20])
@given(data=st.data(), tiles=st.sampled_from([(1, 4), (4, 3), (13, 10), (2, 1)]))
def test_tile_lists(data, tiles, compared):
    """Kinds, however many are compared at once, and what each list makes of them."""
    query_tile, key_tile = tiles
    shape = Shape(2, -(-13 // query_tile) * query_tile, 10, 1, 1, 1)
    ranges = data.draw(random_ranges(shape))
    with mock.patch.object(tiles_module, "_COMPARED", compared):
        kinds = tile_kinds(ranges, query_tile, key_tile, shape.keys)
    wanted = kinds_by_definition(ranges, query_tile, key_tile, shape.keys)
    np.testing.assert_array_equal(kinds, wanted)

    flat = visits(kinds)
    visited = np.argwhere(wanted != EMPTY)
    assert flat.count == len(visited) and flat.row.shape == (wanted.size,)
    np.testing.assert_array_equal(np.stack(flat[:3], axis=-1)[: len(visited)], visited)
    np.testing.assert_array_equal(flat.full[: len(visited)], wanted[tuple(visited.T)] == FULL)

    for listed, by_tile in (
        (visit_lists(kinds), wanted),
        (visit_lists(kinds.swapaxes(1, 2)), wanted.swapaxes(1, 2)),
    ):
        for index in np.ndindex(by_tile.shape[:2]):
            others = np.flatnonzero(by_tile[index])
            assert listed.count[index] == len(others)
            got = np.asarray(listed.entries[index])[: len(others)]
            np.testing.assert_array_equal(got, others * 2 + (by_tile[index][others] == FULL))


def test_tile_lists_hold_no_array_of_queries_by_key_tiles():
    """But one byte a pair of tiles, and a bounded number of comparisons."""
    length = 20480
    ranges = Ranges(*(jax.ShapeDtypeStruct((1, 2 * length, 2), jnp.int32) for _ in range(2)))
    compiled = jax.jit(lambda r: tile_kinds(r, 128, 128, 2 * length)).lower(ranges).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4e6 < 2 * length * (2 * length // 128)


def hybrid_loss(q, k, v, segment_ids):
    return attention(q, k, v, visibility.hybrid(segment_ids, 4), implementation="chunked").sum()


def abstract_inputs(length: int) -> list[jax.ShapeDtypeStruct]:
    shapes = [(1, 2 * length, heads, 32) for heads in (4, 2, 2)]
    floats = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return [*floats, jax.ShapeDtypeStruct((1, length), jnp.int32)]


def test_chunked_holds_no_array_of_queries_by_keys():
    """Not even of queries by key tiles: the largest is the queries themselves, and with them the tile pairs."""
    length = 8192
    assert (
        largest_array(jax.grad(hybrid_loss, (0, 1, 2)), *abstract_inputs(length))
        <= 2 * length * 4 * 32
    )


def test_memory_of_chunked_grows_linearly():
    def held(length: int) -> int:
        compiled = (
            jax.jit(jax.grad(hybrid_loss, (0, 1, 2))).lower(*abstract_inputs(length)).compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    assert held(8192) < 2.1 * held(4096)


def chosen(queries: int, keys: int, heads: int = 2, **options) -> str:
    like = lambda *shape: jnp.zeros(shape, jnp.float32)
    kv = like(1, keys, 2, 8)
    return api.choose(
        like(1, queries, heads, 8), kv, kv, options.get("implementation")
    ).implementation


def test_few_queries_and_few_scores_are_dense_and_the_rest_is_chunked():
    assert chosen(16, 32768) == "reference" and chosen(128, 256) == "reference"
    assert chosen(17, 32768) == "chunked" and chosen(300, 300) == "chunked"


@pytest.mark.parametrize("backend, kernel", [("gpu", "mosaic_gpu"), ("tpu", "mosaic_tpu")])
def test_kernels_are_chosen_where_they_can(backend, kernel):
    like = lambda *shape: jnp.zeros(shape, jnp.bfloat16)
    q, kv = like(1, 1024, 4, 128), like(1, 1024, 2, 128)
    odd, odd_kv = like(1, 1024, 4, 80), like(1, 1024, 2, 80)
    chip = SimpleNamespace(compute_capability="9.0", device_kind="some chip")
    with (
        mock.patch.object(jax, "default_backend", lambda: backend),
        mock.patch.object(jax, "devices", lambda: [chip]),
    ):
        assert api.choose(q, kv, kv, None).implementation == kernel
        assert api.choose(odd, odd_kv, odd_kv, None).implementation == "chunked"
        with refused(ConfigError, kernel, "80"):
            api.choose(odd, odd_kv, odd_kv, kernel)


@pytest.mark.parametrize("capability", ["8.0", "10.0"])
def test_gpus_without_kernels_get_chunked(capability):
    q = jnp.zeros((1, 1024, 4, 128), jnp.bfloat16)
    chip = SimpleNamespace(compute_capability=capability, device_kind="some chip")
    with (
        mock.patch.object(jax, "default_backend", lambda: "gpu"),
        mock.patch.object(jax, "devices", lambda: [chip]),
    ):
        assert api.choose(q, q, q, None).implementation == "chunked"
        with refused(ConfigError, "mosaic_gpu", capability, "'chunked'"):
            api.choose(q, q, q, "mosaic_gpu")


def test_override_holds_inside_and_ends_with_its_block():
    with api.override("reference"):
        assert chosen(300, 300) == "reference"
        assert chosen(300, 300, implementation="chunked") == "chunked"
    assert chosen(300, 300) == "chunked"
    with pytest.raises(RuntimeError), api.override("reference"):
        raise RuntimeError
    assert chosen(300, 300) == "chunked"


def test_bad_head_counts():
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in random_inputs(Shape(1, 2, 2, 3, 2, 4), 0))
    nothing = jnp.zeros((1, 2, 2), jnp.int32)
    with refused(ConfigError, "3 query heads", "2 key-value heads", "multiple"):
        attention(q, k, v, Ranges(nothing, nothing))


def test_unknown_implementation():
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in random_inputs(Shape(1, 2, 2, 2, 2, 4), 0))
    nothing = jnp.zeros((1, 2, 2), jnp.int32)
    with refused(ConfigError, "'flash'", "'reference', 'chunked', 'mosaic_gpu', 'mosaic_tpu'"):
        attention(q, k, v, Ranges(nothing, nothing), implementation="flash")
