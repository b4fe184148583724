"""What the three kernels share: the producer and its consumers, tiles in flight between them, and masks.

A block is three warpgroups. The last, the producer, only starts copies of the TMA engine; the others each own 64 rows
of the tile and multiply. A slot of shared memory is `ready` when the engine has filled it and `free` again when every
consumer has released it; consumers release it once the products that read it are done.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from sdar_jax.attention.blocks import Blocks
from sdar_jax.attention.mosaic_gpu.layout import CONSUMERS, Problem

# exp2 and log2 are what the hardware has.
LOG2E = math.log2(math.e)
WARPGROUPS = CONSUMERS + 1
# Registers of each thread. A block has 65,536, which is 512 a thread of one warpgroup: 2 x 240 + 24 = 504.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24

TILE = plgpu.Layout.WGMMA
ROWS = plgpu.Layout.WGMMA.reduce(1)
COLUMNS = plgpu.Layout.WGMMA.reduce(0)

COMPILER_PARAMS = plgpu.CompilerParams(approx_math=True)


def interpreted(interpret: bool) -> Any:
    """The `interpret` argument of a kernel: with the detector of races.

    JAX 0.12's interpreter knows no accumulators that are carried and no register operands. The tests extend it.
    """
    return plgpu.InterpretGPUParams(detect_races=True) if interpret else None


def roles(consume, produce) -> None:
    """`consume(warpgroup)` on the consumers, `produce()` on the producer."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        consume(warpgroup)

    @pl.when(warpgroup == CONSUMERS)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        produce()


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
    def scratch(cls, blocks: Blocks, dim: int, dtype) -> "KeyTiles":
        tiles = plgpu.SMEM((blocks.stages, blocks.key_tile, dim), dtype)
        ready = plgpu.Barrier(num_barriers=blocks.stages)
        free = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=blocks.stages)
        return cls(tiles, tiles, ready, ready, free, free)

    def fill(self, k, v, program: RowProgram, problem: Problem, blocks: Blocks, *, values_first: bool) -> None:
        """The producer of a row program. Of a key and a value tile, it loads first the one that is released first."""
        kv_head = lax.div(program.head * problem.fold, problem.heads // problem.kv_heads)
        both = [(k, self.k, self.k_ready, self.k_free), (v, self.v, self.v_ready, self.v_free)]

        @pl.loop(0, program.count)
        def _(step):
            slot = lax.rem(step, blocks.stages)
            keys = pl.ds((program.entries[step] >> 1) * blocks.key_tile, blocks.key_tile)
            for source, tiles, ready, free in reversed(both) if values_first else both:
                wait_until_free(free, step, blocks.stages)
                plgpu.copy_gmem_to_smem(source.at[program.batch, keys, kv_head], tiles.at[slot], ready.at[slot])


def wait_until_free(free, step: Array, stages: int) -> None:
    """In the first round every slot is."""

    @pl.when(step >= stages)
    def _():
        plgpu.barrier_wait(free.at[lax.rem(step, stages)])


def filled(value: float, shape: tuple[int, ...], layout) -> Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def plus_product(x: Array, a, b) -> Array:
    """x + a b for float32 x, awaited. a: an array or in shared memory. b: in shared memory."""
    carried: Any = plgpu.WGMMAAccumulatorRef.init(x)
    return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, a, b))(carried)


def along(x: Array, shape: tuple[int, int], axis: int) -> Array:
    """One value a row (axis 0) or a column (axis 1), over the tile."""
    return lax.broadcast_in_dim(x, shape, [axis])


def masked_unless_full(scores: Array, entry: Array, first_key: Array, bounds, query_axis: int) -> Array:
    """-inf where a query does not see a key; skipped where the list's entry says that each sees them all."""
    return lax.cond(
        (entry & 1) == 1,
        lambda scores: scores,
        lambda scores: masked(scores, first_key, bounds, query_axis),
        scores,
    )


def masked(scores: Array, first_key: Array, bounds, query_axis: int) -> Array:
    """bounds: int32 [4, queries] in shared memory, as Problem.row_bounds. In passes, to hold few of them at a time."""
    layout = (ROWS, COLUMNS)[query_axis]
    keys = first_key + plgpu.broadcasted_iota(jnp.int32, scores.shape, 1 - query_axis, layout=TILE)
    tile = (scores.shape[0], scores.shape[1])
    bound = lambda i: along(plgpu.load(bounds.at[i], layout=layout), tile, query_axis)
    scores = jnp.where(keys < bound(0), -jnp.inf, scores)
    scores = jnp.where((bound(1) <= keys) & (keys < bound(2)), -jnp.inf, scores)
    return jnp.where(bound(3) <= keys, -jnp.inf, scores)


def launch(body, operands, out_type, scratch, grid: tuple[int, int, int], name: str, interpret: bool):
    """Runs `body` over a grid of (batch, head, tile): tiles of one head run together, its keys are in the L2 cache."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=grid,
        grid_names=("batch", "head", "tile"),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=COMPILER_PARAMS,
        interpret=interpreted(interpret),
        kernel_name=name,
    )(*operands)
