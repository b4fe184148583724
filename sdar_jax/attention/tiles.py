"""The (query tile, key tile) pairs that the ranges touch, listed inside jit.

`tile_kinds` classifies every pair, `visits` and `visit_lists` write the visible ones down: flat for one loop over the
batch, or a list per tile for kernels that give each tile its own program. Lists have a static cap and a dynamic count.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sdar_jax.arithmetic import ceil_div
from sdar_jax.visibility import Ranges

EMPTY, PARTIAL, FULL = 0, 1, 2

# Comparisons of queries with key tiles held at once, so that memory does not grow with their product.
_COMPARED = 2**20

Kinds = Int[Array, "B queries keys"]


class Visits(NamedTuple):
    """Visited tiles in (row, query tile, key tile) order; entries past `count` are unused.

    Attributes:
        row: int32 [cap], index of the row, cap = B * query tiles * key tiles.
        query: int32 [cap], index of the query tile.
        key: int32 [cap], index of the key tile.
        full: bool [cap], whether every query of the tile sees every key of it.
        count: int32 scalar.
    """

    row: Int[Array, " cap"]
    query: Int[Array, " cap"]
    key: Int[Array, " cap"]
    full: Bool[Array, " cap"]
    count: Int[Array, ""]


class VisitLists(NamedTuple):
    """The visited tiles of one axis for each tile of the other, ascending; entries past `count` are unused.

    Attributes:
        entries: int32 [B, tiles, cap], index * 2 + full.
        count: int32 [B, tiles].
    """

    entries: Int[Array, "B tiles cap"]
    count: Int[Array, "B tiles"]


def tile_kinds(ranges: Ranges, query_tile: int, key_tile: int, keys: int) -> Kinds:
    """Classifies each pair as EMPTY, PARTIAL or FULL: int8 [B, Q / query_tile, ceil(keys / key_tile)].

    A tile that only two ranges together cover counts as PARTIAL, as does one that reaches past `keys`. The query axis
    is a multiple of `query_tile`; pad it with empty ranges.
    """
    batch, queries, _ = ranges.start.shape
    first = jnp.arange(ceil_div(keys, key_tile), dtype=jnp.int32) * key_tile

    def one_tile(bounds: tuple[Array, Array]) -> Array:
        start = bounds[0].reshape(query_tile * 2, 1)
        end = bounds[1].reshape(query_tile * 2, 1)
        touched = (start < first + key_tile) & (first < end) & (start < end)
        covered = ((start <= first) & (first + key_tile <= end)).reshape(query_tile, 2, -1)
        return touched.any(axis=0).astype(jnp.int8) + covered.any(axis=1).all(axis=0)

    tiled = tuple(x.reshape(-1, query_tile, 2) for x in ranges)
    at_once = max(1, _COMPARED // (query_tile * first.size))
    kinds = jax.lax.map(one_tile, tiled, batch_size=at_once)
    return kinds.reshape(batch, queries // query_tile, -1)


def visits(kinds: Kinds) -> Visits:
    """Lists every visited tile of the batch in one list."""
    visited = kinds != EMPTY
    found = jnp.nonzero(visited, size=visited.size, fill_value=0)
    row, query, key = (index.astype(jnp.int32) for index in found)
    return Visits(
        row,
        query,
        key,
        full=kinds[row, query, key] == FULL,
        count=visited.sum(dtype=jnp.int32),
    )


def visit_lists(kinds: Kinds) -> VisitLists:
    """Lists for each query tile the key tiles it visits; with `kinds.swapaxes(1, 2)` the query tiles of each key
    tile."""
    visited = kinds != EMPTY
    tiles = jnp.arange(kinds.shape[2], dtype=jnp.int32)
    # Stable: the visited come first, in order.
    order = jnp.argsort(~visited, axis=-1, stable=True).astype(jnp.int32)
    entries = tiles * 2 + (kinds == FULL)
    return VisitLists(
        entries=jnp.take_along_axis(entries, order, axis=-1),
        count=visited.sum(axis=-1, dtype=jnp.int32),
    )
