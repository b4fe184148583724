"""Held-out likelihood: the diffusion bound and the autoregressive exact value, in nats per token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from sdar_jax.corruption import CorruptionConfig, corrupt
from sdar_jax.devices.sharding import activate_mesh, mesh_of
from sdar_jax.errors import ConfigError, DataError, is_int
from sdar_jax.model import Model
from sdar_jax.model.config import ModelConfig
from sdar_jax.objectives import (
    Batch,
    diffusion_inputs,
    next_token_inputs,
    origin_of,
    predicted,
    score_tokens,
)

Tokens = Int[Array | np.ndarray, "B L"]
Mask = Bool[Array | np.ndarray, "B L"]

# Exactly k ~ U{1..n} of a block's n tokens, weight n / k: the integral over t in (0, 1] done in closed form, so nothing
# is clipped, and at S = 1 nothing is random.
_BOUND = CorruptionConfig(level="block", mask="exact", draw="stratified", at_least_one=False)


def nelbo(
    model: Model,
    tokens: Tokens,
    *,
    block_size: int | None,
    segment_ids: Tokens | None = None,
    loss_mask: Mask | None = None,
    samples: int = 8,
    seed: int = 0,
) -> tuple[float, float]:
    """Estimates the negative evidence lower bound of block diffusion (Eq. 7), by Monte Carlo over masks.

    Its expectation is sum over k = 1..S of 1 / (k C(S, k)) times the sum over masks M of size k of CE over M, which at
    S = 1 is the model's in-place chain-rule NLL.

    Args:
        tokens: int32 [B, L], clean.
        block_size: S; None bounds masked diffusion instead (Eq. 5): a document is one block, all of it in sight.
        segment_ids: int32 [B, L], > 0 in each document, 0 for padding; None: a row is one document.
        loss_mask: bool [B, L], the tokens that are masked and counted; None: all but padding.
        samples: independent estimates, at least 2 (for the error).
        seed: fixes the masks.

    Returns:
        (nats per counted token, standard error of that Monte Carlo estimate for these tokens). A shifted model's first
        token of a document is predicted by nothing and not counted.

    Raises:
        ConfigError: no mask token, fewer than 2 samples, or no token to count. DataError: shapes that differ, or a
            token that is not in the vocabulary.
    """
    if model.config.mask_token_id is None:
        raise ConfigError("nelbo needs mask_token_id and the model has none; set it")
    if not is_int(samples) or samples < 2:
        raise ConfigError(
            f"samples is {samples!r}; give at least 2, so that there is a standard error"
        )
    batch = _batch(model.config, tokens, segment_ids, loss_mask)
    count = _count(predicted(model.config.with_blocks(block_size), batch))
    key = jax.random.key(seed)
    with activate_mesh(mesh_of(model)):
        sums = [
            _bound(model, batch, jax.random.fold_in(key, i), block_size) for i in range(samples)
        ]
    estimates = np.array(sums, np.float64) / count
    # From the first: estimates that are all equal then have an error of zero, where their mean would leave a rounding.
    apart = estimates - estimates[0]
    return float(estimates[0] + apart.mean()), float(apart.std(ddof=1) / np.sqrt(samples))


def autoregressive_nll(
    model: Model,
    tokens: Tokens,
    *,
    segment_ids: Tokens | None = None,
    loss_mask: Mask | None = None,
) -> float:
    """Computes the exact next-token NLL (Eq. 3) in nats per token, without the first of a document, which nothing
    predicts.

    Arguments as for `nelbo`.
    """
    batch = _batch(model.config, tokens, segment_ids, loss_mask)
    with activate_mesh(mesh_of(model)):
        total, count = _exact(model, batch)
    return float(total) / _count(count)


def _batch(
    config: ModelConfig, tokens: Tokens, segment_ids: Tokens | None, loss_mask: Mask | None
) -> Batch:
    tokens = jnp.asarray(tokens, jnp.int32)
    segment_ids = (
        jnp.ones_like(tokens) if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
    )
    mask = jnp.ones_like(tokens, bool) if loss_mask is None else jnp.asarray(loss_mask, bool)
    if tokens.ndim != 2 or not tokens.shape == segment_ids.shape == mask.shape:
        shapes = (
            f"tokens {tokens.shape}, segment_ids {segment_ids.shape} and loss_mask {mask.shape}"
        )
        raise DataError(f"{shapes} do not fit; give [rows, length] for each")
    wrong = (tokens < 0) | (tokens >= config.vocab_size)
    if wrong.any():
        raise DataError(
            f"tokens hold id {tokens[wrong][0]}; the vocabulary is 0 to {config.vocab_size - 1}"
        )
    return Batch(tokens, segment_ids, mask & (segment_ids > 0))


def _count(counted: Array) -> float:
    total = float(counted.sum())
    if total == 0:
        raise ConfigError(
            "no token is counted: loss_mask and segment_ids leave none; give at least one"
        )
    return total


@partial(jax.jit, static_argnames="block_size")
def _bound(model: Model, batch: Batch, key: jax.Array, block_size: int | None) -> Array:
    paradigm = model.config.with_blocks(block_size)
    origin = origin_of(paradigm, batch)
    corrupted = corrupt(
        batch.segment_ids, batch.loss_mask, key, _BOUND, block_size=block_size, origin=origin
    )
    noisy = jnp.where(corrupted.masked, jnp.int32(_mask_id(model.config)), batch.tokens)
    total, _ = score_tokens(
        model, diffusion_inputs(paradigm, batch, noisy, corrupted.weights, origin)
    )
    return total


def _mask_id(config: ModelConfig) -> int:
    assert config.mask_token_id is not None
    return config.mask_token_id


@jax.jit
def _exact(model: Model, batch: Batch) -> tuple[Array, Array]:
    inputs = next_token_inputs(batch)
    return score_tokens(model, inputs)[0], inputs.normalizer
