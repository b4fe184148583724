"""Reading and writing keys and values by page table."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from sdar_jax.attention.mesh import over_heads
from sdar_jax.attention.nonfinite import poisoned

Pages = Float[Array, "P G page D"]

# XLA takes many times as long to compile a larger scatter for a TPU: 20 s on v6e.
_ROWS_AT_ONCE = 2048


def write_pages(
    k_pages: Pages,
    v_pages: Pages,
    k: Float[Array, "N W G D"],
    v: Float[Array, "N W G D"],
    page_table: Int[Array, "N M"],
    start: Int[Array, " N"],
    count: Int[Array, " N"],
) -> tuple[Pages, Pages]:
    """Writes `k[n, :count[n]]` and `v[n, :count[n]]` to positions `start[n]`, ... of sequence n.

    Nothing else changes: what lies past `count`, past the table or under an entry outside [0, P) is written nowhere. In
    place where the pages are donated. Two sequences must not write the same position of the same page. Where a key or
    value is not finite, NaN is written for the key and zero for the value: who sees it gets NaN, and nobody else does.
    Under a mesh (`sharding.activate_mesh`) each device writes its own key-value heads.
    """
    operands = (k_pages, v_pages, k, v, page_table, start, count)
    heads_at = (1, 1, 2, 2, None, None, None)
    return over_heads(
        _write_both, operands, heads_at=heads_at, out_at=(1, 1), kv_heads=k_pages.shape[1]
    )


def _write_both(k_pages, v_pages, k, v, page_table, start, count):
    rows = _destinations(k_pages, k.shape[1], page_table, start, count)
    k, v = poisoned(k.astype(k_pages.dtype), v.astype(v_pages.dtype))

    def write(pages: Array, new: Array) -> Array:
        return jax.lax.platform_dependent(pages, new, rows, tpu=_write_in_turns, default=_write)

    return write(k_pages, k), write(v_pages, v)


def _write(pages: Array, new: Array, rows: Array) -> Array:
    # Rows of D, and not of [G, D]: for many of those XLA would lay all pages out anew on a TPU, there and back.
    flat = pages.reshape(-1, pages.shape[3])
    return flat.at[rows].set(new, mode="drop", unique_indices=True).reshape(pages.shape)


def _write_in_turns(pages: Array, new: Array, rows: Array) -> Array:
    """Writes as `_write` does, some sequences at a time."""
    batch = rows.shape[0]
    rows_per_sequence = math.prod(rows.shape[1:])
    divisors = [n for n in range(1, batch + 1) if batch % n == 0]
    at_once = max(n for n in divisors if n == 1 or n * rows_per_sequence <= _ROWS_AT_ONCE)
    if at_once == batch:
        return _write(pages, new, rows)

    def in_turns(x: Array) -> Array:
        return x.reshape(-1, at_once, *x.shape[1:])

    def write_turn(pages: Array, turn: tuple[Array, Array]) -> tuple[Array, None]:
        return _write(pages, *turn), None

    pages, _ = jax.lax.scan(write_turn, pages, (in_turns(new), in_turns(rows)))
    return pages


def _destinations(
    pages: Array, window: int, page_table: Array, start: Array, count: Array
) -> Int[Array, "N W G"]:
    """Finds where each key of the windows goes among the P * G * page of the pages; past all of them if nowhere.

    All different, which saves XLA sorting them.
    """
    total, kv_heads, page, _ = pages.shape
    index = jnp.arange(window, dtype=start.dtype)
    position = start[:, None] + index
    ids = jnp.take_along_axis(page_table, position // page, axis=1, mode="fill", fill_value=-1)
    written = (index < count[:, None]) & (position >= 0) & (ids >= 0) & (ids < total)
    head = jnp.arange(kv_heads, dtype=ids.dtype)
    row = (ids[..., None] * kv_heads + head) * page + (position % page)[..., None]
    nowhere = total * kv_heads * page + jnp.arange(row.size, dtype=row.dtype).reshape(row.shape)
    return jnp.where(written[..., None], row, nowhere)


def folded(per_query: Shaped[Array, "N W H D"], kv_heads: int) -> Shaped[Array, "N G rows D"]:
    """Folds the query heads that share a key-value head into rows: row = head in group * W + query."""
    rows, window, heads, dim = per_query.shape
    grouped = per_query.reshape(rows, window, kv_heads, heads // kv_heads, dim)
    return grouped.transpose(0, 2, 3, 1, 4).reshape(rows, kv_heads, -1, dim)


def unfolded(per_row: Shaped[Array, "N G rows D"], window: int) -> Shaped[Array, "N W H D"]:
    """Inverts `folded`."""
    rows, kv_heads, _, dim = per_row.shape
    grouped = per_row.reshape(rows, kv_heads, -1, window, dim)
    return grouped.transpose(0, 3, 1, 2, 4).reshape(rows, window, -1, dim)


def gathered(pages: Pages, ids: Int[Array, "N M"]) -> Float[Array, "N G keys D"]:
    """Gathers pages by id, joined along the keys; ids outside [0, P) read some page or other, never past the array."""
    total, kv_heads, page, dim = pages.shape
    # Head by head, so that what is found need not be transposed.
    at = (
        jnp.clip(ids, 0, total - 1)[:, None] * kv_heads
        + jnp.arange(kv_heads, dtype=ids.dtype)[:, None]
    )
    found = pages.reshape(-1, page, dim).at[at].get(mode="promise_in_bounds")
    return found.reshape(*found.shape[:2], -1, dim)
