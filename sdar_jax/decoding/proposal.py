"""One proposed token for each position of a window, and how sure the model is of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sdar_jax.decoding.config import DecodingConfig


class Knobs(NamedTuple):
    """The numbers of a `DecodingConfig`, one a row, so that changing them compiles nothing anew.

    float32 [B] but top_k and seed (int32 [B]) and schedule (int32 [B, S]).
    """

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    threshold: Float[Array, " B"]
    entropy_bound: Float[Array, " B"]
    factor: Float[Array, " B"]
    schedule: Int[Array, "B S"]
    seed: Int[Array, " B"]


class Proposal(NamedTuple):
    """token: int32 [B, S], never the mask. score: what ranks it. entropy: nats. logprob: raw, nats. All [B, S].

    finite: bool [B], whether the row's logits were numbers.
    """

    token: Int[Array, "B S"]
    score: Float[Array, "B S"]
    entropy: Float[Array, "B S"]
    logprob: Float[Array, "B S"]
    finite: Array


def propose(
    logits: Float[Array, "B S V"],
    knobs: Knobs,
    positions: Int[Array, "B S"],
    step: Int[Array, " B"],
    config: DecodingConfig,
    mask_token_id: int | None,
) -> Proposal:
    """Greedy or sampled tokens with their confidence (semantics: temperature, then top-k, then top-p).

    Randomness is keyed by (seed, position, step) of the row alone. Of `config` only names and on/off are read; numbers
    come from `knobs`.
    """
    finite = jnp.isfinite(logits).all(axis=(1, 2))
    if mask_token_id is not None:
        logits = logits.at[..., mask_token_id].set(-jnp.inf)
    raw = jax.nn.log_softmax(logits)
    if config.greedy:
        token, distribution = jnp.argmax(logits, axis=-1), raw
        confident = raw
    else:
        # From the largest down, so that a low temperature cannot overflow the quotient.
        distribution = jax.nn.log_softmax(raw / knobs.temperature[:, None, None])
        filtered = _filter(distribution, knobs, config)
        token = _sample(filtered, knobs.seed, positions, step)
        confident = jax.nn.log_softmax(filtered) if config.confidence == "post_filter" else distribution
    entropy = -jnp.sum(jnp.exp(distribution) * jnp.where(jnp.isfinite(distribution), distribution, 0), axis=-1)
    score = _score(confident, token, entropy, config)
    return Proposal(token.astype(jnp.int32), score, entropy, _at(raw, token), finite)


def _at(log_probs: Array, token: Array) -> Array:
    return jnp.take_along_axis(log_probs, token[..., None], axis=-1)[..., 0]


def _score(log_probs: Array, token: Array, entropy: Array, config: DecodingConfig) -> Array:
    if config.score == "neg_entropy":
        return -entropy
    if config.score == "margin":
        best, second = jnp.moveaxis(jax.lax.top_k(jnp.exp(log_probs), 2)[0], -1, 0)
        return best - second
    return jnp.exp(_at(log_probs, token))


def _filter(log_probs: Array, knobs: Knobs, config: DecodingConfig) -> Array:
    """-inf for what top-k, then top-p, leave out; the token that crosses p stays."""
    if config.top_k == 0 and config.top_p == 1:
        return log_probs
    descending = -jnp.sort(-log_probs, axis=-1)
    rank = jnp.arange(log_probs.shape[-1])
    top_k = jnp.where(knobs.top_k == 0, rank.size, knobs.top_k)[:, None, None]
    kept = jnp.where(rank < top_k, jnp.exp(descending), 0)
    kept = kept / kept.sum(axis=-1, keepdims=True)
    before = jnp.cumsum(kept, axis=-1) - kept
    stays = (rank < top_k) & ((before < knobs.top_p[:, None, None]) | (rank == 0))
    least = jnp.min(jnp.where(stays, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(log_probs >= least, log_probs, -jnp.inf)


def _sample(log_probs: Array, seed: Array, positions: Array, step: Array) -> Array:
    def one(seed, position, step, log_probs):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), position), step)
        return jax.random.categorical(key, log_probs)

    return jax.vmap(jax.vmap(one, (None, 0, None, 0)))(seed, positions, step, log_probs)
