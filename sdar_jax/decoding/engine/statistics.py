"""What an engine counts."""

import dataclasses
from typing import NamedTuple

from sdar_jax.decoding.config import Completion


class Stats(NamedTuple):
    """An engine's queue and pages now, and what it has done since it was made.

    Attributes:
        queued: requests that wait for a slot, now.
        running: requests in slots, those among them that are prefilled and wait for a decode slot.
        pages_available: pages that are free or can be evicted, now.
        finished: requests that ended, `cancelled` ones and `failed` ones ("error") among them.
        restarts: times that the device's state was built anew after an interruption.
        preemptions: times that a request gave up its slot.
        evictions: of pages that held a finished prefix.
        calls: of the device.
        prompt_tokens: of requests that were admitted.
        prefix_tokens: prompt positions that another request's pages served.
        generated_tokens: of completions.
        prefill_tokens: positions that were read before decoding, prompts and what a preempted request had.
        prefill_alone_tokens: of these, positions read by calls before which no request could decode.
        prefill_alone_seconds: wall time of those calls: of one forward, with the first blocks of those it serves.
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


@dataclasses.dataclass
class Counters:
    """What an engine adds up itself; the fields are those of `Stats`."""

    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    restarts: int = 0
    preemptions: int = 0
    calls: int = 0
    prompt_tokens: int = 0
    prefix_tokens: int = 0
    generated_tokens: int = 0
    prefill_tokens: int = 0
    prefill_alone_tokens: int = 0
    prefill_alone_seconds: float = 0.0

    def count_end(self, completion: Completion) -> None:
        self.finished += 1
        self.cancelled += completion.finish_reason == "cancelled"
        self.failed += completion.finish_reason == "error"
        self.generated_tokens += len(completion.tokens)

    def stats(self, *, queued: int, running: int, pages_available: int, evictions: int) -> Stats:
        """These counts, with what the queue and the pages are now."""
        now = {
            "queued": queued,
            "running": running,
            "pages_available": pages_available,
            "evictions": evictions,
        }
        return Stats(**now, **dataclasses.asdict(self))
