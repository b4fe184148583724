"""What the three kernels share: products, the mask of a partial tile, and the call over a list of visits."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sdar_jax.attention.mosaic_tpu import visit_list
from sdar_jax.attention.mosaic_tpu.layout import LANES, Layout
from sdar_jax.attention.mosaic_tpu.visit_list import VisitList

Array = jax.Array

# exp2 and log2 are what the chip has: scores are in units of log 2.
LOG2_E = math.log2(math.e)

# More than the compilers' default of 16 MB, which float32 tiles overflow; v5p has the least to give, 64 MB.
_VMEM_BYTES = 48 * 2**20
# Sub-blocks of a partial tile that are unrolled together: one hides part of the other's latency.
_GROUP = 2


def matmul(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Multiplies two matrices over one axis of each, in float32; float32 inputs keep their full precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def hide(scores: Array, bounds: Array, first_key: Array) -> Array:
    """Puts -inf where a row [., rows] does not see a key [keys, .]; bounds: [4, rows]."""
    key = first_key + lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    start, end, other_start, other_end = (bounds[i : i + 1] for i in range(4))
    seen = ((start <= key) & (key < end)) | ((other_start <= key) & (key < other_end))
    return jnp.where(seen, scores, -jnp.inf)


def folded(ref) -> Array:
    """Views a block of queries [1, groups, query tile, D] as the matrix [rows, D]."""
    _, groups, tile, dim = ref.shape
    return ref[0].reshape(groups * tile, dim)


def part(index) -> pl.Slice:
    """Slices the keys of a sub-block."""
    return pl.ds(
        index * LANES if isinstance(index, int) else pl.multiple_of(index * LANES, LANES), LANES
    )


def pipelined(count: int, ahead: int, produce: Callable, consume: Callable) -> None:
    """Runs consume(i, produce(i)) for every i, with produce `ahead` steps ahead.

    Unrolled, so that the scheduler fills the matrix units with the products of one step while the vector units work on
    another.
    """
    waiting = []
    for i in range(count):
        waiting.append(produce(i))
        if i >= ahead:
            consume(i - ahead, waiting.pop(0))
    for i, made in zip(range(count - len(waiting), count), waiting, strict=True):
        consume(i, made)


def looped(low: Array, high: Array, ahead: int, produce: Callable, consume: Callable) -> None:
    """Runs as `pipelined` does, for the steps [low, high) known at run time: groups of steps are unrolled, the rest go
    singly."""
    groups = lax.div(high - low, _GROUP)
    single = low + groups * _GROUP

    def run(index, count):
        pipelined(
            count, ahead, lambda i: produce(index + i), lambda i, made: consume(index + i, made)
        )

    lax.fori_loop(0, groups, lambda i, _: run(low + i * _GROUP, _GROUP), None)
    lax.fori_loop(single, high, lambda i, _: run(i, 1), None)


class Specs:
    """Block specs: which tile of each operand a visit is given."""

    def __init__(self, layout: Layout, by_key: bool):
        self._layout = layout
        self._query, self._key = (visit_list.outer, visit_list.inner)[:: -1 if by_key else 1]

    def queries(self) -> pl.BlockSpec:
        block = (1, self._layout.groups, self._layout.query_tile, self._layout.head_dim)
        return pl.BlockSpec(
            block, lambda head, visit, words: (head, 0, self._query(words, visit), 0)
        )

    def rows(self) -> pl.BlockSpec:
        block = (1, 1, 1, self._layout.rows)
        return pl.BlockSpec(
            block, lambda head, visit, words: (head, self._query(words, visit), 0, 0)
        )

    def bounds(self) -> pl.BlockSpec:
        return pl.BlockSpec(
            (1, 4, self._layout.rows), lambda head, visit, words: (self._query(words, visit), 0, 0)
        )

    def keys(self) -> pl.BlockSpec:
        block = (1, self._layout.key_tile, self._layout.head_dim)
        return pl.BlockSpec(block, lambda head, visit, words: (head, self._key(words, visit), 0))

    def keys_transposed(self) -> pl.BlockSpec:
        block = (1, self._layout.head_dim, self._layout.key_tile)
        return pl.BlockSpec(block, lambda head, visit, words: (head, 0, self._key(words, visit)))


def walk(
    kernel: Callable,
    lists: Sequence[VisitList],
    operands: Sequence[Array],
    in_specs: Sequence[pl.BlockSpec],
    out_specs: Sequence[pl.BlockSpec],
    out_shapes: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[tuple[int, ...]],
    *,
    name: str,
    interpret: bool,
) -> Sequence[Array]:
    """Calls kernel(words, inputs..., outputs..., scratch...) for every kv head and visit, a call a list.

    Later calls write their tiles into the arrays of the earlier ones. Scratch is float32 and lives through a call.
    """
    kv_heads = out_shapes[0].shape[0]
    outputs: Sequence[Array] = ()
    for visits in lists:
        aliased = len(outputs)
        grid_spec = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(kv_heads, visits.count),
            in_specs=[*in_specs, *(pl.BlockSpec(memory_space=pl.ANY) for _ in outputs)],
            out_specs=list(out_specs),
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        )
        outputs = pl.pallas_call(
            _without_aliases(kernel, len(operands), aliased),
            grid_spec=grid_spec,
            out_shape=list(out_shapes),
            input_output_aliases={1 + len(operands) + i: i for i in range(aliased)},
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
            ),
            interpret=interpret,
            name=name,
        )(visits.words, *operands, *outputs)
    return outputs


def _without_aliases(kernel: Callable, inputs: int, aliased: int) -> Callable:
    def wrapped(words, *refs):
        kernel(words, *refs[:inputs], *refs[inputs + aliased :])

    return wrapped
