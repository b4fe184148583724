"""Lays out arrays for the kernels: padded to full tiles, heads first, the batch merged into the sequence.

A row of the batch is one stretch of a long packed sequence: tiles are numbered through, and ranges are shifted to where
the row's keys are.
"""

from math import gcd
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sdar_jax.arithmetic import ceil_div, round_up
from sdar_jax.attention.tile_sizes import TileSizes
from sdar_jax.visibility import Ranges

Array = jax.Array

# Lanes of a vector register: the unit of every tile, and the keys of a sub-block.
LANES = 128
# Rows of a packed bfloat16 register.
_SUBLANES = 16


class Layout(NamedTuple):
    """Sizes of the padded arrays and of their tiles, in positions; `rows` = groups * query_tile share a kv head."""

    batch: int
    queries: int
    keys: int
    kv_heads: int
    groups: int
    head_dim: int
    query_tile: int
    key_tile: int

    @classmethod
    def of(cls, q: Array, k: Array, tile_sizes: TileSizes) -> "Layout":
        batch, queries, heads, head_dim = q.shape
        keys, kv_heads = k.shape[1:3]
        groups = heads // kv_heads
        # Folded rows fill full registers of lanes, and each head's part of them full registers of sublanes.
        unit = max(LANES // gcd(groups, LANES), _SUBLANES)
        query_tile = max(tile_sizes.query_tile // groups // unit, 1) * unit
        query_tile = min(query_tile, round_up(queries, unit))
        key_tile = min(round_up(tile_sizes.key_tile, LANES), round_up(keys, LANES))
        return cls(batch, queries, keys, kv_heads, groups, head_dim, query_tile, key_tile)

    @property
    def rows(self) -> int:
        return self.groups * self.query_tile

    @property
    def query_tiles(self) -> int:
        """Query tiles of one batch row."""
        return ceil_div(self.queries, self.query_tile)

    @property
    def key_tiles(self) -> int:
        """Key tiles of one batch row."""
        return ceil_div(self.keys, self.key_tile)

    def pad_queries(self, x: Array) -> Array:
        """Pads axis 1 with zeros to full query tiles."""
        return _pad(x, self.query_tiles * self.query_tile)

    def pad_keys(self, x: Array) -> Array:
        """Pads axis 1 with zeros to full key tiles."""
        return _pad(x, self.key_tiles * self.key_tile)

    def to_queries(self, x: Array) -> Array:
        """Lays out [B, Q, H, D] as [kv heads, groups, B * padded Q, D]."""
        x = self.pad_queries(x)
        x = x.reshape(*x.shape[:2], self.kv_heads, self.groups, -1).transpose(2, 3, 0, 1, 4)
        return x.reshape(self.kv_heads, self.groups, -1, x.shape[-1])

    def from_queries(self, x: Array) -> Array:
        x = x.reshape(self.kv_heads, self.groups, self.batch, -1, x.shape[-1]).transpose(
            2, 3, 0, 1, 4
        )
        return x.reshape(self.batch, -1, self.kv_heads * self.groups, x.shape[-1])[
            :, : self.queries
        ]

    def to_keys(self, x: Array) -> Array:
        """Lays out [B, K, G, D] as [kv heads, B * padded K, D]."""
        x = self.pad_keys(x).transpose(2, 0, 1, 3)
        return x.reshape(self.kv_heads, -1, x.shape[-1])

    def to_keys_transposed(self, x: Array) -> Array:
        """Lays out [B, K, G, D] as [kv heads, D, B * padded K]."""
        x = self.pad_keys(x).transpose(2, 3, 0, 1)
        return x.reshape(self.kv_heads, x.shape[1], -1)

    def from_keys(self, x: Array) -> Array:
        x = x.reshape(self.kv_heads, self.batch, -1, x.shape[-1]).transpose(1, 2, 0, 3)
        return x[:, : self.keys]

    def to_rows(self, x: Array, fill: float) -> Array:
        """Lays out a number per row, [B, Q, H], as [kv heads, query tiles, 1, rows]."""
        missing = self.query_tiles * self.query_tile - self.queries
        x = jnp.pad(x, ((0, 0), (0, missing), (0, 0)), constant_values=fill)
        x = x.reshape(-1, self.query_tile, self.kv_heads, self.groups).transpose(2, 0, 3, 1)
        return x.reshape(self.kv_heads, -1, 1, self.rows)

    def from_rows(self, x: Array) -> Array:
        x = x.reshape(self.kv_heads, -1, self.groups, self.query_tile).transpose(1, 3, 0, 2)
        return x.reshape(self.batch, -1, self.kv_heads * self.groups)[:, : self.queries]

    def clip(self, ranges: Ranges) -> Ranges:
        """Cuts ranges where the keys end, and pads them to full query tiles with empty ones."""
        return Ranges(*(self.pad_queries(jnp.clip(x, 0, self.keys)) for x in ranges))

    def bounds(self, clipped: Ranges) -> Array:
        """Lays out start, end, start, end of each row's keys in the merged sequence: int32 [query tiles, 4, rows]."""
        shift = jnp.arange(self.batch, dtype=jnp.int32) * (self.key_tiles * self.key_tile)
        pairs = jnp.stack(clipped, axis=-1) + shift[:, None, None, None]
        tiled = pairs.reshape(-1, self.query_tile, 4).swapaxes(1, 2)
        return jnp.tile(tiled, (1, 1, self.groups))


def _pad(x: Array, length: int) -> Array:
    missing = length - x.shape[1]
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x
