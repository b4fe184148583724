"""How to decode, and what comes out."""

import dataclasses
import math
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from sdar_jax.decoding.commit_rules import (
    STRATEGIES,
    CommitFunction,
    CommitRule,
    Strategy,
    StrategyName,
    check_rule,
    own_strategy,
    strategy_of,
)
from sdar_jax.decoding.sampling_params import (
    ENTROPY_RULES,
    SCORES,
    EntropyRule,
    SamplingParams,
    Score,
)
from sdar_jax.errors import ConfigError, DecodingError, is_int, is_number
from sdar_jax.model.config import ModelConfig
from sdar_jax.paradigm import Paradigm, fills_masks
from sdar_jax.visibility import check_block_size

Schedule = Literal["released", "paper"]
Confidence = Literal["pre_filter", "post_filter"]
FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclasses.dataclass(frozen=True)
class DecodingConfig:
    """How a request is decoded. The defaults are SDAR's dynamic decoding, greedy.

    Attributes:
        block_size: S; None is the model's own.
        strategy: which proposals a step commits; a name, a commit rule (`sdar_jax.decoding.commit_rules` says what
            that is), or None for the model's own: "autoregressive", "semi_autoregressive" for a masked-diffusion model,
            "sub_blocks" for a shifted block-diffusion model, and "low_confidence_dynamic" for another. With n_k from
            `schedule`:
            "sequential": the leftmost n_k masked;
            "low_confidence_static": the n_k most confident;
            "low_confidence_dynamic": all above `confidence_threshold` if they are at least n_k, else the n_k best;
            "entropy_bounded": by ascending entropy while the running sum stays within `entropy_bound`, at least one;
            "factor": the largest n with n-th confidence >= 1 - factor / (n + 1), at least one (Fast-dLLM);
            "sub_blocks": a block's first position, then of its leftmost `sub_block_size` positions that are not all
            filled all above `confidence_threshold`, and always the best (Fast-dLLM v2);
            "autoregressive": causal next-token decoding, one token a forward, for AR models;
            "semi_autoregressive": the whole canvas bidirectional, blocks left to right, static, no cache (LLaDA).
        confidence_threshold: tau of the dynamic strategy, and of "sub_blocks".
        denoising_steps: T, at most S; None is S, one token a step.
        schedule: n_k over T steps: "released" is S // T and one more in the first S mod T steps, "paper" ceil(S / T).
        repetition_penalty: logits of tokens in the prompt and committed so far are divided by it where positive and
            multiplied where negative, before temperature (CTRL, arXiv 1909.05858); 1 changes nothing.
        temperature: 0 is greedy; otherwise temperature, then top_k, then top_p.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens until their probability passes p; 1 keeps all.
        confidence: the distribution a sampled token's confidence is read from, "pre_filter" or "post_filter"
            (before or after top-k and top-p). A greedy token's is its softmax probability.
        score: what ranks proposals: "probability", the "margin" between the two likeliest tokens, or "neg_entropy".
        entropy_bound: epsilon of "entropy_bounded", in nats.
        entropy_rule: "eb_sampler" counts the entropies before each token (sum <= epsilon), "jetengine" its own
            too (sum < epsilon).
        factor: f of the "factor" strategy.
        sub_block_size: positions of each sub-block of "sub_blocks"; a block's last may have fewer.
        add_threshold: tau_add: where the window has room for one more block, it opens once this share of the last open
            block is decoded. 1, the default, opens blocks one after another.
        activate_threshold: tau_act: a block commits by the strategy once this share of the block before it is decoded;
            until then, only what passes `confidence_threshold` (D2F, arXiv 2508.09192; it uses 0.1, 0.95, 0.9).
        min_new_tokens: no stop token is proposed for the first so many positions. Stop strings are found there too.
        suppress_token_ids: tokens that are never proposed. Confidence and sampling are then among the rest, and so they
            are without stop tokens where `min_new_tokens` keeps these away; `logprobs` stay those of all tokens.
        eos_last: positions whose proposal is a stop token rank behind all others of their block, so that they are
            committed when nothing else of it is left to commit, or in the step that commits all the rest (LLaDA's
            `confidence_eos_eot_inf`). "sequential" and "autoregressive", which do not rank, are the same with it.
        top_logprobs: with each committed token, so many of the likeliest tokens there, with log-probabilities as those
            of `logprobs`.
        prompt_logprobs: the log-probability of each prompt token, given those before it; for "autoregressive" alone.

    Raises:
        ConfigError: an unknown name or a number out of range.
    """

    block_size: int | None = None
    strategy: StrategyName | CommitFunction | None = None
    confidence_threshold: float = 0.9
    denoising_steps: int | None = None
    schedule: Schedule = "released"
    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    confidence: Confidence = "pre_filter"
    score: Score = "probability"
    entropy_bound: float = 0.1
    entropy_rule: EntropyRule = "eb_sampler"
    factor: float = 1.0
    sub_block_size: int = 8
    add_threshold: float = 1.0
    activate_threshold: float = 1.0
    min_new_tokens: int = 0
    suppress_token_ids: tuple[int, ...] = ()
    eos_last: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            names = get_args(field.type)
            if names and isinstance(names[0], str) and getattr(self, field.name) not in names:
                raise ConfigError(
                    f"{field.name} {getattr(self, field.name)!r} is unknown; use one of {names}"
                )
        if self.strategy not in (None, *STRATEGIES) and not callable(self.strategy):
            names = tuple(STRATEGIES)
            raise ConfigError(
                f"strategy {self.strategy!r} is unknown; give None, a commit rule, or use one of {names}"
            )
        if self.block_size is not None:
            check_block_size(self.block_size)
        for name in ("min_new_tokens", "top_logprobs"):
            value = getattr(self, name)
            _require(
                is_int(value) and 0 <= value < 2**31, name, value, "0 (off) or a positive integer"
            )
        for name in ("eos_last", "prompt_logprobs"):
            _require(
                isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False"
            )
        ids = self.suppress_token_ids
        listed = isinstance(ids, list | tuple) and all(is_int(each) and each >= 0 for each in ids)
        _require(listed, "suppress_token_ids", ids, "a list of token ids")
        object.__setattr__(self, "suppress_token_ids", tuple(ids))
        steps = self.denoising_steps
        _require(
            steps is None or is_int(steps) and steps >= 1,
            "denoising_steps",
            steps,
            "a positive integer",
        )
        _require(
            is_int(self.top_k) and self.top_k >= 0,
            "top_k",
            self.top_k,
            "0 (off) or a positive integer",
        )
        _require(
            is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "a number in (0, 1]"
        )
        size = self.sub_block_size
        _require(is_int(size) and 1 <= size < 2**31, "sub_block_size", size, "a positive integer")
        cool = self.temperature
        _require(
            is_number(cool) and (cool == 0 or 1e-6 <= cool <= 1e6),
            "temperature",
            cool,
            "0 (greedy) or 1e-6 to 1e6",
        )
        for name in ("entropy_bound", "factor"):
            value = getattr(self, name)
            _require(is_number(value) and value >= 0, name, value, "a finite number >= 0")
        for name in ("add_threshold", "activate_threshold"):
            value = getattr(self, name)
            _require(is_number(value) and 0 <= value <= 1, name, value, "a number in [0, 1]")
        penalty = self.repetition_penalty
        _require(
            is_number(penalty) and 1e-3 <= penalty <= 1e3,
            "repetition_penalty",
            penalty,
            "1 (off) or 1e-3 to 1e3",
        )
        tau = self.confidence_threshold
        _require(is_number(tau), "confidence_threshold", tau, "a finite number")
        if self.score != "neg_entropy":
            _require(0 <= tau <= 1, "confidence_threshold", tau, "a number in [0, 1]")

    def resolve_block_size(self, model: ModelConfig) -> int:
        """S for this model: 1 for autoregressive decoding.

        Raises:
            DecodingError: neither the config nor the model names one, the model has no mask token, or T > S.
            ConfigError: a commit rule that does not return what it should.
        """
        strategy = self.strategy_for(model)
        size = self.block_size or model.block_size if strategy.fills_masks else 1
        if strategy.fills_masks:
            self._check_masks(model, size)
        elif self.strategy is None and self.block_size not in (None, 1):
            raise DecodingError(
                f"block_size is {self.block_size} and this model is autoregressive; leave it out, "
                "use strategy='autoregressive', or convert the model with sdar_jax.to_diffusion"
            )
        assert size is not None
        paradigm = self.paradigm(model)
        if paradigm.masks and (self.denoising_steps or 1) > size:
            raise DecodingError(
                f"denoising_steps {self.denoising_steps} is more than block_size {size}; use at most that"
            )
        if paradigm.causal_clean and paradigm.masks and self.add_threshold < 1:
            raise DecodingError(
                f"add_threshold is {self.add_threshold} and the model's clean positions are causal: a block that opens "
                "before the one in front is full would see keys that are not final; leave it 1"
            )
        if self.prompt_logprobs and paradigm.masks:
            asked = self.strategy_text(model)
            raise DecodingError(
                f"prompt_logprobs with {asked}: a diffusion model has no exact likelihood of a text in one pass; "
                "leave it out, and bound that with sdar_jax.nelbo"
            )
        if callable(self.strategy):
            check_rule(strategy.rule, sampling_params(self, size, rule=(0, strategy.rule)))
        return size

    def _check_masks(self, model: ModelConfig, size: int | None) -> None:
        asked = self.strategy_text(model)
        if not fills_masks(model.objective) and (size is None or model.mask_token_id is None):
            raise DecodingError(
                f"{asked} needs block_size and a mask, and this model is autoregressive; "
                "use strategy='autoregressive', or convert it with sdar_jax.to_diffusion"
            )
        if size is None:
            raise DecodingError(
                f"{asked} needs block_size and the model has none; give DecodingConfig(block_size=...)"
            )
        if model.mask_token_id is None:
            raise DecodingError(
                f"{asked} needs mask_token_id and the model has none; "
                "set it with load_pretrained(..., mask_token_id=...)"
            )

    def strategy_text(self, model: ModelConfig) -> str:
        """How an error names the strategy that this model is decoded by."""
        strategy = own_strategy(model) if self.strategy is None else self.strategy
        return f"strategy {strategy!r}"

    def strategy_for(self, model: ModelConfig) -> Strategy:
        """The commit rule, and how this model is read for it."""
        return strategy_of(self.strategy, model)

    def paradigm(self, model: ModelConfig) -> Paradigm:
        """What a forward reads and predicts when this model is decoded in this way."""
        return self.strategy_for(model).paradigm(model, self.block_size or model.block_size)


