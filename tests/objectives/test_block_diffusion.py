"""The block-diffusion loss and its gradients against a dense mask in float64, and what must hold of it."""

from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar_jax import block_diffusion_loss
from sdar_jax.attention import api, chunked
from sdar_jax.errors import ConfigError
from sdar_jax.model import stack_layers
from tests.bad_input import refused
from tests.objectives import oracle
from tests.tiny import MASK, VOCAB, pack, segment_rows, tiny_model, tiny_moe

ROWS, LENGTH, COPIES = 2, 12, 8


@partial(jax.jit, static_argnames=("block_size", "tiled"))
def ours(model, tokens, noisy, weights, segment_ids, noisy_index=None, *, block_size, tiled=False):
    """Loss and gradients; `tiled` through the chunked attention with tiles of 5, else the dense one."""

    def loss(model):
        return block_diffusion_loss(
            model,
            tokens,
            noisy,
            weights,
            block_size=block_size,
            segment_ids=segment_ids,
            noisy_index=noisy_index,
        )

    with (
        mock.patch.object(api, "_DENSE_SCORES", 0 if tiled else 10**9),
        mock.patch.object(chunked, "_TILE", 5),
    ):
        return jax.value_and_grad(loss)(model)


def random_batch(seed: int, columns: int = LENGTH):
    """tokens, noisy tokens (any tokens: a loss must not ask where the mask is) and weights, some zero, one negative."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, VOCAB - 1, (ROWS, LENGTH)).astype(np.int32)
    noisy = random.integers(0, VOCAB, (ROWS, columns)).astype(np.int32)
    noisy[random.random(noisy.shape) < 0.5] = MASK
    weights = np.where(random.random(noisy.shape) < 0.6, random.exponential(3.0, noisy.shape), 0.0)
    weights.flat[0] = -2.0
    return tokens, noisy, weights


def assert_close(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-11)
    for ours, theirs in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(
            ours, theirs, rtol=1e-9, atol=1e-9 * float(abs(theirs).max() + 1)
        )


@pytest.mark.parametrize(
    "normalised", [True, pytest.param(False, marks=[pytest.mark.slow, pytest.mark.ci])]
)
def test_an_moe_equals_every_expert_on_every_token(normalised, x64):
    batch = *random_batch(0), pack([5, 4, -3], [12], length=LENGTH)
    model = tiny_moe(norm_topk_prob=normalised)
    assert_close(
        ours(model, *batch, block_size=4), oracle.block_diffusion(model, *batch, block_size=4)
    )


@pytest.mark.xla_defaults
@given(
    segment_rows(ROWS, LENGTH),
    st.sampled_from([(1, False), (4, True), (3, False)]),
    st.integers(0, 2**31),
)
def test_equals_the_dense_mask(segment_ids, setting, seed):
    """Packed rows with padding anywhere, and blocks that documents cut short."""
    block_size, tiled = setting
    with jax.enable_x64(True):
        batch = *random_batch(seed), segment_ids
        found = ours(tiny_model(), *batch, block_size=block_size, tiled=tiled)
        assert_close(found, oracle.block_diffusion(tiny_model(), *batch, block_size=block_size))


@given(segment_rows(ROWS, LENGTH), st.data(), st.integers(0, 2**31))
def test_equals_the_dense_mask_with_noisy_copies_of_some(segment_ids, data, seed):
    noisy_index = np.full((ROWS, COPIES), -1, np.int32)
    for row in noisy_index:
        chosen = sorted(data.draw(st.sets(st.integers(0, LENGTH - 1), max_size=COPIES)))
        row[: len(chosen)] = chosen
    with jax.enable_x64(True):
        batch = *random_batch(seed, COPIES), segment_ids, noisy_index
        model = tiny_model(tie_embeddings=True)
        assert_close(
            ours(model, *batch, block_size=4), oracle.block_diffusion(model, *batch, block_size=4)
        )


def test_noisy_copies_of_the_response_alone_are_enough(x64):
    """SFT: where only response blocks carry loss, a prompt block's noisy copy is dead weight."""
    tokens, noisy, weights = random_batch(3)
    segment_ids = pack([9, 3], [10, -2], length=LENGTH)
    # Blocks of 4: the first row's second and third and all of its second document; the second row's second and third.
    noisy_index = np.array([[4, 5, 6, 7, 8, 9, 10, 11], [4, 5, 6, 7, 8, 9, -1, -1]], np.int32)
    kept = np.zeros(tokens.shape, bool)
    for row, index in zip(kept, noisy_index, strict=True):
        row[index[index >= 0]] = True
    taken = np.take_along_axis(noisy, np.maximum(noisy_index, 0), axis=1)
    taken_weights = np.take_along_axis(weights, np.maximum(noisy_index, 0), axis=1)
    full = ours(tiny_model(), tokens, noisy, np.where(kept, weights, 0), segment_ids, block_size=4)
    assert_close(
        ours(tiny_model(), tokens, taken, taken_weights, segment_ids, noisy_index, block_size=4),
        full,
    )


