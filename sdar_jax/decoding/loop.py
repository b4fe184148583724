"""The decoder: one `lax.while_loop` with one typed carry, no host round trip inside.

Each turn every row runs one forward over its own window: the S positions of its open block. A row whose block still has
masks takes proposals from it; a row whose block is full uses the same forward to write the block's final keys and
values, and opens the next. So rows are never in step, and none waits for another.

    tokens     [prompt .......... | committed ... | open block: M x M M | M M M M ]
    cache      [written once ................... ) start                 rewritten by each forward of the block
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sdar_jax import visibility
from sdar_jax.decoding.config import DecodingConfig
from sdar_jax.decoding.policies import select
from sdar_jax.decoding.proposal import Knobs, Proposal, propose
from sdar_jax.model import LayerCache, Model, empty_cache
from sdar_jax.visibility import Ranges


class Request(NamedTuple):
    """What does not change while rows decode. int32 [B] but tokens [B, T] and stop_ids [stops].

    tokens: the prompt, then masks. prompt_length: P. limit: P + max_new_tokens. canvas: end of the last block that may
    be needed. first_block: where the first block to decode starts.
    """

    tokens: Int[Array, "B T"]
    prompt_length: Int[Array, " B"]
    limit: Int[Array, " B"]
    canvas: Int[Array, " B"]
    first_block: Int[Array, " B"]
    stop_ids: Int[Array, " stops"]


class DecodeState(NamedTuple):
    """The carry of the loop. Whether a position is masked is state: `committed`, never a comparison with the mask id.

    start: of the open block. block_step: denoising forwards it has had. step: of each position, the row's denoising
    forward that committed it, -1 for the prompt. end: where the output ends, once known.
    """

    tokens: Int[Array, "B T"]
    committed: Bool[Array, "B T"]
    step: Int[Array, "B T"]
    logprob: Float[Array, "B T"]
    start: Int[Array, " B"]
    block_step: Int[Array, " B"]
    denoising_forwards: Int[Array, " B"]
    commit_forwards: Int[Array, " B"]
    end: Int[Array, " B"]
    stopped: Bool[Array, " B"]
    failed: Bool[Array, " B"]
    done: Bool[Array, " B"]
    cache: list[LayerCache]


def decode(
    model: Model, request: Request, knobs: Knobs, config: DecodingConfig, *, block_size: int, prefill_length: int
) -> DecodeState:
    """Decodes every row to its end. Static: config (its names), block_size S and prefill_length; T is a multiple of S.

    prefill_length: at least every row's `prefix_length`; 0 leaves prefill out.
    """
    state = _start(model, request, config, prefill_length)
    turn = lambda state: _turn(model, request, knobs, config, block_size, state)
    return jax.lax.while_loop(lambda state: ~state.done.all(), turn, state)


def _start(model: Model, request: Request, config: DecodingConfig, prefill_length: int) -> DecodeState:
    rows, length = request.tokens.shape
    zero = jnp.zeros(rows, jnp.int32)
    no = jnp.zeros(rows, bool)
    logprob = jnp.zeros(request.tokens.shape, jnp.promote_types(model.embedding.dtype, jnp.float32))
    cache = _prefill(model, request, config, prefill_length) if _uses_cache(config) else []
    return DecodeState(
        tokens=request.tokens,
        committed=jnp.arange(length) < request.prompt_length[:, None],
        step=jnp.full((rows, length), -1, jnp.int32),
        logprob=logprob,
        start=request.first_block,
        block_step=zero,
        denoising_forwards=zero,
        commit_forwards=zero,
        end=request.limit,
        stopped=no,
        failed=no,
        done=request.limit <= request.prompt_length,
        cache=cache,
    )


def prefix_length(request: Request, config: DecodingConfig) -> Int[Array, " B"]:
    """Prompt tokens that prefill reads: whole blocks; all but the last token for AR; none where there is no cache."""
    if config.strategy == "autoregressive":
        return request.prompt_length - 1
    return request.first_block if _uses_cache(config) else jnp.zeros_like(request.first_block)


def _uses_cache(config: DecodingConfig) -> bool:
    return config.strategy != "semi_autoregressive"


def _prefill(model: Model, request: Request, config: DecodingConfig, length: int) -> list[LayerCache]:
    """Keys and values of the prompt's whole blocks (all but its last token for AR), in one pass."""
    rows, capacity = request.tokens.shape
    cache = empty_cache(model.config, rows, capacity, model.embedding.dtype)
    if length == 0:
        return cache
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    # What a shorter row writes past its own prefix is garbage that its first window overwrites before it is seen.
    segment_ids = (positions < prefix_length(request, config)[:, None]).astype(jnp.int32)
    size = 1 if config.strategy == "autoregressive" else config.block_size
    ranges = visibility.block_causal(segment_ids, size)
    zero = jnp.zeros(rows, jnp.int32)
    return model.hidden_cached(request.tokens[:, :length], positions, cache, zero, ranges)[1]


