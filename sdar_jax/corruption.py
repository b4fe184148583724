"""What is masked, and with which weight: the forward process (Eq. 4) and its variants, as pure functions of a key.

A draw belongs to a unit (a row, a document or a block) of the global batch of a step, so that splitting the batch over
devices or micro-batches afterwards changes no draw.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sdar_jax.errors import ConfigError, check_choices, is_number
from sdar_jax.visibility import block_bounds, segments

_REDRAWS = 10
# 2^32 / golden ratio: multiples of it, modulo 2^32, are spread evenly however many are taken.
_GOLDEN = 2654435769

NoiseRange = tuple[Array | float, Array | float]


@dataclasses.dataclass(frozen=True)
class CorruptionConfig:
    """A corruption policy. The defaults are SDAR's: t per document, each token with loss masked with p, weight 1 / p.

    Attributes:
        level: the unit that shares a noise level t: "row", "document" (SDAR) or "block" (BD3-LM, Eq. 7).
        draw: "independent"; "stratified": over the units of a batch that have tokens with loss, t is spread evenly
            (lower variance); or, for level "block", noise that rises from block to block: in a group of blocks
            "chain_uniform", each t uniform from the one before to t_max, the first from a uniform floor, or
            "chain_uniform_opt", the first from t_min (MultiTF, arXiv 2606.29215); in a document "monotone", the first t
            uniform, each further one up by at most an equal share of what is left to t_max (D2F, arXiv 2508.09192).
        distribution: distribution of t, before it is scaled to [t_min, t_max]: "uniform" or "beta" (with `beta`).
        t_min, t_max: the range of t. None is 0.001 for "bernoulli" and "floor", whose weight is 1 / t, else 0.
        mask: "bernoulli": each token with loss is masked with p = t, weight 1 / p; "exact": k = ceil(t n) of a unit's
            n tokens with loss, weight n / k (the same bound for uniform t in [0, 1], with lower variance); "floor":
            k = floor(t n), weight 1 / t, as MultiTF's released code has it: no unit is masked whole, and what has none
            masked adds nothing, so that the loss is biased low; "trajectory": of a unit that was committed in n steps
            the tokens of step floor((1 - t) n) and of later ones, weights as of "exact", which here are no bound. For
            batches with an `order`.
        weighting: "bound", as above, or "unit": 1 for each masked token, which is a reweighted objective and no bound,
            as is anything but uniform t over the whole range.
        complementary: each row gives a second view that masks exactly what the first left, weight 1 / (1 - p).
        at_least_one: a row with a token with loss and none masked is redrawn up to 10 times, then one is forced.
            For training: it biases a bound.

    Raises:
        ConfigError: an unknown name, or a range that is empty.
    """

    level: Literal["row", "document", "block"] = "document"
    draw: Literal["independent", "stratified", "chain_uniform", "chain_uniform_opt", "monotone"] = (
        "independent"
    )
    distribution: Literal["uniform", "beta"] = "uniform"
    beta: tuple[float, float] = (1.0, 1.0)
    t_min: float | None = None
    t_max: float = 1.0
    mask: Literal["bernoulli", "exact", "floor", "trajectory"] = "bernoulli"
    weighting: Literal["bound", "unit"] = "bound"
    complementary: bool = False
    at_least_one: bool = True

    def __post_init__(self):
        check_choices(self, "corruption ")
        low, high = self.range
        if not (is_number(low) and is_number(high) and 0 <= low <= high <= 1 and high > 0):
            raise ConfigError(
                f"corruption range [{low}, {high}] is not one; give 0 <= t_min <= t_max <= 1, t_max > 0"
            )
        if self.mask in ("bernoulli", "floor") and self.weighting == "bound" and low == 0:
            raise ConfigError(
                "corruption t_min is 0, so a weight 1 / t has no bound; use 0.001 or mask='exact'"
            )
        if self.rises and (self.level != "block" or self.distribution != "uniform"):
            raise ConfigError(
                f"corruption draw {self.draw!r} is of blocks, with a uniform distribution; set level='block' and leave "
                "distribution out, or use another draw"
            )
        if self.mask == "trajectory" and self.level == "row":
            raise ConfigError(
                "corruption mask 'trajectory' with level 'row': documents of a row were decoded apart; use 'block'"
            )
        if len(self.beta) != 2 or not all(is_number(x) and x > 0 for x in self.beta):
            raise ConfigError(f"corruption beta is {self.beta}; give two positive numbers")

    @property
    def range(self) -> tuple[float, float]:
        """[t_min, t_max] with the default filled in."""
        default = 1e-3 if self.mask in ("bernoulli", "floor") else 0.0
        return (default if self.t_min is None else self.t_min), self.t_max

    @property
    def rises(self) -> bool:
        """Whether noise rises from block to block."""
        return self.draw in ("chain_uniform", "chain_uniform_opt", "monotone")

    @property
    def needs_groups(self) -> bool:
        """Whether noise rises within groups of blocks."""
        return self.draw in ("chain_uniform", "chain_uniform_opt")

    @property
    def views(self) -> int:
        """Number of corrupted rows per clean row."""
        return 2 if self.complementary else 1


class Corrupted(NamedTuple):
    """The masked tokens. With a complementary pair, rows 2i and 2i + 1 are the views of row i.

    Attributes:
        masked: bool [B, L].
        weights: float32 [B, L], zero where not masked.
    """

    masked: Bool[Array, "B L"]
    weights: Float[Array, "B L"]


class _Units(NamedTuple):
    """The unit of each position, all [B, L].

    Attributes:
        start: where the unit starts in its row.
        num_loss_tokens: how many of its tokens have loss.
        stratum: its number among the units of the batch that have such tokens.
        rise_start: where noise starts to rise that rises from unit to unit; else None.
        stage: of a token with loss, how many different steps of its unit came before the one that committed it.
        num_stages: how many steps committed the tokens with loss of the unit.
    """

    start: Array
    num_loss_tokens: Array
    stratum: Array
    rise_start: Array | None = None
    stage: Array | None = None
    num_stages: Array | None = None


class _Draw(NamedTuple):
    masked: Array
    weights: Array
    complement_weights: Array


def corrupt(
    segment_ids: Int[Array, "B L"],
    loss_mask: Bool[Array, "B L"],
    key: jax.Array,
    config: CorruptionConfig,
    *,
    block_size: int | None,
    origin: Int[Array, "B L"] | None = None,
    group_start: Int[Array, "B L"] | None = None,
    order: Int[Array, "B L"] | None = None,
    noise_range: NoiseRange | None = None,
) -> Corrupted:
    """Draws what to mask among the tokens with loss of a global batch.

    Args:
        segment_ids: int32 [B, L], > 0 for each document of a packed row, 0 for padding.
        loss_mask: bool [B, L], tokens that may be masked and carry loss; the prompt and the padding are not.
        key: of the step.
        block_size: of the blocks that level "block" means.
        origin: where blocks are counted from, as for `visibility.block_bounds`; None: each document's first token.
        group_start: int32 [B, L], the first position of each position's group of blocks, for draws that need groups.
        order: when each token was committed, for mask "trajectory"; compared within a unit alone.
        noise_range: of t, in place of the config's; scalars.

    Returns:
        B rows, or 2 B with `config.complementary`.

    Raises:
        ConfigError: mask "trajectory" without an order.
    """
    loss_mask = loss_mask & (segment_ids > 0)
    units = _units(segment_ids, loss_mask, config, block_size, origin, group_start)
    if config.mask == "trajectory":
        units = _with_stages(units, loss_mask, order)
    low_high = config.range if noise_range is None else noise_range
    drawn = _draw(units, loss_mask, jax.random.fold_in(key, 0), config, low_high)
    if config.at_least_one:
        drawn = _redraw_empty_rows(drawn, units, loss_mask, key, config, low_high)
    masked = drawn.masked
    weights = drawn.weights
    if config.complementary:
        length = loss_mask.shape[1]
        masked = jnp.stack([masked, loss_mask & ~masked], axis=1).reshape(-1, length)
        weights = jnp.stack([weights, drawn.complement_weights], axis=1).reshape(-1, length)
    return Corrupted(masked, jnp.where(masked, weights, 0))


def _units(
    segment_ids: Array,
    loss_mask: Array,
    config: CorruptionConfig,
    block_size: int | None,
    origin: Array | None,
    group_start: Array | None,
) -> _Units:
    rows, length = segment_ids.shape
    index = jnp.broadcast_to(jnp.arange(length), (rows, length))
    start = _unit_start(segment_ids, index, config.level, block_size, origin)

    def numbered(firsts: Array) -> Array:
        """Numbers the units of the batch, given where each of them starts."""
        return jnp.cumsum(firsts.reshape(-1)).reshape(rows, length) - 1

    first = start == index
    number = numbered(first)
    counts = jnp.zeros(rows * length, jnp.int32).at[number].add(loss_mask.astype(jnp.int32))
    counts = counts[number]
    rise_start = None
    if config.rises:
        rise_start = group_start if config.needs_groups else segments(segment_ids).start
    return _Units(start, counts, numbered(first & (counts > 0)), rise_start)


def _with_stages(units: _Units, loss_mask: Array, order: Array | None) -> _Units:
    """Numbers the steps of each unit: those in which none of its tokens with loss was committed do not count."""
    if order is None:
        raise ConfigError(
            "corruption mask 'trajectory' and the batch has no order; use sources of format trajectory, or another mask"
        )
    take = partial(jnp.take_along_axis, axis=1)
    # Sorted, a unit stays where it is, as it is contiguous: its tokens with loss come first, by their step.
    places = jnp.lexsort((order, ~loss_mask, units.start), axis=-1)
    first = units.start == jnp.arange(order.shape[1])
    differs = first | (jnp.diff(take(order, places), prepend=0) != 0)
    new_step = (take(loss_mask, places) & differs).astype(jnp.int32)
    steps = jnp.cumsum(new_step, axis=1)
    steps -= take(steps - new_step, units.start)
    return units._replace(
        stage=take(steps, jnp.argsort(places, axis=-1)) - 1,
        num_stages=_sum_in_unit(new_step, units),
    )


def _unit_start(
    segment_ids: Array, index: Array, level: str, block_size: int | None, origin: Array | None
) -> Array:
    if level == "row":
        return jnp.zeros_like(index)
    bounds = segments(segment_ids)
    if level == "document":
        return bounds.start
    # Padding is a unit of its own, so that its blocks start somewhere.
    bounds = bounds._replace(end=jnp.maximum(bounds.end, index + 1))
    start, _ = block_bounds(bounds, block_size, origin)
    return start


def _draw(
    units: _Units,
    loss_mask: Array,
    key: jax.Array,
    config: CorruptionConfig,
    noise_range: NoiseRange,
) -> _Draw:
    level_key, token_key = jax.random.split(key)
    t = _noise_levels(units, level_key, config, noise_range)
    chance = jax.random.uniform(token_key, loss_mask.shape)
    if config.mask == "bernoulli":
        masked = loss_mask & (chance < t)
        share = t
    elif config.mask == "trajectory":
        masked = loss_mask & _is_left_at(t, units)
        share = _sum_in_unit(masked, units) / jnp.maximum(units.num_loss_tokens, 1)
    else:
        count = units.num_loss_tokens
        exact = config.mask == "exact"
        wanted = jnp.clip(jnp.ceil(t * count), 1, count) if exact else jnp.floor(t * count)
        masked = loss_mask & (_rank_in_unit(chance, units, loss_mask) < wanted)
        share = wanted / jnp.maximum(count, 1) if exact else t
    if config.weighting == "unit":
        return _Draw(masked, jnp.ones_like(share), jnp.ones_like(share))
    return _Draw(
        masked,
        weights=1 / jnp.where(share > 0, share, 1),
        complement_weights=1 / jnp.where(share < 1, 1 - share, 1),
    )


def _is_left_at(t: Array, units: _Units) -> Array:
    """Returns which tokens step floor((1 - t) n) of their unit's n, or a later one, committed.

    The state behind the last step has no mask, and is not drawn: t = 0 is the last step.
    """
    assert units.stage is not None and units.num_stages is not None
    step = jnp.floor((1 - t) * units.num_stages)
    return units.stage >= jnp.minimum(step, units.num_stages - 1)


def _sum_in_unit(x: Array, units: _Units) -> Array:
    row = jnp.arange(len(x))[:, None]
    sums = jnp.zeros(x.shape, jnp.int32).at[row, units.start].add(x.astype(jnp.int32))
    return jnp.take_along_axis(sums, units.start, axis=1)


def _noise_levels(
    units: _Units, key: jax.Array, config: CorruptionConfig, noise_range: NoiseRange
) -> Array:
    """Draws t of each position's unit, float32 [B, L]."""
    if units.rise_start is not None:
        return _rising_levels(units, units.rise_start, key, config, noise_range)
    if config.draw == "stratified":
        offset = jax.random.bits(key, (), jnp.uint32)
        # 24 bits, so that float32 holds the fraction exactly and it stays below 1.
        fraction = (offset + units.stratum.astype(jnp.uint32) * jnp.uint32(_GOLDEN)) >> 8
        uniform = fraction.astype(jnp.float32) / 2**24
    else:
        uniform = jnp.take_along_axis(
            jax.random.uniform(key, units.start.shape), units.start, axis=1
        )
    if config.distribution == "beta":
        uniform = _beta_quantile(uniform, *config.beta)
    low, high = noise_range
    return low + (high - low) * uniform


