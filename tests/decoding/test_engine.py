"""The engine gives every request what it would get alone, whatever the traffic; and all are accounted for."""

from unittest import mock

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar_jax import DecodingConfig, generate
from sdar_jax.decoding.engine import Engine
from sdar_jax.errors import ConfigError, DecodingError
from tests.bad_input import refused
from tests.tiny import tiny_model

CONFIGS = [
    DecodingConfig(confidence_threshold=0.2),
    DecodingConfig(strategy="low_confidence_static", denoising_steps=2),
    DecodingConfig(strategy="sequential"),
    DecodingConfig(strategy="low_confidence_static", temperature=1.0, top_k=9, denoising_steps=2),
]
# Beginnings that others share, wholly, to the middle of a page, or not at all.
LONG = [7 * i % 20 + 1 for i in range(30)]
PROMPTS = [LONG[:n] for n in (0, 3, 9, 17, 26)] + [
    LONG[:10] + [7, 7, 7, 7],
    LONG[:16] + [5] * 9,
    [9, 8, 7, 6, 5],
]


def engine(**options) -> Engine:
    """Small pages, few of them, two rows."""
    sizes = {
        "batch_slots": 2,
        "pages": 14,
        "page_size": 8,
        "prefill_tokens": 8,
        "steps_per_call": 3,
    }
    strategies = dict.fromkeys(config.strategy for config in CONFIGS if config.strategy)
    return Engine(tiny_model(), **{**sizes, "strategies": tuple(strategies), **options})


def alone(prompt, config, new, stops, seed):
    return generate(
        tiny_model(), [prompt], config, max_new_tokens=new, stop_token_ids=stops, seed=seed
    )[0]


# Masks alone attend to equal values: without a prompt all positions are as likely, and only rounding would rank them.
RANKS_NOTHING = 2
prompt_and_config = st.tuples(
    st.sampled_from(range(len(PROMPTS))), st.sampled_from(range(len(CONFIGS)))
).map(lambda pair: pair if PROMPTS[pair[0]] else (pair[0], RANKS_NOTHING))
request_like = st.tuples(
    prompt_and_config,
    st.sampled_from([0, 1, 5, 14]),
    st.sampled_from([(), (3, 5)]),
    st.integers(0, 3),
)


@pytest.mark.parametrize("pages", [pytest.param(14, marks=[pytest.mark.slow, pytest.mark.ci]), 7])
@given(
    traffic=st.lists(request_like, min_size=3, max_size=7),
    steps_per_call=st.sampled_from([1, 3, 50]),
)
def test_everyone_gets_what_they_would_get_alone(pages, traffic, steps_per_call):
    """In float64: two rows, three requests and more, prefixes shared; with 7 pages, requests give up their rows."""
    with jax.enable_x64(True):
        served = engine(pages=pages, steps_per_call=steps_per_call)
        ids = [
            served.submit(
                PROMPTS[p], CONFIGS[c], max_new_tokens=new, stop_token_ids=stops, seed=seed
            )
            for (p, c), new, stops, seed in traffic
        ]
        for request_id, ((p, c), new, stops, seed) in zip(ids, traffic, strict=True):
            got, wanted = served.result(request_id), alone(PROMPTS[p], CONFIGS[c], new, stops, seed)
            assert (got.tokens, got.finish_reason, got.steps) == (
                wanted.tokens,
                wanted.finish_reason,
                wanted.steps,
            )
            assert got.denoising_forwards == wanted.denoising_forwards
            np.testing.assert_allclose(got.logprobs, wanted.logprobs, rtol=1e-9)
    assert served.stats().running == served.stats().queued == 0
    assert served.stats().pages_available == pages


def test_a_prefilled_request_begins_when_another_ends(x64):
    """One decodes at a time; the other's prompt is read meanwhile, and its turn comes in the same call."""
    served = engine(batch_slots=1, steps_per_call=50)
    ids = [
        served.submit(LONG[:n], CONFIGS[2], max_new_tokens=8, stop_token_ids=())
        for n in (17, 25, 9)
    ]
    first, second = (served._core.requests[i] for i in ids[:2])
    began = lambda request: int(request.latest().progress.denoising_forwards)
    while first.result is None:
        served._core.step()
        assert served.stats().running <= 2
        assert first.result is not None or not began(first) or not began(second)
    # Their prompts took calls of their own, and one was on its way for the third, which waits.
    assert second.result is not None and served.stats().queued == 1 and served.stats().calls <= 4
    for request_id, n in zip(ids, (17, 25, 9), strict=True):
        got, wanted = served.result(request_id), alone(LONG[:n], CONFIGS[2], 8, (), 0)
        assert (got.tokens, got.denoising_forwards) == (wanted.tokens, wanted.denoising_forwards)


