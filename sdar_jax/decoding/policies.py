"""Which proposals a step commits. Every policy commits at least one masked position of a row that has one."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sdar_jax.decoding.config import DecodingConfig
from sdar_jax.decoding.proposal import Knobs, Proposal


def select(
    proposal: Proposal, masked: Bool[Array, "B S"], block_step: Int[Array, " B"], knobs: Knobs, config: DecodingConfig
) -> Bool[Array, "B S"]:
    """Positions to commit, among the masked ones; ties go to the leftmost.

    block_step: denoising steps that the open block has had, from 0: it indexes the schedule.
    """
    last = knobs.schedule.shape[1] - 1
    wanted = jnp.take_along_axis(knobs.schedule, jnp.minimum(block_step, last)[:, None], axis=1)
    return masked & _POLICIES[config.strategy](proposal, masked, wanted, knobs, config)


def _rank(score: Array, masked: Array) -> Array:
    """Place of each masked position by descending score, from 0; others, and not-a-numbers, come last."""
    order = jnp.argsort(jnp.where(masked, -score, jnp.inf), axis=-1, stable=True)
    order = jnp.take_along_axis(order, jnp.argsort(~jnp.take_along_axis(masked, order, axis=-1), stable=True), axis=-1)
    return jnp.argsort(order, axis=-1)


def _sequential(proposal, masked, wanted, knobs, config):
    return jnp.cumsum(masked, axis=-1) <= wanted


def _static(proposal, masked, wanted, knobs, config):
    return _rank(proposal.score, masked) < wanted


def _dynamic(proposal, masked, wanted, knobs, config):
    sure = masked & (proposal.score > knobs.threshold[:, None])
    enough = sure.sum(axis=-1, keepdims=True) >= jnp.minimum(wanted, masked.sum(axis=-1, keepdims=True))
    return jnp.where(enough, sure, _static(proposal, masked, wanted, knobs, config))


def _entropy_bounded(proposal, masked, wanted, knobs, config):
    rank = _rank(-proposal.entropy, masked)
    entropy = jnp.where(masked, proposal.entropy, 0)
    counted = rank[:, None, :] < rank[:, :, None] if config.entropy_rule == "eb_sampler" else _not_after(rank)
    total = jnp.sum(jnp.where(counted, entropy[:, None, :], 0), axis=-1)
    bound = knobs.entropy_bound[:, None]
    return (rank == 0) | (total <= bound if config.entropy_rule == "eb_sampler" else total < bound)


def _not_after(rank: Array) -> Array:
    return rank[:, None, :] <= rank[:, :, None]


def _factor(proposal, masked, wanted, knobs, config):
    rank = _rank(proposal.score, masked)
    passes = masked & (proposal.score >= 1 - knobs.factor[:, None] / (rank + 2))
    return rank <= jnp.max(jnp.where(passes, rank, 0), axis=-1, keepdims=True)


def _all(proposal, masked, wanted, knobs, config):
    return masked


_POLICIES = {
    "sequential": _sequential,
    "low_confidence_static": _static,
    "low_confidence_dynamic": _dynamic,
    "entropy_bounded": _entropy_bounded,
    "factor": _factor,
    "autoregressive": _all,
    "semi_autoregressive": _static,
}
