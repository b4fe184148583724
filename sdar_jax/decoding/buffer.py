"""The block buffer: the one decoding loop, on the device, with one typed carry and no host round trip inside.

Each sequence has a window of K slots of S positions, the first `open` of which hold blocks:

    tokens   [prompt ...... | committed ... | x M x x | M M M M |         ]
    pages    [final keys ...................) start     start + S            rewritten by each forward

A step reads every open slot of every sequence that can continue, in one forward as wide as there are such slots. A slot
sees the cache, the slots before it and itself, and its keys and values are written to the sequence's pages. Then
proposals are committed. A slot at the front that was complete before the forward has now left its final keys in the
pages: it leaves the window. When the last slot is decoded (a share `add_threshold` of it) and there is room, the next
block opens; before the first forward that is the prompt's part of the first block.

So K = 1 is the plain loop, with one more forward per block to write its keys; with K = 2 the first forward of the next
block does that (commit fusion); and lower thresholds decode several blocks at once (D2F, arXiv 2508.09192).

Of sequences that still have prompt to read, each forward reads up to `prefill_sequences` x `prefill_tokens` of it, in
the order of admission. The last of it is read with the sequence's first block, which sees it as it sees the cache.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int

from sdar_jax.decoding.block_forward import (
    BufferConfig,
    canvas_forward,
    next_chunk,
    paged_forward,
    prompt_left,
    prompt_windows,
    propose_masked,
)
from sdar_jax.decoding.commit_rules import CommitRule, select
from sdar_jax.decoding.decode_state import DecodeState, SequenceState, Window, take, window_of
from sdar_jax.decoding.proposal import Proposal
from sdar_jax.decoding.transfers import Packed, StepOutput, pack, step_output, unpack
from sdar_jax.devices.sharding import PAGES, activate_mesh, constrain, current_mesh, mesh_of
from sdar_jax.model import Model, empty_pages, roll_layers, rolls


def advance(
    model: Model, state: DecodeState, steps: int | Int[Array, ""], config: BufferConfig
) -> DecodeState:
    """Takes at most `steps` steps: until no sequence can continue or, if asked, an eighth of those at once is missing.

    Every result is the same however steps are cut into calls. A sequence is out of pages when its next block, or chunk
    of its prompt, needs positions past its `pages_end`; it continues once the host has raised that.
    """
    if rolls(model.config, current_mesh()):
        model = roll_layers(model)
    state = state._replace(batch=_mark_out_of_pages(state.batch, config))
    at_once = config.at_once(state.batch.progress.done.size)
    # Of many sequences some end in most steps, and the host's work takes longer than a missing one costs.
    enough = -(-at_once // 8)

    def missing(batch: SequenceState) -> Array:
        return jnp.maximum(at_once - _can_continue(batch).sum(), 0)

    before = missing(state.batch)

    def continues(carry: tuple[Array, DecodeState]) -> Array:
        step, state = carry
        some_left = (step < steps) & _can_continue(state.batch).any()
        return (
            some_left & (missing(state.batch) - before < enough)
            if config.stops_early
            else some_left
        )

    def one_step(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        step, state = carry
        return step + 1, _placed(_step(model, config, state))

    return jax.lax.while_loop(continues, one_step, (jnp.int32(0), state))[1]


def _can_continue(batch: SequenceState) -> Bool[Array, " B"]:
    return ~(batch.progress.done | batch.progress.out_of_pages)


def _placed(state: DecodeState) -> DecodeState:
    """On a mesh: sequences replicated, pages split by key-value heads."""
    replicated = lambda x: constrain(x, *[None] * x.ndim)
    by_head = lambda x: constrain(x, *PAGES)
    batch, banned = jax.tree.map(replicated, (state.batch, state.banned))
    return DecodeState(batch, jax.tree.map(by_head, state.cache), banned)


def _step(model: Model, config: BufferConfig, state: DecodeState) -> DecodeState:
    decodes, reads = _who_runs(state.batch, config)
    # A sequence that waits opens nothing: its neighbours' prompts must not change when its blocks open.
    opens = jnp.where(decodes, _blocks_to_open(state.batch, config.block_size), 0)
    batch = state.batch.with_progress(open=state.batch.progress.open + opens)
    window = window_of(batch, config.block_size)
    live = decodes[:, None] & (jnp.arange(window.positions.shape[1]) < batch.progress.open[:, None])
    masked = live[..., None] & ~window.committed
    cache = state.cache
    if not config.paradigm.cached:
        packed = canvas_forward(model, batch, window, config)
    else:
        packed, cache = paged_forward(model, batch, cache, window, live, reads, config)
        batch = _count_prompts(batch, reads, config)
    proposal = propose_masked(model, batch, window, masked, packed, config, state.banned)
    batch = _commit(batch, window, masked, proposal, config.rules)
    batch = _count(batch, live, masked)
    batch = _finish(batch, config.block_size)
    batch = _retire_blocks(batch, window, live, config)
    return DecodeState(_mark_out_of_pages(batch, config), cache, state.banned)


def _wants_block(batch: SequenceState, size: int) -> Bool[Array, " B"]:
    """Sequences whose next block is to open: there is room, it is needed, and the last one is decoded far enough."""
    progress = batch.progress
    window = window_of(batch, size)
    last = jnp.maximum(progress.open - 1, 0)[:, None]
    share = jnp.take_along_axis(window.decoded, last, axis=1)[:, 0] / size
    follows = (share >= batch.inputs.sampling.add_threshold) & ~window.stops.any(axis=(1, 2))
    needed = progress.start + progress.open * size < batch.inputs.limit
    has_room = progress.open < window.positions.shape[1]
    return has_room & needed & ((progress.open == 0) | follows)


def _blocks_to_open(batch: SequenceState, size: int) -> Int[Array, " B"]:
    """Blocks that open before the next forward: one at most, but before a sequence's first forward two, where the
    prompt's end alone fills its first block far enough (arXiv 2606.29215, algorithms 4 and 5)."""
    progress = batch.progress
    first = _wants_block(batch, size).astype(jnp.int32)
    begins = (progress.open == 0) & (progress.denoising_forwards + progress.commit_forwards == 0)
    return first + (begins & _wants_block(batch.with_progress(open=first), size))


