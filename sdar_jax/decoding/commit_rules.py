"""Which proposals a step commits: the rules, and the table of the strategies that name them.

A commit rule is a function of a batch of N blocks of S positions,

    rule(proposal, masked, step, parameters) -> commit

    proposal    Proposal, [N, S] each: token, score, entropy, logprob; only masked positions have a meaning
    masked      bool [N, S], what may be committed
    step        int32 [N], denoising steps that each block has had, from 0
    parameters  SamplingParams of each block's sequence, [N] each
    commit      bool [N, S]; what is not masked is left out for the rule

pure and traceable by JAX, or a `CommitRule` that says what the function reads; `DecodingConfig(strategy=rule)` takes
either. A rule commits at least one position of every block that has a masked one: a request whose rule commits nothing,
step after step, ends with finish_reason "error". Only the rules that are in use are compiled, and each function anew:
define it once, not in a loop.

The rules here break ties to the left, and put a score of -inf behind all others.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sdar_jax.decoding.proposal import Proposal
from sdar_jax.decoding.sampling_params import ENTROPY_RULES, SamplingParams
from sdar_jax.errors import ConfigError
from sdar_jax.model.config import ModelConfig
from sdar_jax.paradigm import NEXT_TOKEN, Paradigm, fills_masks, has_blocks

StrategyName = Literal[
    "sequential",
    "low_confidence_static",
    "low_confidence_dynamic",
    "entropy_bounded",
    "factor",
    "sub_blocks",
    "autoregressive",
    "semi_autoregressive",
]
CommitFunction = Callable[
    [Proposal, Bool[Array, "N S"], Int[Array, " N"], SamplingParams], Bool[Array, "N S"]
]


@dataclasses.dataclass(frozen=True)
class CommitRule:
    """A commit rule, and what it reads.

    Attributes:
        function: `rule(proposal, masked, step, parameters) -> commit`, as above.
        reads_entropy: whether it reads `proposal.entropy`, which costs more passes over the logits and is zero else.
    """

    function: CommitFunction
    reads_entropy: bool = True

    def __call__(
        self,
        proposal: Proposal,
        masked: Bool[Array, "N S"],
        step: Int[Array, " N"],
        parameters: SamplingParams,
    ) -> Bool[Array, "N S"]:
        """As its function."""
        return self.function(proposal, masked, step, parameters)


@dataclasses.dataclass(frozen=True)
class Strategy:
    """A way to decode: what a step commits, and how the model is read for it.

    Attributes:
        rule: what a step commits.
        paradigm: the paradigm of a model that is decoded in blocks of the given size.
        fills_masks: whether masked blocks are filled, and not the next token found.
    """

    rule: CommitRule
    paradigm: Callable[[ModelConfig, int | None], Paradigm]
    fills_masks: bool = True


def tokens_per_step(step: Int[Array, " N"], parameters: SamplingParams) -> Int[Array, "N 1"]:
    """n_k of each block: the tokens that its step is to commit at least, by its schedule."""
    last = parameters.schedule.shape[1] - 1
    return jnp.take_along_axis(parameters.schedule, jnp.minimum(step, last)[:, None], axis=1)


def sequential(
    proposal: Proposal, masked: Array, step: Array, parameters: SamplingParams
) -> Bool[Array, "N S"]:
    """The leftmost n_k."""
    return jnp.cumsum(masked, axis=-1) <= tokens_per_step(step, parameters)


def low_confidence_static(
    proposal: Proposal, masked: Array, step: Array, parameters: SamplingParams
) -> Bool[Array, "N S"]:
    """The n_k most confident."""
    return _rank(proposal.score, masked) < tokens_per_step(step, parameters)


def low_confidence_dynamic(
    proposal: Proposal, masked: Array, step: Array, parameters: SamplingParams
) -> Bool[Array, "N S"]:
    """All above the threshold if they are at least n_k, else the n_k most confident."""
    confident = above_threshold(proposal, masked, parameters)
    wanted = jnp.minimum(tokens_per_step(step, parameters), masked.sum(axis=-1, keepdims=True))
    enough = confident.sum(axis=-1, keepdims=True) >= wanted
    return jnp.where(enough, confident, low_confidence_static(proposal, masked, step, parameters))


def entropy_bounded(
    proposal: Proposal, masked: Array, step: Array, parameters: SamplingParams
) -> Bool[Array, "N S"]:
    """By ascending entropy while the running sum stays within the bound (EB-Sampler, arXiv 2505.24857)."""
    entropy = jnp.where(masked, proposal.entropy, 0)
    rank = _rank(jnp.where(jnp.isneginf(proposal.score), -jnp.inf, -proposal.entropy), masked)
    is_before = (rank[:, None, :] < rank[:, :, None]) & masked[:, None, :]
    before = jnp.sum(jnp.where(is_before, entropy[:, None, :], 0), axis=-1)
    through = before + entropy
    bound = parameters.entropy_bound[:, None]
    by_sampler = (parameters.entropy_rule == ENTROPY_RULES["eb_sampler"])[:, None]
    return (rank == 0) | jnp.where(by_sampler, before <= bound, through < bound)


def factor(
    proposal: Proposal, masked: Array, step: Array, parameters: SamplingParams
) -> Bool[Array, "N S"]:
    """The largest n whose n-th confidence is at least 1 - factor / (n + 1), at least one (Fast-dLLM)."""
    rank = _rank(proposal.score, masked)
    passes = masked & (proposal.score >= 1 - parameters.factor[:, None] / (rank + 2))
    return rank <= jnp.max(jnp.where(passes, rank, 0), axis=-1, keepdims=True)


def sub_blocks(
    proposal: Proposal, masked: Array, step: Array, parameters: SamplingParams
) -> Bool[Array, "N S"]:
    """Of the leftmost sub-block that is not full, all above the threshold and always the best (Fast-dLLM v2).

    A block's first position comes alone. What predicts it in a shifted model, the finished text before the block, does
    not change as the block fills, and all others are to see it: Fast-dLLM v2 takes it from the forward that finishes
    the block before.
    """
    index = jnp.arange(masked.shape[-1])
    sub_block = index // parameters.sub_block_size[:, None]
    leftmost = jnp.min(jnp.where(masked, sub_block, len(index)), axis=-1, keepdims=True)
    in_turn = masked & (sub_block == leftmost)
    sure = above_threshold(proposal, in_turn, parameters)
    chosen = sure | (in_turn & (_rank(proposal.score, in_turn) == 0))
    return jnp.where(masked[:, :1], index == 0, chosen)


def everything(
    proposal: Proposal, masked: Array, step: Array, parameters: SamplingParams
) -> Bool[Array, "N S"]:
    """All that is masked."""
    return masked


def above_threshold(
    proposal: Proposal, masked: Array, parameters: SamplingParams
) -> Bool[Array, "N S"]:
    """Masked positions whose score is above the sequence's `confidence_threshold`."""
    return masked & (proposal.score > parameters.confidence_threshold[:, None])


