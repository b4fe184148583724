"""Corruption policies: what must hold for any packed batch, exactly."""

import dataclasses
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
from tests.tiny import pack, segment_rows

ROWS, LENGTH = 3, 24
POLICIES = [
    CorruptionConfig(),
    CorruptionConfig(level="block", mask="exact", draw="stratified", at_least_one=False),
    CorruptionConfig(level="row", t_min=0.2, t_max=0.7, complementary=True),
    CorruptionConfig(level="document", mask="exact", complementary=True, t_max=0.8),
    CorruptionConfig(
        level="block", distribution="beta", beta=(2.0, 3.0), weighting="unit", draw="stratified"
    ),
]
some_policy = st.sampled_from(POLICIES)
draw = partial(jax.jit, static_argnames=("config", "block_size"))(corrupt)


def loss_masks(rows=ROWS, length=LENGTH):
    row = st.lists(st.booleans(), min_size=length, max_size=length)
    return st.lists(row, min_size=rows, max_size=rows).map(np.array)


def units(segment_ids: np.ndarray, level: str, block_size: int) -> np.ndarray:
    """The number of each position's unit, counted again in plain Python."""
    numbers = np.zeros(segment_ids.shape, int)
    number = -1
    for row in range(len(segment_ids)):
        for i in range(segment_ids.shape[1]):
            if i == 0 or segment_ids[row, i] != segment_ids[row, i - 1]:
                first = i
            starts = {"row": i == 0, "document": i == first, "block": (i - first) % block_size == 0}
            number += starts[level]
            numbers[row, i] = number
    return numbers


def levels_shown(masked, weights, unit) -> list[np.ndarray]:
    """For each unit in which something is masked, the weights of what is."""
    return [weights[(unit == u) & masked] for u in np.unique(unit[masked])]


@given(segment_rows(ROWS, LENGTH), loss_masks(), some_policy, st.integers(0, 2**31 - 1))
def test_only_tokens_with_loss_are_masked_and_weighted(segment_ids, loss_mask, config, seed):
    out = draw(segment_ids, loss_mask, jax.random.key(seed), config, block_size=4)
    masked, weights = np.asarray(out.masked), np.asarray(out.weights)
    views = config.views
    assert masked.shape == weights.shape == (ROWS * views, LENGTH) and weights.dtype == np.float32
    allowed = np.repeat(loss_mask & (segment_ids > 0), views, axis=0)
    assert not (masked & ~allowed).any()
    np.testing.assert_array_equal(weights != 0, masked)
    assert np.isfinite(weights).all() and (weights >= 0).all()
    if config.at_least_one:
        np.testing.assert_array_equal(masked[::views].any(axis=1), allowed[::views].any(axis=1))
    if config.complementary:
        np.testing.assert_array_equal(masked[0::2] ^ masked[1::2], allowed[::2])


@given(segment_rows(ROWS, LENGTH), some_policy, st.integers(0, 2**31 - 1))
def test_a_unit_has_one_noise_level(segment_ids, config, seed):
    """So its masked tokens have one weight: blocks count from the first token of each document."""
    out = draw(segment_ids, segment_ids > 0, jax.random.key(seed), config, block_size=4)
    masked, weights = np.asarray(out.masked), np.asarray(out.weights)
    unit = units(segment_ids, config.level, 4)
    for view in range(config.views):
        shown = levels_shown(masked[view :: config.views], weights[view :: config.views], unit)
        assert all((same == same[0]).all() for same in shown)


@pytest.mark.parametrize("level", ["row", "document", "block"])
def test_units_draw_apart(level):
    """Different units have different levels: as many as the definition counts."""
    segment_ids = pack([10, 14], [24], length=24)
    config = CorruptionConfig(level=level, t_min=0.9)
    out = draw(segment_ids, segment_ids > 0, jax.random.key(0), config, block_size=4)
    unit = units(segment_ids, level, 4)
    shown = levels_shown(np.asarray(out.masked), np.asarray(out.weights), unit)
    assert len(shown) == unit.max() + 1 == {"row": 2, "document": 3, "block": 13}[level]
    assert len({float(weights[0]) for weights in shown}) == len(shown)


