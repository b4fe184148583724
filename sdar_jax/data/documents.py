"""A record becomes a document: token ids, and the mask of those that can be corrupted and carry loss."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from transformers import PreTrainedTokenizerBase

from sdar_jax.data.chat import ChatRenderer
from sdar_jax.data.config import DataConfig, SourceConfig
from sdar_jax.data.conversation import turns_without_loss
from sdar_jax.data.record_forms import as_messages
from sdar_jax.data.sources import Source
from sdar_jax.data.tokenizer import Encoder, token_ids
from sdar_jax.data.trajectory import read_trajectory
from sdar_jax.errors import DataError


@dataclass(frozen=True)
class Document:
    """The tokens of one record.

    Attributes:
        record_id: counted over the records of all sources.
        tokens: int32 [n].
        loss_mask: bool [n], the tokens that can be corrupted and carry loss.
        noisy: how many noisy positions it takes.
        cut: whether its end was cut off.
        order: int32 [n], when each token was committed, which grows within a block; -1 for the prompt. None where that
            is not known.
    """

    record_id: int
    tokens: Int[np.ndarray, "n"]
    loss_mask: Bool[np.ndarray, "n"]
    noisy: int
    cut: bool = False
    order: Int[np.ndarray, "n"] | None = None

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Rejection:
    """A record that gives no document: it is `malformed`, or else too long for a row."""

    reason: str
    malformed: bool


class _TooLong(DataError):
    """A document that no row can hold."""


class DocumentMaker:
    """Maps a record id to a Document or Rejection: a pure function, safe to call from several threads.

    Record ids count the records of all sources, in the sources' order.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        sources: list[Source],
        *,
        block_size: int,
        eos_token_id: int,
    ):
        self._config = config
        self._sources = sources
        self.block_size = block_size
        self._eos = eos_token_id
        self._starts = np.cumsum([0, *(len(source) for source in sources)])
        self._encoder = Encoder(tokenizer)
        self._largest_id = token_ids(tokenizer).largest
        chats = [source.config for source in sources if source.config.format == "chat"]
        self._chat = ChatRenderer(tokenizer) if chats else None
        for chat in chats:
            assert self._chat is not None
            self._chat.check_variables(chat.chat_template_kwargs)

    def __call__(self, record_id: int) -> Document | Rejection:
        source, k = self._locate(record_id)
        try:
            record = source.read(k)
            if source.config.format == "trajectory":
                return self._trajectory(record_id, record)
            tokens, loss_mask = self._tokenise(self._pieces(source.config, record))
            tokens, loss_mask = self._ended(tokens, loss_mask)
            return self._fitted(record_id, tokens, loss_mask)
        except DataError as error:
            return Rejection(
                f"{source.where(k)}: {error}", malformed=not isinstance(error, _TooLong)
            )

    def where(self, record_id: int) -> str:
        """Returns a record's "file:line"."""
        source, k = self._locate(record_id)
        return source.where(k)

    def _locate(self, record_id: int) -> tuple[Source, int]:
        number = int(np.searchsorted(self._starts, record_id, side="right")) - 1
        return self._sources[number], record_id - int(self._starts[number])

    def _pieces(self, config: SourceConfig, record: Any) -> list[tuple[str | list[int], bool]]:
        if config.format == "chat":
            assert self._chat is not None
            answer = None if config.prompt_field is None else config.field
            record = as_messages(record, prompt=config.prompt_field, answer=answer)
            pieces = self._chat.pieces(record, config.chat_template_kwargs)
            if self._config.loss == "all" and (unlearned := turns_without_loss(record)):
                raise DataError(
                    f"messages[{min(unlearned)}] is marked not to be learned, but loss: all learns everything; set"
                    " loss: response, or remove the mark"
                )
            return [*pieces]
        leading: tuple[str | list[int], bool] = (self._encoder.leading, False)
        if config.format == "text":
            return [leading, (_check_text(record, "the text"), True)]
        response = _text_field(record, config.field)
        prompt = (
            ""
            if config.prompt_field is None
            else _text_field(record, config.prompt_field, may_be_empty=True)
        )
        return [leading, (prompt, False), (response, True)]

    def _tokenise(self, pieces: list[tuple[str | list[int], bool]]) -> tuple[list[int], list[bool]]:
        """Tokenises each piece by itself: at inference a prompt is tokenised without its response."""
        tokens = []
        loss_mask = []
        for piece, response in pieces:
            ids = self._encoder(piece) if isinstance(piece, str) else piece
            tokens += ids
            loss_mask += [response or self._config.loss == "all"] * len(ids)
        if not any(loss_mask):
            raise DataError("no token of it can carry loss; give it a response, or leave it out")
        return tokens, loss_mask

    def _trajectory(self, record_id: int, record: Any) -> Document:
        """Makes the document of an answer that knows its steps."""
        found = read_trajectory(record, self._largest_id)
        tokens, loss_mask = found.tokens, [step >= 0 for step in found.order]
        if found.ended:
            tokens, loss_mask = self._ended(tokens, loss_mask)
        elif self._config.pad_to_block:
            # Where an answer was cut off there is no end to learn, and no filling that stands for one.
            whole = len(tokens) - len(tokens) % self.block_size
            tokens, loss_mask = tokens[:whole], loss_mask[:whole]
        if not any(loss_mask):
            raise DataError(
                "its answer was cut off within its first block; decode with more max_new_tokens, or leave it out"
            )
        # What stands behind the answer is taken as committed last.
        last = max(found.order) + 1
        order = (found.order + [last] * len(tokens))[: len(tokens)]
        return self._fitted(record_id, tokens, loss_mask, np.array(order, np.int32))

    def _ended(self, tokens: list[int], loss_mask: list[bool]) -> tuple[list[int], list[bool]]:
        """Ends the document, and fills its last block or its row."""
        if tokens[-1] != self._eos:
            tokens = [*tokens, self._eos]
            loss_mask = [*loss_mask, loss_mask[-1]]
        fill = self._fill(len(tokens))
        fill_has_loss = loss_mask[-1] and self._config.pad_loss
        return tokens + [self._eos] * fill, loss_mask + [fill_has_loss] * fill

    def _fitted(
        self,
        record_id: int,
        tokens: list[int],
        loss_mask: list[bool],
        order: Int[np.ndarray, "n"] | None = None,
    ) -> Document:
        """Makes the document, cut to the row. Raises _TooLong."""
        ids, mask = np.array(tokens, np.int32), np.array(loss_mask, bool)
        noisy = self._noisy_positions(mask)
        length = self._longest_prefix(noisy, len(ids))
        if length == len(ids):
            return Document(record_id, ids, mask, len(noisy), order=order)
        if self._config.too_long == "drop" or not mask[:length].any():
            raise _TooLong(
                f"{len(ids)} tokens, {len(noisy)} of them in blocks with loss, do not fit in a row"
            )
        kept = self._noisy_positions(mask[:length])
        order = None if order is None else order[:length]
        return Document(record_id, ids[:length], mask[:length], len(kept), cut=True, order=order)

    def _fill(self, length: int) -> int:
        """Counts the end-of-text tokens behind a document of this length."""
        if self._config.pad_to_row:
            return max(self._config.sequence_length - length, 0)
        return -length % self.block_size if self._config.pad_to_block else 0

    def _noisy_positions(self, loss_mask: Bool[np.ndarray, "n"]) -> Int[np.ndarray, "m"]:
        return noisy_positions(np.ones(len(loss_mask), np.int32), loss_mask, self.block_size)

    def _longest_prefix(self, noisy: Int[np.ndarray, "m"], length: int) -> int:
        """Computes how much of a document fits in an empty row, in full blocks where documents are padded to blocks."""
        config = self._config
        if config.packing == "split":
            return length
        room = min(length, config.sequence_length)
        if config.noisy_length is not None and len(noisy) > config.noisy_length:
            room = min(room, int(noisy[config.noisy_length]))
        return room - room % self.block_size if config.pad_to_block else room


