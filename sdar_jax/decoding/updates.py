"""What the host reads of a batch on the device between calls, and what it changes there: each compiled once."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from sdar_jax.decoding.rows import Rows
from sdar_jax.model import LayerPages

_Index = int | Int[Array, ""]


class Flags(NamedTuple):
    """What the host reads after each call, [B] each."""

    done: Any
    starved: Any
    cached: Any
    start: Any
    open: Any


def flags(rows: Rows) -> Flags:
    return Flags(*(getattr(rows, name) for name in Flags._fields))


# What the device does not change of a row, and the host has.
_GIVEN = ("prompt_length", "limit", "stop_ids", "knobs", "page_table", "pages_end")
_ARRAYS = ("tokens", "committed", "step", "logprob", "block_step")
_NUMBERS = tuple(name for name in Rows._fields if name not in _GIVEN + _ARRAYS)


def changed_at(rows: Rows, place: int) -> dict[str, np.ndarray]:
    """A row's fields that the device changes, on the host."""
    arrays, numbers = jax.device_get(_packed_at(rows, place))
    as_field = lambda name, value: value.astype(getattr(rows, name).dtype)
    return arrays | {name: as_field(name, value) for name, value in zip(_NUMBERS, numbers, strict=True)}


@jax.jit
def _packed_at(rows: Rows, place: _Index) -> tuple[dict[str, Array], Array]:
    """Its numbers and flags as one array: each array that the host reads takes time of its own."""
    numbers = jnp.stack([getattr(rows, name)[place].astype(jnp.int32) for name in _NUMBERS])
    return {name: getattr(rows, name)[place] for name in _ARRAYS}, numbers


@partial(jax.jit, donate_argnums=0)
def put_row(rows: Rows, place: _Index, row: Rows) -> Rows:
    return jax.tree.map(lambda x, new: x.at[place].set(new), rows, row)


@partial(jax.jit, donate_argnums=0)
def give_pages(rows: Rows, table: Int[Array, "B M"], ends: Int[Array, " B"]) -> Rows:
    """Page tables and what they cover, of all rows: those that starved may go on."""
    starved = rows.starved & (ends <= rows.pages_end)
    return rows._replace(page_table=table, pages_end=ends, starved=starved)


@partial(jax.jit, donate_argnums=0)
def end_row(rows: Rows, place: _Index) -> Rows:
    return rows._replace(done=rows.done.at[place].set(True), open=rows.open.at[place].set(0))


@partial(jax.jit, donate_argnums=0)
def copy_page(cache: list[LayerPages], source: _Index, target: _Index) -> list[LayerPages]:
    return jax.tree.map(lambda pages: pages.at[target].set(pages[source]), cache)
