"""D2F's objective against dense masks made pair by pair, both models' logits in full and an explicit softmax."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdar_jax.corruption import CorruptionConfig
from sdar_jax.distillation import DistillConfig
from sdar_jax.errors import ConfigError
from sdar_jax.objectives import Batch, ObjectiveConfig, make_inputs
from sdar_jax.paradigm import NEXT_TOKEN, Paradigm
from sdar_jax.weighted_loss import training_loss, weighted_loss
from tests.bad_input import refused
from tests.objectives import oracle
from tests.tiny import MASK, tiny_model

# A prompt of more than a block, so that its being one is seen.
SIZE, PROMPT, LENGTH = 4, 6, 29
STUDENT = {"block_origin": "response", "bidirectional_prompt": True, "block_size": SIZE}
CANVAS = Paradigm(origin="response")
D2F = ObjectiveConfig(normalizer="masked", distill=DistillConfig(), noisy_context=True)


def row_of(blocks: int) -> Batch:
    """A prompt and some blocks of an answer, the last one cut; then a short document, and padding."""
    answer = SIZE * blocks - 2
    first = PROMPT + answer
    ids = np.zeros(LENGTH, np.int32)
    ids[:first], ids[first : first + 3] = 1, 2
    response = np.zeros(LENGTH, bool)
    response[PROMPT:first], response[first + 1 : first + 3] = True, True
    tokens = np.random.default_rng(blocks).integers(0, MASK, LENGTH, np.int32)
    return Batch(*(jnp.asarray(x)[None] for x in (tokens, ids, response)))


def model_with(seed: int, **values):
    model = jax.tree.map(lambda leaf: leaf, tiny_model(jnp.float64, seed=seed))
    model.config = dataclasses.replace(model.config, **values)
    return model


def block_of(batch: Batch, i: int, size: int | None, *, from_response: bool) -> int:
    """The number of a position's block in its document; the prompt's, where answers have their own, is -1."""
    ids, response = np.asarray(batch.segment_ids[0]), np.asarray(batch.loss_mask[0])
    start = int(np.flatnonzero(ids == ids[i])[0])
    if size is None:
        return 0
    if not from_response:
        return (i - start) // size
    origin = int(np.flatnonzero((ids == ids[i]) & response)[0])
    return -1 if i < origin else (i - origin) // size


def positions_of(batch: Batch) -> np.ndarray:
    ids = np.asarray(batch.segment_ids[0])
    return np.array([i - int(np.flatnonzero(ids == ids[i])[0]) for i in range(LENGTH)])


def dense(batch: Batch, sees) -> np.ndarray:
    ids = np.asarray(batch.segment_ids[0])
    return np.array(
        [[ids[i] > 0 and ids[i] == ids[j] and sees(i, j) for j in range(LENGTH)] for i in range(LENGTH)]
    )  # fmt: skip


def student_reads(batch: Batch, noisy: np.ndarray):
    """Tokens, positions and mask: the noisy row, each block with all before it."""
    block = partial(block_of, batch, size=SIZE, from_response=True)
    mask = dense(batch, lambda i, j: block(j) <= block(i))
    return noisy, positions_of(batch), mask


def canvas_reads(batch: Batch, noisy: np.ndarray):
    return noisy, positions_of(batch), dense(batch, lambda i, j: True)


def blocks_read(batch: Batch, noisy: np.ndarray):
    """A teacher that reads blocks of two from the document's start, each after clean ones."""
    block = partial(block_of, batch, size=2, from_response=False)
    own = dense(batch, lambda i, j: block(j) == block(i))
    before = dense(batch, lambda i, j: block(j) < block(i))
    clean = dense(batch, lambda i, j: block(j) <= block(i))
    tokens = np.concatenate([noisy, np.asarray(batch.tokens[0])])
    positions = np.tile(positions_of(batch), 2)
    return tokens, positions, np.block([[own, before], [np.zeros_like(own), clean]])