class Completion(NamedTuple):
    """What a request produced, trimmed: nothing at or after the first stop token.

    Attributes:
        tokens: generated ids; where a stop string ended it, up to the token that completes that string.
        text: their decoding, if a tokenizer was given, up to a stop string.
        finish_reason: "stop", "length", "cancelled" or "error" (the model's logits were not finite).
        logprobs: of each token, under the raw distribution (temperature 1, no filter) when it was committed; nats.
        steps: the denoising forward, from 0, that committed each token.
        denoising_forwards: forwards that filled blocks.
        commit_forwards: forwards that only wrote a finished block to the cache; none where the next block's first
            forward does that (`window_slots` of 2 or more).
        prefill_forwards: forwards that read the prompt.
        stop_reason: the stop token or the stop string that ended it, where one did.
        top_logprobs: of each token, the likeliest there and their log-probabilities, largest first, if asked for.
        prompt_logprobs: of each prompt token given those before it, None for the first, if asked for.
        stop_step: the denoising forward that committed the stop token, which `steps` does not hold; else None.
    """

    tokens: list[int]
    text: str | None
    finish_reason: FinishReason
    logprobs: list[float]
    steps: list[int]
    denoising_forwards: int
    commit_forwards: int
    prefill_forwards: int
    stop_reason: int | str | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None
    prompt_logprobs: list[float | None] | None = None
    stop_step: int | None = None

    @property
    def tokens_per_forward(self) -> float:
        """Generated tokens a denoising forward; 0 if there was none."""
        return len(self.tokens) / self.denoising_forwards if self.denoising_forwards else 0.0


