"""What a query may see: two half-open key ranges per row, for every paradigm.

`Ranges` is all that `attention` knows of a paradigm. Training AR, MDLM or block diffusion and scoring differ in these
integers and in nothing else. No function here builds an array with both a query and a key axis.

    causal          block-causal, S = 2      hybrid, L = 4, S = 2, rows and columns [noisy | clean]
    1 0 0 0         1 1 0 0                  1 1 0 0 | 0 0 0 0
    1 1 0 0         1 1 0 0                  1 1 0 0 | 0 0 0 0
    1 1 1 0         1 1 1 1                  0 0 1 1 | 1 1 0 0
    1 1 1 1         1 1 1 1                  0 0 1 1 | 1 1 0 0
                                             0 0 0 0 | 1 1 0 0
                                             0 0 0 0 | 1 1 0 0
                                             0 0 0 0 | 1 1 1 1
                                             0 0 0 0 | 1 1 1 1

Segments are the documents of a packed row: `segment_ids` [B, L] holds positive ids, equal and contiguous within a
document, and 0 for padding. A change of id starts a document, its positions and its blocks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sdar_jax.errors import ConfigError, is_int

SegmentIds = Int[Array, "B L"]
Positions = Int[Array, "B L"]


class Ranges(NamedTuple):
    """Two disjoint key ranges `[start, end)` per query row; `start == end` sees nothing.

    Attributes:
        start: int32 [B, Q, 2].
        end: int32 [B, Q, 2].
    """

    start: Int[Array, "B Q 2"]
    end: Int[Array, "B Q 2"]

    def sees(self, keys: Int[Array, " K"]) -> Bool[Array, "B Q K"]:
        """Makes the dense mask of the given key indices: for references, pictures and single tiles."""
        visible = (self.start[..., None] <= keys) & (keys < self.end[..., None])
        return visible.any(axis=2)


class Segments(NamedTuple):
    """Each position's document. All int32 [B, L].

    Attributes:
        start: where the document starts in its row.
        end: one past its last position; of padding, `start`.
        positions: places within the document, from 0.
    """

    start: Positions
    end: Positions
    positions: Positions


def segments(segment_ids: SegmentIds) -> Segments:
    """Finds the bounds of the document that each position belongs to, and positions that count from its first token."""
    batch, length = segment_ids.shape
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    edge = jnp.ones((batch, 1), bool)
    change = segment_ids[:, 1:] != segment_ids[:, :-1]
    first = jnp.concatenate([edge, change], axis=1)
    last = jnp.concatenate([change, edge], axis=1)
    start = jax.lax.cummax(jnp.where(first, index, 0), axis=1)
    end = jax.lax.cummin(jnp.where(last, index + 1, length), axis=1, reverse=True)
    return Segments(
        start=start,
        end=jnp.where(segment_ids > 0, end, start),
        positions=index - start,
    )


def block_bounds(
    bounds: Segments,
    block_size: int | None,
    origin: Positions | None = None,
    *,
    bidirectional_prompt: bool = False,
) -> tuple[Positions, Positions]:
    """Finds the first position of each position's block and one past its last, cut at the document's end.

    Args:
        block_size: S; None: a document is one block.
        origin: int32 [B, L], where the response of each position's document starts: blocks are counted from there, and
            those of the prompt from the document's start, the last of them cut where the response starts. None: all are
            counted from the document's start.
        bidirectional_prompt: the prompt is one block, whatever its length.

    Returns:
        int32 [B, L] and int32 [B, L].
    """
    if block_size is None:
        return bounds.start, bounds.end
    check_block_size(block_size)
    if origin is None:
        start = jnp.minimum(bounds.start + bounds.positions // block_size * block_size, bounds.end)
        return start, jnp.minimum(start + block_size, bounds.end)
    index = bounds.start + bounds.positions
    in_response = index >= origin
    counted_from = jnp.where(in_response, origin, bounds.start)
    start = counted_from + (index - counted_from) // block_size * block_size
    start = jnp.where(in_response | (not bidirectional_prompt), start, bounds.start)
    start = jnp.minimum(start, bounds.end)
    part_end = jnp.where(in_response, bounds.end, jnp.minimum(origin, bounds.end))
    block_end = jnp.minimum(start + block_size, part_end)
    return start, jnp.where(~in_response & bidirectional_prompt, part_end, block_end)


def response_start(segment_ids: SegmentIds, response: Bool[Array, "B L"]) -> Positions:
    """Finds where each position's document has its first token of `response`; where it has none, its own start."""
    bounds = segments(segment_ids)
    index = bounds.start + bounds.positions
    length = segment_ids.shape[1]
    following = jax.lax.cummin(
        jnp.where(response & (segment_ids > 0), index, length), axis=1, reverse=True
    )
    first = jnp.take_along_axis(following, bounds.start, axis=1)
    return jnp.where(first < bounds.end, first, bounds.start)


