"""How fast a model decodes on the machine at hand: t_f against batch and block size, tokens a second (Study III)."""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sdar_jax.decoding import DecodingConfig, generate
from sdar_jax.errors import ConfigError
from sdar_jax.model import Model


@dataclass(frozen=True)
class Speed:
    """One way of decoding at one batch.

    Attributes:
        block_size: S; None decodes an autoregressive model.
        batch: rows.
        tokens_per_forward: S / gamma, gamma denoising forwards a block (Eq. 11).
        forward_ms: t_f, wall time of a forward of the batch, prompts and the call's fixed cost left out.
        tokens_per_second: TGS of the whole batch, prompts included.
        per_row: tokens a second of one row.
        low, high: of tokens_per_second, over the repeats.
    """

    block_size: int | None
    batch: int
    tokens_per_forward: float
    forward_ms: float
    tokens_per_second: float
    per_row: float
    low: float
    high: float


def profile(
    model: Model,
    config: DecodingConfig = DecodingConfig(),  # noqa: B008 (frozen)
    *,
    batches: Sequence[int] = (1, 2, 4, 8),
    block_sizes: Sequence[int] = (),
    prompt_length: int = 64,
    new_tokens: int = 64,
    repeats: int = 3,
    seed: int = 0,
    window_slots: int = 2,
) -> Iterator[Speed]:
    """Decodes random prompts, each size after the other, and yields what was measured.

    Random prompts are answered as a model answers noise: forwards are timed rightly, how many a block takes is that of
    the task only for `prompts` of the task (`sdar-jax evaluate` has it of those).

    Args:
        config: how to decode; `block_sizes` replace its own.
        block_sizes: the model's own if there is none.
        prompt_length: of each prompt.
        new_tokens: of each answer; no stop ends it earlier.
        repeats: timed calls, behind one that compiles.
        window_slots: K, as for `generate`.

    Raises:
        ConfigError: numbers below 1, or lengths past the model's context.
    """
    numbers = {"prompt_length": prompt_length, "new_tokens": new_tokens, "repeats": repeats}
    numbers |= {f"batches[{i}]": value for i, value in enumerate(batches)}
    numbers |= {f"block_sizes[{i}]": value for i, value in enumerate(block_sizes)}
    for name, value in numbers.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}; give a positive integer")
    context = model.config.max_position_embeddings
    if prompt_length + new_tokens > context:
        raise ConfigError(
            f"prompt_length {prompt_length} and new_tokens {new_tokens} are past the context of {context}; give less"
        )
    random = np.random.default_rng(seed)
    known = [i for i in range(model.config.vocab_size) if i != model.config.mask_token_id]
    for size in block_sizes or (config.block_size,):
        own = replace(config, block_size=size, min_new_tokens=0)
        for batch in batches:
            prompts = [random.choice(known, prompt_length).tolist() for _ in range(batch)]
            yield _measure(model, own, prompts, new_tokens, repeats, window_slots)


def _measure(
    model: Model,
    config: DecodingConfig,
    prompts: list[list[int]],
    new_tokens: int,
    repeats: int,
    window_slots: int,
) -> Speed:
    options: dict[str, Any] = {"stop_token_ids": (), "window_slots": window_slots}
    size = config.resolve_block_size(model.config) if model.config.paradigm.masks else 1
    # A block alone: what prompts and a call cost, and one block's forwards.
    few = min(size, new_tokens)
    seconds, short, forwards, short_forwards, tokens, mean = [], [], 0, 0, 0, 0.0
    for repeat in range(repeats + 1):
        for new, times in ((few, short), (new_tokens, seconds)):
            started = time.perf_counter()
            done = generate(model, prompts, config, max_new_tokens=new, **options)
            times.append(time.perf_counter() - started)
            # Rows of a batch go together: its forwards are those of the slowest.
            most = max(each.denoising_forwards + each.commit_forwards for each in done)
            if new == new_tokens:
                forwards = most
                tokens = sum(len(each.tokens) for each in done)
                mean = statistics.mean(each.tokens_per_forward for each in done)
            else:
                short_forwards = most
        if repeat == 0:
            # It compiled.
            seconds, short = [], []
    whole, start = statistics.median(seconds), statistics.median(short)
    apart = forwards - short_forwards
    per_forward = (whole - start) / apart if apart else whole / max(forwards, 1)
    return Speed(
        block_size=size if model.config.paradigm.masks else None,
        batch=len(prompts),
        tokens_per_forward=mean,
        forward_ms=1e3 * per_forward,
        tokens_per_second=tokens / whole,
        per_row=tokens / whole / len(prompts),
        low=tokens / max(seconds),
        high=tokens / min(seconds),
    )
