"""What crosses between host and device: what a call leaves for the host, and what the host changes between calls.

Each change is compiled once.
"""

import math
from functools import cache, cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from sdar_jax.decoding.decode_state import (
    SequenceInputs,
    SequenceOutput,
    SequenceProgress,
    SequenceState,
)
from sdar_jax.model import LayerPages

_Index = int | Int[Array, ""]
Packed = dict[str, Shaped[Array | np.ndarray, "B _"]]


class StepOutput(NamedTuple):
    """A copy of what the device changed, left behind by a call: its state goes into the next one.

    Attributes:
        progress: packed (`pack`).
        output: of each sequence, packed [1, n]: what is asked for must not wait for the call after this one, as a
            program that cut it out would.
    """

    progress: Packed
    output: list[Packed]


def step_output(batch: SequenceState) -> StepOutput:
    rows = [slice(i, i + 1) for i in range(len(batch.progress.done))]
    return StepOutput(
        pack(batch.progress),
        [pack(jax.tree.map(lambda field, row=row: field[row], batch.output)) for row in rows],
    )


def pack(fields: Any) -> Packed:
    """Joins fields [B, ...], of any tree, into one array [B, n] for each dtype, by its name; flags travel as int32.

    Each array that crosses takes time of its own. What is on the host stays there.
    """
    groups: dict[str, list[Any]] = {}
    for field in jax.tree.leaves(fields):
        name, dtype = _in_transfer(field.dtype)
        flat = field.reshape(field.shape[0], math.prod(field.shape[1:]))
        groups.setdefault(name, []).append(flat.astype(dtype))
    on_host = all(isinstance(field, np.ndarray) for group in groups.values() for field in group)
    join = np.concatenate if on_host else jnp.concatenate
    return {name: join(fields, axis=1) for name, fields in groups.items()}


def unpack(packed: Packed, like: Any) -> Any:
    """The fields [B, ...] that were packed, in the tree of `like`: of each its shape [...] and dtype."""
    leaves, structure = jax.tree.flatten(like)
    taken = dict.fromkeys(packed, 0)
    fields = []
    for leaf in leaves:
        (name, _), size = _in_transfer(leaf.dtype), math.prod(leaf.shape)
        part = packed[name][:, taken[name] : taken[name] + size]
        taken[name] += size
        fields.append(part.reshape(len(part), *leaf.shape).astype(leaf.dtype))
    return jax.tree.unflatten(structure, fields)


# A dtype takes microseconds to say its name, and there are dozens of fields.
@cache
def _in_transfer(dtype: np.dtype) -> tuple[str, np.dtype]:
    dtype = np.dtype(np.int32) if np.dtype(dtype).kind == "b" else np.dtype(dtype)
    return dtype.name, dtype


class HostView:
    """`StepOutput` on the host: progress once the call that made it is done, output of sequences that are asked for.

    Args:
        found: what the call left.
        like: a sequence of the batch.
    """

    def __init__(self, found: StepOutput, like: SequenceState):
        self._found = found
        self._like = like
        self._outputs: dict[int, SequenceOutput] = {}

    @cached_property
    def progress(self) -> SequenceProgress:
        """Numpy, [B] each. Returns when the call is done; raises what the device did."""
        return unpack(jax.device_get(self._found.progress), self._like.progress)

    def is_ready(self) -> bool:
        """Whether `progress` need not wait."""
        return all(array.is_ready() for array in jax.tree.leaves(self._found.progress))

    def sequence(self, inputs: SequenceInputs, slot: int) -> SequenceState:
        """The sequence in a slot of the batch, whose inputs the host has. No other's output is fetched."""
        if slot not in self._outputs:
            row = unpack(jax.device_get(self._found.output[slot]), self._like.output)
            self._outputs[slot] = jax.tree.map(lambda field: field[0], row)
        progress = jax.tree.map(lambda field: field[slot].copy(), self.progress)
        return SequenceState(inputs, progress, self._outputs[slot])


def put_sequence(batch: SequenceState, slot: _Index, sequence: SequenceState) -> SequenceState:
    """The batch, donated, with a sequence of the host's in a slot."""
    return _put_packed(batch, slot, pack(jax.tree.map(lambda field: field[None], sequence)))


@partial(jax.jit, donate_argnums=0)
def _put_packed(batch: SequenceState, slot: _Index, packed: Packed) -> SequenceState:
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    return jax.tree.map(lambda x, new: x.at[slot].set(new[0]), batch, unpack(packed, rows))


@partial(jax.jit, donate_argnums=0)
def set_pages(
    batch: SequenceState, table: Int[Array, "B M"], ends: Int[Array, " B"]
) -> SequenceState:
    """Sets the page tables of all sequences, and what they cover: those that were out of pages may continue."""
    return batch.with_inputs(page_table=table, pages_end=ends)


@partial(jax.jit, donate_argnums=0)
def end_sequence(batch: SequenceState, slot: _Index) -> SequenceState:
    return batch.with_progress(done=batch.progress.done.at[slot].set(True))


@partial(jax.jit, donate_argnums=0)
def copy_page(cache: list[LayerPages], source: _Index, target: _Index) -> list[LayerPages]:
    # Layers, where they are on an axis of their own, lie before the pages.
    whole = lambda page: (..., page, slice(None), slice(None), slice(None))
    return jax.tree.map(lambda pages: pages.at[whole(target)].set(pages[whole(source)]), cache)
