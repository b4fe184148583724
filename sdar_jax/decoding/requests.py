"""A request in an engine, its end, and what an engine counts."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from sdar_jax.decoding.config import Completion, FinishReason
from sdar_jax.decoding.generate import completion
from sdar_jax.decoding.rows import Rows
from sdar_jax.decoding.text import TextReader


class Stats(NamedTuple):
    """Now: queued and running requests, free or evictable pages. Since the start: the rest.

    running: those that stand by among them. finished: requests that ended, `cancelled` ones and `failed` ones ("error")
    among them. restarts: times that the device's state was built anew after an interruption. preemptions: times that a
    request gave up its row. evictions: of pages that held a finished prefix. calls: of the device.
    prefix_tokens: prompt positions that another request's pages served. prefill_tokens: positions that were read before
    decoding, prompts and what a preempted request had. prefill_alone: of these, positions read by calls before which no
    row could decode, and the wall time of those calls: of one forward, with the first blocks of those it serves.
    """

    queued: int
    running: int
    pages_available: int
    finished: int
    cancelled: int
    failed: int
    restarts: int
    preemptions: int
    evictions: int
    calls: int
    prompt_tokens: int
    prefix_tokens: int
    generated_tokens: int
    prefill_tokens: int
    prefill_alone_tokens: int
    prefill_alone_seconds: float


# What an engine adds up itself.
_OTHERS = ("queued", "running", "pages_available", "evictions", "prefill_alone_seconds")
COUNTS = tuple(name for name in Stats._fields if name not in _OTHERS)


@dataclass(eq=False)
class Request:
    """A request that was accepted, as the host knows it.

    row: its state as the host last saw it; going on from there gives the same result.
    reader: finds the stop strings; None where there are none.
    id: given by the queue.
    place: its row of the batch, if it has one. pages: lent to it, in order.
    admitted: when it got a row. cached: positions in the pages, as the host last saw them. recorded: whether the pool
        knows its prompt's. forwards_before: denoising forwards that it had had when it got this row.
    """

    row: Rows
    prompt: np.ndarray
    stop_strings: tuple[str, ...]
    reader: TextReader | None
    prompt_logprobs: list[float | None] | None = None
    id: int = -1
    place: int | None = None
    pages: list[int] = field(default_factory=list)
    admitted: int = 0
    cached: int = 0
    recorded: bool = False
    forwards_before: int = 0
    result: Completion | None = None


def ended(request: Request, row: Rows, reason: FinishReason | None, tokenizer: Any) -> Completion:
    """Its completion: what `row` has without a gap, ended for that reason, if there is one, or by a stop string."""
    done = completion(row, tokenizer, request.stop_strings)._replace(prompt_logprobs=request.prompt_logprobs)
    return done if reason is None or isinstance(done.stop_reason, str) else done._replace(finish_reason=reason)
