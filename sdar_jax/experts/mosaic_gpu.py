"""Grouped matmuls on Hopper: a block of 128 rows by 128 columns for each program, over the groups that its rows are of.

Two consumers multiply, 64 rows each, and a producer keeps slots of shared memory full, as in the attention kernels.
`product` gives each row x_m W_g(m), and `weight_gradient` each group the sum of x_m^T d_m over its rows, both summed in
float32. Rows after the last group are of none: they give zero, and are not read.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from sdar_jax.arithmetic import round_up
from sdar_jax.devices.chips import not_hopper
from sdar_jax.gpu_kernels import (
    CONSUMERS,
    TILE,
    WARPGROUP_ROWS,
    filled,
    launch,
    roles,
    wait_until_free,
)

ROWS = CONSUMERS * WARPGROUP_ROWS
COLUMNS = 128
# Multiplied at once, and how many such pairs of operands are in flight: 32 KB each.
DEPTH, STAGES = 64, 5


def unsupported(x: Array, weights: Array) -> str | None:
    """Says why these operands, or the GPU that is here, are not for these kernels; None if they are: they are in half
    precision, and of widths that are full tiles of either product's."""
    half = x.dtype == weights.dtype and x.dtype in (jnp.bfloat16, jnp.float16)
    if not half or any(width % COLUMNS for width in weights.shape[1:]):
        return f"takes bfloat16 or float16 and widths that {COLUMNS} divides, not {x.dtype} and {weights.shape[1:]}"
    return not_hopper()


def product(
    x: Float[Array, "M K"],
    weights: Array,
    sizes: Int[Array, " G"],
    *,
    transposed: bool = False,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """Multiplies rows of x, sorted by group, with their group's weights [G, K, N]; if `transposed` these are [G, N,
    K]."""
    columns = weights.shape[1 if transposed else 2]
    rows = round_up(len(x), ROWS)
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    first = jnp.arange(rows // ROWS, dtype=jnp.int32) * ROWS
    groups = partial(jnp.searchsorted, ends, side="right")
    # Of each tile the groups of its first row and of its last one; of a tile after the last group, none.
    span = (
        groups(first).astype(jnp.int32),
        groups(jnp.minimum(first + ROWS, ends[-1]) - 1).astype(jnp.int32),
    )
    own = plgpu.SMEM((CONSUMERS, WARPGROUP_ROWS, COLUMNS), x.dtype)
    weight_tile = (COLUMNS, DEPTH) if transposed else (DEPTH, COLUMNS)
    out = launch(
        partial(_product, transposed=transposed),
        (jnp.pad(x, ((0, rows - len(x)), (0, 0))), weights, ends, *span),
        jax.ShapeDtypeStruct((rows, columns), x.dtype),
        (own, _Slots.scratch((WARPGROUP_ROWS, DEPTH), weight_tile, x.dtype)),
        {"row": rows // ROWS, "column": columns // COLUMNS},
        "grouped_product",
        interpret,
    )
    return out[: len(x)]


def weight_gradient(
    x: Float[Array, "M K"],
    d_out: Float[Array, "M N"],
    sizes: Int[Array, " G"],
    *,
    interpret: bool = False,
) -> Float[Array, "G K N"]:
    """Computes for each group's weights the sum of x_m^T d_m over its rows; zero for a group of none."""
    missing = ((0, -len(x) % DEPTH), (0, 0))
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    shape = len(sizes), x.shape[1], d_out.shape[1]
    own = plgpu.SMEM((CONSUMERS, WARPGROUP_ROWS, COLUMNS), x.dtype)
    return launch(
        _weight_gradient,
        (jnp.pad(x, missing), jnp.pad(d_out, missing), ends - sizes.astype(jnp.int32), ends),
        jax.ShapeDtypeStruct(shape, x.dtype),
        (own, _Slots.scratch((DEPTH, WARPGROUP_ROWS), (DEPTH, COLUMNS), x.dtype)),
        {"group": shape[0], "row": shape[1] // ROWS, "column": shape[2] // COLUMNS},
        "grouped_weight_gradient",
        interpret,
    )


class _Slots(NamedTuple):
    """Operands in flight: of each consumer its own left one, and the right one that both read."""

    left: Any
    right: Any
    ready: Any
    free: Any

    @classmethod
    def scratch(cls, left: tuple[int, int], right: tuple[int, int], dtype) -> "_Slots":
        ready = plgpu.Barrier(num_barriers=STAGES, num_arrivals=CONSUMERS + 1)
        free = plgpu.Barrier(num_barriers=STAGES, num_arrivals=CONSUMERS)
        return cls(
            plgpu.SMEM((STAGES, CONSUMERS, *left), dtype),
            plgpu.SMEM((STAGES, *right), dtype),
            ready,
            free,
        )

    def fill(self, steps: Array, sources: Callable[[Array], tuple[list, Any]]) -> None:
        """Runs the producer: loads at each step the left operands of the consumers, and the right one."""

        @pl.loop(0, steps)
        def _(step):
            slot = lax.rem(step, STAGES)
            left, right = sources(step)
            wait_until_free(self.free, step, STAGES)
            for consumer, source in enumerate(left):
                plgpu.copy_gmem_to_smem(source, self.left.at[slot, consumer], self.ready.at[slot])
            plgpu.copy_gmem_to_smem(right, self.right.at[slot], self.ready.at[slot])

    def sum(
        self, first: Array, steps: Array | int, multiply: Callable[[Any, Array, Array], None]
    ) -> Array:
        """Computes the consumer's float32 sum over `steps` from `first` on, of what `multiply(sum, step, slot)` adds to
        it.

        One product is in flight while the next is issued: a slot is released a step late.
        """

        def run(total):
            @pl.loop(0, steps)
            def _(i):
                slot = lax.rem(first + i, STAGES)
                plgpu.barrier_wait(self.ready.at[slot])
                multiply(total, i, slot)
                plgpu.wgmma_wait(1)

                @pl.when(i > 0)
                def _():
                    plgpu.barrier_arrive(self.free.at[lax.rem(first + i - 1, STAGES)])

            plgpu.wgmma_wait(0)

            @pl.when(steps > 0)
            def _():
                plgpu.barrier_arrive(self.free.at[lax.rem(first + steps - 1, STAGES)])

            return total[...]

        return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, COLUMNS)))


def _product(
    x, weights, ends, first_group, last_group, out, own, slots: _Slots, *, transposed: bool
):
    row, column = lax.axis_index("row"), lax.axis_index("column")
    first, last = first_group[row], last_group[row]
    depth = x.shape[1] // DEPTH
    columns = pl.ds(column * COLUMNS, COLUMNS)

    def sources(step):
        group, along = first + lax.div(step, depth), pl.ds(lax.rem(step, depth) * DEPTH, DEPTH)
        left = [x.at[_rows_of(row, consumer), along] for consumer in range(CONSUMERS)]
        return left, weights.at[group, columns, along] if transposed else weights.at[
            group, along, columns
        ]

    def consume(warpgroup):
        at = plgpu.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS, COLUMNS), 0, layout=TILE)
        at = at + row * ROWS + warpgroup * WARPGROUP_ROWS

        def multiply(total, _, slot):
            right = slots.right.at[slot]
            plgpu.wgmma(total, slots.left.at[slot, warpgroup], right.T if transposed else right)

        def visit(group, result):
            """Adds a group: a row of an earlier group has its result, and one of a later group gets it from that."""
            begin = jnp.where(group > 0, ends[jnp.maximum(group - 1, 0)], 0)
            found = slots.sum((group - first) * depth, depth, multiply)
            return jnp.where((at >= begin) & (at < ends[group]), found, result)

        result = lax.fori_loop(first, last + 1, visit, filled(0.0, (WARPGROUP_ROWS, COLUMNS), TILE))
        _store(result, own.at[warpgroup], out.at[_rows_of(row, warpgroup), columns])

    roles(consume, lambda: slots.fill((last + 1 - first) * depth, sources))


