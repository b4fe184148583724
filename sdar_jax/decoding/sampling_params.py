"""The numbers of a `DecodingConfig`, one of each per sequence: all sequences of a batch share one compiled program."""

from typing import Literal, NamedTuple, get_args

import jax
from jaxtyping import Array, Float, Int

Score = Literal["probability", "margin", "neg_entropy"]
EntropyRule = Literal["eb_sampler", "jetengine"]

# A name is its number in a compiled program.
SCORES: dict[str, int] = {name: code for code, name in enumerate(get_args(Score))}
ENTROPY_RULES: dict[str, int] = {name: code for code, name in enumerate(get_args(EntropyRule))}

_Number = Float[Array, "*B"]
_Code = Int[Array, "*B"]


class SamplingParams(NamedTuple):
    """Parameters of each sequence, or of each block or position where they are taken there (`at`).

    Attributes:
        rule: int32, index of the commit rule among those of the compiled program.
        reads_entropy: int32, 1 where that rule reads `Proposal.entropy`, else 0.
        score, entropy_rule: int32, the config's names as `SCORES` and `ENTROPY_RULES` number them.
        post_filter: int32, 1 where confidence is "post_filter", else 0.
        schedule: int32 [S], n_k of each step of a block (`commit_schedule`).
        suppress_token_ids: int32, padded with -1.
        seed, top_k, min_new_tokens, eos_last, top_logprobs, sub_block_size: int32, and all others float32: as the
            config has them.
    """

    rule: _Code
    reads_entropy: _Code
    score: _Code
    entropy_rule: _Code
    post_filter: _Code
    seed: _Code
    top_k: _Code
    min_new_tokens: _Code
    eos_last: _Code
    top_logprobs: _Code
    sub_block_size: _Code
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

    def at(self, index: Int[Array, " N"]) -> "SamplingParams":
        """The parameters of these sequences, one for each entry of `index`."""
        return jax.tree.map(lambda values: values[index], self)
