"""Masks by the order in which a model committed its tokens: its own states, one after the other."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar_jax.corruption import CorruptionConfig, corrupt
from sdar_jax.errors import ConfigError
from tests.bad_input import refused
from tests.corruption.test_corruption import LENGTH, ROWS, loss_masks, units
from tests.tiny import pack, segment_rows

draw = partial(jax.jit, static_argnames=("config", "block_size"))(corrupt)
row = st.lists(st.integers(0, 5), min_size=LENGTH, max_size=LENGTH)
orders = st.lists(row, min_size=ROWS, max_size=ROWS)


def at(t: float, **fields) -> CorruptionConfig:
    """Every unit at one noise level."""
    return CorruptionConfig(mask="trajectory", t_min=t, t_max=t, **fields)


def masked_by_hand(order, loss_mask, unit, t: float) -> np.ndarray:
    """A unit with n different steps is masked from its step number floor((1 - t) n) on."""
    masked = np.zeros(order.shape, bool)
    for number in np.unique(unit):
        has_loss = (unit == number) & loss_mask
        steps = np.unique(order[has_loss])
        if len(steps):
            first = steps[min(int(np.floor((1 - t) * len(steps))), len(steps) - 1)]
            masked |= has_loss & (order >= first)
    return masked


@pytest.mark.parametrize("level", ["block", "document"])
@given(segment_rows(ROWS, LENGTH), loss_masks(), orders, st.sampled_from([0.0625, 0.375, 0.5, 0.875, 1.0]))  # fmt: skip
def test_the_state_of_a_stage(level, segment_ids, loss_mask, order, t):
    """Whatever shares a step, wherever the prompt ends, and however steps are counted."""
    loss_mask, order = loss_mask & (segment_ids > 0), np.array(order, np.int32)
    unit = units(segment_ids, level, 4)
    found = draw(segment_ids, loss_mask, jax.random.key(0), at(t, level=level), block_size=4, order=order)  # fmt: skip
    expected = masked_by_hand(order, loss_mask, unit, t)
    np.testing.assert_array_equal(found.masked, expected)
    for number in np.unique(unit[expected]):
        share = expected[unit == number].sum() / loss_mask[unit == number].sum()
        weights = np.asarray(found.weights)[(unit == number) & expected]
        np.testing.assert_allclose(weights, 1 / share, rtol=1e-6)


def test_consecutive_states_differ_by_what_a_step_committed():
    """From the first, of masks alone, to the last, where the last step's tokens are left."""
    order = np.array([[-1, -1, 3, 0, 9, 7, 7, 5, 12, 10, 11, 13]], np.int32)
    segment_ids, loss_mask = np.ones_like(order), order >= 0
    policy = CorruptionConfig(mask="trajectory", level="block")

    def state(t: float) -> np.ndarray:
        key, options = jax.random.key(0), {"block_size": 4, "order": order, "noise_range": (t, t)}
        return np.asarray(draw(segment_ids, loss_mask, key, policy, **options).masked[0])

    # Blocks of 2, 3 and 4 steps; the levels of each stage of each.
    for first, count, steps in ((2, 2, [0, 3]), (4, 4, [5, 7, 9]), (8, 4, [10, 11, 12, 13])):
        block = slice(first, first + count)
        stages = [state(1 - m / len(steps) - 1e-3 * (m > 0)) for m in range(len(steps))]
        states = [stage[block] for stage in stages] + [np.zeros(count, bool)]
        assert states[0].all()
        for m, step in enumerate(steps):
            np.testing.assert_array_equal(states[m] ^ states[m + 1], order[0, block] == step)
            assert not (states[m + 1] & ~states[m]).any()


@pytest.mark.parametrize("draw_of", ["independent", "stratified"])
def test_every_state_is_drawn_as_often(draw_of):
    """Uniform t over [0, 1]: each of four stages a quarter; over [0.5, 1] the first two alone."""
    rows = 256
    order = jnp.tile(jnp.array([2, 0, 3, 1] * 4, jnp.int32), (rows, 1))
    ones = jnp.ones_like(order)
    for low, expected in ((0.0, [0, 0.25, 0.25, 0.25, 0.25]), (0.5, [0, 0, 0, 0.5, 0.5])):
        config = CorruptionConfig(mask="trajectory", level="block", draw=draw_of, t_min=low)
        found = draw(ones, ones > 0, jax.random.key(2), config, block_size=4, order=order)
        counts = np.asarray(found.masked).reshape(-1, 4).sum(axis=1)
        np.testing.assert_allclose(np.bincount(counts, minlength=5) / len(counts), expected, atol=0.06)  # fmt: skip


def test_the_other_view_masks_what_was_committed_before():
    order = jnp.array([[2, 0, 3, 1, 4, 5, 6, 7]], jnp.int32)
    ones = jnp.ones_like(order)
    config = at(0.5, level="block", weighting="unit", complementary=True)
    found = draw(ones, ones > 0, jax.random.key(0), config, block_size=4, order=order)
    expected = [[1, 0, 1, 0, 0, 0, 1, 1], [0, 1, 0, 1, 1, 1, 0, 0]]
    np.testing.assert_array_equal(found.masked, expected)
    np.testing.assert_array_equal(found.weights, expected)


def test_a_range_that_is_data_takes_the_place_of_the_configs():
    order = jnp.array([[0, 1, 2, 3, 0, 1, 2, 3]], jnp.int32)
    ones = jnp.ones_like(order)
    config = CorruptionConfig(mask="trajectory", level="block")
    compiled = jax.jit(
        lambda t: corrupt(
            ones, ones > 0, jax.random.key(0), config, block_size=4, order=order, noise_range=(t, t)
        ).masked.sum()
    )
    assert [int(compiled(t)) for t in (0.0, 0.25, 0.5, 0.75, 1.0)] == [2, 2, 4, 6, 8]
    assert compiled._cache_size() == 1


def test_what_is_refused():
    with refused(ConfigError, "mask 'trajectory' with level 'row'", "use 'block'"):
        CorruptionConfig(mask="trajectory", level="row")
    segment_ids = pack([8], length=8)
    with refused(ConfigError, "the batch has no order; use sources of format trajectory"):
        draw(segment_ids, segment_ids > 0, jax.random.key(0), at(0.5), block_size=4)
