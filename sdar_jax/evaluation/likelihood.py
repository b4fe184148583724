"""Held-out likelihood: the diffusion bound and the autoregressive exact value, in nats per token."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from sdar_jax.corruption import Corrupted, CorruptionConfig, corrupt
from sdar_jax.devices.sharding import activate_mesh, mesh_of
from sdar_jax.errors import ConfigError, DataError, is_int
from sdar_jax.model import Model
from sdar_jax.model.config import ModelConfig
from sdar_jax.objectives import (
    Batch,
    LossInputs,
    diffusion_inputs,
    next_token_inputs,
    origin_of,
    predicted,
)
from sdar_jax.paradigm import Paradigm
from sdar_jax.weighted_loss import score_tokens

Tokens = Int[Array | np.ndarray, "B L"]
Mask = Bool[Array | np.ndarray, "B L"]

# Exactly k ~ U{1..n} of a block's n tokens, weight n / k: the integral over t in (0, 1] done in closed form, so nothing
# is clipped, and at S = 1 nothing is random.
_BOUND = CorruptionConfig(level="block", mask="exact", draw="stratified", at_least_one=False)


class Groups(NamedTuple):
    """Tokens told apart, to see what each kind adds to a likelihood.

    Attributes:
        labels: int [B, L], each token's group, 0 to size - 1.
        size: how many groups there are.
    """

    labels: Tokens
    size: int


class Likelihood(NamedTuple):
    """The bound or the exact value for some rows; the groups' sums add up to count * mean.

    Attributes:
        count: how many tokens are counted.
        mean: nats per counted token.
        error: the standard error of a Monte Carlo estimate for these tokens; 0 of an exact value.
        group_nats: float64 [G], the sum over each group's tokens.
        group_counts: float64 [G].
    """

    count: float
    mean: float
    error: float
    group_nats: Float[np.ndarray, " G"]
    group_counts: Float[np.ndarray, " G"]


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
    found = bound(model, batch, block_size=block_size, samples=samples, seed=seed)
    return found.mean, found.error


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
    return exact(model, _batch(model.config, tokens, segment_ids, loss_mask)).mean


def bound(
    model: Model,
    batch: Batch,
    *,
    block_size: int | None,
    samples: int,
    seed: int,
    groups: Groups | None = None,
) -> Likelihood:
    """Estimates `nelbo`, and what groups of tokens add to it; of a shifted model each token is in its own group, and
    not in that of the place that predicts it.

    Raises:
        ConfigError: no token to count.
    """
    labels, size = _labels(groups, batch)
    key = jax.random.key(seed)
    with activate_mesh(mesh_of(model)):
        counts = _group_counts(model.config.with_blocks(block_size), batch, labels, size)
        drawn = [
            _bound(model, batch, jax.random.fold_in(key, i), labels, block_size, size)
            for i in range(samples)
        ]
    count = _count(counts)
    estimates = np.array([total for total, _ in drawn], np.float64) / count
    # From the first: estimates that are all equal then have an error of zero, where their mean would leave a rounding.
    apart = estimates - estimates[0]
    return Likelihood(
        count=count,
        mean=float(estimates[0] + apart.mean()),
        error=float(apart.std(ddof=1) / np.sqrt(samples)),
        group_nats=np.array([sums for _, sums in drawn], np.float64).mean(axis=0),
        group_counts=np.asarray(counts, np.float64),
    )


def exact(model: Model, batch: Batch, groups: Groups | None = None) -> Likelihood:
    """Computes `autoregressive_nll`, and what groups of tokens add to it. Raises ConfigError: no token to count."""
    labels, size = _labels(groups, batch)
    with activate_mesh(mesh_of(model)):
        total, sums, counts = _exact(model, batch, labels, size)
    count = _count(counts)
    nats, each = (np.asarray(x, np.float64) for x in (sums, counts))
    return Likelihood(count, float(total) / count, 0.0, nats, each)


def log_likelihoods(
    model: Model,
    tokens: Tokens,
    *,
    segment_ids: Tokens,
    loss_mask: Mask,
    block_size: int | None = None,
    samples: int = 32,
    seed: int = 0,
) -> Float[np.ndarray, " B"]:
    """Estimates log p of the counted tokens of each row, nats: an AR model's own, of a diffusion model minus `nelbo`.

    The masks of a row depend on its own tokens alone, and not on other rows or on the padding that follows: they are
    those of `nelbo` for that row. A row without counted tokens has 0. Arguments as for `nelbo`.
    """
    batch = _batch(model.config, tokens, segment_ids, loss_mask)
    with activate_mesh(mesh_of(model)):
        if not model.config.paradigm.masks:
            found = _exact_by_row(model, batch)
        else:
            # Blocks of one token are all masked: nothing is random.
            number = jnp.arange(1 if block_size == 1 else samples)
            keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(number)
            found = _bound_by_row(model, batch, keys, block_size)
    return -np.asarray(found, np.float64)


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


def _labels(groups: Groups | None, batch: Batch) -> tuple[Array, int]:
    """Returns labels on the device and the number of groups: one of all tokens if none are given."""
    if groups is None:
        return jnp.zeros_like(batch.tokens), 1
    return jnp.asarray(groups.labels, jnp.int32), groups.size


def _count(counts: Array) -> float:
    total = float(counts.sum())
    if total == 0:
        raise ConfigError(
            "no token is counted: loss_mask and segment_ids leave none; give at least one"
        )
    return total


@partial(jax.jit, static_argnames=("paradigm", "size"))
def _group_counts(paradigm: Paradigm, batch: Batch, labels: Array, size: int) -> Array:
    no_weights = jnp.zeros(labels.shape)
    targets = diffusion_inputs(paradigm, batch._replace(tokens=labels), labels, no_weights).targets
    return jax.ops.segment_sum(predicted(paradigm, batch).ravel(), targets.ravel(), size)


def _summed(model: Model, inputs: LossInputs, labels: LossInputs, size: int) -> tuple[Array, Array]:
    """Computes the weighted sum of `inputs`, and its part in each group; `labels` has groups for its targets."""
    total, scores = score_tokens(model, inputs)
    each = inputs.weights * scores.nll
    return total, jax.ops.segment_sum(each.ravel(), labels.targets.ravel(), size)


@partial(jax.jit, static_argnames=("block_size", "size"))
def _bound(
    model: Model, batch: Batch, key: jax.Array, labels: Array, block_size: int | None, size: int
) -> tuple[Array, Array]:
    paradigm = model.config.with_blocks(block_size)
    origin = origin_of(paradigm, batch)
    corrupted = corrupt(
        batch.segment_ids, batch.loss_mask, key, _BOUND, block_size=block_size, origin=origin
    )
    noisy = jnp.where(corrupted.masked, jnp.int32(_mask_id(model.config)), batch.tokens)

    def inputs(tokens: Array) -> LossInputs:
        clean = batch._replace(tokens=tokens)
        return diffusion_inputs(paradigm, clean, noisy, corrupted.weights, origin)

    return _summed(model, inputs(batch.tokens), inputs(labels), size)


@partial(jax.jit, static_argnames="block_size")
def _bound_by_row(
    model: Model, batch: Batch, keys: Key[Array, " samples"], block_size: int | None
) -> Float[Array, " B"]:
    paradigm = model.config.with_blocks(block_size)
    origin = origin_of(paradigm, batch)
    rows = batch.segment_ids, batch.loss_mask, origin

    def estimate(key: Array) -> Array:
        def corrupted(*row: Array | None) -> Corrupted:
            segment_ids, loss_mask, origin = (None if x is None else x[None] for x in row)
            assert segment_ids is not None and loss_mask is not None
            drawn = corrupt(
                segment_ids, loss_mask, key, _BOUND, block_size=block_size, origin=origin
            )
            return jax.tree.map(lambda x: x[0], drawn)

        masked, weights = jax.vmap(corrupted)(*rows)
        noisy = jnp.where(masked, jnp.int32(_mask_id(model.config)), batch.tokens)
        return _nll_by_row(model, diffusion_inputs(paradigm, batch, noisy, weights, origin))

    return jax.lax.map(estimate, keys).mean(axis=0)


@jax.jit
def _exact_by_row(model: Model, batch: Batch) -> Float[Array, " B"]:
    return _nll_by_row(model, next_token_inputs(batch))


def _nll_by_row(model: Model, inputs: LossInputs) -> Float[Array, " B"]:
    _, scores = score_tokens(model, inputs)
    return (inputs.weights * scores.nll).sum(axis=1)


def _mask_id(config: ModelConfig) -> int:
    assert config.mask_token_id is not None
    return config.mask_token_id


@partial(jax.jit, static_argnames="size")
def _exact(model: Model, batch: Batch, labels: Array, size: int) -> tuple[Array, Array, Array]:
    inputs, of_labels = (
        next_token_inputs(batch._replace(tokens=x)) for x in (batch.tokens, labels)
    )
    counts = jax.ops.segment_sum(inputs.weights.ravel(), of_labels.targets.ravel(), size)
    return *_summed(model, inputs, of_labels, size), counts
