"""Paged attention on TPU (v5e, v5p, v6e).

One program a sequence, with all its key-value heads: the query heads that share one are folded into rows, and a step
takes several pages, copied whole (all heads of a page lie together) by page table into one of two buffers while the
other is worked on. The copies of a sequence's first step are started by the program of the sequence before it, so that
short sequences do not wait for memory either. Pages past a sequence's longest `visible` are not copied.

The page table stays in HBM, a row of it in SMEM at a time: that of a large batch with long contexts would not fit.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from sdar_jax.attention.paged.pages import folded, unfolded
from sdar_jax.attention.tile_sizes import TileSizes, head_dims, tile_sizes_for

_NAME, _KERNEL = "mosaic_tpu", "paged"
# Mosaic keeps rows in groups of 8 sublanes of 32 bits, statistics in all 128 lanes.
_SUBLANES, _LANES = 8, 128
_VMEM = 64 * 2**20
# By the compiler's schedule for v5p: a step of 16 to 128 rows a head takes a third to a fifth less than with 128.
_ROWS_TOGETHER = 512


def unsupported(
    q: Array, k_pages: Array, v_pages: Array, page_table: Array, visible: Array
) -> str | None:
    """Says why these inputs cannot be taken, and what would do; None if they can."""
    if not q.dtype == k_pages.dtype == v_pages.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"takes bfloat16 or float32, all alike, not {q.dtype}, {k_pages.dtype} and {v_pages.dtype}"
    if q.shape[3] not in head_dims(_NAME, _KERNEL):
        return f"takes head_dim {head_dims(_NAME, _KERNEL)}, not {q.shape[3]}"
    if k_pages.shape[2] % 16 or k_pages.shape[2] > 128:
        return f"takes pages of 16 to 128 positions, a multiple of 16, not {k_pages.shape[2]}"
    if q.shape[1] > 128:
        return f"takes windows of up to 128 queries, not {q.shape[1]}"
    return None


class _Plan(NamedTuple):
    """The figures of all sequences that each program needs, int32 [N] each but for `first_pages`.

    pages: that the sequence uses. steps: of `step_pages` pages. first_step: steps of the sequences before it on the
    same core, which says whose turn the buffers are. next_row: the next sequence on the core with any steps, N if there
    is none. first_pages: [N * step_pages], those of the first step.
    """

    pages: Int[Array, " N"]
    steps: Int[Array, " N"]
    first_step: Int[Array, " N"]
    next_row: Int[Array, " N"]
    first_pages: Int[Array, " first"]


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
    batch, window, heads, dim = q.shape
    kv_heads, page = k_pages.shape[1:3]
    tile_sizes = tile_sizes or tile_sizes_for(_NAME, _KERNEL, dim)
    step_pages = min(max(1, tile_sizes.key_tile // page), page_table.shape[1])
    # The two cores of a v5p take half of the sequences each; on one core the halves follow each other.
    cores = 2 if batch % 2 == 0 else 1
    rows = folded(q, kv_heads)
    missing = -rows.shape[2] % (_SUBLANES * 4 // q.dtype.itemsize)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, missing), (0, 0)))
    limit = jnp.pad(jnp.tile(visible, (1, heads // kv_heads)), ((0, 0), (0, missing)))[..., None]
    plan = _plan(page_table, visible, page, step_pages, cores)
    out = _call(
        rows,
        limit,
        k_pages,
        v_pages,
        page_table[:, None],
        plan,
        cores,
        step_pages,
        scale,
        interpret,
    )
    return unfolded(out[:, :, : rows.shape[2] - missing], window)


def _plan(page_table: Array, visible: Array, page: int, step_pages: int, cores: int) -> _Plan:
    batch = visible.shape[0]
    pages = pl.cdiv(visible.max(axis=1), page)
    steps = pl.cdiv(pages, step_pages)
    by_core = steps.reshape(cores, -1)
    index = jnp.arange(batch, dtype=jnp.int32)
    alive = jnp.where(steps > 0, index, batch).reshape(cores, -1)
    # The nearest at or after each, then shifted by one: the nearest after.
    at_or_after = jax.lax.cummin(alive, axis=1, reverse=True)
    next_row = jnp.pad(at_or_after[:, 1:], ((0, 0), (0, 1)), constant_values=batch)
    first_step = jnp.cumsum(by_core, axis=1) - by_core
    as_int = lambda x: x.reshape(-1).astype(jnp.int32)
    return _Plan(*map(as_int, (pages, steps, first_step, next_row, page_table[:, :step_pages])))


def _call(rows, limit, k_pages, v_pages, page_table, plan, cores, step_pages, scale, interpret):
    batch, kv_heads, count, dim = rows.shape
    page, per_core = k_pages.shape[2], batch // cores
    row = lambda core, index, *_: core * per_core + index
    by_row = lambda *shape, **where: pl.BlockSpec(
        (None, *shape), lambda *indices: (row(*indices), *[0] * len(shape)), **where
    )
    buffer = pltpu.VMEM((2, step_pages, kv_heads, page, dim), k_pages.dtype)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(plan),
        grid=(cores, per_core),
        in_specs=[
            by_row(1, page_table.shape[2], memory_space=pltpu.SMEM),
            by_row(kv_heads, count, dim),
            by_row(count, 1),
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=by_row(kv_heads, count, dim),
        scratch_shapes=[
            buffer,
            buffer,
            pltpu.VMEM((kv_heads, count, dim), jnp.float32),
            pltpu.VMEM((kv_heads, count, _LANES), jnp.float32),
            pltpu.VMEM((kv_heads, count, _LANES), jnp.float32),
            pltpu.SemaphoreType.DMA((2, 2)),
        ],
    )
    return pl.pallas_call(
        partial(_kernel, scale=scale, per_core=per_core, step_pages=step_pages),
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct(rows.shape, rows.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        interpret=pltpu.InterpretParams(detect_races=True) if interpret else False,
        name="paged_attention",
    )(*plan, page_table, rows, limit, k_pages, v_pages)


class _Copies(NamedTuple):
    """The copies of one step of one sequence into buffer `slot`."""

    k_pages: Array
    v_pages: Array
    k_buffer: Array
    v_buffer: Array
    semaphores: Array
    slot: Array

    def each(self, count: Array, page_of, act) -> None:
        """Calls `act` on the copy of each of `count` pages, keys and values; `page_of` gives the id of the i-th."""

        def one(i, _):
            page = page_of(i)
            for kind, (pages, buffer) in enumerate(
                ((self.k_pages, self.k_buffer), (self.v_pages, self.v_buffer))
            ):
                semaphore = self.semaphores.at[kind, self.slot]
                act(pltpu.make_async_copy(pages.at[page], buffer.at[self.slot, i], semaphore))
            return _

        jax.lax.fori_loop(0, count, one, None)


def _kernel(
    pages_ref,
    steps_ref,
    first_step_ref,
    next_row_ref,
    first_pages_ref,
    table_ref,
    q_ref,
    limit_ref,
    k_pages,
    v_pages,
    out_ref,
    k_buffer,
    v_buffer,
    acc_ref,
    largest_ref,
    total_ref,
    semaphores,
    *,
    scale,
    per_core,
    step_pages,
):
    core, index = pl.program_id(0), pl.program_id(1)
    row = core * per_core + index
    batch = per_core * pl.num_programs(0)
    steps, pages = steps_ref[row], pages_ref[row]
    page = k_buffer.shape[3]
    copies = partial(_Copies, k_pages, v_pages, k_buffer, v_buffer, semaphores)
    start = lambda copy: copy.start()

    def start_first(of, slot):
        count = jnp.minimum(pages_ref[of], step_pages)
        copies(slot).each(count, lambda i: first_pages_ref[of * step_pages + i], start)

    @pl.when((index == 0) & (steps > 0))
    def _():
        start_first(row, 0)

    # Nobody before the first sequence with any steps could start its copies.
    @pl.when((index == 0) & (steps == 0) & (next_row_ref[row] < batch))
    def _():
        start_first(next_row_ref[row], 0)

    acc_ref[...] = jnp.zeros_like(acc_ref)
    total_ref[...] = jnp.zeros_like(total_ref)
    # The lowest finite number, not -inf: rows that see nothing must not compute inf - inf.
    largest_ref[...] = jnp.full_like(largest_ref, jnp.finfo(jnp.float32).min)

    def step(i, _):
        slot = jax.lax.rem(first_step_ref[row] + i, 2)
        in_step = lambda i: jnp.minimum(pages - i * step_pages, step_pages)
        is_last = i + 1 == steps

        @pl.when(jnp.logical_not(is_last))
        def _():
            of = lambda j: table_ref[0, (i + 1) * step_pages + j]
            copies(1 - slot).each(in_step(i + 1), of, start)

        @pl.when(is_last & (next_row_ref[row] < batch))
        def _():
            start_first(next_row_ref[row], 1 - slot)

        # Only the size of a copy matters to its wait.
        copies(slot).each(in_step(i), lambda j: 0, lambda copy: copy.wait())

        @pl.when(is_last)
        def _():
            _zero_unseen(v_buffer, slot, jnp.max(limit_ref[...]) - i * step_pages * page)

        _attend(
            q_ref, limit_ref, k_buffer, v_buffer, acc_ref, largest_ref, total_ref, slot, i, scale
        )
        return _

    jax.lax.fori_loop(0, steps, step, None)
    total = total_ref[:, :, :1]
    out_ref[...] = (acc_ref[...] / jnp.where(total == 0, 1, total)).astype(out_ref.dtype)


def _zero_unseen(v_buffer, slot, seen):
    """Zeros past the first `seen` keys of a step: what nobody sees may be NaN, and 0 * NaN is NaN."""
    _, step_pages, kv_heads, page, dim = v_buffer.shape

    def one(i, _):
        values = v_buffer[slot, i]
        key = i * page + jax.lax.broadcasted_iota(jnp.int32, (kv_heads, page, dim), 1)
        v_buffer[slot, i] = jnp.where(key < seen, values, jnp.zeros_like(values))
        return _

    jax.lax.fori_loop(jax.lax.div(seen, page), step_pages, one, None)


def _attend(
    q_ref, limit_ref, k_buffer, v_buffer, acc_ref, largest_ref, total_ref, slot, step, scale
):
    """Computes the online softmax over one step's keys.

    With few rows a head's products and reductions wait for each other, so several heads go through together.
    """
    kv_heads, rows, dim = q_ref.shape
    keys = k_buffer.shape[1] * k_buffer.shape[3]
    exact = jax.lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None
    dot = partial(jax.lax.dot_general, precision=exact, preferred_element_type=jnp.float32)
    visible = step * keys + jax.lax.broadcasted_iota(jnp.int32, (rows, keys), 1) < limit_ref[...]
    of_head = lambda buffer, head: buffer[slot, :, head].reshape(keys, dim)

    def scores_of(head):
        scores = dot(q_ref[head], of_head(k_buffer, head), (((1,), (1,)), ((), ())))
        return jnp.where(visible, scores * scale, -jnp.inf)

    together = max(1, _ROWS_TOGETHER // rows)
    for first in range(0, kv_heads, together):
        heads = range(first, min(first + together, kv_heads))
        scores = [scores_of(head) for head in heads]
        before = [largest_ref[head, :, :1] for head in heads]
        largest = [
            jnp.maximum(b, jnp.max(s, axis=1, keepdims=True))
            for b, s in zip(before, scores, strict=True)
        ]
        exps = [jnp.exp(s - peak) for s, peak in zip(scores, largest, strict=True)]
        updates = [
            dot(exp.astype(v_buffer.dtype), of_head(v_buffer, head), (((1,), (0,)), ((), ())))
            for head, exp in zip(heads, exps, strict=True)
        ]
        for i, head in enumerate(heads):
            shrink = jnp.exp(before[i] - largest[i])
            acc_ref[head] = acc_ref[head] * shrink + updates[i]
            total_ref[head] = total_ref[head] * shrink + jnp.sum(exps[i], axis=1, keepdims=True)
            largest_ref[head] = jnp.broadcast_to(largest[i], largest_ref.shape[1:])
