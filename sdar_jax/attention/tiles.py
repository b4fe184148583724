"""Which (query tile, key tile) pairs the ranges touch, as a flat list made inside jit."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sdar_jax.visibility import Ranges


class TileList(NamedTuple):
    """Visited tiles in (row, query tile, key tile) order; entries past `count` are unused.

    row, query, key: int32 [cap] indices, cap = B * query tiles * key tiles. count: int32 scalar.
    """

    row: Int[Array, " cap"]
    query: Int[Array, " cap"]
    key: Int[Array, " cap"]
    count: Int[Array, ""]


def visited_tiles(ranges: Ranges, query_tile: int, key_tiles: int, key_tile: int) -> TileList:
    """Tiles in which at least one query sees at least one key. The query axis is a multiple of `query_tile`."""
    touched = _touched(ranges, query_tile, key_tiles, key_tile)
    row, query, key = jnp.nonzero(touched, size=touched.size, fill_value=0)
    as_index = lambda x: x.astype(jnp.int32)
    return TileList(as_index(row), as_index(query), as_index(key), touched.sum(dtype=jnp.int32))


def _touched(ranges: Ranges, query_tile: int, key_tiles: int, key_tile: int) -> Bool[Array, "B queries keys"]:
    """Whether a tile is visited, [B, query tiles, key tiles]: how many ranges are open over it, counted at their ends.

    A comparison of every query with every key tile would grow with Q K.
    """
    batch, queries, _ = ranges.start.shape
    row = jnp.arange(batch)[:, None, None]
    query = (jnp.arange(queries) // query_tile)[:, None]
    one = (ranges.start < ranges.end).astype(jnp.int32)
    opened = jnp.zeros((batch, queries // query_tile, key_tiles + 1), jnp.int32)
    opened = opened.at[row, query, ranges.start // key_tile].add(one)
    opened = opened.at[row, query, (ranges.end + key_tile - 1) // key_tile].add(-one)
    return jnp.cumsum(opened, axis=-1)[..., :-1] > 0
