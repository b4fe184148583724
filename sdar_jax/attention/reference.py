"""Attention as the equation says: a dense mask and a softmax. The oracle, and the quickest for small windows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sdar_jax.visibility import Ranges


def attention(
    q: Float[Array, "B Q H D"],
    k: Float[Array, "B K G D"],
    v: Float[Array, "B K G D"],
    ranges: Ranges,
    *,
    scale: float,
) -> Float[Array, "B Q H D"]:
    """Softmax over the keys that each query sees; a query that sees none gives zero. O(Q K) memory."""
    batch, queries, heads, dim = q.shape
    kv_heads = k.shape[2]
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    grouped = q.reshape(batch, queries, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum("bqhgd,bkhd->bhgqk", grouped, k, preferred_element_type=accumulate) * scale
    visible = ranges.sees(jnp.arange(k.shape[1]))[:, None, None]
    scores = jnp.where(visible, scores, -jnp.inf)
    largest = jnp.max(scores, axis=-1, keepdims=True, initial=jnp.finfo(accumulate).min)
    exp = jnp.exp(scores - jax.lax.stop_gradient(largest))
    total = jnp.maximum(exp.sum(axis=-1, keepdims=True), jnp.finfo(accumulate).tiny)
    out = jnp.einsum("bhgqk,bkhd->bqhgd", (exp / total).astype(v.dtype), v, preferred_element_type=accumulate)
    return out.reshape(batch, queries, heads, v.shape[-1]).astype(q.dtype)
