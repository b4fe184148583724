"""Which proposals a step commits. Every policy commits at least one masked position of a block that has one."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sdar_jax.decoding.knobs import ENTROPY_RULES, STRATEGIES, Knobs
from sdar_jax.decoding.proposal import Proposal


def select(
    proposal: Proposal,
    masked: Bool[Array, "N S"],
    block_step: Int[Array, " N"],
    activated: Bool[Array, " N"],
    knobs: Knobs,
) -> Bool[Array, "N S"]:
    """Positions of N blocks to commit, among the masked ones; ties go to the leftmost, a score of -inf to the end.

    Args:
        proposal: of the masked positions; what it holds elsewhere is not read.
        block_step: denoising steps that each block has had since it was activated, from 0: it indexes the schedule.
        activated: blocks that commit by their row's strategy; the others commit only what passes the threshold.
        knobs: of each block's row.
    """
    last = knobs.schedule.shape[1] - 1
    wanted = jnp.take_along_axis(knobs.schedule, jnp.minimum(block_step, last)[:, None], axis=1)
    rank = _rank(proposal.score, masked)
    static = rank < wanted
    sure = masked & (proposal.score > knobs.confidence_threshold[:, None])
    chosen = {
        "sequential": jnp.cumsum(masked, axis=-1) <= wanted,
        "low_confidence_static": static,
        "low_confidence_dynamic": _dynamic(sure, static, masked, wanted),
        "entropy_bounded": _entropy_bounded(proposal, masked, knobs),
        "factor": _factor(proposal.score, masked, rank, knobs),
        "autoregressive": masked,
        "semi_autoregressive": static,
    }
    asked = [(knobs.strategy == STRATEGIES[name])[:, None] for name in chosen]
    by_strategy = jnp.select(asked, list(chosen.values()), default=False)
    return masked & jnp.where(activated[:, None], by_strategy, sure)


def _rank(score: Array, masked: Array) -> Array:
    """Place of each masked position by descending score, from 0, not-a-numbers last; of others, no meaning."""
    score = jnp.where(jnp.isnan(score), -jnp.inf, score)
    index = jnp.arange(score.shape[-1])
    other, own = score[..., None, :], score[..., :, None]
    ahead = (other > own) | ((other == own) & (index < index[:, None]))
    return jnp.sum(ahead & masked[..., None, :], axis=-1)


def _dynamic(sure: Array, static: Array, masked: Array, wanted: Array) -> Array:
    enough = sure.sum(axis=-1, keepdims=True) >= jnp.minimum(wanted, masked.sum(axis=-1, keepdims=True))
    return jnp.where(enough, sure, static)


def _entropy_bounded(proposal: Proposal, masked: Array, knobs: Knobs) -> Array:
    entropy = proposal.entropy
    rank = _rank(jnp.where(jnp.isneginf(proposal.score), -jnp.inf, -entropy), masked)
    counted = jnp.where(masked, entropy, 0)[:, None, :]
    first = rank[:, None, :] < rank[:, :, None]
    before = jnp.sum(jnp.where(first & masked[:, None, :], counted, 0), axis=-1)
    through = before + jnp.where(masked, entropy, 0)
    bound = knobs.entropy_bound[:, None]
    by_sampler = (knobs.entropy_rule == ENTROPY_RULES["eb_sampler"])[:, None]
    return (rank == 0) | jnp.where(by_sampler, before <= bound, through < bound)


def _factor(score: Array, masked: Array, rank: Array, knobs: Knobs) -> Array:
    passes = masked & (score >= 1 - knobs.factor[:, None] / (rank + 2))
    return rank <= jnp.max(jnp.where(passes, rank, 0), axis=-1, keepdims=True)
