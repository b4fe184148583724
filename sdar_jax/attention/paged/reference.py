"""Paged attention as the equation says: every page gathered, a dense mask and a softmax. The oracle."""

import jax.numpy as jnp
from jaxtyping import Array

from sdar_jax.attention.nonfinite import poisoned
from sdar_jax.attention.paged.pages import folded, gathered, unfolded


def unsupported(
    q: Array, k_pages: Array, v_pages: Array, page_table: Array, visible: Array
) -> None:
    """Accepts everything."""


def forward(
    q: Array, k_pages: Array, v_pages: Array, page_table: Array, visible: Array, *, scale: float
) -> Array:
    """Computes `paged_attention` with O(N H W M page) memory."""
    window = q.shape[1]
    kv_heads = k_pages.shape[1]
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    k = gathered(k_pages, page_table).astype(accumulate)
    v = gathered(v_pages, page_table).astype(accumulate)
    k, v = poisoned(k, v)
    index = jnp.arange(k.shape[2])
    limit = jnp.tile(visible, (1, q.shape[2] // kv_heads))[:, None, :, None]
    scores = jnp.einsum("ngrd,ngkd->ngrk", folded(q, kv_heads).astype(accumulate), k) * scale
    # The lowest finite number, not -inf: rows that see nothing must not compute inf - inf.
    scores = jnp.where(index < limit, scores, jnp.finfo(accumulate).min)
    exp = jnp.where(index < limit, jnp.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
    total = exp.sum(axis=-1, keepdims=True)
    out = jnp.einsum("ngrk,ngkd->ngrd", exp / jnp.where(total == 0, 1, total), v)
    return unfolded(out, window).astype(q.dtype)
