"""A `DecodingConfig` as numbers, one of each a row: rows of one batch, and of one compilation, may differ in all."""

from typing import Any, NamedTuple, get_args

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from sdar_jax.decoding.config import DecodingConfig, EntropyRule, Score, Strategy, commit_schedule

STRATEGIES: dict[str, int] = {name: code for code, name in enumerate(get_args(Strategy))}
SCORES: dict[str, int] = {name: code for code, name in enumerate(get_args(Score))}
ENTROPY_RULES: dict[str, int] = {name: code for code, name in enumerate(get_args(EntropyRule))}

_Number = Float[Array, "*B"]
_Code = Int[Array, "*B"]


class Knobs(NamedTuple):
    """Fields of the config by name, float32; names as the codes above; schedule is n_k (`commit_schedule`).

    post_filter: 1 where confidence is "post_filter", else 0. suppress_token_ids: padded with -1.
    """

    strategy: _Code
    score: _Code
    entropy_rule: _Code
    post_filter: _Code
    seed: _Code
    top_k: _Code
    min_new_tokens: _Code
    eos_last: _Code
    top_logprobs: _Code
    schedule: Int[Array, "*B S"]
    suppress_token_ids: Int[Array, "*B W"]
    top_p: _Number
    temperature: _Number
    repetition_penalty: _Number
    confidence_threshold: _Number
    entropy_bound: _Number
    factor: _Number
    add_threshold: _Number
    activate_threshold: _Number

    def at(self, rows: Array) -> "Knobs":
        """The knobs of these rows, one for each entry."""
        return jax.tree.map(lambda knob: knob[rows], self)


_INTEGERS = ("strategy", "score", "entropy_rule", "post_filter", "seed", "top_k", "min_new_tokens", "eos_last")
_INTEGERS += ("top_logprobs", "schedule", "suppress_token_ids")


def make_knobs(config: DecodingConfig, block_size: int, seed: int, suppressed: int = 0) -> Knobs:
    """Of one row, without the leading axis: numpy scalars, the schedule [S], and `suppressed` ids at least."""
    ids = config.suppress_token_ids
    values = {name: getattr(config, name) for name in Knobs._fields if hasattr(config, name)}
    values |= {
        "strategy": STRATEGIES[config.strategy],
        "score": SCORES[config.score],
        "entropy_rule": ENTROPY_RULES[config.entropy_rule],
        "post_filter": int(config.confidence == "post_filter"),
        "top_k": min(config.top_k, np.iinfo(np.int32).max),
        "seed": seed,
        "suppress_token_ids": ids + (-1,) * (suppressed - len(ids)),
        "schedule": commit_schedule(block_size, config.denoising_steps, config.schedule),
    }
    fields: dict[str, Any] = {name: np.asarray(values[name], _dtype(name)) for name in Knobs._fields}
    return Knobs(**fields)


def _dtype(name: str) -> type:
    return np.int32 if name in _INTEGERS else np.float32
