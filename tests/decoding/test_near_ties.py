"""In lower precision decoders of different widths may part, where a decision was closer than their forwards agree.

Requests decode alone, block after block with a forward to write each, and eight at a time with fused commits. Where the
two part first, both forwards' logits for that step are held against a float64 forward of the state both had before it:
each must be right up to rounding, and the decision that differs closer than twice what they are off.
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdar_jax import DecodingConfig, generate
from sdar_jax.decoding import Completion, block_forward
from sdar_jax.decoding.buffer import advance
from sdar_jax.model import Model
from tests.decoding import oracle
from tests.tiny import MASK, tiny_model

# The package's name for the module is the function's.
generating = importlib.import_module("sdar_jax.decoding.generate")

SIZE, NEW, ROWS = 4, 32, 8
MODELS, REQUESTS = 3, 120
# Wide enough that matmuls of different widths add up in different orders.
WIDE = dict(hidden_size=128, intermediate_size=256, head_dim=32, initializer_range=0.15)
TAU = 0.3
CONFIG = DecodingConfig(confidence_threshold=TAU)
Recorded = dict[tuple[int, int, int], np.ndarray]


def recorded(run: Callable[[], list[Completion]]) -> tuple[list[Completion], Recorded]:
    """Completions, and the logits of each proposal by (seed, position, step)."""
    found: Recorded = {}

    def save(logits, seeds, positions, steps):
        for key, row in zip(
            zip(seeds.tolist(), positions.tolist(), steps.tolist(), strict=True),
            logits,
            strict=True,
        ):
            found[key] = np.array(row)

    propose = block_forward.propose

    def watched(logits, knobs, positions, step, *rest, **options):
        jax.debug.callback(save, logits, knobs.seed, positions, step)
        return propose(logits, knobs, positions, step, *rest, **options)

    compiled = jax.jit(lambda *arguments: advance(*arguments), static_argnums=3)
    decoder = lambda model, config: (
        lambda state, steps: (compiled(model, state, steps, config), None)
    )
    with (
        mock.patch.object(block_forward, "propose", watched),
        mock.patch.object(generating, "Decoder", decoder),
    ):
        completions = run()
        jax.effects_barrier()
    return completions, found


class Parting(NamedTuple):
    """The first step in which two decoders committed differently. choices: position to token, of each."""

    step: int
    choices: tuple[dict[int, int], dict[int, int]]


def parting(prompt: list[int], pair: tuple[Completion, Completion]) -> Parting | None:
    def at(completion: Completion, step: int) -> dict[int, int]:
        columns = zip(completion.tokens, completion.steps, strict=True)
        return {len(prompt) + i: token for i, (token, own) in enumerate(columns) if own == step}

    for step in range(max(c.denoising_forwards for c in pair)):
        choices = at(pair[0], step), at(pair[1], step)
        if choices[0] != choices[1]:
            return Parting(step, choices)
    return None


def masked_then(
    prompt: list[int], completion: Completion, step: int
) -> tuple[list[int], list[int]]:
    """The sequence as it was before this step, to the end of its open block, and the block's masked positions."""
    known = {i: token for i, token in enumerate(prompt)}
    columns = enumerate(zip(completion.tokens, completion.steps, strict=True))
    known |= {len(prompt) + i: token for i, (token, own) in columns if own < step}
    start = next(i for i in range(len(known) + 1) if i not in known) // SIZE * SIZE
    masked = [i for i in range(start, start + SIZE) if i not in known]
    return [known.get(i, MASK) for i in range(start + SIZE)], masked


def closeness(
    logits: np.ndarray, masked: list[int], choices: tuple[dict[int, int], dict[int, int]]
) -> float:
    """How far the decisions that differ are from a tie: between tokens, to the threshold, or between positions."""
    top = np.sort(logits, axis=-1)
    sure = dict(zip(masked, oracle.softmax(logits).max(-1), strict=True))
    gaps = dict(zip(masked, top[:, -1] - top[:, -2], strict=True))
    ours, theirs = choices
    if tied := [gaps[i] for i in ours.keys() & theirs.keys() if ours[i] != theirs[i]]:
        return min(tied)
    differ = ours.keys() ^ theirs.keys()
    to_threshold = [abs(sure[i] - TAU) for i in differ]
    to_others = [abs(sure[i] - sure[j]) for i in differ for j in masked if i != j]
    return min(to_threshold + to_others)


def decode_both(model: Model, prompts: list[list[int]]):
    """Alone and unfused, then eight at a time and fused; each with its logits."""
    options = dict(max_new_tokens=NEW, stop_token_ids=())

    def alone():
        one = lambda i: generate(model, [prompts[i]], CONFIG, seed=i, window_slots=1, **options)
        return [one(i)[0] for i in range(len(prompts))]

    def together():
        some = lambda i: generate(
            model, prompts[i : i + ROWS], CONFIG, seed=i, window_slots=2, **options
        )
        return [completion for i in range(0, len(prompts), ROWS) for completion in some(i)]

    return recorded(alone), recorded(together)


def errors(
    wanted: np.ndarray, request: int, masked: list[int], step: int, *logits: Recorded
) -> float:
    """The most that any of these logits is off."""
    seen = np.array([[found[request, at, step] for at in masked] for found in logits], np.float64)
    return np.abs(np.delete(seen - wanted, MASK, axis=-1)).max()


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, rounding", [(jnp.float32, 1e-4), (jnp.bfloat16, 0.5)], ids=["float32", "bfloat16"]
)
def test_decoders_part_at_near_ties_alone(dtype, rounding):
    random, parted, worst = np.random.default_rng(0), 0, 0.0
    for seed in range(MODELS):
        model = tiny_model(dtype, seed=seed, **WIDE)
        prompts = [
            random.integers(0, MASK, random.integers(0, 24)).tolist() for _ in range(REQUESTS)
        ]
        (alone, a), (together, b) = decode_both(model, prompts)
        with jax.enable_x64(True):
            exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model)
            for i, pair in enumerate(zip(alone, together, strict=True)):
                if (found := parting(prompts[i], pair)) is None:
                    continue
                sequence, masked = masked_then(prompts[i], pair[0], found.step)
                wanted = oracle.forward(exact, sequence, SIZE)[masked]
                off = errors(wanted, i, masked, found.step, a, b)
                assert off < rounding and closeness(wanted, masked, found.choices) <= 2 * off
                parted, worst = parted + 1, max(worst, off)
    print(
        f"\n{np.dtype(dtype).name}: {parted} of {MODELS * REQUESTS} requests part; logits off by {worst:.2g} there"
    )
    assert parted or dtype == jnp.float32
