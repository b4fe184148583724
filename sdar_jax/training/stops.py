"""Where decoding a trained model has to stop: at what ends the responses that it learned."""

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from sdar_jax.config import ModelConfig
from sdar_jax.data import SourceConfig
from sdar_jax.data.chat import ChatRenderer
from sdar_jax.data.tokenizer import Encoder
from sdar_jax.errors import ConfigError, DataError

log = logging.getLogger(__name__)

_ANSWER = "yes"
_EXCHANGE = ({"role": "user", "content": "Is it?"}, {"role": "assistant", "content": _ANSWER})


def end_of_text(tokenizer: PreTrainedTokenizerBase, model: ModelConfig) -> int:
    """The token that ends documents. Raises ConfigError if neither the model nor the tokenizer has one."""
    eos = tokenizer.eos_token_id if model.eos_token_id is None else model.eos_token_id
    if not isinstance(eos, int):
        raise ConfigError(
            "neither model nor tokenizer has an end-of-text token; set eos_token_id in the model's config"
        )
    return eos


def with_learned_stops(
    model: ModelConfig, tokenizer: PreTrainedTokenizerBase, sources: Sequence[SourceConfig]
) -> ModelConfig:
    """The model's config, whose `stop_token_ids` begin with what ends the responses of its training data.

    That is the token which the chat template sets behind a turn, where there are conversations, and the end of text,
    which the data pipeline sets behind every document. What the model's own list has besides stays.
    """
    chat = turn_ends(tokenizer) if any(source.format == "chat" for source in sources) else []
    learned = dict.fromkeys([*chat, end_of_text(tokenizer, model)])
    if all(token in model.stop_token_ids for token in learned):
        return model
    stops = tuple(dict.fromkeys([*learned, *model.stop_token_ids]))
    named = ", ".join(f"{tokenizer.convert_ids_to_tokens(token)} ({token})" for token in stops)
    log.info("the exported model will stop at %s, as its data ends there", named)
    return replace(model, stop_token_ids=stops)


def turn_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the chat template sets right behind what the assistant said, last in a conversation or not.

    Empty where a turn ends with the text itself; where it ends with text that no token stands for alone, a warning
    says so.
    """
    renderer, encoder = ChatRenderer(tokenizer, say=lambda notice: None), Encoder(tokenizer)
    ends: dict[str, Any] = {}
    for messages in ([*_EXCHANGE], [*_EXCHANGE, *_EXCHANGE]):
        # A template may want another order of roles, or not say where a turn ends.
        with contextlib.suppress(DataError):
            pieces = renderer.pieces({"messages": messages})
            ends |= dict.fromkeys(text.rpartition(_ANSWER)[2].strip() for text, response in pieces if response)
    tokens = [ids[0] for end in ends if end and (ids := encoder(end)) and _is_special(tokenizer, ids[0])]
    unmarked = [end for end in ends if end and not _is_special(tokenizer, encoder(end)[0])]
    if unmarked and not tokens:
        log.warning(
            "the chat template ends a turn with %r, which is no token of its own: the exported model stops at the end "
            "of text alone; decode with it as a stop string",
            unmarked[0],
        )
    return list(dict.fromkeys(tokens))


def _is_special(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    return token in tokenizer.added_tokens_decoder or token in tokenizer.all_special_ids
