"""FLOPs that a training step needs; their share of a device's peak is the MFU (arXiv 2204.02311, appendix B)."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from sdar_jax.model.config import ModelConfig
from sdar_jax.objectives import LossInputs
from sdar_jax.visibility import Ranges


class ReadCounts(NamedTuple):
    """The work that layers are given. Float32 scalars.

    Attributes:
        positions: positions that belong to a document.
        outputs: those of them whose final state is used.
        pairs: pairs of a query and a key that it sees.
        output_pairs: those of them whose query is an output.
    """

    positions: Float[Array, ""]
    outputs: Float[Array, ""]
    pairs: Float[Array, ""]
    output_pairs: Float[Array, ""]


class TokenCounts(NamedTuple):
    """The work that a batch gives the network. Float32 scalars.

    Attributes:
        positions, outputs, pairs, output_pairs: as `ReadCounts` has them.
        num_loss_tokens: tokens that the head predicts.
        teacher: of the teacher's forward; None without one.
    """

    positions: Float[Array, ""]
    outputs: Float[Array, ""]
    pairs: Float[Array, ""]
    output_pairs: Float[Array, ""]
    num_loss_tokens: Float[Array, ""]
    teacher: ReadCounts | None = None


def count_tokens(inputs: LossInputs) -> TokenCounts:
    """Counts what is really there: padding, unused noisy positions and keys that nobody sees are not counted."""
    outputs = inputs.targets.shape[1]
    teacher = inputs.teacher
    return TokenCounts(
        *_count_reads(inputs.ranges, outputs),
        num_loss_tokens=jnp.count_nonzero(inputs.weights).astype(jnp.float32),
        teacher=None if teacher is None else _count_reads(teacher.ranges, outputs),
    )


def _count_reads(ranges: Ranges, outputs: int) -> ReadCounts:
    visible_keys = (ranges.end - ranges.start).sum(axis=-1).astype(jnp.float32)
    in_document = (visible_keys > 0).astype(jnp.float32)
    return ReadCounts(
        positions=in_document.sum(),
        outputs=in_document[:, :outputs].sum(),
        pairs=visible_keys.sum(),
        output_pairs=visible_keys[:, :outputs].sum(),
    )


def training_flops(config: ModelConfig, counts: TokenCounts, *, frozen: bool = False) -> float:
    """Computes forward and backward FLOPs: 6 per matmul weight and position, 12 K per query head and visible pair.

        6 [ weights of all layers but the last + kv_weights ] positions
        + 6 (weights of the last - kv_weights) outputs
        + 6 D V num_loss_tokens + 12 H K [ (layers - 1) pairs + output_pairs ]

    In the last layer, positions that are no outputs (the clean copy of the hybrid layout) need keys and values alone.
    Of an MoE's layers the experts that a token goes to are counted, shared ones too, and the router. What `remat`
    computes again is not. Of `frozen` weights (LoRA) there are no gradients: 4 in place of each 6; low-rank products
    beside them are left out. A teacher's forward adds a third of all that its own positions, pairs and head would.
    """
    learned = 4 if frozen else 6
    asked = float(counts.num_loss_tokens)
    flops = _flops(config, counts, asked, per_weight=learned, per_pair=12)
    if counts.teacher is not None:
        flops += _flops(config, counts.teacher, asked, per_weight=2, per_pair=4)
    return flops


def _flops(
    config: ModelConfig,
    counts: ReadCounts | TokenCounts,
    num_loss_tokens: float,
    *,
    per_weight: int,
    per_pair: int,
) -> float:
    c = config
    kv_weights = 2 * c.hidden_size * c.num_kv_heads * c.head_dim
    other_weights = [_other_weights(c, layer) for layer in range(c.num_layers)]
    inner_layers = c.num_layers - 1
    weights_of_positions = c.num_layers * kv_weights + sum(other_weights[:-1])
    matmuls = weights_of_positions * float(counts.positions)
    matmuls += other_weights[-1] * float(counts.outputs)
    head = c.hidden_size * c.vocab_size * num_loss_tokens
    pairs = inner_layers * float(counts.pairs) + float(counts.output_pairs)
    return per_weight * (matmuls + head) + per_pair * c.num_heads * c.head_dim * pairs


def _other_weights(c: ModelConfig, layer: int) -> int:
    """Counts a layer's matmul weights that a token meets, but those of keys and values."""
    width, router = c.intermediate_size, 0
    if c.has_experts(layer):
        width = (c.num_experts_per_token + c.num_shared_experts) * c.moe_intermediate_size
        router = c.num_experts
    return c.hidden_size * (2 * c.num_heads * c.head_dim + 3 * width + router)