def noisy_positions(
    segment_ids: Int[np.ndarray, "L"], loss_mask: Bool[np.ndarray, "L"], block_size: int
) -> Int[np.ndarray, "m"]:
    """Lists the positions, ascending, of every block that holds a token with loss.

    Args:
        segment_ids: int [L]; 0 is padding, found only at the end. Blocks are aligned to each segment's first token.
        loss_mask: bool [L].
        block_size: S.
    """
    index = np.arange(len(segment_ids))
    first = np.diff(segment_ids, prepend=0) != 0
    offset = index - np.maximum.accumulate(np.where(first, index, 0))
    block = np.cumsum(offset % block_size == 0) - 1
    wanted = np.zeros(len(segment_ids), bool)
    wanted[block[loss_mask]] = True
    return np.flatnonzero(wanted[block] & (segment_ids > 0))


def _text_field(record: dict[str, Any], name: str, *, may_be_empty: bool = False) -> str:
    if name not in record:
        raise DataError(
            f"no field {name!r} among {', '.join(map(repr, record))}; add it, or set field to another"
        )
    return _check_text(record[name], f"field {name!r}", may_be_empty=may_be_empty)


def _check_text(text: Any, name: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(text, str):
        raise DataError(f"{name} is of type {type(text).__name__}; give a string")
    if not may_be_empty and not text.strip():
        raise DataError(f"{name} is empty; fill it in or remove the record")
    return text
