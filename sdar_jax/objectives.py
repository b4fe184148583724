"""Objectives as data: each one turns a clean batch into an `Example`, and one function computes every loss.

    loss = sum_i w_i CE_i / N

What N counts is a named choice; the sum and N are added up over all micro-batches and devices and divided once.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sdar_jax import visibility
from sdar_jax.corruption import CorruptionConfig, corrupt
from sdar_jax.errors import ConfigError, is_number
from sdar_jax.experts import RouterSums, balance_loss, max_load, z_loss
from sdar_jax.losses import TokenScores, linear_cross_entropy, loss_sharding
from sdar_jax.model import Model, Remat
from sdar_jax.model.config import ModelConfig
from sdar_jax.paradigm import Paradigm
from sdar_jax.visibility import Ranges


class Batch(NamedTuple):
    """Packed clean rows.

    tokens: int32 [B, L]. segment_ids: int32 [B, L], > 0 and contiguous a document, 0 for padding. loss_mask: bool
    [B, L], the tokens that are learned. noisy_index: int32 [B, Ln] or None: which positions get a noisy copy: whole
    blocks, ascending, -1 for unused at the end.
    """

    tokens: Int[Array, "B L"]
    segment_ids: Int[Array, "B L"]
    loss_mask: Bool[Array, "B L"]
    noisy_index: Int[Array, "B N"] | None = None


class Example(NamedTuple):
    """What the network reads and is asked. The first N of its T positions are the outputs.

    inputs, positions: int32 [B, T]. ranges: of the T positions. targets: int32 [B, N]. weights: float32 [B, N], zero
    where nothing is asked. count: float32 [B], each row's share of the normaliser.
    """

    inputs: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    ranges: Ranges
    targets: Int[Array, "B N"]
    weights: Float[Array, "B N"]
    count: Float[Array, " B"]


class RouterMetrics(NamedTuple):
    """A mixture's balance loss, z-loss and `max_load`, each times the examples' count. Float32 scalars."""

    balance: Float[Array, ""]
    z: Float[Array, ""]
    max_load: Float[Array, ""]


class LossMetrics(NamedTuple):
    """Sums over the asked tokens, float32 scalars: cross-entropy in nats, right first guesses, and how many.

    router: None for dense models, and where it is not asked for.
    """

    nll: Float[Array, ""]
    correct: Float[Array, ""]
    asked: Float[Array, ""]
    router: RouterMetrics | None = None


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is learned, and how it is averaged.

    Attributes:
        corruption: what diffusion masks; nothing for AR.
        normalizer: N: "response" counts the eligible tokens (SDAR), "masked" the masked ones, "weights" adds up w.
        router_balance: coefficient of a mixture's balance loss; its model's `router_aux_loss_coef` if None.
        router_z: of the router's z-loss.
    """

    corruption: CorruptionConfig = CorruptionConfig()
    normalizer: Literal["response", "masked", "weights"] = "response"
    router_balance: float | None = None
    router_z: float = 0.0

    def __post_init__(self):
        if self.normalizer not in ("response", "masked", "weights"):
            raise ConfigError(f"normalizer {self.normalizer!r} is unknown; use 'response', 'masked' or 'weights'")
        for name in ("router_balance", "router_z"):
            value = getattr(self, name)
            if value is not None and (not is_number(value) or value < 0):
                raise ConfigError(f"{name} is {value!r}; give a number >= 0")


def check_objective(model: ModelConfig) -> None:
    """Raises ConfigError when a model lacks what its objective needs."""
    if model.paradigm.masks and model.mask_token_id is None:
        raise ConfigError(f"objective {model.objective!r} needs mask_token_id and the model has none; set it")


def make_example(batch: Batch, key: jax.Array, config: ObjectiveConfig, model: ModelConfig) -> Example:
    """The batch as the model's own paradigm asks it (Eq. 3, 5 or 7); `key` draws the corruption.

    Called on the whole batch of a step, before it is split into micro-batches.

    Raises:
        ConfigError: the model lacks what its objective needs, or noisy_index is given where it cannot be used.
    """
    check_objective(model)
    paradigm = model.paradigm
    check_copies(paradigm, batch.noisy_index is not None)
    if not paradigm.masks:
        return next_token_example(batch)
    origin = origin_of(paradigm, batch)
    options = {"block_size": model.block_size, "origin": origin}
    corrupted = corrupt(batch.segment_ids, batch.loss_mask, key, config.corruption, **options)
    if config.corruption.complementary:
        batch, origin = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), (batch, origin))
    noisy = jnp.where(corrupted.masked, jnp.int32(model.mask_token_id), batch.tokens)
    noisy, weights = (_take(x, batch.noisy_index) for x in (noisy, corrupted.weights))
    example = diffusion_example(paradigm, batch, noisy, weights, origin)
    return example._replace(count=_count(example.weights, paradigm, batch, config.normalizer))


