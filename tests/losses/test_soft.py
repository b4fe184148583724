"""Targets that are a teacher's distributions, against full logits of both models in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar_jax.errors import ConfigError
from sdar_jax.losses import Teacher, linear_cross_entropy
from tests.bad_input import refused
from tests.jaxprs import largest_array

WIDTH, TEACHER_WIDTH = 5, 3


def random_inputs(seed: int, tokens: int, vocab: int):
    """hidden, head [D, V], targets, and a teacher of another width."""
    random = np.random.default_rng(seed)
    teacher = Teacher(
        random.normal(size=(tokens, TEACHER_WIDTH)), random.normal(size=(TEACHER_WIDTH, vocab))
    )
    hidden, head = random.normal(size=(tokens, WIDTH)), random.normal(size=(WIDTH, vocab))
    return hidden, head, random.integers(0, vocab, tokens), teacher


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def full(hidden, head, weights, teacher, name):
    """The loss and its gradients for hidden and head, of plain numpy with all logits at once."""
    ours, theirs = log_softmax(hidden @ head), log_softmax(teacher.hidden @ teacher.head)
    p = np.exp(theirs)
    losses = -(p * ours).sum(-1)
    if name == "kl":
        losses = losses + (p * theirs).sum(-1)
    d_logits = weights[:, None] * (np.exp(ours) - p)
    return (weights * losses).sum(), d_logits @ head.T, hidden.T @ d_logits


@partial(jax.jit, static_argnames=("soft_loss", "vocab_axis", "chunk"))
def chunked(hidden, head, targets, weights, teacher, **options):
    """((loss, scores), gradients); the loss is scaled by 3, so that the cotangent is not one."""

    def scaled(hidden, head, teacher):
        total, scores = linear_cross_entropy(
            hidden, head, targets, weights, teacher=teacher, **options
        )
        return 3 * total, (total, scores)

    (_, out), gradients = jax.value_and_grad(scaled, (0, 1, 2), has_aux=True)(hidden, head, teacher)
    return out, gradients


@pytest.mark.xla_defaults
@given(
    seed=st.integers(0, 2**32 - 1),
    weights=st.lists(st.sampled_from([0.0, 0.0, 1.0, 3.5, -2.0]), min_size=7, max_size=7),
    name=st.sampled_from(["soft_cross_entropy", "kl"]),
    vocab_axis=st.sampled_from([0, 1]),
    chunk=st.sampled_from([3, 50]),
)
def test_equals_full_logits(seed, weights, name, vocab_axis, chunk):
    hidden, head, targets, teacher = random_inputs(seed, 7, 11)
    weights = np.array(weights)
    loss, d_hidden, d_head = full(hidden, head, weights, teacher, name)
    turned = (lambda x: x) if vocab_axis == 1 else np.transpose
    with jax.enable_x64(True):
        (total, _), gradients = chunked(
            hidden,
            turned(head),
            targets,
            weights,
            Teacher(teacher.hidden, turned(teacher.head)),
            soft_loss=name,
            vocab_axis=vocab_axis,
            chunk=chunk,
        )
    np.testing.assert_allclose(total, loss, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(gradients[0], 3 * d_hidden, rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(gradients[1], 3 * turned(d_head), rtol=1e-10, atol=1e-11)
    assert not any(x.any() for x in gradients[2])


def test_kl_to_itself_is_nothing_and_its_gradient_too(x64):
    hidden, head, targets, _ = random_inputs(0, 7, 11)
    (total, _), gradients = chunked(
        hidden, head, targets, np.ones(7), Teacher(hidden, head), soft_loss="kl"
    )
    np.testing.assert_allclose(total, 0, atol=1e-14)
    for gradient in gradients[:2]:
        np.testing.assert_allclose(gradient, 0, atol=1e-14)


def test_a_teacher_that_is_sure_gives_the_loss_of_tokens(x64):
    hidden, head, targets, _ = random_inputs(1, 7, 11)
    sure = Teacher(np.eye(11)[targets], 1e4 * np.eye(11))
    (total, _), gradients = chunked(hidden, head, targets, np.ones(7), sure)
    (plain, _), plain_gradients = chunked(hidden, head, targets, np.ones(7), None)
    np.testing.assert_allclose(total, plain, rtol=1e-12)
    for ours, theirs in zip(gradients[:2], plain_gradients[:2], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_scores_stay_those_of_the_tokens(x64):
    hidden, head, targets, teacher = random_inputs(8, 7, 11)
    targets[::2] = (hidden @ head).argmax(-1)[::2]
    weights = np.array([1.0, 2, 0, 1, 3, 0, 1])
    (_, soft), _ = chunked(hidden, head, targets, weights, teacher)
    (_, plain), _ = chunked(hidden, head, targets, weights, None)
    assert plain.correct.any() and not plain.correct.all()
    jax.tree.map(np.testing.assert_array_equal, soft, plain)


def test_confidence_is_added_as_it_is_to_hard_targets(x64):
    """CAP's entropy is of the student, where its guess of the data's token is right."""
    hidden, head, targets, teacher = random_inputs(2, 7, 11)
    targets[::2] = (hidden @ head).argmax(-1)[::2]
    weights = np.array([1.0, 2, 0, 1, 3, 0, 1])

    def added(teacher):
        with_entropy, without = (
            chunked(hidden, head, targets, weights, teacher, entropy_weight=e, chunk=3)
            for e in (jnp.float64(0.7), None)
        )
        difference = with_entropy[0][0] - without[0][0]
        pairs = zip(with_entropy[1][:2], without[1][:2], strict=True)
        return difference, [one - other for one, other in pairs], with_entropy[0][1].entropy

    soft, hard = added(teacher), added(None)
    assert hard[2].any()
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), soft, hard)


@pytest.mark.parametrize("chunk", [3, 50])
def test_tokens_of_weight_zero_are_not_read(chunk, x64):
    hidden, head, targets, teacher = random_inputs(3, 7, 11)
    weights = np.array([0, 2.0, 0, 1.0, 0, 0, 3.0])
    expected = chunked(hidden, head, targets, weights, teacher, chunk=chunk)
    teacher.hidden[weights == 0], hidden[weights == 0], targets[weights == 0] = np.nan, np.nan, -9
    found = chunked(hidden, head, targets, weights, teacher, chunk=chunk)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_nothing_weighted_is_nothing():
    hidden, head, targets, teacher = random_inputs(4, 7, 11)
    (total, _), gradients = chunked(hidden, head, targets, np.zeros(7), teacher, chunk=3)
    assert total == 0 and not any(x.any() for x in jax.tree.leaves(gradients))


def test_holds_a_chunk_of_either_models_logits():
    tokens, vocab, chunk = 2048, 1000, 128
    hidden, head, targets, teacher = jax.tree.map(jnp.asarray, random_inputs(5, tokens, vocab))

    def gradients(hidden, head, teacher):
        loss = lambda hidden, head: linear_cross_entropy(
            hidden, head, targets, jnp.ones(tokens), teacher=teacher, chunk=chunk
        )[0]
        return jax.grad(loss, (0, 1))(hidden, head)

    assert largest_array(gradients, hidden, head, teacher) == chunk * vocab


def test_bfloat16_sums_in_float32():
    hidden, head, targets, teacher = random_inputs(6, 600, 50)
    narrow = lambda x: jnp.asarray(x, jnp.bfloat16)
    hidden, head, teacher = jax.tree.map(narrow, (hidden, head, teacher))
    (total, _), gradients = chunked(hidden, head, targets, np.ones(600), teacher, chunk=128)
    wide = lambda x: np.asarray(x, np.float64)
    exact = full(*map(wide, (hidden, head)), np.ones(600), jax.tree.map(wide, teacher), "soft")
    assert total.dtype == jnp.float32 and gradients[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(total, exact[0], rtol=1e-6)
    for ours, theirs in zip(gradients[:2], exact[1:], strict=True):
        error = np.linalg.norm(wide(ours) - 3 * theirs) / np.linalg.norm(3 * theirs)
        assert error < 2 * 2**-9


@pytest.mark.parametrize(
    ("teacher", "name", "told"),
    [
        (Teacher(jnp.ones((6, 3)), jnp.ones((3, 11))), "kl", "of tokens (6,) and the student's of (7,)"),
        (Teacher(jnp.ones((7, 3)), jnp.ones((3, 12))), "kl", "12 vocabulary entries and the student's 11"),
        (Teacher(jnp.ones((7, 3)), jnp.ones((3, 11))), "jsd", "soft_loss 'jsd' is unknown"),
    ],
)  # fmt: skip
def test_teachers_that_do_not_fit(teacher, name, told):
    hidden, head, targets, _ = random_inputs(0, 7, 11)
    with refused(ConfigError, told):
        linear_cross_entropy(
            jnp.asarray(hidden), head, targets, jnp.ones(7), teacher=teacher, soft_loss=name
        )
