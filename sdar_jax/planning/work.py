"""What a step is expected to ask of the network, where the program leaves it to the data.

Rows are taken as full: one document of exactly the row's length, all of it learned. That is the most attention that
rows can need; the share of masked tokens is drawn by the recipe's own corruption.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sdar_jax.attention.blocks import blocks_for
from sdar_jax.attention.tiles import EMPTY, tile_kinds
from sdar_jax.devices.chips import platform
from sdar_jax.model.config import ModelConfig
from sdar_jax.objectives import Batch, Example, make_example
from sdar_jax.training import TrainConfig
from sdar_jax.training.flops import Work, work
from sdar_jax.visibility import Ranges

# Matmuls of [queries, head_dim] by [head_dim, keys] size in each kernel of an implementation.
KERNELS = {"forward": 2, "dq": 3, "dkv": 4}
# A TPU kernel's partial tiles skip sub-blocks of so many keys.
_TPU_KEYS = 128
_ROWS, _DRAWS = 4, 4


class Expected(NamedTuple):
    """Of a step. rows: that are computed, each of the batch's counted twice with complementary masks.

    tiled: pairs of query and key in the tiles that each kernel visits, for one row of all queries and of the outputs;
    empty where no kernel has tiles.
    """

    work: Work
    rows: int
    tiled: dict[str, tuple[float, float]]


def expected(config: TrainConfig, model: ModelConfig) -> Expected:
    """Made by the step's own `make_example`, on the machine that plans."""
    length, batch = config.data.sequence_length, config.data.batch_size
    example, share = _examples(config, model, min(_ROWS, batch), length)
    rows = len(example.inputs) * batch // min(_ROWS, batch)
    done = work(example)._replace(asked=jnp.float32(share * example.targets.size))
    done = jax.tree.map(lambda x: x * (rows / len(example.inputs)), done)
    one = jax.tree.map(lambda x: x[:1], example.ranges)
    tiled = {name: _tiled(model, one, name, example.targets.shape[1]) for name in KERNELS} if _kernels() else {}
    return Expected(done, rows, tiled)


def attention_flops(model: ModelConfig, expected: Expected, calls: dict[str, float]) -> float:
    """Of a step on all devices. Args: calls: of each kernel, how often a layer runs it for every row."""
    width = 2.0 * model.num_heads * model.head_dim * expected.rows
    return sum(
        width * KERNELS[name] * times * ((model.num_layers - 1) * expected.tiled[name][0] + expected.tiled[name][1])
        for name, times in calls.items()
    )


def _examples(config: TrainConfig, model: ModelConfig, rows: int, length: int) -> tuple[Example, float]:
    """An example of some full rows, and the share of outputs that are asked, over several draws."""
    noisy = config.data.noisy_length
    index = None if noisy is None else jnp.broadcast_to(jnp.arange(noisy, dtype=jnp.int32), (rows, noisy))
    ones = jnp.ones((rows, length), jnp.int32)
    make = jax.jit(partial(make_example, config=config.objective, model=model))
    examples = [make(Batch(ones, ones, ones > 0, index), jax.random.key(draw)) for draw in range(_DRAWS)]
    return examples[0], sum(float((example.weights != 0).mean()) for example in examples) / _DRAWS


def _kernels() -> str | None:
    return {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}.get(platform())


def _tiled(model: ModelConfig, ranges: Ranges, kernel: str, outputs: int) -> tuple[float, float]:
    """Pairs in visited tiles of one row: of all queries, and of the first `outputs`."""
    implementation = _kernels() or ""
    blocks = blocks_for(implementation, kernel, model.head_dim)
    queries = max(blocks.query_tile // (model.num_heads // model.num_kv_heads), 1)
    keys = _TPU_KEYS if implementation == "mosaic_tpu" else blocks.key_tile
    length = ranges.start.shape[1]
    kinds = tile_kinds(_padded(ranges, queries), queries, keys, length)
    visited = (kinds != EMPTY).sum(axis=-1)[0]
    pairs = lambda tiles: float(tiles.sum()) * queries * keys
    return pairs(visited), pairs(visited[: -(-outputs // queries)])


def _padded(ranges: Ranges, tile: int) -> Ranges:
    missing = -ranges.start.shape[1] % tile
    return Ranges(*(jnp.pad(x, ((0, 0), (0, missing), (0, 0))) for x in ranges))
