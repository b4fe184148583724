"""Groups of blocks against plain Python: layouts, what they see, and the loss on them."""

from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar_jax import block_diffusion_loss, visibility
from sdar_jax.corruption import CorruptionConfig
from sdar_jax.errors import ConfigError
from sdar_jax.groups import GroupConfig, group_starts
from sdar_jax.objectives import Batch, ObjectiveConfig, make_inputs
from tests.bad_input import refused
from tests.groups import oracle
from tests.objectives import oracle as networks
from tests.tiny import MASK, VOCAB, pack, segment_rows, tiny_model

ROWS, LENGTH = 3, 24
drawn = partial(jax.jit, static_argnames=("config", "block_size"))(group_starts)


def loss_masks():
    row = st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH)
    return st.lists(row, min_size=ROWS, max_size=ROWS).map(np.array)


def one_run(blocks: int, prompt: int = 0, cut: int = 0, block_size: int = 3):
    """A document of a prompt and an answer of so many blocks of 3, the last of them cut; then padding."""
    length = prompt // block_size * block_size + blocks * block_size - cut
    segment_ids = np.zeros((1, 30), np.int32)
    segment_ids[0, :length] = 1
    loss_mask = np.zeros((1, 30), bool)
    loss_mask[0, prompt:length] = True
    return segment_ids, loss_mask


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("prompt", [0, 1, 5, 6])
@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5, 6, 7])
def test_systematic_layouts_and_their_masks(blocks, prompt, size):
    segment_ids, loss_mask = one_run(blocks, prompt, cut=blocks % 3 if blocks > 1 else 0)
    config = GroupConfig(size=size, random_layouts=0, rows="all")
    found = drawn(segment_ids, loss_mask, jax.random.key(0), config, block_size=3)
    assert len(found) == config.views == (size + 2) * (size - 1) // 2
    first_block = prompt // 3
    for row, (g, h) in zip(np.asarray(found), config.systematic, strict=True):
        first = np.array(oracle.starts(oracle.systematic(blocks, g, h))) + first_block
        answer = np.arange(first_block * 3, segment_ids.sum())
        np.testing.assert_array_equal(row[answer], first[answer // 3 - first_block] * 3)
        before = np.arange(first_block * 3)
        np.testing.assert_array_equal(row[before], before // 3 * 3)
        ranges = visibility.hybrid(jnp.array(segment_ids), 3, group_start=jnp.array(row)[None])
        np.testing.assert_array_equal(
            ranges.sees(jnp.arange(60))[0], oracle.dense(segment_ids[0], 3, row)
        )


@given(
    segment_rows(ROWS, LENGTH), loss_masks(), st.sampled_from([2, 3, 4]), st.integers(0, 2**31 - 1)
)
def test_random_layouts_cover_each_run(segment_ids, loss_mask, size, seed):
    config = GroupConfig(size=size, random_layouts=1, rows="all")
    found = np.asarray(drawn(segment_ids, loss_mask, jax.random.key(seed), config, block_size=2))
    for row in range(ROWS):
        starts = found[(row + 1) * config.views - 1]
        in_runs = set()
        for run in oracle.runs(segment_ids[row], loss_mask[row], 2):
            in_runs |= set(run)
            sizes = list(Counter(starts[run].tolist()).values())
            assert starts[run].tolist() == [run[first] for first in oracle.starts(sizes)]
            assert max(sizes) <= size
            # A group of one is left only where no other can take it in, or give to it.
            assert 1 not in sizes or sizes == [1] or size == 2
            for first in run:
                assert (
                    starts[first : first + 2][
                        segment_ids[row, first : first + 2] == segment_ids[row, first]
                    ]
                    == starts[first]
                ).all()
        for i in range(LENGTH):
            alone = segment_ids[row, i] == 0 or all(
                i not in (first, first + 1) for first in in_runs
            )
            assert not alone or starts[i] in (i, i - 1)


def test_random_sizes_and_their_order():
    """Of 5 blocks in groups of up to 3: 2 + 3 as often as 3 + 2, and 2 + 2 + 1, mended to 3 + 2, half of the time."""
    segment_ids, loss_mask = one_run(5)
    rows = 4000
    config = GroupConfig(size=3, random_layouts=1, rows="all")
    repeat = lambda x: np.repeat(x, rows, axis=0)
    found = drawn(repeat(segment_ids), repeat(loss_mask), jax.random.key(3), config, block_size=3)
    random = np.asarray(found)[config.views - 1 :: config.views, :15:3]
    counts = Counter(tuple(row) for row in random.tolist())
    assert set(counts) == {(0, 0, 6, 6, 6), (0, 0, 0, 9, 9)}
    assert abs(counts[0, 0, 6, 6, 6] / rows - 0.5) < 4 * 0.5 / np.sqrt(rows)


def test_one_row_is_drawn_evenly_from_all_layouts():
    segment_ids, loss_mask = one_run(7)
    rows = 9000
    repeat = lambda x: np.repeat(x, rows, axis=0)
    one = GroupConfig(size=4, random_layouts=0, rows="one")
    found = np.asarray(
        drawn(repeat(segment_ids), repeat(loss_mask), jax.random.key(1), one, block_size=3)
    )
    assert found.shape == (rows, 30)
    counts = Counter(tuple(row) for row in found.tolist())
    everything = drawn(
        segment_ids, loss_mask, jax.random.key(1), GroupConfig(4, 0, "all"), block_size=3
    )
    assert set(counts) == {tuple(row) for row in np.asarray(everything).tolist()}
    assert max(abs(count - rows / 9) for count in counts.values()) < 5 * np.sqrt(rows / 9)


def test_an_indexed_copy_sees_what_a_full_one_does():
    segment_ids, loss_mask = one_run(6, prompt=7)
    config = GroupConfig(size=4, random_layouts=2, rows="all")
    starts = drawn(segment_ids, loss_mask, jax.random.key(5), config, block_size=3)
    segment_ids = jnp.repeat(jnp.array(segment_ids), config.views, axis=0)
    index = np.full((config.views, 22), -1, np.int32)
    index[:, :18] = np.arange(6, 24)
    indexed = visibility.hybrid(segment_ids, 3, jnp.array(index), group_start=starts).sees(
        jnp.arange(52)
    )
    full = visibility.hybrid(segment_ids, 3, group_start=starts).sees(jnp.arange(60))
    kept = np.concatenate([np.arange(6, 24), np.arange(30, 60)])
    kept_of_indexed = np.concatenate([np.arange(18), np.arange(22, 52)])
    np.testing.assert_array_equal(
        indexed[:, kept_of_indexed][:, :, kept_of_indexed], full[:, kept][:, :, kept]
    )


@pytest.mark.parametrize(
    "bad", [{"size": 1}, {"size": 2.5}, {"random_layouts": -1}, {"rows": "some"}]
)
def test_bad_groups_are_refused(bad):
    with refused(ConfigError):
        GroupConfig(**bad)


def random_batch(seed: int):
    random = np.random.default_rng(seed)
    segment_ids = pack([9, 12], [17, -4], length=21)
    tokens = random.integers(0, VOCAB - 1, segment_ids.shape).astype(np.int32)
    noisy = np.where(random.random(tokens.shape) < 0.5, MASK, tokens).astype(np.int32)
    weights = np.where(noisy == MASK, random.exponential(2.0, noisy.shape), 0.0)
    return tokens, noisy, weights, segment_ids


@jax.jit
def loss_and_gradients(model, tokens, noisy, weights, segment_ids, group_start):
    return jax.value_and_grad(
        lambda model: block_diffusion_loss(
            model,
            tokens,
            noisy,
            weights,
            block_size=4,
            segment_ids=segment_ids,
            group_start=group_start,
        )
    )(model)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_loss_on_groups_equals_a_dense_mask(seed, x64):
    tokens, noisy, weights, segment_ids = random_batch(seed)
    config = GroupConfig(size=3, random_layouts=1)
    starts = np.asarray(
        drawn(segment_ids, segment_ids > 0, jax.random.key(seed), config, block_size=4)
    )
    model = tiny_model()
    found = loss_and_gradients(model, tokens, noisy, weights, segment_ids, starts)
    mask = np.stack(
        [oracle.dense(ids, 4, row) for ids, row in zip(segment_ids, starts, strict=True)]
    )
    place = np.asarray(visibility.segments(jnp.array(segment_ids)).positions)
    expected = networks.loss_and_gradients(
        model,
        np.concatenate([noisy, tokens], axis=1),
        np.concatenate([place, place], axis=1),
        mask,
        tokens,
        weights,
    )
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-11)
    for ours, theirs in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9 * float(abs(theirs).max()))


def test_a_group_of_each_block_is_plain_sdar_bit_for_bit():
    tokens, noisy, weights, segment_ids = random_batch(3)
    bounds = visibility.segments(jnp.array(segment_ids))
    own, _ = visibility.block_bounds(bounds, 4)
    model = tiny_model(jnp.float32)
    grouped = loss_and_gradients(model, tokens, noisy, weights, segment_ids, own)
    plain = loss_and_gradients(model, tokens, noisy, weights, segment_ids, None)
    for ours, theirs in zip(jax.tree.leaves(grouped), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("rows", ["all", "one"])
def test_inputs_of_a_batch_read_every_row_in_its_layouts(rows):
    tokens, _, _, segment_ids = random_batch(4)
    config = ObjectiveConfig(
        CorruptionConfig(level="block", draw="chain_uniform", mask="exact"),
        groups=GroupConfig(size=3, random_layouts=2, rows=rows),
    )
    batch = Batch(*jax.tree.map(jnp.array, (tokens, segment_ids, segment_ids > 0)))
    model = tiny_model(jnp.float32).config
    inputs = make_inputs(batch, jax.random.key(0), config, model)
    views = 7 if rows == "all" else 1
    assert config.layouts == views
    assert inputs.tokens.shape == (2 * views, 42)
    np.testing.assert_array_equal(inputs.tokens[:, 21:], np.repeat(tokens, views, axis=0))
    np.testing.assert_array_equal(inputs.normalizer, np.repeat((segment_ids > 0).sum(1), views))
    ranges = inputs.ranges
    assert (np.asarray(ranges.start[:, :21, 0] + 4) <= np.asarray(ranges.end[:, :21, 0])).any()
    if rows == "all":
        assert len({np.asarray(row).tobytes() for row in ranges.start[views:]}) >= 5


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"objective": "masked_diffusion", "block_size": None}, "leave them out"),
        ({"causal_clean": True}, "causal"),
    ],
)
def test_models_without_such_blocks_are_refused(changes, fix):
    tokens = random_batch(5)[0]
    model = tiny_model(jnp.float32, **changes)
    with refused(ConfigError, "groups", fix):
        make_inputs(
            Batch(jnp.array(tokens), jnp.ones_like(tokens), jnp.ones_like(tokens, bool)),
            jax.random.key(0),
            ObjectiveConfig(groups=GroupConfig()),
            model.config,
        )


def test_settings_that_contradict_each_other_are_refused():
    with refused(ConfigError, "chain_uniform", "groups"):
        ObjectiveConfig(CorruptionConfig(level="block", draw="chain_uniform"))
    with refused(ConfigError, "complementary", "groups"):
        ObjectiveConfig(CorruptionConfig(complementary=True), groups=GroupConfig())
    with refused(ConfigError, "chain_uniform", "level='block'"):
        CorruptionConfig(draw="chain_uniform")
    with refused(ConfigError, "group_start", "(2, 20)"):
        block_diffusion_loss(
            tiny_model(jnp.float32),
            *random_batch(6)[:3],
            block_size=4,
            group_start=np.zeros((2, 20), np.int32),
        )
