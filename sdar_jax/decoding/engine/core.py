"""The engine's loop: requests are enqueued, and each step takes them nearer to their ends."""

import itertools
import time
from typing import Any

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
        self._scheduler.reset(unfinished)
        self._runner.reset()

    def end_early(self, request: Request) -> None:
        """Ends a request that waits or runs with what it has."""
        with self.recovery.changing():
            if request.slot is None:
                self._scheduler.waiting.remove(request)
            sequence = self._evict(request)
            # It may have ended in a call whose end nobody saw.
            self._finish(request, sequence, None if sequence.progress.done else "cancelled")

    def refresh(self, request: Request) -> None:
        """Brings the host's copy of a request up to the last call; it stays, should the device's state be lost."""
        if request.slot is not None:
            request.sequence = self._fetch(request)

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
        """Admits what fits, runs the device once, takes out what ended, and allocates pages."""
        self.recover()
        with self.recovery.changing():
            self._admit()
            running = self._scheduler.running
            if not running:
                assert not self._scheduler.waiting, (
                    "a request that was accepted must fit when it is alone"
                )
                return
            # Where no request can decode yet it is one step, so that the time of reading prompts is known.
            alone = all(self._scheduler.unread(request) for request in running)
            read, started = self._counters.prefill_tokens, time.perf_counter()
            self._runner.run(1 if alone else self._steps_per_call, self._inputs.rules)
            self._counters.calls += 1
        view = self._wait()
        seconds = time.perf_counter() - started
        with self.recovery.changing():
            self._drain(view)
        if alone:
            self._counters.prefill_alone_tokens += self._counters.prefill_tokens - read
            self._counters.prefill_alone_seconds += seconds

    def _admit(self) -> None:
        admissions = self._scheduler.admit()
        # Counted before the device is asked for anything: an interruption there makes these admissions again.
        for admission in admissions:
            if not admission.again:
                self._counters.prompt_tokens += len(admission.request.prompt)
                self._counters.prefix_tokens += admission.prefix_length
        for admission in admissions:
            self._runner.admit(admission)

    def _drain(self, view: HostView) -> None:
        for request in self._scheduler.running:
            unread = self._scheduler.unread(request)
            request.cached = int(view.progress.cached[request.slot])
            self._counters.prefill_tokens += unread - self._scheduler.unread(request)
            self._scheduler.record_prompt(request, view)
            if view.progress.done[request.slot]:
                self._finish(request, self._evict(request), None)
            elif request.stop_reader is not None:
                self._stop_at_string(request, request.stop_reader)
        growth = self._scheduler.grow(view)
        for slot in growth.preempted:
            self._runner.end(slot)
            self._counters.preemptions += 1
        if growth.allocated:
            self._runner.set_pages(*self._scheduler.page_tables())

    def _stop_at_string(self, request: Request, reader: TextReader) -> None:
        reader.read(generated(self._fetch(request)))
        if reader.found:
            self._finish(request, self._evict(request), None)

    def _wait(self) -> HostView:
        """What the last call left, once it is done."""
        view = self._runner.view
        try:
            view.progress  # noqa: B018
        except Exception:
            # The device failed, and what it was to give is no longer there.
            self.recovery.lost()
            raise
        return view

    def _fetch(self, request: Request) -> SequenceState:
        """The state of a request in a slot, as the last call left it."""
        assert request.slot is not None
        return self._wait().sequence(request.sequence.inputs, request.slot)

    def _evict(self, request: Request) -> SequenceState:
        """Takes a request out of its slot, if it has one; its state."""
        slot = request.slot
        if slot is None:
            return request.sequence
        sequence = self._scheduler.release(request, self._wait())
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
