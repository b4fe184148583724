"""The block buffer: the one decoding loop, on the device, with one typed carry and no host round trip inside.

Each row has a window of K slots of S positions, the first `open` of which hold blocks:

    tokens   [prompt ...... | committed ... | x M x x | M M M M |         ]
    pages    [final keys ...................) start     start + S            rewritten by each forward

A turn reads every open slot of every row that can go on, in one forward as wide as there are such slots. A slot sees
the cache, the slots before it and itself, and its keys and values are written to the row's pages. Then proposals are
committed. A slot at the front that was complete before the forward has now left its final keys in the pages: it leaves
the window. When the last slot is decoded (a share `add_threshold` of it) and there is room, the next block opens.

So K = 1 is the plain loop, with one more forward a block to write its keys; with K = 2 the first forward of the next
block does that (commit fusion); and lower thresholds decode several blocks at once (D2F, arXiv 2508.09192).

Rows that still have prompt to read take turns of up to `prefill_rows` x `prefill_tokens` of it in the same forward. The
last of it is read with the row's first block, which sees it as it sees the cache.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int

from sdar_jax.decoding.commit_rules import CommitRule, select
from sdar_jax.decoding.forward import (
    BufferConfig,
    canvas_forward,
    next_chunk,
    paged_forward,
    prompt_left,
    prompt_windows,
    propose_masked,
)
from sdar_jax.decoding.proposal import Proposal
from sdar_jax.decoding.rows import Rows, Window, take, window_of
from sdar_jax.decoding.updates import Changed, changed
from sdar_jax.devices.sharding import PAGES, activate_mesh, constrain, mesh_of
from sdar_jax.model import LayerPages, Model


class State(NamedTuple):
    """All there is. The pages are the device's; the host may change rows between calls.

    banned: tokens that are never proposed, besides the mask; None is none.
    """

    rows: Rows
    cache: list[LayerPages]
    banned: Bool[Array, " V"] | None = None


def advance(model: Model, state: State, turns: int | Int[Array, ""], config: BufferConfig) -> State:
    """At most `turns` turns: until no row can go on or, if asked, an eighth of those at once have come to be missing.

    Every result is the same however turns are cut into calls. A row starves when its next block, or chunk of its
    prompt, needs positions past its `pages_end`; it goes on once the host has raised that.
    """
    state = state._replace(rows=_mark_starved(state.rows, config))
    at_once = config.at_once(state.rows.done.size)
    # Of many rows some end in most turns, and the host's work takes longer than a missing row costs.
    enough = -(-at_once // 8)
    missing = lambda rows: jnp.maximum(at_once - (~(rows.done | rows.starved)).sum(), 0)
    before = missing(state.rows)

    def goes_on(carry: tuple[Array, State]) -> Array:
        turn, (rows, *_) = carry
        goes_on = (turn < turns) & ~(rows.done | rows.starved).all()
        return goes_on & (missing(rows) - before < enough) if config.stops_early else goes_on

    one = lambda carry: (carry[0] + 1, _placed(_turn(model, config, carry[1])))
    return jax.lax.while_loop(goes_on, one, (jnp.int32(0), state))[1]


def _placed(state: State) -> State:
    """On a mesh: rows whole on every device, pages split by key-value heads."""
    whole = lambda x: constrain(x, *[None] * x.ndim)
    by_head = lambda x: constrain(x, *PAGES)
    rows, banned = jax.tree.map(whole, (state.rows, state.banned))
    return State(rows, jax.tree.map(by_head, state.cache), banned)


def _turn(model: Model, config: BufferConfig, state: State) -> State:
    decodes, reads = _who_goes_on(state.rows, config)
    # A row that waits opens nothing: its neighbours' prompts must not change when its blocks open.
    rows = state.rows._replace(open=state.rows.open + (decodes & _wants_block(state.rows, config.block_size)))
    window = window_of(rows, config.block_size)
    live = decodes[:, None] & (jnp.arange(rows.block_step.shape[1]) < rows.open[:, None])
    masked = live[..., None] & ~window.committed
    if not config.paradigm.cached:
        packed, cache = canvas_forward(model, rows, window, config), state.cache
    else:
        packed, cache = paged_forward(model, rows, state.cache, window, live, reads, config)
        rows = _count_prompts(rows, reads, config)
    proposal = propose_masked(model, rows, window, masked, packed, config, state.banned)
    rows = _commit(rows, window, masked, proposal, config.rules)
    rows = _finish(_count(rows, live, masked), config.block_size)
    return State(_mark_starved(_leave(rows, window, live, config), config), cache, state.banned)


def _wants_block(rows: Rows, size: int) -> Bool[Array, " B"]:
    """Rows whose next block is to open: there is room, it is needed, and the last one is decoded far enough."""
    slots = rows.block_step.shape[1]
    window = window_of(rows, size)
    last = jnp.maximum(rows.open - 1, 0)[:, None]
    share = jnp.take_along_axis(window.decoded, last, axis=1)[:, 0] / size
    follows = (share >= rows.sampling.add_threshold) & ~window.stops.any(axis=(1, 2))
    needed = rows.start + rows.open * size < rows.limit
    return (rows.open < slots) & needed & ((rows.open == 0) | follows)


def _mark_starved(rows: Rows, config: BufferConfig) -> Rows:
    if not config.paradigm.cached:
        return rows
    block = rows.start + (rows.open + 1) * config.block_size
    decodes = jnp.where(_wants_block(rows, config.block_size), block, 0)
    needs = jnp.where(_reads_all(rows, config), decodes, rows.cached + config.prefill_tokens)
    return rows._replace(starved=~rows.done & (needs > rows.pages_end))


def _reads_all(rows: Rows, config: BufferConfig) -> Bool[Array, " B"]:
    """Rows that have no more of their prompt to read than one chunk: their first block is read with it."""
    return prompt_left(rows, config) <= config.prefill_tokens


def _who_goes_on(rows: Rows, config: BufferConfig) -> tuple[Bool[Array, " B"], Bool[Array, " B"]]:
    """Rows that decode in this turn, and those whose prompts it reads: as admitted, as many as its windows serve."""
    can = ~rows.done & ~rows.starved
    prompts = can & (prompt_left(rows, config) > 0)
    earlier = _earlier(rows)
    takes = jnp.where(prompts, prompt_windows(rows, config), 0)
    windows = takes + jnp.where(earlier, takes, 0).sum(axis=1)
    reads = prompts & (windows <= config.prefill_rows * config.chunk_windows)
    decodes = can & _reads_all(rows, config) & (reads | ~prompts)
    if (at_once := config.at_once(decodes.size)) < decodes.size:
        decodes &= (earlier & decodes).sum(axis=1) < at_once
    if not config.decodes_beside_prefill:
        decodes &= (decodes | ~can).all()
    return decodes, reads


def _earlier(rows: Rows) -> Bool[Array, "B B"]:
    """Whether row j was admitted before row i, or was at once and stands before it."""
    index = jnp.arange(rows.admitted.size)
    same = (rows.admitted == rows.admitted[:, None]) & (index < index[:, None])
    return (rows.admitted < rows.admitted[:, None]) | same


def _count_prompts(rows: Rows, reads: Bool[Array, " B"], config: BufferConfig) -> Rows:
    read = jnp.where(reads, next_chunk(rows, config), 0)
    return rows._replace(cached=rows.cached + read, prefill_forwards=rows.prefill_forwards + reads)


def _activated(rows: Rows, window: Window) -> Bool[Array, "B K"]:
    """Slots that commit by the strategy: the first, and those behind one that is decoded far enough."""
    share = window.decoded / window.positions.shape[-1]
    behind = share[:, :-1] >= rows.sampling.activate_threshold[:, None]
    return jnp.concatenate([jnp.ones_like(behind, shape=(behind.shape[0], 1)), behind], axis=1)


def _commit(
    rows: Rows,
    window: Window,
    masked: Bool[Array, "B K S"],
    proposal: Proposal,
    rules: tuple[CommitRule, ...],
) -> Rows:
    """Writes what the rules choose; committed tokens never change again."""
    batch, slots, size = masked.shape
    failed = (masked & ~proposal.finite).any(axis=(1, 2))
    activated = _activated(rows, window)
    of_slots = lambda x: x.reshape(batch * slots, *x.shape[2:])
    chosen = select(
        rules,
        jax.tree.map(of_slots, proposal),
        of_slots(masked),
        of_slots(rows.block_step),
        of_slots(activated),
        rows.sampling.at(jnp.repeat(jnp.arange(batch), slots)),
    ).reshape(masked.shape)
    at = jnp.where(chosen & ~failed[:, None, None], window.positions, rows.tokens.shape[1]).reshape(batch, -1)
    write = lambda x, new: x.at[jnp.arange(batch)[:, None], at].set(new, mode="drop")
    in_row = lambda x: x.reshape(batch, -1)
    if (others := proposal.alternatives) is not None:
        several = lambda x: x.reshape(batch, slots * size, -1)
        rows = rows._replace(
            top_token=write(rows.top_token, several(others.token)),
            top_logprob=write(rows.top_logprob, several(others.logprob)),
        )
    return rows._replace(
        tokens=write(rows.tokens, in_row(proposal.token)),
        committed=write(rows.committed, True),
        step=write(rows.step, rows.denoising_forwards[:, None]),
        logprob=write(rows.logprob, in_row(proposal.logprob)),
        block_step=rows.block_step + (activated & masked.any(axis=-1)),
        failed=rows.failed | failed,
        done=rows.done | failed,
    )


def _count(rows: Rows, live: Array, masked: Array) -> Rows:
    """Counts the forward, and ends rows that have had more than any strategy can need."""
    denoises = masked.any(axis=(1, 2))
    denoising = rows.denoising_forwards + denoises
    commits = rows.commit_forwards + (live.any(axis=1) & ~denoises)
    spent = denoising + commits > rows.forward_budget
    return rows._replace(
        denoising_forwards=denoising, commit_forwards=commits, failed=rows.failed | spent, done=rows.done | spent
    )


def _leave(rows: Rows, before: Window, live: Array, config: BufferConfig) -> Rows:
    """Complete blocks at the front leave the window once their final keys are written, or none have to be."""
    size, slots = config.block_size, rows.block_step.shape[1]
    seen = before if config.rewrites else window_of(rows, size)
    complete = seen.committed.all(axis=-1) & live
    leaving = jnp.cumprod(complete, axis=1, dtype=jnp.int32).sum(axis=1, dtype=jnp.int32)
    shifted = jnp.arange(slots) + leaving[:, None]
    return rows._replace(
        start=rows.start + leaving * size,
        cached=rows.cached + leaving * size,
        open=rows.open - leaving,
        block_step=take(rows.block_step, shifted, 0),
    )


def _finish(rows: Rows, block_size: int) -> Rows:
    """A row ends once a stop and every position before it are committed, or all up to its limit are."""
    window = window_of(rows, block_size)
    in_row = lambda x: x.reshape(x.shape[0], -1)
    whole = jnp.cumprod(in_row(window.committed), axis=1, dtype=jnp.int32)
    stops = in_row(window.stops) & (whole == 1)
    first_stop = jnp.min(jnp.where(stops, in_row(window.positions), jnp.iinfo(jnp.int32).max), axis=1)
    stopped = stops.any(axis=1) & ~rows.done
    frontier = rows.start + whole.sum(axis=1, dtype=jnp.int32)
    return rows._replace(
        end=jnp.where(stopped, first_stop, rows.end),
        stopped=rows.stopped | stopped,
        done=rows.done | stopped | (frontier >= rows.limit),
    )


class Decoder:
    """`advance`, jitted, for one model, on the devices that hold it. One program serves all models of a shape."""

    def __init__(self, model: Model, config: BufferConfig):
        # Flattened once: that takes milliseconds, a forward of a small model's time.
        self._weights, structure = jax.tree.flatten(model)
        self._program = _program(structure, config)
        self._mesh = mesh_of(model)

    def __call__(self, state: State, turns: int | Int[Array, ""]) -> tuple[State, Changed]:
        """At most `turns` turns, and what the host wants to know after them; `state` is donated."""
        if self._mesh is not None:
            # As the state comes back, or the next call would be compiled anew.
            whole = NamedSharding(self._mesh, PartitionSpec())
            rows, banned = jax.device_put((state.rows, state.banned), whole)
            state = state._replace(rows=rows, banned=banned)
        with activate_mesh(self._mesh):
            return self._program(self._weights, state, turns)


@lru_cache(maxsize=64)
def _program(
    structure: Any, config: BufferConfig
) -> Callable[[list[Array], State, int | Array], tuple[State, Changed]]:
    def run(weights: list[Array], state: State, turns: int | Array) -> tuple[State, Changed]:
        state = advance(jax.tree.unflatten(structure, weights), state, turns, config)
        return state, changed(state.rows)

    return jax.jit(run, donate_argnums=1)
