"""What a step is expected to compute, where the program leaves it to the data.

Rows are taken as full: one document of exactly the row's length, all of it with loss. That is the most attention that
rows can need; the share of masked tokens is drawn by the recipe's own corruption.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sdar_jax.arithmetic import ceil_div
from sdar_jax.attention.tile_sizes import tile_sizes_for
from sdar_jax.attention.tiles import EMPTY, tile_kinds
from sdar_jax.devices.chips import platform
from sdar_jax.model.config import ModelConfig
from sdar_jax.objectives import Batch, LossInputs, make_inputs
from sdar_jax.paradigm import Paradigm
from sdar_jax.training import TrainConfig
from sdar_jax.training.flops import TokenCounts, count_tokens
from sdar_jax.visibility import Ranges

# Matmuls of [queries, head_dim] by [head_dim, keys] size in each kernel of an implementation.
KERNELS = {"forward": 2, "dq": 3, "dkv": 4}
# A teacher's calls of "forward", over what it sees itself.
TEACHER = "teacher"
# A TPU kernel's partial tiles skip sub-blocks of so many keys.
_TPU_KEYS = 128
# Corruption is drawn for this many rows, this many times; what is counted is scaled up to the batch.
_ROWS, _DRAWS = 4, 4


class Expected(NamedTuple):
    """The work of a step.

    Attributes:
        token_counts: of the rows of a step.
        rows: that are computed; each of the batch's counted twice with complementary masks.
        tiled: for each kernel, pairs of query and key in the tiles that it visits, for one row: of all queries, and of
            the outputs; those of a teacher as `TEACHER`. Empty where no kernel has tiles.
    """

    token_counts: TokenCounts
    rows: int
    tiled: dict[str, tuple[float, float]]


def expected(config: TrainConfig, model: ModelConfig, teacher: Paradigm | None = None) -> Expected:
    """Counts what a step computes on inputs of the step's own `make_inputs`, run on the machine that plans.

    Args:
        teacher: how the teacher reads; None without one.
    """
    batch_size = config.data.batch_size
    drawn_rows = min(_ROWS, batch_size)
    inputs, loss_share = _drawn_inputs(config, model, drawn_rows, teacher)
    rows = len(inputs.tokens) * batch_size // drawn_rows
    counts = count_tokens(inputs)._replace(
        num_loss_tokens=jnp.float32(loss_share * inputs.targets.size)
    )
    counts = jax.tree.map(lambda x: x * (rows / len(inputs.tokens)), counts)
    tiled = {}
    if _implementation() is not None:
        one_row = jax.tree.map(lambda x: x[:1], inputs.ranges)
        outputs = inputs.targets.shape[1]
        tiled = {kernel: _tiled(model, one_row, kernel, outputs) for kernel in KERNELS}
        if inputs.teacher is not None:
            one_row = jax.tree.map(lambda x: x[:1], inputs.teacher.ranges)
            tiled[TEACHER] = _tiled(model, one_row, "forward", outputs)
    return Expected(counts, rows, tiled)


def attention_flops(model: ModelConfig, expected: Expected, calls: dict[str, float]) -> float:
    """Counts the FLOPs of the attention kernels in a step, on all devices together.

    Args:
        calls: for each kernel, and `TEACHER`, how often a layer runs it for every row.
    """
    width = 2.0 * model.num_heads * model.head_dim * expected.rows
    matmuls = KERNELS | {TEACHER: KERNELS["forward"]}
    flops = 0.0
    for kernel, times in calls.items():
        all_pairs, output_pairs = expected.tiled[kernel]
        flops += (
            width * matmuls[kernel] * times * ((model.num_layers - 1) * all_pairs + output_pairs)
        )
    return flops


def _drawn_inputs(
    config: TrainConfig, model: ModelConfig, rows: int, teacher: Paradigm | None
) -> tuple[LossInputs, float]:
    """Makes the inputs of some full rows, and the share of outputs that have loss, over several draws."""
    ones = jnp.ones((rows, config.data.sequence_length), jnp.int32)
    noisy_index = None
    if config.data.noisy_length is not None:
        noisy_index = jnp.broadcast_to(
            jnp.arange(config.data.noisy_length, dtype=jnp.int32), (rows, config.data.noisy_length)
        )
    # As if committed from left to right: any order leaves as many masks.
    order = jnp.cumsum(ones, axis=1) if config.data.has_order else None
    batch = Batch(ones, segment_ids=ones, loss_mask=ones > 0, noisy_index=noisy_index, order=order)
    make = jax.jit(partial(make_inputs, config=config.objective, model=model, teacher=teacher))
    draws = [make(batch, jax.random.key(draw)) for draw in range(_DRAWS)]
    shares = [float((inputs.weights != 0).mean()) for inputs in draws]
    return draws[0], sum(shares) / _DRAWS


def _implementation() -> str | None:
    return {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}.get(platform())


def _tiled(model: ModelConfig, ranges: Ranges, kernel: str, outputs: int) -> tuple[float, float]:
    """Counts the pairs in visited tiles of one row: of all queries, and of the first `outputs`."""
    implementation = _implementation() or ""
    tile_sizes = tile_sizes_for(implementation, kernel, model.head_dim)
    queries = max(tile_sizes.query_tile // (model.num_heads // model.num_kv_heads), 1)
    keys = _TPU_KEYS if implementation == "mosaic_tpu" else tile_sizes.key_tile
    length = ranges.start.shape[1]
    kinds = tile_kinds(_padded(ranges, queries), queries, keys, length)
    visited = (kinds != EMPTY).sum(axis=-1)[0]

    def pairs(tiles: jax.Array) -> float:
        return float(tiles.sum()) * queries * keys

    return pairs(visited), pairs(visited[: ceil_div(outputs, queries)])


def _padded(ranges: Ranges, tile: int) -> Ranges:
    missing = -ranges.start.shape[1] % tile
    return Ranges(*(jnp.pad(x, ((0, 0), (0, missing), (0, 0))) for x in ranges))
