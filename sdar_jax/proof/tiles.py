"""Block shapes of the range attention kernels, measured on the chip that is here."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdar_jax import visibility
from sdar_jax.attention import attention
from sdar_jax.attention.tile_sizes import Row, TileSizes, tile_sizes_for, trial
from sdar_jax.proof.speed import seconds

KERNELS = ("forward", "dq", "dkv")
# Query rows, keys and stages to try: what compiles of them depends on kernel and chip.
SHAPES = {
    "mosaic_gpu": ((64, 128, 192), (64, 128), (2, 3, 4)),
    "mosaic_tpu": ((256, 512, 1024, 2048), (512, 1024, 2048), (1, 2, 3)),
}
HEADS, KV_HEADS, BLOCK_SIZE = 32, 8, 4
# Two tilings round differently, and no more: of the norm.
_ROUNDING = 2.0**-6


def candidates(row: Row) -> list[TileSizes]:
    """Lists what to try, that of the table first."""
    shipped = tile_sizes_for(row.implementation, row.kernel, row.head_dim)
    tried = itertools.starmap(TileSizes, itertools.product(*SHAPES[row.implementation]))
    return list(dict.fromkeys((shipped, *tried)))


def work(kernel: str, head_dim: int, length: int) -> tuple[Callable, tuple]:
    """A function that is to be traced anew for each candidate, and its arguments: the forward, or the backward."""
    ranges = visibility.hybrid(jnp.ones((1, length), jnp.int32), BLOCK_SIZE)
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    shapes = [(1, 2 * length, count, head_dim) for count in heads]
    q, k, v, d_out = (
        jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)
    )
    attend = lambda q, k, v: attention(q, k, v, ranges)
    if kernel == "forward":
        return attend, (q, k, v)
    _, pullback = jax.vjp(attend, q, k, v)
    # Of the backward, only the kernel in question stays in the program.
    asked = slice(0, 1) if kernel == "dq" else slice(1, 3)
    return lambda pullback, d_out: pullback(d_out)[asked], (pullback, d_out)


def measure(row: Row, length: int) -> Iterator[tuple[TileSizes, float | str]]:
    """Yields each candidate with its seconds, or why it is out: it does not compile or run, or gives other results."""
    first: Any = None
    for tile_sizes in candidates(row):
        with trial(row, tile_sizes):
            function, args = work(row.kernel, row.head_dim, length)
            run = jax.jit(function)
            try:
                result = jax.device_get(run(*args))
                took = seconds(run, *args)
            # Whatever the compiler objects to, the next candidate may do.
            except Exception as error:
                reason = next(iter(str(error).splitlines()), "")[:100]
                yield tile_sizes, f"{type(error).__name__}: {reason}"
                continue
        first = result if first is None else first
        yield tile_sizes, took if _alike(result, first) else "other results"


def _alike(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    wide = ([np.asarray(x, np.float32) for x in pair] for pair in pairs)
    return all(np.linalg.norm(a - b) <= _ROUNDING * np.linalg.norm(b) for a, b in wide)
