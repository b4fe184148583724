"""The kernel of dQ: 128 query rows a program, over the key tiles they visit.

With P = exp(S scale - logsumexp) and delta = rowsum(dO * O): dS = P * (dO V^T - delta), dQ = scale dS K (Dao et al.,
FlashAttention, arXiv 2205.14135, appendix B). dQ and dK/dV are two kernels that both recompute P, so that every sum has
one owner and one order: no atomics, and the same bits each time.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from sdar_jax.attention.mosaic_gpu.layout import ROW_TILE, Problem, visits_of_queries
from sdar_jax.attention.mosaic_gpu.pipeline import KeyTiles, RowProgram, masked_unless_full
from sdar_jax.attention.tile_sizes import TileSizes
from sdar_jax.gpu_kernels import (
    CONSUMERS,
    LOG2E,
    ROWS,
    TILE,
    WARPGROUP_ROWS,
    along,
    filled,
    launch,
    plus_product,
    roles,
)
from sdar_jax.visibility import Ranges


class Residuals(NamedTuple):
    """The forward's residuals: logsumexp, and delta = rowsum(dO * O), both float32 [B, Q, H]."""

    logsumexp: Array
    delta: Array

    @classmethod
    def of(cls, out: Array, logsumexp: Array, d_out: Array) -> "Residuals":
        return cls(logsumexp, jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1))

    def folded(self, problem: Problem, tile: int, factors: tuple[float, float]) -> Array:
        """Folds both into [B, H / fold, 2, rows padded to `tile`], times their factors."""
        scaled = [x * factor for x, factor in zip(self, factors, strict=True)]
        rows = problem.fold_heads(jnp.stack(scaled, axis=-1)).swapaxes(2, 3)
        return jnp.pad(
            rows, [(0, 0), (0, 0), (0, 0), (0, problem.padded_rows(tile) - problem.rows)]
        )


class _Own(NamedTuple):
    """Shared memory of a consumer. `ready`: its rows have come."""

    q: Any
    d_out: Any
    bounds: Any
    residuals: Any
    ready: Any


def query_gradient(
    q: Array, k: Array, v: Array, ranges: Ranges, residuals: Residuals, d_out: Array,
    *, scale: float, tile_sizes: TileSizes, interpret: bool,
) -> Array:  # fmt: skip
    """Computes dQ, [B, Q, H, D]."""
    problem = Problem.of(q, k)
    lists = visits_of_queries(problem, ranges, tile_sizes.key_tile)
    tiles = problem.padded_rows(lists.rows) // ROW_TILE
    rows = plgpu.SMEM((CONSUMERS, WARPGROUP_ROWS, problem.dim), q.dtype)
    own = _Own(
        rows,
        rows,
        plgpu.SMEM((CONSUMERS, 4, WARPGROUP_ROWS), jnp.int32),
        plgpu.SMEM((CONSUMERS, 2, WARPGROUP_ROWS), jnp.float32),
        plgpu.Barrier(num_barriers=CONSUMERS, num_arrivals=4),
    )
    operands = (
        problem.fold_heads(q),
        k,
        v,
        problem.fold_heads(d_out),
        problem.row_bounds(ranges, lists.rows),
        residuals.folded(problem, lists.rows, (LOG2E, 1.0)),
        lists.order,
        lists.entries,
        lists.count,
    )
    dq = launch(
        partial(_kernel, problem=problem, tile_sizes=tile_sizes, list_rows=lists.rows, scale=scale),
        operands,
        jax.ShapeDtypeStruct(
            (problem.batch, problem.folded_heads, problem.rows, problem.dim), q.dtype
        ),
        (own, KeyTiles.scratch(tile_sizes, problem.dim, k.dtype)),
        {"batch": problem.batch, "head": problem.folded_heads, "tile": tiles},
        "range_attention_dq",
        interpret,
    )
    return problem.unfold_heads(dq)


def _kernel(
    q, k, v, d_out, bounds, residuals, order, entries, count, dq, own: _Own, tiles: KeyTiles,
    *, problem: Problem, tile_sizes: TileSizes, list_rows: int, scale: float,
):  # fmt: skip
    program = RowProgram.of(order, entries, count, list_rows, ROW_TILE)
    batch, head = program.batch, program.head

    def consume(warpgroup):
        rows = pl.ds(program.first_row + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        mine = _Own(*(ref.at[warpgroup] for ref in own))
        plgpu.copy_gmem_to_smem(q.at[batch, head, rows], mine.q, mine.ready)
        plgpu.copy_gmem_to_smem(d_out.at[batch, head, rows], mine.d_out, mine.ready)
        plgpu.copy_gmem_to_smem(bounds.at[batch, :, rows], mine.bounds, mine.ready)
        plgpu.copy_gmem_to_smem(residuals.at[batch, head, :, rows], mine.residuals, mine.ready)
        plgpu.barrier_wait(mine.ready)
        gradient = _differentiate(mine, tiles, program, tile_sizes, scale * LOG2E)
        mine.q[...] = (gradient * scale).astype(q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mine.q, dq.at[batch, head, rows])
        plgpu.wait_smem_to_gmem(0)

    roles(consume, lambda: tiles.fill(k, v, program, problem, tile_sizes, values_first=True))


def _differentiate(
    mine: _Own, tiles: KeyTiles, program: RowProgram, tile_sizes: TileSizes, scale: float
) -> Array:
    """Computes dQ / scale of a consumer's rows, float32 [64, D]; `scale` takes scores to base 2."""
    shape = (WARPGROUP_ROWS, tile_sizes.key_tile)
    logsumexp, delta = (plgpu.load(mine.residuals.at[i], layout=ROWS) for i in (0, 1))

    def visit(step, gradient):
        slot = lax.rem(step, tile_sizes.stages)
        entry = program.entries[step]

        def products(scores, d_weights):
            plgpu.barrier_wait(tiles.k_ready.at[slot])
            plgpu.wgmma(scores, mine.q, tiles.k.at[slot].T)
            plgpu.barrier_wait(tiles.v_ready.at[slot])
            plgpu.wgmma(d_weights, mine.d_out, tiles.v.at[slot].T)
            # The softmax runs beside the second product.
            scores = plgpu.wgmma_accumulator_load(scores, wait_n=1)
            scores = masked_unless_full(
                scores, entry, (entry >> 1) * tile_sizes.key_tile, mine.bounds, 0
            )
            return jnp.exp2(scores * scale - along(logsumexp, shape, 0)), d_weights[...]

        accumulator = plgpu.WGMMAAccumulatorRef(shape)
        weights, d_weights = pl.run_scoped(products, accumulator, accumulator)
        plgpu.barrier_arrive(tiles.v_free.at[slot])
        d_scores = (weights * (d_weights - along(delta, shape, 0))).astype(tiles.k.dtype)
        gradient = plus_product(gradient, d_scores, tiles.k.at[slot])
        plgpu.barrier_arrive(tiles.k_free.at[slot])
        return gradient

    return lax.fori_loop(
        0, program.count, visit, filled(0.0, (WARPGROUP_ROWS, mine.q.shape[-1]), TILE)
    )