def test_while_requests_wait_the_device_does_not(x64):
    """The next call is on its way before one is read; where none waits, who comes next enters the next call."""
    served, unread = engine(), []
    core = served._core
    start, read = core._start, core._read

    def reads() -> None:
        unread.append((bool(core.queued), len(core._calls)))
        read()

    with mock.patch.object(core, "_read", reads), mock.patch.object(core, "_start", wraps=start):
        ids = [
            served.submit([n + 1] * 5, CONFIGS[0], max_new_tokens=14, stop_token_ids=())
            for n in range(6)
        ]
        found = [served.result(each).tokens for each in ids]
    # The first call only reads prompts, and is timed.
    assert unread[0] == (True, 1)
    busy, quiet = ([n for waits, n in unread[1:] if waits is each] for each in (True, False))
    assert len(busy) >= 3 and set(busy) == {2} and quiet[-1] == 1
    assert found == [alone([n + 1] * 5, CONFIGS[0], 14, (), 0).tokens for n in range(6)]


def test_prompts_are_read_in_the_order_of_admission(x64):
    """Whatever places they have: with a queue that is never empty, nobody waits while later ones come and go."""
    served, ids = engine(batch_slots=1, window_slots=1), []
    for _ in range(30):
        while served.stats().queued < 2:
            ids.append(
                served.submit(
                    [len(ids) % 20 + 1] * 17, CONFIGS[0], max_new_tokens=1, stop_token_ids=()
                )
            )
        served._core.step()
        ended = [served._core.requests[i].result is not None for i in ids]
        assert ended == sorted(ended, reverse=True)
    assert sum(ended) > 5


def test_requests_give_up_their_pages_and_come_back(x64):
    """Two that need 5 and 6 of 7 pages."""
    served = engine(pages=7)
    wanted = [alone(p, CONFIGS[2], 20, (), 0).tokens for p in (LONG[:17], LONG[::-1][:26])]
    got = served.generate(
        [LONG[:17], LONG[::-1][:26]], CONFIGS[2], max_new_tokens=20, stop_token_ids=()
    )
    assert [c.tokens for c in got] == wanted
    assert served.stats().preemptions > 0


def test_a_prefix_is_read_once(x64):
    """The same prompt again recomputes nothing of its whole blocks; a longer one reads only what is new."""
    served = engine()
    first = served.generate([LONG[:26]], CONFIGS[0], max_new_tokens=4, stop_token_ids=())
    assert served.stats().prefix_tokens == 0 and first[0].prefill_forwards == 3
    second = served.generate([LONG[:26]], CONFIGS[0], max_new_tokens=4, stop_token_ids=())
    assert served.stats().prefix_tokens == 24 and second[0].prefill_forwards == 0
    assert second[0].tokens == first[0].tokens
    # 12 of 16 shared positions are whole pages and half a page, which is copied.
    (third,) = served.generate(
        [[*LONG[:12], 7, 7, 7, 7, 7]], CONFIGS[0], max_new_tokens=4, stop_token_ids=()
    )
    assert served.stats().prefix_tokens == 24 + 12
    assert third.tokens == alone([*LONG[:12], 7, 7, 7, 7, 7], CONFIGS[0], 4, (), 0).tokens
    again = served.generate([LONG[:26]], CONFIGS[0], max_new_tokens=4, stop_token_ids=())
    assert again[0].tokens == first[0].tokens


def test_what_was_generated_is_shared_too(x64):
    """A second turn of a chat starts with the first one's answer."""
    served = engine()
    (answer,) = served.generate([LONG[:9]], CONFIGS[0], max_new_tokens=12, stop_token_ids=())
    longer = [*LONG[:9], *answer.tokens, 3]
    before = served.stats().prefix_tokens
    served.generate([longer], CONFIGS[0], max_new_tokens=4, stop_token_ids=())
    assert served.stats().prefix_tokens - before >= 16


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_cancelled_requests_keep_what_they_have(steps, x64):
    served = engine(steps_per_call=2)
    whole = alone(LONG[:5], CONFIGS[2], 20, (), 0).tokens
    request_id = served.submit(LONG[:5], CONFIGS[2], max_new_tokens=20, stop_token_ids=())
    events = served.stream(request_id)
    for _ in range(steps):
        next(events)
    cancelled = served.cancel(request_id)
    assert cancelled.finish_reason == "cancelled"
    assert cancelled.tokens == whole[: len(cancelled.tokens)] and len(cancelled.tokens) >= 3 * steps
    assert (
        served.stats().running == served.stats().queued == 0
        and served.stats().pages_available == 14
    )
    with refused(DecodingError, str(request_id), "unknown"):
        served.result(request_id)


@pytest.mark.parametrize("steps_per_call", [1, 4, 100])
def test_streams_do_not_depend_on_the_calls(steps_per_call, x64):
    served = engine(steps_per_call=steps_per_call)
    finished, changes = (
        served.submit(LONG[:6], CONFIGS[0], max_new_tokens=13, stop_token_ids=()) for _ in range(2)
    )
    wanted = alone(LONG[:6], CONFIGS[0], 13, (), 0)
    events = list(served.stream(finished))
    assert [t for event in events for t in event.tokens] == wanted.tokens
    assert all(
        event.start == sum(len(e.tokens) for e in events[:i]) for i, event in enumerate(events)
    )
    shots = list(served.stream(changes, changes=True))
    assert [shot.forward for shot in shots] == list(range(wanted.denoising_forwards))
    for shot in shots:
        known = [
            token if step <= shot.forward else None
            for token, step in zip(wanted.tokens, wanted.steps, strict=True)
        ]
        assert shot.tokens == known[: len(shot.tokens)] and not any(known[len(shot.tokens) :])
    assert served.result(finished).tokens == served.result(changes).tokens == wanted.tokens