def _rising_levels(
    units: _Units,
    rise_start: Array,
    key: jax.Array,
    config: CorruptionConfig,
    noise_range: NoiseRange,
) -> Array:
    """Draws t of each position's block, float32 [B, L], which rises over the blocks from `rise_start` on.

    "chain_uniform": t_max - t of a block is a product of uniforms times the range: one of its own, one of each block of
    its group before it, and one of the group. "chain_uniform_opt" is without the last. "monotone": see the config.
    """
    own_key, first_key = jax.random.split(key)
    low, high = noise_range
    index = jnp.arange(units.start.shape[1])
    uniform = jax.random.uniform(own_key, units.start.shape)
    of_first = jax.random.uniform(first_key, units.start.shape)
    begins = (index == units.start) & (units.num_loss_tokens > 0)
    before = jnp.pad(jnp.cumsum(begins, axis=1), [(0, 0), (1, 0)])
    number = before[:, 1:] - 1 - jnp.take_along_axis(before, rise_start, axis=1)
    if config.draw == "monotone":
        rise = jnp.where(begins & (number > 0), uniform, 0)
        risen = _running(jnp.add, rise, rise_start == index)
        first = low + (high - low) * jnp.take_along_axis(of_first, rise_start, axis=1)
        most = jnp.max(jnp.where(begins, number, 0))
        return first + risen * (high - first) / jnp.maximum(most, 1)
    left = _running(jnp.multiply, jnp.where(begins, uniform, 1), rise_start == index)
    if config.draw == "chain_uniform":
        left *= jnp.take_along_axis(of_first, rise_start, axis=1)
    return high - (high - low) * left


