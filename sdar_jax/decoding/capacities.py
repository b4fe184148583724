"""How large a compiled program of `generate` is: few sizes, each for all batches that fit into it."""

from collections.abc import Hashable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from sdar_jax.arithmetic import round_up
from sdar_jax.devices.sharding import PAGES, mesh_of, named
from sdar_jax.model import Model

# Keys and values that a program may hold for sequences and positions that a batch does not have.
_SPARE_BYTES = 2**28
# Of sequences: a program for more would take longer than one that is compiled for few.
_FACTOR = 16


class Capacity(NamedTuple):
    """What fits into a program.

    Attributes:
        sequences: of the batch.
        length: positions of each.
        stops: stop tokens of each.
        suppressed: tokens that each may suppress.
    """

    sequences: int
    length: int
    stops: int
    suppressed: int

    def holds(self, other: "Capacity") -> bool:
        """Whether what fits into the other one fits into this."""
        return all(own >= needed for own, needed in zip(self, other, strict=True))


def roomy_capacity(
    needed: Capacity, program: Hashable, position_bytes: int, multiple: int
) -> Capacity | None:
    """The smallest that was compiled before and holds what is needed, or a new one with room for other batches.

    None where what that room would hold is large.

    Args:
        program: all else that a compilation depends on.
        position_bytes: keys and values of one position.
        multiple: of positions: whole pages.
    """
    known = _known(program)
    near = [each for each in known if each.sequences <= _FACTOR * needed.sequences]
    if fitting := [each for each in near if each.holds(needed)]:
        return min(fitting, key=lambda each: (each.sequences * each.length, each))
    roomy = needed._replace(
        sequences=_power(needed.sequences, 1, _FACTOR),
        length=round_up(_power(needed.length, 256, 8), multiple),
    )
    if position_bytes * roomy.sequences * roomy.length > _SPARE_BYTES:
        return None
    known.append(roomy)
    return roomy


@lru_cache(maxsize=64)
def _known(program: Hashable) -> list[Capacity]:
    """Sizes of one program that have room for other batches, as they came."""
    return []


def _power(number: int, first: int, factor: int) -> int:
    """The first of `first`, `first * factor`, ... that is not below the number."""
    while first < number:
        first *= factor
    return first


def bucket(length: int, multiple: int) -> int:
    """The next of 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, ...: four sizes per octave, then whole blocks."""
    step = max(8, 2 ** max(length - 1, 1).bit_length() // 8)
    return -(-(-(-length // step) * step) // multiple) * multiple


def position_bytes(model: Model) -> int:
    """Keys and values of one position, on one device."""
    config, mesh = model.config, mesh_of(model.embedding)
    shape = (1, config.num_kv_heads, 1, config.head_dim)
    if mesh is not None:
        shape = named(mesh, PAGES, shape).shard_shape(shape)
    return 2 * config.num_layers * int(np.prod(shape)) * model.embedding.dtype.itemsize