@partial(jax.jit, static_argnames="name")
def expected(student, teacher, student_read, teacher_read, weights, name):
    """Loss and gradients for the student."""

    def loss(student):
        ours = jax.nn.log_softmax(oracle.logits(student, *student_read))
        theirs = jax.nn.log_softmax(oracle.logits(teacher, *teacher_read)[:LENGTH])
        nats = theirs - ours if name == "kl" else -ours
        return (weights * (jnp.exp(theirs) * nats).sum(-1)).sum()

    return jax.value_and_grad(loss)(student)


@partial(jax.jit, static_argnames=("config", "teacher_paradigm"))
def computed(student, teacher, batch, key, config, teacher_paradigm):
    inputs = make_inputs(batch, key, config, student.config, teacher=teacher_paradigm)
    loss = lambda student, teacher: training_loss(student, inputs, config, teacher=teacher)
    return inputs, jax.value_and_grad(loss, (0, 1), has_aux=True)(student, teacher)


# What the teacher is and reads, and whether the position before predicts.
CASES = {
    "canvas": (CANVAS, canvas_reads, False),
    "shifted canvas": (dataclasses.replace(CANVAS, shifted=True), canvas_reads, True),
    "blocks": (Paradigm(block_size=2), blocks_read, False),
}
SLOW = [pytest.mark.slow, pytest.mark.ci]


@pytest.mark.parametrize(
    ("case", "blocks", "name"),
    [
        ("canvas", 1, "soft_cross_entropy"),
        ("canvas", 2, "soft_cross_entropy"),
        ("canvas", 5, "soft_cross_entropy"),
        ("shifted canvas", 2, "kl"),
        ("blocks", 2, "soft_cross_entropy"),
        *(pytest.param(case, n, "kl", marks=SLOW) for case in ("canvas", "blocks") for n in (1, 5)),
    ],
)
def test_equals_the_definition(case, blocks, name, x64):
    paradigm, teacher_reads, shifted = CASES[case]
    student, teacher = model_with(1, **STUDENT, shifted=shifted), model_with(2)
    batch = row_of(blocks)
    config = dataclasses.replace(D2F, distill=DistillConfig(name))
    inputs, ((total, metrics), (found, of_teacher)) = computed(
        student, teacher, batch, jax.random.key(blocks), config, paradigm
    )
    assert inputs.tokens.shape == (1, LENGTH), "one copy is read"
    noisy, weights = np.asarray(inputs.tokens[0]), np.asarray(inputs.weights[0], np.float64)
    asked = np.flatnonzero(weights)
    # In place of the masks, or before them: the first of a document has nobody before it, and is not masked here.
    np.testing.assert_array_equal(asked + shifted, np.flatnonzero(noisy == MASK))
    assert len(asked) and inputs.normalizer[0] == len(asked)
    value, gradients = expected(
        student, teacher, student_reads(batch, noisy), teacher_reads(batch, noisy), weights, name
    )
    np.testing.assert_allclose(total, value, rtol=1e-10)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9 * abs(theirs).max() + 1e-12)
    assert not any(leaf.any() for leaf in jax.tree.leaves(of_teacher))
    # What is reported stays the data's: the likelihood of its tokens.
    _, plain = weighted_loss(student, inputs)
    np.testing.assert_allclose(metrics.nll, plain.nll, rtol=1e-6)


def test_an_empty_masked_set_is_no_loss_and_no_gradient(x64):
    corruption = CorruptionConfig(t_min=1e-9, t_max=1e-9, at_least_one=False)
    config = dataclasses.replace(D2F, corruption=corruption)
    inputs, ((total, _), (gradients, _)) = computed(
        model_with(1, **STUDENT), model_with(2), row_of(2), jax.random.key(0), config, CANVAS
    )
    assert total == 0 and inputs.normalizer == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradients))


