"""The bound against its exact value: every mask of every block, one by one."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdar_jax import logits, nelbo
from sdar_jax.corruption import corrupt
from sdar_jax.errors import ConfigError, DataError
from sdar_jax.evaluation import autoregressive_nll, likelihood
from sdar_jax.evaluation.likelihood import Groups, log_likelihoods
from sdar_jax.objectives import Batch, diffusion_inputs
from sdar_jax.weighted_loss import score_tokens
from tests.bad_input import refused
from tests.tiny import MASK, pack, tiny_model

LENGTH = 8
BATCH = 128
_logits = partial(jax.jit, static_argnames="block_size")(logits)


def nll_in_place(
    model, sequences: list[list[int]], targets: list[list[int]], block_size
) -> np.ndarray:
    """-log p(target) at each position of each sequence, in one call of fixed shape: [sequences, LENGTH]."""
    tokens, wanted, segment_ids = (np.zeros((BATCH, LENGTH), np.int32) for _ in range(3))
    for row, (sequence, target) in enumerate(zip(sequences, targets, strict=True)):
        tokens[row, : len(sequence)], wanted[row, : len(target)] = sequence, target
        segment_ids[row, : len(sequence)] = 1
    scores = np.asarray(_logits(model, tokens, block_size=block_size, segment_ids=segment_ids))
    log_probs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probs, wanted[..., None], axis=-1)[: len(sequences), :, 0]


def exact(
    model,
    document: list[int],
    block_size: int,
    counted: list[bool] | None = None,
    bidirectional=False,
) -> float:
    """The sum over blocks and k = 1..n, n their counted tokens, of 1 / (k C(n, k)) times the CE of masks of size k."""
    counted = [True] * len(document) if counted is None else counted
    sequences, targets, choices = [], [], []
    for start in range(0, len(document), block_size):
        end = min(start + block_size, len(document))
        open_ = [i for i in range(start, end) if counted[i]]
        for k in range(1, len(open_) + 1):
            for chosen in itertools.combinations(open_, k):
                sequence = [
                    MASK if i in chosen else token for i, token in enumerate(document[:end])
                ]
                sequences.append(sequence)
                targets.append(document[:end])
                choices.append((chosen, 1 / (k * math.comb(len(open_), k))))
    nll = nll_in_place(model, sequences, targets, None if bidirectional else block_size)
    return sum(
        weight * nll[row, list(chosen)].sum() for row, (chosen, weight) in enumerate(choices)
    )


def random_tokens(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, MASK, (rows, LENGTH)).astype(np.int32)


def test_blocks_of_one_are_the_chain_rule(x64):
    """All masked, weight 1, nothing random: -log p(x_i | x_<i, M at i), with a standard error of exactly zero."""
    tokens = random_tokens(2, 0)
    mean, error = nelbo(tiny_model(), tokens, block_size=1, samples=3)
    sequences = [[*row[:i].tolist(), MASK] for row in tokens for i in range(LENGTH)]
    targets = [row[: i + 1].tolist() for row in tokens for i in range(LENGTH)]
    nll = nll_in_place(tiny_model(), sequences, targets, 1)
    chain = sum(nll[row, len(sequence) - 1] for row, sequence in enumerate(sequences))
    np.testing.assert_allclose(mean, chain / 16, rtol=1e-12)
    assert error == 0


# Two documents (5 = 4 + 1, a last block cut short) and padding; and a row that is one document.
SEGMENTS = pack([5, -1, 2], [8], length=LENGTH)
DOCUMENTS = [(0, 0, 5), (0, 6, 8), (1, 0, 8)]


def exact_batch(model, tokens, block_size, counted) -> float:
    """Nats per counted token of the packed batch."""
    total = sum(
        exact(model, tokens[row, a:b].tolist(), block_size, counted[row, a:b].tolist())
        for row, a, b in DOCUMENTS
    )
    return total / counted.sum()


@pytest.mark.parametrize("response_only", [False, True])
@pytest.mark.parametrize("block_size", [2, 4])
def test_estimates_the_exact_bound(block_size, response_only, x64):
    """Packed documents, padding, and tokens that are given: within 4 standard errors, which are small."""
    tokens = random_tokens(2, 1)
    counted = SEGMENTS > 0
    if response_only:
        counted &= np.array([[0, 1, 1, 0, 1, 0, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1]], bool)
    wanted = exact_batch(tiny_model(), tokens, block_size, counted)
    mask = counted if response_only else None
    mean, error = nelbo(
        tiny_model(),
        tokens,
        block_size=block_size,
        segment_ids=SEGMENTS,
        loss_mask=mask,
        samples=400,
        seed=5,
    )
    assert 0 < error < 0.03 * wanted
    assert abs(mean - wanted) < 4 * error


def test_the_error_shrinks_and_is_honest(x64):
    """Of 40 estimates, the spread is what each one's own standard error says; with 9 times the samples, a third."""
    tokens = random_tokens(2, 2)
    estimate = partial(nelbo, tiny_model(), tokens, block_size=4, segment_ids=SEGMENTS)
    run = lambda samples, seed: estimate(samples=samples, seed=seed)
    few = np.array([run(6, seed) for seed in range(40)])
    many = np.array([run(54, seed) for seed in range(8)])
    spread = few[:, 0].std(ddof=1)
    assert 0.7 < spread / np.sqrt((few[:, 1] ** 2).mean()) < 1.4
    assert 0.25 < np.sqrt((many[:, 1] ** 2).mean() / (few[:, 1] ** 2).mean()) < 0.42


