"""What may change nothing: windows, pages, chunks, calls, neighbours that come and go; and what the host may do."""

import dataclasses
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdar_jax import DecodingConfig
from sdar_jax.decoding import block_forward
from sdar_jax.decoding.buffer import Decoder, advance
from sdar_jax.decoding.completions import completions
from sdar_jax.decoding.decode_state import DecodeState, SequenceState
from tests.decoding.states import start_state
from tests.tiny import MASK, padded, tiny_model

NEW, STOPS = 14, padded((3, 5))
CONFIGS = [
    DecodingConfig(confidence_threshold=0.15),
    DecodingConfig(strategy="low_confidence_static", denoising_steps=2),
    DecodingConfig(temperature=1.0, top_k=9),
    DecodingConfig(strategy="entropy_bounded", entropy_bound=3.0),
]
EARLY = DecodingConfig(add_threshold=0.25, activate_threshold=0.75, confidence_threshold=0.3)
random = np.random.default_rng(0)
PROMPTS = [random.integers(0, MASK, n) for n in (0, 6, 13, 27)]


def start(configs=CONFIGS, prompts=PROMPTS, slots=2, seed=0, **options):
    options = dict(max_new_tokens=NEW, stop_ids=STOPS, seed=seed, window_slots=slots) | options
    return start_state(tiny_model(), prompts, configs, **options)


def newly_compiled():
    """`advance`, so that what is patched for a test is compiled for it alone."""
    return jax.jit(lambda *arguments: advance(*arguments), static_argnums=3)


def decoded(model, state: DecodeState, steps: int, buffer) -> DecodeState:
    return Decoder(model, buffer)(state, steps)[0]


def finished(state: DecodeState, buffer, compiled=decoded) -> SequenceState:
    return jax.device_get(compiled(tiny_model(), state, 999, buffer).batch)


def results(batch: SequenceState) -> list:
    """All but log-probabilities, whose last bits depend on the width of a forward, and how the prompt was read."""
    return [
        c._replace(logprobs=None, commit_forwards=0, prefill_forwards=0)
        for c in completions(batch, None)
    ]


@pytest.fixture(scope="module")
def expected():
    with jax.enable_x64(True):
        return results(finished(*start(slots=1)))


