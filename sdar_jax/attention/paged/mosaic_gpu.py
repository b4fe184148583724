"""Paged attention on Hopper (H100, H200).

A program has one sequence, one key-value head, a tile of its rows (the query heads that share the key-value head are
folded into rows) and one of several equal parts of the sequence's keys: where sequences are few, splitting the keys is
what keeps every SM loading. A producer warpgroup looks pages up and has the TMA engine fill a ring of key tiles; one or
two consumer warpgroups of 64 rows multiply them. The parts are merged by their logsumexp in a second step, by XLA.

The number of parts depends on shapes alone, the number of sequences among them: a row's bits do not depend on its
neighbours, but may differ between calls with another batch size.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from sdar_jax.attention.paged.pages import folded, unfolded
from sdar_jax.attention.tile_sizes import TileSizes, head_dims, tile_sizes_for
from sdar_jax.devices.chips import not_hopper
from sdar_jax.gpu_kernels import (
    LOG2E,
    ROWS,
    TILE,
    WARPGROUP_ROWS,
    along,
    filled,
    launch,
    plus_product,
    roles,
    wait_until_free,
)

# Of a thread of a consumer and of the producer, which looks pages up: multiples of 8, two consumers' and the producer's
# at most 512. One consumer would do without, but then ptxas crashes for pages of 64 and more.
_REGISTERS = 232, 40

_NAME = "mosaic_gpu"
# Up to as many rows as one warpgroup takes, and more.
_NARROW, _WIDE = "paged", "paged_wide"
_SMS = 132
# A part shorter than this many key tiles costs more in its start and its merging than it gains.
_TILES_A_PART = 4


_Shaped = Array | jax.ShapeDtypeStruct


def unsupported(
    q: Array, k_pages: Array, v_pages: Array, page_table: Array, visible: Array
) -> str | None:
    """Says why these inputs cannot be taken, and what would do; None if they can."""
    if not q.dtype == k_pages.dtype == v_pages.dtype == jnp.bfloat16:
        return f"takes bfloat16, not {q.dtype}, {k_pages.dtype} and {v_pages.dtype}"
    if q.shape[3] not in head_dims(_NAME, _NARROW):
        return f"takes head_dim {head_dims(_NAME, _NARROW)}, not {q.shape[3]}"
    if k_pages.shape[2] not in (16, 32, 64, 128):
        return f"takes pages of 16, 32, 64 or 128 positions, not {k_pages.shape[2]}"
    if q.shape[1] > 128:
        return f"takes windows of up to 128 queries, not {q.shape[1]}"
    return not_hopper()


class _Problem(NamedTuple):
    """rows: folded, of a key-value head. parts: of the keys. consumers: warpgroups that share key tiles."""

    batch: int
    kv_heads: int
    rows: int
    dim: int
    page: int
    key_tile: int
    stages: int
    consumers: int
    parts: int

    @classmethod
    def of(
        cls, q: _Shaped, k_pages: _Shaped, page_table: _Shaped, tile_sizes: TileSizes | None
    ) -> "_Problem":
        batch, window, heads, dim = q.shape
        _, kv_heads, page, _ = k_pages.shape
        rows = heads // kv_heads * window
        tile_sizes = tile_sizes or tile_sizes_for(
            _NAME, _NARROW if rows <= WARPGROUP_ROWS else _WIDE, dim
        )
        consumers = tile_sizes.query_tile // WARPGROUP_ROWS
        programs = batch * kv_heads * pl.cdiv(rows, consumers * WARPGROUP_ROWS)
        longest = pl.cdiv(page_table.shape[1] * page, tile_sizes.key_tile)
        parts = max(1, min(_SMS // programs, longest // _TILES_A_PART))
        return cls(
            batch,
            kv_heads,
            rows,
            dim,
            page,
            tile_sizes.key_tile,
            tile_sizes.stages,
            consumers,
            parts,
        )

    @property
    def row_tile(self) -> int:
        return self.consumers * WARPGROUP_ROWS

    @property
    def padded_rows(self) -> int:
        return pl.cdiv(self.rows, self.row_tile) * self.row_tile

    @property
    def copies(self) -> int:
        """Pages, or one piece of a page, that make a key tile."""
        return max(1, self.key_tile // self.page)


class _Shared(NamedTuple):
    """Shared memory: as allocated, and then of one consumer. k, v: [stages, key tile, D], everyone's."""

    q: Any
    k: Any
    v: Any
    limit: Any
    out: Any
    logsumexp: Any


class _Barriers(NamedTuple):
    """`ready`: the TMA engine has filled it. `free`: every consumer is done with it."""

    q_ready: Any
    k_ready: Any
    v_ready: Any
    k_free: Any
    v_free: Any
    v_zeroed: Any


