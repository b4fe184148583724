"""How the operands lie in memory before the kernels see them, and which tiles each program visits.

Query heads that share a key-value head are folded into rows: q [B, Q, H, D] becomes [B, H / fold, Q * fold, D], row
`position * fold + head % fold`, so that a tile of 128 rows spans few positions and touches few key tiles, however small
the window. The fold is the largest power of two in H / G (up to a tile), so that any H / G works: what is left over
are separate heads. XLA's transpose is one pass over q, which it fuses into what made q (norm and RoPE).

Keys and values stay [B, K, G, D]: a TMA box over (keys, D) reads one head of them, fills with zeros past the end, and
does not write past it. Rows past the end have empty ranges, so that nothing is padded but what a row has few of.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from sdar_jax.arithmetic import ceil_div, round_up
from sdar_jax.attention.tiles import tile_kinds, visit_lists
from sdar_jax.gpu_kernels import CONSUMERS, WARPGROUP_ROWS
from sdar_jax.visibility import Ranges

# Query rows or keys of a program.
ROW_TILE = CONSUMERS * WARPGROUP_ROWS

# Finer lists skip more, but grow; past this they are made coarser, up to a key tile's width, where most is lost.
_LIST_BYTES = 2**20

_PAST_EVERY_KEY = 2**30


class Problem(NamedTuple):
    """Sizes of one attention call. `fold` query heads share a row tile; `heads` counts query heads."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    dim: int
    fold: int

    @classmethod
    def of(cls, q: Array, k: Array) -> "Problem":
        batch, queries, heads, dim = q.shape
        kv_heads = k.shape[2]
        fold = min((heads // kv_heads) & -(heads // kv_heads), WARPGROUP_ROWS)
        return cls(batch, queries, k.shape[1], heads, kv_heads, dim, fold)

    @property
    def folded_heads(self) -> int:
        return self.heads // self.fold

    @property
    def rows(self) -> int:
        return self.queries * self.fold

    def padded_rows(self, tile: int) -> int:
        return round_up(self.rows, tile)

    def fold_heads(self, x: Array) -> Array:
        """Folds [B, Q, H, ...] into [B, H / fold, Q * fold, ...]."""
        trailing = x.shape[3:]
        x = x.reshape(self.batch, self.queries, self.folded_heads, self.fold, *trailing)
        return jnp.moveaxis(x, 2, 1).reshape(self.batch, self.folded_heads, self.rows, *trailing)

    def unfold_heads(self, x: Array) -> Array:
        """Unfolds [B, H / fold, rows, ...] into [B, Q, H, ...], cutting what was padded."""
        trailing = x.shape[3:]
        x = x[:, :, : self.rows].reshape(
            self.batch, self.folded_heads, self.queries, self.fold, *trailing
        )
        return jnp.moveaxis(x, 1, 2).reshape(self.batch, self.queries, self.heads, *trailing)

    def row_bounds(self, ranges: Ranges, tile: int) -> Array:
        """Lays out ranges as int32 [B, 4, padded rows]: a row sees the keys in [first, second) and in [third, fourth),
        ascending.

        An empty range goes last and starts and ends past every key.
        """
        empty = ranges.start >= ranges.end
        start, end = (jnp.where(empty, _PAST_EVERY_KEY, x) for x in ranges)
        order = jnp.argsort(start, axis=-1, stable=True)
        bounds = jnp.stack([jnp.take_along_axis(x, order, axis=-1) for x in (start, end)], axis=-1)
        rows = jnp.repeat(
            bounds.reshape(self.batch, self.queries, 4).swapaxes(1, 2), self.fold, axis=2
        )
        missing = self.padded_rows(tile) - self.rows
        return jnp.pad(rows, [(0, 0), (0, 0), (0, missing)], constant_values=_PAST_EVERY_KEY)


class Lists(NamedTuple):
    """The tiles that each program visits.

    Attributes:
        order: int32 [B, tiles], tiles with most visits first, so that those that run last are short.
        entries: as in tiles.VisitLists.
        count: as in tiles.VisitLists.
        rows: folded query rows that one of the lists' query tiles spans.
    """

    order: Array
    entries: Array
    count: Array
    rows: int


def visits_of_queries(problem: Problem, ranges: Ranges, key_tile: int) -> Lists:
    """Lists the key tiles of each query tile, which is ROW_TILE rows or, to keep the lists short, a power of two
    more."""
    kinds, rows = _kinds(problem, ranges, ROW_TILE, key_tile)
    return _lists(kinds, rows)


def visits_of_keys(problem: Problem, ranges: Ranges, row_tile: int) -> Lists:
    """Lists the query tiles, `row_tile` rows or more, of each tile of ROW_TILE keys."""
    kinds, rows = _kinds(problem, ranges, row_tile, ROW_TILE)
    return _lists(kinds.swapaxes(1, 2), rows)


def _kinds(problem: Problem, ranges: Ranges, rows: int, key_tile: int) -> tuple[Array, int]:
    positions = rows // problem.fold

    def size(positions: int) -> int:
        return 4 * ceil_div(problem.queries, positions) * ceil_div(problem.keys, key_tile)

    while positions < key_tile and size(positions) > _LIST_BYTES:
        positions *= 2
    missing = -problem.queries % positions
    padded = Ranges(*(jnp.pad(x, [(0, 0), (0, missing), (0, 0)]) for x in ranges))
    return tile_kinds(padded, positions, key_tile, problem.keys), positions * problem.fold


def _lists(kinds: Array, rows: int) -> Lists:
    lists = visit_lists(kinds)
    order = jnp.argsort(-lists.count, axis=-1, stable=True).astype(jnp.int32)
    return Lists(order, lists.entries, lists.count, rows)
