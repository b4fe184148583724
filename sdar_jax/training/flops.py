"""FLOPs that a training step needs; their share of a device's peak is the MFU (arXiv 2204.02311, appendix B)."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from sdar_jax.model.config import ModelConfig
from sdar_jax.objectives import Example


class Work(NamedTuple):
    """What a batch asks of the network, float32 scalars.

    positions: that belong to a document; outputs: those of them whose final state is used; pairs, output_pairs: of
    query and visible key, for the queries of each; asked: tokens that the head predicts.
    """

    positions: Float[Array, ""]
    outputs: Float[Array, ""]
    pairs: Float[Array, ""]
    output_pairs: Float[Array, ""]
    asked: Float[Array, ""]


def work(example: Example) -> Work:
    """Counted, not assumed: padding, unused noisy positions and invisible keys are no work."""
    outputs = example.targets.shape[1]
    seen = (example.ranges.end - example.ranges.start).sum(axis=-1).astype(jnp.float32)
    real = (seen > 0).astype(jnp.float32)
    asked = jnp.count_nonzero(example.weights).astype(jnp.float32)
    return Work(real.sum(), real[:, :outputs].sum(), seen.sum(), seen[:, :outputs].sum(), asked)


def training_flops(config: ModelConfig, done: Work) -> float:
    """Forward and backward: 6 a matmul weight and position, 12 K a query head and visible pair.

        6 [ (layers - 1) layer_weights + kv_weights ] positions + 6 (layer_weights - kv_weights) outputs
        + 6 D V asked + 12 H K [ (layers - 1) pairs + output_pairs ]

    In the last layer, positions that are no outputs (the clean copy of the hybrid layout) need keys and values alone.
    Of a mixture's layers the experts that a token goes to count, and the router. What `remat` computes again does not.
    """
    c = config
    kv_weights = 2 * c.hidden_size * c.num_kv_heads * c.head_dim
    width = c.num_experts_per_token * c.moe_intermediate_size if c.num_experts else c.intermediate_size
    rest = c.hidden_size * (2 * c.num_heads * c.head_dim + 3 * width + c.num_experts)
    inner, positions, outputs = c.num_layers - 1, float(done.positions), float(done.outputs)
    matmuls = (inner * (kv_weights + rest) + kv_weights) * positions + rest * outputs
    head = c.hidden_size * c.vocab_size * float(done.asked)
    pairs = inner * float(done.pairs) + float(done.output_pairs)
    return 6 * (matmuls + head) + 12 * c.num_heads * c.head_dim * pairs
