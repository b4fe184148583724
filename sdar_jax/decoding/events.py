"""What a request's row, on the host, says of its progress: events, and where stop strings end it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sdar_jax.decoding.rows import Rows


class Event(NamedTuple):
    """Progress of a request.

    start: place in the output of the first of `tokens`. tokens: finished ones; with `changes`, everything from `start`
    to the end of the last block that has a token, None where it is masked. logprobs: of `tokens`, as they were
    committed. finished: of `tokens`, those in blocks that `forward` had no part in; the rest are open blocks. forward:
    the denoising forward after which this held.
    """

    start: int
    tokens: list[int | None]
    logprobs: list[float | None]
    finished: int
    forward: int


def ended_by_string(row: Rows, strings: Sequence[str], tokenizer: Any) -> tuple[int, str] | None:
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


def before_stop_string(row: Rows, count: int, strings: Sequence[str], tokenizer: Any) -> int:
    """Of the first `count` tokens, how many come before what may yet turn out to begin a stop string."""
    start = int(row.prompt_length)
    tokens = row.tokens[start : start + count].tolist()
    # A character that is not whole may begin one too.
    text = tokenizer.decode(tokens).rstrip("\ufffd")
    begun = max((n for s in strings for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
    while count and len(tokenizer.decode(tokens[:count])) > len(text) - begun:
        count -= 1
    return count


def finished(row: Rows, first: int, end: int) -> Event:
    """Tokens first to end of the output, all of them final."""
    at = int(row.prompt_length)
    chosen = slice(at + first, at + end)
    return Event(
        first, row.tokens[chosen].tolist(), row.logprob[chosen].tolist(), end - first, int(row.denoising_forwards)
    )


def snapshot(row: Rows, forward: int, block_size: int) -> Event:
    """The output as it was after one denoising forward, to the end of the last block that had a committed token."""
    at, limit = int(row.prompt_length), int(row.limit)
    # A forward may commit nothing but what is past the limit, in the last block.
    whole = slice(at, -(-limit // block_size) * block_size)
    steps = np.where(row.committed[whole], row.step[whole], forward + 1)
    first_open = (at + int((steps >= forward).argmax())) // block_size * block_size
    last = at + int(np.flatnonzero(steps <= forward)[-1]) if (steps <= forward).any() else at - 1
    end = min(-(-(last + 1) // block_size) * block_size, limit)
    known = (steps <= forward)[: end - at].tolist()
    tokens, logprobs = row.tokens[at:end].tolist(), row.logprob[at:end].tolist()
    return Event(
        0,
        [token if here else None for token, here in zip(tokens, known, strict=True)],
        [logprob if here else None for logprob, here in zip(logprobs, known, strict=True)],
        max(first_open - at, 0),
        forward,
    )
