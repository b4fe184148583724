"""The kernel of dK and dV: 128 keys a program, over the query rows that see them, of every head that reads them.

Scores are transposed, S^T = K Q^T, so that P^T and dS^T are left operands as they come from the products, in
registers: dV = P^T dO and dK = scale dS^T Q, with P and dS as in query_gradient.py. A program owns its keys: the sum
over query heads is in it.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from sdar_jax.attention.mosaic_gpu.layout import ROW_TILE, Problem, visits_of_keys
from sdar_jax.attention.mosaic_gpu.pipeline import masked_unless_full
from sdar_jax.attention.mosaic_gpu.query_gradient import Residuals
from sdar_jax.attention.tile_sizes import TileSizes
from sdar_jax.gpu_kernels import (
    COLUMNS,
    CONSUMERS,
    LOG2E,
    TILE,
    WARPGROUP_ROWS,
    along,
    filled,
    launch,
    plus_product,
    roles,
    wait_until_free,
)
from sdar_jax.visibility import Ranges


class _Own(NamedTuple):
    """Shared memory of a consumer. `ready`: its keys and values have come."""

    k: Any
    v: Any
    ready: Any


class _RowTiles(NamedTuple):
    """Slots of query rows: bounds and residuals come and go with q. Residuals: -logsumexp / scale and -delta."""

    q: Any
    bounds: Any
    residuals: Any
    d_out: Any
    q_ready: Any
    d_out_ready: Any
    q_free: Any
    d_out_free: Any

    @classmethod
    def scratch(cls, tile_sizes: TileSizes, dim: int, dtype) -> "_RowTiles":
        rows = plgpu.SMEM((tile_sizes.stages, tile_sizes.query_tile, dim), dtype)
        bounds = plgpu.SMEM((tile_sizes.stages, 4, tile_sizes.query_tile), jnp.int32)
        residuals = plgpu.SMEM((tile_sizes.stages, 2, tile_sizes.query_tile), jnp.float32)
        q_ready = plgpu.Barrier(num_barriers=tile_sizes.stages, num_arrivals=3)
        d_out_ready = plgpu.Barrier(num_barriers=tile_sizes.stages)
        free = plgpu.Barrier(num_barriers=tile_sizes.stages, num_arrivals=CONSUMERS)
        return cls(rows, bounds, residuals, rows, q_ready, d_out_ready, free, free)


class _Program(NamedTuple):
    """The keys of a program and the query tiles that it visits.

    A visit is all rows of some positions: of each of `heads` folded heads, `tiles_a_head` tiles.
    """

    batch: Array
    head: Array
    which: Array
    entries: Any
    steps: Array
    heads: int
    tiles_a_head: int

    @classmethod
    def of(
        cls, order, entries, count, problem: Problem, tile_sizes: TileSizes, list_rows: int
    ) -> "_Program":
        batch, head, program = (lax.axis_index(name) for name in ("batch", "head", "tile"))
        which = order[batch, program]
        heads, tiles_a_head = (
            problem.folded_heads // problem.kv_heads,
            list_rows // tile_sizes.query_tile,
        )
        steps = count[batch, which] * (heads * tiles_a_head)
        return cls(batch, head, which, entries.at[batch, which], steps, heads, tiles_a_head)

    def entry(self, step: Array) -> Array:
        return self.entries[lax.div(step, self.heads * self.tiles_a_head)]

    def rows(self, step: Array) -> tuple[Array, Array]:
        """Finds the folded head and tile of its rows."""
        part = lax.rem(step, self.heads * self.tiles_a_head)
        tile = (self.entry(step) >> 1) * self.tiles_a_head + lax.rem(part, self.tiles_a_head)
        return self.head * self.heads + lax.div(part, self.tiles_a_head), tile


def key_gradients(
    q: Array, k: Array, v: Array, ranges: Ranges, residuals: Residuals, d_out: Array,
    *, scale: float, tile_sizes: TileSizes, interpret: bool,
) -> tuple[Array, Array]:  # fmt: skip
    """Computes dK and dV, [B, K, G, D]."""
    problem = Problem.of(q, k)
    lists = visits_of_keys(problem, ranges, tile_sizes.query_tile)
    keys = plgpu.SMEM((CONSUMERS, WARPGROUP_ROWS, problem.dim), k.dtype)
    own = _Own(keys, keys, plgpu.Barrier(num_barriers=CONSUMERS, num_arrivals=2))
    operands = (
        problem.fold_heads(q),
        k,
        v,
        problem.fold_heads(d_out),
        problem.row_bounds(ranges, lists.rows),
        residuals.folded(problem, lists.rows, (-1 / scale, -1.0)),
        lists.order,
        lists.entries,
        lists.count,
    )
    return launch(
        partial(_kernel, problem=problem, tile_sizes=tile_sizes, list_rows=lists.rows, scale=scale),
        operands,
        (jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        (own, _RowTiles.scratch(tile_sizes, problem.dim, q.dtype)),
        {"batch": problem.batch, "head": problem.kv_heads, "tile": -(-problem.keys // ROW_TILE)},
        "range_attention_dkv",
        interpret,
    )


def _kernel(
    q, k, v, d_out, bounds, residuals, order, entries, count, dk, dv, own: _Own, tiles: _RowTiles,
    *, problem: Problem, tile_sizes: TileSizes, list_rows: int, scale: float,
):  # fmt: skip
    program = _Program.of(order, entries, count, problem, tile_sizes, list_rows)
    batch, head = program.batch, program.head

    def consume(warpgroup):
        first_key = program.which * ROW_TILE + warpgroup * WARPGROUP_ROWS
        keys = pl.ds(first_key, WARPGROUP_ROWS)
        mine = _Own(*(ref.at[warpgroup] for ref in own))
        plgpu.copy_gmem_to_smem(k.at[batch, keys, head], mine.k, mine.ready)
        plgpu.copy_gmem_to_smem(v.at[batch, keys, head], mine.v, mine.ready)
        plgpu.barrier_wait(mine.ready)
        k_gradient, v_gradient = _differentiate(
            mine, tiles, program, tile_sizes, first_key, scale * LOG2E
        )
        mine.k[...] = (k_gradient * scale).astype(k.dtype)
        mine.v[...] = v_gradient.astype(v.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mine.k, dk.at[batch, keys, head])
        plgpu.copy_smem_to_gmem(mine.v, dv.at[batch, keys, head])
        plgpu.wait_smem_to_gmem(0)

    def produce():
        @pl.loop(0, program.steps)
        def _(step):
            slot = lax.rem(step, tile_sizes.stages)
            from_head, tile = program.rows(step)
            rows = pl.ds(tile * tile_sizes.query_tile, tile_sizes.query_tile)
            # In the order in which they are released.
            wait_until_free(tiles.d_out_free, step, tile_sizes.stages)
            ready = tiles.d_out_ready.at[slot]
            plgpu.copy_gmem_to_smem(d_out.at[batch, from_head, rows], tiles.d_out.at[slot], ready)
            wait_until_free(tiles.q_free, step, tile_sizes.stages)
            ready = tiles.q_ready.at[slot]
            plgpu.copy_gmem_to_smem(q.at[batch, from_head, rows], tiles.q.at[slot], ready)
            plgpu.copy_gmem_to_smem(bounds.at[batch, :, rows], tiles.bounds.at[slot], ready)
            plgpu.copy_gmem_to_smem(
                residuals.at[batch, from_head, :, rows], tiles.residuals.at[slot], ready
            )

    roles(consume, produce)


def _differentiate(
    mine: _Own,
    tiles: _RowTiles,
    program: _Program,
    tile_sizes: TileSizes,
    first_key: Array,
    scale: float,
):
    """Computes dK / scale and dV of a consumer's keys, float32 [64, D]; `scale` takes scores to base 2."""
    shape = (WARPGROUP_ROWS, tile_sizes.query_tile)

    def visit(step, carry):
        k_gradient, v_gradient = carry
        slot = lax.rem(step, tile_sizes.stages)
        residual = lambda i: along(
            plgpu.load(tiles.residuals.at[slot, i], layout=COLUMNS), shape, 1
        )
        plgpu.barrier_wait(tiles.q_ready.at[slot])
        # What is subtracted from a product is where its sum starts: a value a column takes registers only there.
        scores = plus_product(residual(0), mine.k, tiles.q.at[slot].T)
        scores = masked_unless_full(
            scores, program.entry(step), first_key, tiles.bounds.at[slot], 1
        )
        weights = jnp.exp2(scores * scale)
        plgpu.barrier_wait(tiles.d_out_ready.at[slot])
        # One product at a time: more operands and sums in flight are more than the registers.
        v_gradient = plus_product(v_gradient, weights.astype(tiles.q.dtype), tiles.d_out.at[slot])
        d_weights = plus_product(residual(1), mine.v, tiles.d_out.at[slot].T)
        plgpu.barrier_arrive(tiles.d_out_free.at[slot])
        d_scores = (weights * d_weights).astype(tiles.q.dtype)
        k_gradient = plus_product(k_gradient, d_scores, tiles.q.at[slot])
        # Reads without the TMA engine must be fenced before it may overwrite what they read.
        plgpu.commit_smem()
        plgpu.barrier_arrive(tiles.q_free.at[slot])
        return k_gradient, v_gradient

    nothing = filled(0.0, (WARPGROUP_ROWS, mine.k.shape[-1]), TILE)
    return lax.fori_loop(0, program.steps, visit, (nothing, nothing))
