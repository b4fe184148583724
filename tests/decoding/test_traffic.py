"""Thousands of requests through engines of all kinds, in float64: each gets exactly what it would get alone.

Weights, traffic and what is asked for are random; rows, pages, windows and chunks differ by engine, and nothing of that
may show. Pages are so few that requests are preempted and finished prefixes evicted, which is asserted.
"""

from unittest import mock

import jax
import numpy as np
import pytest

from sdar_jax.decoding import Engine
from sdar_jax.decoding.engine import model_runner
from tests.decoding import oracle
from tests.decoding.traffic import (
    LONGEST_OUTPUT,
    LONGEST_PROMPT,
    STRATEGIES,
    Caller,
    Request,
    alone,
    check,
    random_request,
)
from tests.jaxprs import compilations
from tests.tiny import MASK, tiny_model

LENGTH = LONGEST_PROMPT + LONGEST_OUTPUT
SHAPES = {
    "two rows": dict(batch_slots=2, pages=6, page_size=8, window_slots=2, prefill_tokens=8),
    "no fusion": dict(batch_slots=3, pages=19, page_size=4, window_slots=1, prefill_tokens=256),
    "blocks of 8": dict(
        block_size=8, batch_slots=5, pages=7, page_size=16, window_slots=3, prefill_tokens=24
    ),
    "blocks of 3": dict(
        block_size=3, batch_slots=4, pages=14, page_size=6, window_slots=4, prefill_tokens=6
    ),
    "one row": dict(batch_slots=1, pages=5, page_size=12, window_slots=2, prefill_tokens=12),
    "autoregressive": dict(block_size=None, batch_slots=3, pages=9, page_size=8, prefill_tokens=8),
}


def model_of(shape: str, seed: int):
    if shape == "autoregressive":
        return tiny_model(
            seed=seed, objective="autoregressive", block_size=None, mask_token_id=None
        )
    return tiny_model(seed=seed, block_size=SHAPES[shape].get("block_size", 4))


def engine_of(shape: str, model, steps_per_call: int) -> Engine:
    strategies = () if shape == "autoregressive" else STRATEGIES
    options = dict(max_length=LENGTH, steps_per_call=steps_per_call, strategies=strategies)
    return Engine(model, **options, **SHAPES[shape])


def serve(shape: str, seed: int, count: int, copies: mock.Mock) -> None:
    random = np.random.default_rng([seed, count])
    model = model_of(shape, seed)
    served = engine_of(shape, model, int(random.integers(1, 5)))
    stems = random.integers(0, MASK, (3, LONGEST_PROMPT))
    caller = Caller(served, [random_request(random, model, stems) for _ in range(count)], random)
    with mock.patch.object(model_runner, "copy_page", copies):
        caller.run()
    slots = SHAPES[shape].get("window_slots", 2)
    for number, (request, completion, told) in enumerate(caller.ended):
        wanted = alone(model, request, slots)
        check(completion, told, wanted)
        if number % 20 == 0:
            check_oracle(model, request, wanted, slots)
    stats = served.stats()
    assert stats.finished == count == len(caller.ended)
    assert stats.queued == stats.running == 0 and stats.pages_available == SHAPES[shape]["pages"]
    cancelled = [c for _, c, _ in caller.ended if c.finish_reason == "cancelled"]
    assert stats.cancelled == len(cancelled) and not stats.failed and not stats.restarts
    assert stats.evictions and stats.prefix_tokens and any(c.tokens for c in cancelled)
    assert stats.preemptions or SHAPES[shape]["batch_slots"] == 1
    assert copies.call_count or SHAPES[shape]["page_size"] == 4
    print(
        f"\n{shape}, weights {seed}: {count} requests, {len(cancelled)} cancelled, {stats.preemptions} preemptions,"
    )
    print(
        f"{stats.evictions} evictions, {stats.prefix_tokens} shared positions, {copies.call_count} copied pages"
    )


def check_oracle(model, request: Request, wanted, slots: int) -> None:
    """The decoder in plain Python, which knows no sampling and no penalty."""
    config = request.config
    if config.temperature or config.repetition_penalty != 1 or not request.new:
        return
    asked = (model, request.prompt, config, request.new, request.stops)
    early = config.add_threshold < 1
    found = oracle.decode_window(*asked, slots) if early else oracle.decode(*asked)
    tokens, logprobs, steps, reason, denoising, _ = found
    assert (wanted.tokens, wanted.steps, wanted.finish_reason) == (tokens, steps, reason)
    assert wanted.denoising_forwards == denoising
    np.testing.assert_allclose(wanted.logprobs, logprobs, rtol=1e-8)


@pytest.mark.slow
@pytest.mark.ci
def test_nothing_is_compiled_after_warm_up(x64):
    """Not one program, large or small: other lengths, configs, cancels, shared prefixes, page pressure."""
    random, model = np.random.default_rng(0), model_of("two rows", 1)
    served = engine_of("two rows", model, 3)
    stems = random.integers(0, MASK, (3, LONGEST_PROMPT))
    traffic = lambda count: [random_request(random, model, stems) for _ in range(count)]
    Caller(served, traffic(25), random).run()
    before = served.stats()
    with compilations() as compiled:
        Caller(served, traffic(25), random).run()
        assert not compiled
        jax.jit(lambda x: x * 3 + 1)(1)
        assert compiled
    after = served.stats()
    assert after.preemptions > before.preemptions and after.prefix_tokens > before.prefix_tokens
    assert after.cancelled > before.cancelled and after.evictions > before.evictions


@pytest.mark.slow
@pytest.mark.ci
def test_some_traffic():
    with jax.enable_x64(True):
        serve("two rows", 1, 300, mock.Mock(wraps=model_runner.copy_page))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_much_traffic(shape, seed):
    with jax.enable_x64(True):
        serve(shape, seed, 400, mock.Mock(wraps=model_runner.copy_page))
