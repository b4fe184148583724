"""Attention over visited tiles only, in plain XLA, for any backend: O(Q + K) memory, no Q x K array.

Forward and backward walk one list of visited tiles (tiles.py) with the online softmax and its gradient (Dao et al.,
FlashAttention, arXiv 2205.14135, algorithms 1 and 4). Query heads that share a key-value head are folded into the
rows of a tile.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sdar_jax.attention.tiles import TileList, visited_tiles
from sdar_jax.visibility import Ranges

# Smaller tiles waste less at block edges, larger ones amortise the loop; not tuned yet.
_TILE = 128


def attention(
    q: Float[Array, "B Q H D"],
    k: Float[Array, "B K G D"],
    v: Float[Array, "B K G D"],
    ranges: Ranges,
    *,
    scale: float,
) -> Float[Array, "B Q H D"]:
    """As `reference.attention`. Differentiable once, in q, k and v."""
    batch, queries, heads, dim = q.shape
    kv_heads = k.shape[2]
    query_tile, key_tile = min(_TILE, queries), min(_TILE, k.shape[1])
    ranges = Ranges(*(_pad(x, query_tile) for x in ranges))
    q_tiles = _to_query_tiles(_pad(q, query_tile), query_tile, kv_heads)
    k_tiles, v_tiles = (_to_key_tiles(_pad(x, key_tile), key_tile) for x in (k, v))
    out = _attend(q_tiles, k_tiles, v_tiles, ranges, scale)
    groups = heads // kv_heads
    out = out.reshape(batch, -1, kv_heads, groups, query_tile, v.shape[-1]).transpose(0, 1, 4, 2, 3, 5)
    return out.reshape(batch, -1, heads, v.shape[-1])[:, :queries]


def _pad(x: Array, tile: int) -> Array:
    """Zeros up to a multiple of `tile` on axis 1; zero ranges see nothing."""
    missing = -x.shape[1] % tile
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))


def _to_query_tiles(q: Array, tile: int, kv_heads: int) -> Array:
    """[B, Q, H, D] -> [B, Q / tile, kv_heads, groups * tile, D]."""
    batch, _, heads, dim = q.shape
    q = q.reshape(batch, -1, tile, kv_heads, heads // kv_heads, dim).transpose(0, 1, 3, 4, 2, 5)
    return q.reshape(batch, q.shape[1], kv_heads, -1, dim)


def _to_key_tiles(x: Array, tile: int) -> Array:
    """[B, K, kv_heads, D] -> [B, K / tile, kv_heads, tile, D]."""
    batch, _, kv_heads, dim = x.shape
    return x.reshape(batch, -1, tile, kv_heads, dim).transpose(0, 1, 3, 2, 4)


class _Walk(NamedTuple):
    """One visit: where it is, and which of its [rows, keys] are visible."""

    query: tuple[Array, Array]
    key: tuple[Array, Array]
    visible: Array


def _visit(tiles: TileList, ranges: Ranges, index: Array, shape: tuple[int, int]) -> _Walk:
    rows, key_tile = shape
    row, query, key = tiles.row[index], tiles.query[index], tiles.key[index]
    query_tile = ranges.start.shape[2]
    bounds = Ranges(*(x[row, query][None] for x in ranges))
    visible = bounds.sees(key * key_tile + jnp.arange(key_tile))[0]
    return _Walk((row, query), (row, key), jnp.tile(visible, (rows // query_tile, 1)))


def _tiled(ranges: Ranges, q: Array, k: Array) -> tuple[TileList, Ranges]:
    batch, query_tiles = q.shape[:2]
    query_tile = ranges.start.shape[1] // query_tiles
    tiles = visited_tiles(ranges, query_tile, k.shape[1], k.shape[3])
    return tiles, Ranges(*(x.reshape(batch, query_tiles, query_tile, 2) for x in ranges))


def _dot(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: Array, k: Array, v: Array, ranges: Ranges, scale: float) -> Array:
    return _forward(q, k, v, ranges, scale)[0]


def _forward(q: Array, k: Array, v: Array, ranges: Ranges, scale: float):
    tiles, ranges = _tiled(ranges, q, k)
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    shape = (q.shape[3], k.shape[3])

    def visit(index, carry):
        out, largest, total = carry
        walk = _visit(tiles, ranges, index, shape)
        at = walk.query
        scores = _dot("hrd,hkd->hrk", q[at], k[walk.key]) * scale
        scores = jnp.where(walk.visible, scores, -jnp.inf)
        peak = jnp.maximum(largest[at], scores.max(axis=-1))
        exp = jnp.exp(scores - peak[..., None])
        shrink = jnp.exp(largest[at] - peak)
        update = _dot("hrk,hkd->hrd", exp.astype(v.dtype), v[walk.key])
        out = out.at[at].set(out[at] * shrink[..., None] + update)
        return out, largest.at[at].set(peak), total.at[at].set(total[at] * shrink + exp.sum(axis=-1))

    # The lowest finite number, not -inf: rows that see nothing in a tile must not compute inf - inf.
    largest = jnp.full(q.shape[:-1], jnp.finfo(accumulate).min, accumulate)
    zero = jnp.zeros(q.shape[:-1] + v.shape[-1:], accumulate)
    out, largest, total = jax.lax.fori_loop(0, tiles.count, visit, (zero, largest, jnp.zeros_like(largest)))
    empty = total == 0
    out = out / jnp.where(empty, 1, total)[..., None]
    # +inf makes exp(score - logsumexp) zero in the backward of a row that sees nothing.
    logsumexp = jnp.where(empty, jnp.inf, largest + jnp.log(jnp.where(empty, 1, total)))
    return out.astype(q.dtype), logsumexp


def _attend_fwd(q, k, v, ranges, scale):
    out, logsumexp = _forward(q, k, v, ranges, scale)
    return out, (q, k, v, ranges, out, logsumexp)


def _attend_bwd(scale, residuals, d_out):
    q, k, v, ranges, out, logsumexp = residuals
    tiles, tiled_ranges = _tiled(ranges, q, k)
    accumulate = logsumexp.dtype
    delta = (d_out.astype(accumulate) * out.astype(accumulate)).sum(axis=-1)
    shape = (q.shape[3], k.shape[3])

    def visit(index, carry):
        dq, dk, dv = carry
        walk = _visit(tiles, tiled_ranges, index, shape)
        at, key = walk.query, walk.key
        scores = _dot("hrd,hkd->hrk", q[at], k[key]) * scale
        probs = jnp.where(walk.visible, jnp.exp(scores - logsumexp[at][..., None]), 0)
        d_probs = _dot("hrd,hkd->hrk", d_out[at], v[key])
        d_scores = (probs * (d_probs - delta[at][..., None]) * scale).astype(q.dtype)
        dq = dq.at[at].add(_dot("hrk,hkd->hrd", d_scores, k[key]))
        dk = dk.at[key].add(_dot("hrk,hrd->hkd", d_scores, q[at]))
        dv = dv.at[key].add(_dot("hrk,hrd->hkd", probs.astype(v.dtype), d_out[at]))
        return dq, dk, dv

    zeros = tuple(jnp.zeros(x.shape, accumulate) for x in (q, k, v))
    dq, dk, dv = jax.lax.fori_loop(0, tiles.count, visit, zeros)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)
