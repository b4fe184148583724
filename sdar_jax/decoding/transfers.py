"""What crosses between host and device: what a call leaves for the host, and what the host changes between calls.

Each change is compiled once.
"""

from functools import cached_property, partial
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
Packed = dict[str, Shaped[Array, "N B"]]


class StepOutput(NamedTuple):
    """A copy of what the device changed, left behind by a call: its state goes into the next one.

    Attributes:
        progress: packed (`pack`).
        output: as it is in the state.
    """

    progress: Packed
    output: SequenceOutput


def step_output(batch: SequenceState) -> StepOutput:
    return StepOutput(pack(batch.progress), batch.output)


def pack(fields: Any) -> Packed:
    """Stacks fields [B], of any tree, into one array for each dtype, by its name; flags travel as int32.

    Each array that the host reads takes time of its own.
    """
    groups: dict[str, list[Array]] = {}
    for field in jax.tree.leaves(fields):
        dtype = _dtype_in_transfer(field.dtype)
        groups.setdefault(dtype.name, []).append(field.astype(dtype))
    return {name: jnp.stack(fields) for name, fields in groups.items()}


def unpack(packed: dict[str, np.ndarray], dtypes: Any) -> Any:
    """The fields [B] that were packed, in the tree of their `dtypes`, each of its own."""
    leaves, structure = jax.tree.flatten(dtypes)
    groups = {name: iter(fields) for name, fields in packed.items()}
    fields = [next(groups[_dtype_in_transfer(dtype).name]).astype(dtype) for dtype in leaves]
    return jax.tree.unflatten(structure, fields)


def _dtype_in_transfer(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.int32) if np.dtype(dtype).kind == "b" else np.dtype(dtype)


class HostView:
    """`StepOutput` on the host: progress once the call that made it is done, output when a sequence is asked for.

    Args:
        found: what the call left.
        dtypes: of each field of the progress.
    """

    def __init__(self, found: StepOutput, dtypes: SequenceProgress):
        self._found = found
        self._dtypes = dtypes

    @cached_property
    def progress(self) -> SequenceProgress:
        """Numpy, [B] each. Returns when the call is done; raises what the device did."""
        return unpack(jax.device_get(self._found.progress), self._dtypes)

    @cached_property
    def _output(self) -> SequenceOutput:
        return jax.device_get(self._found.output)

    def sequence(self, inputs: SequenceInputs, slot: int) -> SequenceState:
        """The sequence in a slot of the batch, whose inputs the host has."""
        # Copies, or a finished sequence would hold all the others.
        progress, output = jax.tree.map(
            lambda field: field[slot].copy(), (self.progress, self._output)
        )
        return SequenceState(inputs, progress, output)


@partial(jax.jit, donate_argnums=0)
def put_sequence(batch: SequenceState, slot: _Index, sequence: SequenceState) -> SequenceState:
    return jax.tree.map(lambda x, new: x.at[slot].set(new), batch, sequence)


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
    return jax.tree.map(lambda pages: pages.at[target].set(pages[source]), cache)