def check_copies(paradigm: Paradigm, indexed: bool) -> None:
    """Raises ConfigError where only some positions are to have noisy copies and the model's others need theirs."""
    if indexed and not paradigm.two_copies:
        raise ConfigError("noisy_length is set and the model reads no noisy copy beside a clean one; leave it out")
    if indexed and paradigm.shifted:
        raise ConfigError(
            "noisy_length is set and the model is shifted: a block's first token is predicted by the noisy copy of the "
            "token before it, which may have none; leave noisy_length out"
        )
    if indexed and paradigm.origin != "sequence":
        raise ConfigError(
            "noisy_length is set and the model's blocks start at the response; noisy copies are only chosen for blocks "
            "that start with the sequence: leave noisy_length out"
        )


def next_token_example(batch: Batch) -> Example:
    """Next-token prediction within each document (Eq. 3)."""
    segment_ids, learned = batch.segment_ids, batch.loss_mask.astype(jnp.float32)
    positions = visibility.segments(segment_ids).positions
    targets, weights = _predicted_before(segment_ids, batch.tokens, learned)
    return Example(batch.tokens, positions, visibility.causal(segment_ids), targets, weights, weights.sum(axis=1))


def diffusion_example(
    paradigm: Paradigm,
    batch: Batch,
    noisy_tokens: Int[Array, "B N"],
    weights: Float[Array, "B N"],
    origin: Int[Array, "B L"] | None = None,
) -> Example:
    """Prediction of what is masked in `noisy_tokens`, weighted, as the paradigm reads it.

    With blocks, in the hybrid layout [noisy | clean] (Eq. 7); without, in the noisy copy alone, every key of the
    document in sight (Eq. 5). In place, or shifted: by the position before, in the noisy copy, within the document.

    Args:
        origin: where each document's response starts, if blocks are counted from there (`visibility.block_bounds`).
    """
    segment_ids, noisy_index = batch.segment_ids, batch.noisy_index
    positions = visibility.segments(segment_ids).positions
    targets = _take(batch.tokens, noisy_index)
    weights = weights if noisy_index is None else jnp.where(noisy_index >= 0, weights, 0)
    if paradigm.shifted:
        targets, weights = _predicted_before(segment_ids, targets, weights)
    count = weights.sum(axis=1)
    if not paradigm.two_copies:
        return Example(noisy_tokens, positions, visibility.bidirectional(segment_ids), targets, weights, count)
    ranges = visibility.hybrid(
        segment_ids,
        paradigm.block_size,
        noisy_index,
        origin=origin,
        whole_prompt=paradigm.bidirectional_prompt,
        causal_clean=paradigm.causal_clean,
    )
    inputs = jnp.concatenate([noisy_tokens, batch.tokens], axis=1)
    positions = jnp.concatenate([_take(positions, noisy_index), positions], axis=1)
    return Example(inputs, positions, ranges, targets, weights, count)


def origin_of(paradigm: Paradigm, batch: Batch) -> Int[Array, "B L"] | None:
    """Where blocks are counted from, if not from each document's start."""
    if paradigm.origin == "sequence":
        return None
    return visibility.response_start(batch.segment_ids, batch.loss_mask)


def predicted(paradigm: Paradigm, batch: Batch) -> Float[Array, "B L"]:
    """1 where a learned token is predicted, else 0: in the token's place, or of a shifted model in the place before."""
    learned = (batch.loss_mask & (batch.segment_ids > 0)).astype(jnp.float32)
    return _predicted_before(batch.segment_ids, learned, learned)[1] if paradigm.shifted else learned


def _predicted_before(segment_ids: Array, targets: Array, weights: Array) -> tuple[Array, Array]:
    """What each position predicts of the next, and how much that weighs: nothing at a document's last."""
    shift = lambda x: jnp.pad(x[:, 1:], [(0, 0), (0, 1)])
    same = (shift(segment_ids) == segment_ids) & (segment_ids > 0)
    return shift(targets), jnp.where(same, shift(weights), 0)


def training_loss(
    model: Model,
    example: Example,
    config: ObjectiveConfig,
    *,
    remat: Remat = "none",
    compute_dtype: DTypeLike | None = None,
) -> tuple[Float[Array, ""], LossMetrics]:
    """`weighted_loss`, for a mixture plus the sum of `example.count` times the router's losses.

    Divided by the sum of counts, a step of one micro-batch has exactly the router's losses on it, and a step of several
    their mean weighted by count: they are functions of a micro-batch's statistics, and do not add up as tokens do.
    """
    total, scores, routing = _scored(model, example, remat=remat, compute_dtype=compute_dtype)
    metrics = _metrics(scores, example)
    if routing is None:
        return total, metrics
    balance, z, count = balance_loss(routing), z_loss(routing), example.count.sum()
    coefficient = model.config.router_aux_loss_coef if config.router_balance is None else config.router_balance
    router = RouterMetrics(*((count * x).astype(jnp.float32) for x in (balance, z, max_load(routing))))
    return total + count * (coefficient * balance + config.router_z * z), metrics._replace(router=router)


