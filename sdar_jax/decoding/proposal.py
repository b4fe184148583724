"""One proposed token for each of a list of masked positions, and how sure the model is of it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sdar_jax.decoding.sampling_params import SCORES, SamplingParams


class Alternatives(NamedTuple):
    """The likeliest tokens of each position, largest first, with their raw log-probabilities, nats."""

    token: Int[Array, "*L A"]
    logprob: Float[Array, "*L A"]


class Proposal(NamedTuple):
    """Of each position: token, never the mask or a banned one; score, what ranks it; entropy, nats, where a row asks
    for it (zero if none does); logprob, raw, nats; finite, whether the logits were numbers; alternatives, zeros if no
    row asks for any."""

    token: Int[Array, "*L"]
    score: Float[Array, "*L"]
    entropy: Float[Array, "*L"]
    logprob: Float[Array, "*L"]
    finite: Bool[Array, "*L"]
    alternatives: Alternatives | None = None


def propose(
    logits: Float[Array, "L V"],
    parameters: SamplingParams,
    positions: Int[Array, " L"],
    step: Int[Array, " L"],
    seen: Callable[[], Bool[Array, "L V"]] | None = None,
    *,
    mask_token_id: int | None,
    banned: Bool[Array, " V"] | None = None,
    suppressed: Int[Array, "L W"] | None = None,
    alternatives: int = 0,
    plain: bool = False,
) -> Proposal:
    """Greedy or sampled tokens with their confidence (semantics: penalty, temperature, then top-k, then top-p).

    Randomness is keyed by (seed, position, step) alone.

    Args:
        parameters: of each position's row.
        seen: gives the tokens that the repetition penalty is for, if one is asked for; None is none.
        mask_token_id: has no part in any distribution.
        banned: tokens that are never proposed; what others' probabilities are is not changed by that.
        suppressed: of each position, tokens that its proposal and its confidence are without; padded with -1.
        alternatives: A, the most that a row asks for.
        plain: all rows are (`is_plain`), and nothing is suppressed: two passes over the logits, and few operations.
    """
    finite = jnp.isfinite(logits).all(axis=-1)
    if mask_token_id is not None:
        logits = logits.at[:, mask_token_id].set(-jnp.inf)
    allow = lambda x: x if banned is None else jnp.where(banned, -jnp.inf, x)
    suppressed = jnp.zeros((logits.shape[0], 0), jnp.int32) if suppressed is None else suppressed
    if plain:
        token, score, entropy, logprob = _plain(logits, allow)
    else:
        token, score, entropy, logprob = _general(
            logits, parameters, positions, step, seen, suppressed, allow
        )
    return Proposal(
        token, score, entropy, logprob, finite, _alternatives(logits, parameters, alternatives)
    )


def _alternatives(logits: Array, parameters: SamplingParams, count: int) -> Alternatives | None:
    if not count:
        return None

    def likeliest(logits: Array) -> tuple[Array, Array]:
        largest, token = jax.lax.top_k(logits, count)
        return token.astype(jnp.int32), largest - jax.nn.logsumexp(logits, axis=-1, keepdims=True)

    shape = (logits.shape[0], count)
    none = lambda logits: (jnp.zeros(shape, jnp.int32), jnp.zeros(shape, logits.dtype))
    return Alternatives(*jax.lax.cond((parameters.top_logprobs > 0).any(), likeliest, none, logits))


def is_plain(parameters: SamplingParams) -> Bool[Array | np.ndarray, "*B"]:
    """Whether a row is greedy, without penalty, and ranks by probability: no more than two passes over the logits."""
    greedy = (parameters.temperature == 0) & (parameters.repetition_penalty == 1)
    return greedy & (parameters.score == SCORES["probability"]) & (parameters.reads_entropy == 0)


def _plain(logits: Array, allow: Callable[[Array], Array]) -> tuple[Array, Array, Array, Array]:
    allowed = allow(logits)
    logprob = jnp.max(allowed, axis=-1) - jax.nn.logsumexp(logits, axis=-1)
    return _first_largest(allowed), jnp.exp(logprob), jnp.zeros_like(logprob), logprob


def _first_largest(logits: Array) -> Array:
    """As argmax, but of a row with NaN the last token: two plain reductions, as a CPU does not vectorise argmax."""
    last = logits.shape[-1] - 1
    index = jnp.where(
        logits == jnp.max(logits, axis=-1, keepdims=True),
        jnp.arange(last + 1, dtype=jnp.int32),
        last,
    )
    return jnp.min(index, axis=-1)


def _general(
    logits: Array,
    parameters: SamplingParams,
    positions: Array,
    step: Array,
    seen: Callable[[], Array] | None,
    suppressed: Array,
    allow: Callable[[Array], Array],
) -> tuple[Array, Array, Array, Array]:
    wanted = jax.lax.cond(
        (suppressed >= 0).any(), lambda x: _without(x, suppressed), lambda x: x, logits
    )
    if seen is not None:
        some = (parameters.repetition_penalty != 1).any()
        wanted = jax.lax.cond(
            some, lambda x: _penalised(x, parameters, seen()), lambda x: x, wanted
        )
    greedy = parameters.temperature == 0
    # From the largest down, so that a low temperature cannot overflow the quotient.
    distribution = jax.nn.log_softmax(
        jax.nn.log_softmax(wanted) / jnp.where(greedy, 1, parameters.temperature)[:, None]
    )
    filters = ~greedy & ((parameters.top_k > 0) | (parameters.top_p < 1))
    allowed = allow(distribution)
    filtered = jax.lax.cond(
        filters.any(), lambda x: _filter(x, parameters, filters), lambda x: x, allowed
    )
    best = _first_largest(allow(wanted))
    draw = lambda: jnp.where(greedy, best, _sample(filtered, parameters.seed, positions, step))
    token = jax.lax.cond(greedy.all(), lambda: best, draw)
    after = (filters & (parameters.post_filter == 1))[:, None]
    confident = jnp.where(after, jax.nn.log_softmax(filtered), distribution)
    entropy = -jnp.sum(
        jnp.exp(distribution) * jnp.where(jnp.isfinite(distribution), distribution, 0), axis=-1
    )
    return (
        token,
        _score(confident, token, entropy, parameters),
        entropy,
        _at(jax.nn.log_softmax(logits), token),
    )


def _without(logits: Array, tokens: Array) -> Array:
    at = jnp.where(tokens < 0, logits.shape[-1], tokens)
    return logits.at[jnp.arange(logits.shape[0])[:, None], at].set(-jnp.inf, mode="drop")


def _penalised(logits: Array, parameters: SamplingParams, seen: Array) -> Array:
    penalty = parameters.repetition_penalty[:, None]
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def _at(log_probs: Array, token: Array) -> Array:
    return jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]


def _score(log_probs: Array, token: Array, entropy: Array, parameters: SamplingParams) -> Array:
    """By the row's kind of score."""

    def margin(log_probs):
        best, second = jnp.moveaxis(jax.lax.top_k(jnp.exp(log_probs), 2)[0], -1, 0)
        return best - second

    by_margin = parameters.score == SCORES["margin"]
    margins = jax.lax.cond(
        by_margin.any(), margin, lambda log_probs: jnp.zeros_like(log_probs[:, 0]), log_probs
    )
    score = jnp.where(by_margin, margins, jnp.exp(_at(log_probs, token)))
    return jnp.where(parameters.score == SCORES["neg_entropy"], -entropy, score)


