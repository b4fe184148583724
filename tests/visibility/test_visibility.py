"""Every paradigm's ranges against a mask made position by position from its definition."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar_jax import visibility
from sdar_jax.errors import ConfigError
from sdar_jax.visibility import Ranges
from tests.bad_input import refused
from tests.jaxprs import largest_array
from tests.tiny import pack, segment_rows

ROWS, LENGTH, NOISY = 2, 13, 9
BLOCK_SIZES = st.sampled_from([1, 2, 3, 4, 16, None])

block_causal = partial(jax.jit, static_argnums=1)(visibility.block_causal)
causal, bidirectional = jax.jit(visibility.causal), jax.jit(visibility.bidirectional)
segments = jax.jit(visibility.segments)
hybrid = partial(jax.jit, static_argnums=1)(visibility.hybrid)
packed_rows = segment_rows(ROWS, LENGTH)


class Place:
    """Where a position of a row is: its document (by the first position; None for padding), and its block in it."""

    def __init__(self, segment_ids: np.ndarray, index: int, block_size: int | None):
        first = index
        while first and segment_ids[first - 1] == segment_ids[index]:
            first -= 1
        self.document = first if segment_ids[index] > 0 else None
        self.position = index - first
        self.block = 0 if block_size is None else self.position // block_size


def places(segment_ids: np.ndarray, block_size: int | None) -> list[Place]:
    return [Place(segment_ids, i, block_size) for i in range(len(segment_ids))]


def same_document(query: Place, key: Place) -> bool:
    return query.document is not None and query.document == key.document


def hybrid_mask(segment_ids: np.ndarray, block_size: int | None, noisy_index) -> np.ndarray:
    """Eq. 7, row by row: rows and columns [noisy | clean]."""
    at = places(segment_ids, block_size)
    copies = [at[i] if i >= 0 else None for i in noisy_index]
    sides = [(place, True) for place in copies] + [(place, False) for place in at]
    mask = np.zeros((len(sides), len(sides)), bool)
    for q, (query, query_is_noisy) in enumerate(sides):
        for k, (key, key_is_noisy) in enumerate(sides):
            if query is None or key is None or not same_document(query, key):
                continue
            if query_is_noisy:
                mask[q, k] = key.block == query.block if key_is_noisy else key.block < query.block
            else:
                mask[q, k] = not key_is_noisy and key.block <= query.block
    return mask


def dense(ranges: Ranges, keys: int) -> np.ndarray:
    return np.asarray(ranges.sees(jnp.arange(keys)))


def check_ranges(ranges: Ranges, keys: int) -> None:
    """Two disjoint ranges inside the keys: a kernel may add both up without counting a key twice."""
    start, end = np.asarray(ranges.start), np.asarray(ranges.end)
    assert start.dtype == end.dtype == np.int32
    assert ((start >= 0) & (start <= end) & (end <= keys)).all()
    overlap = np.minimum(end[..., 0], end[..., 1]) - np.maximum(start[..., 0], start[..., 1])
    assert (overlap[(start < end).all(axis=-1)] <= 0).all()


@given(packed_rows, BLOCK_SIZES)
def test_block_causal(segment_ids, block_size):
    ranges = block_causal(segment_ids, block_size)
    check_ranges(ranges, LENGTH)
    for row, ids in enumerate(segment_ids):
        at = places(ids, block_size)
        wanted = [[same_document(q, k) and k.block <= q.block for k in at] for q in at]
        np.testing.assert_array_equal(dense(ranges, LENGTH)[row], wanted)


@partial(jax.jit, static_argnums=(2, 3))
def block_causal_from_response(segment_ids, response, block_size, bidirectional_prompt):
    origin = visibility.response_start(segment_ids, response)
    return visibility.block_causal(
        segment_ids, block_size, origin=origin, bidirectional_prompt=bidirectional_prompt
    )


def block_from_response(
    members: list[int], response: np.ndarray, size: int, i: int, bidirectional_prompt: bool
) -> tuple[int, int]:
    """(0 for the prompt or 1 for the response, number of the block in it) of a position of a document."""
    first = next((k for k in members if response[k]), members[0])
    if i >= first:
        return 1, (i - first) // size
    return 0, 0 if bidirectional_prompt else (i - members[0]) // size


@given(packed_rows, st.sampled_from([1, 3, 4]), st.booleans(), st.integers(0, 2**32 - 1))
def test_block_causal_from_the_response(segment_ids, block_size, bidirectional_prompt, seed):
    response = np.random.default_rng(seed).random((ROWS, LENGTH)) < 0.3
    ranges = block_causal_from_response(segment_ids, response, block_size, bidirectional_prompt)
    check_ranges(ranges, LENGTH)
    for row, ids in enumerate(segment_ids):
        at = places(ids, None)
        wanted = np.zeros((LENGTH, LENGTH), bool)
        for document in {place.document for place in at} - {None}:
            members = [i for i, place in enumerate(at) if place.document == document]
            blocks = {
                i: block_from_response(members, response[row], block_size, i, bidirectional_prompt)
                for i in members
            }
            for i in members:
                wanted[i, members] = [blocks[j] <= blocks[i] for j in members]
        np.testing.assert_array_equal(dense(ranges, LENGTH)[row], wanted)


@given(packed_rows)
def test_causal_and_bidirectional(segment_ids):
    seen, seen_causally = (
        dense(bidirectional(segment_ids), LENGTH),
        dense(causal(segment_ids), LENGTH),
    )
    for row, ids in enumerate(segment_ids):
        at = places(ids, None)
        together = np.array([[same_document(q, k) for k in at] for q in at])
        np.testing.assert_array_equal(seen[row], together)
        np.testing.assert_array_equal(seen_causally[row], np.tril(together))


@given(packed_rows, BLOCK_SIZES)
def test_hybrid(segment_ids, block_size):
    ranges = hybrid(segment_ids, block_size)
    check_ranges(ranges, 2 * LENGTH)
    for row, ids in enumerate(segment_ids):
        wanted = hybrid_mask(ids, block_size, range(LENGTH))
        np.testing.assert_array_equal(dense(ranges, 2 * LENGTH)[row], wanted)


@given(packed_rows, BLOCK_SIZES, st.data())
def test_hybrid_with_noisy_index(segment_ids, block_size, data):
    """Any ascending choice of positions, padding and parts of blocks among them, and any number left unused."""
    chosen = st.sets(st.integers(0, LENGTH - 1), max_size=NOISY).map(sorted)
    noisy_index = np.full((ROWS, NOISY), -1, np.int32)
    for row in noisy_index:
        indices = data.draw(chosen)
        row[: len(indices)] = indices
    ranges = hybrid(segment_ids, block_size, noisy_index)
    check_ranges(ranges, NOISY + LENGTH)
    for row, ids in enumerate(segment_ids):
        wanted = hybrid_mask(ids, block_size, noisy_index[row])
        np.testing.assert_array_equal(dense(ranges, NOISY + LENGTH)[row], wanted)


def test_the_drawn_hybrid():
    """The picture of semantics, section 1: L = 4, S = 2."""
    picture = """
    1 1 0 0 0 0 0 0
    1 1 0 0 0 0 0 0
    0 0 1 1 1 1 0 0
    0 0 1 1 1 1 0 0
    0 0 0 0 1 1 0 0
    0 0 0 0 1 1 0 0
    0 0 0 0 1 1 1 1
    0 0 0 0 1 1 1 1"""
    wanted = np.array([line.split() for line in picture.split("\n")[1:]]) == "1"
    np.testing.assert_array_equal(dense(hybrid(pack([4], length=4), 2), 8)[0], wanted)


def test_all_noisy_indices_are_no_noisy_index():
    segment_ids = pack([5, 3, -2], [1, 9], length=10)
    every = np.tile(np.arange(10, dtype=np.int32), (2, 1))
    np.testing.assert_array_equal(
        dense(hybrid(segment_ids, 4, every), 20), dense(hybrid(segment_ids, 4), 20)
    )


@given(packed_rows)
def test_segments(segment_ids):
    found = segments(segment_ids)
    for row, ids in enumerate(segment_ids):
        at = places(ids, None)
        np.testing.assert_array_equal(found.positions[row], [place.position for place in at])
        for i, place in enumerate(at):
            members = [k for k, other in enumerate(at) if same_document(place, other)]
            bounds = (members[0], members[-1] + 1) if members else (found.start[row, i],) * 2
            assert (found.start[row, i], found.end[row, i]) == bounds


def test_nothing_has_a_query_and_a_key_axis():
    length = 512
    index = jnp.arange(length, dtype=jnp.int32)[None]
    for make in (
        lambda ids: visibility.hybrid(ids, 4),
        lambda ids: visibility.hybrid(ids, 4, index),
    ):
        assert largest_array(make, jnp.ones((1, length), jnp.int32)) <= 8 * length


@pytest.mark.parametrize("block_size", [0, -4, 2.0, True, "4"])
def test_bad_block_size(block_size):
    with refused(ConfigError, f"block_size is {block_size!r}", "positive integer"):
        visibility.check_block_size(block_size)
