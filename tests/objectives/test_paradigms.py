"""Every value of the paradigm that is trained, against its definition position by position, in float64."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar_jax import block_diffusion_loss, nelbo
from sdar_jax.corruption import CorruptionConfig
from sdar_jax.errors import ConfigError
from sdar_jax.model import Model
from sdar_jax.objectives import Batch, ObjectiveConfig, make_inputs
from sdar_jax.paradigm import NEXT_TOKEN, Paradigm
from sdar_jax.weighted_loss import weighted_loss
from tests.bad_input import refused
from tests.objectives import oracle
from tests.tiny import MASK, pack, tiny_model

ROWS, LENGTH = 2, 13
SEGMENTS = pack([7, -1, 5], [2, 11], length=LENGTH)
VALUES = {
    "shifted": {"shifted": True},
    "causal clean copy": {"causal_clean": True},
    "response origin": {"block_origin": "response"},
    "bidirectional prompt": {"block_origin": "response", "bidirectional_prompt": True},
    "shifted from the response": {"block_origin": "response", "shifted": True},
    "shifted with a causal clean copy": {"shifted": True, "causal_clean": True},
    "no blocks, shifted": {"objective": "masked_diffusion", "shifted": True},
}


def model_with(dtype=jnp.float64, **values) -> Model:
    model = jax.tree.map(lambda leaf: leaf, tiny_model(dtype))
    model.config = dataclasses.replace(model.config, **values)
    return model


def random_batch(seed: int) -> Batch:
    """Prompts of random lengths, so that responses start anywhere in a block."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, MASK, (ROWS, LENGTH)).astype(np.int32)
    response = np.zeros((ROWS, LENGTH), bool)
    for row, ids in enumerate(SEGMENTS):
        for document in set(ids.tolist()) - {0}:
            members = np.flatnonzero(ids == document)
            response[row, members[random.integers(len(members) + 1) :]] = True
    return Batch(*map(jnp.asarray, (tokens, SEGMENTS, response)))


def block_of(
    paradigm: Paradigm, members: np.ndarray, response: np.ndarray, position: int
) -> tuple[int, int]:
    """(0 for the prompt or 1 for the response, number of the block in it) of a document's position."""
    size = paradigm.block_size
    if size is None:
        return 0, 0
    first = next((i for i in range(len(members)) if response[members[i]]), 0)
    if paradigm.origin == "sequence":
        return 0, position // size
    if position >= first:
        return 1, (position - first) // size
    return 0, 0 if paradigm.bidirectional_prompt else position // size


def layout(paradigm: Paradigm, ids: np.ndarray, response: np.ndarray):
    """Of one row: positions [2 L], mask [2 L, 2 L] over [noisy | clean], and which token each noisy position predicts
    (-1: none)."""
    positions, mask, predicts = (
        np.zeros(2 * LENGTH, int),
        np.zeros((2 * LENGTH, 2 * LENGTH), bool),
        np.full(LENGTH, -1),
    )
    for document in set(ids.tolist()) - {0}:
        members = np.flatnonzero(ids == document)
        blocks = [block_of(paradigm, members, response, i) for i in range(len(members))]
        for i, q in enumerate(members):
            positions[[q, LENGTH + q]] = i
            predicts[q] = q if not paradigm.shifted else q + 1 if i + 1 < len(members) else -1
            for j, k in enumerate(members):
                mask[q, k] = blocks[i] == blocks[j]
                mask[q, LENGTH + k] = blocks[j] < blocks[i]
                mask[LENGTH + q, LENGTH + k] = (
                    j <= i if paradigm.causal_clean else blocks[j] <= blocks[i]
                )
    return positions, mask, predicts


