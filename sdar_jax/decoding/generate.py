"""`generate`: prompts in, trimmed completions out."""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdar_jax.config import ModelConfig
from sdar_jax.decoding.config import Completion, DecodingConfig, commit_schedule
from sdar_jax.decoding.loop import DecodeState, Request, decode, prefix_length
from sdar_jax.decoding.proposal import Knobs
from sdar_jax.errors import DecodingError
from sdar_jax.model import Model, unstack_layers

Prompt = Sequence[int] | str
_DEFAULT = DecodingConfig()


def generate(
    model: Model,
    prompts: Sequence[Prompt],
    config: DecodingConfig = _DEFAULT,
    *,
    max_new_tokens: int,
    stop_token_ids: Sequence[int] | None = None,
    tokenizer: Any = None,
    seed: int = 0,
) -> list[Completion]:
    """Decodes a batch of prompts of any lengths; greedy results do not depend on the batch.

    Args:
        prompts: token id lists, or texts (with `tokenizer`).
        max_new_tokens: at most this many a prompt.
        stop_token_ids: the output ends before the first of these; None is the model's own list, () none.
        tokenizer: a Hugging Face tokenizer; completions then have `text`.
        seed: prompt i samples with seed + i, whatever else is in the batch.

    Returns:
        One `Completion` a prompt, in order.

    Raises:
        DecodingError: a prompt or number that cannot be served, or a model that lacks what the strategy needs.
    """
    size = config.resolve_block_size(model.config)
    config = dataclasses.replace(config, block_size=size)
    if isinstance(prompts, str):
        raise DecodingError(f"prompts is one text, {prompts[:20]!r}; give a list of prompts")
    ids = [_to_ids(prompt, i, tokenizer) for i, prompt in enumerate(prompts)]
    _check(ids, config, model.config, max_new_tokens)
    _check_seed(seed, len(ids))
    stops = model.config.stop_token_ids if stop_token_ids is None else _checked_stops(stop_token_ids, model.config)
    if not ids:
        return []
    request, prefill_length = _make_request(ids, config, size, model.config, max_new_tokens, stops)
    state = _decode(
        unstack_layers(model), request, _knobs(config, size, seed, len(ids)), _names(config), size, prefill_length
    )
    prefilled = np.asarray(prefix_length(request, config)) > 0
    return _completions(jax.device_get(state), np.asarray(request.prompt_length), prefilled, tokenizer)


@partial(jax.jit, static_argnames=("config", "block_size", "prefill_length"))
def _decode(model, request, knobs, config, block_size, prefill_length) -> DecodeState:
    state = decode(model, request, knobs, config, block_size=block_size, prefill_length=prefill_length)
    return state._replace(cache=[])


def _names(config: DecodingConfig) -> DecodingConfig:
    """The config with its numbers, which travel as `Knobs`, set to fixed ones: what a compilation depends on."""
    return dataclasses.replace(
        config,
        confidence_threshold=0.5,
        denoising_steps=None,
        schedule="released",
        temperature=0.0 if config.greedy else 1.0,
        top_k=min(config.top_k, 1),
        top_p=1.0 if config.top_p == 1 else 0.5,
        entropy_bound=0.0,
        factor=0.0,
    )


def _knobs(config: DecodingConfig, block_size: int, seed: int, rows: int) -> Knobs:
    each = lambda value, dtype=jnp.float32: jnp.full(rows, value, dtype)
    schedule = commit_schedule(block_size, config.denoising_steps, config.schedule)
    return Knobs(
        temperature=each(config.temperature),
        top_k=each(min(config.top_k, np.iinfo(np.int32).max), jnp.int32),
        top_p=each(config.top_p),
        threshold=each(config.confidence_threshold),
        entropy_bound=each(config.entropy_bound),
        factor=each(config.factor),
        schedule=jnp.broadcast_to(jnp.asarray(schedule), (rows, block_size)),
        seed=seed + jnp.arange(rows, dtype=jnp.int32),
    )


def _to_ids(prompt: Prompt, index: int, tokenizer: Any) -> np.ndarray:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise DecodingError(f"prompt {index} is a text; give tokenizer=, or token ids")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            place = f"prompt {index} has a lone surrogate at character {error.start}"
            raise DecodingError(f"{place}; write it as valid Unicode") from None
        prompt = tokenizer(prompt)["input_ids"]
    try:
        ids = np.asarray(prompt)
    except ValueError:
        ids = np.zeros((0, 0))
    if ids.shape == (0,):
        return np.zeros(0, np.int32)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise DecodingError(f"prompt {index} is not a list of token ids but {str(prompt)[:40]}; give integers")
    return ids