def commit_schedule(block_size: int, steps: int | None, schedule: str) -> np.ndarray:
    """n_k, int32 [S]: the tokens that step k is to commit at least. Steps past the last repeat it.

    >>> commit_schedule(8, 3, "released")
    array([3, 3, 2, 2, 2, 2, 2, 2], dtype=int32)
    """
    steps = steps or block_size
    counts = np.full(block_size, math.ceil(block_size / steps), np.int32)
    if schedule == "released":
        counts[:] = block_size // steps
        counts[: block_size % steps] += 1
    return counts


def sampling_params(
    config: DecodingConfig,
    block_size: int,
    *,
    rule: tuple[int, CommitRule],
    seed: int = 0,
    width: int = 0,
) -> SamplingParams:
    """The parameters of one sequence: numpy scalars, and the schedule [S].

    Args:
        rule: the commit rule, and its index among those of the compiled program.
        width: entries of `suppress_token_ids` at least.
    """
    index, of_sequence = rule
    integer = partial(np.asarray, dtype=np.int32)
    real = partial(np.asarray, dtype=np.float32)
    ids = config.suppress_token_ids
    fields: dict[str, Any] = {
        "rule": integer(index),
        "reads_entropy": integer(of_sequence.reads_entropy),
        "score": integer(SCORES[config.score]),
        "entropy_rule": integer(ENTROPY_RULES[config.entropy_rule]),
        "post_filter": integer(config.confidence == "post_filter"),
        "seed": integer(seed),
        "top_k": integer(min(config.top_k, np.iinfo(np.int32).max)),
        "min_new_tokens": integer(config.min_new_tokens),
        "eos_last": integer(config.eos_last),
        "sub_block_size": integer(config.sub_block_size),
        "top_logprobs": integer(config.top_logprobs),
        "schedule": commit_schedule(block_size, config.denoising_steps, config.schedule),
        "suppress_token_ids": integer(ids + (-1,) * (width - len(ids))),
        "top_p": real(config.top_p),
        "temperature": real(config.temperature),
        "repetition_penalty": real(config.repetition_penalty),
        "confidence_threshold": real(config.confidence_threshold),
        "entropy_bound": real(config.entropy_bound),
        "factor": real(config.factor),
        "add_threshold": real(config.add_threshold),
        "activate_threshold": real(config.activate_threshold),
    }
    return SamplingParams(**fields)


def _require(condition: bool, name: str, value, wanted: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {value!r}; give {wanted}")
