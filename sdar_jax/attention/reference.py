"""Attention as the equation says: a dense mask and a softmax. The oracle, and the quickest for small windows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sdar_jax.visibility import Ranges


def unsupported(q: Array, k: Array, v: Array) -> None:
    """Takes everything."""


def forward(
    q: Float[Array, "B Q H D"],
    k: Float[Array, "B K G D"],
    v: Float[Array, "B K G D"],
    ranges: Ranges,
    *,
    scale: float,
) -> tuple[Float[Array, "B Q H D"], Float[Array, "B Q H"]]:
    """Computes the softmax over the keys that each query sees; a query that sees none gives zero. O(Q K) memory.

    Differentiated as it stands, so there is no backward.

    Returns:
        The output [B, Q, H, D], and the scores' log-sum-exp [B, Q, H], +inf where nothing is seen.
    """
    batch, queries, heads, _ = q.shape
    kv_heads = k.shape[2]
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    grouped = q.reshape(batch, queries, kv_heads, heads // kv_heads, -1)
    scores = jnp.einsum("bqhgd,bkhd->bhgqk", grouped, k, preferred_element_type=accumulate) * scale
    visible = ranges.sees(jnp.arange(k.shape[1]))[:, None, None]
    scores = jnp.where(visible, scores, -jnp.inf)
    # The lowest finite number, not -inf: rows that see nothing must not compute inf - inf.
    largest = jnp.max(scores, axis=-1, keepdims=True, initial=jnp.finfo(accumulate).min)
    largest = jax.lax.stop_gradient(largest)
    exp = jnp.exp(scores - largest)
    total = exp.sum(axis=-1, keepdims=True)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    out = jnp.einsum(
        "bhgqk,bkhd->bqhgd", (exp / total).astype(v.dtype), v, preferred_element_type=accumulate
    )
    logsumexp = jnp.where(empty, jnp.inf, largest + jnp.log(total))[..., 0]
    logsumexp = logsumexp.transpose(0, 3, 1, 2).reshape(batch, queries, heads)
    return out.reshape(*q.shape[:3], v.shape[-1]).astype(q.dtype), logsumexp
