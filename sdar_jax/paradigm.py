"""`Paradigm`: what a model reads and what its outputs predict, defined once.

Families of language models differ, besides their shape, in the fields of this record and in nothing else. Training
inputs, loss, bound, prefill and decoding follow from it; no other file asks which family a model is of.

    autoregressive                      masks=False  block_size=1     shifted   causal clean copy
    SDAR, BD3-LM, TraDo                 masks        block_size=S
    Fast-dLLM v2                        masks        block_size=S     shifted
    NBDiff, Fast-dVLM, SBD              masks        block_size=S               causal clean copy
    D2F                                 masks        block_size=S     response origin, bidirectional prompt
    MDLM                                masks        block_size=None
    LLaDA                               masks        block_size=None  response origin
    Dream, DiffuCoder                   masks        block_size=None  response origin, shifted
"""

import dataclasses
from typing import Literal, TypeGuard

from sdar_jax.errors import ConfigError
from sdar_jax.visibility import check_block_size

Objective = Literal["autoregressive", "masked_diffusion", "block_diffusion"]
DiffusionObjective = Literal["masked_diffusion", "block_diffusion"]
BlockOrigin = Literal["sequence", "response"]


@dataclasses.dataclass(frozen=True)
class Paradigm:
    """Everything in which families of models differ besides their shape. Frozen and hashable.

    Attributes:
        masks: whether the model fills masks; one that does not predicts each next token from clean ones.
        block_size: S, how many positions see each other; None: all of a document, so that nothing can be cached and
            the full canvas is read each time.
        shifted: whether a token is predicted by the position before it, and not in its own place.
        origin: where blocks are counted from, the first token of the "sequence" or of the "response".
        causal_clean: whether a clean position sees only what is before it, and not the rest of its block.
        bidirectional_prompt: whether all of the prompt sees itself, as one block before the response's.

    Raises:
        ConfigError: values that contradict each other.
    """

    masks: bool = True
    block_size: int | None = None
    shifted: bool = False
    origin: BlockOrigin = "sequence"
    causal_clean: bool = False
    bidirectional_prompt: bool = False

    def __post_init__(self):
        if self.block_size is not None:
            check_block_size(self.block_size)
        if self.causal_clean and self.block_size is None:
            raise ConfigError(
                "causal_clean is True and there are no blocks; leave it out, or set block_size"
            )
        if self.bidirectional_prompt and (self.origin != "response" or self.block_size is None):
            raise ConfigError(
                "bidirectional_prompt is True and blocks do not start at the response; set block_origin='response' "
                "and block_size, or leave it out"
            )
        if self.bidirectional_prompt and self.causal_clean:
            raise ConfigError(
                "bidirectional_prompt and causal_clean contradict each other; leave out one"
            )

    @property
    def cached(self) -> bool:
        """Whether what is before a block never sees it, so that its keys and values can be kept."""
        return self.block_size is not None

    def origin_of(self, prompt_length: int) -> int:
        """Finds where the blocks of a sequence with such a prompt are counted from when it is decoded."""
        return prompt_length if self.origin == "response" else 0

    def shared(self, length: int, prompt_length: int) -> int:
        """Counts, of the first `length` positions, those whose keys any sequence that begins alike has, as far as
        blocks go."""
        if self.bidirectional_prompt:
            return 0
        return length if self.origin == "sequence" else min(length, prompt_length)

    def slots(self, wanted: int) -> int:
        """Limits how many blocks of a sequence one forward may read; one where they are not filled after a cache."""
        return wanted if self.two_copies else 1

    @property
    def two_copies(self) -> bool:
        """Whether training reads a noisy and a clean copy: blocks are filled after clean ones."""
        return self.masks and self.block_size is not None


NEXT_TOKEN = Paradigm(masks=False, block_size=1, shifted=True, causal_clean=True)


def fills_masks(objective: str) -> TypeGuard[DiffusionObjective]:
    """Returns whether models of this objective fill masks, which is known before their block size is."""
    return objective in ("masked_diffusion", "block_diffusion")


def has_blocks(objective: str) -> bool:
    """Returns whether models of this objective need a block size."""
    return objective == "block_diffusion"


def paradigm_of(
    objective: Objective,
    *,
    block_size: int | None,
    shifted: bool = False,
    block_origin: BlockOrigin = "sequence",
    causal_clean: bool = False,
    bidirectional_prompt: bool = False,
) -> Paradigm:
    """Makes the paradigm that an objective names, with its model's own values: the one place that reads these names.

    Raises:
        ConfigError: block diffusion without a block size, or values that do not go together.
    """
    if not fills_masks(objective):
        if shifted or causal_clean or bidirectional_prompt:
            raise ConfigError(
                "shifted, causal_clean and bidirectional_prompt are of diffusion models, and the objective is "
                "'autoregressive'; leave them out"
            )
        return NEXT_TOKEN
    if has_blocks(objective) and block_size is None:
        raise ConfigError(
            "objective 'block_diffusion' needs block_size and the model has none; set it"
        )
    return Paradigm(
        block_size=block_size if has_blocks(objective) else None,
        shifted=shifted,
        origin=block_origin,
        causal_clean=causal_clean,
        bidirectional_prompt=bidirectional_prompt,
    )