def _mark_out_of_pages(batch: SequenceState, config: BufferConfig) -> SequenceState:
    if not config.paradigm.cached:
        return batch
    progress = batch.progress
    opens = _blocks_to_open(batch, config.block_size)
    end = progress.start + (progress.open + opens) * config.block_size
    decodes = jnp.where(opens > 0, end, 0)
    needs = jnp.where(_reads_all(batch, config), decodes, progress.cached + config.prefill_tokens)
    return batch.with_progress(out_of_pages=~progress.done & (needs > batch.inputs.pages_end))


def _reads_all(batch: SequenceState, config: BufferConfig) -> Bool[Array, " B"]:
    """Sequences with no more of their prompt to read than one chunk: their first block is read with it."""
    return prompt_left(batch, config) <= config.prefill_tokens


def _who_runs(
    batch: SequenceState, config: BufferConfig
) -> tuple[Bool[Array, " B"], Bool[Array, " B"]]:
    """Sequences that decode in this step, and those whose prompts it reads: as admitted, as many as windows serve."""
    can = _can_continue(batch)
    prompts = can & (prompt_left(batch, config) > 0)
    earlier = _earlier(batch.inputs.admitted)
    takes = jnp.where(prompts, prompt_windows(batch, config), 0)
    windows = takes + jnp.where(earlier, takes, 0).sum(axis=1)
    reads = prompts & (windows <= config.prefill_sequences * config.chunk_windows)
    decodes = can & _reads_all(batch, config) & (reads | ~prompts)
    if (at_once := config.at_once(decodes.size)) < decodes.size:
        decodes &= (earlier & decodes).sum(axis=1) < at_once
    if not config.decodes_beside_prefill:
        decodes &= (decodes | ~can).all()
    return decodes, reads


def _earlier(admitted: Int[Array, " B"]) -> Bool[Array, "B B"]:
    """Whether sequence j was admitted before sequence i, or was at once and stands before it."""
    index = jnp.arange(admitted.size)
    same = (admitted == admitted[:, None]) & (index < index[:, None])
    return (admitted < admitted[:, None]) | same


