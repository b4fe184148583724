"""Keeps a key or value that is not finite from whoever does not see it.

A masked position has weight zero, and the kernels multiply: 0 * NaN is NaN, so one bad token would spoil every query
of its tile, whatever it sees. Instead the products run over finite numbers, and NaN is put where it belongs: at the
queries that see a bad key. Everyone else's result is, bit for bit, what it is beside good neighbours.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sdar_jax.visibility import Ranges


class Cleaned(NamedTuple):
    """Finite queries, keys and values, and the queries whose result is NaN.

    q: [B, Q, H, D]. k, v: [B, K, G, D]. spoiled: bool [B, Q, H].
    """

    q: Float[Array, "B Q H D"]
    k: Float[Array, "B K G D"]
    v: Float[Array, "B K G D"]
    spoiled: Bool[Array, "B Q H"]


def cleaned(
    q: Float[Array, "B Q H D"], k: Float[Array, "B K G D"], v: Float[Array, "B K G D"], ranges: Ranges
) -> Cleaned:
    """Zeros for what is not finite, and whom that concerns: a query that is bad itself, or sees a bad key or value."""
    bad_query = ~jnp.isfinite(q).all(axis=-1)
    bad_key = _bad(k, v)
    groups = q.shape[2] // k.shape[2]
    # As good as always there is nothing to look for.
    sees_bad = jax.lax.cond(
        bad_key.any(),
        lambda: jnp.repeat(_sees_any(ranges, bad_key), groups, axis=2),
        lambda: jnp.zeros_like(bad_query),
    )
    spoiled = bad_query | sees_bad
    return Cleaned(_zeroed(q, bad_query), _zeroed(k, bad_key), _zeroed(v, bad_key), spoiled)


def poisoned(k: Float[Array, "*N D"], v: Float[Array, "*N D"]) -> tuple[Float[Array, "*N D"], Float[Array, "*N D"]]:
    """Keys and values for a cache: where either is not finite, the key is NaN and the value zero.

    A key's score is masked by selection, so NaN in it reaches those alone who see it; a value's product is not.
    """
    bad = _bad(k, v)
    return jnp.where(bad[..., None], jnp.nan, k), _zeroed(v, bad)


def _bad(k: Array, v: Array) -> Array:
    return ~(jnp.isfinite(k) & jnp.isfinite(v)).all(axis=-1)


def _zeroed(x: Array, bad: Array) -> Array:
    return jnp.where(bad[..., None], 0, x)


def _sees_any(ranges: Ranges, bad_key: Bool[Array, "B K G"]) -> Bool[Array, "B Q G"]:
    """Whether a query's ranges hold a bad key: a difference of running counts for each range."""
    keys = bad_key.shape[1]
    before = jnp.pad(jnp.cumsum(bad_key, axis=1, dtype=jnp.int32), ((0, 0), (1, 0), (0, 0)))
    at = lambda edge: jax.vmap(lambda count, index: count[index])(before, jnp.clip(edge, 0, keys))
    return (at(ranges.end) > at(ranges.start)).any(axis=2)
