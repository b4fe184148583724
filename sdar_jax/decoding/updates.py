"""What the host reads of a batch on the device between calls, and what it changes there: each compiled once."""

from functools import cached_property, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from sdar_jax.decoding.rows import Rows
from sdar_jax.model import LayerPages

_Index = int | Int[Array, ""]


# What the device does not change of a row, and the host has.
_GIVEN = ("prompt_length", "limit", "origin", "canvas_end", "forward_budget", "stop_ids", "sampling")
_GIVEN += ("page_table", "pages_end", "admitted")
_ARRAYS = ("tokens", "committed", "step", "logprob", "top_token", "top_logprob", "block_step")
_NUMBERS = tuple(name for name in Rows._fields if name not in _GIVEN + _ARRAYS)


class Changed(NamedTuple):
    """A copy of what the device changed of all rows, left behind by a call: its state goes into the next one.

    numbers: fields of one number or flag a row, as one array: each that the host reads takes time of its own.
    arrays: the other fields, by name.
    """

    numbers: Int[Array, "N B"]
    arrays: dict[str, Array]


def changed(rows: Rows) -> Changed:
    numbers = jnp.stack([getattr(rows, name).astype(jnp.int32) for name in _NUMBERS])
    return Changed(numbers, {name: getattr(rows, name) for name in _ARRAYS})


class Seen:
    """`Changed` on the host: numbers once the call that made it is done, arrays when the first row is asked for."""

    def __init__(self, found: Changed):
        self._found = found

    @cached_property
    def _numbers(self) -> dict[str, np.ndarray]:
        return dict(zip(_NUMBERS, jax.device_get(self._found.numbers), strict=True))

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        return jax.device_get(self._found.arrays)

    def wait(self) -> None:
        """Returns when the call is done; raises what the device did."""
        self._numbers  # noqa: B018

    def number(self, name: str, place: int) -> int:
        """A field of the row at `place`; flags are 0 or 1."""
        return int(self._numbers[name][place])

    def row(self, given: Rows, place: int) -> Rows:
        """The row at `place`, whose other fields are `given`'s."""
        # Copies, or a finished row would hold all the others.
        arrays = {name: array[place].copy() for name, array in self._arrays.items()}
        numbers = {name: all_[place].astype(getattr(given, name).dtype) for name, all_ in self._numbers.items()}
        return given._replace(**arrays, **numbers)


@partial(jax.jit, donate_argnums=0)
def put_row(rows: Rows, place: _Index, row: Rows) -> Rows:
    return jax.tree.map(lambda x, new: x.at[place].set(new), rows, row)


@partial(jax.jit, donate_argnums=0)
def give_pages(rows: Rows, table: Int[Array, "B M"], ends: Int[Array, " B"]) -> Rows:
    """Page tables and what they cover, of all rows: those that starved may go on."""
    return rows._replace(page_table=table, pages_end=ends)


@partial(jax.jit, donate_argnums=0)
def end_row(rows: Rows, place: _Index) -> Rows:
    return rows._replace(done=rows.done.at[place].set(True))


@partial(jax.jit, donate_argnums=0)
def copy_page(cache: list[LayerPages], source: _Index, target: _Index) -> list[LayerPages]:
    return jax.tree.map(lambda pages: pages.at[target].set(pages[source]), cache)
