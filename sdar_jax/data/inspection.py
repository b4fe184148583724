"""What a run would read: documents, tokens, what is learned, what is left out and why, and how full the rows are."""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from sdar_jax.data.config import DataConfig
from sdar_jax.data.documents import Document, Rejection
from sdar_jax.data.packing import FitPacker, SplitPacker
from sdar_jax.data.pipeline import open_sources, record_stream

_VARYING = re.compile(r"'[^']*'|\"[^\"]*\"|\d+")


@dataclass
class Problem:
    """Records that give no document for one reason.

    Attributes:
        kind: "malformed" or "too long".
        reason: without what it names of one record, as `#`.
        example: the first of them, with its file and line.
        count: how many.
    """

    kind: str
    reason: str
    example: str
    count: int


@dataclass
class SourceReport:
    """What was read of one source.

    Attributes:
        path, format, weight: as in its config.
        share: of the records drawn.
        records: that it holds.
        read: how many of them were looked at, counted each time they come round.
        lengths: tokens of each document.
        learned: tokens that carry loss.
        cut: documents whose end was cut off.
        problems: why others gave no document, the most frequent first.
    """

    path: str
    format: str
    weight: float
    share: float
    records: int
    read: int = 0
    lengths: list[int] = field(default_factory=list)
    learned: int = 0
    cut: int = 0
    problems: list[Problem] = field(default_factory=list)

    def add(self, outcome: Document | Rejection, where: str) -> None:
        """Counts a record."""
        self.read += 1
        if isinstance(outcome, Document):
            self.lengths.append(len(outcome))
            self.learned += int(outcome.loss_mask.sum())
            self.cut += outcome.cut
            return
        kind = "malformed" if outcome.malformed else "too long"
        reason = _VARYING.sub("#", outcome.reason.removeprefix(f"{where}: "))
        same = [each for each in self.problems if (each.kind, each.reason) == (kind, reason)]
        if not same:
            same.append(Problem(kind, reason, outcome.reason, 0))
            self.problems += same
        same[0].count += 1


@dataclass
class DataReport:
    """What was read of a run's data.

    Attributes:
        sources: of the config, in its order.
        rows: that the documents gave, those still open at the end left out where there are others.
        full: part of these rows' positions that hold tokens.
        noisy: part of their noisy positions that are used; None without `noisy_length`.
        learned_a_row: mean number of tokens with loss.
        documents: the first that were read.
    """

    sources: list[SourceReport]
    rows: int = 0
    full: float = 0.0
    noisy: float | None = None
    learned_a_row: float = 0.0
    documents: list[Document] = field(default_factory=list)


def inspect_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int | None,
    eos_token_id: int,
    records: int | None = None,
    keep: int = 0,
) -> DataReport:
    """Makes the documents that a run would read first, and its rows; malformed records are counted, never raised.

    Args:
        block_size, eos_token_id: as for `make_dataset`.
        records: how many to draw, in the run's order; all of an epoch if None.
        keep: how many documents to keep.

    Raises:
        ConfigError: numbers that do not fit together. DataError: sources without records.
    """
    config = dataclasses.replace(config, on_error="skip", epochs=None, shards=1)
    sources, maker, weights = open_sources(
        config, tokenizer, block_size=block_size, eos_token_id=eos_token_id
    )
    stream, epoch = record_stream(config, [len(source) for source in sources], weights)
    reports = [
        SourceReport(
            each.config.path,
            each.config.format,
            each.config.weight,
            weight / sum(weights),
            len(each),
        )
        for each, weight in zip(sources, weights, strict=True)
    ]
    for report, source in zip(reports, sources, strict=True):
        report.problems += [Problem("malformed", each, each, 1) for each in source.failures]
    report = DataReport(reports)
    starts = np.cumsum([len(source) for source in sources])

    def documents() -> Iterator[tuple[int, Document]]:
        for i in range(epoch if records is None else min(records, epoch)):
            record = stream[i]
            assert record is not None
            outcome = maker(record)
            number = int(np.searchsorted(starts, record, side="right"))
            reports[number].add(outcome, maker.where(record))
            if isinstance(outcome, Document):
                if len(report.documents) < keep:
                    report.documents.append(outcome)
                yield i, outcome

    _fill(report, config, documents())
    for each in reports:
        each.problems.sort(key=lambda problem: -problem.count)
    return report


def _fill(
    report: DataReport, config: DataConfig, documents: Iterator[tuple[int, Document]]
) -> None:
    """Packs the documents and measures the rows."""
    ended = False

    def watched() -> Iterator[tuple[int, Document]]:
        nonlocal ended
        yield from documents
        ended = True

    length, noisy_length = config.sequence_length, config.noisy_length
    packer = (
        SplitPacker(watched(), length)
        if config.packing == "split"
        else FitPacker(watched(), length, noisy_length)
    )
    used, noisy, learned, rows = 0, 0, 0, 0
    while True:
        try:
            row = packer.next_row()
        except StopIteration:
            break
        # The last rows are not full because the records that were read end, and not those of the run.
        if ended and rows:
            continue
        rows += 1
        used += sum(piece.stop - piece.start for piece in row)
        noisy += sum(piece.document.noisy for piece in row)
        learned += sum(
            int(piece.document.loss_mask[piece.start : piece.stop].sum()) for piece in row
        )
    report.rows = rows
    if rows:
        report.full = used / (rows * length)
        report.learned_a_row = learned / rows
        if noisy_length is not None:
            report.noisy = noisy / (rows * noisy_length)
