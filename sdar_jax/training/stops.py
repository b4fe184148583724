"""Finds where decoding a trained model has to stop: at what ends the responses of its training data."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from sdar_jax.data import SourceConfig
from sdar_jax.data.chat import ChatRenderer
from sdar_jax.data.tokenizer import Encoder
from sdar_jax.errors import ConfigError, DataError
from sdar_jax.model.config import ModelConfig

log = logging.getLogger(__name__)

_ANSWER = "yes"
_EXCHANGE = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": _ANSWER}]
# A template may refuse any of these: a second question, or one without a system message.
_CONVERSATIONS = (
    _EXCHANGE,
    [*_EXCHANGE, *_EXCHANGE],
    [{"role": "system", "content": "Be short."}, *_EXCHANGE],
)


def end_of_text(tokenizer: PreTrainedTokenizerBase, model: ModelConfig) -> int:
    """Returns the token that ends documents. Raises ConfigError if neither the model nor the tokenizer has one."""
    eos = tokenizer.eos_token_id if model.eos_token_id is None else model.eos_token_id
    if not isinstance(eos, int):
        raise ConfigError(
            "neither model nor tokenizer has an end-of-text token; set eos_token_id in the model's config"
        )
    return eos


def with_learned_stops(
    model: ModelConfig, tokenizer: PreTrainedTokenizerBase, sources: Sequence[SourceConfig]
) -> ModelConfig:
    """Makes the model's `stop_token_ids` begin with what ends the responses of its training data.

    That is the token which the chat template sets behind a turn, where there are conversations, and the end of text,
    which the data pipeline sets behind every document. What the model's own list has besides stays.
    """
    chat = turn_ends(tokenizer) if any(source.format == "chat" for source in sources) else []
    ends = [*chat, end_of_text(tokenizer, model)]
    if all(token in model.stop_token_ids for token in ends):
        return model
    stops = tuple(dict.fromkeys([*ends, *model.stop_token_ids]))
    named = ", ".join(f"{tokenizer.convert_ids_to_tokens(token)} ({token})" for token in stops)
    log.info("the exported model will stop at %s, as its data ends there", named)
    return replace(model, stop_token_ids=stops)


def turn_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Finds the tokens that the chat template puts right behind an assistant's message, last in a conversation or not.

    Empty where a turn ends with the text itself. A warning says where it ends with text that no token stands for alone,
    or where the template refuses every small conversation.
    """
    renderer = ChatRenderer(tokenizer, warn=lambda message: None)
    encoder = Encoder(tokenizer)
    ends: dict[str, int] = {}
    refusals: list[DataError] = []
    for messages in _CONVERSATIONS:
        try:
            pieces = renderer.pieces({"messages": messages})
        except DataError as error:
            refusals.append(error)
            continue
        behind = [text.rpartition(_ANSWER)[2].strip() for text, response in pieces if response]
        ends |= {end: encoder(end)[0] for end in behind if end}
    tokens = dict.fromkeys(token for token in ends.values() if _is_special(tokenizer, token))
    if len(refusals) == len(_CONVERSATIONS):
        log.warning(
            "where turns end is not known (%s): decode with a stop string if answers go on",
            refusals[0],
        )
    if ends and not tokens:
        log.warning(
            "turns end with %r, for which there is no token: decode with it as a stop string",
            next(iter(ends)),
        )
    return list(tokens)


def _is_special(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    return token in tokenizer.added_tokens_decoder or token in tokenizer.all_special_ids
