"""What is not finite reaches those alone who see it: every implementation, forward and gradients, and pages."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar_jax.attention import api, attention
from sdar_jax.attention.paged import paged_attention, write_pages
from sdar_jax.visibility import Ranges
from tests.attention.mosaic_gpu_interpreter import extended_interpreter
from tests.attention.test_attention import Shape, random_inputs, random_ranges, visible

BAD = [np.nan, np.inf, -np.inf]


@partial(jax.jit, static_argnames="implementation")
def attend(q, k, v, ranges: Ranges, implementation):
    return attention(q, k, v, ranges, implementation=implementation)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_only_queries_that_see_a_bad_key_are_bad(implementation, data, seed):
    """The others have the bits that they have beside zeros."""
    shape = data.draw(st.sampled_from([Shape(2, 13, 10, 4, 2, 8), Shape(1, 150, 140, 2, 1, 4)]))
    ranges = data.draw(random_ranges(shape)) if shape.batch == 2 else halves(shape)
    q, k, v, _ = random_inputs(shape, seed, np.float32)
    random = np.random.default_rng(seed)
    bad = np.zeros(k.shape[:3], bool)
    for x in (k, v):
        damaged = random.random(k.shape[:3]) < 0.02
        x[damaged, 0] = random.choice(BAD, damaged.sum())
        bad |= damaged
    sees = np.einsum("bqk,bkg->bqg", visible(ranges, shape.keys), bad) > 0
    spoiled = np.repeat(sees, shape.heads // shape.kv_heads, axis=2)
    got = np.asarray(attend(q, k, v, ranges, implementation))
    wanted = np.asarray(
        attend(q, *(np.where(bad[..., None], 0, x) for x in (k, v)), ranges, implementation)
    )
    assert np.isnan(got[spoiled]).all()
    np.testing.assert_array_equal(got[~spoiled], wanted[~spoiled])


def halves(shape: Shape) -> Ranges:
    """Two documents that share tiles: queries of either half see that half of the keys."""
    start = np.zeros((shape.batch, shape.queries, 2), np.int32)
    end = start.copy()
    half = np.arange(shape.queries) >= shape.queries // 2
    start[:, half, 0], end[:, half, 0] = shape.keys // 2, shape.keys
    end[:, ~half, 0] = shape.keys // 2
    return Ranges(jnp.asarray(start), jnp.asarray(end))


def in_interpreter(implementation: str):
    stack = contextlib.ExitStack()
    if implementation == "mosaic_gpu":
        stack.enter_context(extended_interpreter())
    if implementation.startswith("mosaic"):
        stack.enter_context(api.override(implementation, interpret=True))
    return stack


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "mosaic_tpu"])
def test_kernels_keep_a_bad_document_apart(implementation):
    """Two documents in one tile: the second's NaN leaves the first's output as it is."""
    shape = Shape(1, 128, 128, 2, 1, 64)
    q, k, v, _ = (jnp.asarray(x, jnp.bfloat16) for x in random_inputs(shape, 0))
    damaged = (x.at[0, 100].set(jnp.nan) for x in (q, k, v))
    with in_interpreter(implementation):
        got, wanted = (
            np.asarray(attention(*x, halves(shape)), np.float32) for x in (damaged, (q, k, v))
        )
    assert np.isnan(got[:, 64:]).all()
    np.testing.assert_array_equal(got[:, :64], wanted[:, :64])


@pytest.mark.parametrize("implementation", ["reference", "xla", "mosaic_gpu", "mosaic_tpu"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("of", ["key", "value"])
def test_a_window_of_two_blocks_of_which_the_second_is_bad(implementation, bad, of):
    """As a prompt is read: the first block's queries do not see the second block, and must not feel it."""
    dim, page, window = 64, 16, 8
    random = np.random.default_rng(1)
    q, k, v = (
        jnp.asarray(random.normal(size=(1, window, heads, dim)), jnp.bfloat16)
        for heads in (4, 2, 2)
    )
    table = jnp.array([[2, 0]], jnp.int32)
    sees = jnp.array([[14] * 4 + [18] * 4], jnp.int32)
    earlier = [jnp.asarray(random.normal(size=(3, 2, page, dim)), jnp.bfloat16) for _ in range(2)]

    def attend(k, v):
        pages = write_pages(
            *earlier, k, v, table, jnp.array([10], jnp.int32), jnp.array([window], jnp.int32)
        )
        if implementation.startswith("mosaic"):
            return paged_attention(q, *pages, table, sees)
        return paged_attention(q, *pages, table, sees, implementation=implementation)

    damage = lambda x: x.at[0, 6, 1, 3].set(bad)
    with in_interpreter(implementation):
        wanted = np.asarray(attend(k, v), np.float32)
        got = np.asarray(attend(damage(k), v) if of == "key" else attend(k, damage(v)), np.float32)
    np.testing.assert_array_equal(got[:, :4], wanted[:, :4])
    np.testing.assert_array_equal(got[:, :, :2], wanted[:, :, :2])
    assert np.isnan(got[:, 4:, 2:]).all()


def test_pages_hold_finite_values_and_the_key_tells():
    k = jnp.ones((1, 3, 2, 4))
    v = k.at[0, 1, 1, 2].set(jnp.inf)
    pages = jnp.zeros((2, 2, 4, 4))
    k_pages, v_pages = write_pages(
        pages, pages, k, v, jnp.array([[1]]), jnp.array([1]), jnp.array([3])
    )
    assert np.isfinite(v_pages).all() and not np.asarray(v_pages[1, 1, 2]).any()
    assert np.isnan(k_pages[1, 1, 2]).all()
    assert np.isnan(k_pages).sum() == 4
