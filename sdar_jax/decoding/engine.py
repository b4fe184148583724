"""`Engine`: requests of any lengths and configs through one batch on the device, fed and drained by the host.

A request waits in a queue until there is a free row and pages for its prompt. What the page pool has of its prefix is
shared, a page that is shared in part is copied, and the rest is read in chunks beside the decoding of other rows. The
device runs several turns a call and decides stops itself (`buffer.advance`); between calls the host takes out what
ended, hands out pages, and lets new requests in. When pages run out, the request that came last gives up its row: its
tokens stay, its keys are read again when it comes back, and its result is the same.

Whatever interrupts a call loses nothing: `_start_over`.

Everything moves while a caller waits: in `stream`, `result` and `generate`. Callers may be threads: every public method
holds the engine's lock while it looks at or changes anything, and for one call of the device at a time.
"""

import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdar_jax.decoding.buffer import Decoder, State
from sdar_jax.decoding.commit_rules import CommitRule
from sdar_jax.decoding.config import Completion, DecodingConfig, FinishReason
from sdar_jax.decoding.events import Event, Progress
from sdar_jax.decoding.forward import BufferConfig
from sdar_jax.decoding.generate import (
    Prompt,
    check_options,
    check_prompts,
    check_seed,
    check_slots,
    checked_stop_strings,
    checked_stops,
    to_ids,
)
from sdar_jax.decoding.locks import TurnLock
from sdar_jax.decoding.pages import PagePool
from sdar_jax.decoding.prompt_logprobs import prompt_logprobs
from sdar_jax.decoding.requests import COUNTS, Request, Stats, ended
from sdar_jax.decoding.rows import Rows, RowShape, make_row, output
from sdar_jax.decoding.text import TextReader, unknown_ids
from sdar_jax.decoding.updates import Seen, copy_page, end_row, give_pages, put_row
from sdar_jax.devices.chips import platform
from sdar_jax.devices.sharding import mesh_of
from sdar_jax.errors import DecodingError, is_int
from sdar_jax.model import Model, ModelConfig, empty_pages, unstack_layers
from sdar_jax.paradigm import fills_masks

# Stop tokens, and tokens to suppress, that a request may have: in the shape of the batch.
_STOPS, _SUPPRESSED = 8, 32


def _own_config(model: ModelConfig, block_size: int | None) -> DecodingConfig:
    """The config that an engine of this model is made for: in blocks, whatever else the model could do."""
    return DecodingConfig(block_size, "low_confidence_dynamic" if fills_masks(model.objective) else None)