def expected(model: Model, batch: Batch, noisy, weights):
    """Loss and gradients from the definition."""
    paradigm, copies = model.config.paradigm, 2 if model.config.paradigm.two_copies else 1
    layouts = [
        layout(paradigm, ids, mask)
        for ids, mask in zip(SEGMENTS, np.asarray(batch.loss_mask), strict=True)
    ]
    positions, mask, predicts = (np.stack(parts) for parts in zip(*layouts, strict=True))
    inputs = np.concatenate([noisy, batch.tokens][:copies], axis=1)
    read = copies * LENGTH
    asked = predicts >= 0
    of_predicted = lambda x: np.where(
        asked, np.take_along_axis(np.asarray(x), np.maximum(predicts, 0), axis=1), 0
    )
    return oracle.loss_and_gradients(
        model,
        inputs,
        positions[:, :read],
        mask[:, :read, :read],
        of_predicted(batch.tokens),
        of_predicted(weights),
    )


@partial(jax.jit, static_argnames="config")
def make(batch, key, config, model):
    inputs = make_inputs(batch, key, config, model.config)
    return inputs, jax.value_and_grad(weighted_loss, has_aux=True)(model, inputs)


def assert_close(found, wanted):
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-10)
    for ours, theirs in zip(jax.tree.leaves(found[1]), jax.tree.leaves(wanted[1]), strict=True):
        np.testing.assert_allclose(
            ours, theirs, rtol=1e-9, atol=1e-9 * float(abs(theirs).max() + 1)
        )


# Those that the others are made of.
QUICK = ("shifted", "causal clean copy", "bidirectional prompt", "no blocks, shifted")
OTHERS = [
    pytest.param(name, marks=[pytest.mark.slow, pytest.mark.ci])
    for name in VALUES
    if name not in QUICK
]


@pytest.mark.parametrize("name", [*QUICK, *OTHERS])
@given(seed=st.integers(0, 2**32 - 1))
def test_training_equals_the_definition(name, seed):
    batch = random_batch(seed)
    with jax.enable_x64(True):
        model = model_with(**VALUES[name])
        config = ObjectiveConfig(
            CorruptionConfig(level="block" if model.config.paradigm.two_copies else "document")
        )
        inputs, ((total, _), gradients) = make(batch, jax.random.key(seed % 97), config, model)
        noisy = np.asarray(inputs.tokens[:, :LENGTH])
        weights = np.zeros((ROWS, LENGTH))
        # What is asked of a position, back in the place of the token that it predicts.
        shift = int(model.config.shifted)
        weights[:, shift:] = np.asarray(inputs.weights, np.float64)[:, : LENGTH - shift]
        assert ((noisy == MASK) >= (weights > 0)).all()
        assert_close((total, gradients), expected(model, batch, noisy, weights))


@pytest.mark.parametrize("name", [name for name in VALUES if "no blocks" not in name])
def test_the_loss_function_equals_the_definition(name, x64):
    """Through the public door, with any noisy tokens and weights."""
    random = np.random.default_rng(5)
    batch, model = random_batch(6), model_with(**VALUES[name])
    noisy = random.integers(0, MASK + 1, (ROWS, LENGTH)).astype(np.int32)
    weights = random.exponential(2.0, (ROWS, LENGTH)) * (SEGMENTS > 0)
    loss = jax.jit(
        jax.value_and_grad(
            lambda model: block_diffusion_loss(
                model,
                batch.tokens,
                noisy,
                weights,
                block_size=4,
                segment_ids=SEGMENTS,
                loss_mask=batch.loss_mask,
            )
        )
    )
    assert_close(loss(model), expected(model, batch, noisy, weights))


def test_a_document_begins_with_a_token_that_a_shifted_model_does_not_predict():
    """Nor is it counted."""
    batch = random_batch(0)._replace(loss_mask=jnp.asarray(SEGMENTS > 0))
    model = model_with(jnp.float32, shifted=True)
    inputs, _ = make(batch, jax.random.key(0), ObjectiveConfig(), model)
    np.testing.assert_array_equal(inputs.normalizer, [6 + 4, 1 + 10])


