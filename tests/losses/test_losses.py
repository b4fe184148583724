"""The chunked cross-entropy against full logits in float64, and what it must not hold or touch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar_jax import losses
from sdar_jax.losses import linear_cross_entropy
from tests.jaxprs import largest_array

TOKENS, WIDTH, VOCAB = 7, 5, 11


def random_inputs(seed: int, tokens=TOKENS, width=WIDTH, vocab=VOCAB):
    """hidden, head [D, V] and targets."""
    random = np.random.default_rng(seed)
    return (
        random.normal(size=(tokens, width)),
        random.normal(size=(width, vocab)),
        random.integers(0, vocab, tokens),
    )


def full(hidden, head, targets, weights):
    """Loss, nll, whether right, and the gradients for hidden and head, with all logits at once."""
    logits = hidden @ head
    logits = logits - logits.max(-1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    probs = np.exp(log_probs)
    nll = -log_probs[np.arange(len(targets)), targets]
    d_logits = weights[:, None] * (probs - np.eye(head.shape[1])[targets])
    right = logits.argmax(-1) == targets
    return (weights * nll).sum(), nll, right, d_logits @ head.T, hidden.T @ d_logits


@partial(jax.jit, static_argnames=("vocab_axis", "chunk"))
def chunked(hidden, head, targets, weights, vocab_axis=1, chunk=None, entropy_weight=None):
    """((loss, scores), gradients); the loss is scaled by 3, so that the cotangent is not one."""

    def scaled(hidden, head):
        total, scores = linear_cross_entropy(
            hidden,
            head,
            targets,
            weights,
            entropy_weight=entropy_weight,
            vocab_axis=vocab_axis,
            chunk=chunk,
        )
        return 3 * total, (total, scores)

    (_, out), gradients = jax.value_and_grad(scaled, (0, 1), has_aux=True)(hidden, head)
    return out, gradients


@pytest.mark.xla_defaults
@given(
    seed=st.integers(0, 2**32 - 1),
    weights=st.lists(
        st.sampled_from([0.0, 0.0, 1.0, 3.5, -2.0, 1e3]), min_size=TOKENS, max_size=TOKENS
    ),
    vocab_axis=st.sampled_from([0, 1]),
    chunk=st.sampled_from([1, 3, 7, 50]),
)
def test_equals_full_logits(seed, weights, vocab_axis, chunk):
    hidden, head, targets = random_inputs(seed)
    weights = np.array(weights)
    loss, nll, right, d_hidden, d_head = full(hidden, head, targets, weights)
    with jax.enable_x64(True):
        layout = head if vocab_axis == 1 else head.T
        (total, scores), gradients = chunked(hidden, layout, targets, weights, vocab_axis, chunk)
    np.testing.assert_allclose(total, loss, rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(scores.nll, np.where(weights != 0, nll, 0), rtol=1e-12)
    np.testing.assert_array_equal(scores.correct, right & (weights != 0))
    np.testing.assert_allclose(gradients[0], 3 * d_hidden, rtol=1e-10, atol=1e-9)
    np.testing.assert_allclose(
        gradients[1], 3 * (d_head if vocab_axis == 1 else d_head.T), rtol=1e-10, atol=1e-9
    )


def full_with_entropy(hidden, head, targets, weights, entropy_weight):
    """The loss and each token's entropy where the guess is right, of plain jnp with all logits at once."""
    log_probs = jax.nn.log_softmax(hidden @ head)
    nll = -jnp.take_along_axis(log_probs, targets[:, None], axis=-1)[:, 0]
    right = (log_probs.argmax(-1) == targets) & (weights != 0)
    entropy = jnp.where(right, -(jnp.exp(log_probs) * log_probs).sum(-1), 0)
    return (weights * nll).sum() + entropy_weight * entropy.sum(), entropy


