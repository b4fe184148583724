"""The weighted loss of `LossInputs`: the network, the fused head walk, and what is added to the cross-entropy."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sdar_jax.distillation import teacher_outputs
from sdar_jax.errors import ConfigError
from sdar_jax.experts import RouterSums, balance_loss, max_load, z_loss
from sdar_jax.groups import check_groups
from sdar_jax.loss_metrics import LossMetrics, RouterMetrics, StepTotals
from sdar_jax.losses import TokenScores, linear_cross_entropy, loss_sharding
from sdar_jax.model import Model, Remat
from sdar_jax.objectives import (
    Batch,
    LossInputs,
    ObjectiveConfig,
    check_copies,
    diffusion_inputs,
    origin_of,
)


def training_loss(
    model: Model,
    inputs: LossInputs,
    config: ObjectiveConfig,
    *,
    totals: StepTotals | None = None,
    teacher: Model | None = None,
    remat: Remat = "none",
    compute_dtype: DTypeLike | None = None,
) -> tuple[Float[Array, ""], LossMetrics]:
    """Computes `weighted_loss`, plus N times CAP's entropy, for an MoE plus the sum of `inputs.normalizer` times the
    router's losses.

    The entropy's mean is over a step. With `totals` these are a part of its inputs, and the parts add up to N times
    that mean; with None they are all of them, and right guesses are counted here, by one more walk over the head.

    The router's losses are of a micro-batch: divided by the sum of normalizers, a step of one has exactly its losses,
    and a step of several their mean weighted by normalizer. They are functions of a micro-batch's statistics, and do
    not add up as tokens do.

    With `config.distill`, CE is to the distributions of `teacher`, which reads `inputs.teacher`; metrics stay those of
    the targets.
    """
    beta = config.confidence_beta
    options: dict[str, Any] = {"remat": remat, "compute_dtype": compute_dtype}
    soft: dict[str, Any] = {}
    if config.distill is not None:
        if teacher is None or inputs.teacher is None:
            raise ConfigError(
                "objective.distill is set, and the loss is given no teacher, or inputs that have none; give both"
            )
        outputs = inputs.targets.shape[1]
        soft["teacher"] = teacher_outputs(teacher, inputs.teacher, outputs, **options)
        soft["soft_loss"] = config.distill.loss
    total, scores, routing = _scored(model, inputs, beta, totals, soft, **options)
    metrics = _metrics(scores, inputs)
    if routing is None:
        return total, metrics
    balance = balance_loss(routing)
    z = z_loss(routing)
    normalizer = inputs.normalizer.sum()
    coefficient = (
        model.config.router_aux_loss_coef
        if config.router_balance is None
        else config.router_balance
    )
    router = RouterMetrics(
        balance=(normalizer * balance).astype(jnp.float32),
        z=(normalizer * z).astype(jnp.float32),
        max_load=(normalizer * max_load(routing)).astype(jnp.float32),
    )
    total = total + normalizer * (coefficient * balance + config.router_z * z)
    return total, metrics._replace(router=router)


def weighted_loss(
    model: Model,
    inputs: LossInputs,
    *,
    remat: Remat = "none",
    compute_dtype: DTypeLike | None = None,
) -> tuple[Float[Array, ""], LossMetrics]:
    """Computes sum_i w_i CE_i, a float32 scalar, and its metrics. Divide by the sum of `inputs.normalizer`."""
    total, scores = score_tokens(model, inputs, remat=remat, compute_dtype=compute_dtype)
    return total, _metrics(scores, inputs)


def count_correct(model: Model, inputs: LossInputs, **options) -> Int[Array, ""]:
    """Counts the tokens with a weight whose first guess is right, for `StepTotals`; options as of `weighted_loss`."""
    _, scores = score_tokens(model, inputs, **options)
    return jnp.count_nonzero(scores.correct)


def score_tokens(
    model: Model, inputs: LossInputs, **options
) -> tuple[Float[Array, ""], TokenScores]:
    """Computes `weighted_loss` with the score of each of the [B, N] outputs instead of their sums."""
    total, scores, _ = _scored(model, inputs, **options)
    return total, scores


def _scored(
    model: Model,
    inputs: LossInputs,
    confidence_beta: float = 0.0,
    totals: StepTotals | None = None,
    soft: dict[str, Any] = {},  # noqa: B006 (never changed)
    **options,
) -> tuple[Array, TokenScores, RouterSums | None]:
    hidden, routing = model.hidden_and_routing(
        inputs.tokens,
        inputs.positions,
        inputs.ranges,
        outputs=inputs.targets.shape[1],
        **options,
    )
    head = model.output_weights()
    score = partial(
        linear_cross_entropy,
        targets=inputs.targets,
        weights=inputs.weights,
        vocab_axis=0,
        sharding=loss_sharding(inputs.targets.shape, head.shape, vocab_axis=0),
    )
    entropy_weight = None
    if confidence_beta:
        if totals is None:
            _, found = score(*jax.lax.stop_gradient((hidden, head)))
            totals = StepTotals(inputs.normalizer.sum(), jnp.count_nonzero(found.correct))
        # N over the count: the step divides all by N.
        accumulate = jnp.promote_types(hidden.dtype, jnp.float32)
        ratio = totals.normalizer.astype(accumulate) / jnp.maximum(totals.num_correct, 1)
        entropy_weight = confidence_beta * ratio
    total, scores = score(hidden, head, entropy_weight=entropy_weight, **soft)
    return total, scores, routing


def _metrics(scores: TokenScores, inputs: LossInputs) -> LossMetrics:
    return LossMetrics(
        nll=scores.nll.sum().astype(jnp.float32),
        correct=scores.correct.sum().astype(jnp.float32),
        num_loss_tokens=jnp.count_nonzero(inputs.weights).astype(jnp.float32),
        entropy=None if scores.entropy is None else scores.entropy.sum().astype(jnp.float32),
    )


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
    group_start: Int[Array | np.ndarray, "B L"] | None = None,
) -> Float[Array, ""]:
    """Computes the sum of weights * CE over the hybrid layout (Eq. 7); divide by what you mean to.

    What else the model's paradigm says holds: a shifted model predicts each token at the noisy position before it.

    Args:
        tokens: int32 [B, L], clean.
        noisy_tokens: int32 [B, N], the copy with masks; N = L unless `noisy_index` is given.
        weights: float32 [B, N]; zero where there is no loss.
        segment_ids: int32 [B, L], > 0 and contiguous in each document, 0 for padding; None: a row is one document.
        noisy_index: int32 [B, N], the clean position of each noisy one, ascending, with -1 (unused) only at the end.
        loss_mask: bool [B, L], the response, for a model whose blocks start at its first token; None: all of it.
        group_start: int32 [B, L], the row index of the first position of each position's group of blocks, which starts
            where a block of its document does (MultiTF, arXiv 2606.29215, B.7 to B.9): a noisy block sees the noisy
            copy of its group up to its own end, and the clean copy of what is before the group. With noisy_index, all
            blocks of a group have their copies. None: each block is its own group.

    Raises:
        ConfigError: shapes that do not fit, or noisy_index or group_start with a paradigm that cannot use it.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    noisy_tokens = jnp.asarray(noisy_tokens, jnp.int32)
    weights = jnp.asarray(weights)
    segment_ids = (
        jnp.ones_like(tokens) if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
    )
    loss_mask = jnp.ones_like(tokens, bool) if loss_mask is None else jnp.asarray(loss_mask, bool)
    if noisy_index is not None:
        noisy_index = jnp.asarray(noisy_index, jnp.int32)
    _check_fit("tokens", tokens, segment_ids=segment_ids, loss_mask=loss_mask)
    if noisy_index is None and noisy_tokens.shape != tokens.shape:
        raise ConfigError(
            f"noisy_tokens {noisy_tokens.shape} differs from tokens {tokens.shape}; give noisy_index"
        )
    _check_fit("noisy_tokens", noisy_tokens, weights=weights, noisy_index=noisy_index)
    if group_start is not None:
        group_start = jnp.asarray(group_start, jnp.int32)
        _check_fit("tokens", tokens, group_start=group_start)
    paradigm = model.config.with_blocks(block_size)
    if group_start is not None:
        check_groups(paradigm)
    batch = Batch(tokens, segment_ids, loss_mask, noisy_index)
    check_copies(paradigm, noisy_index is not None)
    origin = origin_of(paradigm, batch)
    inputs = diffusion_inputs(
        paradigm, batch, noisy_tokens, weights, origin, group_start=group_start
    )
    loss, _ = weighted_loss(model, inputs)
    return loss


def _check_fit(name: str, array: Array, **others: Array | None) -> None:
    for other, value in others.items():
        if value is not None and value.shape != array.shape:
            raise ConfigError(
                f"{other} is of shape {value.shape}, {name} of {array.shape}; give both one shape"
            )
