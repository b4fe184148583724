"""What goes wrong in an engine, or comes in an odd order: a typed line, or the result as if nothing had been."""

import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdar_jax import DecodingConfig
from sdar_jax.decoding import Engine
from sdar_jax.decoding.engine import model_runner
from sdar_jax.errors import DecodingError
from tests.bad_input import refused
from tests.decoding.traffic import Request, alone
from tests.tiny import MASK, tiny_model

CONFIG = DecodingConfig(strategy="low_confidence_static", denoising_steps=2)
PROMPTS = [[7 * i % 20 + 1 for i in range(n)] for n in (6, 17, 0, 11)]
NEW, NO_STOPS = 13, (MASK, MASK)
SIZES = dict(batch_slots=2, pages=6, page_size=8, prefill_tokens=8, steps_per_call=3, max_length=48)


def served(**options) -> Engine:
    return Engine(tiny_model(), **{**SIZES, **options})


def submit(to: Engine, prompt=(1, 2, 3), new=NEW, stops=NO_STOPS, **options) -> int:
    return to.submit(list(prompt), CONFIG, max_new_tokens=new, stop_token_ids=stops, **options)


def wanted(prompt, new=NEW, stops=NO_STOPS) -> list[int]:
    return alone(tiny_model(), Request(list(prompt), CONFIG, new, stops, 0), 1).tokens


def idle(of: Engine) -> bool:
    stats = of.stats()
    return stats.running == stats.queued == 0 and stats.pages_available == SIZES["pages"]


@pytest.fixture(scope="module")
def whole():
    with jax.enable_x64(True):
        return [wanted(prompt) for prompt in PROMPTS]


def test_what_cannot_be_served_is_refused(x64):
    """At once, in a line, and without a trace in the engine."""
    small = served()
    for prompt, new, names in [
        ([1] * 40, 9, ("40 tokens", "9", "48")),
        ([23], 1, ("23", "0 to 22")),
        ([-1], 1, ("-1", "0 to 22")),
        ([1.5], 1, ("1.5", "integers")),
        ([1], -1, ("max_new_tokens is -1",)),
    ]:
        with refused(DecodingError, *names):
            submit(small, prompt, new)
    with refused(DecodingError, "30 tokens", "max_new_tokens is 20", "40"):
        submit(served(pages=5, max_length=None), [1] * 30, 20)
    for name in ("max_queue", "batch_slots", "steps_per_call", "prefill_tokens", "max_length"):
        with refused(DecodingError, f"{name} is 0", "positive"):
            served(**{name: 0})
    assert idle(small) and not small.stats().finished
    assert (
        small.result(submit(small, [], 0)).tokens == small.result(submit(small, new=0)).tokens == []
    )


@pytest.mark.slow
@pytest.mark.ci
def test_the_longest_that_fits_is_served(x64):
    """Prompt and output that fill all pages there are, alone and beside others that want them too."""
    small = served()
    prompt = [3 * i % 19 for i in range(41)]
    ids = [submit(small, prompt, 7) for _ in range(3)]
    assert [small.result(i).tokens for i in ids] == [wanted(prompt, 7)] * 3


def test_empty_prompts_and_stops_in_prompts(whole, x64):
    one = served()
    assert one.result(submit(one, [])).tokens == whole[2]
    inside = next(t for t in range(21) if t not in wanted([*PROMPTS[0], t], 5))
    completion = one.result(submit(one, [*PROMPTS[0], inside], 5, (inside, inside)))
    assert (
        completion.tokens == wanted([*PROMPTS[0], inside], 5)
        and completion.finish_reason == "length"
    )


def test_weights_that_are_no_numbers(whole, x64):
    """Token 9's embedding is broken: requests that read it end with "error", the rest of the batch is untouched."""
    broken = jax.tree.map(lambda leaf: leaf, tiny_model())
    broken.embedding = type(broken.embedding)(broken.embedding[...].at[9].set(np.nan))
    sick = Engine(broken, **SIZES)
    prompt = next(p for p, tokens in zip(PROMPTS, whole, strict=True) if 9 not in [*p, *tokens])
    fine, wrong, again = submit(sick, prompt), submit(sick, [1, 9, 2]), submit(sick, prompt)
    assert sick.result(wrong).finish_reason == "error"
    assert sick.result(fine).tokens == sick.result(again).tokens == wanted(prompt)
    assert idle(sick)
    nothing = Engine(jax.tree.map(lambda leaf: leaf * jnp.nan, tiny_model()), **SIZES)
    ended = nothing.generate(PROMPTS, CONFIG, max_new_tokens=NEW)
    assert [(c.finish_reason, c.tokens) for c in ended] == [("error", [])] * 4


LONG = [7 * i % 20 + 1 for i in range(30)]
BAD = 21


