"""Block decoding of a 100M model on this CPU, in turns with the released PyTorch loop, and beside AR decoding here.

    python -m benchmarks.decoding --torch-python PATH --sdar-src DIR [--pairs 5] [--new-tokens 96]

Both sides have the same random weights in float32 (written by `save_pretrained`, read by the released classes), one
prompt, two threads, and commit 1, 2 or 4 tokens a step, the most confident, greedily. Every pair's tokens are compared.
Theirs is sdar_peer.py, which says what of the released code had to be replaced. Compilation is left out on both sides.

How many times faster ours is, in tokens a second, is split into (their forwards / our forwards) x (their seconds a
forward / our seconds a forward). Seconds a forward are those of the whole loop, prompt included, over its forwards:
those that denoise and those that only write a block's keys. Ours needs none of the latter (commit fusion).

The AR section decodes the same network with strategy "autoregressive": one token a forward, through the same loop and
pages. The block decoder's speed-up over it grows with its tokens a forward; where it crosses 1 is interpolated.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import SETTLE_SECONDS, Peer, seconds
from sdar_jax import DecodingConfig, ModelConfig, generate, save_pretrained
from sdar_jax.model import Model

NETWORK = ModelConfig(
    vocab_size=16384,
    hidden_size=768,
    intermediate_size=2048,
    num_layers=12,
    num_heads=12,
    num_kv_heads=4,
    head_dim=64,
    # Wide enough that neither tokens nor their ranks hang on rounding.
    initializer_range=0.05,
    objective="block_diffusion",
    block_size=4,
    mask_token_id=16383,
)
PROMPT_TOKENS = 64
BLOCK_SIZES = (4, 16)
TOKENS_A_STEP = (1, 2, 4)


class Run(NamedTuple):
    """One decoding: seconds, forwards but those that only read the prompt, and the tokens of the first row."""

    seconds: float
    forwards: int
    tokens: list[int]

    @property
    def a_forward(self) -> float:
        return self.seconds / self.forwards


class Spread(NamedTuple):
    median: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.lowest:.2f} to {self.highest:.2f})"


class Split(NamedTuple):
    """How many times faster ours is, and what of it is fewer forwards, and what faster ones: total = fewer x faster."""

    total: Spread
    fewer: float
    faster: Spread


def split(pairs: Sequence[tuple[Run, Run]]) -> Split:
    """Of (ours, theirs), pair by pair; for the same number of tokens."""
    total = [theirs.seconds / ours.seconds for ours, theirs in pairs]
    fewer = pairs[0][1].forwards / pairs[0][0].forwards
    return Split(spread(total), fewer, spread([ratio / fewer for ratio in total]))


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def crossing(tokens_a_forward: Sequence[float], speed_up: Sequence[float]) -> float | None:
    """The tokens a forward at which the speed-up passes 1, on lines between the points; None if it does not."""
    points = sorted(zip(tokens_a_forward, speed_up, strict=True))
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y0 < 1 <= y1:
            return x0 + (1 - y0) / (y1 - y0) * (x1 - x0)
    return None


def static(block_size: int, tokens_a_step: int) -> DecodingConfig:
    steps = block_size // tokens_a_step
    return DecodingConfig(
        block_size=block_size, denoising_steps=steps, strategy="low_confidence_static"
    )


def decode(model: Model, prompts: list[list[int]], config: DecodingConfig, new_tokens: int) -> Run:
    start = time.perf_counter()
    first, *_ = generate(model, prompts, config, max_new_tokens=new_tokens)
    took = time.perf_counter() - start
    return Run(took, first.denoising_forwards + first.commit_forwards, first.tokens)


def decode_theirs(peer: Peer, prompt: list[int], config: DecodingConfig, new_tokens: int) -> Run:
    sizes = {
        "new_tokens": new_tokens,
        "block_size": config.block_size,
        "steps": config.denoising_steps,
    }
    return Run(**json.loads(peer.ask(json.dumps({"prompt": prompt, **sizes}))))


def in_turns(runs, count: int) -> list[tuple]:
    """`count` rounds of each of the runs in turn, after one that is not counted."""
    rounds = []
    for _ in range(count + 1):
        one = []
        for run in runs:
            time.sleep(SETTLE_SECONDS)
            one.append(run())
        rounds.append(tuple(one))
    return rounds[1:]


def against_released(
    model: Model, peer: Peer, prompt: list[int], new_tokens: int, pairs: int
) -> None:
    print(
        f"\nBeside the released loop: batch 1, prompt {len(prompt)}, {new_tokens} new tokens, {pairs} pairs"
    )
    print(
        "| S | tokens a step | tokens/s, ours | theirs | faster | fewer forwards | faster forwards |"
    )
    print("|---|---|---|---|---|---|---|")
    notes = []
    for size, step in itertools.product(BLOCK_SIZES, TOKENS_A_STEP):
        config = static(size, step)
        ours = partial(decode, model, [prompt], config, new_tokens)
        measured = in_turns([ours, partial(decode_theirs, peer, prompt, config, new_tokens)], pairs)
        result = split(measured)
        mine, other = (
            statistics.median(run.a_forward for run in side) for side in zip(*measured, strict=True)
        )
        mine_n, other_n = (run.forwards for run in measured[0])
        same = all(a.tokens == b.tokens for a, b in measured)
        print(
            f"| {size} | {step} | {new_tokens / mine / mine_n:.1f} | {new_tokens / other / other_n:.1f} | "
            f"{result.total} | {result.fewer:.2f}x | {result.faster} |",
            flush=True,
        )
        notes.append(
            f"S = {size}, {step} a step: {mine_n} forwards of {1e3 * mine:.1f} ms, theirs {other_n} of "
            f"{1e3 * other:.1f} ms; tokens {'identical' if same else 'DIFFER'}, {len(set(measured[0][0].tokens))} kinds"
        )
    print("\n" + "\n".join(notes))


def against_ar(
    model: Model, prompt: list[int], batches: Sequence[int], new_tokens: int, rounds: int
) -> None:
    print(
        f"\nBeside AR decoding of the same network: {new_tokens} new tokens a row, {rounds} rounds in turn"
    )
    print("| batch | S | tokens a forward | tokens/s a row | ms a forward | speed-up over AR |")
    print("|---|---|---|---|---|---|")
    for batch in batches:
        prompts = [np.roll(prompt, i).tolist() for i in range(batch)]
        settings = [(s, n) for s in (4, 8, 16) for n in (1, 2, 4, 8, 16) if n <= s]
        configs = [DecodingConfig(strategy="autoregressive"), *(static(s, n) for s, n in settings)]
        measured = in_turns(
            [partial(decode, model, prompts, config, new_tokens) for config in configs], rounds
        )
        ar = [one[0] for one in measured]
        _print_row(batch, 1, ar, ar)
        points = {}
        for i, (size, _) in enumerate(settings, 1):
            runs = [one[i] for one in measured]
            speed_up = _print_row(batch, size, runs, ar)
            points.setdefault(size, []).append((new_tokens / runs[0].forwards, speed_up))
        for size, found in points.items():
            at = crossing(*zip(*found, strict=True))
            where = f"at {at:.2f} tokens a forward" if at else "outside what was tried"
            print(f"batch {batch}, S = {size}: the speed-up passes 1 {where}", flush=True)


def _print_row(batch: int, size: int, runs: Sequence[Run], ar: Sequence[Run]) -> float:
    ratio = spread([base.seconds / run.seconds for base, run in zip(ar, runs, strict=True)])
    took, tokens = statistics.median(run.seconds for run in runs), len(runs[0].tokens)
    print(
        f"| {batch} | {size} | {tokens / runs[0].forwards:.2f} | {tokens / took:.1f} | "
        f"{1e3 * took / runs[0].forwards:.1f} | {ratio} |",
        flush=True,
    )
    return ratio.median


def streaming_floor(model: Model) -> tuple[float, float]:
    """Bytes of weights that a forward reads, and seconds to read as many in matrix-vector products alone."""
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model)) - model.embedding.nbytes
    width = NETWORK.hidden_size
    parts = list(
        jax.random.normal(jax.random.key(0), (weights // (width * width * 4 * 8), width, width * 8))
    )
    multiply = jax.jit(lambda x, parts: [x @ part for part in parts])
    return weights, seconds(multiply, jnp.ones((1, width)), parts, calls=3)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--torch-python", help="a Python that has torch, transformers 4.52, einops; with --sdar-src"
    )
    parser.add_argument(
        "--sdar-src", help="a checkout of the released repository; without it, AR is measured alone"
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument(
        "--batches",
        type=int,
        nargs="*",
        default=[1, 4],
        help="of the AR section; none leaves it out",
    )
    args = parser.parse_args()
    model = Model(NETWORK, jax.random.key(0))
    prompt = np.random.default_rng(0).integers(0, NETWORK.vocab_size - 1, PROMPT_TOKENS).tolist()
    weights, floor = streaming_floor(model)
    count = sum(leaf.size for leaf in jax.tree.leaves(model))
    print(
        f"{count / 1e6:.0f}M weights; a forward reads {weights / 1e6:.0f} MB of them, {1e3 * floor:.1f} ms at the least"
    )
    if args.sdar_src:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "model"
            save_pretrained(model, path)
            with Peer(
                args.torch_python,
                Path(__file__).with_name("sdar_peer.py"),
                args.sdar_src,
                str(path),
            ) as peer:
                against_released(model, peer, prompt, args.new_tokens, args.pairs)
    if args.batches:
        against_ar(model, prompt, args.batches, args.new_tokens, args.pairs)


if __name__ == "__main__":
    main()
