"""What is proposed, and with which confidence, against plain numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from sdar_jax import DecodingConfig
from sdar_jax.decoding.commit_rules import STRATEGIES
from sdar_jax.decoding.config import sampling_params
from sdar_jax.decoding.proposal import _filter, propose
from sdar_jax.decoding.sampling_params import SamplingParams

ROWS, SIZE, VOCAB, MASK = 3, 4, 9, 8


_propose = jax.jit(partial(propose, mask_token_id=MASK))
_propose_seen = jax.jit(lambda seen, *args: propose(*args, lambda: seen, mask_token_id=MASK))


def params_of(configs: list[DecodingConfig], size: int, seed: int) -> SamplingParams:
    """Of each position of each row; row i has seed + i."""

    def params(config: DecodingConfig, seed: int) -> SamplingParams:
        rule = STRATEGIES[config.strategy or "low_confidence_dynamic"].rule
        return sampling_params(config, size, rule=(0, rule), seed=seed)

    rows = [params(config, seed + i) for i, config in enumerate(configs) for _ in range(size)]
    return jax.tree.map(lambda *each: np.stack(each), *rows)


def proposed(
    logits, config: DecodingConfig | list[DecodingConfig], seed=0, step=0, positions=None, seen=None
):
    """Of logits [rows, size, V], as lists of positions; results [rows, size]."""
    rows, size = logits.shape[:2]
    configs = config if isinstance(config, list) else [config] * rows
    positions = (
        np.tile(np.arange(size, dtype=np.int32), (rows, 1)) if positions is None else positions
    )
    arguments = (
        logits.reshape(-1, VOCAB),
        params_of(configs, size, seed),
        positions.reshape(-1),
        np.full(rows * size, step, np.int32),
    )
    out = (
        _propose(*arguments) if seen is None else _propose_seen(seen.reshape(-1, VOCAB), *arguments)
    )
    return jax.tree.map(lambda x: x.reshape(rows, size), out)


def random_logits(seed=0, rows=ROWS, size=SIZE) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=2.0, size=(rows, size, VOCAB))


def banned(logits: np.ndarray) -> np.ndarray:
    out = logits.astype(np.float64)
    out[..., MASK] = -np.inf
    return out


def softmax(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def filtered(probs: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """One distribution [V] after top-k, then top-p: the likeliest tokens until their share passes p, that one kept."""
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    order = order[: top_k or len(order)]
    share = probs[order] / probs[order].sum()
    kept = [order[0]] + [order[i] for i in range(1, len(order)) if share[:i].sum() < top_p]
    out = np.zeros_like(probs)
    out[kept] = probs[kept] / probs[kept].sum()
    return out


def test_greedy_is_the_argmax_and_its_probability(x64):
    logits = random_logits()
    out = proposed(logits, DecodingConfig())
    probs = softmax(banned(logits))
    np.testing.assert_array_equal(out.token, probs.argmax(-1))
    np.testing.assert_allclose(out.score, probs.max(-1), rtol=1e-12)
    np.testing.assert_allclose(out.logprob, np.log(probs.max(-1)), rtol=1e-12)
    assert out.token.dtype == jnp.int32


@pytest.mark.parametrize("temperature", [0.0, 1.0, 50.0])
def test_the_mask_is_never_proposed(temperature):
    """Not though its logit is the largest by far; and it takes no share of any probability."""
    logits = random_logits(rows=200).astype(np.float32)
    out, low = (proposed(logits, DecodingConfig(temperature=temperature)) for _ in range(2))
    logits[..., MASK] = 1e4
    high = proposed(logits, DecodingConfig(temperature=temperature))
    assert (out.token != MASK).all()
    jax.tree.map(np.testing.assert_array_equal, high, low)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 1, 2, 5, 8, 9, 100]),
    st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),
)
def test_top_k_then_top_p(seed, top_k, top_p):
    logits = banned(random_logits(seed))
    config = DecodingConfig(temperature=1.0, top_k=top_k, top_p=top_p)
    with jax.enable_x64(True):
        log_probs = jax.nn.log_softmax(logits).reshape(-1, VOCAB)
        some = np.arange(len(log_probs)) % 4 != 1
        found = jax.jit(_filter)(log_probs, params_of([config] * ROWS, SIZE, 0), some)
    wanted = np.apply_along_axis(filtered, -1, softmax(logits), top_k, top_p).reshape(-1, VOCAB)
    np.testing.assert_array_equal(found[~some], log_probs[~some])
    np.testing.assert_allclose(softmax(np.asarray(found))[some], wanted[some], rtol=1e-9)


def test_top_k_of_equal_tokens_keeps_them_all():
    """Which of equals to leave out would be arbitrary."""
    log_probs = jnp.log(jnp.array([[0.3, 0.3, 0.3, 0.1]]))
    parameters = params_of([DecodingConfig(temperature=1.0, top_k=2)], 1, 0)
    kept = jnp.isfinite(_filter(log_probs, parameters, jnp.ones(1, bool)))
    np.testing.assert_array_equal(kept, [[True, True, True, False]])


@pytest.mark.parametrize(
    "temperature, top_k, top_p", [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.0, 4, 0.9), (2.0, 3, 1.0)]
)
def test_samples_follow_the_distribution(temperature, top_k, top_p):
    """20,000 rows of one distribution, each with its own seed."""
    logits = random_logits(7, 1, 1)
    config = DecodingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    out = proposed(np.broadcast_to(logits, (20_000, 1, VOCAB)).astype(np.float32), config)
    wanted = filtered(softmax(banned(logits)[0, 0] / temperature), top_k, top_p)
    counts = np.bincount(np.asarray(out.token).ravel(), minlength=VOCAB)
    possible = wanted > 0
    assert possible.sum() >= 2
    assert not counts[~possible].any()
    assert scipy.stats.chisquare(counts[possible], 20_000 * wanted[possible]).pvalue > 1e-3


def test_confidence_before_and_after_the_filter(x64):
    logits = random_logits(4, rows=50)
    parameters = dict(temperature=0.7, top_k=3, top_p=0.95)
    before = proposed(logits, DecodingConfig(**parameters))
    after = proposed(logits, DecodingConfig(**parameters, confidence="post_filter"))
    np.testing.assert_array_equal(before.token, after.token)
    probs = softmax(banned(logits) / 0.7)
    kept = np.apply_along_axis(filtered, -1, probs, 3, 0.95)
    at = lambda x: np.take_along_axis(x, np.asarray(before.token)[..., None], axis=-1)[..., 0]
    # SamplingParams are float32: 0.7 is so to 2e-8 of its value.
    np.testing.assert_allclose(before.score, at(probs), rtol=1e-6)
    np.testing.assert_allclose(after.score, at(kept), rtol=1e-6)
    # Of the committed token, at temperature 1 and unfiltered, in both.
    for out in (before, after):
        np.testing.assert_allclose(np.exp(out.logprob), at(softmax(banned(logits))), rtol=1e-9)


def test_post_filter_is_sure_of_the_only_token_left():
    config = DecodingConfig(temperature=1.0, top_k=1, confidence="post_filter")
    out = proposed(random_logits().astype(np.float32), config)
    np.testing.assert_array_equal(out.token, banned(random_logits()).argmax(-1))
    np.testing.assert_array_equal(out.score, np.ones((ROWS, SIZE)))


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_scores_and_entropy(temperature, x64):
    logits = random_logits(5)
    probs = softmax(banned(logits) / (temperature or 1.0))
    entropy = -(probs * np.log(np.where(probs > 0, probs, 1))).sum(-1)
    top = np.sort(probs, axis=-1)
    margin = proposed(logits, DecodingConfig(temperature=temperature, score="margin"))
    certain = proposed(
        logits,
        DecodingConfig(temperature=temperature, score="neg_entropy", confidence_threshold=0.5),
    )
    np.testing.assert_allclose(margin.score, top[..., -1] - top[..., -2], rtol=1e-9)
    np.testing.assert_allclose(margin.entropy, entropy, rtol=1e-9)
    np.testing.assert_allclose(certain.score, -entropy, rtol=1e-9)


def test_randomness_is_keyed_by_seed_position_and_step():
    """Each of the three matters; the row in the batch and the place in the window do not."""
    flat = np.zeros((8, SIZE, VOCAB), np.float32)
    config = DecodingConfig(temperature=1.0)
    seeds = proposed(flat, config, seed=0)
    shifted = proposed(flat, config, seed=2)
    np.testing.assert_array_equal(seeds.token[2:], shifted.token[:-2])
    positions = np.tile(np.arange(SIZE, dtype=np.int32), (8, 1))
    later = proposed(flat, config, positions=positions + 1)
    np.testing.assert_array_equal(seeds.token[:, 1:], later.token[:, :-1])
    for other in (shifted, later, proposed(flat, config, step=1)):
        assert (other.token != seeds.token).mean() > 0.5


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1e6])
def test_extreme_temperatures_stay_finite(temperature):
    """A low one tends to the argmax, a high one to a uniform choice."""
    logits = np.float32(30) * random_logits(6, rows=500).astype(np.float32)
    out = proposed(logits, DecodingConfig(temperature=temperature, top_k=2**31, top_p=0.99))
    assert all(np.isfinite(x).all() for x in (out.score, out.entropy, out.logprob))
    if temperature < 1:
        np.testing.assert_array_equal(out.token, banned(logits).argmax(-1))
    else:
        assert (
            scipy.stats.chisquare(np.bincount(np.asarray(out.token).ravel(), minlength=8)).pvalue
            > 1e-3
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_are_told(bad):
    logits = random_logits().astype(np.float32)
    logits[1, 2, 3] = bad
    finite = np.ones((ROWS, SIZE), bool)
    finite[1, 2] = False
    np.testing.assert_array_equal(proposed(logits, DecodingConfig()).finite, finite)


def test_repetition_penalty(x64):
    """CTRL's: logits of seen tokens divided where positive, else multiplied; the raw log-probability stays raw."""
    logits = random_logits(8)
    seen = np.random.default_rng(1).random(logits.shape) < 0.5
    config = DecodingConfig(repetition_penalty=1.7)
    out = proposed(logits, config, seen=seen)
    probs = softmax(
        banned(np.where(seen, np.where(logits < 0, logits * 1.7, logits / 1.7), logits))
    )
    np.testing.assert_array_equal(out.token, probs.argmax(-1))
    np.testing.assert_allclose(out.score, probs.max(-1), rtol=1e-6)
    raw = np.take_along_axis(softmax(banned(logits)), probs.argmax(-1)[..., None], -1)[..., 0]
    np.testing.assert_allclose(np.exp(out.logprob), raw, rtol=1e-9)
    assert (out.token != proposed(logits, DecodingConfig(), seen=seen).token).any()


def test_rows_of_different_configs_do_not_touch(x64):
    """Each row of a mixed batch has what it has in a batch of its own kind."""
    kinds = [
        DecodingConfig(),
        DecodingConfig(temperature=0.8),
        DecodingConfig(temperature=1.2, top_k=3, top_p=0.8, confidence="post_filter"),
        DecodingConfig(score="margin", confidence="post_filter"),
        DecodingConfig(temperature=0.5, score="neg_entropy"),
        DecodingConfig(strategy="entropy_bounded"),
        DecodingConfig(repetition_penalty=2.0),
    ]
    logits, seen = (
        random_logits(3, rows=len(kinds)),
        np.random.default_rng(2).random((len(kinds), SIZE, VOCAB)) < 0.5,
    )
    mixed = proposed(logits, kinds, seen=seen)
    for row, kind in enumerate(kinds):
        alone = proposed(logits, kind, seen=seen)
        np.testing.assert_array_equal(mixed.token[row], alone.token[row])
        for name in ("score", "logprob"):
            np.testing.assert_allclose(
                getattr(mixed, name)[row], getattr(alone, name)[row], rtol=1e-12
            )