@given(
    segment_rows(ROWS, LENGTH),
    loss_masks(),
    st.integers(0, 2**31 - 1),
    st.sampled_from(["row", "block"]),
)
def test_exact_masks_k_of_n_with_weight_n_over_k(segment_ids, loss_mask, seed, level):
    """So the weights of a unit add up to its tokens with loss, whatever was drawn."""
    config = CorruptionConfig(level=level, mask="exact", at_least_one=False)
    out = draw(segment_ids, loss_mask, jax.random.key(seed), config, block_size=4)
    unit, allowed = units(segment_ids, level, 4), loss_mask & (segment_ids > 0)
    for number in np.unique(unit):
        here = unit == number
        n, k = (allowed & here).sum(), np.asarray(out.masked)[here].sum()
        assert 1 <= k <= n if n else k == 0
        np.testing.assert_allclose(np.asarray(out.weights)[here].sum(), n, rtol=1e-6)


def test_complement_weights_are_one_over_what_was_left():
    segment_ids = jnp.ones((64, 32), jnp.int32)
    for mask in ("bernoulli", "exact"):
        config = CorruptionConfig(level="row", mask=mask, complementary=True, t_min=0.1, t_max=0.9)
        weights = np.asarray(
            draw(segment_ids, segment_ids > 0, jax.random.key(0), config, block_size=None).weights
        )
        share, rest = 1 / weights[0::2].max(axis=1), 1 / weights[1::2].max(axis=1)
        np.testing.assert_allclose(share + rest, 1, rtol=1e-5)


def test_the_complement_of_everything_has_no_weight():
    segment_ids = jnp.ones((2, 6), jnp.int32)
    config = CorruptionConfig(mask="exact", t_min=1.0, complementary=True)
    out = draw(segment_ids, segment_ids > 0, jax.random.key(0), config, block_size=None)
    np.testing.assert_array_equal(out.weights, [[1] * 6, [0] * 6] * 2)


@pytest.mark.parametrize(
    "config", POLICIES, ids=lambda config: f"{config.level}-{config.mask}-{config.distribution}"
)
def test_rows_without_a_token_with_loss(config):
    segment_ids = pack([8], [-8], [4, 4], length=8)
    loss_mask = np.ones_like(segment_ids, bool)
    loss_mask[0] = False
    out = draw(segment_ids, loss_mask, jax.random.key(1), config, block_size=4)
    masked = np.asarray(out.masked).reshape(3, config.views, 8)
    assert not masked[:2].any() and np.isfinite(out.weights).all()
    assert masked[2].any()


def test_the_key_alone_decides():
    segment_ids = pack([10, 14], [24], length=24)
    first, again, other = (
        draw(segment_ids, segment_ids > 0, jax.random.key(seed), CorruptionConfig(), block_size=4)
        for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first.weights, again.weights)
    assert (np.asarray(first.weights) != np.asarray(other.weights)).any()


def test_no_block_size_is_one_block_a_document():
    segment_ids = pack([10, 14], [24], length=24)
    by_block = dataclasses.replace(CorruptionConfig(), level="block")
    a = draw(segment_ids, segment_ids > 0, jax.random.key(0), by_block, block_size=None)
    b = draw(segment_ids, segment_ids > 0, jax.random.key(0), CorruptionConfig(), block_size=4)
    np.testing.assert_array_equal(a.weights, b.weights)


nan = float("nan")
BAD = [
    ({"level": "token"}, "level 'token'", "'document'"),
    ({"draw": "antithetic"}, "draw 'antithetic'", "'stratified'"),
    ({"distribution": "normal"}, "distribution 'normal'", "'beta'"),
    ({"mask": "bernouli"}, "mask 'bernouli'", "'bernoulli'"),
    ({"weighting": "one"}, "weighting 'one'", "'unit'"),
    ({"t_min": -0.1}, "[-0.1, 1.0]", "0 <= t_min"),
    ({"t_max": 1.5}, "[0.001, 1.5]", "t_max <= 1"),
    ({"t_min": 0.6, "t_max": 0.4}, "[0.6, 0.4]", "t_min <= t_max"),
    ({"t_min": nan}, "[nan, 1.0]", "0 <= t_min"),
    ({"t_min": "a"}, "[a, 1.0]", "0 <= t_min"),
    ({"t_max": 0.0, "mask": "exact"}, "[0.0, 0.0]", "t_max > 0"),
    ({"t_min": 0.0}, "t_min is 0", "0.001"),
    ({"beta": (0.0, 1.0)}, "(0.0, 1.0)", "two positive numbers"),
    ({"beta": (nan, 1.0)}, "(nan, 1.0)", "two positive numbers"),
    ({"beta": (1.0, 1.0, 1.0)}, "(1.0, 1.0, 1.0)", "two positive numbers"),
]


@pytest.mark.parametrize("change, value, fix", BAD, ids=lambda part: str(part))
def test_bad_config(change, value, fix):
    with refused(ConfigError, "corruption", value, fix):
        CorruptionConfig(**change)