def _turn(model, request, knobs, config, block_size, state: DecodeState) -> DecodeState:
    positions = state.start[:, None] + jnp.arange(block_size, dtype=jnp.int32)
    masked = ~_take(state.committed, positions)
    denoises = masked.any(axis=1) & ~state.done
    logits, cache = _forward(model, request, config, state, positions)
    proposal = propose(logits, knobs, positions, state.denoising_forwards, config, model.config.mask_token_id)
    failed = denoises & ~proposal.finite
    chosen = select(proposal, masked, state.block_step, knobs, config) & (denoises & ~failed)[:, None]
    state = _commit(state, positions, chosen, proposal)
    state = state._replace(cache=cache, failed=state.failed | failed, done=state.done | failed)
    return _finish(_advance(state, positions, denoises, config, block_size), request, positions)


def _forward(model, request, config, state: DecodeState, positions: Array) -> tuple[Array, list[LayerCache]]:
    """Logits of the window [B, S, V], and the cache with the window's keys and values."""
    if config.strategy == "semi_autoregressive":
        hidden = _canvas_hidden(model, request, state.tokens)
        window = jnp.take_along_axis(hidden, positions[..., None], axis=1)
        return model.unembed(window), state.cache
    # An AR window asks for position `start` by reading the token before it.
    read = positions - 1 if config.strategy == "autoregressive" else positions
    at = read[:, 0]
    ranges = visibility.decode_window(at, jnp.full_like(at, positions.shape[1]), positions.shape[1])
    hidden, cache = model.hidden_cached(_take(state.tokens, read), read, state.cache, at, ranges)
    return model.unembed(hidden), cache


def _canvas_hidden(model: Model, request: Request, tokens: Array) -> Array:
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    ranges: Ranges = visibility.bidirectional((index < request.canvas[:, None]).astype(jnp.int32))
    return model.hidden(tokens, index, ranges)


def _take(x: Array, positions: Array) -> Array:
    return jnp.take_along_axis(x, positions, axis=1)


def _commit(state: DecodeState, positions: Array, chosen: Array, proposal: Proposal) -> DecodeState:
    """Writes the chosen proposals; committed tokens never change again."""
    rows = jnp.arange(positions.shape[0])[:, None]
    at = jnp.where(chosen, positions, state.tokens.shape[1])
    write = lambda x, values: x.at[rows, at].set(values, mode="drop")
    return state._replace(
        tokens=write(state.tokens, proposal.token),
        committed=write(state.committed, True),
        step=write(state.step, state.denoising_forwards[:, None]),
        logprob=write(state.logprob, proposal.logprob),
    )


def _advance(state: DecodeState, positions, denoises, config: DecodingConfig, block_size: int) -> DecodeState:
    """Counts the forward, and opens the next block where this one is written (or needs no writing)."""
    wrote = ~denoises & ~state.done
    rewrites = config.strategy not in ("autoregressive", "semi_autoregressive")
    full = _take(state.committed, positions).all(axis=1) & ~state.done
    opens = wrote if rewrites else full
    return state._replace(
        start=jnp.where(opens, state.start + block_size, state.start),
        block_step=jnp.where(opens, 0, state.block_step + denoises),
        denoising_forwards=state.denoising_forwards + denoises,
        commit_forwards=state.commit_forwards + wrote if rewrites else state.commit_forwards,
    )


def _finish(state: DecodeState, request: Request, positions: Array) -> DecodeState:
    """A row ends once a stop and every position before it are committed, or all up to its limit are."""
    committed = _take(state.committed, positions)
    whole = jnp.cumprod(committed, axis=1).astype(bool)
    stops = (_take(state.tokens, positions)[..., None] == request.stop_ids).any(axis=-1)
    stops &= whole & (positions >= request.prompt_length[:, None]) & (positions < request.limit[:, None])
    first_stop = jnp.min(jnp.where(stops, positions, jnp.iinfo(jnp.int32).max), axis=1)
    stopped = stops.any(axis=1) & ~state.done
    frontier = positions[:, 0] + whole.sum(axis=1)
    return state._replace(
        end=jnp.where(stopped, first_stop, state.end),
        stopped=state.stopped | stopped,
        done=state.done | stopped | (frontier >= request.limit),
    )
