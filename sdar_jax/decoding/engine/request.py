"""A request in an engine, as the host knows it, and its end."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sdar_jax.decoding.completions import completion
from sdar_jax.decoding.config import Completion, FinishReason
from sdar_jax.decoding.decode_state import SequenceState
from sdar_jax.decoding.text import TextReader
from sdar_jax.decoding.transfers import HostView


@dataclass(eq=False)
class Request:
    """A request that was accepted.

    Attributes:
        sequence: its state as the host last saw it; decoding from there gives the same result.
        prompt: token ids.
        stop_strings: its text ends before the first of these.
        stop_reader: finds them in its output; None where there are none.
        prompt_logprobs: of each prompt token, if they were asked for.
        id: given when it enters the queue.
        slot: its place in the batch, if it has one.
        view: what the last call that the host has read left of it in that place; None before the first.
        pages: allocated to it, in order.
        admitted: number of the admission that gave it its slot; 0 before the first.
        cached: positions in its pages, as the host last saw them.
        prompt_recorded: whether the page pool knows its prompt's pages.
        forwards_before: denoising forwards that it had had when it got its slot.
        result: its completion, once it has ended.
    """

    sequence: SequenceState
    prompt: np.ndarray
    stop_strings: tuple[str, ...] = ()
    stop_reader: TextReader | None = None
    prompt_logprobs: list[float | None] | None = None
    id: int = -1
    slot: int | None = None
    view: HostView | None = None
    pages: list[int] = field(default_factory=list)
    admitted: int = 0
    cached: int = 0
    prompt_recorded: bool = False
    forwards_before: int = 0
    result: Completion | None = None

    def latest(self) -> SequenceState:
        """Its state as the last call that the host has read left it."""
        if self.slot is None or self.view is None:
            return self.sequence
        return self.view.sequence(self.sequence.inputs, self.slot)


def ended(
    request: Request, sequence: SequenceState, reason: FinishReason | None, tokenizer: Any
) -> Completion:
    """Its completion: what `sequence` has without a gap, ended for `reason`, if there is one, or by a stop string."""
    done = completion(sequence, tokenizer, request.stop_strings)._replace(
        prompt_logprobs=request.prompt_logprobs
    )
    return (
        done
        if reason is None or isinstance(done.stop_reason, str)
        else done._replace(finish_reason=reason)
    )
