"""Several threads in one engine: each gets what it would get alone, and none waits for one that has left."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise

import jax.numpy as jnp
import pytest

from sdar_jax import DecodingConfig, generate
from sdar_jax.decoding import Engine
from sdar_jax.decoding.locks import FairLock
from sdar_jax.errors import DecodingError
from tests.tiny import tiny_model

CONFIG = DecodingConfig(strategy="low_confidence_static")
PROMPTS = [[7 * i % 20 + 1 for i in range(first, first + 3 + first)] for first in range(12)]
OPTIONS = dict(max_new_tokens=12, stop_token_ids=())


def served(**options) -> Engine:
    """Wide types would be a thread's own setting: float32."""
    sizes = {"batch_slots": 2, "pages": 24, "page_size": 8, "steps_per_call": 2}
    return Engine(tiny_model(jnp.float32), **{**sizes, **options})


@pytest.fixture(scope="module")
def whole() -> list[list[int]]:
    return [c.tokens for c in generate(tiny_model(jnp.float32), PROMPTS, CONFIG, **OPTIONS)]


def together(*work: Callable[[], None]) -> None:
    """Runs each in a thread of its own; what one raises is raised here."""
    raised: list[BaseException] = []

    def run(one: Callable[[], None]) -> None:
        try:
            one()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(one,), daemon=True) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "stuck"
    if raised:
        raise raised[0]


@pytest.mark.slow
@pytest.mark.ci
def test_results_from_several_threads(whole):
    """More requests than the queue holds, so that threads run the engine for room, too."""
    one, got = served(max_queue=2), {}

    def ask(numbers):
        for i in numbers:
            got[i] = one.generate([PROMPTS[i]], CONFIG, **OPTIONS)[0].tokens

    together(*(lambda first=first: ask(range(first, 12, 4)) for first in range(4)))
    assert [got[i] for i in range(12)] == whole
    assert one.stats().running == one.stats().queued == 0 and one.stats().pages_available == 24
    assert one.generate([PROMPTS[0]], CONFIG, **OPTIONS)[0].tokens == whole[0]


@pytest.mark.parametrize("changes", [False, True])
def test_streams_from_several_threads(changes, whole):
    """Each event in its turn: every stream takes its next one only when the other has had its own."""
    one, told = served(), {5: [], 9: []}
    barrier = threading.Barrier(2, timeout=30)

    def read(i):
        request = one.submit(PROMPTS[i], CONFIG, **OPTIONS)
        for event in one.stream(request, changes=changes):
            told[i] = event.tokens if changes else told[i] + event.tokens
            with suppress(threading.BrokenBarrierError):
                barrier.wait()
        # The other has more to tell, or has told it.
        barrier.abort()
        assert one.result(request).tokens == whole[i]

    together(lambda: read(5), lambda: read(9))
    for i in told:
        assert told[i] == whole[i]


def test_a_stream_that_is_left_holds_nobody_up(whole):
    """Neither while it is suspended nor when it is closed; its request goes on for whoever asks for it."""
    one = served()
    request = one.submit(PROMPTS[3], CONFIG, **OPTIONS)
    left = one.stream(request)
    next(left)
    got = []
    together(lambda: got.extend(one.generate(PROMPTS[4:6], CONFIG, **OPTIONS)))
    left.close()
    together(lambda: got.append(one.result(request)))
    assert [c.tokens for c in got] == [whole[4], whole[5], whole[3]]


def test_a_result_is_given_to_one_thread(whole):
    one = served()
    request = one.submit(PROMPTS[3], CONFIG, **OPTIONS)
    got, refused = [], []

    def take(how):
        try:
            got.append(how(request))
        except DecodingError:
            refused.append(how)

    together(lambda: take(one.result), lambda: take(one.result), lambda: take(one.cancel))
    assert len(got) == 1 and len(refused) == 2
    assert got[0].tokens == whole[3][: len(got[0].tokens)]


def test_the_lock_goes_round():
    """A thread that takes it again and again lets the other have it each time."""
    lock, order = FairLock(), []
    ready = threading.Barrier(2, timeout=30)

    def take(name):
        ready.wait()
        for _ in range(40):
            with lock:
                order.append(name)
                time.sleep(1e-3)  # The other comes to wait.

    together(lambda: take("a"), lambda: take("b"))
    assert sum(before != after for before, after in pairwise(order)) > 60


def test_an_interruption_while_the_lock_is_taken_keeps_nobody_out():
    """Ctrl-C that comes when the lock has been taken and its block has not begun."""
    lock = FairLock()
    lock._held.acquire()
    with lock:
        pass
    together(lambda: lock.__enter__())