def check_block_size(block_size: int) -> None:
    """Raises ConfigError unless `block_size` is a positive integer."""
    if not is_int(block_size) or block_size < 1:
        raise ConfigError(f"block_size is {block_size!r}; give a positive integer")


def _one_range(start: Positions, end: Positions) -> Ranges:
    empty = jnp.zeros_like(start)
    return Ranges(
        jnp.stack([start, empty], axis=-1).astype(jnp.int32),
        jnp.stack([end, empty], axis=-1).astype(jnp.int32),
    )


def block_causal(
    segment_ids: SegmentIds,
    block_size: int | None,
    *,
    origin: Positions | None = None,
    bidirectional_prompt: bool = False,
) -> Ranges:
    """Shows each query the keys of its document up to the end of its own block.

    block_size 1 is causal, None is bidirectional: the document is one block.

    Args:
        origin, bidirectional_prompt: where blocks start, as for `block_bounds`.
    """
    bounds = segments(segment_ids)
    _, block_end = block_bounds(
        bounds, block_size, origin, bidirectional_prompt=bidirectional_prompt
    )
    return _one_range(bounds.start, block_end)


def causal(segment_ids: SegmentIds) -> Ranges:
    """Shows each query the keys at or before it in its document (Eq. 3)."""
    return block_causal(segment_ids, 1)


def bidirectional(segment_ids: SegmentIds) -> Ranges:
    """Shows each query every key of its document (Eq. 5)."""
    return block_causal(segment_ids, None)


def hybrid(
    segment_ids: SegmentIds,
    block_size: int | None,
    noisy_index: Int[Array, "B N"] | None = None,
    *,
    origin: Positions | None = None,
    bidirectional_prompt: bool = False,
    causal_clean: bool = False,
    group_start: Positions | None = None,
) -> Ranges:
    """Lays out queries and keys as [noisy | clean], N + L of them (Eq. 7).

    A noisy query of block b sees the noisy keys of block b and the clean keys of its document's blocks before b; a
    clean query sees the clean keys of blocks up to its own, or with `causal_clean` those up to itself. With groups of
    blocks (arXiv 2606.29215, B.7 to B.9), a noisy query sees the noisy keys from its group's start to its block's end,
    and the clean keys before its group.

    Args:
        noisy_index: int32 [B, N], the clean position that each noisy one copies, ascending, with -1 (unused) only at
            the end; None: every position has its noisy copy, in place.
        origin, bidirectional_prompt: where blocks start, as for `block_bounds`.
        group_start: int32 [B, L], the first position of each position's group, where a block of its document starts;
            None: each block is a group.
    """
    bounds = segments(segment_ids)
    block_start, block_end = block_bounds(
        bounds, block_size, origin, bidirectional_prompt=bidirectional_prompt
    )
    clean_end = block_bounds(bounds, 1)[1] if causal_clean else block_end
    first = block_start
    if group_start is not None:
        # Within the document, whatever stands at padding.
        first = jnp.clip(group_start, bounds.start, block_start)
    if noisy_index is None:
        noisy_length = segment_ids.shape[1]
        own_group = (first, block_end)
        before = (bounds.start, first)
    else:
        noisy_length = noisy_index.shape[1]
        own_group, before = _indexed_noisy(bounds.start, first, block_end, noisy_index)
    clean = _one_range(bounds.start + noisy_length, clean_end + noisy_length)
    start = jnp.stack([own_group[0], before[0] + noisy_length], axis=-1)
    end = jnp.stack([own_group[1], before[1] + noisy_length], axis=-1)
    return Ranges(
        jnp.concatenate([start, clean.start], axis=1).astype(jnp.int32),
        jnp.concatenate([end, clean.end], axis=1).astype(jnp.int32),
    )


Bounds = tuple[Array, Array]


def _indexed_noisy(
    document_start: Array, group_start: Array, block_end: Array, noisy_index: Array
) -> tuple[Bounds, Bounds]:
    """Finds the ranges of noisy queries among noisy keys, and among clean keys, where some have no copy."""
    length = document_start.shape[1]
    used = noisy_index >= 0
    index = jnp.where(used, noisy_index, 0)
    take = jax.vmap(jnp.take)
    first = take(group_start, index)
    last = take(block_end, index)
    # Unused copies sort past every position, so that searching finds only used ones.
    order = jnp.where(used, noisy_index, length)
    find = jax.vmap(jnp.searchsorted)
    own_group = find(order, first), find(order, last)
    before = take(document_start, index), first

    def hide_unused(bounds: Bounds) -> Bounds:
        empty = jnp.zeros_like(index)
        return jnp.where(used, bounds[0], empty), jnp.where(used, bounds[1], empty)

    return hide_unused(own_group), hide_unused(before)