@pytest.mark.xla_defaults
@given(
    seed=st.integers(0, 2**32 - 1),
    weights=st.lists(st.sampled_from([0.0, 1.0, 3.5, -2.0]), min_size=TOKENS, max_size=TOKENS),
    right=st.lists(st.booleans(), min_size=TOKENS, max_size=TOKENS),
    vocab_axis=st.sampled_from([0, 1]),
    chunk=st.sampled_from([1, 3, 50]),
    entropy_weight=st.sampled_from([0.7, 40.0]),
)
def test_the_entropy_where_a_guess_is_right_equals_full_logits(
    seed, weights, right, vocab_axis, chunk, entropy_weight
):
    hidden, head, targets = random_inputs(seed)
    targets, weights = np.where(right, (hidden @ head).argmax(-1), targets), np.array(weights)
    with jax.enable_x64(True):
        (loss, entropy), expected = jax.value_and_grad(full_with_entropy, (0, 1), has_aux=True)(
            *map(jnp.asarray, (hidden, head, targets, weights)), entropy_weight
        )
        layout = head if vocab_axis == 1 else head.T
        (total, scores), gradients = chunked(
            hidden, layout, targets, weights, vocab_axis, chunk, jnp.asarray(entropy_weight)
        )
    np.testing.assert_allclose(total, loss, rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(scores.entropy, entropy, rtol=1e-12, atol=1e-12)
    d_hidden, d_head = (3 * np.asarray(x) for x in expected)
    np.testing.assert_allclose(gradients[0], d_hidden, rtol=1e-10, atol=1e-9)
    np.testing.assert_allclose(
        gradients[1], d_head if vocab_axis == 1 else d_head.T, rtol=1e-10, atol=1e-9
    )


def test_no_guess_is_right_and_there_is_no_entropy(x64):
    hidden, head, _ = random_inputs(0)
    targets, weights = (hidden @ head).argmin(-1), np.ones(TOKENS)
    (total, scores), gradients = chunked(
        hidden, head, targets, weights, entropy_weight=jnp.float64(5)
    )
    (plain, _), plain_gradients = chunked(hidden, head, targets, weights)
    assert total == plain and not scores.entropy.any()
    jax.tree.map(np.testing.assert_array_equal, gradients, plain_gradients)


def test_default_chunk_equals_full_logits(x64):
    hidden, head, targets = random_inputs(0)
    weights = np.ones(TOKENS)
    (total, _), gradients = chunked(hidden, head, targets, weights)
    loss, _, _, d_hidden, d_head = full(hidden, head, targets, weights)
    np.testing.assert_allclose(total, loss, rtol=1e-12)
    np.testing.assert_allclose(gradients[0], 3 * d_hidden, rtol=1e-10)
    np.testing.assert_allclose(gradients[1], 3 * d_head, rtol=1e-10)


def test_nothing_weighted_is_nothing():
    hidden, head, targets = random_inputs(1)
    (total, scores), gradients = chunked(hidden, head, targets, np.zeros(TOKENS), 1, 3)
    assert total == 0 and not scores.nll.any() and not scores.correct.any()
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("chunk", [3, 50])
def test_tokens_of_weight_zero_are_not_read(chunk, x64):
    """Not even where they fill up a chunk: what their hidden state or target is does not matter."""
    hidden, head, targets = random_inputs(2)
    weights = np.array([0, 2.0, 0, 1.0, 0, 0, 3.0])
    expected = chunked(hidden, head, targets, weights, 1, chunk)
    hidden[weights == 0], targets[weights == 0] = np.nan, -100
    found = chunked(hidden, head, targets, weights, 1, chunk)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_only_weighted_chunks_are_walked(monkeypatch):
    """100 tokens in chunks of 8, of which 17 are weighted, wherever they are: 3 chunks."""
    visits = []
    original = losses._chunk_scores

    def counted(h, *args):
        jax.debug.callback(lambda: visits.append(len(h)))
        return original(h, *args)

    monkeypatch.setattr(losses, "_chunk_scores", counted)
    hidden, head, targets = random_inputs(3, tokens=100)
    weights = np.zeros(100)
    weights[np.random.default_rng(0).permutation(100)[:17]] = 1
    jax.block_until_ready(
        linear_cross_entropy(*map(jnp.asarray, (hidden, head, targets, weights)), chunk=8)
    )
    jax.effects_barrier()
    assert visits == [8, 8, 8]


@pytest.mark.parametrize("entropy_weight", [None, 0.5])
def test_holds_no_tokens_by_vocabulary(entropy_weight):
    """The largest arrays are a chunk's logits and the gradients, with 16 times as many logits in all."""
    tokens, width, vocab, chunk = 2048, 8, 1000, 128
    hidden, head, targets = (jnp.asarray(x) for x in random_inputs(4, tokens, width, vocab))
    weights = jnp.ones(tokens)
    e = None if entropy_weight is None else jnp.float32(entropy_weight)

    def gradients(hidden, head):
        loss = lambda *args: linear_cross_entropy(
            *args, targets, weights, entropy_weight=e, chunk=chunk
        )[0]
        return jax.grad(loss, (0, 1))(hidden, head)

    assert largest_array(gradients, hidden, head) == chunk * vocab


def test_the_default_chunk_is_bounded_in_memory():
    """At Qwen3's vocabulary, 128 tokens' logits however many tokens there are."""
    vocab, tokens = 151_936, 4096
    shape = jax.ShapeDtypeStruct
    args = shape((tokens, 4), jnp.float32), shape((vocab, 4), jnp.float32)
    rest = shape((tokens,), jnp.int32), shape((tokens,), jnp.float32)
    assert largest_array(partial(linear_cross_entropy, vocab_axis=0), *args, *rest) <= 128 * vocab


def test_scores_carry_no_gradient():
    hidden, head, targets = (jnp.asarray(x) for x in random_inputs(5))
    sum_of_nll = lambda hidden, head: linear_cross_entropy(hidden, head, targets, jnp.ones(TOKENS))[
        1
    ].nll.sum()
    assert not any(g.any() for g in jax.grad(sum_of_nll, (0, 1))(hidden, head))


def test_bfloat16_sums_in_float32():
    """Given bfloat16 numbers, the loss is exact but for float32, and a gradient but for one rounding (2^-9) of each
    logit's gradient and one of the result."""
    hidden, head, targets = random_inputs(6, tokens=600, width=16, vocab=50)
    hidden, head = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)
    (total, scores), gradients = chunked(hidden, head, targets, np.ones(600), 1, 128)
    exact = full(
        np.asarray(hidden, np.float64), np.asarray(head, np.float64), targets, np.ones(600)
    )
    assert total.dtype == scores.nll.dtype == jnp.float32
    assert all(g.dtype == jnp.bfloat16 for g in gradients)
    np.testing.assert_allclose(total, exact[0], rtol=1e-6)
    for ours, theirs in zip(gradients, exact[3:], strict=True):
        error = np.linalg.norm(np.asarray(ours, np.float64) - 3 * theirs) / np.linalg.norm(
            3 * theirs
        )
        assert error < 2 * 2**-9


def test_large_logits_do_not_overflow():
    hidden, head, targets = random_inputs(7)
    weights = np.ones(TOKENS)
    (total, _), gradients = chunked(np.float32(1e4) * hidden, head, targets, weights, 1, 3)
    np.testing.assert_allclose(total, full(1e4 * hidden, head, targets, weights)[0], rtol=1e-5)
    assert all(np.isfinite(g).all() for g in gradients)


def test_tokens_without_weight_may_be_anything():
    """Not finite, and with a target that is none."""
    hidden, head, targets = random_inputs(3)
    weights = np.array([0, 1, 0, 2, 0.5, 0, 1])
    damaged, others = hidden.copy(), targets.copy()
    damaged[weights == 0], others[weights == 0] = [np.nan, np.inf, -np.inf, 1, 0], -100
    for ours, theirs in zip(
        jax.tree.leaves(chunked(damaged, head, others, weights, chunk=3)),
        jax.tree.leaves(chunked(hidden, head, targets, weights, chunk=3)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)
