"""From sources to batches: shuffled and mixed by grain, tokenised ahead in threads, packed, and cut by rows."""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import grain
import numpy as np
from transformers import PreTrainedTokenizerBase

from sdar_jax.data.config import DataConfig
from sdar_jax.data.documents import Document, DocumentMaker, Rejection
from sdar_jax.data.packing import FitPacker, Piece, SplitPacker, make_batch
from sdar_jax.data.sources import Source, source_names
from sdar_jax.data.token_cache import TokenCache, open_cache
from sdar_jax.errors import ConfigError, DataError

log = logging.getLogger(__name__)

REPORTED = 5
READ_AHEAD_PER_THREAD = 32
# Records of each source that are tokenised to know how long they are.
MEASURED = 256
# A saved position means nothing once one of these has changed.
POSITION_FIELDS = (
    "shuffle",
    "seed",
    "packing",
    "sequence_length",
    "noisy_length",
    "pad_to_block",
    "too_long",
)
LARGEST_RECORD_COUNT = 2**31 - 1

Maker = DocumentMaker | TokenCache


def make_dataset(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int | None,
    eos_token_id: int,
    rows: Sequence[int] | None = None,
) -> "PackedDataset":
    """Makes an endless (or `epochs` long) iterator over batches, or over some rows of each.

    Args:
        block_size: the model's S; None (an autoregressive model) counts as 1.
        eos_token_id: ends and pads documents.
        rows: ascending, among batch_size; those that are given out. None: all.

    A batch holds, for B rows of L = sequence_length tokens:
        tokens       int32 [B, L]   eos_token_id in padding
        segment_ids  int32 [B, L]   0 is padding, only at a row's end; 1, 2, ... count the row's documents, or are all 1
        loss_mask    bool  [B, L]   the tokens that can be corrupted and carry loss
        record_ids   int32 [B, L]   the record each token came from, -1 in padding; describe() names its file and line
        noisy_index  int32 [B, N]   with noisy_length: ascending positions of every block that holds a token with loss,
                                    then -1; blocks of S are aligned to each segment's first token
        order        int32 [B, L]   with a source of trajectories: the denoising step that committed each token, of what
                                    stands behind an answer the one after its last; -1 in prompts and padding

    The records are dealt to `shards` streams: stream i of n takes draws i, i + n, ... of one order, and packs the rows
    from batch_size / n * i on. Guarantee: neither a global batch nor the saved position depends on who gives out which
    rows; a run may resume with another number of processes. Only streams whose rows are given out are read and
    tokenised, and of each all of it: with one, every process reads everything.

    With `epochs`, the last rows are padded at their end and the last batch is filled up with rows of padding, so that
    no token is lost; then StopIteration. An epoch of several sources lasts until each record has been drawn at least
    once: sources that are small for their weight come round more often.

    Raises:
        ConfigError: numbers that do not fit together.
        DataError: sources without records; under on_error="fatal" iteration raises it at the first malformed record
            (restore a saved state to continue).
    """
    rows = range(config.batch_size) if rows is None else rows
    _check_rows(config, rows)
    sources, maker, weights = open_sources(
        config, tokenizer, block_size=block_size, eos_token_id=eos_token_id
    )
    return PackedDataset(config, maker, sources, weights, maker.block_size, eos_token_id, rows)


def open_sources(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int | None,
    eos_token_id: int,
) -> tuple[list[Source], Maker, list[float]]:
    """Opens the sources; makes what turns their records into documents, and each source's share of the records drawn.

    Raises as `make_dataset`.
    """
    block_size = 1 if block_size is None else block_size
    _check_numbers(config, block_size)
    if not config.sources:
        raise ConfigError("sources is empty: name at least one source to read")
    sources = [Source(source) for source in config.sources]
    _check_sources(config, sources)
    maker = DocumentMaker(
        config, tokenizer, sources, block_size=block_size, eos_token_id=eos_token_id
    )
    if config.token_cache is not None:
        maker = open_cache(config, tokenizer, sources, maker, eos_token_id)
    return sources, maker, _record_weights(config, maker, sources)


