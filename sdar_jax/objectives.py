"""Objectives as data: each one turns a clean batch into `LossInputs`, and one function computes every loss.

    loss = sum_i w_i CE_i / N + confidence_beta sum_(i in R) H_i / |R|

N, the normalizer, is a named choice. R are the tokens with a weight whose first guess is right, H_i the entropy of what
is predicted there: confidence-aware parallel training (CAP, LLaDA2.0, arXiv 2512.15745), off by default. With a teacher
(`distillation`) CE is to its distributions. The sums, N and |R| are added up over all micro-batches and devices and
divided once.
"""

import dataclasses
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sdar_jax import visibility
from sdar_jax.corruption import CorruptionConfig, NoiseRange, corrupt
from sdar_jax.distillation import (
    DistillConfig,
    TeacherInputs,
    check_noisy_context,
    check_teacher,
)
from sdar_jax.errors import ConfigError, is_number
from sdar_jax.groups import GroupConfig, check_groups, group_starts
from sdar_jax.model.config import ModelConfig
from sdar_jax.paradigm import Paradigm
from sdar_jax.visibility import Ranges

# Apart from what the corruption draws with the same key.
_GROUPS_KEY = 2**31 - 1


class Batch(NamedTuple):
    """Packed clean rows.

    Attributes:
        tokens: int32 [B, L].
        segment_ids: int32 [B, L], > 0 and contiguous in each document, 0 for padding.
        loss_mask: bool [B, L], the tokens that carry loss.
        noisy_index: int32 [B, N] or None: the positions that get a noisy copy: complete blocks, ascending, with -1
            (unused) only at the end.
        order: int32 [B, L] or None: when a model committed each token, which is compared within a block or a document
            alone.
    """

    tokens: Int[Array, "B L"]
    segment_ids: Int[Array, "B L"]
    loss_mask: Bool[Array, "B L"]
    noisy_index: Int[Array, "B N"] | None = None
    order: Int[Array, "B L"] | None = None