def test_no_block_size_bounds_masked_diffusion(x64):
    """Eq. 5: the document is one block, every key in sight."""
    tokens = random_tokens(1, 3)
    segment_ids = pack([5, -3], length=LENGTH)
    wanted = exact(tiny_model(), tokens[0, :5].tolist(), 5, bidirectional=True) / 5
    mean, error = nelbo(tiny_model(), tokens, block_size=None, segment_ids=segment_ids, samples=400)
    assert 0 < error < 0.03 * wanted
    assert abs(mean - wanted) < 4 * error


def test_seeds_decide():
    model, tokens = tiny_model(jnp.float32), random_tokens(2, 4)
    first, again, other = (
        nelbo(model, tokens, block_size=4, samples=2, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_autoregressive_nll(x64):
    """From logits(block_size=1): each token from the state before it, the first of a document left out."""
    tokens = random_tokens(2, 6)
    model = tiny_model(objective="autoregressive", mask_token_id=None, block_size=None)
    scores = np.asarray(_logits(model, tokens, block_size=1, segment_ids=SEGMENTS))
    log_probs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    nll = [
        -log_probs[row, i - 1, tokens[row, i]] for row, a, b in DOCUMENTS for i in range(a + 1, b)
    ]
    np.testing.assert_allclose(
        autoregressive_nll(model, tokens, segment_ids=SEGMENTS), np.mean(nll), rtol=1e-12
    )
    second = np.zeros((2, LENGTH), bool)
    second[1, 4] = True
    only = autoregressive_nll(model, tokens, segment_ids=SEGMENTS, loss_mask=second)
    np.testing.assert_allclose(only, -log_probs[1, 3, tokens[1, 4]], rtol=1e-12)


def batch_of(tokens, counted=None) -> Batch:
    counted = SEGMENTS > 0 if counted is None else counted
    return Batch(*map(jnp.asarray, (tokens, SEGMENTS, counted)))


def test_groups_are_parts_of_the_bound(x64):
    """The masks of each sample, block by block and token by token, with the prefix alone as context."""
    tokens, draw = random_tokens(2, 8), np.random.default_rng(0)
    batch = batch_of(tokens, (SEGMENTS > 0) & (draw.random(SEGMENTS.shape) < 0.8))
    labels = draw.integers(0, 3, SEGMENTS.shape)
    found = likelihood.bound(
        tiny_model(), batch, block_size=2, samples=2, seed=3, groups=Groups(labels, 4)
    )
    expected, counts = np.zeros(4), np.zeros(4)
    np.add.at(counts, labels[batch.loss_mask], 1)
    for sample in range(2):
        key = jax.random.fold_in(jax.random.key(3), sample)
        masked, weights = corrupt(*batch[1:3], key, likelihood._BOUND, block_size=2)
        for row, a, b in DOCUMENTS:
            for start in range(a, b, 2):
                end = min(start + 2, b)
                clean = tokens[row, a:end].tolist()
                hidden = [i >= start - a and bool(masked[row, a + i]) for i in range(end - a)]
                noisy = [MASK if hide else token for hide, token in zip(hidden, clean, strict=True)]
                nll = nll_in_place(tiny_model(), [noisy], [clean], 2)[0]
                for i in np.flatnonzero(hidden):
                    expected[labels[row, a + i]] += weights[row, a + i] * nll[i] / 2
    np.testing.assert_allclose(found.group_nats, expected, rtol=1e-12)
    np.testing.assert_array_equal(found.group_counts, counts)
    assert expected[:3].all() and found.count == counts.sum()
    np.testing.assert_allclose(found.count * found.mean, expected.sum(), rtol=1e-12)


def test_groups_of_a_shifted_bound(x64):
    """A token is in its own group, and its score at the position before; all are masked in blocks of one."""
    model, tokens = tiny_model(shifted=True), random_tokens(2, 10)
    labels, batch = np.random.default_rng(2).integers(0, 3, SEGMENTS.shape), batch_of(tokens)
    found = likelihood.bound(
        model, batch, block_size=1, samples=2, seed=0, groups=Groups(labels, 3)
    )
    paradigm, masks = model.config.with_blocks(1), jnp.full(SEGMENTS.shape, MASK)
    inputs = diffusion_inputs(paradigm, batch, masks, jnp.ones(SEGMENTS.shape))
    _, scores = jax.jit(score_tokens)(model, inputs)
    expected, counts = np.zeros(3), np.zeros(3)
    for row, a, b in DOCUMENTS:
        for i in range(a + 1, b):
            expected[labels[row, i]] += scores.nll[row, i - 1]
            counts[labels[row, i]] += 1
    np.testing.assert_allclose(found.group_nats, expected, rtol=1e-12)
    np.testing.assert_array_equal(found.group_counts, counts)


@pytest.mark.parametrize("kind", ["in place", "next token"])
def test_a_token_is_in_its_own_group_wherever_it_is_predicted(kind, x64):
    """The value of a group is that of its tokens alone, of blocks of one, where nothing is random."""
    tokens = random_tokens(2, 9)
    labels = np.random.default_rng(1).integers(0, 3, SEGMENTS.shape)
    batch, groups = batch_of(tokens), Groups(labels, 3)
    if kind == "next token":
        model = tiny_model(objective="autoregressive", mask_token_id=None, block_size=None)
        found = likelihood.exact(model, batch, groups)
        alone = partial(autoregressive_nll, model)
    else:
        model = tiny_model()
        options = {"block_size": 1, "samples": 2, "seed": 0}
        found = likelihood.bound(model, batch, **options, groups=groups)
        alone = lambda *args, **masks: nelbo(model, *args, **options, **masks)[0]
    for group in range(3):
        mean = alone(tokens, segment_ids=SEGMENTS, loss_mask=(labels == group) & (SEGMENTS > 0))
        each = found.group_nats[group] / found.group_counts[group]
        np.testing.assert_allclose(each, mean, rtol=1e-12)


def test_without_segment_ids_a_row_is_one_document():
    model, tokens = tiny_model(jnp.float32), random_tokens(2, 7)
    one = np.ones_like(tokens)
    assert autoregressive_nll(model, tokens) == autoregressive_nll(model, tokens, segment_ids=one)
    assert nelbo(model, tokens, block_size=4) == nelbo(model, tokens, block_size=4, segment_ids=one)


GOOD = {"tokens": np.ones((1, LENGTH), int), "block_size": 4}
BAD = [
    (ConfigError, {"samples": 1}, "samples is 1", "at least 2"),
    (ConfigError, {"samples": 2.5}, "samples is 2.5", "at least 2"),
    (ConfigError, {"block_size": 0}, "block_size is 0", "positive integer"),
    (
        ConfigError,
        {"loss_mask": np.zeros((1, LENGTH), bool)},
        "no token is counted",
        "give at least one",
    ),
    (
        ConfigError,
        {"segment_ids": np.zeros((1, LENGTH), int)},
        "no token is counted",
        "give at least one",
    ),
    (DataError, {"tokens": np.full((1, LENGTH), 50)}, "id 50", "0 to 22"),
    (DataError, {"tokens": np.full((1, LENGTH), -1)}, "id -1", "0 to 22"),
    (DataError, {"tokens": np.ones(LENGTH, int)}, "tokens (8,)", "[rows, length]"),
    (DataError, {"segment_ids": np.ones((1, 7), int)}, "segment_ids (1, 7)", "[rows, length]"),
    (DataError, {"loss_mask": np.ones((2, LENGTH), bool)}, "loss_mask (2, 8)", "[rows, length]"),
]


@pytest.mark.parametrize("kind, changes, value, fix", BAD)
def test_bad_input(kind, changes, value, fix):
    model = tiny_model(jnp.float32)
    with refused(kind, value, fix):
        nelbo(model, **{**GOOD, **changes})


def test_a_model_without_a_mask_has_no_bound():
    model = tiny_model(jnp.float32, mask_token_id=None)
    with refused(ConfigError, "mask_token_id", "set it"):
        nelbo(model, **GOOD)


def test_nothing_to_count_for_autoregression():
    """One token a document: nothing is predicted."""
    with refused(ConfigError, "no token is counted", "give at least one"):
        autoregressive_nll(tiny_model(jnp.float32), np.ones((2, 1), int))


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("block_size", [4, 1])
def test_each_row_is_scored_as_if_alone(block_size, x64):
    """Rows of several lengths in one batch, an empty one among them, against `nelbo` of each without its padding."""
    lengths, last = [8, 5, 0], [3, 4, 0]
    tokens, place = random_tokens(3, 6), np.arange(LENGTH)
    inside = np.array([place < length for length in lengths])
    counted = inside & [place >= n - k for n, k in zip(lengths, last, strict=True)]
    options = {"block_size": block_size, "samples": 5, "seed": 3}
    found = log_likelihoods(
        tiny_model(), tokens, segment_ids=inside.astype(np.int32), loss_mask=counted, **options
    )
    assert found[2] == 0
    for row, length in enumerate(lengths[:2]):
        only = np.s_[row : row + 1, :length]
        mean, _ = nelbo(tiny_model(), tokens[only], loss_mask=counted[only], **options)
        np.testing.assert_allclose(found[row], -mean * last[row], rtol=1e-12)
