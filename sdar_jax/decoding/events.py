"""What a request's row, on the host, says of its progress, and what a stream tells of it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sdar_jax.decoding.config import Completion
from sdar_jax.decoding.rows import Rows, output, top_logprobs
from sdar_jax.decoding.text import Decode, TextReader, tokens_within, whole_characters


class Event(NamedTuple):
    """Progress of a request.

    start: place in the output of the first of `tokens`. tokens: finished ones; with `changes`, everything from `start`
    to the end of the last block that has a token, None where it is masked or held back. logprobs: of `tokens`, as they
    were committed. finished: of `tokens`, those in blocks that `forward` had no part in; the rest are open blocks.
    forward: the denoising forward after which this held. top_logprobs: of `tokens`, the likeliest where each was
    committed, if they were asked for.
    """

    start: int
    tokens: list[int | None]
    logprobs: list[float | None]
    finished: int
    forward: int
    top_logprobs: Sequence[list[tuple[int, float]] | None] | None = None


def finished(row: Rows, first: int, end: int) -> Event:
    """Tokens first to end of the output, all of them final."""
    at = int(row.prompt_length)
    chosen = slice(at + first, at + end)
    tokens, logprobs = row.tokens[chosen].tolist(), row.logprob[chosen].tolist()
    return Event(first, tokens, logprobs, end - first, int(row.denoising_forwards), top_logprobs(row, chosen))


def snapshot(row: Rows, forward: int, block_size: int) -> Event:
    """The output as it was after one denoising forward, to the end of the last block that had a committed token."""
    at, limit = int(row.prompt_length), int(row.limit)
    origin = int(row.origin)
    block_end = lambda position: origin + -(-(position - origin) // block_size) * block_size
    # A forward may commit nothing but what is past the limit, in the last block.
    whole = slice(at, block_end(limit))
    steps = np.where(row.committed[whole], row.step[whole], forward + 1)
    first_open = block_end(at + int((steps >= forward).argmax()) + 1) - block_size
    last = at + int(np.flatnonzero(steps <= forward)[-1]) if (steps <= forward).any() else at - 1
    end = min(block_end(last + 1), limit)
    known = (steps <= forward)[: end - at].tolist()
    there = lambda values: [value if here else None for value, here in zip(values, known, strict=True)]
    others = top_logprobs(row, slice(at, end))
    return Event(
        0,
        there(row.tokens[at:end].tolist()),
        there(row.logprob[at:end].tolist()),
        max(first_open - at, 0),
        forward,
        None if others is None else there(others),
    )


class Progress:
    """What a stream has told of its request, and what it is to tell next.

    With a tokenizer (`decode`), tokens are held back that may become part of a stop string or of a character that is
    not complete, and those that are part of a stop string are never told.
    """

    def __init__(self, strings: Sequence[str], decode: Decode | None, block_size: int, changes: bool):
        self._reader = None if decode is None else TextReader(decode, strings)
        self._strings, self._decode, self._block_size, self._changes = strings, decode, block_size, changes
        self._told, self._forward = 0, 0

    def events(self, row: Rows, result: Completion | None) -> list[Event]:
        """What is new in a row; with its result, the rest."""
        return self._changed(row) if self._changes else self._finished(row, result)

    def _finished(self, row: Rows, result: Completion | None) -> list[Event]:
        first, count = self._told, self._sure(row, result)
        if count <= first:
            return []
        self._told = count
        return [finished(row, first, count)]

    def _sure(self, row: Rows, result: Completion | None) -> int:
        """Tokens that may be told."""
        if result is not None:
            return _shown(result, self._decode)
        count = min(int(row.start), int(row.limit)) - int(row.prompt_length)
        if self._reader is None:
            return count
        self._reader.read(output(row)[: max(count, 0)])
        return self._reader.shown

    def _changed(self, row: Rows) -> list[Event]:
        events = []
        while self._forward < int(row.denoising_forwards) and not (self._reader and self._reader.found):
            event = snapshot(row, self._forward, self._block_size)
            # A character that is not complete is for who shows it: without stop strings, all is told as it stands.
            events.append(_held_back(event, self._reader) if self._reader and self._strings else event)
            self._forward += 1
        return events


def _shown(result: Completion, decode: Decode | None) -> int:
    """Of a result's tokens, those before its stop string, and before a character that it ends inside of."""
    if decode is None:
        return len(result.tokens)
    if isinstance(result.stop_reason, str) and result.text is not None:
        return tokens_within(result.tokens, len(result.text), decode)
    return whole_characters(result.tokens, decode)


def _held_back(event: Event, reader: TextReader) -> Event:
    """A snapshot without what may be part of a stop string or of a character; nothing of what comes after a stop."""
    there = event.tokens.index(None) if None in event.tokens else len(event.tokens)
    reader.read([token for token in event.tokens[:there] if token is not None])
    length = reader.shown if reader.found else len(event.tokens)
    hidden = {i for i, token in enumerate(event.tokens) if i >= there and token is not None and reader.may_stop(token)}
    hidden |= {*range(reader.shown, there)}
    show = lambda values: [None if i in hidden else value for i, value in enumerate(values[:length])]
    return event._replace(
        tokens=show(event.tokens),
        logprobs=show(event.logprobs),
        finished=min(event.finished, reader.shown),
        top_logprobs=None if event.top_logprobs is None else show(event.top_logprobs),
    )
