"""From checked prompts to a batch that decodes to its end: its state, and what its program depends on."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdar_jax.arithmetic import ceil_div, round_up
from sdar_jax.decoding.block_forward import BufferConfig, forward_widths
from sdar_jax.decoding.capacities import Capacity, bucket, position_bytes, roomy_capacity
from sdar_jax.decoding.commit_rules import CommitRule
from sdar_jax.decoding.config import DecodingConfig, sampling_params
from sdar_jax.decoding.decode_state import (
    DecodeState,
    SequenceShape,
    SequenceState,
    first_mask,
    make_sequence,
)
from sdar_jax.decoding.page_pool import default_page_size
from sdar_jax.decoding.proposal import is_plain
from sdar_jax.decoding.text import unknown_ids
from sdar_jax.devices.sharding import mesh_of
from sdar_jax.model import Model, pages_for

# A forward over more of prompts is no faster per token, and holds more in memory.
_PREFILL_TOKENS = 512
# Of a prompt that is read in one piece: shorter pieces would save little and be more shapes to compile.
_LEAST_PIECE = 32
# Stop tokens, and tokens to suppress, are padded to multiples of these, so that most requests have one shape.
_STOPS, _SUPPRESSED = 4, 8


class Batch(NamedTuple):
    """A batch before its first forward.

    Attributes:
        sequences: on the host, [B, ...].
        config: of the program that decodes them.
        pages: how many, and positions of each; None where nothing is cached.
        banned: bool [V], on the device, tokens that are never proposed; None is none.
    """

    sequences: SequenceState
    config: BufferConfig
    pages: tuple[int, int] | None
    banned: jax.Array | None

    def on_device(self, model: Model) -> DecodeState:
        """The state that decoding changes, with empty pages, where the model is."""
        cache = []
        if self.pages is not None:
            cache = pages_for(model, *self.pages)
        return DecodeState(jax.device_put(self.sequences), cache, self.banned)


def make_batch(
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
    roomy: bool = False,
) -> Batch:
    """Makes a batch whose sequences have all their pages from the first.

    Masks in a prompt are to be filled, and so are the positions behind it: `max_new_tokens` for all, or of each. A
    `roomy` batch may hold more sequences, which are done, and more positions, so that few programs serve all batches.
    """
    size = configs[0].resolve_block_size(model.config)
    paradigm = configs[0].paradigm(model.config)
    count = len(ids)
    new = np.broadcast_to(np.asarray(max_new_tokens, np.int64), count).tolist()
    mask = -1 if model.config.mask_token_id is None else model.config.mask_token_id
    given = [prompt != mask for prompt in ids]
    origins = [paradigm.origin_of(first_mask(there)) for there in given]
    ends = [
        at + round_up(len(p) + more - at, size)
        for at, p, more in zip(origins, ids, new, strict=True)
    ]
    rules = [config.strategy_for(model.config).rule for config in configs]
    suppressed = round_up(max(len(config.suppress_token_ids) for config in configs), _SUPPRESSED)
    buffer = BufferConfig(
        block_size=size,
        paradigm=paradigm,
        rules=tuple(dict.fromkeys(rules)),
        prefill_sequences=int(paradigm.cached),
        prefill_tokens=round_up(prefill_tokens, size),
        decodes_beside_prefill=False,
        widths="fewest" if forward_widths(model) == "fewest" else "few",
        samples=any(
            _samples(each, size, rule) for each, rule in {*zip(configs, rules, strict=True)}
        ),
        opens_early=any(each.add_threshold < 1 for each in configs),
        stops_early=False,
    )
    if paradigm.bidirectional_prompt:
        # A prompt that sees all of itself is read in one piece.
        piece = bucket(max(_LEAST_PIECE, *map(len, ids)), size)
        buffer = dataclasses.replace(buffer, prefill_sequences=count, prefill_tokens=piece)
    page_size = page_size or default_page_size(size)
    multiple = page_size if paradigm.cached else size
    needed = Capacity(count, max(1, *ends), round_up(max(len(stop_ids), 1), _STOPS), suppressed)
    capacity = needed._replace(length=bucket(needed.length, multiple))
    slots = paradigm.slots(window_slots)
    alternatives = max(config.top_logprobs for config in configs)
    if roomy and paradigm.cached:
        kind = (model.config, str(model.embedding.dtype), mesh_of(model.embedding))
        program = (*kind, buffer, slots, alternatives, page_size, tokenizer is None)
        capacity = roomy_capacity(needed, program, position_bytes(model), multiple) or capacity
    pages = ceil_div(capacity.length, page_size)
    shape = SequenceShape(
        capacity.length, capacity.stops, pages, size, slots, capacity.suppressed, alternatives
    )
    float_type = jnp.promote_types(model.embedding.dtype, jnp.float32)
    sequences = [
        make_sequence(
            prompt,
            config,
            shape,
            rule=(buffer.rules.index(rules[i]), rules[i]),
            origin=origins[i],
            max_new_tokens=new[i],
            stop_ids=stop_ids,
            mask_token_id=model.config.mask_token_id or 0,
            seed=seed + i,
            float_type=float_type,
            given=given[i],
        )
        for i, (prompt, config) in enumerate(zip(ids, configs, strict=True))
    ]
    stacked = jax.tree.map(lambda *each: _stacked(each, capacity.sequences), *sequences)
    of_all = capacity.sequences * pages
    stacked = stacked.with_inputs(
        page_table=np.arange(of_all, dtype=np.int32).reshape(-1, pages),
        pages_end=np.full(capacity.sequences, pages * page_size, np.int32),
    )
    stacked.progress.done[count:] = True
    banned = jax.device_put(unknown_ids(tokenizer, model.config.vocab_size))
    return Batch(stacked, buffer, (of_all, page_size) if paradigm.cached else None, banned)


def _samples(config: DecodingConfig, block_size: int, rule: CommitRule) -> bool:
    """Whether a sequence asks for more than the likeliest tokens and their probabilities."""
    parameters = sampling_params(config, block_size, rule=(0, rule))
    plain = is_plain(jax.tree.map(np.atleast_1d, parameters)).all()
    return not plain or bool(config.suppress_token_ids) or config.min_new_tokens > 0


def _stacked(each: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Stacks the values of sequences; the first one's stand for those that are missing."""
    if count == 1:
        return each[0][None]
    return np.stack([*each, *[each[0]] * (count - len(each))])