def weighted_loss(
    model: Model, example: Example, *, remat: Remat = "none", compute_dtype: DTypeLike | None = None
) -> tuple[Float[Array, ""], LossMetrics]:
    """sum_i w_i CE_i over an example, float32, and its metrics. Divide by the sum of `example.count`."""
    total, scores = score_tokens(model, example, remat=remat, compute_dtype=compute_dtype)
    return total, _metrics(scores, example)


def score_tokens(model: Model, example: Example, **options) -> tuple[Float[Array, ""], TokenScores]:
    """As `weighted_loss`, with the score of each of the [B, N] outputs instead of their sums."""
    return _scored(model, example, **options)[:2]


def _scored(model: Model, example: Example, **options) -> tuple[Array, TokenScores, RouterSums | None]:
    read = example.inputs, example.positions, example.ranges
    hidden, routing = model.hidden_and_routing(*read, outputs=example.targets.shape[1], **options)
    head, vocab_axis = model.output_weights()
    split = loss_sharding(example.targets.shape, head.shape, vocab_axis)
    asked = hidden, head, example.targets, example.weights
    return *linear_cross_entropy(*asked, vocab_axis=vocab_axis, sharding=split), routing


def _metrics(scores: TokenScores, example: Example) -> LossMetrics:
    sums = scores.nll.sum(), scores.correct.sum(), jnp.count_nonzero(example.weights)
    nll, correct, asked = (x.astype(jnp.float32) for x in sums)
    return LossMetrics(nll, correct, asked)


def block_diffusion_loss(
    model: Model,
    tokens: Int[Array | np.ndarray, "B L"],
    noisy_tokens: Int[Array | np.ndarray, "B N"],
    weights: Float[Array | np.ndarray, "B N"],
    *,
    block_size: int,
    segment_ids: Int[Array | np.ndarray, "B L"] | None = None,
    noisy_index: Int[Array | np.ndarray, "B N"] | None = None,
    loss_mask: Bool[Array | np.ndarray, "B L"] | None = None,
) -> Float[Array, ""]:
    """Sum of weights * CE over the hybrid layout (Eq. 7); divide by what you mean to.

    What else the model's paradigm says holds: a shifted model predicts each token at the noisy position before it.

    Args:
        tokens: int32 [B, L], clean.
        noisy_tokens: int32 [B, Ln], the copy with masks; Ln = L unless `noisy_index` is given.
        weights: float32 [B, Ln]; zero where there is no loss.
        segment_ids: int32 [B, L], > 0 and contiguous a document, 0 for padding; None: a row is one document.
        noisy_index: int32 [B, Ln], the clean position of each noisy one, ascending, -1 for unused at the end.
        loss_mask: bool [B, L], the response, for a model whose blocks start at its first token; None: all of it.

    Raises:
        ConfigError: shapes that do not fit, or noisy_index with a paradigm that cannot use it.
    """
    tokens, noisy_tokens = jnp.asarray(tokens, jnp.int32), jnp.asarray(noisy_tokens, jnp.int32)
    segment_ids = jnp.ones_like(tokens) if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
    noisy_index = None if noisy_index is None else jnp.asarray(noisy_index, jnp.int32)
    weights = jnp.asarray(weights)
    loss_mask = jnp.ones_like(tokens, bool) if loss_mask is None else jnp.asarray(loss_mask, bool)
    _check_fit("tokens", tokens, segment_ids=segment_ids, loss_mask=loss_mask)
    if noisy_index is None and noisy_tokens.shape != tokens.shape:
        raise ConfigError(f"noisy_tokens {noisy_tokens.shape} differs from tokens {tokens.shape}; give noisy_index")
    _check_fit("noisy_tokens", noisy_tokens, weights=weights, noisy_index=noisy_index)
    paradigm = model.config.with_blocks(block_size)
    batch = Batch(tokens, segment_ids, loss_mask, noisy_index)
    check_copies(paradigm, noisy_index is not None)
    example = diffusion_example(paradigm, batch, noisy_tokens, weights, origin_of(paradigm, batch))
    return weighted_loss(model, example)[0]


def _check_fit(name: str, array: Array, **others: Array | None) -> None:
    for other, value in others.items():
        if value is not None and value.shape != array.shape:
            raise ConfigError(f"{other} is of shape {value.shape}, {name} of {array.shape}; give both one shape")


def _take(x: Array, noisy_index: Array | None) -> Array:
    """x [B, L] at the clean position of each noisy one; zero where unused."""
    if noisy_index is None:
        return x
    return jnp.where(noisy_index >= 0, jnp.take_along_axis(x, jnp.maximum(noisy_index, 0), axis=1), 0)


def _count(weights: Array, paradigm: Paradigm, batch: Batch, normalizer: str) -> Array:
    if normalizer == "weights":
        return weights.sum(axis=1)
    if normalizer == "masked":
        return (weights != 0).sum(axis=1).astype(jnp.float32)
    return predicted(paradigm, batch).sum(axis=1)