def test_blocks_of_the_response_share_a_noise_level():
    """Weights 1 / t are one number a block, counted from the response."""
    tokens = jnp.zeros((1, 13), jnp.int32)
    batch = Batch(tokens, jnp.ones_like(tokens), (jnp.arange(13) >= 3)[None])
    config = ObjectiveConfig(CorruptionConfig(level="block", t_min=0.9))
    inputs, _ = make(
        batch, jax.random.key(1), config, model_with(jnp.float32, block_origin="response")
    )
    weights = np.asarray(inputs.weights[0])
    assert not weights[:3].any()
    kinds = [set(weights[a:b]) - {0.0} for a, b in ((3, 7), (7, 11), (11, 13))]
    assert all(len(kind) == 1 for kind in kinds) and len(set.union(*kinds)) == 3


def test_a_shifted_bound_in_blocks_of_one_is_the_chain_rule(x64):
    """Each token but the first is predicted by the mask of the token before it, which sees all before that."""
    model = model_with(shifted=True)
    tokens = np.random.default_rng(2).integers(0, MASK, (1, 6)).astype(np.int32)
    mean, error = nelbo(model, tokens, block_size=1, samples=2)
    positions, mask, _ = layout_of_one(6)
    inputs = np.concatenate([np.full(6, MASK), tokens[0]])
    scores = oracle.logits(model, inputs, positions, mask)[:5]
    np.testing.assert_allclose(
        mean, np.mean(oracle.cross_entropy(scores, tokens[0, 1:])), rtol=1e-11
    )
    assert error == 0


def layout_of_one(length: int):
    """[noisy | clean] of one document in blocks of one."""
    index = np.arange(length)
    before = index[:, None] > index
    mask = np.block(
        [
            [np.eye(length, dtype=bool), before],
            [np.zeros((length, length), bool), before | np.eye(length, dtype=bool)],
        ]
    )
    return np.tile(index, 2), mask, index


def test_families_are_values():
    """Hashable, equal by value; an autoregressive model is blocks of one, shifted, over causal clean keys."""
    assert (
        len({Paradigm(block_size=4), Paradigm(block_size=4), Paradigm(block_size=8), NEXT_TOKEN})
        == 3
    )
    assert Paradigm(masks=False, block_size=1, shifted=True, causal_clean=True) == NEXT_TOKEN
    assert NEXT_TOKEN.cached and not NEXT_TOKEN.two_copies and not Paradigm().cached


CONFIG = tiny_model(jnp.float32).config
BAD = {
    "no blocks, causal": (
        {"objective": "masked_diffusion", "causal_clean": True},
        "causal_clean is True",
        "block_size",
    ),
    "prompt without origin": (
        {"bidirectional_prompt": True},
        "bidirectional_prompt is True",
        "block_origin='response'",
    ),
    "both": (
        {"bidirectional_prompt": True, "block_origin": "response", "causal_clean": True},
        "bidirectional_prompt and causal_clean",
        "leave out one",
    ),
    "autoregressive": (
        {"objective": "autoregressive", "shifted": True},
        "'autoregressive'",
        "leave them out",
    ),
    "no flag": ({"shifted": 1}, "shifted is 1", "true or false"),
}


@pytest.mark.parametrize("name", BAD)
def test_values_that_contradict_each_other(name):
    changes, *told = BAD[name]
    with refused(ConfigError, *told):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
    "changes", [{"shifted": True}, {"block_origin": "response"}, {"objective": "masked_diffusion"}]
)
def test_copies_of_some_positions_are_refused_where_others_need_theirs(changes):
    batch = random_batch(0)._replace(noisy_index=jnp.zeros((ROWS, 4), jnp.int32))
    with refused(ConfigError, "noisy_length", "leave"):
        make_inputs(
            batch, jax.random.key(0), ObjectiveConfig(), dataclasses.replace(CONFIG, **changes)
        )
