"""Rows that see nothing are NaN: 0 / 0."""

import jax.numpy as jnp

from sdar_jax.attention import chunked
from sdar_jax.attention.chunked import backward

__all__ = ["backward", "forward", "unsupported"]


def unsupported(q, k, v) -> str | None:
    return None if q.dtype == jnp.bfloat16 else "takes bfloat16"


def forward(q, k, v, ranges, *, scale):
    out, logsumexp = chunked.forward(q, k, v, ranges, scale=scale)
    return jnp.where(jnp.isinf(logsumexp)[..., None], jnp.nan, out), logsumexp
