"""Each objective as inputs: what the network reads, what it predicts, and by what the sum is divided."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdar_jax import ModelConfig, logits
from sdar_jax.corruption import CorruptionConfig, corrupt
from sdar_jax.errors import ConfigError
from sdar_jax.objectives import Batch, ObjectiveConfig, make_inputs
from sdar_jax.weighted_loss import weighted_loss
from tests.bad_input import refused
from tests.objectives import oracle
from tests.tiny import MASK, pack, tiny_model

ROWS, LENGTH = 3, 12
SEGMENTS = pack([7, 5], [12], [4, 4, -4], length=LENGTH)
OBJECTIVES = ["autoregressive", "masked_diffusion", "block_diffusion"]


def make_batch(seed: int = 0, loss_share: float = 0.7, noisy_index=None) -> Batch:
    random = np.random.default_rng(seed)
    tokens = random.integers(0, MASK, (ROWS, LENGTH)).astype(np.int32)
    loss_mask = (random.random((ROWS, LENGTH)) < loss_share) & (SEGMENTS > 0)
    return Batch(*map(jnp.asarray, (tokens, SEGMENTS, loss_mask)), noisy_index)


def config_for(objective: str) -> ModelConfig:
    return dataclasses.replace(tiny_model(jnp.float32).config, objective=objective)


DEFAULT = ObjectiveConfig()


@partial(jax.jit, static_argnames=("config", "objective"))
def make(batch, key, config=DEFAULT, objective="block_diffusion"):
    return make_inputs(batch, key, config, config_for(objective))


@jax.jit
def loss_and_gradients(model, inputs):
    return jax.value_and_grad(weighted_loss, has_aux=True)(model, inputs)


@partial(jax.jit, static_argnames="corruption")
def draw(batch, key, corruption):
    return corrupt(batch.segment_ids, batch.loss_mask, key, corruption, block_size=4)


def row_of(inputs, row: int):
    return jax.tree.map(lambda x: x[row : row + 1], inputs)


def test_autoregressive_is_the_shifted_cross_entropy(x64):
    """As transformers computes it: logits[:-1] against labels[1:], -100 where nothing is asked, within documents."""
    batch = make_batch()
    (total, metrics), _ = loss_and_gradients(
        tiny_model(), make(batch, jax.random.key(0), objective="autoregressive")
    )
    causal = jax.jit(partial(logits, block_size=1))(
        tiny_model(), batch.tokens, segment_ids=batch.segment_ids
    )
    shifted = np.asarray(causal)[:, :-1]
    labels = np.where(batch.loss_mask, batch.tokens, -100)
    labels[:, 1:][SEGMENTS[:, 1:] != SEGMENTS[:, :-1]] = -100
    labels = labels[:, 1:]
    log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    asked = labels != -100
    nll = -np.take_along_axis(log_probs, np.where(asked, labels, 0)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(total, nll[asked].sum(), rtol=1e-12)
    np.testing.assert_allclose(metrics.nll, nll[asked].sum(), rtol=1e-6)
    assert metrics.num_loss_tokens == asked.sum()
    assert metrics.correct == (shifted.argmax(-1) == labels)[asked].sum()


def test_autoregressive_divides_by_what_it_asks():
    batch = make_batch()
    asked = np.asarray(batch.loss_mask)[:, 1:] & (SEGMENTS[:, 1:] == SEGMENTS[:, :-1])
    inputs = make(batch, jax.random.key(0), objective="autoregressive")
    np.testing.assert_array_equal(inputs.normalizer, asked.sum(axis=1))


def test_masked_diffusion_equals_the_dense_mask(x64):
    """Every key of its document, the noisy copy alone, predicted in place."""
    inputs = make(make_batch(), jax.random.key(1), objective="masked_diffusion")
    assert inputs.tokens.shape == (ROWS, LENGTH)
    together = (SEGMENTS[:, :, None] == SEGMENTS[:, None]) & (SEGMENTS[:, None] > 0)
    found = loss_and_gradients(tiny_model(), inputs)
    arguments = (
        inputs.tokens,
        inputs.positions,
        together,
        inputs.targets,
        np.asarray(inputs.weights, np.float64),
    )
    expected = oracle.loss_and_gradients(tiny_model(), *arguments)
    np.testing.assert_allclose(found[0][0], expected[0], rtol=1e-11)
    for ours, theirs in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(
            ours, theirs, rtol=1e-9, atol=1e-9 * float(abs(theirs).max() + 1)
        )


def test_positions_start_anew_with_each_document():
    wanted = [[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4], list(range(12)), [0, 1, 2, 3] * 3]
    for objective, copies in (
        ("autoregressive", 1),
        ("masked_diffusion", 1),
        ("block_diffusion", 2),
    ):
        inputs = make(make_batch(), jax.random.key(0), objective=objective)
        np.testing.assert_array_equal(inputs.positions, np.tile(wanted, copies))


@pytest.mark.parametrize("objective", OBJECTIVES[1:])
def test_what_is_masked_is_what_is_asked(objective):
    batch = make_batch()
    config = ObjectiveConfig(CorruptionConfig(level="block"))
    inputs = make(batch, jax.random.key(2), config, objective)
    drawn = draw(batch, jax.random.key(2), config.corruption)
    np.testing.assert_array_equal(
        inputs.tokens[:, :LENGTH], np.where(drawn.masked, MASK, batch.tokens)
    )
    clean = batch.tokens if objective == "block_diffusion" else np.zeros((ROWS, 0))
    np.testing.assert_array_equal(inputs.tokens[:, LENGTH:], clean)
    np.testing.assert_array_equal(inputs.targets, batch.tokens)
    np.testing.assert_allclose(inputs.weights, drawn.weights, rtol=1e-6)
    assert 0 < drawn.masked.sum() < batch.loss_mask.sum()


def test_noisy_copies_are_drawn_for_the_clean_positions():
    """The same key masks the same tokens, whichever of them have copies: a budget changes no draw."""
    noisy_index = jnp.asarray(
        [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 8, 9, 10, 11], [4, 5, 6, 7, -1, -1, -1, -1]]
    )
    noisy_index = noisy_index.astype(jnp.int32)
    every = make(make_batch(), jax.random.key(3))
    some = make(make_batch(noisy_index=noisy_index), jax.random.key(3))
    index, used = np.maximum(noisy_index, 0), np.asarray(noisy_index) >= 0
    for name in ("targets", "weights"):
        taken = np.take_along_axis(np.asarray(getattr(every, name)), index, axis=1)
        np.testing.assert_array_equal(getattr(some, name), np.where(used, taken, 0))
    noisy = np.take_along_axis(np.asarray(every.tokens[:, :LENGTH]), index, axis=1)
    np.testing.assert_array_equal(some.tokens[:, :8], np.where(used, noisy, 0))
    np.testing.assert_array_equal(some.tokens[:, 8:], every.tokens[:, LENGTH:])


def test_normalisers():
    batch = make_batch()
    corruption = CorruptionConfig(level="row")
    counts = {
        name: np.asarray(
            make(batch, jax.random.key(4), ObjectiveConfig(corruption, name)).normalizer, np.float64
        )
        for name in ("response", "masked", "weights")
    }
    drawn = draw(batch, jax.random.key(4), corruption)
    np.testing.assert_array_equal(counts["response"], np.asarray(batch.loss_mask).sum(axis=1))
    np.testing.assert_array_equal(counts["masked"], np.asarray(drawn.masked).sum(axis=1))
    np.testing.assert_allclose(counts["weights"], np.asarray(drawn.weights).sum(axis=1), rtol=1e-6)


def test_the_response_count_leaves_padding_out():
    """Even where a loss mask marks it: padding never has loss."""
    batch = make_batch()._replace(loss_mask=jnp.ones((ROWS, LENGTH), bool))
    np.testing.assert_array_equal(make(batch, jax.random.key(0)).normalizer, [12, 12, 8])


@pytest.mark.parametrize("objective", ["autoregressive", "block_diffusion"])
def test_a_batch_is_the_sum_of_its_rows(objective, x64):
    """So micro-batches of any size add up to one gradient, and one normaliser."""
    inputs = make(make_batch(), jax.random.key(5), objective=objective)
    whole = loss_and_gradients(tiny_model(), inputs)
    rows = [loss_and_gradients(tiny_model(), row_of(inputs, row)) for row in range(ROWS)]
    added = jax.tree.map(lambda *parts: sum(parts), *rows)
    for ours, theirs in zip(jax.tree.leaves(whole), jax.tree.leaves(added), strict=True):
        # Metrics are float32.
        tolerance = 1e-6 if ours.dtype == jnp.float32 else 1e-11
        np.testing.assert_allclose(
            ours, theirs, rtol=tolerance, atol=tolerance * float(abs(theirs).max())
        )
    assert inputs.normalizer.shape == (ROWS,)


def test_complementary_views_ask_each_token_once():
    config = ObjectiveConfig(
        CorruptionConfig(level="row", t_min=0.3, t_max=0.7, complementary=True)
    )
    batch = make_batch()
    inputs = make(batch, jax.random.key(6), config)
    assert inputs.tokens.shape == (2 * ROWS, 2 * LENGTH)
    asked = np.asarray(inputs.weights) > 0
    np.testing.assert_array_equal(asked[0::2] ^ asked[1::2], batch.loss_mask)
    np.testing.assert_array_equal(np.asarray(inputs.tokens[:, :LENGTH]) == MASK, asked)
    np.testing.assert_array_equal(inputs.targets, np.repeat(batch.tokens, 2, axis=0))
    np.testing.assert_array_equal(
        inputs.normalizer, np.repeat(np.asarray(batch.loss_mask).sum(axis=1), 2)
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_nothing_to_learn_is_zero_and_finite(objective, x64):
    batch = make_batch()._replace(loss_mask=jnp.zeros((ROWS, LENGTH), bool))
    inputs = make(batch, jax.random.key(7), objective=objective)
    (total, metrics), gradients = loss_and_gradients(tiny_model(), inputs)
    assert (
        total == 0 and not any(map(float, jax.tree.leaves(metrics))) and not inputs.normalizer.any()
    )
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradients))


def test_one_key_one_draw():
    first, again, other = (make(make_batch(), jax.random.key(seed)) for seed in (8, 8, 9))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert (first.tokens != other.tokens).any()


BAD = [
    ({"mask_token_id": None}, "masked_diffusion", "mask_token_id"),
    ({"mask_token_id": None}, "block_diffusion", "mask_token_id"),
    ({"block_size": None}, "block_diffusion", "block_size"),
]


@pytest.mark.parametrize("changes, objective, lacking", BAD)
def test_a_model_that_lacks_what_its_objective_needs(changes, objective, lacking):
    model = dataclasses.replace(config_for(objective), **changes)
    with refused(ConfigError, objective, lacking, "set it"):
        make_inputs(make_batch(), jax.random.key(0), ObjectiveConfig(), model)


def test_bad_normalizer():
    with refused(ConfigError, "normalizer 'tokens'", "'response', 'masked' or 'weights'"):
        ObjectiveConfig(normalizer="tokens")
