"""Which proposals are committed: schedules by their tables, strategies against lists, ties included."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdar_jax import DecodingConfig
from sdar_jax.decoding.commit_rules import STRATEGIES, select
from sdar_jax.decoding.config import commit_schedule, sampling_params
from sdar_jax.decoding.proposal import Proposal
from sdar_jax.errors import DecodingError
from tests.bad_input import refused
from tests.decoding import oracle
from tests.tiny import tiny_model

SIZE = 5


@pytest.mark.parametrize(
    "size, steps, schedule, wanted",
    [
        (4, 3, "released", [2, 1, 1, 1]),
        (8, 3, "released", [3, 3, 2, 2, 2, 2, 2, 2]),
        (4, 4, "released", [1, 1, 1, 1]),
        (4, None, "released", [1, 1, 1, 1]),
        (4, 1, "released", [4, 4, 4, 4]),
        (16, 5, "released", [4, *[3] * 15]),
        (4, 3, "paper", [2, 2, 2, 2]),
        (8, 3, "paper", [3] * 8),
        (4, None, "paper", [1, 1, 1, 1]),
        (1, None, "released", [1]),
    ],
)
def test_schedules(size, steps, schedule, wanted):
    """The tables of semantics, section 4; steps past the last repeat it."""
    np.testing.assert_array_equal(commit_schedule(size, steps, schedule), wanted)


@given(st.integers(1, 64), st.data())
def test_a_schedule_fills_its_block_in_its_steps(size, data):
    steps = data.draw(st.integers(1, size))
    released, paper = (commit_schedule(size, steps, name)[:steps] for name in ("released", "paper"))
    assert released.sum() == size and released.min() >= 1 and (np.diff(released) <= 0).all()
    assert paper.sum() >= size > paper.sum() - steps


def test_more_steps_than_positions_is_refused():
    with refused(DecodingError, "denoising_steps 5", "block_size 4", "at most"):
        DecodingConfig(denoising_steps=5).resolve_block_size(tiny_model(jnp.float32).config)


# All rules at once, as in a batch whose requests differ.
RULES = tuple(dict.fromkeys(strategy.rule for strategy in STRATEGIES.values()))
_select = jax.jit(partial(select, RULES))


def selected(
    config: DecodingConfig, scores, entropy, masked, step: int, activated=True
) -> np.ndarray:
    row = lambda values, dtype: jnp.asarray([values], dtype)
    score, uncertain = row(scores, jnp.float32), row(entropy, jnp.float32)
    proposal = Proposal(
        row([0] * SIZE, jnp.int32), score, uncertain, score, row([True] * SIZE, bool)
    )
    rule = STRATEGIES[config.strategy].rule
    own = sampling_params(config, SIZE, rule=(RULES.index(rule), rule))
    parameters = jax.tree.map(lambda value: value[None], own)
    return np.asarray(
        _select(proposal, row(masked, bool), jnp.int32([step]), jnp.array([activated]), parameters)[
            0
        ]
    )


# Few values, so that ties are common; exact in float32, as the thresholds are.
SCORES = st.lists(st.sampled_from([0.125, 0.25, 0.5, 0.75, 1.0]), min_size=SIZE, max_size=SIZE)
MASKED = st.lists(st.booleans(), min_size=SIZE, max_size=SIZE)
CONFIGS = [
    DecodingConfig(strategy="sequential", denoising_steps=2),
    DecodingConfig(strategy="low_confidence_static", denoising_steps=2),
    DecodingConfig(strategy="low_confidence_static", denoising_steps=3, schedule="paper"),
    DecodingConfig(strategy="semi_autoregressive"),
    DecodingConfig(strategy="low_confidence_dynamic", confidence_threshold=0.5),
    DecodingConfig(strategy="low_confidence_dynamic", confidence_threshold=0.25, denoising_steps=2),
    DecodingConfig(strategy="entropy_bounded", entropy_bound=0.75),
    DecodingConfig(strategy="entropy_bounded", entropy_bound=0.75, entropy_rule="jetengine"),
    DecodingConfig(strategy="entropy_bounded", entropy_bound=0.0),
    DecodingConfig(strategy="factor", factor=1.5),
    DecodingConfig(strategy="factor", factor=0.0),
    DecodingConfig(strategy="sub_blocks", sub_block_size=2, confidence_threshold=0.5),
    DecodingConfig(strategy="sub_blocks", sub_block_size=3, confidence_threshold=1.0),
    DecodingConfig(strategy="sub_blocks", confidence_threshold=0.25),
]


@pytest.mark.parametrize(
    "config", CONFIGS, ids=[f"{i}-{config.strategy}" for i, config in enumerate(CONFIGS)]
)
@settings(max_examples=100)
@given(scores=SCORES, entropy=SCORES, masked=MASKED, step=st.integers(0, 9))
def test_strategies_equal_lists(config, scores, entropy, masked, step):
    got = selected(config, scores, entropy, masked, step)
    offsets = [i for i in range(SIZE) if masked[i]]
    wanted = oracle.n_k(SIZE, config.denoising_steps, config.schedule, step)
    expected = oracle.pick(config, scores, entropy, offsets, wanted) if offsets else []
    np.testing.assert_array_equal(np.flatnonzero(got), sorted(expected))
    assert bool(offsets) == bool(got.any())


@pytest.mark.parametrize("config", CONFIGS[::3], ids=lambda config: config.strategy)
@given(scores=SCORES, masked=MASKED)
def test_a_block_that_is_not_activated_commits_only_what_is_sure(config, scores, masked):
    sure = [
        m and score > config.confidence_threshold for m, score in zip(masked, scores, strict=True)
    ]
    np.testing.assert_array_equal(
        selected(config, scores, scores, masked, 0, activated=False), sure
    )


def test_what_each_strategy_does():
    """By hand, so that the lists themselves are held to something."""
    scores, entropy = [0.3, 0.9, 0.9, 0.6], [0.5, 0.1, 0.2, 0.4]
    pick = lambda masked, wanted, **names: oracle.pick(
        DecodingConfig(**names), scores, entropy, masked, wanted
    )
    every = [0, 1, 2, 3]
    assert pick([0, 2, 3], 2, strategy="sequential") == [0, 2]
    assert pick(every, 1, strategy="low_confidence_static") == [1]
    assert pick(every, 3, strategy="low_confidence_static") == [1, 2, 3]
    assert pick([0, 3], 3, strategy="low_confidence_static") == [3, 0]
    dynamic = partial(pick, strategy="low_confidence_dynamic")
    assert dynamic(every, 1, confidence_threshold=0.8) == [1, 2]
    assert dynamic(every, 1, confidence_threshold=0.9) == [1]
    assert dynamic(every, 3, confidence_threshold=0.8) == [1, 2, 3]
    bounded = partial(pick, every, 1, strategy="entropy_bounded")
    assert bounded(entropy_bound=0.31) == [1, 2, 3]
    assert bounded(entropy_bound=0.31, entropy_rule="jetengine") == [1, 2]
    assert bounded(entropy_bound=0.0) == [1] == bounded(entropy_bound=0.0, entropy_rule="jetengine")
    # c_(n) >= 1 - f / (n + 1): at f = 1.5, 0.9 >= 0.25, 0.9 >= 0.5, 0.6 < 0.625, 0.3 < 0.7.
    assert pick(every, 1, strategy="factor", factor=1.5) == [1, 2]
    assert pick(every, 1, strategy="factor", factor=0.0) == [1]
    halves = partial(pick, wanted=1, strategy="sub_blocks", sub_block_size=2)
    assert halves(every) == [0] and halves([1, 2, 3]) == [1]
    assert halves([2, 3], confidence_threshold=0.5) == [2, 3]
    assert halves([2, 3], confidence_threshold=0.9) == [2]
