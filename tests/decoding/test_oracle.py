"""The block buffer equals a plain Python loop, in float64: strategies, block sizes, prompt tails, batches, windows."""

import dataclasses

import numpy as np
import pytest

from sdar_jax import DecodingConfig, generate
from tests.decoding import oracle
from tests.tiny import MASK, padded, tiny_model, tiny_moe

STRATEGIES = [
    DecodingConfig(strategy="sequential", denoising_steps=None),
    DecodingConfig(strategy="sequential", denoising_steps=3),
    DecodingConfig(strategy="low_confidence_static", denoising_steps=3, schedule="paper"),
    DecodingConfig(strategy="low_confidence_static"),
    DecodingConfig(strategy="low_confidence_static", score="margin", denoising_steps=2),
    DecodingConfig(strategy="low_confidence_dynamic", confidence_threshold=0.15),
    DecodingConfig(
        strategy="low_confidence_dynamic", confidence_threshold=-2.0, score="neg_entropy"
    ),
    DecodingConfig(strategy="entropy_bounded", entropy_bound=3.0),
    DecodingConfig(strategy="entropy_bounded", entropy_bound=5.0, entropy_rule="jetengine"),
    DecodingConfig(strategy="factor", factor=1.7),
    DecodingConfig(strategy="semi_autoregressive", denoising_steps=2),
    DecodingConfig(strategy="autoregressive"),
]
STOPS = (3, 5)


def fitted(config: DecodingConfig, size: int) -> DecodingConfig:
    steps = config.denoising_steps and min(config.denoising_steps, size)
    return dataclasses.replace(config, block_size=size, denoising_steps=steps)


def name(config: DecodingConfig) -> str:
    return f"{config.strategy}-{config.score}-{config.entropy_rule}-{config.denoising_steps}"


def cases():
    """Every strategy at block size 4, the default one at 1 too; the rest where there is time."""
    for config in STRATEGIES:
        for size in (1, 4, 8, 16):
            if config.strategy == "autoregressive" and size != 4:
                continue  # Its block is one token, whatever the block size.
            quick = size == 4 or (
                size == 1 and name(config) == "low_confidence_dynamic-probability-eb_sampler-None"
            )
            marks = [] if quick else [pytest.mark.slow, pytest.mark.ci]
            yield pytest.param(config, size, marks=marks, id=f"{name(config)}-{size}")


def random_prompts(seed: int, lengths=(1, 4, 7, 18)) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, MASK, n).tolist() for n in lengths]


def check(model, prompts, config, max_new_tokens=13, stops=STOPS, slots=2):
    options = dict(max_new_tokens=max_new_tokens, stop_token_ids=padded(stops), window_slots=slots)
    got = generate(model, prompts, config, **options)
    for prompt, completion in zip(prompts, got, strict=True):
        expected = oracle.decode(model, prompt, config, max_new_tokens, stops)
        tokens, logprobs, steps, reason, denoising, commits = expected
        assert completion.tokens == tokens
        assert completion.steps == steps
        np.testing.assert_allclose(completion.logprobs, logprobs, rtol=1e-9)
        assert completion.finish_reason == reason
        # Fused, the next block's first forward does what a commit is for.
        commits = commits if slots == 1 else 0
        assert (completion.denoising_forwards, completion.commit_forwards) == (denoising, commits)
    return got


@pytest.mark.parametrize("config, size", list(cases()))
def test_batch_equals_python_loop(config, size, x64):
    check(tiny_model(), random_prompts(size), fitted(config, size))


@pytest.mark.xla_defaults
def test_an_moe_equals_the_python_loop(x64):
    check(tiny_moe(), random_prompts(9), fitted(STRATEGIES[5], 4))


@pytest.mark.parametrize("slots", [1, pytest.param(3, marks=[pytest.mark.slow, pytest.mark.ci])])
def test_other_windows_equal_the_python_loop(slots, x64):
    """One slot pays a forward a block for its final keys; more slots than two are never open at once."""
    check(tiny_model(), random_prompts(7), fitted(STRATEGIES[5], 4), slots=slots)


@pytest.mark.xla_defaults
def test_blocks_from_the_response_equal_the_python_loop(x64):
    """LLaDA's canvas: the prompt as it is, then blocks from its end."""
    model = tiny_model(block_origin="response", objective="masked_diffusion")
    check(model, random_prompts(5), fitted(STRATEGIES[10], 4))


@pytest.mark.xla_defaults
def test_empty_prompts_and_no_tokens_equal_the_python_loop(x64):
    prompts = random_prompts(6, lengths=(0, 3, 4, 18))
    check(tiny_model(), prompts, fitted(STRATEGIES[5], 4))
    got = check(tiny_model(), prompts, fitted(STRATEGIES[5], 4), max_new_tokens=0)
    assert [(c.tokens, c.finish_reason, c.denoising_forwards) for c in got] == [
        ([], "length", 0)
    ] * 4


EARLY = [
    DecodingConfig(add_threshold=0.25, activate_threshold=0.75, confidence_threshold=0.3),
    DecodingConfig(
        add_threshold=0.0, activate_threshold=1.0, confidence_threshold=0.2, strategy="sequential"
    ),
    DecodingConfig(
        add_threshold=0.5, activate_threshold=0.0, confidence_threshold=0.5, denoising_steps=2
    ),
    DecodingConfig(add_threshold=1.0, activate_threshold=0.5),
]


@pytest.mark.xla_defaults
@pytest.mark.parametrize(
    "slots", [3, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_blocks_that_open_early_equal_the_python_loop(slots, x64):
    """D2F's rule, each prompt with its own thresholds; some tokens are committed ahead of masks before their block."""
    model, prompts = tiny_model(), random_prompts(8, lengths=(1, 4, 7, 18))
    got = generate(
        model, prompts, EARLY, max_new_tokens=18, stop_token_ids=padded((3,)), window_slots=slots
    )
    ahead = 0
    for prompt, config, completion in zip(prompts, EARLY, got, strict=True):
        tokens, logprobs, steps, reason, *forwards = oracle.decode_window(
            model, prompt, config, 18, (3,), slots
        )
        assert (completion.tokens, completion.steps, completion.finish_reason) == (
            tokens,
            steps,
            reason,
        )
        np.testing.assert_allclose(completion.logprobs, logprobs, rtol=1e-9)
        assert [completion.denoising_forwards, completion.commit_forwards] == forwards
        last = (len(prompt) + np.arange(len(steps))) // 4
        ahead += any(
            steps[i] > steps[j]
            for i in range(len(steps))
            for j in range(i, len(steps))
            if last[i] < last[j]
        )
    assert ahead
