"""The page pool against the plainest possible account of it: who holds what, and which prefixes were recorded."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sdar_jax.decoding.page_pool import PagePool
from sdar_jax.errors import ConfigError
from tests.bad_input import refused

BLOCK, PAGE, COUNT = 2, 4, 7
# Few different tokens and lengths, so that prefixes are often shared, in part or whole.
SEQUENCES = st.lists(st.integers(0, 1), min_size=BLOCK, max_size=3 * PAGE).map(
    lambda x: x[: len(x) // BLOCK * BLOCK]
)


class Traffic(RuleBasedStateMachine):
    """Requests that take pages as an engine does. `content` is what a device would hold: the tokens in each page."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(COUNT, PAGE, BLOCK)
        self.content: dict[int, list] = {page: [] for page in range(COUNT)}
        self.live: list[tuple[list[int], list[int]]] = []

    @rule(tokens=SEQUENCES)
    def start(self, tokens):
        prefix = self.pool.match(tokens)
        known = [token for page in prefix.pages for token in self.content[page]]
        assert all(len(self.content[page]) == PAGE for page in prefix.pages)
        if prefix.partial is not None:
            assert 0 < prefix.partial_length < PAGE and prefix.partial_length % BLOCK == 0
            known += self.content[prefix.partial][: prefix.partial_length]
        # What the pages hold is what the sequence starts with.
        assert len(known) == prefix.length <= len(tokens) and known == tokens[: prefix.length]
        missing = -(-len(tokens) // PAGE) - len(prefix.pages)
        self.pool.share(prefix.pages)
        own = self.pool.allocate(missing)
        if own is None:
            assert missing > self.pool.available
            self.pool.release(prefix.pages)
            return
        pages = [*prefix.pages, *own]
        for index, page in enumerate(pages):
            written = tokens[index * PAGE : (index + 1) * PAGE]
            if page in own:
                self.content[page] = written
        self.live.append((pages, tokens))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def record(self, data):
        pages, tokens = data.draw(st.sampled_from(self.live))
        done = data.draw(st.integers(0, len(tokens)))
        self.pool.record(pages, tokens[:done])
        again = self.pool.match(tokens)
        assert again.length >= done // BLOCK * BLOCK

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def finish(self, data):
        pages, _ = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.pool.release(pages)

    @invariant()
    def every_page_is_accounted_for(self):
        held = {page for pages, _ in self.live for page in pages}
        assert self.pool.available == COUNT - len(held)

    def teardown(self):
        for pages, _ in self.live:
            self.pool.release(pages)
        everything = self.pool.allocate(COUNT)
        assert everything is not None and sorted(everything) == list(range(COUNT))
        assert self.pool.match([0, 0]).length == 0


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=50, stateful_step_count=40)


def filled(pool: PagePool, tokens: list[int]) -> list[int]:
    pages = pool.allocate(-(-len(tokens) // pool.page_size))
    assert pages is not None
    pool.record(pages, tokens)
    return pages


def test_a_prefix_that_two_requests_read_at_once_is_found_where_it_goes_on():
    """Both have a first page of it, and only the second one's is continued."""
    pool = PagePool(COUNT, PAGE, BLOCK)
    first, second = pool.allocate(1), pool.allocate(2)
    pool.record(first, [1, 1, 1, 1])
    pool.record(second, [1, 1, 1, 1, 0, 0])
    found = pool.match([1, 1, 1, 1, 0, 0])
    assert (found.pages, found.partial, found.length) == ((second[0],), second[1], 6)
    assert pool.match([1, 1, 1, 1, 1, 1]).pages == tuple(first)


def test_least_recently_used_goes_first():
    pool = PagePool(3, 2, 2)
    old, new = filled(pool, [1, 1]), filled(pool, [2, 2])
    pool.release(old)
    pool.release(new)
    pool.share(pool.match([1, 1]).pages)
    pool.release(old)
    assert pool.allocate(2) is not None and pool.evictions == 1
    assert pool.match([1, 1]).length == 2 and pool.match([2, 2]).length == 0


def test_a_page_is_evicted_after_those_that_continue_it():
    pool = PagePool(3, 2, 2)
    pool.release(filled(pool, [1, 1, 2, 2, 3, 3]))
    for left in (4, 2, 0):
        assert pool.allocate(1) is not None
        assert pool.match([1, 1, 2, 2, 3, 3]).length == left


def test_too_much_takes_nothing():
    pool = PagePool(2, 2, 2)
    pool.release(filled(pool, [1, 1]))
    assert pool.allocate(3) is None
    assert pool.match([1, 1]).length == 2 and pool.available == 2


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_a_sequence_finds_itself_again(tokens):
    pool = PagePool(20, 4, 2)
    pool.release(filled(pool, tokens))
    prefix = pool.match(tokens)
    assert prefix.length == len(tokens) // 2 * 2
    longer = pool.match([*tokens, 9, 9, 9, 9])
    assert longer.length == prefix.length
    assert len(prefix.pages) == np.floor(len(tokens) / 4)


@pytest.mark.parametrize(
    "count, page, words", [(4, 6, ("page_size is 6", "4")), (0, 8, ("pages is 0", "at least 1"))]
)
def test_bad_sizes(count, page, words):
    with refused(ConfigError, *words):
        PagePool(count, page, 4)


def test_pages_to_spare_and_a_pool_that_is_cleared():
    pool = PagePool(4, PAGE, BLOCK)
    assert pool.allocate(2, 3) is None and pool.available == 4
    pages = pool.allocate(3, 1)
    assert pages is not None and pool.allocate(1, 1) is None and pool.allocate(1) is not None
    pool.record(pages, [1, 0] * PAGE)
    pool.clear()
    assert pool.available == 4 and pool.match([1, 0] * PAGE).length == 0
    assert sorted(pool.allocate(4) or []) == [0, 1, 2, 3] and pool.evictions == 0
