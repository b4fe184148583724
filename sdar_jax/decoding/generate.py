"""`generate`: prompts in, trimmed completions out."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sdar_jax.decoding.batches import make_batch
from sdar_jax.decoding.buffer import Decoder
from sdar_jax.decoding.completions import completions
from sdar_jax.decoding.config import Completion, DecodingConfig
from sdar_jax.decoding.decode_state import (
    DecodeState,
    SequenceState,
    generated,
    sequence_at,
)
from sdar_jax.decoding.prompt_logprobs import prompt_logprobs
from sdar_jax.decoding.prompts import (
    Prompt,
    check_options,
    check_prompts,
    check_seed,
    check_slots,
    checked_stop_strings,
    checked_stops,
    to_ids,
)
from sdar_jax.decoding.text import TextReader
from sdar_jax.decoding.transfers import end_sequence
from sdar_jax.errors import DecodingError
from sdar_jax.model import Model, unstack_layers
from sdar_jax.model.config import ModelConfig

_DEFAULT = DecodingConfig()
# Forwards between two looks for stop strings.
_STEPS = 8


def generate(
    model: Model,
    prompts: Sequence[Prompt],
    config: DecodingConfig | Sequence[DecodingConfig] = _DEFAULT,
    *,
    max_new_tokens: int,
    stop_token_ids: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    tokenizer: Any = None,
    seed: int = 0,
    window_slots: int = 2,
) -> list[Completion]:
    """Decodes a batch of prompts of any lengths; greedy results do not depend on the batch.

    Args:
        prompts: token id lists, or texts (with `tokenizer`).
        config: one for all, or one for each prompt, of one block size.
        max_new_tokens: at most this many per prompt.
        stop_token_ids: the output ends before the first of these; None is the model's own list, () none.
        stop_strings: the output's text ends before the first of these; its tokens with the one that completes it.
        tokenizer: a Hugging Face tokenizer; completions then have `text`, and ids that it does not have are never
            proposed.
        seed: prompt i samples with seed + i, whatever else is in the batch.
        window_slots: K, blocks of a sequence that one forward may read. 1 spends a forward per block on its final keys;
            with 2 the next block's first forward writes them. Tokens are the same for any K unless a config's
            `add_threshold` is below 1, which opens up to K blocks at once.

    Returns:
        One `Completion` per prompt, in order.

    Raises:
        DecodingError: a prompt or number that cannot be served, or a model that lacks what the strategy needs.
    """
    if isinstance(prompts, str):
        raise DecodingError(f"prompts is one text, {prompts[:20]!r}; give a list of prompts")
    configs = one_each(config, len(prompts), model.config)
    ids = [to_ids(prompt, i, tokenizer) for i, prompt in enumerate(prompts)]
    check_prompts(ids, configs, model.config, max_new_tokens)
    check_seed(seed, len(ids))
    check_slots(window_slots)
    stops = (
        model.config.stop_token_ids
        if stop_token_ids is None
        else checked_stops(stop_token_ids, model.config)
    )
    strings = checked_stop_strings(stop_strings, tokenizer)
    for each in {*configs}:
        check_options(each, model.config, stops, tokenizer, max_new_tokens)
    if not ids:
        return []
    options = {
        "stop_ids": stops,
        "seed": seed,
        "window_slots": window_slots,
        "tokenizer": tokenizer,
    }
    batch = decode_batch(
        model, ids, configs, max_new_tokens=[max_new_tokens] * len(ids), strings=strings, **options
    )
    done = completions(batch, tokenizer, strings)
    asked = [
        prompt_logprobs(model, p) if c.prompt_logprobs else None
        for p, c in zip(ids, configs, strict=True)
    ]
    return [each._replace(prompt_logprobs=own) for each, own in zip(done, asked, strict=True)]


def decode_batch(
    model: Model,
    ids: Sequence[np.ndarray],
    configs: Sequence[DecodingConfig],
    *,
    strings: Sequence[str] = (),
    tokenizer: Any = None,
    **options,
) -> SequenceState:
    """Decodes checked prompts to their ends; their state, on the host. `options` are those of `make_batch`."""
    made = make_batch(model, ids, configs, tokenizer=tokenizer, roomy=True, **options)
    decoder = Decoder(unstack_layers(model), made.config)
    if strings:
        state = _decoded_to_strings(decoder, made.on_device(model), strings, tokenizer)
        found = jax.device_get(state)
    else:
        found = decoder.to_end(made.sequences, made.pages, made.banned)
    return jax.tree.map(lambda x: x[: len(ids)], found)


def _decoded_to_strings(
    decoder: Decoder, state: DecodeState, strings: Sequence[str], tokenizer: Any
) -> SequenceState:
    """Decodes a few forwards at a time, and ends the sequences that have come to a stop string."""
    readers = [
        TextReader(tokenizer.decode, strings) for _ in range(len(state.batch.progress.start))
    ]
    while True:
        state, _ = decoder(state, _STEPS)
        batch = jax.device_get(state.batch)
        done = batch.progress.done
        for i in np.flatnonzero(~done).tolist():
            readers[i].read(generated(sequence_at(batch, i)))
            if readers[i].found:
                state = state._replace(batch=end_sequence(state.batch, i))
        if all(ended or reader.found for ended, reader in zip(done, readers, strict=True)):
            return state.batch


def one_each(
    config: DecodingConfig | Sequence[DecodingConfig], count: int, model: ModelConfig
) -> list[DecodingConfig]:
    """A config a prompt, all with one block size and one way of reading; checked though there be no prompt."""
    configs = [config] * count if isinstance(config, DecodingConfig) else list(config)
    if len(configs) != count:
        raise DecodingError(
            f"{len(configs)} configs are given for {count} prompts; give one, or one for each prompt"
        )
    if isinstance(config, DecodingConfig):
        config.resolve_block_size(model)
    kinds = {
        (each.resolve_block_size(model), each.paradigm(model)): each.strategy for each in configs
    }
    if len(kinds) > 1:
        named = ", ".join(
            f"{strategy} in blocks of {size}" for (size, _), strategy in kinds.items()
        )
        raise DecodingError(
            f"configs of one batch differ in block size or in what a forward reads ({named}); decode them apart"
        )
    return configs