@pytest.mark.parametrize("slots", [1, 2])
def test_pages_of_a_failed_request_are_no_prefix(slots, x64):
    """Not its prompt either, though three chunks of it had been read before the bad token came to light."""
    broken = jax.tree.map(lambda leaf: leaf, tiny_model())
    broken.embedding = type(broken.embedding)(broken.embedding[...].at[BAD].set(np.nan))
    one = Engine(broken, **{**SIZES, "steps_per_call": 1, "window_slots": slots})
    for _ in range(2):
        assert (
            one.generate([[*LONG[:24], BAD, 3]], CONFIG, max_new_tokens=NEW)[0].finish_reason
            == "error"
        )
        assert one.stats().prefix_tokens == 0
    assert idle(one)


def test_pages_that_no_logits_came_from_are_no_prefix(x64):
    """A request that is cancelled while its prompt is read leaves none; one that decoded leaves them."""
    one = served(steps_per_call=1)
    left = submit(one, LONG[:26])
    one._core.step()
    one._core.step()
    assert one._core.requests[left].cached == 16
    one.cancel(left)
    for prefix in (0, 24):
        before = one.stats().prefix_tokens
        one.result(submit(one, LONG[:26], 1))
        assert one.stats().prefix_tokens - before == prefix


@pytest.mark.parametrize("slots", [1, 2])
def test_a_prompt_is_shared_while_its_request_runs(slots, x64):
    one = served(pages=12, steps_per_call=1, window_slots=slots)
    first = submit(one, LONG[:17])
    while one.stats().prefill_tokens < 16 or not one._core.requests[first].prompt_recorded:
        one._core.step()
    second = submit(one, [*LONG[:17], 9])
    one._core.step()
    assert one.stats().running == 2 and one.stats().prefix_tokens == 16
    assert one.result(first).tokens == wanted(LONG[:17])
    assert one.result(second).tokens == wanted([*LONG[:17], 9])


def test_odd_orders(whole, x64):
    """Cancelled twice, or in the queue; results taken twice; streams left, doubled, begun late, with others between."""
    one = served(max_queue=3)
    ids = [submit(one, prompt) for prompt in PROMPTS[:3]]
    with refused(DecodingError, "queue holds 3", "max_queue"):
        submit(one)
    left = one.stream(ids[0])
    first = next(left)
    left.close()
    late = submit(one, PROMPTS[3])
    queued = one.stats().queued
    assert one.cancel(late).tokens == [] and one.stats().queued == queued - 1
    for again in (one.cancel, one.result, one.stream):
        with refused(DecodingError, str(late), "unknown"):
            again(late)
    twice = [one.stream(ids[1]), one.stream(ids[1])]
    told = [[], []]
    for _ in range(20):
        for events, tokens in zip(twice, told, strict=True):
            tokens += [t for event in [next(events, None)] if event for t in event.tokens]
        if one.stats().queued < 3:
            late = submit(one, PROMPTS[3])
    assert told == [whole[1]] * 2
    assert one.result(ids[0]).tokens == whole[0] and first.tokens == whole[0][: len(first.tokens)]
    assert [t for event in one.stream(ids[1]) for t in event.tokens] == whole[1]
    ended = one.cancel(ids[1])
    assert ended.tokens == whole[1] and ended.finish_reason == "length"
    assert one.result(late).tokens == whole[3]
    with refused(DecodingError, "99", "unknown"):
        one.result(99)


def test_a_bad_prompt_leaves_none_of_its_list(x64):
    one = served()
    with refused(DecodingError, "token id 99"):
        one.generate([[1, 2], [3], [99]], CONFIG, max_new_tokens=NEW)
    assert idle(one) and one.stats().generated_tokens == 0


class Interrupted(BaseException):
    """As KeyboardInterrupt, which pytest takes for its own."""


def once(place, name: str, *, before: bool, at: int = 0):
    """`name` of the engine, or of a module, raises in one call, before it does anything or when it has done it."""
    real, calls = getattr(place, name), []

    def call(*arguments):
        calls.append(None)
        if len(calls) != at + 1:
            return real(*arguments)
        if not before:
            jax.block_until_ready(real(*arguments))
        raise Interrupted(name)

    return mock.patch.object(place, name, call)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    "name",
    ["_decode", "device_get", "put_sequence", "HostView", "set_pages", "end_sequence", "copy_page"],
)
def test_an_interruption_loses_nothing(name, before, whole, x64):
    """Donated state may be gone, host and device half changed: requests go on, and tokens that were told stand."""
    one = served()
    one.generate([PROMPTS[1]], CONFIG, max_new_tokens=1)
    unwanted = submit(one, PROMPTS[3])
    one._core.step()
    ids = [submit(one, [*PROMPTS[1][:12], 7], 5), *(submit(one, prompt) for prompt in PROMPTS)]
    told, events = [], one.stream(ids[2])
    place = {"_decode": one._core._runner, "device_get": jax}.get(name, model_runner)
    with once(place, name, before=before), pytest.raises(Interrupted):
        assert one.cancel(unwanted).finish_reason == "cancelled"
        for event in events:
            told += event.tokens
        for request_id in ids:
            while one._core.requests[request_id].result is None:
                one._core.step()
    if unwanted in one._core.requests:
        one.cancel(unwanted)
    assert told == whole[1][: len(told)]
    told = [t for event in one.stream(ids[2]) for t in event.tokens]
    assert told == whole[1] and [one.result(i).tokens for i in ids[1:]] == whole
    assert one.result(ids[0]).tokens == wanted([*PROMPTS[1][:12], 7], 5)
    assert idle(one) and one.stats().restarts == 1
    assert one.stats().prompt_tokens == sum(len(p) for p in PROMPTS) + 13 + len(PROMPTS[1]) + len(
        PROMPTS[3]
    )


