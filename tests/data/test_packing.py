"""Packers on made-up documents, against plain Python."""

import contextlib
import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sdar_jax.data.config import DataConfig, SourceConfig
from sdar_jax.data.documents import Document, noisy_positions
from sdar_jax.data.packing import OPEN_ROWS, FitPacker, SplitPacker, make_batch

EOS = 7


def make_documents(lengths, block_size=4, seed=0):
    """Tokens 1000 * document + position, so that each token tells where it came from."""
    random = np.random.default_rng(seed)
    documents = []
    for i, length in enumerate(lengths):
        loss_mask = np.arange(length) >= random.integers(0, length)
        noisy = len(noisy_positions(np.ones(length, np.int32), loss_mask, block_size))
        documents.append(
            Document(i, 1000 * i + np.arange(length, dtype=np.int32), loss_mask, noisy)
        )
    return documents


def rows_of(packer):
    rows = []
    while True:
        try:
            rows.append(packer.next_row())
        except StopIteration:
            return rows


def tokens_of(row):
    return [
        token for piece in row for token in piece.document.tokens[piece.start : piece.stop].tolist()
    ]


def noisy_by_hand(segment_ids, loss_mask, block_size):
    blocks, seen = {}, {}
    for i, segment in enumerate(segment_ids):
        if segment:
            position = seen[segment] = seen.get(segment, -1) + 1
            blocks.setdefault((segment, position // block_size), []).append(i)
    return sorted(i for block in blocks.values() if any(loss_mask[j] for j in block) for i in block)


@given(
    st.lists(st.integers(1, 9), max_size=6),
    st.integers(0, 5),
    st.integers(1, 5),
    st.integers(0, 2**32 - 1),
)
def test_noisy_positions_are_those_found_by_hand(lengths, padding, block_size, seed):
    segment_ids = np.array(
        [s for s, n in enumerate(lengths, 1) for _ in range(n)] + [0] * padding, np.int32
    )
    random = np.random.default_rng(seed)
    loss_mask = (random.random(len(segment_ids)) < random.random()) & (segment_ids > 0)
    found = noisy_positions(segment_ids, loss_mask, block_size)
    assert found.tolist() == noisy_by_hand(segment_ids.tolist(), loss_mask, block_size)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 30))
def test_split_rows_are_full_and_hold_the_stream_in_order(lengths, row_length):
    documents = make_documents(lengths)
    rows = [tokens_of(row) for row in rows_of(SplitPacker(iter(enumerate(documents)), row_length))]
    assert [token for row in rows for token in row] == [
        token for document in documents for token in document.tokens.tolist()
    ]
    assert all(len(row) == row_length for row in rows[:-1])
    assert 0 < len(rows[-1]) <= row_length


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=150), st.integers(8, 20), st.integers(0, 99)
)
def test_fit_rows_hold_every_document_once_and_whole(lengths, noisy_length, seed):
    documents = [
        document
        for document in make_documents(lengths, seed=seed)
        if document.noisy <= noisy_length
    ]
    rows = rows_of(FitPacker(iter(enumerate(documents)), 20, noisy_length))
    assert all(sum(piece.document.noisy for piece in row) <= noisy_length for row in rows)
    assert all(0 < len(tokens_of(row)) <= 20 for row in rows)
    assert all(
        (piece.start, piece.stop) == (0, len(piece.document)) for row in rows for piece in row
    )
    assert sorted(piece.document.record_id for row in rows for piece in row) == [
        d.record_id for d in documents
    ]


def test_fit_wastes_little():
    lengths = np.random.default_rng(0).integers(10, 700, 800).tolist()
    rows = rows_of(FitPacker(iter(enumerate(make_documents(lengths))), 1000, None))
    assert sum(lengths) / (1000 * len(rows)) > 0.97


def test_fit_opens_no_more_than_its_limit():
    packer = FitPacker(iter(enumerate(make_documents([15] * 100))), 20, None)
    for _ in range(60):
        packer.next_row()
        assert len(packer.get_state()) <= OPEN_ROWS


class Stream:
    """(index, document) from a position on, which it keeps."""

    def __init__(self, documents, position=0):
        self.documents, self.position = documents, position

    def __iter__(self):
        return self

    def __next__(self):
        if self.position == len(self.documents):
            raise StopIteration
        self.position += 1
        return self.position - 1, self.documents[self.position - 1]


@given(
    st.sampled_from(["split", "fit"]),
    st.lists(st.integers(1, 20), min_size=1, max_size=120),
    st.integers(0, 20),
)
def test_a_packer_goes_on_from_its_state(kind, lengths, before):
    documents = [document for document in make_documents(lengths) if document.noisy <= 15]

    def pack(stream):
        return SplitPacker(stream, 20) if kind == "split" else FitPacker(stream, 20, 15)

    packer = pack(stream := Stream(documents))
    with contextlib.suppress(StopIteration):
        for _ in range(before):
            packer.next_row()
    restored = pack(Stream(documents, stream.position))
    restored.set_state(json.loads(json.dumps(packer.get_state())), documents.__getitem__)
    assert [tokens_of(row) for row in rows_of(restored)] == [
        tokens_of(row) for row in rows_of(packer)
    ]


def test_a_batch_by_hand():
    config = DataConfig(
        (SourceConfig("x", "jsonl"),), sequence_length=6, batch_size=2, noisy_length=6
    )
    first = Document(4, np.array([10, 11, 12], np.int32), np.array([False, False, True]), 1)
    second = Document(9, np.array([20, 21], np.int32), np.array([False, True]), 2)
    packer = FitPacker(iter(enumerate([first, second])), 6, 6)
    batch = make_batch([packer.next_row(), []], config, block_size=2, eos_token_id=EOS)
    expected = {
        "tokens": [[10, 11, 12, 20, 21, EOS], [EOS] * 6],
        "segment_ids": [[1, 1, 1, 2, 2, 0], [0] * 6],
        "loss_mask": [[False, False, True, False, True, False], [False] * 6],
        "record_ids": [[4, 4, 4, 9, 9, -1], [-1] * 6],
        "noisy_index": [[2, 3, 4, -1, -1, -1], [-1] * 6],
    }
    assert {name: array.tolist() for name, array in batch.items()} == expected
    dtypes = {name: array.dtype.name for name, array in batch.items()}
    assert dtypes == {name: "bool" if name == "loss_mask" else "int32" for name in expected}
