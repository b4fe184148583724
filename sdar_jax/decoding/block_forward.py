"""The forwards of a step, no wider than the state needs: packed slots, chunks of prompts, and the head on masks alone.

What a step has to do varies from one to the next, and shapes cannot: each width is a branch, compiled once, and a step
takes the narrowest that holds its work.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sdar_jax import visibility
from sdar_jax.arithmetic import ceil_div
from sdar_jax.decoding.commit_rules import CommitRule
from sdar_jax.decoding.decode_state import SequenceState, Window, take
from sdar_jax.decoding.proposal import Alternatives, Proposal, is_plain, propose
from sdar_jax.decoding.sampling_params import SamplingParams
from sdar_jax.devices.chips import platform
from sdar_jax.model import LayerPages, Model, ModelConfig, Windows
from sdar_jax.paradigm import Paradigm

# Queries of a sequence that the paged kernels take at once.
_WINDOW = 128
# Positions whose logits are held at once, where there are more: 0.6 GB of float32 over a vocabulary of 152k.
_PROPOSALS = 1024
# Windows that a chunk of a prompt is read in beside decoding, so that a short prompt does not cost a whole chunk.
_CHUNK_WINDOWS = 8
# Slots of which a small model reads half in no less time than all.
_FEW_SLOTS = 4


# Bytes of layers below which a CPU's forward takes as long whatever its width, and compiling many takes minutes.
_SMALL_MODEL = 2**25

ForwardWidths = Literal["many", "few", "fewest"]


def forward_widths(model: Model) -> ForwardWidths:
    """The widths (`BufferConfig.widths`) that suit a model where it is decoded."""
    if platform() != "cpu":
        return "few"
    large = _layer_bytes(model.config, model.embedding.dtype) > _SMALL_MODEL
    return "many" if large else "fewest"


@lru_cache(maxsize=64)
def _layer_bytes(config: ModelConfig, dtype: np.dtype) -> int:
    shapes = jax.eval_shape(lambda: Model(config, jax.random.key(0), dtype, stacked=True))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes.layers))


@dataclasses.dataclass(frozen=True)
class BufferConfig:
    """What a compilation depends on, besides the shapes of the state.

    Attributes:
        block_size: S, of the blocks that are filled one after another.
        paradigm: what the model reads and predicts. One that fills no masks reads, in place of a block of one, the
            token before it (S = K = 1); one that cannot be cached reads the whole canvas each time, without pages
            (K = 1).
        rules: the commit rules in use; `SamplingParams.rule` of a sequence says which is its own.
        prefill_sequences: a forward reads up to prefill_sequences x prefill_tokens of prompts, of as many sequences as
            that serves; 0 where none has any to read.
        prefill_tokens: of one prompt, the most that a forward reads; a multiple of S.
        decodes_beside_prefill: whether other sequences decode in forwards that read prompts, or all begin as one.
        widths: for how many numbers of slots and prompt windows forwards are compiled. "many" fit the work closely, and
            take long to compile: for CPUs, where a forward's time grows with its width; "few" for GPUs and TPUs, where
            it hardly does; "fewest" for models so small that compiling takes longer than many widths would save.
        sequences_at_once: sequences that decode in one forward, the first admitted; the others are prefilled and wait
            for a decode slot: one begins when another ends, without waiting for the host. None is all.
        opens_early: whether any sequence may open two blocks before its first forward, as an `add_threshold` below 1
            allows; where all begin as one, that forward is compiled for both widths.
        samples: whether any sequence asks for more than the likeliest tokens and their probabilities
            (`proposal.is_plain`); without, the program is much smaller.
        stops_early: whether `advance` returns when, of the sequences at once, an eighth have come to be missing: have
            ended or are out of pages, and no other is there.
    """

    block_size: int
    paradigm: Paradigm
    rules: tuple[CommitRule, ...]
    prefill_sequences: int = 0
    prefill_tokens: int = 0
    decodes_beside_prefill: bool = True
    widths: ForwardWidths = "few"
    sequences_at_once: int | None = None
    opens_early: bool = True
    samples: bool = True
    stops_early: bool = True

    def at_once(self, sequences: int) -> int:
        """How many of so many sequences decode in one forward."""
        return (
            sequences if self.sequences_at_once is None else min(self.sequences_at_once, sequences)
        )

    @property
    def prompt_window(self) -> int:
        """Positions of each window that prompts are read in: whole blocks."""
        parts = _CHUNK_WINDOWS if self.decodes_beside_prefill else 2 * _CHUNK_WINDOWS
        most = max(1, min(-(-self.prefill_tokens // parts), _WINDOW))
        return -(-most // self.block_size) * self.block_size

    @property
    def chunk_windows(self) -> int:
        """Windows that a prompt's longest chunk takes."""
        return -(-self.prefill_tokens // self.prompt_window)

    @property
    def rewrites(self) -> bool:
        """Whether a complete block is read once more, for its keys: those of its last forward had masks in sight."""
        return self.paradigm.masks and self.paradigm.cached

    @property
    def shifted_in_block(self) -> bool:
        """Whether each position of a block is predicted by the one before it, all of them read in one forward."""
        return self.paradigm.shifted and self.paradigm.masks

    @property
    def reads_before(self) -> bool:
        """Whether what predicts a block of one is the token before it, read in its stead."""
        return not self.paradigm.masks


class Packed(NamedTuple):
    """Hidden states of slots.

    Attributes:
        hidden: hidden[i] is of slot `index[i]`; undefined from `count` on.
        index: slots counted sequence by sequence.
        count: how many there are.
    """

    hidden: Float[Array, "N S D"]
    index: Int[Array, " N"]
    count: Int[Array, ""]


def prompt_left(batch: SequenceState, config: BufferConfig) -> Int[Array, " B"]:
    """Positions to read before the sequence can decode; of `reads_before`, the last is read as it decodes."""
    if not config.paradigm.cached:
        return jnp.zeros_like(batch.progress.start)
    return batch.progress.start - batch.progress.cached - config.reads_before


def next_chunk(batch: SequenceState, config: BufferConfig) -> Int[Array, " B"]:
    """Positions of its prompt that a sequence would read in the next forward: whole blocks, or all that are left."""
    left = prompt_left(batch, config)
    if config.paradigm.origin == "sequence":
        # Both are multiples of S, or all that is left.
        return jnp.minimum(left, config.prefill_tokens)
    end = batch.progress.cached + config.prefill_tokens
    in_response = end - batch.inputs.origin
    end = jnp.where(
        in_response > 0,
        batch.inputs.origin + in_response // config.block_size * config.block_size,
        end,
    )
    return jnp.minimum(left, end - batch.progress.cached)


def paged_forward(
    model: Model,
    batch: SequenceState,
    cache: list[LayerPages],
    window: Window,
    live: Bool[Array, "B K"],
    reads: Bool[Array, " B"],
    config: BufferConfig,
) -> tuple[Packed, list[LayerPages]]:
    """Reads the live slots, and the next chunk of the prompts of those in `reads`; writes their keys and values."""
    index, count = _first(live)
    sizes = _window_sizes(batch, reads, config)
    pieces, pieces_count = _first(sizes > 0)

    def forward(slots: int, prompts: int, cache: list[LayerPages]):
        groups = [_slots(batch, window, index[:slots], count, config)] if slots else []
        groups += [_prompts(batch, sizes, pieces[:prompts], config)] if prompts else []
        hidden, cache = model.hidden_paged(groups, cache, wanted=1 if slots else 0)
        found = jnp.zeros(
            (index.size, config.block_size, model.config.hidden_size), model.embedding.dtype
        )
        return found.at[:slots].set(_predicting(hidden[0], config)) if slots else found, cache

    widths, beside = _slot_widths(config.at_once(live.shape[0]), live.shape[1], config)
    branches = [(width, 0) for width in widths]
    branch = _narrowest(widths, count)
    if config.prefill_sequences:
        most = min(config.prefill_sequences, reads.size) * sizes.shape[1]
        eighths = {"many": (1, 2, 3, 4, 6, 8), "few": (4, 8), "fewest": (2, 8)}[config.widths]
        read_widths = _parts_of(most, eighths if config.decodes_beside_prefill else (1, 8))
        branches += [(few, width) for few in beside for width in read_widths]
        narrowest = _narrowest(read_widths, pieces_count) if len(read_widths) > 1 else 0
        # Behind the branches that decode alone: each width of decoding, and for each of them every width of reading.
        joint = (count > beside[0]) * len(read_widths) + narrowest
        branch = jnp.where(reads.any(), len(widths) + joint, branch)
    hidden, cache = _switch(branch, branches, forward, cache)
    return Packed(hidden, index, count), cache


def _slot_widths(batch: int, slots: int, config: BufferConfig) -> tuple[list[int], list[int]]:
    """Numbers of slots that forwards are compiled for, alone and beside prompts."""
    most = batch * slots
    if config.widths == "many":
        # Sequences out of step have a few blocks more than there are sequences: there, widths are close.
        widths = sorted(
            {min(width, most) for width in _parts_of(batch, (2, 4, 8, 9, 10, 11, 12))} | {most}
        )
    elif config.widths == "fewest" and most <= _FEW_SLOTS:
        widths = [most]
    else:
        # A batch of `generate` may be a small part of what its program holds.
        widths = _parts_of(most, (4, 8) if config.decodes_beside_prefill else (1, 2, 4, 8))
    # Beside prompts, decoding is as wide as most steps need, or as wide as it can be; or all begin.
    if not config.decodes_beside_prefill:
        both = min(2 * batch, most) if config.opens_early else batch
        return widths, sorted({batch, both})
    return widths, _parts_of(most, (8,) if config.widths == "fewest" else (6, 8))


def _predicting(hidden: Float[Array, "N W D"], config: BufferConfig) -> Float[Array, "N S D"]:
    """Of the windows of `_slots`, what predicts each position of the block."""
    if not config.shifted_in_block:
        return hidden
    # The position before the block was read last.
    return jnp.concatenate([hidden[:, -1:], hidden[:, : config.block_size - 1]], axis=1)


def _slots(
    batch: SequenceState, window: Window, index: Array, count: Array, config: BufferConfig
) -> Windows:
    """The windows of some slots; those past `count` read and write nothing.

    A shifted model's have one token more, at the end: the one before the block, which predicts the block's first. Its
    key is in the pages, and is not written.
    """
    slots, used = window.positions.shape[1], jnp.arange(index.size) < count
    sequence, slot = index // slots, index % slots
    start = batch.progress.start[sequence] + slot * config.block_size - config.reads_before
    tokens = window.tokens.reshape(-1, config.block_size)[index]
    if config.reads_before:
        tokens = take(batch.output.tokens[sequence], start[:, None], 0)
    count_each = jnp.where(used, config.block_size, 0)
    visible = jnp.broadcast_to((start + config.block_size)[:, None], tokens.shape)
    offset = jnp.arange(config.block_size, dtype=jnp.int32)
    if config.paradigm.causal_clean and config.rewrites:
        # A complete block is read for its final keys, which see nothing behind themselves.
        complete = window.committed.reshape(-1, config.block_size)[index].all(axis=-1)
        visible = jnp.where(complete[:, None], start[:, None] + offset + 1, visible)
    positions = None
    if config.shifted_in_block:
        before = jnp.maximum(start - 1, 0)[:, None]
        tokens = jnp.concatenate([tokens, take(batch.output.tokens[sequence], before, 0)], axis=1)
        positions = jnp.concatenate([start[:, None] + offset, before], axis=1)
        visible = jnp.concatenate([visible, start[:, None]], axis=1)
    visible = jnp.where(used[:, None], visible, 0)
    return Windows(tokens, start, count_each, visible, batch.inputs.page_table[sequence], positions)


def prompt_windows(batch: SequenceState, config: BufferConfig) -> Int[Array, " B"]:
    """Windows that each prompt would take of the next forward."""
    return -(-next_chunk(batch, config) // config.prompt_window)


def _window_sizes(batch: SequenceState, reads: Array, config: BufferConfig) -> Int[Array, "B P"]:
    """Positions in each of the windows that a forward reads of each prompt; 0 where there is none."""
    wanted = jnp.where(reads, next_chunk(batch, config), 0)
    offset = jnp.arange(config.chunk_windows, dtype=jnp.int32) * config.prompt_window
    return jnp.clip(wanted[:, None] - offset, 0, config.prompt_window)


def _prompts(
    batch: SequenceState, sizes: Int[Array, "B P"], pieces: Array, config: BufferConfig
) -> Windows:
    """These windows of prompts, counted prompt by prompt, each position seeing what a clean one sees."""
    sequence, number = pieces // sizes.shape[1], pieces % sizes.shape[1]
    start = batch.progress.cached[sequence] + number * config.prompt_window
    count = sizes[sequence, number]
    index = jnp.arange(config.prompt_window, dtype=jnp.int32)
    positions = start[:, None] + index
    origin = batch.inputs.origin[sequence][:, None]
    visible = jnp.where(index < count[:, None], _clean_end(positions, origin, config), 0)
    tokens = take(batch.output.tokens[sequence], positions, 0)
    return Windows(tokens, start, count, visible, batch.inputs.page_table[sequence])


def _clean_end(positions: Array, origin: Array, config: BufferConfig) -> Array:
    """How many keys of its sequence a clean position sees."""
    size, paradigm = config.block_size, config.paradigm
    if paradigm.causal_clean:
        return positions + 1
    if paradigm.origin == "sequence":
        return (positions // size + 1) * size
    in_response = origin + ((positions - origin) // size + 1) * size
    in_prompt = (
        origin
        if paradigm.bidirectional_prompt
        else jnp.minimum((positions // size + 1) * size, origin)
    )
    return jnp.where(positions >= origin, in_response, in_prompt)


def canvas_forward(
    model: Model, batch: SequenceState, window: Window, config: BufferConfig
) -> Packed:
    """What predicts the open blocks: each sequence's canvas, prompt to last block, every position seeing all of it."""
    index = jnp.broadcast_to(
        jnp.arange(batch.output.tokens.shape[1], dtype=jnp.int32), batch.output.tokens.shape
    )
    inside = (index < batch.inputs.canvas_end[:, None]).astype(jnp.int32)
    hidden = model.hidden(batch.output.tokens, index, visibility.bidirectional(inside))
    count = batch.progress.start.size
    predicting = jnp.maximum(window.positions[:, 0] - config.paradigm.shifted, 0)
    opened = jnp.take_along_axis(hidden, predicting[..., None], axis=1, mode="clip")
    return Packed(opened, jnp.arange(count, dtype=jnp.int32), jnp.int32(count))


def propose_masked(
    model: Model,
    batch: SequenceState,
    window: Window,
    masked: Bool[Array, "B K S"],
    packed: Packed,
    config: BufferConfig,
    banned: Bool[Array, " V"] | None,
) -> Proposal:
    """A proposal for each masked position, [B, K, S]; zeros, and finite, elsewhere. The head runs on those alone.

    banned: tokens that are never proposed, besides the mask.
    """
    size = masked.shape[-1]
    used = jnp.arange(packed.index.size) < packed.count
    order, count = _first(masked.reshape(-1, size)[packed.index] & used[:, None])
    # At most one block per sequence has masks, unless blocks open early.
    at_once = config.at_once(masked.shape[0])
    one_block, most = at_once * size, at_once * masked.shape[1] * size
    part = min(one_block, _PROPOSALS)
    order = jnp.pad(order, (0, max(most, _PROPOSALS)))
    alternatives = batch.output.top_token.shape[-1]
    none = _no_proposal(
        masked.size, jnp.promote_types(packed.hidden.dtype, jnp.float32), alternatives
    )

    def head(width: int, plain: bool, proposal: Proposal, first: int | Array = 0) -> Proposal:
        used = first + jnp.arange(width) < count
        # What pads the list repeats its first entry, and so asks for nothing that no sequence asks for.
        source = jnp.where(used, jax.lax.dynamic_slice_in_dim(order, first, width), order[0])
        place = packed.index[source // size] * size + source % size
        sequence = place // (masked.size // masked.shape[0])
        logits = model.unembed(packed.hidden.reshape(-1, packed.hidden.shape[-1])[source])
        sampling = batch.inputs.sampling.at(sequence)
        positions = window.positions.reshape(-1)[place]
        stops = batch.inputs.stop_ids[sequence]
        early = _before_stops(positions, batch.inputs.prompt_length[sequence], sampling)
        found = propose(
            logits,
            sampling,
            positions,
            batch.progress.denoising_forwards[sequence],
            lambda: _seen(batch, logits.shape[-1])[sequence],
            mask_token_id=model.config.mask_token_id,
            banned=banned,
            suppressed=jnp.concatenate(
                [sampling.suppress_token_ids, jnp.where(early[:, None], stops, -1)], axis=1
            ),
            alternatives=alternatives,
            plain=plain,
        )
        last = (sampling.eos_last == 1) & (found.token[:, None] == stops).any(axis=1)
        found = found._replace(score=jnp.where(last, -jnp.inf, found.score))
        to = jnp.where(used, place, masked.size)
        return jax.tree.map(lambda all, new: all.at[to].set(new, mode="drop"), proposal, found)

    def in_parts(width: int, plain: bool, proposal: Proposal) -> Proposal:
        one_part = lambda i, proposal: head(width, plain, proposal, i * width)
        return jax.lax.fori_loop(0, ceil_div(count, width), one_part, proposal)

    widths = [*_parts_of(one_block, (4, 8)), *([most] if most > one_block else [])]
    if most > _PROPOSALS:
        widths = [_PROPOSALS]
        branches = [partial(in_parts, _PROPOSALS, True)]
    else:
        branches = [partial(head, width, True) for width in widths]
    branch = _narrowest([0, *widths[:-1]], count)
    branches = [lambda proposal: proposal, *branches]
    if config.samples:
        # What samples is most of the operations of a step: it is compiled once, for parts of one width.
        branches.append(partial(in_parts, part, False))
        plain = _all_plain(batch, window, masked)
        branch = jnp.where(plain | (count == 0), branch, len(branches) - 1)
    proposal = jax.lax.switch(branch, branches, none)
    return jax.tree.map(lambda x: x.reshape(*masked.shape, *x.shape[1:]), proposal)


def _before_stops(positions: Array, prompt_length: Array, sampling: SamplingParams) -> Array:
    """Whether these positions are ones where no stop token may be proposed yet; the parameters of each."""
    behind_prompt = positions - prompt_length
    return (behind_prompt >= 0) & (behind_prompt < sampling.min_new_tokens)


def _all_plain(batch: SequenceState, window: Window, masked: Bool[Array, "B K S"]) -> Array:
    """Whether every masked position asks for no more than `proposal.is_plain`."""
    sampling = batch.inputs.sampling
    plain = is_plain(sampling) & (sampling.suppress_token_ids < 0).all(axis=-1)
    last = batch.inputs.prompt_length + sampling.min_new_tokens
    early = (window.positions < last[:, None, None]) & (batch.inputs.stop_ids >= 0).any(axis=-1)[
        :, None, None
    ]
    return ~(masked & (early | ~plain[:, None, None])).any()


def _no_proposal(length: int, dtype, alternatives: int) -> Proposal:
    number, token = jnp.zeros(length, dtype), jnp.zeros(length, jnp.int32)
    several = lambda x: jnp.zeros((length, alternatives), x.dtype)
    others = Alternatives(several(token), several(number)) if alternatives else None
    return Proposal(token, number, number, number, jnp.ones(length, bool), others)


def _seen(batch: SequenceState, vocab_size: int) -> Bool[Array, "B V"]:
    """The tokens of each sequence's prompt and of what it has committed."""
    at = jnp.where(batch.output.committed, batch.output.tokens, vocab_size)
    index = jnp.arange(at.shape[0])[:, None]
    return jnp.zeros((at.shape[0], vocab_size), bool).at[index, at].set(True, mode="drop")


def _first(wanted: Bool[Array, "..."]) -> tuple[Int[Array, " N"], Int[Array, ""]]:
    """Indices into the flat array, those of wanted entries first and in order; and how many these are."""
    flat = wanted.reshape(-1)
    return jnp.argsort(~flat, stable=True).astype(jnp.int32), flat.sum(dtype=jnp.int32)


def _parts_of(whole: int, eighths: Sequence[int]) -> list[int]:
    """So many eighths of it, rounded up: the sizes that lists are rounded up to."""
    return sorted({-(-whole * part // 8) for part in eighths})


def _narrowest(widths: Sequence[int], count: Int[Array, ""]) -> Int[Array, ""]:
    return jnp.searchsorted(jnp.asarray(widths, jnp.int32), count)


def _switch(branch: Array, cases: Sequence[tuple], function: Callable, operand):
    """function(*cases[branch], operand)."""
    return jax.lax.switch(
        branch, [lambda x, case=case: function(*case, x) for case in cases], operand
    )
