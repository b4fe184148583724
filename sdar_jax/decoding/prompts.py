"""What is asked for, checked: prompts as token ids, and the numbers and stops of a request."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from sdar_jax.decoding.config import DecodingConfig
from sdar_jax.decoding.text import unknown_ids
from sdar_jax.errors import DataError, DecodingError, is_int
from sdar_jax.model.config import ModelConfig

Prompt = Sequence[int] | str


def to_ids(prompt: Prompt, index: int, tokenizer: Any) -> np.ndarray:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise DecodingError(f"prompt {index} is a text; give tokenizer=, or token ids")
        # Here, as whoever gives ids needs none of what the import brings with it.
        from sdar_jax.data.tokenizer import Encoder, check_unicode

        try:
            check_unicode(prompt)
            prompt = Encoder(tokenizer).prompt(prompt)
        except DataError as error:
            raise DecodingError(f"prompt {index} has {error}") from None
    try:
        ids = np.asarray(prompt)
    except ValueError:
        ids = np.zeros((0, 0))
    if ids.shape == (0,):
        return np.zeros(0, np.int32)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise DecodingError(
            f"prompt {index} is not a list of token ids but {str(prompt)[:40]}; give integers"
        )
    return ids


def check_prompts(
    ids: list[np.ndarray], configs: list[DecodingConfig], model: ModelConfig, max_new_tokens: int
) -> None:
    if (
        isinstance(max_new_tokens, bool)
        or not isinstance(max_new_tokens, (int, np.integer))
        or max_new_tokens < 0
    ):
        raise DecodingError(f"max_new_tokens is {max_new_tokens!r}; give an integer >= 0")
    for i, (prompt, config) in enumerate(zip(ids, configs, strict=True)):
        check_ids(prompt, i, model, max_new_tokens)
        if masks := np.flatnonzero(prompt == model.mask_token_id).tolist():
            place = f"prompt {i} holds the mask token {model.mask_token_id} at position {masks[0]}"
            raise DecodingError(f"{place}; fill masks with sdar_jax.infill")
        if not prompt.size and config.paradigm(model).shifted:
            raise DecodingError(
                f"prompt {i} is empty and each token is predicted by the one before it; give at least one token"
            )


def check_ids(prompt: np.ndarray, index: int, model: ModelConfig, max_new_tokens: int) -> None:
    if prompt.size and not 0 <= prompt.min() <= prompt.max() < model.vocab_size:
        wrong = prompt[(prompt < 0) | (prompt >= model.vocab_size)][0]
        raise DecodingError(
            f"prompt {index} holds token id {wrong}; the vocabulary is 0 to {model.vocab_size - 1}"
        )
    if len(prompt) + max_new_tokens > model.max_position_embeddings:
        total = f"prompt {index} has {len(prompt)} tokens and max_new_tokens is {max_new_tokens}"
        raise DecodingError(
            f"{total}; together at most max_position_embeddings {model.max_position_embeddings}"
        )


def check_seed(seed: int, prompts: int) -> None:
    if not isinstance(seed, int | np.integer) or not -(2**31) <= seed <= 2**31 - 1 - prompts:
        raise DecodingError(
            f"seed is {seed!r}; give an integer of 31 bits, as prompt i uses seed + i"
        )


def check_slots(window_slots: int) -> None:
    if not is_int(window_slots) or window_slots < 1:
        raise DecodingError(f"window_slots is {window_slots!r}; give a positive integer")


def checked_stops(stop_token_ids: Sequence[int], model: ModelConfig) -> tuple[int, ...]:
    known = range(model.vocab_size)
    listed = isinstance(stop_token_ids, Iterable) and not isinstance(stop_token_ids, str)
    stops: tuple[Any, ...] = tuple(stop_token_ids) if listed else (None,)
    if not all(isinstance(stop, int | np.integer) and stop in known for stop in stops):
        wrong = f"stop_token_ids is {stop_token_ids!r}"
        raise DecodingError(f"{wrong}; give a list of token ids, each 0 to {model.vocab_size - 1}")
    return tuple(map(int, stops))


def checked_stop_strings(strings: Sequence[str], tokenizer: Any) -> tuple[str, ...]:
    listed = isinstance(strings, Iterable) and not isinstance(strings, str)
    if not listed or not all(isinstance(string, str) and string for string in strings):
        raise DecodingError(
            f"stop_strings is {strings!r}; give a list of texts, none of them empty"
        )
    if strings and tokenizer is None:
        raise DecodingError(f"stop_strings {strings!r} are looked for in text; give tokenizer=")
    return tuple(strings)


def check_options(
    config: DecodingConfig,
    model: ModelConfig,
    stops: Sequence[int],
    tokenizer: Any,
    max_new_tokens: int | None,
) -> None:
    """What of a config depends on the model and the request. Raises DecodingError."""
    size, ids = model.vocab_size, config.suppress_token_ids
    if wrong := [each for each in ids if each >= size]:
        raise DecodingError(
            f"suppress_token_ids holds {wrong[0]}; the vocabulary is 0 to {size - 1}"
        )
    if config.top_logprobs > size:
        raise DecodingError(
            f"top_logprobs is {config.top_logprobs} and the vocabulary {size}; use at most that"
        )
    if max_new_tokens is not None and config.min_new_tokens > max_new_tokens:
        least = f"min_new_tokens is {config.min_new_tokens} and max_new_tokens {max_new_tokens}"
        raise DecodingError(f"{least}; use at most that")
    if not ids and not config.min_new_tokens:
        return
    unknown = unknown_ids(tokenizer, size)
    left = np.ones(size, bool) if unknown is None else ~unknown
    masks = [] if model.mask_token_id is None else [model.mask_token_id]
    left[[*ids, *masks, *(stops if config.min_new_tokens else ())]] = False
    if not left.any():
        raise DecodingError(
            "suppress_token_ids and min_new_tokens leave no token to propose; suppress fewer"
        )
