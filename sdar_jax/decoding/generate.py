"""`generate`: prompts in, trimmed completions out."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdar_jax.arithmetic import round_up
from sdar_jax.decoding.block_forward import BufferConfig
from sdar_jax.decoding.buffer import Decoder
from sdar_jax.decoding.completions import completions
from sdar_jax.decoding.config import Completion, DecodingConfig
from sdar_jax.decoding.decode_state import (
    DecodeState,
    SequenceShape,
    SequenceState,
    first_mask,
    generated,
    make_sequence,
    sequence_at,
)
from sdar_jax.decoding.page_pool import default_page_size
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
from sdar_jax.decoding.proposal import is_plain
from sdar_jax.decoding.sampling_params import SamplingParams
from sdar_jax.decoding.text import TextReader, unknown_ids
from sdar_jax.decoding.transfers import end_sequence
from sdar_jax.devices.sharding import mesh_of
from sdar_jax.errors import DecodingError
from sdar_jax.model import Model, empty_pages, unstack_layers
from sdar_jax.model.config import ModelConfig

_DEFAULT = DecodingConfig()
_ENDLESS = np.iinfo(np.int32).max
# Forwards between two looks for stop strings.
_STEPS = 8
# A forward over more of a prompt is no faster per token, and holds more in memory.
_PREFILL_TOKENS = 512
# Shorter chunks would save little and be more shapes to compile.
_LEAST_CHUNK = 32
# Stop tokens are padded to a multiple of these, so that most requests have one shape.
_STOPS = 4


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
    """Decodes checked prompts to their ends; their state, on the host. `options` are those of `start_state`."""
    state, buffer = start_state(model, ids, configs, tokenizer=tokenizer, **options)
    decoder = Decoder(unstack_layers(model), buffer)
    batch = (
        _decoded_to_strings(decoder, state, strings, tokenizer)
        if strings
        else decoder(state, _ENDLESS)[0].batch
    )
    return jax.device_get(batch)


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


def start_state(
    model: Model,
    ids: Sequence[np.ndarray],
    configs: Sequence[DecodingConfig],
    *,
    max_new_tokens: int | Sequence[int],
    stop_ids: Sequence[int],
    seed: int,
    window_slots: int,
    tokenizer: Any = None,
    page_size: int | None = None,
    prefill_tokens: int = _PREFILL_TOKENS,
) -> tuple[DecodeState, BufferConfig]:
    """Makes a batch whose sequences have all their pages from the first. Lengths are bucketed: few shapes are compiled.

    Masks in a prompt are to be filled, and so are the positions behind it: `max_new_tokens` for all, or of each.
    """
    size = configs[0].resolve_block_size(model.config)
    paradigm = configs[0].paradigm(model.config)
    new = (
        [max_new_tokens] * len(ids)
        if isinstance(max_new_tokens, int | np.integer)
        else max_new_tokens
    )
    given = [
        prompt != (-1 if model.config.mask_token_id is None else model.config.mask_token_id)
        for prompt in ids
    ]
    origins = [paradigm.origin_of(first_mask(there)) for there in given]
    ends = [
        at + round_up(len(p) + count - at, size)
        for at, p, count in zip(origins, ids, new, strict=True)
    ]
    page_size = page_size or default_page_size(size)
    length = _bucket(max(1, *ends), page_size if paradigm.cached else size)
    pages = -(-length // page_size)
    suppressed = round_up(max(len(config.suppress_token_ids) for config in configs), 8)
    alternatives = max(config.top_logprobs for config in configs)
    slots = paradigm.slots(window_slots)
    stops = round_up(max(len(stop_ids), 1), _STOPS)
    shape = SequenceShape(length, stops, pages, size, slots, suppressed, alternatives)
    own_rules = [config.strategy_for(model.config).rule for config in configs]
    rules = tuple(dict.fromkeys(own_rules))
    sequences = [
        make_sequence(
            prompt,
            config,
            shape,
            rule=(rules.index(own_rules[i]), own_rules[i]),
            origin=origins[i],
            max_new_tokens=int(new[i]),
            stop_ids=stop_ids,
            mask_token_id=model.config.mask_token_id or 0,
            seed=seed + i,
            float_type=jnp.promote_types(model.embedding.dtype, jnp.float32),
            given=given[i],
        )
        for i, (prompt, config) in enumerate(zip(ids, configs, strict=True))
    ]
    table = np.arange(len(ids) * pages, dtype=np.int32).reshape(-1, pages)
    batch = jax.tree.map(lambda *each: np.stack(each), *sequences)
    batch = batch.with_inputs(
        page_table=table, pages_end=np.full(len(ids), pages * page_size, np.int32)
    )
    pool = []
    if paradigm.cached:
        pool = empty_pages(
            model.config, table.size, page_size, model.embedding.dtype, mesh_of(model)
        )
    prompt = int(batch.progress.start.max()) - (not paradigm.masks) if paradigm.cached else 0
    chunk = _bucket(max(prompt, _LEAST_CHUNK), size)
    if not paradigm.bidirectional_prompt:
        # A prompt that sees all of itself is read in one piece.
        chunk = min(chunk, -(-prefill_tokens // size) * size)
    config = BufferConfig(
        block_size=size,
        paradigm=paradigm,
        rules=rules,
        prefill_sequences=len(ids) if paradigm.cached else 0,
        prefill_tokens=chunk,
        decodes_beside_prefill=False,
        samples=not _plain(batch.inputs.sampling),
        stops_early=False,
    )
    banned = jax.device_put(unknown_ids(tokenizer, model.config.vocab_size))
    return DecodeState(jax.device_put(batch), pool, banned), config


def _plain(sampling: SamplingParams) -> bool:
    """Whether every sequence of the batch, on the host, asks for the likeliest tokens alone."""
    suppresses = (sampling.suppress_token_ids >= 0).any() | (sampling.min_new_tokens > 0).any()
    return bool(is_plain(sampling).all()) and not suppresses


def _bucket(length: int, multiple: int) -> int:
    """The next of 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, ...: four sizes per octave, then whole blocks."""
    step = max(8, 2 ** max(length - 1, 1).bit_length() // 8)
    return -(-(-(-length // step) * step) // multiple) * multiple
