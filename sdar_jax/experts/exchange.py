"""`exchange`: sends rows to other devices of a mesh axis, as many as the routing says."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def exchange(
    rows: Float[Array, "M D"], counts: Int[Array, "P P"], axis: tuple[str, ...], *, capacity: int
) -> Float[Array, "capacity D"]:
    """Sends each device's rows to the P devices of `axis`, inside shard_map; zeros follow the last that arrives.

    On accelerators a ragged all-to-all: no more than the counted rows travel. XLA has none for CPUs: there all rows go
    to all devices, which keep their own.

    Args:
        rows: [M, D]: those for the first device, those for the second, and so on; what is left at the end stays.
        counts: int32 [sender, receiver], the same on all devices.
        capacity: at least the rows that arrive, which lie in the order of their senders.
    """
    me = jax.lax.axis_index(axis)
    before_receiver = jnp.cumsum(counts, axis=1) - counts
    before_sender = jnp.cumsum(counts, axis=0) - counts
    plan = [x.astype(jnp.int32) for x in (before_receiver, before_sender, counts)]
    send = partial(_ragged, axis=axis, capacity=capacity)
    choose = partial(_gathered, axis=axis, capacity=capacity)
    return jax.lax.platform_dependent(rows, me, *plan, cpu=choose, default=send)


def _ragged(
    rows: Array, me: Array, starts: Array, arrive_at: Array, counts: Array, *, axis, capacity: int
) -> Array:
    empty = jnp.zeros((capacity, rows.shape[-1]), rows.dtype)
    return jax.lax.ragged_all_to_all(
        rows, empty, starts[me], counts[me], arrive_at[me], counts[:, me], axis_name=axis
    )


def _gathered(
    rows: Array, me: Array, starts: Array, arrive_at: Array, counts: Array, *, axis, capacity: int
) -> Array:
    everyone = jax.lax.all_gather(rows, axis)
    at = jnp.arange(capacity)
    sender = jnp.searchsorted(arrive_at[:, me] + counts[:, me], at, side="right")
    filled = sender < len(counts)
    sender = jnp.minimum(sender, len(counts) - 1)
    row = jnp.where(filled, starts[sender, me] + at - arrive_at[sender, me], 0)
    return jnp.where(filled[:, None], everyone[sender, row], 0)
