"""How fast requests were decoded, in words: prefill, tokens per second and per forward, forwards by kind."""

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence

from sdar_jax.decoding.config import Completion
from sdar_jax.decoding.engine import Engine, Stats


@contextlib.contextmanager
def timed(engine: Engine | None, batch: int) -> Iterator[list[Completion]]:
    """Prints the speed, to stderr, at which the completions that are added to its list were made."""
    done: list[Completion] = []
    before, started = engine and engine.stats(), time.perf_counter()
    yield done
    seconds = time.perf_counter() - started
    if engine is not None and before is not None:
        print(prefill_speed(before, engine.stats()), file=sys.stderr)
    print(
        speed(done, seconds, batch) + (", compilation included" if engine is None else ""),
        file=sys.stderr,
    )


def prefill_speed(before: Stats, now: Stats) -> str:
    """Positions read before decoding, and the speed of those that were read while no request decoded."""
    read, shared = (
        now.prefill_tokens - before.prefill_tokens,
        now.prefix_tokens - before.prefix_tokens,
    )
    alone = now.prefill_alone_tokens - before.prefill_alone_tokens
    seconds = now.prefill_alone_seconds - before.prefill_alone_seconds
    rate = f" in {seconds:.3f} s, {alone / seconds:.0f} tokens/s" if alone else ""
    message = (
        f"{read} tokens{rate}"
        if alone == read
        else f"{read} tokens, {alone} of them with no row decoding{rate}"
    )
    return f"prefill: {message}; {shared} more from the cache"


def speed(completions: Sequence[Completion], seconds: float, batch: int) -> str:
    """TGS: generated tokens per second of wall time, prefill included. TPF: generated tokens per denoising forward."""
    tokens = sum(len(c.tokens) for c in completions)
    denoising = sum(c.denoising_forwards for c in completions)
    commits = sum(c.commit_forwards for c in completions)
    reasons = ", ".join(
        f"{n} {reason}" for reason, n in Counter(c.finish_reason for c in completions).items()
    )
    rate = f", TPF {tokens / denoising:.2f}" if denoising else ""
    forwards = f"{denoising} denoising and {commits} commit forwards"
    done = f"{tokens} tokens ({reasons}) in {seconds:.3f} s"
    return f"decoding: {done} at batch {batch}, TGS {tokens / seconds:.1f}{rate}, {forwards}"
