"""Commit rules that are defined here alone, used through `generate` and `Engine`."""

import jax.numpy as jnp
import numpy as np
import pytest

from sdar_jax import DecodingConfig, Engine, generate
from sdar_jax.decoding import CommitRule, tokens_per_step
from sdar_jax.errors import ConfigError, DecodingError
from tests.bad_input import refused
from tests.jaxprs import compilations
from tests.tiny import tiny_model

SIZE = 4
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]]
ENGINE = {"batch_slots": 2, "pages": 12, "page_size": 8}


def rightmost(proposal, masked, step, parameters):
    """Commits the rightmost n_k."""
    behind = jnp.cumsum(masked[:, ::-1], axis=-1)[:, ::-1]
    return behind <= tokens_per_step(step, parameters)


def as_static(proposal, masked, step, parameters):
    """The most confident one; the leftmost of equals."""
    best = jnp.argmax(jnp.where(masked, proposal.score, -jnp.inf), axis=-1)
    return jnp.arange(masked.shape[1]) == best[:, None]


def least_entropy(proposal, masked, step, parameters):
    best = jnp.argmin(jnp.where(masked, proposal.entropy, jnp.inf), axis=-1)
    return jnp.arange(masked.shape[1]) == best[:, None]


def nothing(proposal, masked, step, parameters):
    return jnp.zeros_like(masked)


def decoded(config, model=None, **options):
    model = tiny_model(jnp.float32) if model is None else model
    return generate(model, PROMPTS, config, max_new_tokens=8, stop_token_ids=(), **options)


def test_a_rule_commits_what_it_says():
    config = DecodingConfig(strategy=rightmost)
    for prompt, completion in zip(PROMPTS, decoded(config), strict=True):
        known = len(prompt) % SIZE
        first, second = SIZE - known, 2 * SIZE - known
        # Steps count the forwards of a request: each block is filled from its right end.
        assert completion.steps[:first] == list(range(first))[::-1]
        assert completion.steps[first:second] == list(range(first, second))[::-1]
        assert completion.finish_reason == "length" and completion.text is None


def test_a_rule_that_says_what_a_strategy_says_gives_its_tokens():
    static = DecodingConfig(strategy="low_confidence_static")
    assert decoded(DecodingConfig(strategy=CommitRule(as_static, reads_entropy=False))) == decoded(
        static
    )


@pytest.mark.slow
@pytest.mark.ci
def test_a_rule_that_reads_the_entropy_gives_a_strategy_s_tokens():
    static = DecodingConfig(strategy="low_confidence_static")
    # A function that does not say what it reads is given the entropy too, by other arithmetic.
    for got, wanted in zip(
        decoded(DecodingConfig(strategy=as_static)), decoded(static), strict=True
    ):
        assert (got.tokens, got.steps) == (wanted.tokens, wanted.steps)
    bounded = DecodingConfig(strategy="entropy_bounded", entropy_bound=0.0)
    assert decoded(DecodingConfig(strategy=least_entropy)) == decoded(bounded)


def test_an_engine_takes_rules_as_they_come_and_serves_them_side_by_side():
    engine = Engine(tiny_model(jnp.float32), **ENGINE)
    configs = [DecodingConfig(strategy=strategy) for strategy in (rightmost, None)]
    ids = [
        engine.submit(prompt, config, max_new_tokens=8, stop_token_ids=())
        for prompt, config in zip(PROMPTS[:2], configs, strict=True)
    ]
    for i, config in enumerate(configs):
        served, alone = engine.result(ids[i]), decoded(config)[i]
        assert (served.tokens, served.steps) == (alone.tokens, alone.steps)


@pytest.mark.slow
@pytest.mark.ci
def test_strategies_that_an_engine_is_told_of_compile_nothing_anew():
    engine = Engine(tiny_model(jnp.float32), **ENGINE, strategies=("sequential", rightmost))
    engine.warm_up()
    with compilations() as compiled:
        for strategy in (rightmost, "sequential", None):
            engine.generate(
                PROMPTS[:1], DecodingConfig(strategy=strategy), max_new_tokens=2, stop_token_ids=()
            )
    assert not compiled
    with refused(DecodingError, "strategy 'semi_autoregressive' has no cache"):
        Engine(tiny_model(jnp.float32), **ENGINE, strategies=("semi_autoregressive",))


def test_rules_of_one_batch_may_differ():
    mixed = decoded(
        [DecodingConfig(strategy=rightmost), DecodingConfig(), DecodingConfig(strategy=rightmost)]
    )
    alone, default = decoded(DecodingConfig(strategy=rightmost)), decoded(DecodingConfig())
    assert mixed[0].steps == alone[0].steps and mixed[2].steps == alone[2].steps
    assert mixed[1].tokens == default[1].tokens


def test_a_rule_that_commits_nothing_ends_its_request_alone():
    stuck, other, _ = decoded(
        [DecodingConfig(strategy=nothing), DecodingConfig(), DecodingConfig()]
    )
    assert stuck.finish_reason == "error" and stuck.tokens == []
    assert other.tokens == decoded(DecodingConfig())[1].tokens


@pytest.mark.parametrize(
    "rule",
    [lambda *_: jnp.zeros((2, 3), bool), lambda proposal, *_: proposal.score, lambda *_: None],
)
def test_a_rule_that_returns_something_else_is_refused_before_anything_is_compiled(rule):
    with refused(ConfigError, "commit rule <lambda> returns", "give bool"):
        decoded(DecodingConfig(strategy=rule))
    engine = Engine(tiny_model(jnp.float32), **ENGINE)
    with refused(ConfigError, "commit rule <lambda> returns", "give bool"):
        engine.submit([1], DecodingConfig(strategy=rule), max_new_tokens=1)
    assert engine.stats().queued == 0


@pytest.mark.parametrize("strategy", ["greedy", 3, ()])
def test_what_is_no_strategy_is_refused(strategy, unchecked_types):
    with refused(ConfigError, f"strategy {strategy!r} is unknown", "a commit rule", "use one of"):
        DecodingConfig(strategy=strategy)


@pytest.mark.parametrize(
    "own, fields",
    [
        ("low_confidence_dynamic", {}),
        ("semi_autoregressive", {"objective": "masked_diffusion"}),
        (
            "autoregressive",
            {"objective": "autoregressive", "block_size": None, "mask_token_id": None},
        ),
    ],
)
def test_without_a_strategy_a_model_is_decoded_in_its_own_way(own, fields):
    model = tiny_model(jnp.float32, **fields)
    assert decoded(DecodingConfig(), model) == decoded(DecodingConfig(strategy=own), model)


def test_an_autoregressive_engine_needs_not_be_told():
    fields = {"objective": "autoregressive", "block_size": None, "mask_token_id": None}
    model = tiny_model(jnp.float32, **fields)
    engine = Engine(model, **ENGINE)
    got = engine.result(engine.submit(PROMPTS[0], max_new_tokens=8, stop_token_ids=()))
    assert got.tokens == decoded(DecodingConfig(), model)[0].tokens
    assert np.isfinite(got.logprobs).all()
    with refused(DecodingError, "block_size is 4", "this model is autoregressive", "leave it out"):
        decoded(DecodingConfig(block_size=4), model)