class Engine:
    """Continuous batching over paged keys and values.

    Args:
        model: a diffusion model, or an autoregressive one, which then serves strategy "autoregressive" alone.
        tokenizer: for prompts and completions as text, and for stop strings; ids that it does not have are never
            proposed.
        batch_slots: rows decoded at once; half as many more may stand by, their prompts read.
        pages, page_size: of the cache; page_size is a multiple of the block size.
        block_size: S; None is the model's own.
        window_slots: K, blocks of a row that a forward may read: 2 fuses a block's last write with the next's start.
        max_length: the most tokens of prompt and output together; by default what the pages or the model can hold.
        max_queue: requests that may wait.
        prefill_tokens: of a prompt, the most that a forward reads beside the decoding of others.
        turns: forwards a call of the device, at most.
        top_logprobs: the most of these that a request may ask for: room that every position has.

    Raises:
        ConfigError, DecodingError: sizes that cannot be served.
    """

    def __init__(
        self,
        model: Model,
        *,
        tokenizer: Any = None,
        batch_slots: int,
        pages: int,
        page_size: int,
        block_size: int | None = None,
        window_slots: int = 2,
        max_length: int | None = None,
        max_queue: int = 1024,
        prefill_tokens: int = 256,
        turns: int = 8,
        top_logprobs: int = 0,
    ):
        config = model.config
        self._own = own = _own_config(config, block_size)
        size = own.resolve_block_size(config)
        sizes = {"batch_slots": batch_slots, "max_queue": max_queue, "turns": turns, "prefill_tokens": prefill_tokens}
        for name, value in {**sizes, "max_length": 1 if max_length is None else max_length}.items():
            if not is_int(value) or value < 1:
                raise DecodingError(f"{name} is {value!r}; give a positive integer")
        if not is_int(top_logprobs) or not 0 <= top_logprobs <= config.vocab_size:
            raise DecodingError(f"top_logprobs is {top_logprobs!r}; give an integer of 0 to {config.vocab_size}")
        check_slots(window_slots)
        self._pool = PagePool(pages, page_size, size)
        most = min(pages * page_size, config.max_position_embeddings)
        self._max_length = most if max_length is None else min(max_length, most)
        # One block more than is asked for may be open.
        table = -(-(self._max_length + size) // page_size)
        self._paradigm = replace(own, block_size=size).paradigm(config)
        slots = self._paradigm.slots(window_slots)
        self._shape = RowShape(table * page_size, _STOPS, table, size, slots, _SUPPRESSED, top_logprobs)
        self._model, self._tokenizer = unstack_layers(model), tokenizer
        self._batch_slots, self._max_queue, self._turns = batch_slots, max_queue, turns
        self._buffer = BufferConfig(
            block_size=size,
            paradigm=self._paradigm,
            rules=(own.strategy_for(config).rule,),
            prefill_rows=1,
            prefill_tokens=-(-prefill_tokens // size) * size,
            many_widths=platform() == "cpu",
            rows_at_once=batch_slots,
        )
        self._decode = Decoder(self._model, self._buffer)
        self._float = np.dtype(jnp.promote_types(model.embedding.dtype, jnp.float32))
        self._places: list[Request | None] = [None] * (batch_slots + -(-batch_slots // 2))
        self._requests: dict[int, Request] = {}
        self._lock = TurnLock()
        self._start_over()
        self._ids, self._clock = itertools.count(), itertools.count(1)
        self._counts = dict.fromkeys(COUNTS, 0)
        self._prefill_alone_seconds = 0.0

    def submit(
        self,
        prompt: Prompt,
        config: DecodingConfig = DecodingConfig(),  # noqa: B008 (frozen)
        *,
        max_new_tokens: int,
        stop_token_ids: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        seed: int = 0,
    ) -> int:
        """Queues a request and returns its id.

        Args:
            prompt: token ids, or a text (with the engine's tokenizer).
            stop_token_ids: the output ends before the first of these; None is the model's own list, () none.
            stop_strings: the output's text ends before the first of these; its tokens with the one that completes it.

        Raises:
            DecodingError: the queue is full, or the request cannot be served by this engine.
        """
        options = {"max_new_tokens": max_new_tokens, "stop_token_ids": stop_token_ids, "seed": seed}
        request = self._accept(prompt, config, stop_strings=stop_strings, **options)
        with self._lock:
            self._settle()
            if len(self._queue) >= self._max_queue:
                count = len(self._queue)
                raise DecodingError(f"the queue holds {count} requests, its max_queue; take a result first")
            return self._enqueue(request)

    def _accept(
        self,
        prompt: Prompt,
        config: DecodingConfig,
        *,
        max_new_tokens: int,
        stop_token_ids: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        seed: int = 0,
    ) -> Request:
        """A request that this engine can serve, or the error that says why not; it is not in the queue yet."""
        model = self._model.config
        self._check_config(config)
        ids = to_ids(prompt, 0, self._tokenizer)
        check_prompts([ids], [config], model, max_new_tokens)
        check_seed(seed, 1)
        if self._paradigm.bidirectional_prompt and len(ids) > self._buffer.prefill_tokens:
            raise DecodingError(
                f"the prompt has {len(ids)} tokens and the model reads a prompt in one piece; give the engine "
                f"prefill_tokens of at least that, not {self._buffer.prefill_tokens}"
            )
        if len(ids) + max_new_tokens > self._max_length:
            total = f"the prompt has {len(ids)} tokens and max_new_tokens is {max_new_tokens}"
            limit = "pages" if self._max_length == np.prod(self._pool.sizes) else "max_length"
            holds = f"this engine holds {self._max_length} per request"
            raise DecodingError(f"{total}; {holds}: ask for less, or give Engine(...) a larger {limit}")
        stops = model.stop_token_ids if stop_token_ids is None else checked_stops(stop_token_ids, model)
        if len(stops) > _STOPS:
            raise DecodingError(f"{len(stops)} stop tokens are given; use at most {_STOPS}")
        check_options(config, model, stops, self._tokenizer, max_new_tokens)
        if (count := len(config.suppress_token_ids)) > _SUPPRESSED:
            raise DecodingError(
                f"{count} suppress_token_ids are given; use at most {_SUPPRESSED}, or sdar_jax.generate"
            )
        if config.top_logprobs > (most := self._shape.alternatives):
            asked = f"top_logprobs is {config.top_logprobs} and the engine's {most}"
            raise DecodingError(f"{asked}; give Engine(top_logprobs={config.top_logprobs})")
        strings = checked_stop_strings(stop_strings, self._tokenizer)
        row = self._make_row(ids, config, max_new_tokens, stops, seed)
        own = prompt_logprobs(self._model, ids) if config.prompt_logprobs else None
        return Request(row, ids, strings, self._reader(strings), own)

    def _enqueue(self, request: Request) -> int:
        request.id = next(self._ids)
        with self._changing():
            if request.row.done:
                self._finish(request, request.row, None)
            else:
                self._queue.append(request)
            self._requests[request.id] = request
        return request.id

    def result(self, request_id: int) -> Completion:
        """The completion, once there is one; runs the engine until then. An id gives its result once."""
        while True:
            with self._lock:
                request = self._known(request_id)
                if request.result is not None:
                    del self._requests[request_id]
                    return request.result
                self._step()

    def cancel(self, request_id: int) -> Completion:
        """Ends a request with what it has, finish_reason "cancelled"; one that had ended gives its own completion."""
        with self._lock:
            request = self._known(request_id)
            if request.result is None:
                self._end_early(request)
            assert request.result is not None
            del self._requests[request_id]
            return request.result

    def _end_early(self, request: Request) -> None:
        with self._changing():
            if request.place is None:
                self._queue.remove(request)
            row = self._leave(request)
            # It may have ended in a call whose end nobody saw.
            self._finish(request, row, None if row.done else "cancelled")

    def generate(
        self,
        prompts: Sequence[Prompt],
        config: DecodingConfig = DecodingConfig(),  # noqa: B008 (frozen)
        *,
        max_new_tokens: int,
        seed: int = 0,
        **options,
    ) -> list[Completion]:
        """As `sdar_jax.generate`, beside whatever else the engine is doing; `options` are those of `submit`."""
        check_seed(seed, len(prompts))
        ids = []
        try:
            for index, prompt in enumerate(prompts):
                request = self._accept(prompt, config, max_new_tokens=max_new_tokens, seed=seed + index, **options)
                ids.append(self._enqueue_when_there_is_room(request))
            return [self.result(request_id) for request_id in ids]
        except BaseException:
            # Nobody else knows their ids.
            for request_id in ids:
                with suppress(DecodingError):  # Its result was taken.
                    self.cancel(request_id)
            raise

    def _enqueue_when_there_is_room(self, request: Request) -> int:
        while True:
            with self._lock:
                self._settle()
                if len(self._queue) < self._max_queue:
                    return self._enqueue(request)
                self._step()

    def stream(self, request_id: int, *, changes: bool = False) -> Iterator[Event]:
        """Finished blocks as they come, or every change of the open ones; then take `result`.

        Changes do not depend on how many turns the device runs a call; an event may hold several finished blocks. With
        the engine's tokenizer, what may become part of a stop string, or of a character that is not complete, is held
        back until that is decided; a stop string itself is never told.
        """
        with self._lock:
            request = self._known(request_id)
        return self._events(request, changes)

    def _events(self, request: Request, changes: bool) -> Iterator[Event]:
        decode = None if self._tokenizer is None else self._tokenizer.decode
        progress = Progress(request.stop_strings, decode, self._shape.block_size, changes)
        while True:
            with self._lock:
                self._settle()
                result = request.result
                if request.place is not None:
                    # What was told is kept, should the device's state be lost.
                    request.row = self._fetch(request)
                events = progress.events(request.row, result)
            # Not under the lock: a stream may be left here, or wait for its caller.
            yield from events
            if result is not None:
                return
            with self._lock:
                if request.result is None:
                    self._step()

    def stats(self) -> Stats:
        with self._lock:
            self._settle()
            running = sum(request is not None for request in self._places)
            now = {"queued": len(self._queue), "running": running, "pages_available": self._pool.available}
            since = {"evictions": self._pool.evictions, "prefill_alone_seconds": self._prefill_alone_seconds}
            return Stats(**now, **since, **self._counts)

    def _known(self, request_id: int) -> Request:
        self._settle()
        if request_id not in self._requests:
            raise DecodingError(f"request {request_id!r} is unknown, or its result was taken; use an id from submit")
        return self._requests[request_id]

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """What runs in here changes the books and the device together, and is done whole or started over."""
        self._settled = False
        yield
        self._settled = True

    def _settle(self) -> None:
        if not self._settled:
            self._start_over()
            self._counts["restarts"] += 1

    def _start_over(self) -> None:
        """Empties the device and the pool. Who has not ended waits again, as the host last saw it, in the old order.

        A donated state is gone when its call is interrupted, and books may be half kept. What a request is, is not
        touched by either, and going on from an earlier state of it gives the same result.
        """
        self._settled = False
        waiting = [request for request in self._requests.values() if request.result is None]
        for request in waiting:
            request.place, request.pages, request.cached = None, [], 0
            request.reader = self._reader(request.stop_strings)
        self._queue = deque(sorted(waiting, key=lambda r: (not r.admitted, r.admitted, r.id)))
        self._places = [None] * len(self._places)
        self._pool.clear()
        # The old pages go before there are new ones.
        banned = jax.device_put(unknown_ids(self._tokenizer, self._model.config.vocab_size))
        self._state = State(self._idle_rows(), [], banned)
        kind, mesh = self._model.embedding.dtype, mesh_of(self._model)
        cache = empty_pages(self._model.config, *self._pool.sizes, kind, mesh)
        self._state = self._state._replace(cache=cache)
        self._settled = True

    def _idle_rows(self) -> Rows:
        idle = self._make_row(np.zeros(0, np.int32), self._own, 0, (), 0)
        return jax.tree.map(lambda x: jnp.asarray(np.stack([x] * len(self._places))), idle)

    def _check_config(self, config: DecodingConfig) -> None:
        size, model = self._shape.block_size, self._model.config
        if config.block_size not in (None, size):
            raise DecodingError(f"block_size is {config.block_size}, the engine's {size}; leave it None")
        config = replace(config, block_size=size)
        strategy, asked = config.strategy_for(model), config.strategy_text(model)
        if strategy.fills_masks and not self._paradigm.masks:
            raise DecodingError(f"{asked} is not for an autoregressive model's engine; use strategy='autoregressive'")
        paradigm = config.paradigm(model)
        if not paradigm.cached:
            raise DecodingError(f"{asked} has no cache to share; use sdar_jax.generate")
        if paradigm != self._paradigm:
            raise DecodingError(f"{asked} is not for a diffusion model's engine; use sdar_jax.generate for it")
        config.resolve_block_size(model)

    def _rule(self, config: DecodingConfig) -> tuple[int, CommitRule]:
        """The rule of a request and its index in the program, which is another one from a new rule on."""
        rule = config.strategy_for(self._model.config).rule
        if rule not in self._buffer.rules:
            with self._lock:
                if rule not in self._buffer.rules:
                    self._buffer = replace(self._buffer, rules=(*self._buffer.rules, rule))
                    self._decode = Decoder(self._model, self._buffer)
        return self._buffer.rules.index(rule), rule

    def _make_row(self, ids: np.ndarray, config: DecodingConfig, max_new_tokens: int, stops, seed: int) -> Rows:
        return make_row(
            ids,
            config,
            self._shape,
            rule=self._rule(config),
            origin=self._paradigm.origin_of(len(ids)),
            max_new_tokens=max_new_tokens,
            stop_ids=stops,
            mask_token_id=self._model.config.mask_token_id or 0,
            seed=seed,
            float_type=self._float,
        )

    def _step(self) -> None:
        """Lets in what fits, gives out pages, runs the device once, and takes out what ended."""
        self._settle()
        with self._changing():
            self._admit()
            if not any(self._places):
                assert not self._queue, "a request that was accepted must fit when it is alone"
                return
            # Where no row can decode yet it is one turn, so that the time of reading prompts is known.
            alone = all(self._unread(request) for request in self._places if request is not None)
            read, started = self._counts["prefill_tokens"], time.perf_counter()
            self._state, found = self._decode(self._state, 1 if alone else self._turns)
            self._seen = Seen(found)
            self._counts["calls"] += 1
        self._wait()
        seconds = time.perf_counter() - started
        with self._changing():
            self._drain()
        if alone:
            self._counts["prefill_alone_tokens"] += self._counts["prefill_tokens"] - read
            self._prefill_alone_seconds += seconds

    def _drain(self) -> None:
        for request in [r for r in self._places if r is not None]:
            cached = self._last(request, "cached")
            unread, request.cached = self._unread(request), cached
            self._counts["prefill_tokens"] += unread - self._unread(request)
            self._record_prompt(request)
            if self._last(request, "done"):
                self._finish(request, self._leave(request), None)
            elif request.reader is not None:
                self._stop_at_string(request, request.reader)
        self._give_pages()

    def _wait(self) -> None:
        try:
            self._seen.wait()
        except Exception:
            # The device failed, and what it was to give is no longer there.
            self._settled = False
            raise

    def _unread(self, request: Request) -> int:
        """Positions to read before the request can decode; an autoregressive row reads the last as it decodes."""
        return max(int(request.row.start) - self._buffer.reads_before - request.cached, 0)

    def _admit(self) -> None:
        """First come, first served: a request that does not fit yet is not overtaken."""
        while self._queue and None in self._places:
            request = self._queue[0]
            if not self._lend(request):
                return
            self._queue.popleft()
            request.place, request.admitted = self._places.index(None), next(self._clock)
            self._places[request.place] = request
            table, end = self._table(request)
            row = request.row._replace(page_table=table, pages_end=end, admitted=np.asarray(request.admitted, np.int32))
            self._state = self._state._replace(rows=put_row(self._state.rows, request.place, row))

    def _table(self, request: Request | None) -> tuple[np.ndarray, np.ndarray]:
        """A row's page table, and the positions it covers."""
        pages = [] if request is None else request.pages
        table = np.zeros(self._shape.pages, np.int32)
        table[: len(pages)] = pages
        return table, np.asarray(len(pages) * self._pool.page_size, np.int32)

    def _lend(self, request: Request) -> bool:
        """Pages for what the request has and one block more, with what others recorded of its prefix; or False."""
        row, page_size = request.row, self._pool.page_size
        # An autoregressive row reads the token before its first place as it decodes.
        known = self._paradigm.shared(int(row.start) - self._buffer.reads_before, len(request.prompt))
        prefix = self._pool.match(row.tokens[:known].tolist())
        missing = -(-self._reach(row, int(row.start), int(row.open), 1) // page_size) - len(prefix.pages)
        # Rows that run will want more: half a page each is left to them, or many would soon be preempted; and a whole
        # one, where this one would only stand by.
        running = sum(r is not None for r in self._places)
        spare = running // 2 if running < self._batch_slots else running
        held = [*prefix.pages] + ([] if prefix.partial is None else [prefix.partial])
        self._pool.share(held)
        own = self._pool.allocate(missing, spare)
        if own is None and prefix.partial is not None:
            # The page to copy from may be the one that is missing.
            self._pool.release([prefix.partial])
            prefix = prefix._replace(partial=None, length=prefix.length - prefix.partial_length)
            own = self._pool.allocate(missing, spare)
        if own is None:
            self._pool.release(prefix.pages if prefix.partial is None else held)
            return False
        if prefix.partial is not None:
            self._state = self._state._replace(cache=copy_page(self._state.cache, prefix.partial, own[0]))
            self._pool.release([prefix.partial])
        request.pages, request.recorded = [*prefix.pages, *own], False
        request.forwards_before = int(row.denoising_forwards)
        request.row, request.cached = row._replace(cached=np.asarray(prefix.length, np.int32)), prefix.length
        if not request.admitted:
            self._counts["prompt_tokens"] += len(request.prompt)
            self._counts["prefix_tokens"] += prefix.length
        return True

    def _give_pages(self) -> None:
        """Pages for rows that starve, if need be from the request that came last; and ahead, while some lie idle."""
        running = sorted((r for r in self._places if r is not None), key=lambda r: r.admitted)
        given = 0
        for request in running:
            if request.place is not None and self._last(request, "starved"):
                given += self._give_page(request)
        for request in running:
            if request.place is not None and self._soon_starves(request):
                own = self._pool.allocate(1, len(running))
                request.pages += own or []
                given += own is not None
        if given:
            tables, ends = zip(*map(self._table, self._places), strict=True)
            rows = give_pages(self._state.rows, np.stack(tables), np.stack(ends))
            self._state = self._state._replace(rows=rows)

    def _give_page(self, request: Request) -> bool:
        while (own := self._pool.allocate(1)) is None:
            last = max((r for r in self._places if r is not None), key=lambda r: r.admitted)
            self._preempt(last)
            if last is request:
                return False
        request.pages += own
        return True

    def _soon_starves(self, request: Request) -> bool:
        """Whether the next call may come to positions that no page of the row covers."""
        start, opened = self._last(request, "start"), self._last(request, "open")
        covered = len(request.pages) * self._pool.page_size
        return covered < self._reach(request.row, start, opened, self._turns)

    def _reach(self, row: Rows, start: int, opened: int, blocks: int) -> int:
        """The end of the positions of a row with so many blocks open, once so many more have opened."""
        size = self._shape.block_size
        return start + min(opened + blocks, -(-(int(row.limit) - start) // size)) * size

    def _preempt(self, request: Request) -> None:
        request.row = self._leave(request)
        self._queue.appendleft(request)
        self._counts["preemptions"] += 1

    def _leave(self, request: Request) -> Rows:
        """The request's row, whose place and pages are free from now on."""
        if request.place is None:
            return request.row
        row = self._fetch(request)
        self._record(request, np.asarray(row.tokens), self._sound(request))
        self._pool.release(request.pages)
        if not row.done:
            self._state = self._state._replace(rows=end_row(self._state.rows, request.place))
        self._places[request.place] = None
        request.place, request.pages = None, []
        return row

    def _record_prompt(self, request: Request) -> None:
        """Lets others share the pages of its prompt, once they are known to be sound."""
        if not request.recorded and (sound := self._sound(request)):
            self._record(request, request.prompt, min(sound, len(request.prompt)))
            request.recorded = True

    def _record(self, request: Request, tokens: np.ndarray, length: int) -> None:
        size = self._shape.block_size
        length = self._paradigm.shared(length, len(request.prompt))
        self._pool.record(request.pages, tokens[: length // size * size].tolist())

    def _sound(self, request: Request) -> int:
        """Positions whose keys and values gave finite logits since the request got its row: others may read those.

        None of a row that failed, or that has only read its prompt so far.
        """
        if self._last(request, "failed") or self._last(request, "denoising_forwards") == request.forwards_before:
            return 0
        cached = self._last(request, "cached")
        if self._buffer.reads_before or self._last(request, "open"):
            return cached
        # The forward that wrote the last blocks' keys had no mask to predict, so no logits saw them.
        return max(cached - self._shape.slots * self._shape.block_size, 0)

    def _last(self, request: Request, name: str) -> int:
        """A number of its row as the last call left it."""
        assert request.place is not None
        return self._seen.number(name, request.place)

    def _fetch(self, request: Request) -> Rows:
        """Its row as the last call left it."""
        assert request.place is not None
        self._wait()
        return self._seen.row(request.row, request.place)

    def _reader(self, strings: Sequence[str]) -> TextReader | None:
        return TextReader(self._tokenizer.decode, strings) if strings else None

    def _stop_at_string(self, request: Request, reader: TextReader) -> None:
        reader.read(output(self._fetch(request)))
        if reader.found:
            self._finish(request, self._leave(request), None)

    def _finish(self, request: Request, row: Rows, reason: FinishReason | None) -> None:
        """Makes the completion of a row that left the device."""
        done = ended(request, row, reason, self._tokenizer)
        request.row, request.result = row, done
        self._counts["finished"] += 1
        self._counts["cancelled"] += done.finish_reason == "cancelled"
        self._counts["failed"] += done.finish_reason == "error"
        self._counts["generated_tokens"] += len(done.tokens)