class Letters:
    """A tokenizer of which each token is a letter."""

    def encode(self, text, **options):
        return [ord(c) - 97 for c in text]

    def decode(self, ids):
        return "".join(chr(97 + i % 26) for i in ids)


def test_stop_strings(x64):
    served = Engine(tiny_model(), tokenizer=Letters(), batch_slots=1, pages=8, page_size=8)
    free = served.generate(["abcab"], CONFIGS[2], max_new_tokens=12, stop_token_ids=())[0]
    stop = free.text[4:6]
    at = free.text.index(stop)
    cut = served.generate(
        ["abcab"], CONFIGS[2], max_new_tokens=12, stop_token_ids=(), stop_strings=[stop]
    )[0]
    assert cut.text == free.text[:at] and cut.finish_reason == "stop"
    assert cut.tokens == free.tokens[: at + 2] and len(cut.logprobs) == len(cut.steps) == len(
        cut.tokens
    )
    none = served.generate(
        ["abcab"], CONFIGS[2], max_new_tokens=12, stop_token_ids=(), stop_strings=["#"]
    )[0]
    assert none.tokens == free.tokens and none.finish_reason == "length"


def test_ids_that_the_tokenizer_lacks_are_never_proposed(x64):
    """Nor after the device's state was lost."""

    class Even(Letters):
        def __len__(self):
            return 11

        def get_vocab(self):
            return {str(i): i for i in range(0, 22, 2)}

    served = engine(tokenizer=Even())
    for _ in range(2):
        got = served.generate(PROMPTS, CONFIGS[3], max_new_tokens=14, stop_token_ids=())
        assert all(token % 2 == 0 for completion in got for token in completion.tokens)
        served._core.recovery.lost()
    assert any(token % 2 for token in alone(PROMPTS[2], CONFIGS[3], 14, (), 2).tokens)


def test_autoregressive_models_are_served_too(x64):
    """With a shared prefix and page pressure, as `generate` alone."""
    model = tiny_model(objective="autoregressive", block_size=None, mask_token_id=None)
    config = DecodingConfig(strategy="autoregressive")
    served = Engine(model, batch_slots=2, pages=6, page_size=8, prefill_tokens=8)
    prompts = [LONG[:17], LONG[:17], LONG[:20]]
    got = served.generate(prompts, config, max_new_tokens=20, stop_token_ids=())
    wanted = generate(model, prompts, config, max_new_tokens=20, stop_token_ids=())
    assert [c.tokens for c in got] == [c.tokens for c in wanted]
    assert served.stats().prefix_tokens > 0 and served.stats().preemptions > 0
    with refused(DecodingError, "low_confidence_dynamic", "an autoregressive"):
        served.submit(LONG[:3], DecodingConfig(strategy="low_confidence_dynamic"), max_new_tokens=1)


@pytest.mark.slow
@pytest.mark.ci
def test_the_engines_block_size_is_every_requests(x64):
    """Where it is not the model's own, too."""
    served = Engine(tiny_model(), batch_slots=1, pages=8, page_size=8, block_size=8)
    config = DecodingConfig(strategy="low_confidence_static", denoising_steps=8)
    (got,) = served.generate([LONG[:9]], config, max_new_tokens=9, stop_token_ids=())
    wanted = alone(
        LONG[:9], DecodingConfig(8, "low_confidence_static", denoising_steps=8), 9, (), 0
    )
    assert got.tokens == wanted.tokens


def test_bad_requests_and_sizes(x64):
    served = engine(max_queue=1)
    submit = lambda prompt=(1,), config=CONFIGS[0], **options: served.submit(
        list(prompt), config, **{"max_new_tokens": 4, **options}
    )
    with refused(DecodingError, "200 tokens", "112"):
        submit([1] * 200)
    with refused(DecodingError, "block_size is 8", "4"):
        submit(config=DecodingConfig(block_size=8))
    with refused(DecodingError, "semi_autoregressive", "generate"):
        submit(config=DecodingConfig(strategy="semi_autoregressive"))
    with refused(DecodingError, "stop_strings", "tokenizer"):
        submit(stop_strings=["x"])
    with refused(DecodingError, "9 stop tokens", "8"):
        submit(stop_token_ids=list(range(9)))
    with refused(DecodingError, "99"):
        submit([99])
    submit()
    with refused(DecodingError, "queue holds 1"):
        submit()
    with refused(ConfigError, "page_size is 6", "4"):
        engine(page_size=6)
    with refused(DecodingError, "batch_slots is 0"):
        engine(batch_slots=0)
