"""The engine's loop: requests are enqueued, and each step takes them nearer to their ends."""

import itertools
import time
from collections import deque
from typing import Any, NamedTuple

from sdar_jax.decoding.config import FinishReason
from sdar_jax.decoding.decode_state import SequenceState, generated
from sdar_jax.decoding.engine.input_processor import InputProcessor
from sdar_jax.decoding.engine.model_runner import ModelRunner
from sdar_jax.decoding.engine.recovery import Recovery
from sdar_jax.decoding.engine.request import Request, ended
from sdar_jax.decoding.engine.scheduler import Scheduler
from sdar_jax.decoding.engine.statistics import Counters, Stats
from sdar_jax.decoding.engine.weights import replacement
from sdar_jax.decoding.text import TextReader
from sdar_jax.decoding.transfers import HostView
from sdar_jax.errors import DecodingError
from sdar_jax.model import Model


class _Call(NamedTuple):
    """A call of the device that the host has not read yet.

    Attributes:
        view: what it leaves.
        seats: the requests that it has, each with the number of its admission and how many pages it had.
        started: when, in seconds of `time.perf_counter`.
        alone: whether it only reads prompts, as no request can decode yet.
    """

    view: HostView
    seats: dict[Request, tuple[int, int]]
    started: float
    alone: bool

    def requests(self) -> list[Request]:
        """Those that still have the slot that they had."""
        return [
            request
            for request, (admitted, _) in self.seats.items()
            if request.slot is not None and request.admitted == admitted
        ]


