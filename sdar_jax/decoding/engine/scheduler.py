"""Who is in the batch, and with which pages: the queue, admission, growth and preemption. It knows no device.

First come, first served: nobody overtakes in the queue, and who came first is preempted last, so everyone ends.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from sdar_jax.decoding.block_forward import BufferConfig
from sdar_jax.decoding.decode_state import SequenceShape, SequenceState
from sdar_jax.decoding.engine.request import Request
from sdar_jax.decoding.page_pool import PagePool, Prefix


class Admission(NamedTuple):
    """A request that got a slot, and what the device is to do for it, after what earlier admissions ask for.

    Attributes:
        request: it has its slot and pages.
        sequence: its state, with the page table, to be put into the slot.
        prefix_length: positions that pages of others already hold.
        copy: a page that is shared in part, and the page to copy it to; None if there is none.
        again: whether it had a slot before, and lost it.
    """

    request: Request
    sequence: SequenceState
    prefix_length: int
    copy: tuple[int, int] | None
    again: bool


class Growth(NamedTuple):
    """What became of the page tables between two calls.

    Attributes:
        preempted: slots whose requests went back to the queue.
        allocated: whether any request got a page, so that the device needs the new tables.
    """

    preempted: list[int]
    allocated: bool


class Scheduler:
    """The queue of requests, the slots of the batch, and the pages.

    Args:
        pool: pages of the cache.
        slots: of the batch; of the requests in them, `config.sequences_at_once` decode, and the others are prefilled
            and wait for a decode slot.
        config: what sequences read.
        shape: of the sequences in the slots.
        steps_per_call: forwards of one call of the device, at most.

    Attributes:
        waiting: requests without a slot, the next one first.
        slots: the request in each, or None.
    """

    def __init__(
        self,
        pool: PagePool,
        slots: int,
        config: BufferConfig,
        shape: SequenceShape,
        steps_per_call: int,
    ):
        self.pool = pool
        self.waiting: deque[Request] = deque()
        self.slots: list[Request | None] = [None] * slots
        self._decode_slots = config.at_once(slots)
        self._paradigm = config.paradigm
        # A model without masks reads the token before its first place as it decodes.
        self._reads_before = int(config.reads_before)
        self._shape = shape
        self._steps_per_call = steps_per_call
        self._admissions = itertools.count(1)

    @property
    def running(self) -> list[Request]:
        """Requests in slots, in the slots' order."""
        return [request for request in self.slots if request is not None]

    def reset(self, unfinished: Iterable[Request]) -> None:
        """Empties slots and pages. Requests that have not ended wait again, in their old order."""
        requests = list(unfinished)
        for request in requests:
            request.slot, request.view, request.pages, request.cached = None, None, [], 0
        self.waiting = deque(sorted(requests, key=lambda r: (not r.admitted, r.admitted, r.id)))
        self.slots = [None] * len(self.slots)
        self.pool.clear()

    def admit(self) -> list[Admission]:
        """Gives slots and pages to those that wait, in order, while there are any; nobody is overtaken."""
        admitted = []
        while self.waiting and None in self.slots:
            request = self.waiting[0]
            prefix = self._allocate(request)
            if prefix is None:
                break
            self.waiting.popleft()
            admitted.append(self._place(request, prefix))
        return admitted

    def _place(self, request: Request, prefix: Prefix) -> Admission:
        again = request.admitted > 0
        request.slot, request.view = self.slots.index(None), None
        request.admitted = next(self._admissions)
        request.cached = prefix.length
        request.prompt_recorded = False
        request.forwards_before = int(request.sequence.progress.denoising_forwards)
        self.slots[request.slot] = request
        table, end = self._page_table(request)
        sequence = request.sequence.with_progress(
            cached=np.asarray(prefix.length, np.int32)
        ).with_inputs(
            page_table=table, pages_end=end, admitted=np.asarray(request.admitted, np.int32)
        )
        own = request.pages[len(prefix.pages) :]
        copy = None if prefix.partial is None else (prefix.partial, own[0])
        return Admission(request, sequence, prefix.length, copy, again)

    def _allocate(self, request: Request) -> Prefix | None:
        """Gives it pages for what it has and one block more, those that hold its prefix first; None if too few."""
        progress = request.sequence.progress
        known = self._paradigm.shared(int(progress.start) - self._reads_before, len(request.prompt))
        prefix = self.pool.match(request.sequence.output.tokens[:known].tolist())
        end = self._reach(request, int(progress.start), int(progress.open), 1)
        missing = -(-end // self.pool.page_size) - len(prefix.pages)
        # Those that run will want more: half a page each is left to them, or many would soon be preempted; and a whole
        # one, where this one would only wait for a decode slot.
        running = len(self.running)
        spare = running // 2 if running < self._decode_slots else running
        # Held, or they could be evicted for those that are missing.
        self.pool.share(prefix.held)
        own = self.pool.allocate(missing, spare)
        if own is None and prefix.partial is not None:
            # The page to copy from may be the one that is missing.
            self.pool.release([prefix.partial])
            prefix = prefix.without_partial()
            own = self.pool.allocate(missing, spare)
        if own is None:
            self.pool.release(prefix.held)
            return None
        if prefix.partial is not None:
            # The device copies in the order of admissions, before anything is written to a page.
            self.pool.release([prefix.partial])
        request.pages = [*prefix.pages, *own]
        return prefix

    def unread(self, request: Request) -> int:
        """Positions to read before the request can decode."""
        start = int(request.sequence.progress.start)
        return max(start - self._reads_before - request.cached, 0)

    def grow(self, short: Sequence[Request], calls: int) -> Growth:
        """Allocates pages to those that are short of them, if need be the last request's; and ahead, while some idle.

        Args:
            short: requests that cannot go on without one more.
            calls: that will have run before pages are allocated again.
        """
        preempted: list[int] = []
        allocated = False
        for request in sorted(short, key=lambda request: request.admitted):
            if request.slot is not None:
                allocated |= self._grow_one(request, preempted)
        running = sorted(self.running, key=lambda request: request.admitted)
        for request in running:
            if self._needs_pages_soon(request, calls):
                own = self.pool.allocate(1, len(running))
                request.pages += own or []
                allocated |= own is not None
        return Growth(preempted, allocated)

    def _grow_one(self, request: Request, preempted: list[int]) -> bool:
        """Allocates one page, from the last request's if there is none; whether the request still has its slot."""
        while (own := self.pool.allocate(1)) is None:
            last = max(self.running, key=lambda running: running.admitted)
            assert last.slot is not None
            preempted.append(last.slot)
            last.sequence = self.release(last)
            self.waiting.appendleft(last)
            if last is request:
                return False
        request.pages += own
        return True

    def _needs_pages_soon(self, request: Request, calls: int) -> bool:
        """Whether so many calls may come to positions that no page of the request covers."""
        if request.view is None:
            return False
        progress, slot = request.view.progress, request.slot
        start, opened = int(progress.start[slot]), int(progress.open[slot])
        covered = len(request.pages) * self.pool.page_size
        return covered < self._reach(request, start, opened, calls * self._steps_per_call)

    def _reach(self, request: Request, start: int, opened: int, blocks: int) -> int:
        """The end of a request's positions with so many blocks open, once so many more have opened."""
        size = self._shape.block_size
        left = -(-(int(request.sequence.inputs.limit) - start) // size)
        return start + min(opened + blocks, left) * size

    def page_tables(self) -> tuple[np.ndarray, np.ndarray]:
        """The page table of each slot, int32 [slots, M], and the positions that it covers, int32 [slots]."""
        tables, ends = zip(*map(self._page_table, self.slots), strict=True)
        return np.stack(tables), np.stack(ends)

    def _page_table(self, request: Request | None) -> tuple[np.ndarray, np.ndarray]:
        pages = [] if request is None else request.pages
        table = np.zeros(self._shape.pages, np.int32)
        table[: len(pages)] = pages
        return table, np.asarray(len(pages) * self.pool.page_size, np.int32)

    def release(self, request: Request) -> SequenceState:
        """Frees the slot and the pages of a request; returns its state as the host has read it."""
        assert request.slot is not None
        sequence = request.latest()
        self._record(request, np.asarray(sequence.output.tokens), self._sound(request))
        self.pool.release(request.pages)
        self.slots[request.slot] = None
        request.slot, request.view = None, None
        request.pages = []
        return sequence

    def record_prompt(self, request: Request) -> None:
        """Lets others share the pages of its prompt, once they are known to be sound."""
        if request.prompt_recorded:
            return
        if sound := self._sound(request):
            self._record(request, request.prompt, min(sound, len(request.prompt)))
            request.prompt_recorded = True

    def _record(self, request: Request, tokens: np.ndarray, length: int) -> None:
        size = self._shape.block_size
        shared = self._paradigm.shared(length, len(request.prompt))
        self.pool.record(request.pages, tokens[: shared // size * size].tolist())

    def _sound(self, request: Request) -> int:
        """Positions whose keys and values gave finite logits since it got its slot: others may read those.

        None of a request that failed, or that has only read its prompt so far.
        """
        if request.view is None:
            return 0
        progress, slot = request.view.progress, request.slot
        if progress.failed[slot] or progress.denoising_forwards[slot] == request.forwards_before:
            return 0
        cached = int(progress.cached[slot])
        if self._reads_before or progress.open[slot]:
            return cached
        # The forward that wrote the last blocks' keys had no mask to predict, so no logits saw them.
        return max(cached - self._shape.slots * self._shape.block_size, 0)
