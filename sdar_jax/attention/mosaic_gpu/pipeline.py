"""Shared by the three kernels: the programs that own rows, their key tiles in flight, and masks.

The grid is (batch, head, tile): tiles of one head run together, its keys are in the L2 cache.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from sdar_jax.attention.mosaic_gpu.layout import Problem
from sdar_jax.attention.tile_sizes import TileSizes
from sdar_jax.gpu_kernels import COLUMNS, CONSUMERS, ROWS, TILE, along, wait_until_free


class RowProgram(NamedTuple):
    """The 128 rows of a program that owns queries, and the key tiles that it visits."""

    batch: Array
    head: Array
    first_row: Array
    entries: Any
    count: Array

    @classmethod
    def of(cls, order, entries, count, list_rows: int, tile: int) -> "RowProgram":
        batch, head, program = (lax.axis_index(name) for name in ("batch", "head", "tile"))
        tiles_a_list = list_rows // tile
        which = order[batch, lax.div(program, tiles_a_list)]
        first_row = which * list_rows + lax.rem(program, tiles_a_list) * tile
        return cls(batch, head, first_row, entries.at[batch, which], count[batch, which])


class KeyTiles(NamedTuple):
    """Slots of key and value tiles [stages, key_tile, D], and their barriers."""

    k: Any
    v: Any
    k_ready: Any
    v_ready: Any
    k_free: Any
    v_free: Any

    @classmethod
    def scratch(cls, tile_sizes: TileSizes, dim: int, dtype) -> "KeyTiles":
        tiles = plgpu.SMEM((tile_sizes.stages, tile_sizes.key_tile, dim), dtype)
        ready = plgpu.Barrier(num_barriers=tile_sizes.stages)
        free = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tile_sizes.stages)
        return cls(tiles, tiles, ready, ready, free, free)

    def fill(
        self,
        k,
        v,
        program: RowProgram,
        problem: Problem,
        tile_sizes: TileSizes,
        *,
        values_first: bool,
    ) -> None:
        """Runs the producer of a row program. Of a key and a value tile, it loads first the one that is released
        first."""
        kv_head = lax.div(program.head * problem.fold, problem.heads // problem.kv_heads)
        both = [(k, self.k, self.k_ready, self.k_free), (v, self.v, self.v_ready, self.v_free)]

        @pl.loop(0, program.count)
        def _(step):
            slot = lax.rem(step, tile_sizes.stages)
            keys = pl.ds((program.entries[step] >> 1) * tile_sizes.key_tile, tile_sizes.key_tile)
            for source, tiles, ready, free in reversed(both) if values_first else both:
                wait_until_free(free, step, tile_sizes.stages)
                plgpu.copy_gmem_to_smem(
                    source.at[program.batch, keys, kv_head], tiles.at[slot], ready.at[slot]
                )


def masked_unless_full(
    scores: Array, entry: Array, first_key: Array, bounds, query_axis: int
) -> Array:
    """Puts -inf where a query does not see a key; skipped where the list's entry says that each sees them all."""
    return lax.cond(
        (entry & 1) == 1,
        lambda scores: scores,
        lambda scores: masked(scores, first_key, bounds, query_axis),
        scores,
    )


def masked(scores: Array, first_key: Array, bounds, query_axis: int) -> Array:
    """Puts -inf where a query does not see a key, in passes, to hold few of the bounds at a time.

    Args:
        bounds: int32 [4, queries] in shared memory, as Problem.row_bounds.
    """
    layout = (ROWS, COLUMNS)[query_axis]
    keys = first_key + plgpu.broadcasted_iota(jnp.int32, scores.shape, 1 - query_axis, layout=TILE)
    tile = (scores.shape[0], scores.shape[1])
    bound = lambda i: along(plgpu.load(bounds.at[i], layout=layout), tile, query_axis)
    scores = jnp.where(keys < bound(0), -jnp.inf, scores)
    scores = jnp.where((bound(1) <= keys) & (keys < bound(2)), -jnp.inf, scores)
    return jnp.where(bound(3) <= keys, -jnp.inf, scores)