def _check(ids: list[np.ndarray], config: DecodingConfig, model: ModelConfig, max_new_tokens: int) -> None:
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, (int, np.integer)) or max_new_tokens < 0:
        raise DecodingError(f"max_new_tokens is {max_new_tokens!r}; give an integer >= 0")
    for i, prompt in enumerate(ids):
        if prompt.size and not 0 <= prompt.min() <= prompt.max() < model.vocab_size:
            wrong = prompt[(prompt < 0) | (prompt >= model.vocab_size)][0]
            raise DecodingError(f"prompt {i} holds token id {wrong}; the vocabulary is 0 to {model.vocab_size - 1}")
        if not prompt.size and config.strategy == "autoregressive":
            raise DecodingError(f"prompt {i} is empty; autoregressive decoding needs at least one token")
        if len(prompt) + max_new_tokens > model.max_position_embeddings:
            total = f"prompt {i} has {len(prompt)} tokens and max_new_tokens is {max_new_tokens}"
            raise DecodingError(f"{total}; together at most max_position_embeddings {model.max_position_embeddings}")


def _check_seed(seed: int, rows: int) -> None:
    if not isinstance(seed, int | np.integer) or not -(2**31) <= seed <= 2**31 - 1 - rows:
        raise DecodingError(f"seed is {seed!r}; give an integer of 31 bits, as prompt i uses seed + i")


def _checked_stops(stop_token_ids: Sequence[int], model: ModelConfig) -> tuple[int, ...]:
    known = range(model.vocab_size)
    listed = isinstance(stop_token_ids, Iterable) and not isinstance(stop_token_ids, str)
    stops: tuple[Any, ...] = tuple(stop_token_ids) if listed else (None,)
    if not all(isinstance(stop, int | np.integer) and stop in known for stop in stops):
        wrong = f"stop_token_ids is {stop_token_ids!r}"
        raise DecodingError(f"{wrong}; give a list of token ids, each 0 to {model.vocab_size - 1}")
    return tuple(map(int, stops))


def _make_request(ids, config: DecodingConfig, size: int, model: ModelConfig, max_new_tokens: int, stops):
    """The padded canvas and its bounds; lengths are bucketed so that few shapes are ever compiled."""
    lengths = np.array([len(p) for p in ids], np.int32)
    limit = lengths + max_new_tokens
    origin = lengths if config.strategy == "semi_autoregressive" and model.block_origin == "response" else 0 * lengths
    origin = lengths if config.strategy == "autoregressive" else origin
    first_block = origin + (lengths - origin) // size * size
    canvas = origin + -(-(limit - origin) // size) * size
    length = max(_bucket(int(canvas.max()), size), size)
    tokens = np.full((len(ids), length), model.mask_token_id or 0, np.int32)
    for row, prompt in zip(tokens, ids, strict=True):
        row[: len(prompt)] = prompt
    arrays = (tokens, lengths, limit, canvas, first_block, np.array(stops, np.int32).reshape(-1))
    request = Request(*(jnp.asarray(x, jnp.int32) for x in arrays))
    prefill = int(prefix_length(request, config).max())
    return request, min(_bucket(prefill, size), length) if prefill else 0


def _bucket(length: int, multiple: int) -> int:
    """The next of 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, ...: four sizes an octave, then whole blocks."""
    step = max(8, 2 ** max(length - 1, 1).bit_length() // 8)
    return -(-(-(-length // step) * step) // multiple) * multiple


def _completions(state: DecodeState, prompt_length: np.ndarray, prefilled: np.ndarray, tokenizer) -> list[Completion]:
    completions = []
    for row, start in enumerate(prompt_length.tolist()):
        if state.failed[row]:
            uncommitted = ~state.committed[row, start:]
            end = start + int(uncommitted.argmax()) if uncommitted.any() else state.tokens.shape[1]
        else:
            end = int(state.end[row])
        tokens = state.tokens[row, start:end].tolist()
        completions.append(
            Completion(
                tokens=tokens,
                text=tokenizer.decode(tokens) if tokenizer is not None else None,
                finish_reason="error" if state.failed[row] else "stop" if state.stopped[row] else "length",
                logprobs=state.logprob[row, start:end].tolist(),
                steps=state.step[row, start:end].tolist(),
                denoising_forwards=int(state.denoising_forwards[row]),
                commit_forwards=int(state.commit_forwards[row]),
                prefill_forwards=int(prefilled[row]),
            )
        )
    return completions
