"""Weighted cross-entropy of a linear head that never holds [tokens, vocabulary] and reads weighted tokens alone."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from sdar_jax.devices.chips import platform
from sdar_jax.devices.sharding import current_mesh, mesh_axes
from sdar_jax.errors import ConfigError

# Logits held at once, in numbers. On a CPU 16 MB of float32, which stay in its cache; on accelerators 1 GB, as each
# chunk also reads and writes the head's whole gradient (docs/kernels.md).
_LOGITS_HELD = {"cpu": 2**22}
_LOGITS_HELD_ELSEWHERE = 2**28


class TokenScores(NamedTuple):
    """What each token scored, where its weight is not zero; zero and False elsewhere. No gradient flows through it.

    nll: float32 [N] or [B, L], as the tokens, in nats. correct: bool, whether no token had a higher logit than the
    target.
    """

    nll: Float[Array, "*N"]
    correct: Bool[Array, "*N"]


class LossSharding(NamedTuple):
    """How the loss is split over a mesh: hashable, for static arguments.

    tokens: mesh axes that split the first axis of hidden, targets and weights. length: those that split the second,
    where tokens are [B, L]. vocab: the axis that splits the head's vocabulary, or None. width: one of `tokens` that
    splits the other side of the head, or None; the head is gathered over it, and its gradient scattered.
    """

    mesh: Mesh | AbstractMesh
    tokens: tuple[str, ...] = ()
    vocab: str | None = None
    length: tuple[str, ...] = ()
    width: str | None = None


def loss_sharding(tokens: tuple[int, ...], head: tuple[int, ...], vocab_axis: int) -> LossSharding | None:
    """How the mesh in force splits a loss over tokens [B, L] and a head of these shapes; None without a mesh."""
    mesh = current_mesh()
    if mesh is None:
        return None
    batch = mesh_axes("batch", tokens[0])
    (vocab,) = mesh_axes("vocab", head[vocab_axis]) or (None,)
    (width,) = mesh_axes("embed", head[1 - vocab_axis]) or (None,)
    return LossSharding(mesh, batch, vocab, mesh_axes("length", tokens[1]), width if width in batch else None)


def linear_cross_entropy(
    hidden: Float[Array, "*N D"],
    head: Float[Array, "D V"] | Float[Array, "V D"],
    targets: Int[Array, "*N"],
    weights: Float[Array, "*N"],
    *,
    vocab_axis: int = 1,
    chunk: int | None = None,
    sharding: LossSharding | None = None,
) -> tuple[Float[Array, ""], TokenScores]:
    """sum_i w_i CE(hidden_i . head, target_i), float32 accumulation, and each token's score.

    Tokens of weight zero cost nothing: the head walks over ceil(weighted / chunk) chunks, a number known only at run
    time, so no capacity ever drops a token. Under differentiation the gradients are made in the same walk (the loss
    is linear in its cotangent), and accumulated in float32. Differentiable once, in hidden and head.

    Args:
        hidden, targets, weights: of tokens [N], or of rows of them [B, L].
        vocab_axis: the axis of `head` that is the vocabulary: 1, or 0 for tied embeddings.
        chunk: tokens whose logits are held at once; by default what fits 16 MB (1 GB on accelerators), at least 128.
        sharding: on a mesh, each device walks its own tokens and its own part of the vocabulary.

    Raises:
        ConfigError: tokens or vocabulary do not divide over the mesh axes that split them.
    """
    token_parts, vocab_parts = _checked_parts(hidden, head, vocab_axis, sharding)
    chunk = chunk or chunk_size(head.shape[vocab_axis] // vocab_parts)
    chunk = min(chunk, math.prod(hidden.shape[:-1]) // token_parts)
    total, nll, correct = _loss(hidden, head, targets, weights, vocab_axis, chunk, sharding)
    return total, TokenScores(jax.lax.stop_gradient(nll), correct)


def chunk_size(vocabulary: int) -> int:
    """Tokens whose logits are held at once by default, for a device's part of the vocabulary."""
    return max(_LOGITS_HELD.get(platform(), _LOGITS_HELD_ELSEWHERE) // vocabulary, 128)


def _checked_parts(hidden: Array, head: Array, vocab_axis: int, sharding: LossSharding | None) -> tuple[int, int]:
    """Into how many parts tokens and vocabulary are split."""
    if sharding is None:
        return 1, 1
    size = lambda axes: math.prod(sharding.mesh.shape[axis] for axis in axes if axis is not None)
    rows, columns, vocab, width = (
        size(axes) for axes in (sharding.tokens, sharding.length, (sharding.vocab,), (sharding.width,))
    )
    _check_divides("tokens", hidden.shape[0], rows)
    _check_divides("tokens a row", hidden.shape[-2], columns)
    _check_divides("vocabulary entries", head.shape[vocab_axis], vocab)
    _check_divides("columns of the head", head.shape[1 - vocab_axis], width)
    return rows * columns, vocab


def _check_divides(what: str, size: int, parts: int) -> None:
    if size % parts:
        raise ConfigError(f"{size} {what} do not divide over {parts} devices; pad them or use fewer devices")


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _loss(hidden, head, targets, weights, vocab_axis, chunk, sharding):
    return _run(hidden, head, targets, weights, vocab_axis, chunk, sharding, gradients=False)[0]


def _loss_fwd(hidden, head, targets, weights, vocab_axis, chunk, sharding):
    out, gradients = _run(hidden, head, targets, weights, vocab_axis, chunk, sharding, gradients=True)
    like = jnp.zeros((0,), hidden.dtype), jnp.zeros((0,), head.dtype)
    return out, (gradients, like)


def _loss_bwd(vocab_axis, chunk, sharding, residuals, cotangents):
    gradients, like = residuals
    d_hidden, d_head = ((g * cotangents[0]).astype(x.dtype) for g, x in zip(gradients, like, strict=True))
    return d_hidden, d_head, None, None


_loss.defvjp(_loss_fwd, _loss_bwd)


def _run(hidden, head, targets, weights, vocab_axis, chunk, sharding, *, gradients):
    """`_walk`, by each device over its part of tokens and vocabulary, where there is a mesh."""
    walk = partial(_walk_rows, vocab_axis=vocab_axis, chunk=chunk, gradients=gradients)
    if sharding is None:
        return walk(hidden, head, targets, weights)
    mesh, tokens, vocab, length, width = sharding
    by_token = PartitionSpec(tokens or None, length or None) if length else PartitionSpec(tokens or None)
    by_vocab = PartitionSpec(*((vocab, width) if vocab_axis == 0 else (width, vocab)))
    outs = (PartitionSpec(), by_token, by_token), (by_token, by_vocab) if gradients else ()
    others = tuple(axis for axis in (*tokens, *length) if axis != width)

    def walk_part(hidden, head, targets, weights):
        if width is not None:
            head = jax.lax.all_gather(head.astype(hidden.dtype), width, axis=1 - vocab_axis, tiled=True)
        (total, nll, correct), grads = walk(hidden, head, targets, weights, vocab=vocab)
        # The rest of the vocabulary adds to a token's gradient, the other tokens to that of the head.
        if grads:
            d_hidden, d_head = grads
            if width is not None:
                d_head = jax.lax.psum_scatter(d_head, width, scatter_dimension=1 - vocab_axis, tiled=True)
            grads = _psum(d_hidden, vocab), _psum(d_head, others)
        return (_psum(total, (*tokens, *length)), nll, correct), grads

    specs = (by_token, by_vocab, by_token, by_token)
    return jax.shard_map(walk_part, mesh=mesh, in_specs=specs, out_specs=outs, check_vma=False)(
        hidden, head, targets, weights
    )


def _psum(x: Array, axes: str | tuple[str, ...] | None) -> Array:
    return jax.lax.psum(x, axes) if axes else x


def _walk_rows(hidden, head, targets, weights, vocab=None, **options):
    """`_walk` over tokens [N] or [B, L], as they come."""
    tokens = targets.shape
    flat = hidden.reshape(-1, hidden.shape[-1]), head, targets.reshape(-1), weights.reshape(-1)
    (total, nll, correct), grads = _walk(*flat, vocab, **options)
    if grads:
        grads = grads[0].reshape(hidden.shape), grads[1]
    return (total, nll.reshape(tokens), correct.reshape(tokens)), grads


def _walk(hidden, head, targets, weights, vocab=None, *, vocab_axis, chunk, gradients):
    """Loss, scores and, if asked, the float32 gradients for hidden and head, over the weighted tokens alone.

    vocab: the mesh axis that splits the vocabulary, inside shard_map.
    """
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
        score = _chunk_scores(h, head, target, vocab_axis, accumulate, vocab)
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
    with jax.named_scope("loss"):
        total, nll, correct, *grads = jax.lax.fori_loop(0, chunks, visit, (jnp.zeros((), accumulate), *scores, *zeros))
    return (total, nll, correct), tuple(grads) if gradients else ()


class _ChunkScores(NamedTuple):
    nll: Array
    correct: Array
    d_logits: Array


def _chunk_scores(h, head, target, vocab_axis, accumulate, vocab) -> _ChunkScores:
    logits = _dot("nd,vd->nv", h, head, vocab_axis, accumulate)
    size = logits.shape[-1]
    if vocab is not None:
        target = target - jax.lax.axis_index(vocab) * size
    largest = logits.max(axis=-1)
    largest = jax.lax.pmax(largest, vocab) if vocab else largest
    logsumexp = largest + jnp.log(_psum(jnp.exp(logits - largest[:, None]).sum(axis=-1), vocab))
    # Zero where the target belongs to another part of the vocabulary.
    one_hot = jax.nn.one_hot(target, size, dtype=accumulate)
    here = (target >= 0) & (target < size)
    at_target = jnp.take_along_axis(logits, jnp.clip(target, 0, size - 1)[:, None], axis=-1)[:, 0]
    at_target = _psum(jnp.where(here, at_target, 0), vocab)
    return _ChunkScores(logsumexp - at_target, at_target >= largest, jnp.exp(logits - logsumexp[:, None]) - one_hot)


def _dot(spec, x, head, vocab_axis, accumulate):
    if vocab_axis == 1:
        spec = spec.replace("vd", "dv")
    return jnp.einsum(spec, x, head, preferred_element_type=accumulate)
