"""The TPU kernels in the interpreter, against naive attention in float64.

Their operands are copied by Pallas' own pipeline, never by hand, so that there are no races to look for.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar_jax import visibility
from sdar_jax.attention import attention, mosaic_tpu
from sdar_jax.attention.mosaic_tpu import visit_list
from sdar_jax.attention.mosaic_tpu.layout import LANES, Layout
from sdar_jax.attention.tile_sizes import TileSizes, tile_sizes_for
from sdar_jax.errors import ConfigError
from sdar_jax.groups import GroupConfig, group_starts
from sdar_jax.visibility import Ranges
from tests.attention.test_attention import Shape, naive, random_inputs, visible
from tests.bad_input import refused

# One or two tiles of queries, two or three of keys, each of two sub-blocks.
TILE_SIZES = TileSizes(query_tile=128, key_tile=256, stages=1)
# Groups of 1, 2, 4 and 8; more and fewer queries than keys; no length is a multiple of a tile.
SHAPES = [
    Shape(1, 200, 400, 2, 2, 64),
    Shape(2, 150, 270, 4, 2, 64),
    Shape(1, 70, 520, 4, 1, 128),
    Shape(1, 40, 300, 8, 1, 64),
]
SQUARE = Shape(1, 600, 600, 4, 2, 64)


@partial(jax.jit, static_argnames=("tile_sizes", "scale"))
def forward_and_gradients(q, k, v, d_out, ranges, tile_sizes=TILE_SIZES, scale=0.125):
    out, logsumexp = mosaic_tpu.forward(
        q, k, v, ranges, scale=scale, interpret=True, tile_sizes=tile_sizes
    )
    back = partial(mosaic_tpu.backward, scale=scale, interpret=True, tile_sizes=tile_sizes)
    return out, *back(q, k, v, ranges, out, logsumexp, d_out), logsumexp


def naive_logsumexp(q, k, mask, scale=0.125):
    k = np.repeat(np.asarray(k, np.float64), q.shape[2] // k.shape[2], axis=2)
    scores = np.einsum("bqhd,bkhd->bqhk", np.asarray(q, np.float64), k) * scale
    scores = np.where(mask[:, :, None], scores, -np.inf)
    empty = ~mask.any(axis=-1)[..., None]
    return np.where(empty, np.inf, np.log(np.exp(scores).sum(axis=-1) + empty))


def check(inputs, ranges: Ranges, **options) -> None:
    """Float32 results equal float64 ones up to float32's rounding."""
    mask = visible(ranges, inputs[1].shape[1])
    *got, logsumexp = forward_and_gradients(*inputs, ranges, **options)
    for ours, theirs in zip(got, naive(*inputs, mask, 0.125), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6 * max(1, np.abs(theirs).max()))
    np.testing.assert_allclose(logsumexp, naive_logsumexp(*inputs[:2], mask), rtol=0, atol=3e-6)


