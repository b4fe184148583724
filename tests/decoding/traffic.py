"""Random requests, and a caller that submits, streams, cancels and takes results in any order."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from sdar_jax import DecodingConfig, generate
from sdar_jax.decoding import Completion, Engine
from sdar_jax.model import Model
from tests.tiny import MASK

# One length for all, so that few programs are compiled.
LONGEST_PROMPT, LONGEST_OUTPUT = 27, 20

STRATEGIES = (
    "sequential",
    "low_confidence_static",
    "low_confidence_dynamic",
    "entropy_bounded",
    "factor",
    "sub_blocks",
)


class Request(NamedTuple):
    prompt: list[int]
    config: DecodingConfig
    new: int
    stops: tuple[int, int]
    seed: int


def random_config(random: np.random.Generator, size: int) -> DecodingConfig:
    """Any strategy, score, schedule and way to sample; blocks open one after another, or some early."""
    pick = lambda *values: values[int(random.integers(len(values)))]
    return DecodingConfig(
        strategy=pick(*STRATEGIES),
        denoising_steps=pick(None, *range(1, size + 1)),
        schedule=pick("released", "paper"),
        score=pick("probability", "margin", "neg_entropy"),
        confidence=pick("pre_filter", "post_filter"),
        confidence_threshold=float(random.random()),
        entropy_bound=float(3 * random.random()),
        entropy_rule=pick("eb_sampler", "jetengine"),
        factor=float(2 * random.random()),
        sub_block_size=pick(2, 3, 8),
        temperature=pick(0.0, 0.0, 0.7, 1.5),
        top_k=pick(0, 5),
        top_p=pick(1.0, 0.8),
        repetition_penalty=pick(1.0, 1.0, 1.3),
        add_threshold=pick(1.0, 1.0, 0.0, 0.3, 0.75),
        activate_threshold=pick(1.0, 0.0, 0.5),
    )


def random_request(random: np.random.Generator, model: Model, stems: np.ndarray) -> Request:
    """A prompt that begins as others do, wholly, to the middle of a page, or not at all."""
    tail = random.integers(0, MASK, random.integers(0, 4))
    stem = stems[random.integers(len(stems))][: random.integers(0, LONGEST_PROMPT + 1 - len(tail))]
    prompt = [*stem.tolist(), *tail.tolist()]
    if model.config.objective == "autoregressive":
        config = DecodingConfig(strategy="autoregressive", temperature=float(random.integers(2)))
        prompt = prompt or [1]
    else:
        config = random_config(random, model.config.block_size or 1)
        if not prompt:
            # Masks alone attend to equal values: all positions are as likely, and only rounding would rank them.
            config = replace(config, strategy="sequential")
    # The mask is never proposed, so that stops nothing.
    stops = tuple(random.integers(0, MASK, 2).tolist()) if random.random() < 0.5 else (MASK, MASK)
    new = int(random.choice([0, 1, *range(2, LONGEST_OUTPUT + 1)]))
    return Request(prompt, config, new, stops, int(random.integers(0, 1000)))


def alone(model: Model, request: Request, slots: int) -> Completion:
    """What `generate` gives in a batch of one: with the engine's slots where blocks open early, else block after block,
    each written by a forward of its own."""
    options = dict(
        max_new_tokens=request.new,
        stop_token_ids=request.stops,
        seed=request.seed,
        window_slots=1 if request.config.add_threshold == 1 else slots,
    )
    return generate(model, [request.prompt], request.config, **options)[0]


@dataclass
class Caller:
    """Keeps up to `most` requests in an engine. ended: each request with its completion, and what its stream said."""

    engine: Engine
    requests: list[Request]
    random: np.random.Generator
    most: int = 7
    live: dict[int, Request] = field(default_factory=dict)
    streams: dict = field(default_factory=dict)
    told: dict[int, list[int]] = field(default_factory=dict)
    ended: list[tuple[Request, Completion, list[int] | None]] = field(default_factory=list)

    def run(self) -> None:
        waiting = list(self.requests)
        while waiting or self.live:
            if waiting and len(self.live) < self.most and self.random.random() < 0.6:
                self.submit(waiting.pop())
            elif self.live:
                self.act(int(self.random.choice(list(self.live))))

    def submit(self, request: Request) -> None:
        options = dict(max_new_tokens=request.new, stop_token_ids=request.stops, seed=request.seed)
        request_id = self.engine.submit(request.prompt, request.config, **options)
        self.live[request_id] = request
        if self.random.random() < 0.5:
            self.streams[request_id], self.told[request_id] = self.engine.stream(request_id), []

    def act(self, request_id: int) -> None:
        """Reads one event; or takes the result; or now and then cancels, or leaves a stream."""
        chance = self.random.random()
        if chance < 0.08:
            self.end(request_id, self.engine.cancel(request_id))
        elif request_id in self.streams:
            event = next(self.streams[request_id], None)
            if event is None:
                self.end(request_id, self.engine.result(request_id))
                return
            assert event.start == len(self.told[request_id])
            self.told[request_id] += event.tokens
            if chance < 0.12:
                self.streams.pop(request_id).close()
        elif chance < 0.3:
            self.end(request_id, self.engine.result(request_id))

    def end(self, request_id: int, completion: Completion) -> None:
        self.streams.pop(request_id, None)
        self.ended.append((self.live.pop(request_id), completion, self.told.pop(request_id, None)))


def check(completion: Completion, told: list[int] | None, wanted: Completion) -> None:
    """What a request got is what it would get alone, or the beginning of that if it was cancelled."""
    count = len(completion.tokens)
    assert completion.tokens == wanted.tokens[:count] and completion.steps == wanted.steps[:count]
    np.testing.assert_allclose(completion.logprobs, wanted.logprobs[:count], rtol=1e-9)
    if completion.finish_reason != "cancelled":
        assert count == len(wanted.tokens) and completion.finish_reason == wanted.finish_reason
        assert completion.denoising_forwards == wanted.denoising_forwards
    if told is not None:
        assert told == wanted.tokens[: len(told)] and len(told) <= count