def _count_prompts(
    batch: SequenceState, reads: Bool[Array, " B"], config: BufferConfig
) -> SequenceState:
    read = jnp.where(reads, next_chunk(batch, config), 0)
    progress = batch.progress
    return batch.with_progress(
        cached=progress.cached + read, prefill_forwards=progress.prefill_forwards + reads
    )


def _activated(batch: SequenceState, window: Window) -> Bool[Array, "B K"]:
    """Slots that commit by the strategy: the first, and those behind one that is decoded far enough."""
    share = window.decoded / window.positions.shape[-1]
    behind = share[:, :-1] >= batch.inputs.sampling.activate_threshold[:, None]
    return jnp.concatenate([jnp.ones_like(behind, shape=(behind.shape[0], 1)), behind], axis=1)


def _commit(
    batch: SequenceState,
    window: Window,
    masked: Bool[Array, "B K S"],
    proposal: Proposal,
    rules: tuple[CommitRule, ...],
) -> SequenceState:
    """Writes what the rules choose; committed tokens never change again."""
    progress, output = batch.progress, batch.output
    count, slots, size = masked.shape
    failed = (masked & ~proposal.finite).any(axis=(1, 2))
    activated = _activated(batch, window)
    of_slots = lambda x: x.reshape(count * slots, *x.shape[2:])
    chosen = select(
        rules,
        jax.tree.map(of_slots, proposal),
        of_slots(masked),
        of_slots(output.block_step),
        of_slots(activated),
        batch.inputs.sampling.at(jnp.repeat(jnp.arange(count), slots)),
    ).reshape(masked.shape)
    committed = chosen & ~failed[:, None, None]
    at = jnp.where(committed, window.positions, output.tokens.shape[1]).reshape(count, -1)
    write = lambda x, new: x.at[jnp.arange(count)[:, None], at].set(new, mode="drop")
    in_sequence = lambda x: x.reshape(count, -1)
    if (others := proposal.alternatives) is not None:
        several = lambda x: x.reshape(count, slots * size, -1)
        output = output._replace(
            top_token=write(output.top_token, several(others.token)),
            top_logprob=write(output.top_logprob, several(others.logprob)),
        )
    output = output._replace(
        tokens=write(output.tokens, in_sequence(proposal.token)),
        committed=write(output.committed, True),
        step=write(output.step, progress.denoising_forwards[:, None]),
        logprob=write(output.logprob, in_sequence(proposal.logprob)),
        block_step=output.block_step + (activated & masked.any(axis=-1)),
    )
    progress = progress._replace(failed=progress.failed | failed, done=progress.done | failed)
    return SequenceState(batch.inputs, progress, output)


def _count(batch: SequenceState, live: Array, masked: Array) -> SequenceState:
    """Counts the forward, and ends sequences that have had more than any strategy can need."""
    progress = batch.progress
    denoises = masked.any(axis=(1, 2))
    denoising = progress.denoising_forwards + denoises
    commits = progress.commit_forwards + (live.any(axis=1) & ~denoises)
    spent = denoising + commits > batch.inputs.forward_budget
    return batch.with_progress(
        denoising_forwards=denoising,
        commit_forwards=commits,
        failed=progress.failed | spent,
        done=progress.done | spent,
    )


def _retire_blocks(
    batch: SequenceState, before: Window, live: Array, config: BufferConfig
) -> SequenceState:
    """Complete blocks at the front leave the window once their final keys are written, or none have to be."""
    size, slots = config.block_size, live.shape[1]
    seen = before if config.rewrites else window_of(batch, size)
    complete = seen.committed.all(axis=-1) & live
    retired = jnp.cumprod(complete, axis=1, dtype=jnp.int32).sum(axis=1, dtype=jnp.int32)
    shifted = jnp.arange(slots) + retired[:, None]
    progress = batch.progress._replace(
        start=batch.progress.start + retired * size,
        cached=batch.progress.cached + retired * size,
        open=batch.progress.open - retired,
    )
    output = batch.output._replace(block_step=take(batch.output.block_step, shifted, 0))
    return SequenceState(batch.inputs, progress, output)


