"""Shared by every kernel for Hopper: the launch, the producer and its consumers, and the slots between them.

The last warpgroup of a block, the producer, only starts copies of the TMA engine; the others each own 64 rows of the
tile and multiply. A slot of shared memory is `ready` when the engine has filled it and `free` again when every consumer
has released it; consumers release it once the products that read it are done.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

# exp2 and log2 are what the hardware has.
LOG2E = math.log2(math.e)
CONSUMERS = 2
# Rows of a wgmma: what one consumer multiplies at a time.
WARPGROUP_ROWS = 64
# Of each thread, a consumer's and the producer's. A block has 65,536, which is 512 per thread of one warpgroup:
# 2 x 240 + 24 = 504.
REGISTERS = 240, 24

TILE = plgpu.Layout.WGMMA
ROWS = TILE.reduce(1)
COLUMNS = TILE.reduce(0)


def launch(
    body,
    operands: tuple[Array, ...],
    out_type,
    scratch,
    grid: dict[str, int],
    name: str,
    interpret: bool,
    consumers: int = CONSUMERS,
):
    """Runs `body` in blocks of `consumers` warpgroups and a producer over the grid, the last axis fastest.

    Args:
        interpret: on a CPU, with races looked for. JAX 0.12's interpreter knows no accumulators that are carried and no
            register operands; the tests extend it.
    """
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        kernel_name=name,
    )(*operands)


def roles(
    consume, produce, consumers: int = CONSUMERS, registers: tuple[int, int] = REGISTERS
) -> None:
    """Runs `consume(warpgroup)` on the consumers, `produce()` on the producer; `registers` of each thread of either."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < consumers)
    def _():
        plgpu.set_max_registers(registers[0], action="increase")
        consume(warpgroup)

    @pl.when(warpgroup == consumers)
    def _():
        plgpu.set_max_registers(registers[1], action="decrease")
        produce()


def wait_until_free(free, step: Array, stages: int) -> None:
    """Waits until a slot is free; in the first round every slot is."""

    @pl.when(step >= stages)
    def _():
        plgpu.barrier_wait(free.at[lax.rem(step, stages)])


def filled(value: float, shape: tuple[int, ...], layout) -> Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def along(x: Array, shape: tuple[int, ...], axis: int) -> Array:
    """Broadcasts one value per row (axis 0) or per column (axis 1) over the tile."""
    return lax.broadcast_in_dim(x, shape, [axis])


def plus_product(x: Array, a, b) -> Array:
    """Computes x + a b for float32 x, awaited. a: an array or in shared memory. b: in shared memory."""
    carried: Any = plgpu.WGMMAAccumulatorRef.init(x)
    return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, a, b))(carried)