class LossInputs(NamedTuple):
    """A batch as the network reads it, and what it has to predict. The first N of its T positions are the outputs.

    Attributes:
        tokens: int32 [B, T].
        positions: int32 [B, T], counted from each document's first token.
        ranges: what each of the T positions sees.
        targets: int32 [B, N].
        weights: float32 [B, N], zero where there is no loss.
        normalizer: float32 [B], what each row adds to N.
        teacher: what a teacher reads of the same tokens; None without one.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    ranges: Ranges
    targets: Int[Array, "B N"]
    weights: Float[Array, "B N"]
    normalizer: Float[Array, " B"]
    teacher: TeacherInputs | None = None


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """The corruption of tokens, and the averaging of the loss.

    Attributes:
        corruption: what diffusion masks; nothing for AR.
        normalizer: N: "response" counts the tokens with loss (SDAR), "masked" the masked ones, "weights" adds up w.
        router_balance: coefficient of an MoE's balance loss; its model's `router_aux_loss_coef` if None.
        router_z: coefficient of the router's z-loss.
        confidence_beta: coefficient of CAP's mean entropy where a masked token's first guess is right; 0 is off. For
            models that fill masks.
        groups: MultiTF (arXiv 2606.29215): blocks see the noisy copy of the blocks before them in their group, as
            decoding with several open blocks does; None: each block sees clean blocks before it.
        distill: the targets are distributions of the model as training starts from it; None: the data's tokens.
        noisy_context: blocks see the noisy copy of what is before them, so that no clean copy is read (D2F).
    """

    corruption: CorruptionConfig = CorruptionConfig()
    normalizer: Literal["response", "masked", "weights"] = "response"
    router_balance: float | None = None
    router_z: float = 0.0
    confidence_beta: float = 0.0
    groups: GroupConfig | None = None
    distill: DistillConfig | None = None
    noisy_context: bool = False

    def __post_init__(self):
        if self.normalizer not in ("response", "masked", "weights"):
            raise ConfigError(
                f"normalizer {self.normalizer!r} is unknown; use 'response', 'masked' or 'weights'"
            )
        for name in ("router_balance", "router_z", "confidence_beta"):
            value = getattr(self, name)
            if value is not None and (not is_number(value) or value < 0):
                raise ConfigError(f"{name} is {value!r}; give a number >= 0")
        if self.corruption.needs_groups and self.groups is None:
            raise ConfigError(
                f"corruption draw {self.corruption.draw!r} rises within groups of blocks and groups is None; give "
                "groups, or use another draw"
            )
        if self.groups is not None and self.corruption.complementary:
            raise ConfigError(
                "groups are given and corruption complementary is True; leave one of them out"
            )
        if self.groups is not None and self.noisy_context:
            raise ConfigError(
                "groups are given and noisy_context is True, where all before a block is noisy; leave one of them out"
            )

    @property
    def layouts(self) -> int:
        """Rows of groups that each row of a batch becomes."""
        return 1 if self.groups is None else self.groups.views


def check_objective(model: ModelConfig) -> None:
    """Raises ConfigError when a model lacks what its objective needs."""
    if model.paradigm.masks and model.mask_token_id is None:
        raise ConfigError(
            f"objective {model.objective!r} needs mask_token_id and the model has none; set it"
        )


def make_inputs(
    batch: Batch,
    key: jax.Array,
    config: ObjectiveConfig,
    model: ModelConfig,
    *,
    noise_range: NoiseRange | None = None,
    teacher: Paradigm | None = None,
) -> LossInputs:
    """Turns a batch into inputs as the model's own paradigm has them (Eq. 3, 5 or 7); `key` draws the corruption.

    Called on the global batch of a step, before it is split into micro-batches. With `noise_range`, scalars that may
    change from step to step, in place of that of `config.corruption`.

    Args:
        teacher: how the model reads that `config.distill` takes distributions from; None without it.

    Raises:
        ConfigError: the model lacks what its objective needs, noisy_index is given where it cannot be used, the batch
            has no order and the corruption needs one, or as `check_teacher`, `check_noisy_context` and `check_groups`.
    """
    check_objective(model)
    paradigm = model.paradigm
    check_reading(config, paradigm, teacher, indexed=batch.noisy_index is not None)
    if not paradigm.masks:
        return next_token_inputs(batch)
    origin = origin_of(paradigm, batch)
    group_start = None
    if config.groups is not None:
        group_start = group_starts(
            batch.segment_ids,
            batch.loss_mask,
            jax.random.fold_in(key, _GROUPS_KEY),
            config.groups,
            block_size=paradigm.block_size or 0,
            origin=origin,
        )
        batch, origin = _repeated((batch, origin), config.layouts)
    corrupted = corrupt(
        batch.segment_ids,
        batch.loss_mask,
        key,
        config.corruption,
        block_size=model.block_size,
        origin=origin,
        group_start=group_start,
        order=batch.order,
        noise_range=noise_range,
    )
    batch, origin = _repeated((batch, origin), config.corruption.views)
    noisy_tokens = jnp.where(corrupted.masked, jnp.int32(model.mask_token_id), batch.tokens)
    noisy_tokens = _take(noisy_tokens, batch.noisy_index)
    weights = _take(corrupted.weights, batch.noisy_index)
    read = partial(diffusion_inputs, batch=batch, noisy_tokens=noisy_tokens, weights=weights)
    inputs = read(
        paradigm, origin=origin, group_start=group_start, noisy_context=config.noisy_context
    )
    if teacher is not None:
        of_teacher = read(teacher, origin=origin_of(teacher, batch))
        inputs = inputs._replace(
            teacher=TeacherInputs(of_teacher.tokens, of_teacher.positions, of_teacher.ranges)
        )
    return inputs._replace(
        normalizer=_normalizer(inputs.weights, paradigm, batch, config.normalizer)
    )


def _repeated[Tree](tree: Tree, times: int) -> Tree:
    """Repeats each row, its copies one after the other."""
    return tree if times == 1 else jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), tree)


def check_reading(
    config: ObjectiveConfig, paradigm: Paradigm, teacher: Paradigm | None, *, indexed: bool
) -> None:
    """Raises ConfigError where a model, or its teacher, cannot be read as the objective says.

    Args:
        indexed: whether only some positions have noisy copies (`Batch.noisy_index`).
    """
    if (config.distill is None) != (teacher is None):
        raise ConfigError(
            f"objective.distill is {config.distill} and the teacher's paradigm {teacher}; give both, or neither"
        )
    if config.groups is not None:
        check_groups(paradigm)
    if config.noisy_context:
        check_noisy_context(paradigm, indexed=indexed)
    if teacher is not None:
        check_teacher(paradigm, teacher, indexed=indexed)
    check_copies(paradigm, indexed)


def check_copies(paradigm: Paradigm, indexed: bool) -> None:
    """Raises ConfigError where only some positions are to have noisy copies and the model's others need theirs."""
    if indexed and not paradigm.two_copies:
        raise ConfigError(
            "noisy_length is set and the model reads no noisy copy beside a clean one; leave it out"
        )
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


