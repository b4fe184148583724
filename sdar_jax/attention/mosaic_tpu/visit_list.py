"""The visits of a kernel as one flat list of integers, for scalar memory.

Two int32 a visit: outer tile * 2^16 + inner tile, and its flags. The outer tile is the one that stays while its inner
tiles go by: the query tile in the forward and dQ, the key tile in dK/dV.

Scalar memory holds 1 MB on v5e, v5p and v6e, and pads every row of a 2-D array: hence one dimension, and hence lists
longer than MAX_VISITS are cut into several calls.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sdar_jax.attention.mosaic_tpu.layout import LANES, Layout
from sdar_jax.attention.tiles import EMPTY, FULL, tile_kinds
from sdar_jax.visibility import Ranges

Array = jax.Array

# 512 KB of scalar memory.
MAX_VISITS = 2**16
MAX_TILES = 2**16
_FIRST, _LAST, _FULL, _LOW, _HIGH, _BITS = 0, 1, 2, 3, 11, 8


class VisitList(NamedTuple):
    """words: int32 [2 * cap], two a visit. count: int32 scalar, how many of them are visits, at least one a tile."""

    words: Array
    count: Array


class Visit(NamedTuple):
    """One entry, read in a kernel. Sub-blocks [low, high) of its keys, LANES each, are visible to some row."""

    outer: Array
    inner: Array
    first: Array
    last: Array
    full: Array
    low: Array
    high: Array


def outer(words, index):
    return jax.lax.shift_right_logical(words[2 * index], 16)


def inner(words, index):
    return words[2 * index] & (MAX_TILES - 1)


def read(words, index) -> Visit:
    flags = words[2 * index + 1]
    bit = lambda at: (flags >> at) & 1 == 1
    low, high = ((flags >> at) & (2**_BITS - 1) for at in (_LOW, _HIGH))
    return Visit(
        outer(words, index), inner(words, index), bit(_FIRST), bit(_LAST), bit(_FULL), low, high
    )


def visit_lists(clipped: Ranges, layout: Layout, *, by_key: bool) -> list[VisitList]:
    """Visits in the order of the outer tiles, which are key tiles if `by_key`; one list for each call."""
    keys_outer = jnp.arange(layout.batch, dtype=jnp.int32)[:, None, None] * layout.key_tiles
    key = keys_outer + jnp.arange(layout.key_tiles, dtype=jnp.int32)
    query = jnp.arange(layout.batch * layout.query_tiles, dtype=jnp.int32).reshape(
        layout.batch, -1, 1
    )
    flags = _flags(clipped, layout)
    grids = jnp.broadcast_arrays(query, key, flags)
    if by_key:
        grids = [x.swapaxes(1, 2) for x in grids]
    query, key, flags = (x.reshape(-1, x.shape[2]) for x in grids)
    tiles = key * MAX_TILES + query if by_key else query * MAX_TILES + key
    at_once = max(MAX_VISITS // tiles.shape[1], 1)
    return [
        _flat(tiles[at : at + at_once], flags[at : at + at_once])
        for at in range(0, len(tiles), at_once)
    ]


def _flags(clipped: Ranges, layout: Layout) -> Array:
    """Computes FULL, LOW and HIGH of every pair of tiles, int32 [B, query tiles, key tiles]; 0 for a hidden one."""
    kinds = tile_kinds(clipped, layout.query_tile, LANES, layout.key_tiles * layout.key_tile)
    kinds = kinds.reshape(*kinds.shape[:2], layout.key_tiles, -1)
    parts = jnp.arange(kinds.shape[-1], dtype=jnp.int32)
    touched = kinds != EMPTY
    full = (kinds == FULL).all(axis=-1)
    low = jnp.where(touched, parts, 2**_BITS - 1).min(axis=-1)
    high = jnp.where(touched, parts + 1, 0).max(axis=-1)
    flags = (full << _FULL) + (low << _LOW) + (high << _HIGH)
    return jnp.where(touched.any(axis=-1), flags, 0)


def _flat(tiles: Array, flags: Array) -> VisitList:
    """Lists the visible pairs of [outer, inner]; an outer tile without any gets one visit of nothing, to write its
    zeros."""
    visited = flags != 0
    visited = visited.at[:, 0].set(visited[:, 0] | ~visited.any(axis=1))
    order = jnp.cumsum(visited, axis=1, dtype=jnp.int32)
    flags += ((order == 1) << _FIRST) + ((order == order[:, -1:]) << _LAST)
    (at,) = jnp.nonzero(visited.reshape(-1), size=visited.size, fill_value=0)
    words = jnp.stack([tiles.reshape(-1)[at], flags.reshape(-1)[at]], axis=1)
    return VisitList(words.reshape(-1), visited.sum(dtype=jnp.int32))
