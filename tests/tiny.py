"""Small random models and packed rows for every room's tests."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax.typing import DTypeLike

from sdar_jax import ModelConfig
from sdar_jax.model import Model
from sdar_jax.model.config import RopeConfig

VOCAB = 23
MASK = VOCAB - 1


@cache
def tiny_model(dtype: DTypeLike = jnp.float64, *, seed: int = 1, **changes) -> Model:
    """Two layers, grouped queries. Wide weights make sharp and varied distributions, so that thresholds are crossed."""
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_layers": 2,
        "num_heads": 4,
    }
    fields |= {
        "num_kv_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.5,
        "block_size": 4,
        "mask_token_id": MASK,
    }
    fields |= {"objective": "block_diffusion"}
    # Cached: a first call from inside a trace must not keep its tracers, nor one without float64 do without it.
    with jax.ensure_compile_time_eval(), _with(dtype):
        return Model(ModelConfig(**(fields | changes)), jax.random.key(seed), dtype)


def _with(dtype: DTypeLike) -> AbstractContextManager[object]:
    return jax.enable_x64(True) if jnp.dtype(dtype) == jnp.float64 else nullcontext()


def pack(*rows: Sequence[int], length: int) -> np.ndarray:
    """segment_ids [rows, length] from the lengths of each row's documents; a negative one is padding."""
    packed = np.zeros((len(rows), length), np.int32)
    for row, runs in enumerate(rows):
        at = 0
        for number, run in enumerate(runs, 1):
            packed[row, at : at + abs(run)] = number if run > 0 else 0
            at += abs(run)
    return packed


def padded(stops: Sequence[int] = ()) -> tuple[int, ...]:
    """Four stop tokens, the mask among them, which is never emitted: tests whose decoding has one shape compile once.

    That shape is a batch of four, or of one, of `tiny_model()` in float64, with these stops.
    """
    return (*stops, *[MASK] * (4 - len(stops)))


@cache
def tiny_moe(dtype: DTypeLike = jnp.float64, **changes) -> Model:
    """As `tiny_model`, with two of five experts for a token."""
    experts = {
        "architecture": "qwen3_moe",
        "num_experts": 5,
        "num_experts_per_token": 2,
        "moe_intermediate_size": 12,
    }
    return tiny_model.__wrapped__(dtype, **(experts | changes))


# A dense layer and two of experts: two of eight, in two of four groups, and a shared one.
LLADA2 = {
    "architecture": "llada2_moe",
    "num_layers": 3,
    "rope": RopeConfig(partial_rotary_factor=0.5),
    "num_experts": 8,
    "num_experts_per_token": 2,
    "moe_intermediate_size": 12,
    "num_dense_layers": 1,
    "num_shared_experts": 1,
    "score_function": "sigmoid",
    "num_expert_groups": 4,
    "groups_per_token": 2,
    "routed_scaling_factor": 2.5,
    "router_aux_loss_coef": 0.0,
}


@cache
def tiny_llada2(dtype: DTypeLike = jnp.float64, **changes) -> Model:
    """As `tiny_model`, of the shape `LLADA2`, with biases of experts as large as scores differ."""
    model = tiny_model.__wrapped__(dtype, **(LLADA2 | changes))
    with jax.ensure_compile_time_eval(), _with(dtype):
        for i, layer in enumerate(model.layers):
            if layer.expert_bias is not None:
                layer.expert_bias[...] = 0.3 * jax.random.normal(jax.random.key(i), (8,), dtype)
    return model


@st.composite
def segment_rows(draw, rows: int, length: int) -> np.ndarray:
    """Packed rows: documents and padding of any lengths, in any order, under any ids that tell neighbours apart."""
    packed = np.zeros((rows, length), np.int32)
    for row in packed:
        at, previous = 0, None
        while at < length:
            run = draw(st.integers(1, length - at))
            previous = draw(
                st.integers(0, 5).filter(lambda number, previous=previous: number != previous)
            )
            row[at : at + run] = previous
            at += run
    return packed
