"""`Engine`: requests of any lengths and configs through one batch on the device, fed and drained by the host.

A request waits in a queue until there is a free slot and pages for its prompt. What the page pool has of its prefix is
shared, a page that is shared in part is copied, and the rest is read in chunks beside the decoding of others. The
device takes several steps per call and decides stops itself (`buffer.advance`); between calls the host takes out what
ended, allocates pages, and admits new requests. When pages run out, the request that came last gives up its slot: its
tokens stay, its keys are read again when it comes back, and its result is the same.

Whatever interrupts a call loses nothing: `Recovery`.

Everything moves while a caller waits: in `stream`, `result` and `generate`. Callers may be threads: every public method
holds the engine's lock while it looks at or changes anything, and for one call of the device at a time.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from sdar_jax.decoding.block_forward import BufferConfig, forward_widths
from sdar_jax.decoding.commit_rules import CommitFunction, StrategyName
from sdar_jax.decoding.config import Completion, DecodingConfig
from sdar_jax.decoding.decode_state import SequenceShape
from sdar_jax.decoding.engine.core import EngineCore
from sdar_jax.decoding.engine.input_processor import InputProcessor, float_type_of, own_config
from sdar_jax.decoding.engine.model_runner import ModelRunner
from sdar_jax.decoding.engine.request import Request
from sdar_jax.decoding.engine.scheduler import Scheduler
from sdar_jax.decoding.engine.sizes import EngineSizes, engine_sizes, room_for_pages
from sdar_jax.decoding.engine.statistics import Stats
from sdar_jax.decoding.events import Event, EventReader
from sdar_jax.decoding.locks import FairLock
from sdar_jax.decoding.page_pool import PagePool
from sdar_jax.decoding.prompt_logprobs import prompt_logprobs
from sdar_jax.decoding.prompts import Prompt, check_seed, check_slots
from sdar_jax.decoding.text import unknown_ids
from sdar_jax.errors import DecodingError, is_int
from sdar_jax.model import Model, unstack_layers

# Stop tokens, and tokens to suppress, that a request may have: in the shape of the batch.
_STOPS, _SUPPRESSED = 8, 32


class Engine:
    """Serves requests of one model by continuous batching over paged keys and values.

    Args:
        model: a diffusion model, or an autoregressive one, which then serves strategy "autoregressive" alone.
        tokenizer: for prompts and completions as text, and for stop strings; ids that it does not have are never
            proposed.
        batch_slots: requests decoded at once; half as many more may be prefilled and wait for a decode slot.
        max_length: the most tokens of prompt and output together; None is what `pages` hold, or 4096 where these are
            not given either, and never more than the model's context.
        pages: of the cache; None is what `batch_slots` requests of `max_length` need, or as many as an accelerator has
            memory for beside the weights.
        page_size: positions of a page, a multiple of the block size; None is 64, or the next whole blocks.
        block_size: S; None is the model's own.
        window_slots: K, blocks of a request that a forward may read: 2 fuses a block's last write with the next's
            start.
        max_queue: requests that may wait.
        prefill_tokens: of a prompt, the most that a forward reads beside the decoding of others.
        steps_per_call: forwards of one call of the device, at most.
        top_logprobs: the most of these that a request may ask for: room that every position has.
        strategies: what requests will ask for besides the model's own. One that is not listed is served as well, from
            the first request that asks for it, and then all is compiled anew.

    Raises:
        ConfigError, DecodingError: sizes that cannot be served, or that there is no memory for.
    """

    def __init__(
        self,
        model: Model,
        *,
        tokenizer: Any = None,
        batch_slots: int = 8,
        max_length: int | None = None,
        pages: int | None = None,
        page_size: int | None = None,
        block_size: int | None = None,
        window_slots: int = 2,
        max_queue: int = 1024,
        prefill_tokens: int = 256,
        steps_per_call: int = 8,
        top_logprobs: int = 0,
        strategies: Sequence[StrategyName | CommitFunction] = (),
    ):
        own = own_config(model.config, block_size)
        size = own.resolve_block_size(model.config)
        served = [own, *(DecodingConfig(block_size, strategy) for strategy in strategies)]
        _check_positive(
            batch_slots=batch_slots,
            max_queue=max_queue,
            steps_per_call=steps_per_call,
            prefill_tokens=prefill_tokens,
            max_length=1 if max_length is None else max_length,
        )
        _check_top_logprobs(top_logprobs, model.config.vocab_size)
        check_slots(window_slots)
        model = unstack_layers(model)
        sizes = engine_sizes(
            room_for_pages(model),
            context=model.config.max_position_embeddings,
            batch_slots=batch_slots,
            block_size=size,
            max_length=max_length,
            pages=pages,
            page_size=page_size,
        )
        pool = PagePool(sizes.pages, sizes.page_size, size)
        paradigm = replace(own, block_size=size).paradigm(model.config)
        config = BufferConfig(
            block_size=size,
            paradigm=paradigm,
            rules=tuple(dict.fromkeys(each.strategy_for(model.config).rule for each in served)),
            prefill_sequences=1,
            prefill_tokens=-(-prefill_tokens // size) * size,
            widths=forward_widths(model),
            sequences_at_once=batch_slots,
        )
        shape = _sequence_shape(sizes, size, paradigm.slots(window_slots), top_logprobs)
        slots = batch_slots + -(-batch_slots // 2)
        self._tokenizer = tokenizer
        self._max_queue = max_queue
        self._sizes = sizes
        self._inputs = InputProcessor(
            model.config, tokenizer, config, shape, sizes, float_type_of(model.embedding.dtype)
        )
        scheduler = Scheduler(pool, slots, config, shape, steps_per_call)
        runner = ModelRunner(
            model,
            config,
            idle=self._inputs.idle(),
            slots=slots,
            pages=(sizes.pages, sizes.page_size),
            banned=unknown_ids(tokenizer, model.config.vocab_size),
        )
        self._block_size = size
        self._lock = FairLock()
        self._core = EngineCore(self._inputs, scheduler, runner, tokenizer, steps_per_call)
        for each in served:
            self._inputs.check_config(each)

    @property
    def max_length(self) -> int:
        """The most tokens of prompt and output together that a request may have."""
        return self._sizes.max_length

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
        request = self._accept(
            prompt,
            config,
            max_new_tokens=max_new_tokens,
            stop_token_ids=stop_token_ids,
            stop_strings=stop_strings,
            seed=seed,
        )
        with self._lock:
            self._core.recover()
            if (count := self._core.queued) >= self._max_queue:
                raise DecodingError(
                    f"the queue holds {count} requests, its max_queue; take a result first"
                )
            return self._core.enqueue(request)

    def _accept(self, prompt: Prompt, config: DecodingConfig, **options) -> Request:
        """A request that this engine can serve, or the error that says why not; it is not in the queue yet."""
        request = self._inputs.request(prompt, config, **options)
        if config.prompt_logprobs:
            request.prompt_logprobs = prompt_logprobs(self._core.model, request.prompt)
        return request

    def result(self, request_id: int) -> Completion:
        """The completion, once there is one; runs the engine until then. An id gives its result once."""
        while True:
            with self._lock:
                request = self._core.known(request_id)
                if request.result is not None:
                    del self._core.requests[request_id]
                    return request.result
                self._core.step()

    def cancel(self, request_id: int) -> Completion:
        """Ends a request with what it has, finish_reason "cancelled"; one that had ended gives its own completion."""
        with self._lock:
            request = self._core.known(request_id)
            if request.result is None:
                self._core.end_early(request)
            assert request.result is not None
            del self._core.requests[request_id]
            return request.result

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
                request = self._accept(
                    prompt, config, max_new_tokens=max_new_tokens, seed=seed + index, **options
                )
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
                self._core.recover()
                if self._core.queued < self._max_queue:
                    return self._core.enqueue(request)
                self._core.step()

    def stream(self, request_id: int, *, changes: bool = False) -> Iterator[Event]:
        """Finished blocks as they come, or every change of the open ones; then take `result`.

        Changes do not depend on how many steps the device takes per call; an event may hold several finished blocks.
        With the engine's tokenizer, what may become part of a stop string, or of a character that is not complete, is
        held back until that is decided; a stop string itself is never given.
        """
        with self._lock:
            request = self._core.known(request_id)
        return self._events(request, changes)

    def _events(self, request: Request, changes: bool) -> Iterator[Event]:
        decode = None if self._tokenizer is None else self._tokenizer.decode
        reader = EventReader(request.stop_strings, decode, self._block_size, changes)
        while True:
            with self._lock:
                self._core.recover()
                result = request.result
                self._core.refresh(request)
                events = reader.events(request.sequence, result)
            # Not under the lock: a stream may be left here, or wait for its caller.
            yield from events
            if result is not None:
                return
            with self._lock:
                if request.result is None:
                    self._core.step()

    def update_weights(self, model: Model) -> None:
        """Serves another model of the same shapes from now on, such as the next one of a training run.

        Cached prefixes of the old weights are dropped, and nothing is compiled anew. Every completion comes from one
        model: this is refused while a request has not ended. Results that were not taken yet stay.

        Args:
            model: of the same config, with weights of the same names, shapes and dtypes; they are moved to the devices
                of the engine's if they are on others.

        Raises:
            DecodingError: a request has not ended, or the model differs; the engine is then as it was.
        """
        with self._lock:
            self._core.update_weights(model)

    def warm_up(self, config: DecodingConfig = DecodingConfig()) -> None:  # noqa: B008 (frozen)
        """Compiles what requests of this config will run; without it, the first of them wait for that.

        Two requests are decoded: from one page into the next, the second with a page that is shared in part and copied.
        """
        token = 1 if self._core.model.config.mask_token_id == 0 else 0
        prompt = [token] * max(1, min(self._sizes.page_size - 1, self.max_length - 2))
        config = replace(config, min_new_tokens=0)
        new = min(2, self.max_length - len(prompt))
        for _ in range(2):
            self.generate([prompt], config, max_new_tokens=new, stop_token_ids=())

    def stats(self) -> Stats:
        """What waits, runs and is free now, and what was counted since the engine was made."""
        with self._lock:
            return self._core.stats()


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if not is_int(value) or value < 1:
            raise DecodingError(f"{name} is {value!r}; give a positive integer")


def _check_top_logprobs(top_logprobs: int, vocab_size: int) -> None:
    if not is_int(top_logprobs) or not 0 <= top_logprobs <= vocab_size:
        raise DecodingError(
            f"top_logprobs is {top_logprobs!r}; give an integer of 0 to {vocab_size}"
        )


def _sequence_shape(
    sizes: EngineSizes, block_size: int, slots: int, top_logprobs: int
) -> SequenceShape:
    # One block more than is asked for may be open.
    pages = -(-(sizes.max_length + block_size) // sizes.page_size)
    return SequenceShape(
        length=pages * sizes.page_size,
        stops=_STOPS,
        pages=pages,
        block_size=block_size,
        slots=slots,
        suppressed=_SUPPRESSED,
        alternatives=top_logprobs,
    )
