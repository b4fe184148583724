"""The forward kernel: online softmax (Dao et al., FlashAttention, arXiv 2205.14135, algorithm 1) on transposed scores.

S^T = K Q^T has a column a row of queries, so that the softmax's sums run along sublanes, which is adding registers, and
its statistics are rows that broadcast for free. The output is accumulated transposed, O^T = V^T P^T, from values that
come transposed.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sdar_jax.attention.mosaic_tpu import visit_list
from sdar_jax.attention.mosaic_tpu.common import (
    LOG2_E,
    Specs,
    folded,
    hide,
    looped,
    matmul,
    part,
    pipelined,
    walk,
)
from sdar_jax.attention.mosaic_tpu.layout import LANES, Layout
from sdar_jax.attention.mosaic_tpu.visit_list import VisitList

Array = jax.Array

# Sums of probabilities are kept a sublane, and added up once at the end.
_PARTIAL_SUMS = 8
# Finite, so that a row that has seen nothing yet computes 0 and not inf - inf.
_LOWEST = float(jnp.finfo(jnp.float32).min)


def forward(
    lists: list[VisitList],
    bounds: Array,
    q: Array,
    k: Array,
    v_transposed: Array,
    layout: Layout,
    *,
    scale: float,
    ahead: int,
    interpret: bool,
) -> tuple[Array, Array]:
    """Computes the output [kv heads, groups, B * Q, D] and logsumexp [kv heads, query tiles, 1, rows]."""
    specs = Specs(layout, by_key=False)
    rows = jax.ShapeDtypeStruct((layout.kv_heads, bounds.shape[0], 1, layout.rows), jnp.float32)
    out, logsumexp = walk(
        partial(_kernel, scale=scale * LOG2_E, ahead=ahead),
        lists,
        (bounds, q, k, v_transposed),
        [specs.bounds(), specs.queries(), specs.keys(), specs.keys_transposed()],
        [specs.queries(), specs.rows()],
        [jax.ShapeDtypeStruct(q.shape, q.dtype), rows],
        [(1, layout.rows), (_PARTIAL_SUMS, layout.rows), (layout.head_dim, layout.rows)],
        name="range_attention_forward",
        interpret=interpret,
    )
    return out, logsumexp


def _kernel(words, bounds, q, k, v_transposed, out, logsumexp, peak, total, acc, *, scale, ahead):
    visit = visit_list.read(words, pl.program_id(1))

    @pl.when(visit.first)
    def _start():
        peak[...] = jnp.full_like(peak, _LOWEST)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    def scores(index):
        return matmul(k[0, part(index)], folded(q), (1, 1)) * scale

    def add(index, scores, running):
        running, shrink, probs = _softmax(scores, running)
        acc[...] = acc[...] * shrink + matmul(
            v_transposed[0, :, part(index)], probs.astype(q.dtype), (1, 0)
        )
        return running

    @pl.when(visit.full)
    def _full():
        running = peak[...], total[...]

        def consume(index, scores):
            nonlocal running
            running = add(index, scores, running)

        pipelined(k.shape[1] // LANES, ahead, scores, consume)
        peak[...], total[...] = running

    @pl.when(~visit.full)
    def _partial():
        first_key = visit.inner * k.shape[1]

        def seen(index):
            return hide(scores(index), bounds[0], first_key + index * LANES)

        def consume(index, scores):
            peak[...], total[...] = add(index, scores, (peak[...], total[...]))

        looped(visit.low, visit.high, ahead, seen, consume)

    @pl.when(visit.last)
    def _finish():
        sums = total[...].sum(axis=0, keepdims=True)
        empty = sums == 0
        sums = jnp.where(empty, 1.0, sums)
        out[0] = (acc[...] / sums).T.astype(out.dtype).reshape(out.shape[1:])
        logsumexp[0, 0] = jnp.where(empty, jnp.inf, peak[...] * math.log(2) + jnp.log(sums))


def _softmax(
    scores: Array, running: tuple[Array, Array]
) -> tuple[tuple[Array, Array], Array, Array]:
    """Does one step: gives the new (peak, sums), what to shrink the accumulator by, and the probabilities [keys,
    rows]."""
    peak, total = running
    highest = jnp.maximum(peak, scores.max(axis=0, keepdims=True))
    shrink = jnp.exp2(peak - highest)
    probs = jnp.exp2(scores - highest)
    sums = probs.reshape(-1, _PARTIAL_SUMS, probs.shape[1]).sum(axis=0)
    return (highest, total * shrink + sums), shrink, probs
