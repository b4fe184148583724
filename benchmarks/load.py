"""64 concurrent requests of mixed lengths through an engine of 8 rows, beside static batches of 8 with equal lengths.

    python -m benchmarks.load [--requests 256] [--pairs 5] [--steps-per-call 16] [--pages 96] [--seed 0]

Whenever one of the 64 ends the next is submitted, until all have been: so the queue is full but for the end of a run,
when the last rows finish alone. Pages are too few for 8 long rows, and one request in eight is cancelled when it is
under way or still waits. The static batches (`generate`, eight prompts at a time) have as many prompt tokens, and
generate as many, in all; they know of no stops, cancels or pages. Both decode the same model in turns, and each run has
traffic of its own.
"""

import argparse
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdar_jax import DecodingConfig, ModelConfig, generate
from sdar_jax.decoding.config import Completion
from sdar_jax.decoding.engine import Engine
from sdar_jax.model import Model, unstack_layers

CONCURRENT, ROWS, PAGE_SIZE, BLOCK_SIZE = 64, 8, 16, 4
PROMPT, NEW = (4, 120), (16, 80)
CONFIG = DecodingConfig()


class Request(NamedTuple):
    """cancelled: whether, at some time of the run, it is."""

    prompt: list[int]
    new: int
    cancelled: bool


class Served(NamedTuple):
    """Of one run: seconds; completions, in the order of the requests; preemptions and evictions; compilations."""

    seconds: float
    completions: list[Completion]
    preemptions: int
    evictions: int
    compilations: int


class Compilations:
    """Counts programs that XLA compiles from now on."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **_: str | int) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


def network() -> Model:
    """31M weights, float32."""
    config = ModelConfig(
        vocab_size=8192,
        hidden_size=512,
        num_layers=8,
        intermediate_size=1408,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        qk_norm=True,
        objective="block_diffusion",
        block_size=BLOCK_SIZE,
        mask_token_id=8191,
        max_position_embeddings=512,
    )
    return Model(config, jax.random.key(0), jnp.float32)


def traffic(random: np.random.Generator, count: int) -> list[Request]:
    between = lambda low, high: int(random.integers(low, high + 1))
    return [
        Request(
            random.integers(0, 8000, between(*PROMPT)).tolist(),
            between(*NEW),
            bool(random.random() < 1 / 8),
        )
        for _ in range(count)
    ]


class Clients:
    """Submit `requests` in order, `CONCURRENT` at a time, read the oldest's stream, and cancel some at any moment."""

    def __init__(self, engine: Engine, requests: list[Request], random: np.random.Generator):
        self.engine, self.requests, self.random = engine, requests, random
        self.ids: list[int] = []
        self.found: dict[int, Completion] = {}

    def run(self) -> list[Completion]:
        for at in range(len(self.requests)):
            self._submit()
            if self.ids[at] not in self.found:
                self._read(self.ids[at])
        return [self.found[request_id] for request_id in self.ids]

    def _submit(self) -> None:
        while len(self.ids) < len(self.requests) and len(self.ids) - len(self.found) < CONCURRENT:
            request = self.requests[len(self.ids)]
            self.ids.append(
                self.engine.submit(
                    request.prompt, CONFIG, max_new_tokens=request.new, stop_token_ids=()
                )
            )

    def _read(self, request_id: int) -> None:
        for _ in self.engine.stream(request_id):
            if self.random.random() < 0.1:
                self._cancel_one()
                if request_id in self.found:
                    return
        self.found[request_id] = self.engine.result(request_id)

    def _cancel_one(self) -> None:
        pairs = zip(self.ids, self.requests, strict=False)
        unwanted = [
            request_id for request_id, r in pairs if r.cancelled and request_id not in self.found
        ]
        if unwanted:
            request_id = unwanted[int(self.random.integers(len(unwanted)))]
            self.found[request_id] = self.engine.cancel(request_id)


def serve(
    engine: Engine, requests: list[Request], random: np.random.Generator, compiled: Compilations
) -> Served:
    before, counted = engine.stats(), compiled.count
    start = time.perf_counter()
    completions = Clients(engine, requests, random).run()
    seconds = time.perf_counter() - start
    after = engine.stats()
    check(requests, completions)
    assert after.queued == after.running == 0 and after.pages_available == before.pages_available
    assert after.finished - before.finished == len(requests)
    return Served(
        seconds,
        completions,
        preemptions=after.preemptions - before.preemptions,
        evictions=after.evictions - before.evictions,
        compilations=compiled.count - counted,
    )


def check(requests: list[Request], completions: list[Completion]) -> None:
    """Every request is accounted for: whole, or cancelled with what it had."""
    for request, completion in zip(requests, completions, strict=True):
        whole = completion.finish_reason == "length" and len(completion.tokens) == request.new
        part = (
            request.cancelled
            and completion.finish_reason == "cancelled"
            and len(completion.tokens) <= request.new
        )
        assert whole or part, (request, completion)


def static(
    model: Model, requests: int, prompt: int, new: int, random: np.random.Generator
) -> float:
    """Seconds of as many requests, eight at a time, all of these lengths."""
    start = time.perf_counter()
    for _ in range(requests // ROWS):
        prompts = random.integers(0, 8000, (ROWS, prompt)).tolist()
        generate(model, prompts, CONFIG, max_new_tokens=new, stop_token_ids=())
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=256, help="in all, 64 at a time")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument(
        "--steps-per-call", type=int, default=16, help="forwards per call of the engine, at most"
    )
    parser.add_argument("--pages", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, compiled = unstack_layers(network()), Compilations()
    random = np.random.default_rng(args.seed)
    engine = Engine(
        model,
        batch_slots=ROWS,
        max_length=PROMPT[1] + NEW[1],
        pages=args.pages,
        page_size=PAGE_SIZE,
        steps_per_call=args.steps_per_call,
    )
    serve(engine, traffic(random, CONCURRENT), random, compiled)
    prompt, new = sum(PROMPT) // 2, sum(NEW) // 2
    static(model, ROWS, prompt, new, random)
    print(f"warm-up: {compiled.count} compilations", flush=True)
    shares = []
    for _ in range(args.pairs):
        requests = traffic(random, args.requests)
        served = serve(engine, requests, random, compiled)
        tokens = sum(len(c.tokens) for c in served.completions)
        ours = tokens / served.seconds
        theirs = args.requests * new / static(model, args.requests, prompt, new, random)
        shares.append(ours / theirs)
        cancelled = sum(c.finish_reason == "cancelled" for c in served.completions)
        print(
            f"engine {ours:.1f} tokens/s ({tokens} tokens, {cancelled} cancelled, {served.preemptions} preemptions, "
            f"{served.evictions} evictions, {served.compilations} compilations), static {theirs:.1f}: "
            f"{ours / theirs:.3f}",
            flush=True,
        )
    print(f"median {statistics.median(shares):.3f} ({min(shares):.3f} to {max(shares):.3f})")


if __name__ == "__main__":
    main()
