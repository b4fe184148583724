"""Which page of the cache belongs to whom, and which finished prefixes can be read again: host-side bookkeeping.

A page holds the keys and values of `page_size` positions, a multiple of the block size S. Finished blocks are recorded
with the tokens that made them, as a tree: a page hangs below the page before it, and a child is found by the tokens of
its first block. So a second request with the same prefix shares the pages that it fills completely; where it parts from
another in the middle of a page, after whole blocks, that page is to be copied before it is written on.

A page is free, used by requests, or kept: used by none, but readable until the least recently used one makes room.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sdar_jax.errors import ConfigError

Tokens = tuple[int, ...]


class Prefix(NamedTuple):
    """What is already in the cache of a sequence.

    Attributes:
        pages: to share, all of them full.
        partial: a page whose first `partial_length` positions serve as well, once they are copied; None if there is
            none.
        partial_length: positions of `partial`.
        length: positions in all.
    """

    pages: tuple[int, ...]
    partial: int | None
    partial_length: int
    length: int

    @property
    def held(self) -> list[int]:
        """All pages that are read, the partial one last."""
        return [*self.pages] if self.partial is None else [*self.pages, self.partial]

    def without_partial(self) -> "Prefix":
        """The pages that are full, alone."""
        return self._replace(
            partial=None, partial_length=0, length=self.length - self.partial_length
        )


@dataclass
class _Page:
    """users: requests that hold it. tokens: of its finished blocks. children: pages that continue it."""

    users: int = 0
    tokens: Tokens = ()
    parent: int | None = None
    children: set[int] = field(default_factory=set)


def default_page_size(block_size: int) -> int:
    """The positions of a page where no size is asked for: whole blocks, 64 or more."""
    return -(-64 // block_size) * block_size


def check_page_size(page_size: int, block_size: int) -> None:
    """Raises ConfigError for a page that is not made of whole blocks."""
    if page_size < 1 or page_size % block_size:
        raise ConfigError(
            f"page_size is {page_size}; give a multiple of the block size {block_size}"
        )


class PagePool:
    """`count` pages of `page_size` positions, for blocks of `block_size`.

    Raises:
        ConfigError: a page that is not made of whole blocks, or no pages.
    """

    def __init__(self, count: int, page_size: int, block_size: int):
        check_page_size(page_size, block_size)
        if count < 1:
            raise ConfigError(f"pages is {count}; give at least 1")
        self.count = count
        self.page_size = page_size
        self.block_size = block_size
        self.evictions = 0
        self.clear()

    def clear(self) -> None:
        """Takes all pages back, and forgets what they hold."""
        self._pages = [_Page() for _ in range(self.count)]
        self._free = list(range(self.count - 1, -1, -1))
        # Least recently used first, and a page always after those that continue it: they are released together.
        self._kept: dict[int, None] = {}
        self._first_block: dict[tuple[int | None, Tokens], set[int]] = {}

    @property
    def available(self) -> int:
        """Pages that `allocate` could give: free ones and kept ones."""
        return len(self._free) + len(self._kept)

    def match(self, tokens: Sequence[int]) -> Prefix:
        """The longest recorded prefix, in whole blocks, of a sequence. Takes nothing; see `share`."""
        # Requests that read the same prefix at once each have pages of it, and any of these may be continued.
        chains: list[tuple[int, ...]] = [()]
        while True:
            length = len(chains[0]) * self.page_size
            rest = tuple(tokens[length : length + self.page_size])
            found = [
                (self._same(page, rest), chain, page)
                for chain in chains
                for page in self._candidates(chain, rest)
            ]
            full = [(*chain, page) for same, chain, page in found if same == self.page_size]
            if not full:
                break
            chains = full
        same, chain, partial = max(found, key=lambda each: each[0], default=(0, chains[0], None))
        if not same:
            return Prefix(chains[0], None, 0, length)
        return Prefix(chain, partial, same, length + same)

    def _candidates(self, chain: tuple[int, ...], tokens: Tokens) -> list[int]:
        """The pages that follow a chain of full ones and begin with the first block of `tokens`."""
        parent = chain[-1] if chain else None
        return sorted(self._first_block.get((parent, tokens[: self.block_size]), ()))

    def _same(self, page: int, tokens: Tokens) -> int:
        """How many positions of a page hold the beginning of `tokens`, in whole blocks."""
        pairs = zip(self._pages[page].tokens, tokens, strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        return same - same % self.block_size

    def share(self, pages: Sequence[int]) -> None:
        """One more user for each, which `release` takes back; none of them is evicted meanwhile."""
        for page in pages:
            self._pages[page].users += 1
            self._kept.pop(page, None)

    def allocate(self, count: int, spare: int = 0) -> list[int] | None:
        """Empty pages with one user each, evicting kept ones if need be; None, and nothing evicted, if too few.

        spare: pages that are to be available afterwards.
        """
        if count + spare > self.available:
            return None
        while len(self._free) < count:
            self._evict()
        taken = [self._free.pop() for _ in range(count)]
        self.share(taken)
        return taken

    def record(self, pages: Sequence[int], tokens: Sequence[int]) -> None:
        """That `pages`, in order, hold the final keys and values of `tokens`: whole blocks from position 0."""
        parent = None
        for index, page in enumerate(pages):
            held = tuple(tokens[index * self.page_size : (index + 1) * self.page_size])
            held = held[: len(held) - len(held) % self.block_size]
            entry = self._pages[page]
            if len(held) > len(entry.tokens):
                self._attach(page, parent, held)
            if len(entry.tokens) < self.page_size:
                return
            parent = page

    def _attach(self, page: int, parent: int | None, tokens: Tokens) -> None:
        entry = self._pages[page]
        entry.tokens, entry.parent = tokens, parent
        self._first_block.setdefault((parent, tokens[: self.block_size]), set()).add(page)
        if parent is not None:
            self._pages[parent].children.add(page)

    def release(self, pages: Sequence[int]) -> None:
        """One user less for each page of a sequence, in order. What is recorded is kept, the rest is free at once."""
        for page in reversed(pages):
            entry = self._pages[page]
            entry.users -= 1
            if entry.users:
                continue
            if entry.tokens:
                self._kept[page] = None
            else:
                self._free.append(page)

    def _evict(self) -> None:
        page = next(iter(self._kept))
        del self._kept[page]
        entry = self._pages[page]
        assert not entry.children, f"page {page} is continued by {entry.children}"
        siblings = self._first_block[entry.parent, entry.tokens[: self.block_size]]
        siblings.discard(page)
        if not siblings:
            del self._first_block[entry.parent, entry.tokens[: self.block_size]]
        if entry.parent is not None:
            self._pages[entry.parent].children.discard(page)
        self._pages[page] = _Page()
        self._free.append(page)
        self.evictions += 1
