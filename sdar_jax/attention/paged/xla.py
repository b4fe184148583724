"""Paged attention in plain XLA, for CPUs and for what the kernels do not take.

A loop over groups of pages with the online softmax (Milakov and Gimelshein, arXiv 1805.02867), as long as the longest
row of a batch needs. A CPU takes the rows one by one, so that each costs its own length; all at once, and fewer keys at
a time, where none can be long, as small operations one after another would be most of the time.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sdar_jax.arithmetic import ceil_div
from sdar_jax.attention.paged.pages import folded, gathered, unfolded
from sdar_jax.devices.chips import platform

# Keys per step: their float32 tiles of a dozen heads stay in a core's second-level cache. Of rows that can have no more
# than that, fewer, as most will have few.
_KEYS, _FEW_KEYS = 256, 64
# Scores that a CPU holds at most of rows taken all at once.
_SCORES = 2**22


def unsupported(
    q: Array, k_pages: Array, v_pages: Array, page_table: Array, visible: Array
) -> None:
    """Accepts everything."""


def forward(
    q: Array, k_pages: Array, v_pages: Array, page_table: Array, visible: Array, *, scale: float
) -> Array:
    """Computes `paged_attention`, reading and holding a few pages per row at a time."""
    window, kv_heads, page = q.shape[1], k_pages.shape[1], k_pages.shape[2]
    short = page_table.shape[1] * page <= _KEYS
    pages = min(max(1, (_FEW_KEYS if short else _KEYS) // page), page_table.shape[1])
    page_table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % pages)))
    rows = _Rows(folded(q, kv_heads), page_table, visible)
    attend = partial(_attend, k_pages, v_pages, pages, scale)
    if _rows_one_by_one(rows, pages * page, short):
        one_by_one = jax.tree.map(lambda x: x[:, None], rows)
        out = jax.lax.map(attend, one_by_one)[:, 0]
    else:
        out = attend(rows)
    return unfolded(out, window).astype(q.dtype)


class _Rows(NamedTuple):
    """Some rows of the batch.

    Attributes:
        q: [N, G, rows, D].
        page_table: [N, M], M a multiple of the pages per step.
        visible: [N, W].
    """

    q: Array
    page_table: Array
    visible: Array


def _rows_one_by_one(rows: _Rows, keys: int, short: bool) -> bool:
    scores = rows.q.size // rows.q.shape[-1] * keys
    return platform() == "cpu" and len(rows.q) > 1 and (not short or scores > _SCORES)


class _State(NamedTuple):
    """The state of the online softmax: [N, G, rows, D], and twice [N, G, rows, 1]."""

    out: Array
    largest: Array
    total: Array


def _attend(k_pages: Array, v_pages: Array, pages: int, scale: float, rows: _Rows) -> Array:
    """Computes [N, G, rows, D] in the accumulating type."""
    accumulate = jnp.promote_types(rows.q.dtype, jnp.float32)
    keys = pages * k_pages.shape[2]
    limit = jnp.tile(rows.visible, (1, rows.q.shape[2] // rows.visible.shape[1]))[:, None, :, None]

    def step(i: Array, state: _State) -> _State:
        ids = jax.lax.dynamic_slice_in_dim(rows.page_table, i * pages, pages, axis=1)
        k = gathered(k_pages, ids)
        v = gathered(v_pages, ids)
        bad = ~jnp.isfinite(v).all(axis=-1)
        index = i * keys + jnp.arange(keys)
        scores = jnp.einsum("ngrd,ngkd->ngrk", rows.q, k, preferred_element_type=accumulate)
        # A value is multiplied, and 0 * NaN is NaN, where a score is selected: only the score marks what is bad.
        scores = scores * scale + jnp.where(bad, jnp.nan, 0)[:, :, None]
        scores = jnp.where(index < limit, scores, -jnp.inf)
        v = jnp.where(bad[..., None], 0, v)
        largest = jnp.maximum(state.largest, scores.max(axis=-1, keepdims=True))
        exp = jnp.exp(scores - largest)
        shrink = jnp.exp(state.largest - largest)
        update = jnp.einsum(
            "ngrk,ngkd->ngrd", exp.astype(v.dtype), v, preferred_element_type=accumulate
        )
        # A sum over the last axis would round by how many rows there are.
        total = jnp.einsum("ngrk,ngko->ngro", exp, jnp.ones((*exp.shape[:2], keys, 1), accumulate))
        return _State(state.out * shrink + update, largest, state.total * shrink + total)

    # The lowest finite number, not -inf: rows that see nothing must not compute inf - inf.
    largest = jnp.full((*rows.q.shape[:-1], 1), jnp.finfo(accumulate).min, accumulate)
    start = _State(jnp.zeros(rows.q.shape, accumulate), largest, jnp.zeros_like(largest))
    if rows.page_table.shape[1] == pages:
        end = step(jnp.int32(0), start)
    else:
        end = jax.lax.fori_loop(0, ceil_div(rows.visible.max(), keys), step, start)
    return end.out / jnp.where(end.total == 0, 1, end.total)