def ranges_from(random: np.random.Generator, shape: Shape) -> Ranges:
    """Two disjoint ranges a row in either order; runs of rows see the same, or nothing, so that tiles may too."""
    rows = (shape.batch, shape.queries)
    cuts = np.sort(random.integers(0, shape.keys + 1, (*rows, 4)), axis=-1).reshape(*rows, 2, 2)
    wide = random.random(rows) < 0.2
    cuts[wide] = np.array([[0, shape.keys], [0, 0]])
    cuts[random.random(rows) < 0.1] = 0
    flipped = random.random(rows) < 0.5
    cuts[flipped] = cuts[flipped][:, ::-1]
    alike = np.arange(shape.queries) // random.choice([1, 16, 150]) * 16 % shape.queries
    cuts = cuts[:, alike].astype(np.int32)
    return Ranges(jnp.asarray(cuts[..., 0]), jnp.asarray(cuts[..., 1]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@given(seed=st.integers(0, 2**32 - 1))
def test_equals_naive_attention(shape, seed):
    check(random_inputs(shape, seed, np.float32), ranges_from(np.random.default_rng(seed), shape))


@pytest.mark.parametrize(
    "kind",
    ["causal", "bidirectional", "hybrid", "packed causal", "packed hybrid", "packed groups hybrid"],
)
def test_paradigms(kind):
    """Hidden, partial and full tiles; documents and padding where packed."""
    length = SQUARE.queries // (2 if "hybrid" in kind else 1)
    lengths = (
        np.array([length]) if "packed" not in kind else length * np.array([45, 30, 5, 20]) // 100
    )
    documents = np.repeat(np.array([1, 2, 0, 3])[: len(lengths)], lengths)[None].astype(np.int32)
    make = {"causal": visibility.causal, "bidirectional": visibility.bidirectional}
    make["hybrid"] = partial(visibility.hybrid, block_size=4)
    if "groups" in kind:
        ids = jnp.asarray(documents)
        starts = group_starts(ids, ids > 0, jax.random.key(2), GroupConfig(4, 20), block_size=4)
        make["hybrid"] = partial(visibility.hybrid, block_size=4, group_start=starts)
    check(random_inputs(SQUARE, 1, np.float32), make[kind.split()[-1]](jnp.asarray(documents)))


def test_bfloat16_is_as_good_as_bfloat16():
    """Scores and sums are float32: as in test_attention, of which these are the bounds."""
    q, *rest = random_inputs(SQUARE, 3)
    inputs = [jnp.asarray(x, jnp.bfloat16) for x in (4 * q, *rest)]
    ranges = visibility.hybrid(jnp.asarray(np.repeat([1, 2], [200, 100])[None].astype(np.int32)), 4)
    *got, _ = forward_and_gradients(*inputs, ranges)
    wanted = naive(
        *(np.asarray(x, np.float64) for x in inputs), visible(ranges, SQUARE.keys), 0.125
    )
    for ours, theirs, roundings in zip(got, wanted, (2, 5, 5, 2), strict=True):
        assert ours.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs)
        assert error < roundings * 2**-9


def test_tiles_that_see_nothing_give_zero():
    """Whole tiles of queries and of keys without a visible pair are still written; huge inputs change nothing."""
    q, k, v, d_out = random_inputs(SQUARE, 5, np.float32)
    start = jnp.zeros((1, SQUARE.queries, 2), jnp.int32)
    seeing = jnp.arange(SQUARE.queries) % 7 == 0
    seeing = seeing & (jnp.arange(SQUARE.queries) >= 128)
    end = start.at[..., 0].set(jnp.where(seeing, 250, 0))
    ranges = Ranges(start, end)
    check((q, k, v, d_out), ranges)
    out, dq, dk, dv, logsumexp = forward_and_gradients(q * 1e3, k, v, d_out * 1e6, ranges)
    hidden = ~np.asarray(seeing)
    assert (
        not out[:, hidden].any()
        and not dq[:, hidden].any()
        and not dk[:, 256:].any()
        and not dv[:, 256:].any()
    )
    assert np.isposinf(logsumexp[:, hidden]).all() and np.isfinite(logsumexp[:, ~hidden]).all()
    assert all(np.isfinite(x).all() for x in (out, dq, dk, dv))


@pytest.mark.parametrize("largest_first", [True, False])
def test_huge_scores_do_not_overflow(largest_first):
    """Scores of 1e5 and more in one tile and small ones in the next: the running maximum carries over."""
    q, k, v, d_out = random_inputs(SQUARE, 8, np.float32)
    k[:, slice(None, 256) if largest_first else slice(256, None)] *= 1e5
    ranges = visibility.bidirectional(jnp.ones((1, SQUARE.keys), jnp.int32))
    out, *gradients, _ = forward_and_gradients(q, k, v, d_out, ranges)
    assert all(np.isfinite(x).all() for x in gradients)
    scores = np.einsum("bqhd,bkhd->bqhk", q.astype(np.float64), np.repeat(k, 2, axis=2)) * 0.125
    best, second = -np.sort(-scores, axis=-1)[..., :2].transpose(3, 0, 1, 2)
    # A float32 score of 1e5 is good to 0.05: only where one key wins is the output known.
    won = best - second > 20
    assert won.mean() > 0.9
    values = np.repeat(v, 2, axis=2)[0, scores.argmax(axis=-1), np.arange(SQUARE.heads)]
    np.testing.assert_allclose(out[won], values[won], rtol=1e-6)


def test_ranges_past_the_keys_see_no_padding():
    shape = SHAPES[0]
    inputs = random_inputs(shape, 6, np.float32)
    ranges = ranges_from(np.random.default_rng(6), shape)
    beyond = Ranges(
        ranges.start, jnp.where(ranges.end == shape.keys, shape.keys + 1000, ranges.end)
    )
    assert (beyond.end != ranges.end).any()
    for ours, theirs in zip(
        *(forward_and_gradients(*inputs, x) for x in (ranges, beyond)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_same_bits_twice_and_in_several_calls(monkeypatch):
    shape = SHAPES[1]
    inputs = random_inputs(shape, 7, np.float32)
    ranges = ranges_from(np.random.default_rng(7), shape)
    first, second = (forward_and_gradients(*inputs, ranges) for _ in range(2))
    # Two calls for the forward and dQ, and for dK/dV.
    monkeypatch.setattr(visit_list, "MAX_VISITS", 8)
    layout = Layout.of(*(jnp.asarray(x) for x in inputs[:2]), TILE_SIZES)
    clipped = layout.clip(ranges)
    assert [
        len(visit_list.visit_lists(clipped, layout, by_key=by_key)) for by_key in (False, True)
    ] == [2, 2]
    in_calls = jax.jit(partial(forward_and_gradients.__wrapped__, tile_sizes=TILE_SIZES))(
        *inputs, ranges
    )
    for ours, again, cut in zip(first, second, in_calls, strict=True):
        np.testing.assert_array_equal(ours, again)
        np.testing.assert_array_equal(ours, cut)


@partial(jax.jit, static_argnames=("layout", "by_key"))
def listed(ranges, layout, by_key):
    return visit_list.visit_lists(layout.clip(ranges), layout, by_key=by_key)


def decoded(visits: visit_list.VisitList) -> list[tuple[int, ...]]:
    words = np.asarray(visits.words)
    return [tuple(int(x) for x in visit_list.read(words, i)) for i in range(int(visits.count))]


@pytest.mark.parametrize("by_key", [False, True])
@given(seed=st.integers(0, 2**32 - 1))
def test_visit_lists(by_key, seed):
    """Every visible pair of tiles once, with its flags, outer tiles in order; an outer tile without any has one."""
    shape = Shape(2, 300, 700, 4, 2, 64)
    ranges = ranges_from(np.random.default_rng(seed), shape)
    q, k, *_ = (jnp.asarray(x, jnp.float32) for x in random_inputs(shape, 0))
    layout = Layout.of(q, k, TILE_SIZES)
    (visits,) = listed(ranges, layout, by_key)
    mask = np.zeros(
        (2, layout.query_tiles * layout.query_tile, layout.key_tiles * layout.key_tile), bool
    )
    mask[:, : shape.queries, : shape.keys] = visible(ranges, shape.keys)
    mask = mask.reshape(2, layout.query_tiles, layout.query_tile, layout.key_tiles, -1, LANES)
    mask = mask.swapaxes(2, 3)
    if by_key:
        mask = mask.swapaxes(1, 2)
    outer_tiles, inner_tiles = mask.shape[1:3]
    wanted = []
    for batch, outer in np.ndindex(2, outer_tiles):
        row = [
            (
                outer + batch * outer_tiles,
                inner + batch * inner_tiles,
                0,
                0,
                tile.all(),
                touched[0],
                touched[-1] + 1,
            )
            for inner, tile in enumerate(mask[batch, outer])
            if (touched := np.flatnonzero(tile.any(axis=(0, 2)))).size
        ]
        row = row or [(outer + batch * outer_tiles, batch * inner_tiles, 0, 0, 0, 0, 0)]
        row[0] = (*row[0][:2], 1, *row[0][3:])
        row[-1] = (*row[-1][:3], 1, *row[-1][4:])
        wanted += [tuple(int(x) for x in entry) for entry in row]
    assert decoded(visits) == wanted


@pytest.mark.parametrize("kernel", ["forward", "dq", "dkv"])
@pytest.mark.parametrize("heads", [(16, 8), (32, 8), (32, 4)])
def test_list_of_a_long_row_stays_under_a_megabyte(kernel, heads):
    length = 2 * 20480

    def make(q, k, ranges):
        layout = Layout.of(q, k, tile_sizes_for("mosaic_tpu", kernel, 128))
        return visit_list.visit_lists(layout.clip(ranges), layout, by_key=kernel == "dkv")

    q, k = (jax.ShapeDtypeStruct((1, length, count, 128), jnp.bfloat16) for count in heads)
    bounds = jax.ShapeDtypeStruct((1, length, 2), jnp.int32)
    (visits,) = jax.eval_shape(make, q, k, Ranges(bounds, bounds))
    assert visits.words.size * 4 < 2**20


@pytest.mark.parametrize(
    ("dim", "dtypes", "told"),
    [
        (96, ("float32",) * 3, ("96", "64", "128")),
        (64, ("float32", "bfloat16", "float32"), ("bfloat16", "all three")),
    ],
)
def test_what_is_not_supported_says_why(dim, dtypes, told):
    q, k, v = (jnp.zeros((1, 8, 2, dim), dtype) for dtype in dtypes)
    nothing = jnp.zeros((1, 8, 2), jnp.int32)
    with refused(ConfigError, "mosaic_tpu", *told):
        attention(q, k, v, Ranges(nothing, nothing), implementation="mosaic_tpu")


def test_too_many_tiles_are_not_supported():
    reasons = []
    q, k = (jax.ShapeDtypeStruct((2**10, 2**14, heads, 128), jnp.bfloat16) for heads in (32, 8))
    jax.eval_shape(lambda q, k: reasons.append(mosaic_tpu.unsupported(q, k, k)), q, k)
    assert "smaller batch" in reasons[0]