def _weight_gradient(x, d_out, starts, ends, out, own, slots: _Slots):
    group, row, column = (lax.axis_index(name) for name in ("group", "row", "column"))
    start, end = starts[group], ends[group]
    first = lax.div(start, DEPTH)
    steps = jnp.where(end > start, lax.div(end + DEPTH - 1, DEPTH) - first, 0)
    columns = pl.ds(column * COLUMNS, COLUMNS)

    def sources(step):
        along = pl.ds((first + step) * DEPTH, DEPTH)
        return [x.at[along, _rows_of(row, consumer)] for consumer in range(CONSUMERS)], d_out.at[
            along, columns
        ]

    def consume(warpgroup):
        def multiply(total, step, slot):
            left, at = slots.left.at[slot, warpgroup], (first + step) * DEPTH
            pl.when((at < start) | (at + DEPTH > end))(
                lambda: _clear_others(left, start - at, end - at)
            )
            plgpu.wgmma(total, left.T, slots.right.at[slot])

        found = slots.sum(jnp.int32(0), steps, multiply)
        _store(found, own.at[warpgroup], out.at[group, _rows_of(row, warpgroup), columns])

    roles(consume, lambda: slots.fill(steps, sources))


def _clear_others(tile, start: Array, end: Array) -> None:
    """Rows of other groups become zero, in shared memory."""
    at = plgpu.broadcasted_iota(jnp.int32, tile.shape, 0, layout=TILE)
    value = plgpu.load(tile, layout=TILE)
    tile[...] = jnp.where((at >= start) & (at < end), value, jnp.zeros_like(value))
    plgpu.commit_smem()


def _rows_of(block: Array, warpgroup: Array | int):
    return pl.ds(block * ROWS + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)


def _store(result: Array, own, out) -> None:
    own[...] = result.astype(out.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(own, out)
    plgpu.wait_smem_to_gmem(0)