def forward(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    visible: Array,
    *,
    scale: float,
    interpret: bool = False,
    tile_sizes: TileSizes | None = None,
) -> Array:
    """Computes `paged_attention`."""
    window = q.shape[1]
    problem = _Problem.of(q, k_pages, page_table, tile_sizes)
    limit = jnp.tile(visible, (1, problem.rows // window))
    limit = jnp.pad(limit, ((0, 0), (0, problem.padded_rows - problem.rows)))
    rows = folded(q, problem.kv_heads)
    operands = rows, k_pages, v_pages, page_table, limit, visible.max(axis=1)
    out, logsumexp = _call(problem, operands, scale, interpret)
    return unfolded(_merged(out, logsumexp[..., : problem.rows]).astype(q.dtype), window)


def _merged(out: Array, logsumexp: Array) -> Array:
    """Merges [parts, N, G, rows, D] and [parts, N, G, rows], in units of log 2 and -inf where nothing was seen, to
    one."""
    if out.shape[0] == 1:
        return out[0]
    largest = jnp.maximum(logsumexp.max(axis=0), jnp.finfo(jnp.float32).min)
    weight = jnp.exp2(logsumexp - largest)
    total = weight.sum(axis=0)
    return (out * weight[..., None]).sum(axis=0) / jnp.where(total == 0, 1, total)[..., None]


def _call(
    problem: _Problem, operands: tuple[Array, ...], scale: float, interpret: bool
) -> tuple[Array, Array]:
    parts, batch, kv_heads, dim = problem.parts, problem.batch, problem.kv_heads, problem.dim
    dtype = jnp.bfloat16
    out_dtype = dtype if parts == 1 else jnp.float32
    consumers, stages = problem.consumers, problem.stages
    tiles = plgpu.SMEM((stages, problem.key_tile, dim), dtype)
    shared = _Shared(
        plgpu.SMEM((consumers, WARPGROUP_ROWS, dim), dtype),
        tiles,
        tiles,
        plgpu.SMEM((consumers, WARPGROUP_ROWS), jnp.int32),
        plgpu.SMEM((consumers, WARPGROUP_ROWS, dim), out_dtype),
        plgpu.SMEM((consumers, WARPGROUP_ROWS), jnp.float32),
    )
    ready = plgpu.Barrier(num_arrivals=problem.copies, num_barriers=stages)
    free = plgpu.Barrier(num_arrivals=consumers, num_barriers=stages)
    barriers = _Barriers(
        plgpu.Barrier(num_arrivals=2, num_barriers=consumers),
        ready,
        ready,
        free,
        free,
        plgpu.Barrier(num_arrivals=consumers),
    )
    return launch(
        partial(_kernel, problem=problem, scale=scale * LOG2E),
        operands,
        (
            jax.ShapeDtypeStruct((parts, batch, kv_heads, problem.rows, dim), out_dtype),
            jax.ShapeDtypeStruct((parts, batch, kv_heads, problem.padded_rows), jnp.float32),
        ),
        (shared, barriers),
        {
            "sequence": batch,
            "head": kv_heads,
            "part": parts,
            "tile": problem.padded_rows // problem.row_tile,
        },
        "paged_attention",
        interpret,
        consumers,
    )


def _kernel(
    q_ref, k_pages, v_pages, table_ref, limit_ref, longest_ref, out_ref, logsumexp_ref, shared, barriers,
    *, problem: _Problem, scale: float,
):  # fmt: skip
    sequence, head, part, tile = (
        lax.axis_index(name) for name in ("sequence", "head", "part", "tile")
    )
    longest = longest_ref[sequence]
    tiles = pl.cdiv(longest, jnp.int32(problem.key_tile))
    tiles_a_part = pl.cdiv(tiles, jnp.int32(problem.parts))
    first = part * tiles_a_part
    count = jnp.clip(tiles - first, 0, tiles_a_part)

    def consume(warpgroup):
        rows = pl.ds(tile * problem.row_tile + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        mine = _Shared(
            shared.q.at[warpgroup], shared.k, shared.v, *(x.at[warpgroup] for x in shared[3:])
        )
        ready = barriers.q_ready.at[warpgroup]
        plgpu.copy_gmem_to_smem(q_ref.at[sequence, head, rows], mine.q, ready)
        plgpu.copy_gmem_to_smem(limit_ref.at[sequence, rows], mine.limit, ready)
        plgpu.barrier_wait(ready)
        out, largest, total = _attend(mine, barriers, problem, first, count, longest, scale)
        seen = total > 0
        out = out * along(jnp.where(seen, 1 / total, 0), out.shape, 0)
        mine.out[...] = out.astype(mine.out.dtype)
        mine.logsumexp[...] = jnp.where(seen, largest + jnp.log2(total), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mine.out, out_ref.at[part, sequence, head, rows])
        plgpu.copy_smem_to_gmem(mine.logsumexp, logsumexp_ref.at[part, sequence, head, rows])
        plgpu.wait_smem_to_gmem(0)

    def produce():
        last_page = pl.cdiv(longest, jnp.int32(problem.page)) - 1
        sources = (
            (k_pages, shared.k, barriers.k_ready, barriers.k_free),
            (v_pages, shared.v, barriers.v_ready, barriers.v_free),
        )

        @pl.loop(0, count)
        def _(step):
            slot = lax.rem(step, problem.stages)
            pieces = [
                _piece(table_ref, sequence, last_page, first + step, i, problem)
                for i in range(problem.copies)
            ]
            for source, smem, ready, free in sources:
                wait_until_free(free, step, problem.stages)
                for i, (page, keys) in enumerate(pieces):
                    to = smem.at[slot, pl.ds(i * keys.size, keys.size)]
                    plgpu.copy_gmem_to_smem(source.at[page, head, keys], to, ready.at[slot])

    roles(consume, produce, problem.consumers, _REGISTERS)


def _piece(table_ref, sequence, last_page, tile, i: int, problem: _Problem):
    """Finds the page id and positions in it of the i-th piece of a key tile; past the end, the last page again."""
    if problem.page <= problem.key_tile:
        index = jnp.minimum(tile * problem.copies + i, last_page)
        return table_ref[sequence, index], pl.ds(0, problem.page)
    tiles_a_page = problem.page // problem.key_tile
    page = table_ref[sequence, tile // tiles_a_page]
    return page, pl.ds(tile % tiles_a_page * problem.key_tile, problem.key_tile)


def _zero_unseen(v_smem, barrier, seen: Array) -> None:
    """Zeros past the first `seen` keys of a tile: what nobody sees may be NaN, and 0 * NaN is NaN."""

    @pl.when(lax.axis_index("warpgroup") == 0)
    def _():
        values = plgpu.load(v_smem, layout=TILE)
        key = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=TILE)
        v_smem[...] = jnp.where(key < seen, values, jnp.zeros_like(values))
        plgpu.commit_smem()

    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def _attend(
    shared: _Shared,
    barriers: _Barriers,
    problem: _Problem,
    first: Array,
    count: Array,
    longest: Array,
    scale: float,
):
    """Computes the unnormalised output [64, D], largest score in units of log 2 and sum of exponentials [64] of the
    rows."""
    shape = (WARPGROUP_ROWS, problem.key_tile)

    def visit(step, carry):
        out, largest, total = carry
        slot = lax.rem(step, problem.stages)
        plgpu.barrier_wait(barriers.k_ready.at[slot])

        def product(scores):
            plgpu.wgmma(scores, shared.q, shared.k.at[slot].T)
            return scores[...]

        scores = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef(shape))
        plgpu.barrier_arrive(barriers.k_free.at[slot])
        keys = (first + step) * problem.key_tile + plgpu.broadcasted_iota(
            jnp.int32, shape, 1, layout=TILE
        )
        limit = along(plgpu.load(shared.limit, layout=ROWS), shape, 0)
        scores = jnp.where(keys < limit, scores * scale, -jnp.inf)
        peak = jnp.maximum(largest, scores.max(axis=1))
        exp = jnp.exp2(scores - along(peak, shape, 0))
        shrink = jnp.exp2(largest - peak)
        total = total * shrink + exp.sum(axis=1)
        out = out * along(shrink, out.shape, 0)
        weights = exp.astype(shared.q.dtype)
        plgpu.barrier_wait(barriers.v_ready.at[slot])
        seen = longest - (first + step) * problem.key_tile

        @pl.when(seen < problem.key_tile)
        def _():
            _zero_unseen(shared.v.at[slot], barriers.v_zeroed, seen)

        out = plus_product(out, weights, shared.v.at[slot])
        plgpu.barrier_arrive(barriers.v_free.at[slot])
        return out, peak, total

    start = (
        filled(0.0, (WARPGROUP_ROWS, problem.dim), TILE),
        # The lowest finite number, not -inf: rows that see nothing must not compute inf - inf.
        filled(float(jnp.finfo(jnp.float32).min), (WARPGROUP_ROWS,), ROWS),
        filled(0.0, (WARPGROUP_ROWS,), ROWS),
    )
    return lax.fori_loop(0, count, visit, start)
