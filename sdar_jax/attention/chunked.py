"""Attention over visited tiles only, in plain XLA, for any backend: O(Q + K) memory, no Q x K array.

Forward and backward loop over one list of visited tiles (tiles.py) with the online softmax and its gradient (Dao et
al., FlashAttention, arXiv 2205.14135, algorithms 1 and 4). Query heads that share a key-value head are folded into the
rows of a tile.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sdar_jax.attention.tiles import Visits, tile_kinds, visits
from sdar_jax.visibility import Ranges

# Smaller tiles waste less at block edges, larger ones amortise the loop; measured in docs/kernels.md.
_TILE = 128


def unsupported(q: Array, k: Array, v: Array) -> None:
    """Accepts everything."""


def forward(
    q: Float[Array, "B Q H D"],
    k: Float[Array, "B K G D"],
    v: Float[Array, "B K G D"],
    ranges: Ranges,
    *,
    scale: float,
) -> tuple[Float[Array, "B Q H D"], Float[Array, "B Q H"]]:
    """Computes what `reference.forward` does."""
    tiled = _Tiled.of(q, k, ranges)
    q_tiles = tiled.queries(q)
    k_tiles = tiled.keys(k)
    v_tiles = tiled.keys(v)
    accumulate = jnp.promote_types(q.dtype, jnp.float32)

    def visit(index, carry):
        out, largest, total = carry
        tile = tiled.visit(index)
        at = tile.query
        scores = _dot("hrd,hkd->hrk", q_tiles[at], k_tiles[tile.key]) * scale
        scores = jnp.where(tile.visible, scores, -jnp.inf)
        peak = jnp.maximum(largest[at], scores.max(axis=-1))
        exp = jnp.exp(scores - peak[..., None])
        shrink = jnp.exp(largest[at] - peak)
        update = _dot("hrk,hkd->hrd", exp.astype(v.dtype), v_tiles[tile.key])
        out = out.at[at].set(out[at] * shrink[..., None] + update)
        total = total.at[at].set(total[at] * shrink + exp.sum(axis=-1))
        return out, largest.at[at].set(peak), total

    # The lowest finite number, not -inf: rows that see nothing in a tile must not compute inf - inf.
    largest = jnp.full(q_tiles.shape[:-1], jnp.finfo(accumulate).min, accumulate)
    out = jnp.zeros(q_tiles.shape[:-1] + v.shape[-1:], accumulate)
    total = jnp.zeros_like(largest)
    out, largest, total = jax.lax.fori_loop(0, tiled.visits.count, visit, (out, largest, total))
    empty = total == 0
    total = jnp.where(empty, 1, total)
    logsumexp = jnp.where(empty, jnp.inf, largest + jnp.log(total))
    out = tiled.rows(out / total[..., None])
    return out.astype(q.dtype), tiled.rows(logsumexp[..., None])[..., 0]


def backward(q, k, v, ranges: Ranges, out: Array, logsumexp: Array, d_out: Array, *, scale: float):
    """Computes the gradients for q, k and v, each in its own dtype."""
    tiled = _Tiled.of(q, k, ranges)
    accumulate = logsumexp.dtype
    delta = (d_out.astype(accumulate) * out.astype(accumulate)).sum(axis=-1)
    q_tiles = tiled.queries(q)
    k_tiles = tiled.keys(k)
    v_tiles = tiled.keys(v)
    d_tiles = tiled.queries(d_out)
    # exp(score - inf) = 0 in a row that sees nothing, and in those that pad the last tile.
    logsumexp = tiled.queries(logsumexp[..., None], jnp.inf)[..., 0]
    delta = tiled.queries(delta[..., None])[..., 0]

    def visit(index, carry):
        dq, dk, dv = carry
        tile = tiled.visit(index)
        at, key = tile.query, tile.key
        scores = _dot("hrd,hkd->hrk", q_tiles[at], k_tiles[key]) * scale
        probs = jnp.where(tile.visible, jnp.exp(scores - logsumexp[at][..., None]), 0)
        d_probs = _dot("hrd,hkd->hrk", d_tiles[at], v_tiles[key])
        d_scores = (probs * (d_probs - delta[at][..., None]) * scale).astype(q.dtype)
        dq = dq.at[at].add(_dot("hrk,hkd->hrd", d_scores, k_tiles[key]))
        dk = dk.at[key].add(_dot("hrk,hrd->hkd", d_scores, q_tiles[at]))
        dv = dv.at[key].add(_dot("hrk,hrd->hkd", probs.astype(v.dtype), d_tiles[at]))
        return dq, dk, dv

    zeros = tuple(jnp.zeros(x.shape, accumulate) for x in (q_tiles, k_tiles, v_tiles))
    dq, dk, dv = jax.lax.fori_loop(0, tiled.visits.count, visit, zeros)
    return (
        tiled.rows(dq).astype(q.dtype),
        tiled.columns(dk).astype(k.dtype),
        tiled.columns(dv).astype(v.dtype),
    )


class _Visit(NamedTuple):
    """One visited pair of tiles: where they are, and which of their [rows, keys] are visible."""

    query: tuple[Array, Array]
    key: tuple[Array, Array]
    visible: Array


class _Tiled(NamedTuple):
    """The problem cut into tiles, queries padded with rows that see nothing."""

    visits: Visits
    ranges: Ranges
    query_tile: int
    key_tile: int
    shape: tuple[int, int, int, int, int]

    @classmethod
    def of(cls, q: Array, k: Array, ranges: Ranges) -> "_Tiled":
        batch, queries, heads, _ = q.shape
        keys, kv_heads = k.shape[1:3]
        query_tile = min(_TILE, queries)
        key_tile = min(_TILE, keys)
        ranges = Ranges(*(_pad(x, query_tile) for x in ranges))
        listed = visits(tile_kinds(ranges, query_tile, key_tile, keys))
        ranges = Ranges(*(x.reshape(batch, -1, query_tile, 2) for x in ranges))
        return cls(listed, ranges, query_tile, key_tile, (batch, queries, keys, heads, kv_heads))

    def queries(self, x: Array, fill: float = 0.0) -> Array:
        """Folds [B, Q, H, D] into [B, query tiles, kv_heads, groups * query_tile, D]."""
        batch, _, _, heads, kv_heads = self.shape
        x = _pad(x, self.query_tile, fill)
        x = x.reshape(batch, -1, self.query_tile, kv_heads, heads // kv_heads, x.shape[-1])
        x = x.transpose(0, 1, 3, 4, 2, 5)
        return x.reshape(*x.shape[:3], -1, x.shape[-1])

    def rows(self, x: Array) -> Array:
        """Inverts `queries`."""
        batch, queries, _, heads, kv_heads = self.shape
        x = x.reshape(batch, -1, kv_heads, heads // kv_heads, self.query_tile, x.shape[-1])
        x = x.transpose(0, 1, 4, 2, 3, 5)
        return x.reshape(batch, -1, heads, x.shape[-1])[:, :queries]

    def keys(self, x: Array) -> Array:
        """Folds [B, K, kv_heads, D] into [B, key tiles, kv_heads, key_tile, D]."""
        x = _pad(x, self.key_tile)
        return x.reshape(x.shape[0], -1, self.key_tile, *x.shape[2:]).transpose(0, 1, 3, 2, 4)

    def columns(self, x: Array) -> Array:
        """Inverts `keys`."""
        x = x.transpose(0, 1, 3, 2, 4)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : self.shape[2]]

    def visit(self, index: Array) -> _Visit:
        row = self.visits.row[index]
        query = self.visits.query[index]
        key = self.visits.key[index]
        bounds = Ranges(*(x[row, query][None] for x in self.ranges))
        visible = bounds.sees(key * self.key_tile + jnp.arange(self.key_tile))[0]
        _, _, _, heads, kv_heads = self.shape
        return _Visit((row, query), (row, key), jnp.tile(visible, (heads // kv_heads, 1)))


def _pad(x: Array, tile: int, fill: float = 0.0) -> Array:
    """Pads axis 1 to a multiple of `tile`; ranges padded with zeros see nothing."""
    missing = -x.shape[1] % tile
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)


def _dot(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))