def test_a_packed_row_is_the_sum_of_its_documents(x64):
    tokens, noisy, weights = random_batch(4)
    documents = [(0, 0, 5), (0, 5, 9), (1, 2, 12)]
    segment_ids = pack([5, 4, -3], [-2, 10], length=LENGTH)
    weights *= segment_ids > 0
    alone = 0.0
    for row, start, end in documents:
        parts = [np.zeros_like(x) for x in (tokens, noisy, weights, segment_ids)]
        for part, whole in zip(
            parts, (tokens, noisy, weights, np.ones_like(segment_ids)), strict=True
        ):
            part[0, : end - start] = whole[row, start:end]
        alone += ours(tiny_model(), *parts, block_size=4)[0]
    packed = ours(tiny_model(), tokens, noisy, weights, segment_ids, block_size=4)[0]
    np.testing.assert_allclose(packed, alone, rtol=1e-12)


def test_no_future_block_is_seen(x64):
    """Loss on block 1 of 3 alone: other noisy blocks, and clean tokens from block 1 on, change nothing, bit for bit."""
    tokens, noisy, _ = random_batch(5)
    weights = np.zeros(tokens.shape)
    weights[:, 4:8] = 1.0
    segment_ids = np.ones_like(tokens)
    run = lambda tokens, noisy: ours(
        tiny_model(), tokens, noisy, weights, segment_ids, block_size=4
    )[0]
    before = run(tokens, noisy)
    other_noisy, other_tokens, other_past = noisy.copy(), tokens.copy(), tokens.copy()
    other_noisy[:, [0, 1, 2, 3, 8, 9, 10, 11]] = 7
    other_tokens[:, 8:] = (tokens[:, 8:] + 1) % VOCAB
    other_past[:, 3] = (tokens[:, 3] + 1) % VOCAB
    assert run(tokens, other_noisy) == before
    assert run(other_tokens, noisy) == before
    assert run(other_past, noisy) != before
    # A clean token of block 1 is also a target, so what its copy adds is asked of the embeddings instead.
    embedding = jax.jit(jax.grad(lambda shift: hidden_shifted(tokens, noisy, weights, shift)))(
        jnp.zeros((LENGTH, 16))
    )
    assert embedding[:4].any() and not embedding[4:].any()


def hidden_shifted(tokens, noisy, weights, shift):
    """The loss with `shift` added to the embeddings of the clean copy."""
    model = tiny_model()
    embed = type(model).embed

    def shifted(self, inputs, compute_dtype=None):
        return embed(self, inputs, compute_dtype).at[:, LENGTH:].add(shift)

    with mock.patch.object(type(model), "embed", shifted):
        return block_diffusion_loss(
            model, *map(jnp.asarray, (tokens, noisy, weights)), block_size=4
        )


def test_stacked_layers_give_the_same(x64):
    tokens, noisy, weights = random_batch(6)
    batch = tokens, noisy, weights, pack([7, 5], [12], length=LENGTH)
    # Stacking frees the layers that it is given.
    stacked = stack_layers(jax.tree.map(jnp.copy, tiny_model(num_layers=3)))
    found, _ = ours(stacked, *batch, block_size=4)
    expected, _ = oracle.block_diffusion(tiny_model(num_layers=3), *batch, block_size=4)
    np.testing.assert_allclose(found, expected, rtol=1e-11)


def test_no_segment_ids_is_one_document_a_row(x64):
    tokens, noisy, weights = map(jnp.asarray, random_batch(7))
    without = jax.jit(partial(block_diffusion_loss, block_size=4))(
        tiny_model(), tokens, noisy, weights
    )
    one = ours(tiny_model(), tokens, noisy, weights, jnp.ones_like(tokens), block_size=4)[0]
    np.testing.assert_allclose(without, one, rtol=1e-14)


BAD = [
    ("noisy_tokens", (1, 4), {}, "noisy_tokens (1, 4)", "give noisy_index"),
    ("weights", (1, 4), {}, "weights is of shape (1, 4)", "noisy_tokens of (1, 8)"),
    ("segment_ids", (1, 7), {}, "segment_ids is of shape (1, 7)", "tokens of (1, 8)"),
    ("noisy_index", (1, 3), {}, "noisy_index is of shape (1, 3)", "noisy_tokens of (1, 8)"),
    (None, None, {"block_size": 0}, "block_size is 0", "positive integer"),
]


@pytest.mark.parametrize("name, shape, changes, value, fix", BAD)
def test_bad_shapes(name, shape, changes, value, fix):
    arguments = {"tokens": (1, 8), "noisy_tokens": (1, 8), "weights": (1, 8)} | (
        {name: shape} if name else {}
    )
    arrays = {
        key: jnp.ones(size, jnp.float32 if key == "weights" else jnp.int32)
        for key, size in arguments.items()
    }
    with refused(ConfigError, value, fix):
        block_diffusion_loss(tiny_model(jnp.float32), **{"block_size": 4, **arrays, **changes})
