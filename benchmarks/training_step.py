"""A whole training step of a 100M model on this CPU, in turns with the same step in PyTorch.

    python -m benchmarks.training_step --torch-python PATH [--lengths 512 2048] [--pairs 5]

Both read [noisy | clean] of one document, run the head at masked positions alone, clip, and step AdamW, in float32.
PyTorch's side is torch_peer.py: scaled_dot_product_attention with the dense mask, everything else plain.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp

from benchmarks.timing import TorchPeer, compare
from sdar_jax import ModelConfig
from sdar_jax.model import Model, stack_layers
from sdar_jax.objectives import Batch, ObjectiveConfig, make_inputs
from sdar_jax.training.config import OptimizerConfig
from sdar_jax.training.optimizer import adamw, learning_rate
from sdar_jax.training.step import initial_state, make_step, model_weights
from sdar_jax.weighted_loss import training_loss

# For PyTorch; `our_step` gives the same to a ModelConfig.
NETWORK = {
    "vocab_size": 32000,
    "hidden": 768,
    "layers": 12,
    "ffn": 2048,
    "heads": 12,
    "kv_heads": 12,
    "head_dim": 64,
}
BLOCK_SIZE = 4
MASK = NETWORK["vocab_size"] - 1


def our_step(length: int):
    """A function of nothing that takes the next step, and the number of weights."""
    config = ModelConfig(
        vocab_size=NETWORK["vocab_size"],
        hidden_size=NETWORK["hidden"],
        num_layers=NETWORK["layers"],
        intermediate_size=NETWORK["ffn"],
        num_heads=NETWORK["heads"],
        num_kv_heads=NETWORK["kv_heads"],
        head_dim=NETWORK["head_dim"],
        qk_norm=True,
        objective="block_diffusion",
        block_size=BLOCK_SIZE,
        mask_token_id=MASK,
    )
    objective, optimizer = ObjectiveConfig(), adamw(OptimizerConfig())
    weights, rebuild = model_weights(stack_layers(Model(config, jax.random.key(0))))
    count = sum(weight.size for weight in weights.values())
    step = make_step(
        lambda batch, key: make_inputs(batch, key, objective, config),
        partial(training_loss, config=objective),
        rebuild,
        optimizer,
        learning_rate(OptimizerConfig(), 1000),
    )
    state = initial_state(optimizer, weights, jax.random.key(1), averaged=False)
    tokens = jax.random.randint(jax.random.key(2), (1, length), 0, MASK)
    batch = Batch(tokens, jnp.ones_like(tokens), jnp.ones(tokens.shape, bool))

    def run_once():
        nonlocal state
        state, metrics = step(state, batch)
        return state, metrics

    return run_once, count


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch-python", required=True, help="a Python that has torch")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    for length in args.lengths:
        step, weights = our_step(length)
        work = {
            "length": length,
            "block_size": BLOCK_SIZE,
            "batch": 1,
            "mask_token_id": MASK,
            **NETWORK,
        }
        with TorchPeer(args.torch_python, "training_step", **work) as peer:
            ratio = compare(step, lambda peer=peer: peer.run().seconds, args.pairs)
        print(f"L = {length}, {weights / 1e6:.0f}M weights: {ratio}", flush=True)


if __name__ == "__main__":
    main()
