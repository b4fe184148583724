"""The forward kernel: online softmax over the key tiles that 128 query rows visit.

Dao et al., FlashAttention (arXiv 2205.14135), algorithm 1. The consumers take turns at the tensor cores, so that the
softmax of one runs beside the products of the other (Shah et al., FlashAttention-3, arXiv 2407.08608, section 3.1).
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


class _Own(NamedTuple):
    """Shared memory of a consumer. `ready`: its rows have come. `turn`: of both, to alternate."""

    q: Any
    bounds: Any
    logsumexp: Any
    ready: Any
    turn: Any


def outputs(
    q: Array,
    k: Array,
    v: Array,
    ranges: Ranges,
    *,
    scale: float,
    tile_sizes: TileSizes,
    interpret: bool,
) -> tuple[Array, Array]:
    """Computes the output [B, Q, H, D] and float32 logsumexp [B, Q, H]."""
    problem = Problem.of(q, k)
    lists = visits_of_queries(problem, ranges, tile_sizes.key_tile)
    rows = problem.padded_rows(lists.rows)
    own = _Own(
        plgpu.SMEM((CONSUMERS, WARPGROUP_ROWS, problem.dim), q.dtype),
        plgpu.SMEM((CONSUMERS, 4, WARPGROUP_ROWS), jnp.int32),
        plgpu.SMEM((CONSUMERS, WARPGROUP_ROWS), jnp.float32),
        plgpu.Barrier(num_barriers=CONSUMERS, num_arrivals=2),
        plgpu.Barrier(num_arrivals=CONSUMERS),
    )
    out, logsumexp = launch(
        partial(_kernel, problem=problem, tile_sizes=tile_sizes, list_rows=lists.rows, scale=scale),
        (
            problem.fold_heads(q),
            k,
            v,
            problem.row_bounds(ranges, lists.rows),
            lists.order,
            lists.entries,
            lists.count,
        ),
        (
            jax.ShapeDtypeStruct(
                (problem.batch, problem.folded_heads, problem.rows, problem.dim), q.dtype
            ),
            jax.ShapeDtypeStruct((problem.batch, problem.folded_heads, rows), jnp.float32),
        ),
        (own, KeyTiles.scratch(tile_sizes, problem.dim, k.dtype)),
        {"batch": problem.batch, "head": problem.folded_heads, "tile": rows // ROW_TILE},
        "range_attention_forward",
        interpret,
    )
    return problem.unfold_heads(out), problem.unfold_heads(logsumexp)


def _kernel(
    q, k, v, bounds, order, entries, count, out, logsumexp, own: _Own, tiles: KeyTiles,
    *, problem: Problem, tile_sizes: TileSizes, list_rows: int, scale: float,
):  # fmt: skip
    program = RowProgram.of(order, entries, count, list_rows, ROW_TILE)
    batch, head = program.batch, program.head

    def consume(warpgroup):
        rows = pl.ds(program.first_row + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        mine = _Own(*(ref.at[warpgroup] for ref in own[:-1]), turn=own.turn)
        plgpu.copy_gmem_to_smem(q.at[batch, head, rows], mine.q, mine.ready)
        plgpu.copy_gmem_to_smem(bounds.at[batch, :, rows], mine.bounds, mine.ready)
        plgpu.barrier_wait(mine.ready)
        pl.when(warpgroup == 1)(lambda: _take_turns(own.turn))
        weighted, largest, total = _attend(mine, tiles, program, tile_sizes, scale * LOG2E)
        pl.when(warpgroup == 0)(lambda: _take_turns(own.turn))
        seen = total > 0
        normaliser = jnp.where(seen, 1 / total, 0.0)
        mine.q[...] = (weighted * along(normaliser, weighted.shape, 0)).astype(q.dtype)
        mine.logsumexp[...] = jnp.where(seen, (largest + jnp.log2(total)) / LOG2E, jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mine.q, out.at[batch, head, rows])
        plgpu.copy_smem_to_gmem(mine.logsumexp, logsumexp.at[batch, head, rows])
        plgpu.wait_smem_to_gmem(0)

    roles(consume, lambda: tiles.fill(k, v, program, problem, tile_sizes, values_first=False))


def _take_turns(turn) -> None:
    """Keeps one consumer half a step behind: it comes to its products when the other comes to its softmax."""
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)


def _attend(mine: _Own, tiles: KeyTiles, program: RowProgram, tile_sizes: TileSizes, scale: float):
    """Computes the unnormalised output [64, D], and largest score and sum of exponentials [64], in base 2, of a
    consumer's rows."""
    shape = (WARPGROUP_ROWS, tile_sizes.key_tile)

    def visit(step, carry):
        weighted, largest, total = carry
        slot = lax.rem(step, tile_sizes.stages)
        entry = program.entries[step]
        plgpu.barrier_wait(tiles.k_ready.at[slot])

        def score(scores):
            plgpu.wgmma(scores, mine.q, tiles.k.at[slot].T)
            _take_turns(mine.turn)
            return scores[...]

        scores = pl.run_scoped(score, plgpu.WGMMAAccumulatorRef(shape))
        plgpu.barrier_arrive(tiles.k_free.at[slot])
        scores = masked_unless_full(
            scores, entry, (entry >> 1) * tile_sizes.key_tile, mine.bounds, 0
        )
        peak = jnp.maximum(largest, scores.max(axis=1) * scale)
        # Rows that have seen nothing yet must not compute inf - inf.
        finite = jnp.where(peak == -jnp.inf, 0.0, peak)
        weights = jnp.exp2(scores * scale - along(finite, shape, 0))
        shrink = jnp.exp2(largest - finite)
        total = total * shrink + weights.sum(axis=1)
        weighted = weighted * along(shrink, weighted.shape, 0)
        weights = weights.astype(tiles.v.dtype)
        plgpu.barrier_wait(tiles.v_ready.at[slot])
        _take_turns(mine.turn)
        weighted = plus_product(weighted, weights, tiles.v.at[slot])
        plgpu.barrier_arrive(tiles.v_free.at[slot])
        return weighted, peak, total

    nothing = (
        filled(0.0, (WARPGROUP_ROWS, mine.q.shape[-1]), TILE),
        filled(-jnp.inf, (WARPGROUP_ROWS,), ROWS),
        filled(0.0, (WARPGROUP_ROWS,), ROWS),
    )
    return lax.fori_loop(0, program.count, visit, nothing)