def _rank(score: Array, masked: Array) -> Int[Array, "N S"]:
    """Place of each masked position by descending score, from 0, not-a-numbers last; of others, no meaning."""
    score = jnp.where(jnp.isnan(score), -jnp.inf, score)
    index = jnp.arange(score.shape[-1])
    other, own = score[..., None, :], score[..., :, None]
    ahead = (other > own) | ((other == own) & (index < index[:, None]))
    return jnp.sum(ahead & masked[..., None, :], axis=-1)


def _in_blocks(model: ModelConfig, block_size: int | None) -> Paradigm:
    return model.with_blocks(block_size)


def _on_canvas(model: ModelConfig, block_size: int | None) -> Paradigm:
    return model.with_blocks(None)


def _next_token(model: ModelConfig, block_size: int | None) -> Paradigm:
    return NEXT_TOKEN


def _by_score(function: CommitFunction) -> CommitRule:
    return CommitRule(function, reads_entropy=False)


# The one place that knows strategies by name.
STRATEGIES: dict[str, Strategy] = {
    "sequential": Strategy(_by_score(sequential), _in_blocks),
    "low_confidence_static": Strategy(_by_score(low_confidence_static), _in_blocks),
    "low_confidence_dynamic": Strategy(_by_score(low_confidence_dynamic), _in_blocks),
    "entropy_bounded": Strategy(CommitRule(entropy_bounded), _in_blocks),
    "factor": Strategy(_by_score(factor), _in_blocks),
    "sub_blocks": Strategy(_by_score(sub_blocks), _in_blocks),
    "autoregressive": Strategy(_by_score(everything), _next_token, fills_masks=False),
    "semi_autoregressive": Strategy(_by_score(low_confidence_static), _on_canvas),
}


def own_strategy(model: ModelConfig) -> StrategyName:
    """The strategy that a model is decoded by when none is asked for."""
    if not fills_masks(model.objective):
        return "autoregressive"
    if not has_blocks(model.objective):
        return "semi_autoregressive"
    return "sub_blocks" if model.shifted else "low_confidence_dynamic"


def strategy_of(asked: StrategyName | CommitFunction | None, model: ModelConfig) -> Strategy:
    """The strategy of a name, of a rule of the user's, which reads the model in its own way, or the model's own."""
    if isinstance(asked, str):
        return STRATEGIES[asked]
    own = STRATEGIES[own_strategy(model)]
    if asked is None:
        return own
    rule = asked if isinstance(asked, CommitRule) else CommitRule(asked)
    return dataclasses.replace(own, rule=rule)


def check_rule(rule: CommitRule, parameters: SamplingParams) -> None:
    """Traces a rule with the parameters of one sequence, without the leading axis.

    Raises:
        ConfigError: it does not return bool [N, S]. What it raises itself is passed on.
    """
    blocks = 2
    shape = (blocks, len(parameters.schedule))
    numbers = jnp.zeros(shape)
    flags = jnp.zeros(shape, bool)
    proposal = Proposal(jnp.zeros(shape, jnp.int32), numbers, numbers, numbers, flags)
    of_blocks = jax.tree.map(lambda value: jnp.stack([value] * blocks), parameters)
    commit: Any = jax.eval_shape(rule, proposal, flags, jnp.zeros(blocks, jnp.int32), of_blocks)
    if getattr(commit, "shape", None) != shape or commit.dtype != jnp.bool_:
        name = getattr(rule.function, "__name__", repr(rule.function))
        raise ConfigError(
            f"commit rule {name} returns {commit} for {blocks} blocks; give bool {list(shape)}"
        )


def select(
    rules: Sequence[CommitRule],
    proposal: Proposal,
    masked: Bool[Array, "N S"],
    step: Int[Array, " N"],
    activated: Bool[Array, " N"],
    parameters: SamplingParams,
) -> Bool[Array, "N S"]:
    """Positions of N blocks to commit, among the masked ones.

    Args:
        rules: those in use; `parameters.rule` indexes them.
        proposal: of the masked positions; what it holds elsewhere is not read.
        step: denoising steps that each block has had since it was activated, from 0.
        activated: blocks that commit by their sequence's rule; the others commit only what passes the threshold.
        parameters: of each block's sequence.
    """
    commits = [rule(proposal, masked, step, parameters) for rule in rules]
    asked = [(parameters.rule == index)[:, None] for index in range(len(rules))]
    by_rule = jnp.select(asked, commits, default=False)
    return masked & jnp.where(
        activated[:, None], by_rule, above_threshold(proposal, masked, parameters)
    )
