"""Packing: a stream of documents becomes rows of at most L tokens, one row at a time.

Written here because a saved position must be exact. grain 0.2.18's ConcatThenSplitIterDataset loses a record when its
state has been through JSON (its slices come back as lists), and its FirstFitPackIterDataset empties all of its bins as
soon as one document fits in none. A state here is a list of references into the stream, read again to restore it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from sdar_jax.data.config import DataConfig
from sdar_jax.data.documents import Document, noisy_positions

OPEN_ROWS = 32

Stream = Iterator[tuple[int, Document]]
Reload = Callable[[int], Document]


@dataclass(frozen=True)
class Piece:
    """The tokens start..stop of a document."""

    document: Document
    start: int
    stop: int


class SplitPacker:
    """Joins documents and cuts them in rows of exactly `length`; only the very last row can be shorter."""

    def __init__(self, stream: Stream, length: int):
        self._stream = stream
        self._length = length
        self._rest: tuple[int, int, Document] | None = None

    def next_row(self) -> list[Piece]:
        """Returns the next row. Raises StopIteration when nothing is left."""
        row = []
        room = self._length
        while room and (found := self._take()):
            index, start, document = found
            stop = min(start + room, len(document))
            row.append(Piece(document, start, stop))
            room -= stop - start
            self._rest = (index, stop, document) if stop < len(document) else None
        if not row:
            raise StopIteration
        return row

    def _take(self) -> tuple[int, int, Document] | None:
        if self._rest is not None:
            return self._rest
        found = next(self._stream, None)
        if found is None:
            return None
        index, document = found
        return index, 0, document

    def get_state(self) -> list[list[int]]:
        """Returns [[stream index, first token]] of the document not yet used up, or []."""
        if self._rest is None:
            return []
        index, start, _ = self._rest
        return [[index, start]]

    def set_state(self, state: list[list[int]], reload: Reload):
        self._rest = next(((index, start, reload(index)) for index, start in state), None)


@dataclass(eq=False)
class _OpenRow:
    documents: list[tuple[int, Document]] = field(default_factory=list)
    length: int = 0
    noisy: int = 0

    def add(self, index: int, document: Document):
        self.documents.append((index, document))
        self.length += len(document)
        self.noisy += document.noisy


class FitPacker:
    """Puts each document, uncut, in the fullest of at most OPEN_ROWS open rows that has room for it.

    A row is given out when it is full, or when a document fits in none and the fullest has to make way.

    Args:
        noisy_length: a row's budget of noisy positions; None means no limit.
    """

    def __init__(self, stream: Stream, length: int, noisy_length: int | None):
        self._stream = stream
        self._length = length
        self._noisy_length = length if noisy_length is None else noisy_length
        self._open: list[_OpenRow] = []

    def next_row(self) -> list[Piece]:
        """Returns the next row. Raises StopIteration when nothing is left."""
        while not any(row.length == self._length for row in self._open):
            found = next(self._stream, None)
            if found is None:
                break
            fitting = [row for row in self._open if self._fits(row, found[1])]
            if fitting:
                max(fitting, key=self._fullness).add(*found)
                continue
            self._open.append(_OpenRow())
            self._open[-1].add(*found)
            if len(self._open) > OPEN_ROWS:
                return self._close(self._open[:-1])
        return self._close(self._open)

    def _fits(self, row: _OpenRow, document: Document) -> bool:
        fits_length = row.length + len(document) <= self._length
        return fits_length and row.noisy + document.noisy <= self._noisy_length

    def _fullness(self, row: _OpenRow) -> float:
        return max(row.length / self._length, row.noisy / self._noisy_length)

    def _close(self, rows: list[_OpenRow]) -> list[Piece]:
        if not rows:
            raise StopIteration
        row = max(rows, key=lambda row: (row.length == self._length, self._fullness(row)))
        self._open.remove(row)
        return [Piece(document, 0, len(document)) for _, document in row.documents]

    def get_state(self) -> list[list[int]]:
        """Returns the stream indices of each open row's documents."""
        return [[index for index, _ in row.documents] for row in self._open]

    def set_state(self, state: list[list[int]], reload: Reload):
        self._open = []
        for indices in state:
            row = _OpenRow()
            for index in indices:
                row.add(index, reload(index))
            self._open.append(row)


def make_batch(
    rows: list[list[Piece]], config: DataConfig, *, block_size: int, eos_token_id: int
) -> dict[str, np.ndarray]:
    """Makes the arrays of make_dataset's batch for these rows; an empty row is all padding."""
    shape = (len(rows), config.sequence_length)
    tokens = np.full(shape, eos_token_id, np.int32)
    record_ids = np.full(shape, -1, np.int32)
    segment_ids = np.zeros(shape, np.int32)
    loss_mask = np.zeros(shape, bool)
    order = np.full(shape, -1, np.int32)
    for b, row in enumerate(rows):
        end = 0
        for number, piece in enumerate(row, start=1):
            start = end
            end += piece.stop - piece.start
            source = slice(piece.start, piece.stop)
            target = slice(start, end)
            tokens[b, target] = piece.document.tokens[source]
            loss_mask[b, target] = piece.document.loss_mask[source]
            if piece.document.order is not None:
                order[b, target] = piece.document.order[source]
            record_ids[b, target] = piece.document.record_id
            segment_ids[b, target] = number if config.segments == "document" else 1
    batch = {
        "tokens": tokens,
        "segment_ids": segment_ids,
        "loss_mask": loss_mask,
        "record_ids": record_ids,
    }
    if config.has_order:
        batch["order"] = order
    if config.noisy_length is not None:
        batch["noisy_index"] = _noisy_index(segment_ids, loss_mask, config.noisy_length, block_size)
    return batch


def _noisy_index(
    segment_ids: np.ndarray, loss_mask: np.ndarray, noisy_length: int, block_size: int
) -> np.ndarray:
    index = np.full((len(segment_ids), noisy_length), -1, np.int32)
    for row, row_segment_ids, row_loss_mask in zip(index, segment_ids, loss_mask, strict=True):
        positions = noisy_positions(row_segment_ids, row_loss_mask, block_size)
        row[: len(positions)] = positions
    return index