def test_views_of_a_row_are_read_by_both(x64):
    """Complementary ones: rows 2i and 2i + 1, of teacher and student alike."""
    config = dataclasses.replace(
        D2F, corruption=CorruptionConfig(complementary=True, t_min=0.3, t_max=0.7)
    )
    batch = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), row_of(2), row_of(5))
    student = model_with(1, **STUDENT)
    make = jax.jit(partial(make_inputs, config=config, model=student.config, teacher=CANVAS))
    inputs = make(batch, jax.random.key(0))
    assert inputs.teacher is not None
    np.testing.assert_array_equal(inputs.tokens, inputs.teacher.tokens)
    np.testing.assert_array_equal(inputs.positions, inputs.teacher.positions)
    assert inputs.tokens.shape == (4, LENGTH) and (inputs.tokens[0] != inputs.tokens[1]).any()


@pytest.mark.parametrize("shifted", [False, True])
def test_blocks_over_a_noisy_context_learn_tokens_too(shifted, x64):
    """Without a teacher: the same reading, and the data's tokens as targets."""
    student, batch = model_with(1, **STUDENT, shifted=shifted), row_of(5)
    config = dataclasses.replace(D2F, distill=None)
    make = jax.jit(partial(make_inputs, config=config, model=student.config))
    inputs = make(batch, jax.random.key(3))
    noisy, weights = np.asarray(inputs.tokens[0]), np.asarray(inputs.weights, np.float64)
    targets = np.roll(np.asarray(batch.tokens), -shifted, axis=1)
    reads = (jnp.asarray(x)[None] for x in student_reads(batch, noisy))
    value, _ = oracle.loss_and_gradients(student, *reads, targets, weights)
    total, _ = jax.jit(partial(training_loss, config=config))(student, inputs)
    np.testing.assert_allclose(total, value, rtol=1e-10)


def test_a_loss_without_its_teacher_is_refused():
    student, batch = model_with(1, **STUDENT), row_of(1)
    inputs = make_inputs(
        batch, jax.random.key(0), dataclasses.replace(D2F, distill=None), student.config
    )
    with refused(ConfigError, "objective.distill is set", "give both"):
        training_loss(student, inputs, D2F, teacher=student)


BAD = [
    ({}, D2F, None, "the teacher's paradigm None; give both, or neither"),
    ({}, dataclasses.replace(D2F, distill=None), CANVAS, "give both, or neither"),
    ({}, D2F, NEXT_TOKEN, "fills no masks (it is autoregressive)"),
    ({"shifted": True}, D2F, CANVAS, "has shifted=False and the trained one shifted=True"),
    (
        {"objective": "masked_diffusion", "bidirectional_prompt": False},
        D2F,
        CANVAS,
        "objective.noisy_context is True and the model has no blocks",
    ),
    (
        {"bidirectional_prompt": False, "causal_clean": True},
        D2F,
        CANVAS,
        "objective.noisy_context is True and causal_clean",
    ),
]


@pytest.mark.parametrize(("values", "config", "teacher", "told"), BAD)
def test_what_does_not_go_together_is_refused(values, config, teacher, told):
    model = model_with(1, **(STUDENT | values)).config
    with refused(ConfigError, told):
        make_inputs(row_of(1), jax.random.key(0), config, model, teacher=teacher)


@pytest.mark.parametrize(
    ("config", "teacher", "told"),
    [
        (dataclasses.replace(D2F, distill=None), None, "noisy_length is set and objective.noisy_context"),
        (dataclasses.replace(D2F, noisy_context=False), CANVAS, "noisy_length is set and objective.distill"),
    ],
)  # fmt: skip
def test_chosen_noisy_copies_are_refused(config, teacher, told):
    batch = row_of(1)._replace(noisy_index=jnp.arange(4, dtype=jnp.int32)[None])
    with refused(ConfigError, told, "leave noisy_length out"):
        make_inputs(batch, jax.random.key(0), config, tiny_model().config, teacher=teacher)


def test_an_unknown_loss_is_refused():
    with refused(ConfigError, "distill loss 'jsd' is unknown"):
        DistillConfig("jsd")  # pyright: ignore[reportArgumentType]