def _finish(batch: SequenceState, block_size: int) -> SequenceState:
    """A sequence ends once a stop and every position before it are committed, or all up to its limit are."""
    progress = batch.progress
    window = window_of(batch, block_size)
    in_sequence = lambda x: x.reshape(x.shape[0], -1)
    no_gap = jnp.cumprod(in_sequence(window.committed), axis=1, dtype=jnp.int32)
    stops = in_sequence(window.stops) & (no_gap == 1)
    first_stop = jnp.min(
        jnp.where(stops, in_sequence(window.positions), jnp.iinfo(jnp.int32).max), axis=1
    )
    stopped = stops.any(axis=1) & ~progress.done
    frontier = progress.start + no_gap.sum(axis=1, dtype=jnp.int32)
    return batch.with_progress(
        end=jnp.where(stopped, first_stop, progress.end),
        stopped=progress.stopped | stopped,
        done=progress.done | stopped | (frontier >= batch.inputs.limit),
    )


class Decoder:
    """`advance`, jitted, for one model, on the devices that hold it. One program serves all models of a shape."""

    def __init__(self, model: Model, config: BufferConfig):
        # Flattened once: that takes milliseconds, a forward of a small model's time.
        self._weights, self._structure = jax.tree.flatten(model)
        self._config = config
        self._mesh = mesh_of(model.embedding)

    def __call__(
        self, state: DecodeState, steps: int | Int[Array, ""]
    ) -> tuple[DecodeState, StepOutput]:
        """At most `steps` steps, and what the host wants to know after them; `state` is donated."""
        if self._mesh is not None:
            # As the state comes back, or the next call would be compiled anew.
            replicated = NamedSharding(self._mesh, PartitionSpec())
            batch, banned = jax.device_put((state.batch, state.banned), replicated)
            state = state._replace(batch=batch, banned=banned)
        with activate_mesh(self._mesh):
            return _program(self._structure, self._config)(self._weights, state, steps)

    def to_end(
        self, sequences: SequenceState, pages: tuple[int, int] | None, banned: Array | None
    ) -> SequenceState:
        """Decodes a batch of the host's to its end, over new pages; its state, on the host.

        Little is sent and fetched, as each array that crosses takes time of its own.

        Args:
            sequences: numpy, [B, ...].
            pages: how many, and positions of each; None where nothing is cached.
            banned: bool [V], tokens that are never proposed.
        """
        rows = jax.tree.map(lambda x: _struct(x.shape[1:], x.dtype), sequences)
        leaves, tree = jax.tree.flatten(rows)
        program = _program_to_end(self._structure, self._config, tuple(leaves), tree, pages)
        with activate_mesh(self._mesh):
            found = program(self._weights, pack(sequences), banned)
        changed = unpack(jax.device_get(found), (rows.progress, rows.output))
        return SequenceState(sequences.inputs, *changed)


@lru_cache(maxsize=1024)
def _struct(shape: tuple[int, ...], dtype: np.dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


@lru_cache(maxsize=64)
def _program_to_end(
    structure: Any,
    config: BufferConfig,
    rows: tuple[jax.ShapeDtypeStruct, ...],
    tree: Any,
    pages: tuple[int, int] | None,
) -> Callable[[list[Array], Packed, Array | None], Packed]:
    def run(weights: list[Array], packed: Packed, banned: Array | None) -> Packed:
        model = jax.tree.unflatten(structure, weights)
        batch = unpack(packed, jax.tree.unflatten(tree, rows))
        cache = []
        if pages is not None:
            rolled = rolls(model.config, current_mesh())
            cache = empty_pages(model.config, *pages, model.embedding.dtype, rolled=rolled)
        state = _placed(DecodeState(batch, cache, banned))
        state = advance(model, state, jnp.iinfo(jnp.int32).max, config)
        return pack((state.batch.progress, state.batch.output))

    return jax.jit(run)


@lru_cache(maxsize=64)
def _program(
    structure: Any, config: BufferConfig
) -> Callable[[list[Array], DecodeState, int | Array], tuple[DecodeState, StepOutput]]:
    def run(
        weights: list[Array], state: DecodeState, steps: int | Array
    ) -> tuple[DecodeState, StepOutput]:
        state = advance(jax.tree.unflatten(structure, weights), state, steps, config)
        return state, step_output(state.batch)

    return jax.jit(run, donate_argnums=1)
