"""The backward kernels (FlashAttention, algorithm 4), on transposed scores as in the forward.

With P = exp(S - logsumexp), dP = dO V^T and dS = P (dP - delta), delta = sum(dO O):
dQ = scale dS K, walked by query tile, and dK = scale dS^T Q, dV = P^T dO, walked by key tile. Each tile of a gradient
is summed by one program in the order of the list: the same bits every time.
"""

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


def query_gradient(
    lists: list[VisitList],
    bounds: Array,
    q: Array,
    d_out: Array,
    logsumexp: Array,
    delta: Array,
    k: Array,
    k_transposed: Array,
    v: Array,
    layout: Layout,
    *,
    scale: float,
    ahead: int,
    interpret: bool,
) -> Array:
    """Computes dQ, shaped and laid out as q."""
    specs = Specs(layout, by_key=False)
    (dq,) = walk(
        partial(_query_kernel, scale=scale, ahead=ahead),
        lists,
        (bounds, q, d_out, logsumexp, delta, k, k_transposed, v),
        [
            specs.bounds(),
            specs.queries(),
            specs.queries(),
            specs.rows(),
            specs.rows(),
            specs.keys(),
            specs.keys_transposed(),
            specs.keys(),
        ],
        [specs.queries()],
        [jax.ShapeDtypeStruct(q.shape, q.dtype)],
        [(layout.head_dim, layout.rows)],
        name="range_attention_dq",
        interpret=interpret,
    )
    return dq


def key_gradients(
    lists: list[VisitList],
    bounds: Array,
    q: Array,
    d_out: Array,
    logsumexp: Array,
    delta: Array,
    k: Array,
    v: Array,
    layout: Layout,
    *,
    scale: float,
    ahead: int,
    interpret: bool,
) -> tuple[Array, Array]:
    """Computes dK and dV, shaped and laid out as k and v."""
    specs = Specs(layout, by_key=True)
    dk, dv = walk(
        partial(_key_kernel, scale=scale, ahead=ahead),
        lists,
        (bounds, q, d_out, logsumexp, delta, k, v),
        [
            specs.bounds(),
            specs.queries(),
            specs.queries(),
            specs.rows(),
            specs.rows(),
            specs.keys(),
            specs.keys(),
        ],
        [specs.keys(), specs.keys()],
        [jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        [(layout.key_tile, layout.head_dim)] * 2,
        name="range_attention_dkv",
        interpret=interpret,
    )
    return dk, dv


def _query_kernel(
    words, bounds, q, d_out, logsumexp, delta, k, k_transposed, v, dq, acc, *, scale, ahead
):
    visit = visit_list.read(words, pl.program_id(1))
    _zero_first(visit.first, acc)

    def add(index, products):
        _, d_scores = _differentiate(products, logsumexp, delta)
        acc[...] += matmul(k_transposed[0, :, part(index)], d_scores.astype(q.dtype), (1, 0))

    _visit(
        visit,
        bounds,
        partial(_products, q, d_out, k, v, scale),
        add,
        k.shape[1],
        ahead,
        visit.inner,
    )

    @pl.when(visit.last)
    def _finish():
        dq[0] = (acc[...] * scale).T.astype(dq.dtype).reshape(dq.shape[1:])


def _key_kernel(
    words, bounds, q, d_out, logsumexp, delta, k, v, dk, dv, dk_acc, dv_acc, *, scale, ahead
):
    visit = visit_list.read(words, pl.program_id(1))
    _zero_first(visit.first, dk_acc, dv_acc)

    def add(index, products):
        probs, d_scores = _differentiate(products, logsumexp, delta)
        dv_acc[part(index)] += matmul(probs.astype(q.dtype), folded(d_out), (1, 0))
        dk_acc[part(index)] += matmul(d_scores.astype(q.dtype), folded(q), (1, 0))

    _visit(
        visit,
        bounds,
        partial(_products, q, d_out, k, v, scale),
        add,
        k.shape[1],
        ahead,
        visit.outer,
    )

    @pl.when(visit.last)
    def _finish():
        dk[0] = (dk_acc[...] * scale).astype(dk.dtype)
        dv[0] = dv_acc[...].astype(dv.dtype)


def _zero_first(first: Array, *accumulators) -> None:
    @pl.when(first)
    def _start():
        for acc in accumulators:
            acc[...] = jnp.zeros_like(acc)


def _products(q, d_out, k, v, scale, index) -> tuple[Array, Array]:
    """Scores in units of log 2, and the probabilities' gradient, of one sub-block: [keys, rows]."""
    scores = matmul(k[0, part(index)], folded(q), (1, 1)) * (scale * LOG2_E)
    return scores, matmul(v[0, part(index)], folded(d_out), (1, 1))


def _differentiate(products: tuple[Array, Array], logsumexp, delta) -> tuple[Array, Array]:
    """Probabilities and the gradient of the scores, without the scale."""
    scores, d_probs = products
    # A row that sees nothing has logsumexp = inf: its probabilities are exp2(-inf) = 0.
    probs = jnp.exp2(scores - logsumexp[0, 0])
    return probs, probs * (d_probs - delta[0, 0])


def _visit(visit, bounds, products, add, key_tile: int, ahead: int, key_index) -> None:
    @pl.when(visit.full)
    def _full():
        pipelined(key_tile // LANES, ahead, products, add)

    @pl.when(~visit.full)
    def _partial():
        def seen(index):
            scores, d_probs = products(index)
            return hide(scores, bounds[0], key_index * key_tile + index * LANES), d_probs

        looped(visit.low, visit.high, ahead, seen, add)
