"""Scores held-out data as an evaluator, which `train` calls now and then."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from sdar_jax import visibility
from sdar_jax.data import PackedDataset
from sdar_jax.errors import DataError
from sdar_jax.evaluation.config import EvalConfig
from sdar_jax.evaluation.likelihood import Groups, Likelihood, bound, exact
from sdar_jax.model import Model
from sdar_jax.objectives import Batch, origin_of, predicted
from sdar_jax.paradigm import Paradigm

# Positions in a block that are a group each; behind them a group is twice as long as the one before.
_OWN_GROUP = 4


class _Rows(NamedTuple):
    """A held-out batch, and the source of each of its tokens, 0 if sources are not asked for; [B, L]."""

    batch: Batch
    sources: Int[np.ndarray, "B L"]


def held_out_likelihood(
    config: EvalConfig, data: PackedDataset
) -> Callable[[Model, int], dict[str, float]]:
    """Makes an evaluator: held-out likelihood in nats per token over the first `config.rows` rows, batch by batch.

    The evaluator returns {"nll": ...} of a model that predicts each next token, else {"nelbo": ..., "nelbo_se": ...};
    with `config.by` also "nelbo/NAME" of each source and "nelbo_position/FIRST-LAST" of positions in the block, where
    tokens are counted. Weighted by their tokens, those of one kind add up to the whole.

    Args:
        data: batches of `config.data.batch_size` rows; the rows are read now.

    Raises:
        DataError: no token of these rows counts.
    """
    assert config.data is not None
    batches = list(itertools.islice(data, math.ceil(config.rows / config.data.batch_size)))
    if not any(batch["loss_mask"].any() for batch in batches):
        raise DataError(
            "eval.data has no token that counts in its first rows; give other data, or more eval.rows"
        )
    names = data.source_names if "source" in config.by else [""]
    rows = []
    for batch in batches:
        ids = batch["record_ids"]
        sources = data.sources_of(ids) if "source" in config.by else np.zeros_like(ids)
        arrays = (jnp.asarray(batch[name]) for name in ("tokens", "segment_ids", "loss_mask"))
        rows.append(_Rows(Batch(*arrays), sources))

    def evaluate(model: Model, step: int) -> dict[str, float]:
        positions = position_groups(model.config.paradigm) if "position" in config.by else [""]
        shape = len(names), len(positions)
        scores = list(_scores(model, rows, config, shape))
        counts, means, errors = np.array([score[:3] for score in scores]).T
        shares = counts / counts.sum()
        kind = "nelbo" if model.config.paradigm.masks else "nll"
        numbers = {kind: float(shares @ means)}
        if kind == "nelbo":
            numbers["nelbo_se"] = float(np.linalg.norm(shares * errors))
        nats = np.sum([score.group_nats for score in scores], axis=0).reshape(shape)
        counted = np.sum([score.group_counts for score in scores], axis=0).reshape(shape)
        if "source" in config.by:
            numbers |= _means(f"{kind}/", names, nats.sum(1), counted.sum(1))
        if "position" in config.by:
            numbers |= _means(f"{kind}_position/", positions, nats.sum(0), counted.sum(0))
        return numbers

    return evaluate


def position_groups(paradigm: Paradigm) -> list[str]:
    """Names the groups that a block's positions are told apart in: 0, 1, 2, 3, then 4-7, 8-15 and so on.

    So a block of 64 has eight, which is what can be looked at; and a group keeps its name when the block grows.
    """
    assert paradigm.block_size is not None
    last = int(_position_group(np.array(paradigm.block_size - 1)))
    names = [str(i) for i in range(min(last + 1, _OWN_GROUP))]
    starts = (_OWN_GROUP << i for i in range(last + 1 - len(names)))
    return names + [f"{start}-{2 * start - 1}" for start in starts]


def _position_group(offsets: Int[np.ndarray, "*N"]) -> Int[np.ndarray, "*N"]:
    # frexp's exponent is the number of bits; position 4, of three bits, is in group 4.
    _, bits = np.frexp(offsets)
    return np.where(offsets < _OWN_GROUP, offsets, bits + 1)


def block_offsets(paradigm: Paradigm, batch: Batch) -> Int[np.ndarray, "B L"]:
    """Counts each token's place in its block, from 0."""
    bounds = visibility.segments(batch.segment_ids)
    start, _ = visibility.block_bounds(
        bounds,
        paradigm.block_size,
        origin_of(paradigm, batch),
        bidirectional_prompt=paradigm.bidirectional_prompt,
    )
    return np.asarray(bounds.start + bounds.positions - start)


def _means(
    prefix: str, names: list[str], nats: Float[np.ndarray, " G"], counts: Float[np.ndarray, " G"]
) -> dict[str, float]:
    """Nats per token of each group that has tokens, by its name."""
    return {
        f"{prefix}{name}": float(sum_ / count)
        for name, sum_, count in zip(names, nats, counts, strict=True)
        if count
    }


def _scores(
    model: Model, rows: list[_Rows], config: EvalConfig, shape: tuple[int, int]
) -> Iterator[Likelihood]:
    """Yields the likelihood of each batch that has tokens to count, by source and position in groups of this shape."""
    paradigm = model.config.paradigm
    for i, (batch, sources) in enumerate(rows):
        if not predicted(paradigm, batch).any():
            continue
        labels = sources
        if "position" in config.by:
            labels = sources * shape[1] + _position_group(block_offsets(paradigm, batch))
        groups = Groups(labels, math.prod(shape))
        if paradigm.masks:
            yield bound(
                model,
                batch,
                block_size=paradigm.block_size,
                samples=config.samples,
                seed=config.seed + i,
                groups=groups,
            )
        else:
            yield exact(model, batch, groups)