def next_token_inputs(batch: Batch) -> LossInputs:
    """Turns a batch into next-token prediction within each document (Eq. 3)."""
    segment_ids = batch.segment_ids
    positions = visibility.segments(segment_ids).positions
    targets, weights = _shifted(segment_ids, batch.tokens, batch.loss_mask.astype(jnp.float32))
    return LossInputs(
        tokens=batch.tokens,
        positions=positions,
        ranges=visibility.causal(segment_ids),
        targets=targets,
        weights=weights,
        normalizer=weights.sum(axis=1),
    )


def diffusion_inputs(
    paradigm: Paradigm,
    batch: Batch,
    noisy_tokens: Int[Array, "B N"],
    weights: Float[Array, "B N"],
    origin: Int[Array, "B L"] | None = None,
    *,
    group_start: Int[Array, "B L"] | None = None,
    noisy_context: bool = False,
) -> LossInputs:
    """Turns a batch and its noisy copy into weighted prediction of what is masked, as the paradigm reads it.

    With blocks, in the hybrid layout [noisy | clean] (Eq. 7); without, in the noisy copy alone, every key of the
    document in sight (Eq. 5). In place, or shifted: by the position before, in the noisy copy, within the document.

    Args:
        noisy_tokens: int32 [B, N], N = L unless the batch has a noisy_index.
        weights: float32 [B, N], zero where there is no loss.
        origin: where each document's response starts, if blocks are counted from there (`visibility.block_bounds`).
        group_start: the first position of each position's group of blocks (`visibility.hybrid`); None: no groups.
        noisy_context: blocks see the noisy copy of what is before them, which is all that is read.
    """
    segment_ids = batch.segment_ids
    noisy_index = batch.noisy_index
    positions = visibility.segments(segment_ids).positions
    targets = _take(batch.tokens, noisy_index)
    if noisy_index is not None:
        weights = jnp.where(noisy_index >= 0, weights, 0)
    if paradigm.shifted:
        targets, weights = _shifted(segment_ids, targets, weights)
    blocks = {"origin": origin, "bidirectional_prompt": paradigm.bidirectional_prompt}
    if noisy_context or not paradigm.two_copies:
        tokens = noisy_tokens
        ranges = visibility.block_causal(segment_ids, paradigm.block_size, **blocks)
    else:
        tokens = jnp.concatenate([noisy_tokens, batch.tokens], axis=1)
        positions = jnp.concatenate([_take(positions, noisy_index), positions], axis=1)
        ranges = visibility.hybrid(
            segment_ids,
            paradigm.block_size,
            noisy_index,
            causal_clean=paradigm.causal_clean,
            group_start=group_start,
            **blocks,
        )
    return LossInputs(tokens, positions, ranges, targets, weights, normalizer=weights.sum(axis=1))


def origin_of(paradigm: Paradigm, batch: Batch) -> Int[Array, "B L"] | None:
    """Finds where blocks are counted from; None: from each document's start."""
    if paradigm.origin == "sequence":
        return None
    return visibility.response_start(batch.segment_ids, batch.loss_mask)


def predicted(paradigm: Paradigm, batch: Batch) -> Float[Array, "B L"]:
    """Marks the positions that predict a token with loss: 1 there, else 0.

    They are the tokens' own places, or for a shifted model the places before.
    """
    mask = (batch.loss_mask & (batch.segment_ids > 0)).astype(jnp.float32)
    if not paradigm.shifted:
        return mask
    _, shifted_mask = _shifted(batch.segment_ids, mask, mask)
    return shifted_mask


def _shifted(segment_ids: Array, targets: Array, weights: Array) -> tuple[Array, Array]:
    """Moves targets and weights to the position before, within each document; the last position has weight zero."""

    def next_of(x: Array) -> Array:
        return jnp.pad(x[:, 1:], [(0, 0), (0, 1)])

    same_document = (next_of(segment_ids) == segment_ids) & (segment_ids > 0)
    return next_of(targets), jnp.where(same_document, next_of(weights), 0)


def _take(x: Array, noisy_index: Array | None) -> Array:
    """Gathers x [B, L] at the clean position of each noisy one; zero where unused."""
    if noisy_index is None:
        return x
    gathered = jnp.take_along_axis(x, jnp.maximum(noisy_index, 0), axis=1)
    return jnp.where(noisy_index >= 0, gathered, 0)


def _normalizer(weights: Array, paradigm: Paradigm, batch: Batch, name: str) -> Array:
    if name == "weights":
        return weights.sum(axis=1)
    if name == "masked":
        return (weights != 0).sum(axis=1).astype(jnp.float32)
    return predicted(paradigm, batch).sum(axis=1)