def test_cancel_after_an_interruption_gives_what_had_ended(x64):
    """It ended in a call that nobody waited for, in the middle of a block."""
    one = served(steps_per_call=50)
    request_id = submit(one, new=1)
    with once(one._core, "_wait", before=False), pytest.raises(Interrupted):
        one.result(request_id)
    done = one.cancel(request_id)
    assert (done.tokens, done.finish_reason) == (wanted([1, 2, 3], new=1), "length")


def interrupt_line(number: int):
    """A tracer that raises at the so-manieth line of the engine's parts and the pool's code, and counts them."""
    seen = [0]

    def local(frame, event, _):
        if event == "line":
            seen[0] += 1
            if seen[0] == number:
                raise Interrupted(f"{frame.f_code.co_name}, line {frame.f_lineno}")
        return local

    def start(frame, *_):
        file = frame.f_code.co_filename
        inside = "/sdar_jax/decoding/engine/" in file or file.endswith("decoding/page_pool.py")
        # What `result` hands out it has forgotten; that is as far as the promise goes.
        return local if inside and frame.f_code.co_name != "result" else None

    return start, seen


def traced(one: Engine, ids: list[int], number: int) -> int:
    """Runs requests to their end, interrupted at one line; how many lines there were."""
    tracer, seen = interrupt_line(number)
    previous = sys.gettrace()
    sys.settrace(tracer)
    try:
        one.cancel(ids[-1])
        for request_id in ids[:-1]:
            while one._core.known(request_id).result is None:
                one._core.step()
    except Interrupted:
        pass
    finally:
        sys.settrace(previous)
    return seen[0]


@pytest.mark.slow
@pytest.mark.ci
def test_interruptions_anywhere(whole, x64):
    """At any line of the engine's own code, in 300 places of one run: nothing lost, no page lost."""
    one = served()

    def run(number: int) -> int:
        ids = [submit(one, prompt) for prompt in [*PROMPTS, PROMPTS[0]]]
        lines = traced(one, ids, number)
        assert [one.result(i).tokens for i in ids[:-1]] == whole
        if ids[-1] in one._core.requests:
            one.cancel(ids[-1])
        assert idle(one)
        return lines

    lines = run(0)
    for number in np.random.default_rng(0).integers(1, lines, 300):
        run(int(number))


def test_a_device_that_fails_once(whole, x64):
    """An error that comes to light when results are fetched is the caller's to see; the next call starts over."""
    one = served()
    ids = [submit(one, prompt) for prompt in PROMPTS]
    with (
        once(jax, "device_get", before=True, at=2),
        mock.patch.object(sys.modules[__name__], "Interrupted", RuntimeError),
    ):
        with pytest.raises(RuntimeError):
            one.result(ids[0])
        assert [one.result(i).tokens for i in ids] == whole
    assert idle(one)


class Letters:
    """A tokenizer of one letter a token."""

    def decode(self, ids) -> str:
        return "".join(chr(97 + i) for i in ids)


def test_stop_strings_across_blocks_and_never(whole, x64):
    """Over two and three blocks, at the very end, and one whose beginning keeps coming back but never the whole."""
    one = served(tokenizer=Letters())
    text = Letters().decode(whole[1])
    for start, length in ((2, 4), (1, 9), (len(text) - 2, 2), (0, 1)):
        stop = text[start : start + length]
        at = text.index(stop)
        request_id = submit(one, PROMPTS[1], stop_strings=["#", stop])
        told = [t for event in one.stream(request_id) for t in event.tokens]
        completion = one.result(request_id)
        assert completion.text == text[:at] and completion.finish_reason == "stop"
        assert (
            Letters().decode(told) == completion.text
            and completion.tokens == whole[1][: at + length]
        )
    never = [text[3:6] + "#", text + "#"]
    completion = one.result(submit(one, PROMPTS[1], stop_strings=never))
    assert completion.tokens == whole[1] and completion.finish_reason == "length"
    assert idle(one)
