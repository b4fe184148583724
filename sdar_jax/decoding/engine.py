"""`Engine`: requests of any lengths and configs through one batch on the device, fed and drained by the host.

A request waits in a queue until there is a free row and pages for its prompt. What the page pool has of its prefix is
shared, a page that is shared in part is copied, and the rest is read in chunks beside the decoding of other rows. The
device runs several turns a call and decides stops itself (`buffer.advance`); between calls the host takes out what
ended, hands out pages, and lets new requests in. When pages run out, the request that came last gives up its row: its
tokens stay, its keys are read again when it comes back, and its result is the same.

Everything moves while a caller waits: in `stream`, `result` and `generate`.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from sdar_jax.decoding.buffer import State, decode
from sdar_jax.decoding.config import Completion, DecodingConfig
from sdar_jax.decoding.forward import BufferConfig
from sdar_jax.decoding.generate import Prompt, check_prompts, check_seed, check_slots, checked_stops, completion, to_ids
from sdar_jax.decoding.pages import PagePool
from sdar_jax.decoding.rows import Rows, RowShape, make_row
from sdar_jax.errors import DecodingError, is_int
from sdar_jax.model import LayerPages, Model, empty_pages, unstack_layers

_Index = int | Int[Array, ""]

_STOPS = 8  # Stop tokens a request may have, in the shape of the batch.


class Event(NamedTuple):
    """Progress of a request.

    start: place in the output of the first of `tokens`. tokens: finished ones; with `changes`, everything from `start`
    to the end of the last open block, None where it is masked. forward: the denoising forward after which this held.
    """

    start: int
    tokens: list[int | None]
    forward: int


class Stats(NamedTuple):
    """Now: queued and running requests, free or evictable pages. Since the start: the rest.

    turns: forwards of the batch. prefix_tokens: prompt positions that another request's pages served.
    """

    queued: int
    running: int
    pages_available: int
    finished: int
    preemptions: int
    evictions: int
    calls: int
    prompt_tokens: int
    prefix_tokens: int
    generated_tokens: int


class _Flags(NamedTuple):
    """What the host reads after each call, [B] each."""

    done: Any
    starved: Any
    cached: Any
    start: Any
    open: Any


@dataclass
class _Request:
    """row: its state while it has no place on the device. pages: lent to it, in order. admitted: when it got a row."""

    id: int
    row: Rows
    prompt: np.ndarray
    stop_strings: tuple[str, ...]
    place: int | None = None
    pages: list[int] = field(default_factory=list)
    admitted: int = 0
    recorded: int = 0
    result: Completion | None = None


class Engine:
    """Continuous batching over paged keys and values.

    Args:
        model: a diffusion model, or an autoregressive one, which then serves strategy "autoregressive" alone.
        tokenizer: for prompts and completions as text, and for stop strings.
        batch_slots: rows decoded at once.
        pages, page_size: of the cache; page_size is a multiple of the block size.
        block_size: S; None is the model's own.
        window_slots: K, blocks of a row that a forward may read: 2 fuses a block's last write with the next's start.
        max_length: the most tokens of prompt and output together; by default what the pages or the model can hold.
        max_queue: requests that may wait.
        prefill_tokens: of a prompt, the most that a forward reads beside the decoding of others.
        turns: forwards a call of the device, at most.

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
    ):
        config = model.config
        self._autoregressive = config.objective == "autoregressive"
        kind = "autoregressive" if self._autoregressive else "low_confidence_dynamic"
        size = DecodingConfig(block_size, kind).resolve_block_size(config)
        for name, value in (("batch_slots", batch_slots), ("max_queue", max_queue), ("turns", turns)):
            if not is_int(value) or value < 1:
                raise DecodingError(f"{name} is {value!r}; give a positive integer")
        check_slots(window_slots)
        self._pool = PagePool(pages, page_size, size)
        most = min(pages * page_size, config.max_position_embeddings)
        self._max_length = most if max_length is None else min(max_length, most)
        # One block more than is asked for may be open.
        table = -(-(self._max_length + size) // page_size)
        slots = 1 if self._autoregressive else window_slots
        self._shape = RowShape(table * page_size, _STOPS, table, size, slots)
        self._model, self._tokenizer = unstack_layers(model), tokenizer
        self._max_queue, self._turns = max_queue, turns
        self._buffer = BufferConfig(
            block_size=size,
            reads="next_token" if self._autoregressive else "blocks",
            prefill_rows=1,
            prefill_tokens=-(-prefill_tokens // size) * size,
        )
        self._float = np.dtype(jnp.promote_types(model.embedding.dtype, jnp.float32))
        idle = self._make_row(np.zeros(0, np.int32), DecodingConfig(), 0, (), 0)
        batch = jax.tree.map(lambda x: jnp.asarray(np.stack([x] * batch_slots)), idle)
        self._state = State(batch, empty_pages(config, pages, page_size, model.embedding.dtype))
        self._places: list[_Request | None] = [None] * batch_slots
        self._queue: deque[_Request] = deque()
        self._requests: dict[int, _Request] = {}
        self._ids, self._clock = itertools.count(), itertools.count(1)
        self._counts = dict.fromkeys(
            ("finished", "preemptions", "calls", "prompt_tokens", "prefix_tokens", "generated_tokens"), 0
        )

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
        if len(self._queue) >= self._max_queue:
            raise DecodingError(f"the queue holds {len(self._queue)} requests, its max_queue; take results, or wait")
        model = self._model.config
        self._check_config(config)
        ids = to_ids(prompt, 0, self._tokenizer)
        check_prompts([ids], [config], model, max_new_tokens)
        check_seed(seed, 1)
        if len(ids) + max_new_tokens > self._max_length:
            total = f"the prompt has {len(ids)} tokens and max_new_tokens is {max_new_tokens}"
            raise DecodingError(f"{total}; this engine holds {self._max_length} a request: give it more pages, or less")
        stops = model.stop_token_ids if stop_token_ids is None else checked_stops(stop_token_ids, model)
        if len(stops) > _STOPS:
            raise DecodingError(f"{len(stops)} stop tokens are given; use at most {_STOPS}")
        if stop_strings and self._tokenizer is None:
            raise DecodingError("stop_strings need the engine's tokenizer; give Engine(tokenizer=...)")
        if isinstance(stop_strings, str) or not all(isinstance(s, str) and s for s in stop_strings):
            raise DecodingError(f"stop_strings is {stop_strings!r}; give a list of texts, none of them empty")
        row = self._make_row(ids, config, max_new_tokens, stops, seed)
        request = _Request(next(self._ids), row, ids, tuple(stop_strings))
        self._requests[request.id] = request
        if max_new_tokens == 0:
            self._finish(request, row, None)
        else:
            self._queue.append(request)
        return request.id

    def result(self, request_id: int) -> Completion:
        """The completion, once there is one; runs the engine until then. An id gives its result once."""
        request = self._known(request_id)
        while request.result is None:
            self._step()
        del self._requests[request_id]
        return request.result

    def cancel(self, request_id: int) -> Completion:
        """Ends a request with what it has, finish_reason "cancelled"; one that had ended gives its own completion."""
        request = self._known(request_id)
        if request.result is None:
            if request.place is None:
                self._queue.remove(request)
            self._finish(request, self._leave(request), "cancelled")
        return self.result(request_id)

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
        for index, prompt in enumerate(prompts):
            while len(self._queue) >= self._max_queue:
                self._step()
            ids.append(self.submit(prompt, config, max_new_tokens=max_new_tokens, seed=seed + index, **options))
        return [self.result(request_id) for request_id in ids]

    def stream(self, request_id: int, *, changes: bool = False) -> Iterator[Event]:
        """Finished blocks as they come, or every change of the open ones; then take `result`.

        Changes do not depend on how many turns the device runs a call; an event may hold several finished blocks.
        """
        request = self._known(request_id)
        told, forward = 0, 0
        while True:
            ended = request.result
            row = request.row if request.place is None else self._fetch(request.place)
            end = int(row.end) if ended is not None else int(row.start) + int(row.open) * self._shape.block_size
            if changes:
                for now in range(forward, int(row.denoising_forwards)):
                    yield _snapshot(row, now)
                forward = int(row.denoising_forwards)
            elif ended is not None:
                tokens = ended.tokens[told:]
                if tokens:
                    yield Event(told, list(tokens), int(row.denoising_forwards))
            else:
                done = max(min(int(row.start), int(row.limit), end) - int(row.prompt_length), told)
                if done > told and not request.stop_strings:
                    at = int(row.prompt_length)
                    yield Event(told, row.tokens[at + told : at + done].tolist(), int(row.denoising_forwards))
                    told = done
            if ended is not None:
                return
            self._step()

    def stats(self) -> Stats:
        running = sum(request is not None for request in self._places)
        now = {"queued": len(self._queue), "running": running, "pages_available": self._pool.available}
        return Stats(**now, evictions=self._pool.evictions, **self._counts)

    def _known(self, request_id: int) -> _Request:
        if request_id not in self._requests:
            raise DecodingError(f"request {request_id!r} is unknown, or its result was taken; use an id from submit")
        return self._requests[request_id]

    def _check_config(self, config: DecodingConfig) -> None:
        size = self._shape.block_size
        if config.strategy == "semi_autoregressive":
            raise DecodingError("strategy 'semi_autoregressive' has no cache to share; use sdar_jax.generate")
        if (config.strategy == "autoregressive") != self._autoregressive:
            kind = "an autoregressive" if self._autoregressive else "a diffusion"
            raise DecodingError(f"strategy {config.strategy!r} is not for {kind} model's engine; choose another")
        if config.block_size not in (None, size):
            raise DecodingError(f"block_size is {config.block_size}, the engine's {size}; leave it None")
        replace(config, block_size=size).resolve_block_size(self._model.config)

    def _make_row(self, ids: np.ndarray, config: DecodingConfig, max_new_tokens: int, stops, seed: int) -> Rows:
        size = self._shape.block_size
        return make_row(
            ids,
            config,
            self._shape,
            first_block=len(ids) // size * size,
            max_new_tokens=max_new_tokens,
            stop_ids=stops,
            mask_token_id=self._model.config.mask_token_id or 0,
            seed=seed,
            float_type=self._float,
        )

    def _step(self) -> None:
        """Lets in what fits, gives out pages, runs the device once, and takes out what ended."""
        self._admit()
        if not any(self._places):
            assert not self._queue, "a request that was accepted must fit when it is alone"
            return
        self._state = decode(self._model, self._state, self._turns, self._buffer)
        self._counts["calls"] += 1
        flags = jax.device_get(_flags(self._state.rows))
        for request in [r for r in self._places if r is not None]:
            place = request.place
            cached = int(flags.cached[place])
            if cached > request.recorded:
                self._record(request, cached)
            if flags.done[place]:
                self._finish(request, self._leave(request), None)
            elif request.stop_strings:
                self._stop_at_string(request)
        starved = [r for r in self._places if r is not None and flags.starved[r.place]]
        for request in sorted(starved, key=lambda r: r.admitted):
            if request.place is not None:
                self._give_pages(request, flags)

    def _admit(self) -> None:
        """First come, first served: a request that does not fit yet is not overtaken."""
        while self._queue and None in self._places:
            request = self._queue[0]
            if not self._lend(request):
                return
            self._queue.popleft()
            request.place, request.admitted = self._places.index(None), next(self._clock)
            self._places[request.place] = request
            table = np.zeros(self._shape.pages, np.int32)
            table[: len(request.pages)] = request.pages
            end = np.asarray(len(request.pages) * self._pool.page_size, np.int32)
            row = request.row._replace(page_table=table, pages_end=end)
            self._state = self._state._replace(rows=_place(self._state.rows, request.place, row))

    def _lend(self, request: _Request) -> bool:
        """Pages for what the request has and one block more, with what others recorded of its prefix; or False."""
        row, size, page_size = request.row, self._shape.block_size, self._pool.page_size
        # An autoregressive row reads the token before its first place as it decodes.
        prefix = self._pool.match(row.tokens[: int(row.start) - self._autoregressive].tolist())
        needs = min(int(row.start) + (int(row.open) + 1) * size, -(-int(row.limit) // size) * size)
        missing = -(-needs // page_size) - len(prefix.pages)
        held = [*prefix.pages] + ([] if prefix.partial is None else [prefix.partial])
        self._pool.share(held)
        own = self._pool.allocate(missing)
        if own is None and prefix.partial is not None:
            # The page to copy from may be the one that is missing.
            self._pool.release([prefix.partial])
            prefix = prefix._replace(partial=None, length=prefix.length - prefix.partial_length)
            own = self._pool.allocate(missing)
        if own is None:
            self._pool.release(prefix.pages if prefix.partial is None else held)
            return False
        if prefix.partial is not None:
            self._state = self._state._replace(cache=_copy_page(self._state.cache, prefix.partial, own[0]))
            self._pool.release([prefix.partial])
        request.pages, request.recorded = [*prefix.pages, *own], 0
        request.row = row._replace(cached=np.asarray(prefix.length, np.int32))
        if not row.denoising_forwards:
            self._counts["prompt_tokens"] += len(request.prompt)
            self._counts["prefix_tokens"] += prefix.length
        return True

    def _give_pages(self, request: _Request, flags: _Flags) -> None:
        """One page more, taken if need be from the request that came last."""
        while (own := self._pool.allocate(1)) is None:
            last = max((r for r in self._places if r is not None), key=lambda r: r.admitted)
            self._preempt(last)
            if last is request:
                return
        request.pages += own
        self._state = self._state._replace(
            rows=_give_page(
                self._state.rows,
                request.place,
                len(request.pages) - 1,
                own[0],
                len(request.pages) * self._pool.page_size,
            )
        )

    def _preempt(self, request: _Request) -> None:
        row = self._leave(request)
        request.row = row._replace(starved=np.asarray(False))
        self._queue.appendleft(request)
        self._counts["preemptions"] += 1

    def _leave(self, request: _Request) -> Rows:
        """The request's row, whose place and pages are free from now on."""
        if request.place is None:
            return request.row
        row = self._fetch(request.place)
        self._record(request, int(row.cached), np.asarray(row.tokens))
        self._pool.release(request.pages)
        self._state = self._state._replace(rows=_end(self._state.rows, request.place))
        self._places[request.place] = None
        request.place, request.pages = None, []
        return row

    def _record(self, request: _Request, cached: int, tokens: np.ndarray | None = None) -> None:
        """What the pages hold for good: prompt as it is read, the rest when the request leaves its row."""
        if tokens is None:
            tokens, cached = request.prompt, min(cached, len(request.prompt))
        whole = cached // self._shape.block_size * self._shape.block_size
        self._pool.record(request.pages, tokens[:whole].tolist())
        request.recorded = max(request.recorded, whole)

    def _fetch(self, place: int) -> Rows:
        return jax.device_get(_row(self._state.rows, place))

    def _stop_at_string(self, request: _Request) -> None:
        assert request.place is not None
        row = self._fetch(request.place)
        if _ended_by_string(row, request.stop_strings, self._tokenizer) is not None:
            self._finish(request, self._leave(request), None)

    def _finish(self, request: _Request, row: Rows, reason: str | None) -> None:
        """Makes the completion of a row that left the device."""
        done = completion(row, self._tokenizer)
        if reason is not None:
            done = completion(row._replace(failed=np.asarray(True)), self._tokenizer)._replace(finish_reason=reason)
        if request.stop_strings and (cut := _ended_by_string(row, request.stop_strings, self._tokenizer)) is not None:
            count, text = cut
            done = done._replace(
                tokens=done.tokens[:count],
                logprobs=done.logprobs[:count],
                steps=done.steps[:count],
                text=text,
                finish_reason="stop",
            )
        request.row, request.result = row, done
        self._counts["finished"] += 1
        self._counts["generated_tokens"] += len(done.tokens)


def _ended_by_string(row: Rows, strings: Sequence[str], tokenizer: Any) -> tuple[int, str] | None:
    """How many tokens the output has up to the one that completes a stop string, and the text before it."""
    start = int(row.prompt_length)
    whole = row.committed[start : int(row.end)]
    tokens = row.tokens[start : start + (len(whole) if whole.all() else int(whole.argmin()))].tolist()
    if not any(s in tokenizer.decode(tokens) for s in strings):
        return None
    for count in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:count])
        found = [text.index(s) for s in strings if s in text]
        if found:
            return count, text[: min(found)]
    return None


def _snapshot(row: Rows, forward: int) -> Event:
    """The output as it was after one denoising forward: everything up to the last position that had been committed."""
    start, limit = int(row.prompt_length), int(row.limit)
    steps, committed = row.step[start:limit], row.committed[start:limit]
    held = committed & (steps <= forward)
    last = int(np.flatnonzero(held)[-1]) + 1 if held.any() else 0
    tokens = [
        int(token) if known else None for token, known in zip(row.tokens[start : start + last], held, strict=False)
    ]
    return Event(0, tokens, forward)


@jax.jit
def _flags(rows: Rows) -> _Flags:
    return _Flags(*(getattr(rows, name) for name in _Flags._fields))


@jax.jit
def _row(rows: Rows, place: _Index) -> Rows:
    return jax.tree.map(lambda x: x[place], rows)


@partial(jax.jit, donate_argnums=0)
def _place(rows: Rows, place: _Index, row: Rows) -> Rows:
    return jax.tree.map(lambda x, new: x.at[place].set(new), rows, row)


@partial(jax.jit, donate_argnums=0)
def _give_page(rows: Rows, place: _Index, index: _Index, page: _Index, end: _Index) -> Rows:
    table = rows.page_table.at[place, index].set(page)
    ends = rows.pages_end.at[place].set(end)
    return rows._replace(page_table=table, pages_end=ends, starved=rows.starved.at[place].set(False))


@partial(jax.jit, donate_argnums=0)
def _end(rows: Rows, place: _Index) -> Rows:
    return rows._replace(done=rows.done.at[place].set(True), open=rows.open.at[place].set(0))


@partial(jax.jit, donate_argnums=0)
def _copy_page(cache: list[LayerPages], source: _Index, target: _Index) -> list[LayerPages]:
    return jax.tree.map(lambda pages: pages.at[target].set(pages[source]), cache)
