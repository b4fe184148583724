"""Groups of consecutive blocks that are decoded at once, for training on them (MultiTF, arXiv 2606.29215).

Where a block is trained as decoding with several open blocks meets it, it sees the noisy copy of the blocks of its own
group before it, and the clean copy of what is before the group. How blocks are cut into groups is a layout:

    systematic (g, h)    groups of g blocks, the first of h:  g in 2..G, h in 0..g-1
    random               sizes drawn from 2..G until all blocks are covered, in a random order

Groups are cut within runs: consecutive blocks of a document that have tokens with loss. So those of an answer start
with its first block, and hide nothing of the prompt from it. A block without loss is a group of its own.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sdar_jax.errors import ConfigError, is_int
from sdar_jax.paradigm import Paradigm
from sdar_jax.visibility import Positions, SegmentIds, block_bounds, segments


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """The layouts of groups that a row is trained in.

    Attributes:
        size: G, blocks of the largest group, which is how many decoding keeps open; at least 2.
        random_layouts: random layouts of each row, beside the (G + 2)(G - 1) / 2 systematic ones.
        rows: "all": each row is read once in every layout, as in the paper; "one": once, in one that is drawn for it at
            each step: the same loss on average, at less work a step.

    Raises:
        ConfigError: a value out of its range.
    """

    size: int = 4
    random_layouts: int = 2
    rows: Literal["all", "one"] = "one"

    def __post_init__(self):
        if not is_int(self.size) or self.size < 2:
            raise ConfigError(f"groups size is {self.size!r}; give 2 or more blocks, or no groups")
        if not is_int(self.random_layouts) or self.random_layouts < 0:
            raise ConfigError(
                f"groups random_layouts is {self.random_layouts!r}; give a number of at least 0"
            )
        if self.rows not in ("all", "one"):
            raise ConfigError(f"groups rows {self.rows!r} is unknown; use 'all' or 'one'")

    @property
    def systematic(self) -> list[tuple[int, int]]:
        """The systematic layouts (g, h)."""
        return [(g, h) for g in range(2, self.size + 1) for h in range(g)]

    @property
    def layouts(self) -> int:
        """How many layouts there are."""
        return len(self.systematic) + self.random_layouts

    @property
    def views(self) -> int:
        """Rows that the network reads for each row of a batch."""
        return self.layouts if self.rows == "all" else 1


def check_groups(paradigm: Paradigm) -> None:
    """Raises ConfigError where a model has no blocks that could be read in groups."""
    if not paradigm.two_copies:
        raise ConfigError("groups of blocks are given and the model has no blocks; leave them out")
    if paradigm.causal_clean:
        raise ConfigError(
            "groups of blocks are given and the model's clean positions are causal: it decodes one block after "
            "another; leave them out"
        )


class _Blocks(NamedTuple):
    """Each position's block, and the run of blocks with loss that it stands in. All [B, L].

    Attributes:
        start: where the block starts in its row.
        run_start: where the run starts; of a block without loss, where it starts itself.
        number: the block's number in its run, from 0.
        last: the number of the run's last block.
    """

    start: Positions
    run_start: Positions
    number: Positions
    last: Positions


def group_starts(
    segment_ids: SegmentIds,
    loss_mask: Bool[Array, "B L"],
    key: jax.Array,
    config: GroupConfig,
    *,
    block_size: int,
    origin: Positions | None = None,
) -> Int[Array, "V L"]:
    """Finds the first position of each position's group, in the layouts that each row is to be read in.

    Args:
        segment_ids: int32 [B, L].
        loss_mask: bool [B, L].
        key: draws the layouts.
        origin: as for `visibility.block_bounds`.

    Returns:
        int32 [B x config.views, L], the views of a row one after the other.
    """
    batch = len(segment_ids)
    blocks = _blocks(segment_ids, loss_mask & (segment_ids > 0), block_size, origin)
    if config.rows == "all":
        chosen = jnp.tile(jnp.arange(config.layouts), batch)
        blocks = jax.tree.map(lambda x: jnp.repeat(x, config.layouts, axis=0), blocks)
    else:
        chosen = jax.random.randint(jax.random.fold_in(key, 0), (batch,), 0, config.layouts)
    g, h = jnp.array(config.systematic).T
    of_row = jnp.minimum(chosen, len(config.systematic) - 1)[:, None]
    starts = blocks.run_start + block_size * _systematic(blocks.number, g[of_row], h[of_row])
    if config.random_layouts:
        keys = jax.random.split(jax.random.fold_in(key, 1), len(chosen))
        random = jax.vmap(lambda key, row: _random(key, row, config.size))(keys, blocks)
        starts = jnp.where((chosen >= len(config.systematic))[:, None], random, starts)
    return starts


def _blocks(segment_ids: Array, loss_mask: Array, block_size: int, origin: Array | None) -> _Blocks:
    bounds = segments(segment_ids)
    index = bounds.start + bounds.positions
    # Padding has no blocks: each of its positions stands for itself.
    start, end = block_bounds(bounds, block_size, origin)
    start = jnp.where(segment_ids > 0, start, index)
    end = jnp.where(segment_ids > 0, end, index + 1)
    length = segment_ids.shape[1]
    loss_before = jnp.pad(jnp.cumsum(loss_mask, axis=1), [(0, 0), (1, 0)])
    take = lambda x, at: jnp.take_along_axis(x, at, axis=1)
    has_loss = take(loss_before, end) > take(loss_before, start)
    before = jnp.maximum(start - 1, 0)
    goes_on = has_loss & take(has_loss, before) & (start > bounds.start)
    first = (index == start) & ~goes_on
    run_start = jax.lax.cummax(jnp.where(first, index, 0), axis=1)
    next_run = jnp.pad(first[:, 1:], [(0, 0), (0, 1)], constant_values=True)
    run_end = jax.lax.cummin(jnp.where(next_run, index + 1, length), axis=1, reverse=True)
    number = (start - run_start) // block_size
    return _Blocks(start, run_start, number, last=(run_end - 1 - run_start) // block_size)


def _systematic(number: Array, g: Array, h: Array) -> Array:
    """The number of the first block of each block's group: h blocks, then g again and again."""
    return jnp.where(number < h, 0, h + (number - h) // g * g)


def _random(key: jax.Array, blocks: _Blocks, size: int) -> Int[Array, " L"]:
    """Draws the groups of one row, [L]; its positions that start no block take no part."""
    length = blocks.start.shape[0]
    index = jnp.arange(length)
    size_key, order_key = jax.random.split(key)
    # Of the row's blocks, one after the other, behind them what stands for none.
    is_block = blocks.start == index
    at = jnp.nonzero(is_block, size=length, fill_value=length)[0]
    real = at < length
    run = jnp.take(blocks.run_start, at, mode="fill", fill_value=length)
    left = jnp.take(blocks.last - blocks.number, at, mode="fill", fill_value=0) + 1

    drawn = jnp.minimum(jax.random.randint(size_key, (length,), 2, size + 1), left)
    firsts = _reached(index + drawn, jnp.take(blocks.number, at, mode="fill", fill_value=0) == 0)
    sizes = jnp.where(firsts & real, _mended(drawn, firsts & real, left, run, size), 0)
    # Groups without blocks, as merged ones are, start where the next does.
    order = jnp.lexsort((jax.random.uniform(order_key, (length,)), run))
    shuffled = sizes[order]
    starts = jnp.zeros(length, bool).at[jnp.cumsum(shuffled) - shuffled].set(True, mode="drop")
    first_block = jax.lax.cummax(jnp.where(starts, index, 0))
    number_in_row = jnp.cumsum(is_block) - 1
    return at[first_block[number_in_row]]


def _reached(following: Array, start: Array) -> Array:
    """Marks what is reached from `start` by stepping from i to following[i] > i, by doubling the steps."""
    length = start.shape[0]

    def double(_, carry):
        reached, following = carry
        hits = (
            jnp.zeros(length, bool).at[jnp.where(reached, following, length)].set(True, mode="drop")
        )
        return reached | hits, jnp.take(following, following, mode="fill", fill_value=length)

    rounds = max(length - 1, 1).bit_length()
    return jax.lax.fori_loop(0, rounds, double, (start, following))[0]


def _mended(sizes: Array, firsts: Array, left: Array, run: Array, largest: int) -> Array:
    """Gets rid of a last group of one block: it joins the run's first group that has room, or takes a block from the
    first of three and more. Alone in its run, or among groups of two that are full, it stays."""
    length = sizes.shape[0]
    index = jnp.arange(length)
    alone = firsts & (left == 1) & (sizes == 1)
    lone_run = (
        jnp.zeros(length + 1, bool)
        .at[jnp.where(alone, run, length + 1)]
        .set(True, mode="drop")[run]
    )
    others = firsts & ~alone & lone_run

    def first_of_run(which: Array) -> tuple[Array, Array]:
        """Marks the first of `which` in each run, and whether a block's run has one."""
        at = jnp.full(length + 1, length).at[run].min(jnp.where(which, index, length))[run]
        return which & (index == at), at < length

    joins, has_room = first_of_run(others & (sizes < largest))
    gives, has_three = first_of_run(others & (sizes >= 3))
    gives &= ~has_room
    sizes = sizes + joins - gives
    return jnp.where(alone, jnp.where(has_room, 0, jnp.where(has_three, 2, 1)), sizes)