class PackedDataset(Iterator[dict[str, np.ndarray]]):
    """Iterates over batches: see make_dataset. `skipped`, `dropped` and `cut` count malformed and too long records.

    `source_names` are short and differ, in the order of the config's sources.
    """

    def __init__(
        self,
        config: DataConfig,
        maker: Maker,
        sources: list[Source],
        weights: list[float],
        block_size: int,
        eos_token_id: int,
        rows: Sequence[int],
    ):
        self._config = config
        self._maker = maker
        self._source_ends = np.cumsum([len(source) for source in sources])
        self.source_names = source_names([source.config.path for source in sources])
        self._layout = {"block_size": block_size, "eos_token_id": eos_token_id}
        size = config.batch_size // config.shards
        numbers = sorted({row // size for row in rows})
        threads = math.ceil(config.num_threads / len(numbers))
        self._shards = {}
        for number in numbers:
            own_rows = [row % size for row in rows if row // size == number]
            self._shards[number] = _Shard(
                config, maker, sources, weights, number, own_rows, threads
            )
        self._order = {
            "records": [len(source) for source in sources],
            "weights": weights,
            "block_size": block_size,
            **{name: getattr(config, name) for name in POSITION_FIELDS},
        }
        if config.shards > 1:
            self._order["shards"] = config.shards
        if config.pad_to_row:
            self._order["pad_to_row"] = True

    def __next__(self) -> dict[str, np.ndarray]:
        rows = [row for shard in self._shards.values() for row in shard.next_rows()]
        return make_batch(rows, self._config, **self._layout)

    def get_state(self) -> dict[str, Any]:
        """Returns the position behind the last batch given out; JSON can hold it.

        With one shard it is the same on every process. With more it is of those that are read here: see `join_states`.
        """
        states = {str(number): shard.get_state() for number, shard in self._shards.items()}
        if self._config.shards == 1:
            return {"order": self._order, **states["0"]}
        return {"order": self._order, "shards": states}

    def set_state(self, state: dict[str, Any]):
        """Resumes exactly where get_state was called. Raises DataError if data or order are not what they were then."""
        # What an order does not name is as it was before there was a choice.
        defaults = {"shards": 1, "pad_to_row": False}
        then = {**defaults, **state["order"]}
        for name, now in {**defaults, **self._order}.items():
            if then[name] != now:
                raise DataError(
                    f"the saved position was taken with {name}={then[name]}, this dataset has {now}: restore"
                    " what it was, or begin a new run"
                )
        for number, shard in self._shards.items():
            shard.set_state(state if self._config.shards == 1 else state["shards"][str(number)])

    def describe(self, record_ids: Iterable[int] | np.ndarray) -> list[str]:
        """Lists each different record as "file:line" (parquet: "file:row", from 1), ascending, without padding's -1."""
        return [self._maker.where(int(i)) for i in np.unique(np.asarray(record_ids)) if i >= 0]

    def sources_of(self, record_ids: np.ndarray) -> np.ndarray:
        """Finds the number of the source that each record is of, from 0; 0 for padding's -1."""
        return np.searchsorted(self._source_ends, record_ids, side="right")

    @property
    def skipped(self) -> int:
        return self._count("skipped")

    @property
    def dropped(self) -> int:
        return self._count("dropped")

    @property
    def cut(self) -> int:
        return self._count("cut")

    def _count(self, kind: str) -> int:
        return sum(shard.feed.counts[kind] for shard in self._shards.values())

    def close(self):
        """Ends the reading threads."""
        for shard in self._shards.values():
            shard.feed.close()


def join_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Joins the positions of several processes, which together read all shards, at the same batch into one."""
    if "shards" not in states[0]:
        return states[0]
    shards = {number: shard for state in states for number, shard in state["shards"].items()}
    return {**states[0], "shards": {number: shards[number] for number in sorted(shards, key=int)}}


class _Shard:
    """Packs a stream of records; of the rows that it fills in a batch, `rows` are given out (from 0)."""

    def __init__(
        self,
        config: DataConfig,
        maker: Maker,
        sources: list[Source],
        weights: list[float],
        number: int,
        rows: Sequence[int],
        threads: int,
    ):
        self._size = config.batch_size // config.shards
        self._rows = rows
        self.feed = DocumentFeed(
            config, maker, sources, weights, shard=number, threads=threads, report=rows[0] == 0
        )
        if config.packing == "split":
            self._packer = SplitPacker(self.feed, config.sequence_length)
        else:
            self._packer = FitPacker(self.feed, config.sequence_length, config.noisy_length)

    def next_rows(self) -> list[list[Piece]]:
        rows: list[list[Piece]] = []
        while len(rows) < self._size:
            try:
                rows.append(self._packer.next_row())
            except StopIteration:
                if not rows:
                    raise
                rows += [[]] * (self._size - len(rows))
        return [rows[row] for row in self._rows]

    def get_state(self) -> dict[str, Any]:
        return {"feed": self.feed.get_state(), "open": self._packer.get_state()}

    def set_state(self, state: dict[str, Any]):
        self.feed.set_state(state["feed"])
        self._packer.set_state(state["open"], self.feed.reload)


class DocumentFeed(Iterator[tuple[int, Document]]):
    """Yields (stream index, document); records that give none are counted, and the first few logged."""

    def __init__(
        self,
        config: DataConfig,
        maker: Maker,
        sources: list[Source],
        weights: list[float],
        *,
        shard: int,
        threads: int,
        report: bool,
    ):
        records, self._epoch_length = record_stream(
            config, [len(source) for source in sources], weights
        )
        records = records if config.shards == 1 else records[shard :: config.shards]
        self._outcomes = records.map(maker)
        self._read_ahead = _read_ahead(self._outcomes, threads)
        self._fatal = config.on_error == "fatal"
        self._report = report
        self._index = 0
        # How many records in a row gave no document.
        self._fruitless = 0
        self.counts = {"skipped": 0, "dropped": 0, "cut": 0}
        if shard == 0:
            for source in sources:
                for failure in source.failures:
                    self._note(Rejection(failure, malformed=True))

    def __next__(self) -> tuple[int, Document]:
        while True:
            try:
                outcome = next(self._read_ahead)
            except StopIteration as error:
                # Raised while a record is read, it would pass for the end of the data.
                if self._index < len(self._outcomes):
                    raise RuntimeError(
                        f"reading stopped at record {self._index} of the stream, not at its end"
                    ) from error
                raise
            self._index += 1
            if isinstance(outcome, Document):
                self._fruitless = 0
                self.counts["cut"] += outcome.cut
                return self._index - 1, outcome
            self._note(outcome)
            self._fruitless += 1
            if self._fruitless >= self._epoch_length:
                raise DataError(
                    f"none of {self._epoch_length} records can be used; the last: {outcome.reason}"
                )

    def _note(self, rejection: Rejection):
        if rejection.malformed and self._fatal:
            raise DataError(f"{rejection.reason} (on_error: skip leaves such records out)")
        kind = "skipped" if rejection.malformed else "dropped"
        self.counts[kind] += 1
        if self._report and self.counts[kind] <= REPORTED:
            last = "; further ones are only counted" if self.counts[kind] == REPORTED else ""
            log.warning("%s: %s%s", kind, rejection.reason, last)

    def reload(self, index: int) -> Document:
        """Makes the document at an index that gave one before. Raises DataError if it no longer does."""
        outcome = self._outcomes[index]
        if isinstance(outcome, Document):
            return outcome
        raise DataError(
            f"record {index} of the stream was usable when the position was saved: restore its file"
        )

    def get_state(self) -> dict[str, Any]:
        return {"next_index": self._index, **self.counts}

    def set_state(self, state: dict[str, Any]):
        self._index = state["next_index"]
        self._fruitless = 0
        self.counts = {name: state[name] for name in self.counts}
        self._read_ahead.set_state({"next_index": self._index})

    def close(self):
        self._read_ahead.close()


def record_stream(
    config: DataConfig, lengths: list[int], weights: list[float]
) -> tuple[grain.MapDataset, int]:
    """Makes the stream of record ids in the order in which they are drawn, and counts the draws of an epoch."""
    starts = np.cumsum([0, *lengths]).tolist()
    parts = [grain.MapDataset.range(a, b) for a, b in pairwise(starts)]
    if config.shuffle:
        # Hashed, as grain numbers an epoch's shuffle seed + epoch: neighbouring seeds would share their orders.
        seeds = np.random.SeedSequence(config.seed).generate_state(len(parts))
        parts = [part.shuffle(seed=int(seed)) for part, seed in zip(parts, seeds, strict=True)]
    parts = [part.repeat() for part in parts]
    if len(parts) == 1:
        stream, epoch_length = parts[0], lengths[0]
    else:
        stream, epoch_length = _mix(parts, lengths, weights)
    if config.epochs is not None:
        stream = stream[: config.epochs * epoch_length]
    return stream, epoch_length


def _record_weights(config: DataConfig, maker: Maker, sources: list[Source]) -> list[float]:
    """Makes each source's share of the records drawn. A share of tokens is one of records through their mean length.

    Raises DataError for a source none of whose measured records gives a document.
    """
    weights = [source.weight for source in config.sources]
    if config.weights == "records" or len(sources) == 1:
        return weights
    starts = np.cumsum([0, *(len(source) for source in sources)])
    for i, source in enumerate(sources):
        # Evenly spaced, so that it does not depend on a file's order, and the same at each start.
        places = np.unique(np.linspace(0, len(source) - 1, MEASURED).astype(int))
        made = [maker(int(starts[i] + place)) for place in places]
        lengths = [len(document) for document in made if isinstance(document, Document)]
        if not lengths:
            raise DataError(
                f"{source.config.path}: none of {len(made)} records can be used to measure weights in tokens; see"
                f" `sdar-jax data`, or set weights: records"
            )
        weights[i] /= sum(lengths) / len(lengths)
    return weights


def _mix(
    parts: list[grain.MapDataset], lengths: list[int], weights: list[float]
) -> tuple[grain.MapDataset, int]:
    # Whole numbers as grain itself makes of weights, so that the epoch is counted with the same ones.
    shares = [int(weight * 100 / min(weights)) for weight in weights]
    # Of the first n draws, part i has at least n * shares[i] / sum(shares) - i.
    draws = [
        math.ceil((length + i) * sum(shares) / share)
        for i, (length, share) in enumerate(zip(lengths, shares, strict=True))
    ]
    return grain.MapDataset.mix(parts, shares), max(draws)


def _read_ahead(outcomes: grain.MapDataset, num_threads: int) -> grain.DatasetIterator:
    options = grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=READ_AHEAD_PER_THREAD * num_threads
    )
    return iter(outcomes.to_iter_dataset(options))


def _check_numbers(config: DataConfig, block_size: int):
    if block_size < 1:
        raise ConfigError(f"block_size={block_size}: give at least 1")
    if config.pad_to_block and config.sequence_length % block_size:
        longer = math.ceil(config.sequence_length / block_size) * block_size
        raise ConfigError(
            f"sequence_length={config.sequence_length} is no multiple of block_size={block_size}, as pad_to_block"
            f" needs; use {longer}, or leave pad_to_block out"
        )


def _check_rows(config: DataConfig, rows: Sequence[int]):
    if (
        not rows
        or list(rows) != sorted(set(rows))
        or not 0 <= rows[0] <= rows[-1] < config.batch_size
    ):
        raise ConfigError(
            f"rows={list(rows)}: give ascending numbers from 0 to batch_size - 1, {config.batch_size - 1}"
        )


def _check_sources(config: DataConfig, sources: list[Source]):
    for source in sources:
        if source.failures and (config.on_error == "fatal" or not len(source)):
            raise DataError(source.failures[0])
        if not len(source):
            raise DataError(f"{source.config.path}: no record in it; give files that are not empty")
    total = sum(len(source) for source in sources)
    if total > LARGEST_RECORD_COUNT:
        raise DataError(
            f"{total} records are more than record_ids can number ({LARGEST_RECORD_COUNT}); give fewer files"
        )