class EngineCore:
    """Runs requests to their ends: what the scheduler decides, the model runner does. One thread at a time may use it.

    Args:
        inputs: makes the requests.
        scheduler: has the queue, the slots and the pages.
        runner: has the batch on the device.
        tokenizer: for completions as text, or None.
        steps_per_call: forwards of one call of the device, at most.

    Attributes:
        requests: by id, those that wait, run, or have a result that was not taken.
        recovery: whether host and device are whole.
    """

    def __init__(
        self,
        inputs: InputProcessor,
        scheduler: Scheduler,
        runner: ModelRunner,
        tokenizer: Any,
        steps_per_call: int,
    ):
        self.requests: dict[int, Request] = {}
        self._inputs = inputs
        self._scheduler = scheduler
        self._runner = runner
        self._tokenizer = tokenizer
        self._steps_per_call = steps_per_call
        self._ids = itertools.count()
        self._counters = Counters()
        # Oldest first. Where requests wait, the next call is on its way before the last one is read.
        self._calls: deque[_Call] = deque()
        self.recovery = Recovery(self._reset)
        self.recovery.recover()

    @property
    def model(self) -> Model:
        """Whose weights decode."""
        return self._runner.model

    @property
    def queued(self) -> int:
        """Requests that wait for a slot."""
        return len(self._scheduler.waiting)

    def enqueue(self, request: Request) -> int:
        """Gives a request its id, and a place in the queue if there is anything to decode."""
        request.id = next(self._ids)
        with self.recovery.changing():
            if request.sequence.progress.done:
                self._finish(request, request.sequence, None)
            else:
                self._scheduler.waiting.append(request)
            self.requests[request.id] = request
        return request.id

    def known(self, request_id: int) -> Request:
        """The request of an id. Raises DecodingError for one that is not known, or whose result was taken."""
        self.recover()
        if request_id not in self.requests:
            raise DecodingError(
                f"request {request_id!r} is unknown, or its result was taken; use an id from submit"
            )
        return self.requests[request_id]

    def recover(self) -> None:
        """Builds anew what an interruption left half changed, if one did."""
        self._counters.restarts += self.recovery.recover()

    def _reset(self) -> None:
        """Empties the device and the pages. Who has not ended waits again, as the host last saw it, in the old order.

        What a request is, no change touches, and decoding from an earlier state of it gives the same result.
        """
        unfinished = [request for request in self.requests.values() if request.result is None]
        for request in unfinished:
            request.stop_reader = self._inputs.stop_reader(request.stop_strings)
        self._calls.clear()
        self._scheduler.reset(unfinished)
        self._runner.reset()

    def end_early(self, request: Request) -> None:
        """Ends a request that waits or runs with what it has."""
        # It may have ended in a call that nobody has read; for one that is under way it need not wait.
        while self._calls and self._calls[0].view.is_ready():
            self._read()
        if request.result is not None:
            return
        with self.recovery.changing():
            if request.slot is None:
                self._scheduler.waiting.remove(request)
            self._finish(request, self._evict(request), "cancelled")

    def refresh(self, request: Request) -> None:
        """Brings the host's copy of a request up to the last call read; it stays should the device's be lost."""
        request.sequence = request.latest()

    def update_weights(self, model: Model) -> None:
        """See `Engine.update_weights`."""
        self.recover()
        if unfinished := self.queued + len(self._scheduler.running):
            raise DecodingError(
                f"{unfinished} requests have not ended, and each is decoded by one model; take their results, or "
                "cancel them, before update_weights"
            )
        model = replacement(self.model, model)
        with self.recovery.changing():
            self._runner.update_weights(model)
            self._scheduler.pool.clear()

    def stats(self) -> Stats:
        """What waits, runs and is free now, and what was counted since the engine was made."""
        self.recover()
        return self._counters.stats(
            queued=self.queued,
            running=len(self._scheduler.running),
            pages_available=self._scheduler.pool.available,
            evictions=self._scheduler.pool.evictions,
        )

    def step(self) -> None:
        """Admits what fits, starts a call, and reads the oldest: takes out what ended, and allocates pages.

        Where requests wait, that is the call before, and the device never waits for the host. Where none waits it is
        the same call, so that who comes next need not wait for one that is under way.
        """
        self.recover()
        with self.recovery.changing():
            self._admit()
            if not self._scheduler.running:
                assert not self._scheduler.waiting, (
                    "a request that was accepted must fit when it is alone"
                )
                self._calls.clear()
                return
            if not self._calls:
                self._start()
            if self._scheduler.waiting and len(self._calls) == 1 and not self._calls[0].alone:
                self._start()
        self._read()

    def _read(self) -> None:
        """Waits for the oldest call, and does what follows from it."""
        call = self._calls[0]
        self._wait(call)
        seconds = time.perf_counter() - call.started
        read = self._counters.prefill_tokens
        with self.recovery.changing():
            self._calls.popleft()
            self._drain(call)
        if call.alone:
            self._counters.prefill_alone_tokens += self._counters.prefill_tokens - read
            self._counters.prefill_alone_seconds += seconds

    def _start(self) -> None:
        running = self._scheduler.running
        # Where no request can decode yet it is one step, so that the time of reading prompts is known.
        alone = not self._calls and all(self._scheduler.unread(request) for request in running)
        started = time.perf_counter()
        view = self._runner.run(1 if alone else self._steps_per_call, self._inputs.rules)
        seats = {request: (request.admitted, len(request.pages)) for request in running}
        self._calls.append(_Call(view, seats, started, alone))
        self._counters.calls += 1

    def _admit(self) -> None:
        admissions = self._scheduler.admit()
        # Counted before the device is asked for anything: an interruption there makes these admissions again.
        for admission in admissions:
            if not admission.again:
                self._counters.prompt_tokens += len(admission.request.prompt)
                self._counters.prefix_tokens += admission.prefix_length
        for admission in admissions:
            self._runner.admit(admission)

    def _drain(self, call: _Call) -> None:
        progress = call.view.progress
        for request in call.requests():
            unread = self._scheduler.unread(request)
            request.view = call.view
            request.cached = int(progress.cached[request.slot])
            self._counters.prefill_tokens += unread - self._scheduler.unread(request)
            self._scheduler.record_prompt(request)
            if progress.done[request.slot]:
                self._finish(request, self._evict(request), None)
            elif request.stop_reader is not None:
                self._stop_at_string(request, request.stop_reader)
        growth = self._scheduler.grow(self._short_of_pages(call), calls=1 + len(self._calls))
        for slot in growth.preempted:
            self._runner.end(slot)
            self._counters.preemptions += 1
        if growth.allocated:
            self._runner.set_pages(*self._scheduler.page_tables())

    def _short_of_pages(self, call: _Call) -> list[Request]:
        """Those that the call left waiting for a page, but for who got one since it was started."""
        short = call.view.progress.out_of_pages
        return [
            request
            for request in call.requests()
            if short[request.slot] and len(request.pages) == call.seats[request][1]
        ]

    def _stop_at_string(self, request: Request, reader: TextReader) -> None:
        reader.read(generated(request.latest()))
        if reader.found:
            self._finish(request, self._evict(request), None)

    def _wait(self, call: _Call) -> None:
        """Returns once a call is done."""
        try:
            call.view.progress  # noqa: B018
        except Exception:
            # The device failed, and what it was to give is no longer there.
            self.recovery.lost()
            raise

    def _evict(self, request: Request) -> SequenceState:
        """Takes a request out of its slot, if it has one; its state."""
        slot = request.slot
        if slot is None:
            return request.sequence
        sequence = self._scheduler.release(request)
        if not sequence.progress.done:
            self._runner.end(slot)
        return sequence

    def _finish(
        self, request: Request, sequence: SequenceState, reason: FinishReason | None
    ) -> None:
        """Makes the completion of a request that has left its slot."""
        request.sequence = sequence
        request.result = ended(request, sequence, reason, self._tokenizer)
        self._counters.count_end(request.result)
