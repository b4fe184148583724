"""What a stream gives of its request as it is decoded: events, from its state on the host."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sdar_jax.decoding.config import Completion
from sdar_jax.decoding.decode_state import SequenceState, generated, top_logprobs
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


def finished(sequence: SequenceState, first: int, end: int) -> Event:
    """Tokens first to end of the output, all of them final."""
    at = int(sequence.inputs.prompt_length)
    chosen = slice(at + first, at + end)
    return Event(
        start=first,
        tokens=sequence.output.tokens[chosen].tolist(),
        logprobs=sequence.output.logprob[chosen].tolist(),
        finished=end - first,
        forward=int(sequence.progress.denoising_forwards),
        top_logprobs=top_logprobs(sequence, chosen),
    )


def snapshot(sequence: SequenceState, forward: int, block_size: int) -> Event:
    """The output as it was after one denoising forward, to the end of the last block that had a committed token."""
    inputs, _, output = sequence
    at, limit, origin = int(inputs.prompt_length), int(inputs.limit), int(inputs.origin)

    def block_end(position: int) -> int:
        return origin + -(-(position - origin) // block_size) * block_size

    # A forward may commit nothing but what is past the limit, in the last block.
    blocks = slice(at, block_end(limit))
    steps = np.where(output.committed[blocks], output.step[blocks], forward + 1)
    first_open = block_end(at + int((steps >= forward).argmax()) + 1) - block_size
    last = at + int(np.flatnonzero(steps <= forward)[-1]) if (steps <= forward).any() else at - 1
    end = min(block_end(last + 1), limit)
    known = (steps <= forward)[: end - at].tolist()
    there = lambda values: [
        value if here else None for value, here in zip(values, known, strict=True)
    ]
    others = top_logprobs(sequence, slice(at, end))
    return Event(
        start=0,
        tokens=there(output.tokens[at:end].tolist()),
        logprobs=there(output.logprob[at:end].tolist()),
        finished=max(first_open - at, 0),
        forward=forward,
        top_logprobs=None if others is None else there(others),
    )


class EventReader:
    """What a stream has given of its request, and what it gives next.

    With a tokenizer (`decode`), tokens are held back that may become part of a stop string or of a character that is
    not complete, and those that are part of a stop string are never given.
    """

    def __init__(
        self, strings: Sequence[str], decode: Decode | None, block_size: int, changes: bool
    ):
        self._reader = None if decode is None else TextReader(decode, strings)
        self._strings = strings
        self._decode = decode
        self._block_size = block_size
        self._changes = changes
        self._given = 0
        self._forward = 0

    def events(self, sequence: SequenceState, result: Completion | None) -> list[Event]:
        """What is new in a sequence; with its result, the rest."""
        return self._changed(sequence) if self._changes else self._finished(sequence, result)

    def _finished(self, sequence: SequenceState, result: Completion | None) -> list[Event]:
        first = self._given
        count = self._certain(sequence, result)
        if count <= first:
            return []
        self._given = count
        return [finished(sequence, first, count)]

    def _certain(self, sequence: SequenceState, result: Completion | None) -> int:
        """How many tokens may be given."""
        if result is not None:
            return _shown(result, self._decode)
        end = min(int(sequence.progress.start), int(sequence.inputs.limit))
        count = end - int(sequence.inputs.prompt_length)
        if self._reader is None:
            return count
        self._reader.read(generated(sequence)[: max(count, 0)])
        return self._reader.shown

    def _changed(self, sequence: SequenceState) -> list[Event]:
        events = []
        forwards = int(sequence.progress.denoising_forwards)
        while self._forward < forwards and not (self._reader and self._reader.found):
            event = snapshot(sequence, self._forward, self._block_size)
            # A character that is not complete is for who shows it: without stop strings, all is given as it stands.
            events.append(
                _held_back(event, self._reader) if self._reader and self._strings else event
            )
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
    hidden = {
        i
        for i, token in enumerate(event.tokens)
        if i >= there and token is not None and reader.may_stop(token)
    }
    hidden |= {*range(reader.shown, there)}
    show = lambda values: [
        None if i in hidden else value for i, value in enumerate(values[:length])
    ]
    return event._replace(
        tokens=show(event.tokens),
        logprobs=show(event.logprobs),
        finished=min(event.finished, reader.shown),
        top_logprobs=None if event.top_logprobs is None else show(event.top_logprobs),
    )