def _running(operation: Callable, x: Array, starts: Array) -> Array:
    """Reduces x [B, L] along each row up to and with each place, beginning anew where `starts` is set."""

    def combine(before, after):
        x, starts = before
        y, starts_again = after
        return jnp.where(starts_again, y, operation(x, y)), starts | starts_again

    return jax.lax.associative_scan(combine, (x, starts), axis=1)[0]


def _beta_quantile(probability: Array, a: float, b: float) -> Array:
    """Inverts the Beta(a, b) distribution function, by 24 bisections: float32's resolution on [0, 1]."""

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        below = jax.scipy.special.betainc(a, b, middle) < probability
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    low, high = jax.lax.fori_loop(
        0, 24, halve, (jnp.zeros_like(probability), jnp.ones_like(probability))
    )
    return (low + high) / 2


def _rank_in_unit(chance: Array, units: _Units, loss_mask: Array) -> Array:
    """Ranks the tokens with loss within their unit by ascending `chance`; the others come last."""
    order = jnp.lexsort((chance, ~loss_mask, units.start), axis=-1)
    return jnp.argsort(order, axis=-1) - units.start


def _redraw_empty_rows(
    drawn: _Draw,
    units: _Units,
    loss_mask: Array,
    key: jax.Array,
    config: CorruptionConfig,
    noise_range: NoiseRange,
) -> _Draw:
    has_loss = loss_mask.any(axis=1)

    def empty(drawn: _Draw) -> Array:
        return has_loss & ~drawn.masked.any(axis=1)

    def any_empty(carry):
        attempt, drawn = carry
        return (attempt <= _REDRAWS) & empty(drawn).any()

    def redraw(carry):
        attempt, drawn = carry
        fresh = _draw(units, loss_mask, jax.random.fold_in(key, attempt), config, noise_range)
        again = empty(drawn)[:, None]
        return attempt + 1, jax.tree.map(lambda new, old: jnp.where(again, new, old), fresh, drawn)

    _, drawn = jax.lax.while_loop(any_empty, redraw, (1, drawn))
    chance = jax.random.uniform(jax.random.fold_in(key, _REDRAWS + 1), loss_mask.shape)
    chosen = jnp.argmax(jnp.where(loss_mask, chance, -1), axis=1)
    forced = jnp.arange(loss_mask.shape[1]) == chosen[:, None]
    return drawn._replace(masked=drawn.masked | (forced & empty(drawn)[:, None]))
