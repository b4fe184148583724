"""A right kernel, of float32 alone, so that one case is enough."""

import jax.numpy as jnp

from sdar_jax.attention.chunked import backward, forward

__all__ = ["backward", "forward", "unsupported"]


def unsupported(q, k, v) -> str | None:
    return None if q.dtype == jnp.float32 else "takes float32"
