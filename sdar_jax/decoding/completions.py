"""From the state of a sequence that has ended to its `Completion`."""

from collections.abc import Sequence
from typing import Any

from sdar_jax.decoding.config import Completion, FinishReason
from sdar_jax.decoding.decode_state import SequenceState, generated, sequence_at, top_logprobs
from sdar_jax.decoding.text import find_stop


def completions(
    batch: SequenceState, tokenizer: Any, stop_strings: Sequence[str] = ()
) -> list[Completion]:
    """What each sequence of a batch, on the host, has generated."""
    count = len(batch.progress.start)
    return [completion(sequence_at(batch, i), tokenizer, stop_strings) for i in range(count)]


def completion(
    sequence: SequenceState,
    tokenizer: Any,
    stop_strings: Sequence[str] = (),
    *,
    start: int | None = None,
) -> Completion:
    """What one sequence, on the host, has generated, up to a stop string; with `start`, what it has from there."""
    inputs, progress, output = sequence
    start = int(inputs.prompt_length) if start is None else start
    tokens = generated(sequence, start).tolist()
    text = None
    reason: FinishReason = "error" if progress.failed else "stop" if progress.stopped else "length"
    stop: int | str | None = int(output.tokens[int(progress.end)]) if progress.stopped else None
    stop_step = int(output.step[int(progress.end)]) if progress.stopped else None
    if tokenizer is not None:
        text = tokenizer.decode(tokens)
        if found := find_stop(tokens, stop_strings, tokenizer.decode):
            tokens, text, reason, stop = tokens[: found.count], found.text, "stop", found.string
            stop_step = None
    places = slice(start, start + len(tokens))
    return Completion(
        tokens=tokens,
        text=text,
        finish_reason=reason,
        logprobs=output.logprob[places].tolist(),
        steps=output.step[places].tolist(),
        denoising_forwards=int(progress.denoising_forwards),
        commit_forwards=int(progress.commit_forwards),
        prefill_forwards=int(progress.prefill_forwards),
        stop_reason=stop,
        top_logprobs=top_logprobs(sequence, places),
        stop_step=stop_step,
    )
