"""D2F's decoding whole: blocks from the response, a prompt that sees all of itself, several blocks open at once.

Against a loop in plain Python that reads everything anew in each step, under a mask made pair by pair.
"""

from dataclasses import replace
from itertools import pairwise

import jax
import numpy as np
import pytest

from sdar_jax import DecodingConfig, Engine, generate
from sdar_jax.model import Model
from tests.decoding import oracle
from tests.decoding.test_oracle import EARLY
from tests.objectives import oracle as network
from tests.objectives.test_paradigms import model_with
from tests.tiny import MASK, padded

D2F = {"block_origin": "response", "bidirectional_prompt": True}
LENGTH, NEW, STOP = 48, 18, 3
# A shifted model's own strategy is another.
CONFIGS = [replace(each, strategy=each.strategy or "low_confidence_dynamic") for each in EARLY]
network_logits = jax.jit(network.logits)


def read(model: Model, prompt: int, sequence: list[int]) -> np.ndarray:
    """The logits that predict each position: its own, or with a shifted model those of the position before."""
    size, shift = model.config.block_size, int(model.config.shifted)
    block = lambda i: -1 if i < prompt else (i - prompt) // size
    inside = range(len(sequence))
    mask = np.zeros((LENGTH, LENGTH), bool)
    for i in inside:
        for j in inside:
            mask[i, j] = block(j) <= block(i)
    tokens = np.array(sequence + [0] * (LENGTH - len(sequence)))
    logits = np.array(network_logits(model, tokens, np.arange(LENGTH), mask))
    logits[:, MASK] = -np.inf
    return np.roll(logits, shift, axis=0)[: len(sequence)]


def expected(model: Model, prompt: list[int], config: DecodingConfig, slots: int):
    return oracle.decode_window(
        model,
        prompt,
        config,
        NEW,
        (STOP,),
        slots,
        origin=len(prompt),
        read=lambda sequence: read(model, len(prompt), sequence),
    )


def prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    random = np.random.default_rng(11)
    return [random.integers(0, MASK, n).tolist() for n in lengths]


def assert_equal(completion, wanted) -> None:
    tokens, logprobs, steps, reason, denoising, commits = wanted
    assert (completion.tokens, completion.steps) == (tokens, steps)
    assert completion.finish_reason == reason
    assert (completion.denoising_forwards, completion.commit_forwards) == (denoising, commits)
    np.testing.assert_allclose(completion.logprobs, logprobs, rtol=1e-9)


@pytest.mark.xla_defaults
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    "slots", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 4))]
)
def test_decoding_equals_the_python_loop(slots, shifted, x64):
    """Each prompt with thresholds of its own; some tokens are committed before a block in front is full."""
    model = model_with(**D2F, shifted=shifted)
    given = prompts((1, 4, 7, 14))
    options = {"max_new_tokens": NEW, "stop_token_ids": padded((STOP,)), "window_slots": slots}
    ahead = 0
    got = generate(model, given, CONFIGS, **options)
    for prompt, config, completion in zip(given, CONFIGS, got, strict=True):
        assert_equal(completion, expected(model, prompt, config, slots))
        block_steps = [completion.steps[i : i + 4] for i in range(0, len(completion.steps), 4)]
        ahead += any(min(later) < max(earlier) for earlier, later in pairwise(block_steps))
    assert (ahead > 0) == (slots > 1)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("shifted", [False, True])
def test_an_engine_equals_the_python_loop(shifted, x64):
    """Requests that come one after another, and pages that run out."""
    model = model_with(**D2F, shifted=shifted)
    engine = Engine(model, batch_slots=3, pages=12, page_size=8, prefill_tokens=16, window_slots=3)
    given = prompts((9, 2, 14, 6, 1))
    configs = [CONFIGS[i % len(CONFIGS)] for i in range(len(given))]
    ids = [
        engine.submit(prompt, config, max_new_tokens=NEW, stop_token_ids=(STOP,))
        for prompt, config in zip(given, configs, strict=True)
    ]
    for prompt, config, request in zip(given, configs, ids, strict=True):
        assert_equal(engine.result(request), expected(model, prompt, config, 3))