def _filter(log_probs: Array, parameters: SamplingParams, rows: Bool[Array, " L"]) -> Array:
    """-inf for what top-k, then top-p, leave out in these rows; the token that crosses p stays, and so do ties."""
    bits = _ordered_bits(log_probs)
    top_k = jnp.where(parameters.top_k == 0, log_probs.shape[-1], parameters.top_k)
    in_top_k = bits >= _least_bits(bits, lambda above: above.sum(axis=-1) < top_k)[:, None]
    probs = jnp.where(in_top_k, jnp.exp(log_probs), 0)
    mass = parameters.top_p * probs.sum(axis=-1)
    # With p = 1 rounding must leave out nothing.
    crosses = lambda above: (
        (jnp.where(above, probs, 0).sum(axis=-1) < mass) | (parameters.top_p == 1)
    )
    stays = in_top_k & (bits >= _least_bits(bits, crosses)[:, None])
    return jnp.where(rows[:, None] & ~stays, -jnp.inf, log_probs)


def _ordered_bits(x: Array) -> Array:
    """Unsigned integers in the order of the floats, zeros of both signs apart."""
    unsigned = jnp.uint32 if x.dtype == jnp.float32 else jnp.uint64
    bits = jax.lax.bitcast_convert_type(x, unsigned)
    sign = jnp.array(1, unsigned) << (jnp.iinfo(unsigned).bits - 1)
    return jnp.where(bits & sign, ~bits, bits | sign)


def _least_bits(bits: Array, holds: Callable[[Array], Array]) -> Array:
    """Of each row the least t for which `holds(bits > t)`, which is true from some t on: bisection, bit by bit.

    A sort of a large vocabulary takes longer, and XLA minutes to compile for a TPU.
    """
    count = jnp.iinfo(bits.dtype).bits

    def step(i: Array, least: Array) -> Array:
        # The candidate has this bit clear and all lower ones set: where it holds, the bit of the least is clear.
        bit = jnp.array(1, bits.dtype) << (count - 1 - i).astype(bits.dtype)
        return jnp.where(holds(bits > (least | (bit - 1))[:, None]), least, least | bit)

    return jax.lax.fori_loop(0, count, step, jnp.zeros(bits.shape[:1], bits.dtype))


def _sample(log_probs: Array, seed: Array, positions: Array, step: Array) -> Array:
    def one(seed, position, step, log_probs):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), position), step)
        return jax.random.categorical(key, log_probs).astype(jnp.int32)

    return jax.vmap(one)(seed, positions, step, log_probs)
