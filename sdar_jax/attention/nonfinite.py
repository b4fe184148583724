"""Keeps a key or value that is not finite from whoever does not see it.

A masked position has weight zero, and values are multiplied by it: 0 * NaN is NaN, so one bad token would spoil every
query of its tile, whatever it sees. A score is masked by selection, which NaN does not pass. So a bad token is marked
in its key alone.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def poisoned(
    k: Float[Array, "*N D"], v: Float[Array, "*N D"]
) -> tuple[Float[Array, "*N D"], Float[Array, "*N D"]]:
    """Replaces keys by NaN and values by zero where either is not finite.

    A query that sees such a key gives NaN; any other gives, bit for bit, what it gives among good keys.
    """
    bad = ~(jnp.isfinite(k) & jnp.isfinite(v)).all(axis=-1, keepdims=True)
    return jnp.where(bad, jnp.nan, k), jnp.where(bad, 0, v)