@pytest.mark.parametrize(
    "change",
    [
        dict(slots=3),
        dict(page_size=4),
        dict(page_size=16, prefill_tokens=8),
        pytest.param(dict(prefill_tokens=4), marks=pytest.mark.slow),
        pytest.param(dict(slots=4), marks=pytest.mark.slow),
        pytest.param(dict(page_size=8, prefill_tokens=12), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_windows_pages_and_chunks_change_nothing(change, expected, x64):
    batch = finished(*start(**change))
    assert results(batch) == expected
    chunk = change.get("prefill_tokens", 512)
    np.testing.assert_array_equal(
        batch.progress.prefill_forwards, [-(-(len(p) // 4 * 4) // chunk) for p in PROMPTS]
    )


def test_widths_change_nothing(expected, x64):
    """The widest forward alone, instead of the narrowest that is wide enough."""
    with mock.patch.object(block_forward, "_parts_of", lambda whole, eighths: [whole]):
        assert results(finished(*start(), compiled=newly_compiled())) == expected


@pytest.mark.parametrize("order", [[3, 0, 2, 1], [1, 1, 3, 3]])
def test_order_and_neighbours_change_nothing(order, expected, x64):
    sequences = []
    for i in order:
        state, buffer = start()
        sequences.append(jax.tree.map(lambda x, i=i: x[i], state.batch))
    mixed = jax.tree.map(lambda *each: jnp.stack(each), *sequences)
    mixed = mixed.with_inputs(page_table=state.batch.inputs.page_table)
    assert results(finished(DecodeState(mixed, state.cache), buffer)) == [
        expected[i] for i in order
    ]


def test_only_work_is_done(x64):
    """A forward has as many slots as are open, in quarters of all; the head as many positions as are masked."""
    widths = {"slots": [], "head": []}
    narrowest = block_forward._narrowest

    def record(sizes, count):
        jax.debug.callback(
            lambda n, sizes=sizes: widths["head" if sizes[0] == 0 else "slots"].append(int(n)),
            count,
        )
        return narrowest(sizes, count)

    with mock.patch.object(block_forward, "_narrowest", record):
        config = DecodingConfig(strategy="sequential")
        state, buffer = start([config] * 2, [PROMPTS[0], PROMPTS[0]], max_new_tokens=8)
        buffer = dataclasses.replace(buffer, widths="many", prefill_sequences=0)
        short = state.batch.with_inputs(limit=jnp.array([8, 4])).with_progress(
            end=jnp.array([8, 4])
        )
        finished(DecodeState(short, state.cache), buffer, compiled=newly_compiled())
    jax.effects_barrier()
    # Two rows for four steps; then one alone, whose first block's last forward is the fifth.
    assert widths["slots"] == [2, 2, 2, 2, 2, 1, 1, 1]
    assert widths["head"] == [8, 6, 4, 2, 4, 3, 2, 1]


_write = jax.jit(
    lambda batch, new, at: jax.tree.map(lambda x, value: x.at[at].set(value), batch, new)
)
_read = jax.jit(lambda batch, at: jax.tree.map(lambda x: x[at], batch))


class Host:
    """A host that serves requests through fewer slots than there are, allocates pages late and takes them back."""

    def __init__(self, requests: list[int], seed: int, slots: int, page_size: int = 8):
        self.random = np.random.default_rng(seed)
        self.queue, self.done = list(requests), {}
        options = dict(slots=slots, page_size=page_size, prefill_tokens=8)
        self.fresh, self.buffer = start([*CONFIGS, EARLY], [*PROMPTS, PROMPTS[1]], **options)
        beside = bool(self.random.integers(2))
        changes = dict(prefill_sequences=1, decodes_beside_prefill=beside, stops_early=True)
        self.buffer = dataclasses.replace(self.buffer, **changes)
        self.page_size, self.serving = page_size, {}
        batch = jax.tree.map(lambda x: jnp.copy(x[:2]), self.fresh.batch)
        shape = batch.inputs.page_table.shape
        table = jnp.asarray(self.random.permutation(shape[0] * shape[1]).reshape(shape), jnp.int32)
        batch = batch.with_inputs(page_table=table).with_progress(done=jnp.ones(2, bool))
        self.state = DecodeState(
            batch, jax.tree.map(lambda pages: jnp.copy(pages[: table.size]) + 9, self.fresh.cache)
        )
        self.waiting = []

    def admit(self, slot: int) -> None:
        if self.waiting and (not self.queue or self.random.random() < 0.5):
            request, saved = self.waiting.pop()
            self.write(slot, saved.with_progress(cached=jnp.int32(0)))
        else:
            request = self.queue.pop()
            self.write(slot, _read(self.fresh.batch, request))
        self.serving[slot] = request

    def write(self, slot: int, new: SequenceState) -> None:
        new = new.with_inputs(
            page_table=self.state.batch.inputs.page_table[slot], pages_end=jnp.int32(0)
        )
        self.state = self.state._replace(batch=_write(self.state.batch, new, slot))

    def preempt(self, slot: int) -> None:
        batch = self.state.batch
        saved = _read(batch, slot)
        self.waiting.append((self.serving.pop(slot), saved))
        self.state = self.state._replace(
            batch=batch.with_progress(done=batch.progress.done.at[slot].set(True))
        )

    def serve(self) -> dict[int, SequenceState]:
        while self.queue or self.waiting or self.serving:
            for slot in range(2):
                if slot not in self.serving and (self.queue or self.waiting):
                    self.admit(slot)
            batch = self.state.batch
            grows = batch.progress.out_of_pages & (self.random.random(2) < 0.7)
            batch = batch.with_inputs(pages_end=batch.inputs.pages_end + self.page_size * grows)
            steps = int(self.random.integers(1, 6))
            self.state, _ = Decoder(tiny_model(), self.buffer)(
                DecodeState(batch, self.state.cache), steps
            )
            self.drain()
        return self.done

    def drain(self) -> None:
        for slot, request in list(self.serving.items()):
            if self.state.batch.progress.done[slot]:
                self.done[request] = jax.device_get(_read(self.state.batch, slot))
                del self.serving[slot]
            elif self.random.random() < 0.1:
                self.preempt(slot)


@pytest.mark.slow
@pytest.mark.parametrize("slots", [pytest.param(2, marks=pytest.mark.ci), 3])
def test_a_host_that_feeds_and_drains(slots, x64):
    """Five requests through two slots, pages allocated one by one and taken back: each as if it had been alone."""
    state, buffer = start([*CONFIGS, EARLY], [*PROMPTS, PROMPTS[1]], slots=slots)
    whole = results(finished(state, buffer))
    for seed in range(2):
        served = Host(list(range(5)), seed, slots).serve()
        for request, sequence in served.items():
            assert results(jax.tree.map(lambda x: x[None], sequence)) == [whole[request]]


def test_a_call_ends_with_news(x64):
    """Asked for many steps, it returns when a sequence ends or is out of pages, and not again for the same news."""
    config = DecodingConfig(strategy="low_confidence_static", denoising_steps=1)
    state, buffer = start([config] * 3, [PROMPTS[0]] * 3, page_size=4, stop_ids=())
    buffer = dataclasses.replace(buffer, stops_early=True)
    batch = state.batch.with_inputs(pages_end=jnp.array([16, 8, 16]), limit=jnp.array([12, 12, 4]))
    run = partial(decoded, tiny_model(), steps=99, buffer=buffer)
    news = lambda state: (
        state.batch.progress.done.tolist(),
        state.batch.progress.out_of_pages.tolist(),
    )
    state = run(state=DecodeState(batch, state.cache))
    assert news(state) == ([False, False, True], [False] * 3)
    state = run(state=state)
    assert news(state) == ([False, False, True], [False, True, False])
    state = run(state=state)
    assert news(state) == ([True, False, True], [False, True, False])
    assert run(state=jax.tree.map(jnp.copy, state)).batch.progress.denoising_forwards.tolist() == [
        3,
        2,
        1,
    ]
    state = run(state=state._replace(batch=state.batch.with_inputs(pages_end=jnp.full(3, 12))))
    assert state.batch.progress.done.all() and state.batch.progress.denoising_forwards.tolist() == [
        3,
        3,
        1,
    ]
