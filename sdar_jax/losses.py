"""Weighted cross-entropy of a linear head that never holds [tokens, vocabulary] and reads weighted tokens alone."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Logits held at once, in numbers: 256 MB of float32.
_LOGITS_HELD = 2**26


class TokenScores(NamedTuple):
    """What each token scored, where its weight is not zero; zero and False elsewhere. No gradient flows through it.

    nll: float32 [N] in nats. correct: bool [N], whether no token had a higher logit than the target.
    """

    nll: Float[Array, " N"]
    correct: Bool[Array, " N"]


def linear_cross_entropy(
    hidden: Float[Array, "N D"],
    head: Float[Array, "D V"] | Float[Array, "V D"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
    *,
    vocab_axis: int = 1,
    chunk: int | None = None,
) -> tuple[Float[Array, ""], TokenScores]:
    """sum_i w_i CE(hidden_i . head, target_i), float32 accumulation, and each token's score.

    Tokens of weight zero cost nothing: the head walks over ceil(weighted / chunk) chunks, a number known only at run
    time, so no capacity ever drops a token. Under differentiation the gradients are made in the same walk (the loss
    is linear in its cotangent), and accumulated in float32. Differentiable once, in hidden and head.

    Args:
        vocab_axis: the axis of `head` that is the vocabulary: 1, or 0 for tied embeddings.
        chunk: tokens whose logits are held at once; by default what fits 256 MB.
    """
    vocab = head.shape[vocab_axis]
    chunk = chunk or max(_LOGITS_HELD // vocab, 128)
    chunk = min(chunk, hidden.shape[0])
    total, nll, correct = _loss(hidden, head, targets, weights, vocab_axis, chunk)
    return total, TokenScores(jax.lax.stop_gradient(nll), correct)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _loss(hidden, head, targets, weights, vocab_axis, chunk):
    return _walk(hidden, head, targets, weights, vocab_axis, chunk, gradients=False)[0]


def _loss_fwd(hidden, head, targets, weights, vocab_axis, chunk):
    out, gradients = _walk(hidden, head, targets, weights, vocab_axis, chunk, gradients=True)
    like = jnp.zeros((0,), hidden.dtype), jnp.zeros((0,), head.dtype)
    return out, (gradients, like)


def _loss_bwd(vocab_axis, chunk, residuals, cotangents):
    gradients, like = residuals
    d_hidden, d_head = ((g * cotangents[0]).astype(x.dtype) for g, x in zip(gradients, like, strict=True))
    return d_hidden, d_head, None, None


_loss.defvjp(_loss_fwd, _loss_bwd)


def _walk(hidden, head, targets, weights, vocab_axis, chunk, *, gradients):
    """Loss, scores and, if asked, the float32 gradients for hidden and head, over the weighted tokens alone."""
    accumulate = jnp.promote_types(hidden.dtype, jnp.float32)
    tokens = hidden.shape[0]
    weights = weights.astype(accumulate)
    head = head.astype(hidden.dtype)
    weighted_first = jnp.argsort(weights == 0, stable=True)
    # One past the end: gathers give it a weight of zero, and scatters drop it.
    order = jnp.pad(weighted_first, (0, -tokens % chunk), constant_values=tokens)
    chunks = (jnp.count_nonzero(weights) + chunk - 1) // chunk

    def visit(i, carry):
        total, nll, correct, d_hidden, d_head = carry
        at = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk)
        weight = jnp.take(weights, at, mode="fill", fill_value=0)
        asked = weight != 0
        h = jnp.where(asked[:, None], jnp.take(hidden, at, axis=0, mode="clip"), 0)
        target = jnp.where(asked, jnp.take(targets, at, mode="clip"), 0)
        score = _chunk_scores(h, head, target, vocab_axis, accumulate)
        total += jnp.sum(weight * score.nll)
        nll = nll.at[at].set(jnp.where(asked, score.nll, 0), mode="drop")
        correct = correct.at[at].set(asked & score.correct, mode="drop")
        if gradients:
            d_logits = (weight[:, None] * score.d_logits).astype(hidden.dtype)
            d_hidden = d_hidden.at[at].set(_dot("nv,vd->nd", d_logits, head, vocab_axis, accumulate), mode="drop")
            pair = (d_logits, h) if vocab_axis == 0 else (h, d_logits)
            d_head += jnp.einsum("na,nb->ab", *pair, preferred_element_type=accumulate)
        return total, nll, correct, d_hidden, d_head

    zeros = (jnp.zeros(hidden.shape, accumulate), jnp.zeros(head.shape, accumulate)) if gradients else (None, None)
    scores = jnp.zeros(tokens, accumulate), jnp.zeros(tokens, bool)
    total, nll, correct, *grads = jax.lax.fori_loop(0, chunks, visit, (jnp.zeros((), accumulate), *scores, *zeros))
    return (total, nll, correct), tuple(grads)


class _ChunkScores(NamedTuple):
    nll: Array
    correct: Array
    d_logits: Array


def _chunk_scores(h, head, target, vocab_axis, accumulate) -> _ChunkScores:
    logits = _dot("nd,vd->nv", h, head, vocab_axis, accumulate)
    largest = logits.max(axis=-1)
    logsumexp = largest + jnp.log(jnp.exp(logits - largest[:, None]).sum(axis=-1))
    at_target = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
    one_hot = jax.nn.one_hot(target, logits.shape[-1], dtype=accumulate)
    return _ChunkScores(logsumexp - at_target, at_target >= largest, jnp.exp(logits - logsumexp[:, None]) - one_hot)


def _dot(spec, x, head, vocab_axis, accumulate):
    if vocab_axis == 1:
        spec = spec.replace("vd", "dv")
    return jnp.einsum(spec, x, head, preferred_element_type=accumulate)
