"""A training step on rows whose prompts are three quarters, with noisy copies of the answers alone and of everything.

    python -m benchmarks.sft_cost [--length 1024] [--prompt 0.75] [--pairs 7]

Both steps read the same rows and mask the same tokens; one doubles the blocks that hold an answer (`noisy_length`, as
fine-tuning recipes set it), the other the whole row. In turns, on this machine, float32, a random 100M model. The
gradients are compared first.
"""

import argparse
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sdar_jax import ModelConfig
from sdar_jax.data.documents import noisy_positions
from sdar_jax.model import Model, stack_layers
from sdar_jax.objectives import Batch, ObjectiveConfig, make_inputs
from sdar_jax.training.step import model_weights
from sdar_jax.weighted_loss import training_loss

S = 4
CONFIG = ModelConfig(
    vocab_size=32000,
    hidden_size=768,
    num_layers=12,
    intermediate_size=2048,
    num_heads=12,
    num_kv_heads=12,
    head_dim=64,
    objective="block_diffusion",
    block_size=S,
    mask_token_id=31999,
)


def rows(length: int, prompt: float) -> tuple[Batch, Batch]:
    """One document a row, a prompt and its answer: with `noisy_index` of the answer's blocks, and without."""
    tokens = jax.random.randint(jax.random.key(2), (1, length), 0, 31999)
    segments = jnp.ones_like(tokens)
    learned = jnp.arange(length)[None] >= int(prompt * length)
    answer = noisy_positions(np.asarray(segments[0]), np.asarray(learned[0]), S)
    return Batch(tokens, segments, learned, jnp.asarray(answer)[None]), Batch(
        tokens, segments, learned
    )


def main() -> None:
    """Prints how far the gradients are apart, the seconds of both, and the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--prompt", type=float, default=0.75, help="its part of a row")
    parser.add_argument("--pairs", type=int, default=7)
    args = parser.parse_args()
    weights, rebuild = model_weights(stack_layers(Model(CONFIG, jax.random.key(0))))
    objective = ObjectiveConfig()

    @jax.jit
    def gradients(weights, batch):
        def loss(weights):
            inputs = make_inputs(batch, jax.random.key(1), objective, CONFIG)
            return training_loss(rebuild(weights), inputs, config=objective)[0]

        return jax.grad(loss)(weights)

    some, everything = rows(args.length, args.prompt)
    ours, theirs = (partial(gradients, weights, batch) for batch in (some, everything))
    found, expected = jax.block_until_ready((ours(), theirs()))
    apart = max(float(abs(found[name] - expected[name]).max()) for name in found)
    largest = max(float(abs(each).max()) for each in expected.values())
    print(f"gradients: {apart:.1e} apart at most, of {largest:.1e}", flush=True)
    times = []
    for _ in range(args.pairs):
        pair = []
        for run in (ours, theirs):
            started = time.perf_counter()
            jax.block_until_ready(run())
            pair.append(time.perf_counter() - started)
        times.append(pair)
    ratios = [b / a for a, b in times]
    a, b = (statistics.median(side) for side in zip(*times, strict=True))
    print(
        f"L = {args.length}, prompt {args.prompt:.0%}: answers alone {a:.3f} s, everything {b:.3f} s,"
        f" {statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
