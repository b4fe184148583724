"""What a tokenizer says of an output: which ids are tokens at all, the text while it grows, and stop strings in it."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

Decode = Callable[[Sequence[int]], str]

# What tokenizers give for a character of which bytes are missing. A character has four bytes at most, and a token one
# at least, so that the last three tokens of a text may be waiting for their character.
PART = "\ufffd"
_PARTS = 3


def unknown_ids(tokenizer: Any, vocab_size: int) -> np.ndarray | None:
    """bool [vocab_size]: ids that the tokenizer does not have, such as padding of the weights.

    None where there are none, where there is no tokenizer, and where it does not list its ids (`get_vocab`).
    """
    if not hasattr(tokenizer, "get_vocab"):
        return None
    # A large vocabulary takes a tenth of a second. Its length tells whether tokens have been added since.
    length = len(tokenizer) if hasattr(tokenizer, "__len__") else None
    return _unknown_ids(tokenizer, length, vocab_size)


@lru_cache(maxsize=4)
def _unknown_ids(tokenizer: Any, length: int | None, vocab_size: int) -> np.ndarray | None:
    known = np.fromiter(tokenizer.get_vocab().values(), np.int64)
    unknown = np.ones(vocab_size, bool)
    unknown[known[known < vocab_size]] = False
    return unknown if unknown.any() else None


class StopFound(NamedTuple):
    """Where an output comes to a stop string.

    count: tokens up to the one that completes it. text: what is before it. string: which one it is.
    """

    count: int
    text: str
    string: str


def find_stop(tokens: Sequence[int], strings: Sequence[str], decode: Decode) -> StopFound | None:
    """The stop string that is complete first; of several that are then, the one that begins first."""
    holds = lambda count: any(string in decode(tokens[:count]) for string in strings)
    if not strings or not holds(len(tokens)):
        return None
    count = bisect_left(range(len(tokens) + 1), True, key=holds)
    text = decode(tokens[:count])
    at, string = min(((text.index(s), s) for s in strings if s in text), key=lambda found: found[0])
    return StopFound(count, text[:at], string)


def whole_characters(tokens: Sequence[int], decode: Decode) -> int:
    """How many of the tokens come before a character that is not complete."""
    least = max(len(tokens) - _PARTS, 0)
    complete = (n for n in range(len(tokens), least, -1) if not decode(tokens[:n]).endswith(PART))
    return next(complete, least)


def tokens_within(tokens: Sequence[int], length: int, decode: Decode) -> int:
    """How many of the tokens have all of their text in its first `length` characters."""
    count = (
        bisect_right(
            range(len(tokens) + 1), length, key=lambda n: len(decode(tokens[:n]).rstrip(PART))
        )
        - 1
    )
    return whole_characters(tokens[:count], decode)


class _Window(NamedTuple):
    """The last tokens of an output, from the beginning of a character.

    start: tokens before them. whole: of them, those whose characters are complete; text: of these. marks: places in the
    window where an earlier read ended with a complete character, with the length of the text up to there.
    """

    start: int
    tokens: list[int]
    whole: int
    text: str
    marks: list[tuple[int, int]]


class TextReader:
    """Reads an output as it grows. Each read decodes what is new and a little before it: n tokens cost O(n) in all.

    Attributes:
        shown: tokens that come before a character that is not complete, and before what is, or may become, part of a
            stop string.
        found: the stop string, once there is one; what comes after it is not read.
    """

    def __init__(self, decode: Decode, strings: Sequence[str] = ()):
        self._decode, self._strings = decode, tuple(strings)
        self._longest = max(map(len, self._strings), default=0)
        self._window = _Window(0, [], 0, "", [])
        self._uncertain: dict[int, bool] = {}
        self.shown = 0
        self.found: StopFound | None = None

    def read(self, tokens: Sequence[int] | np.ndarray) -> str | None:
        """The text that is new in an output that is `tokens` so far; None where it changes what was there before."""
        old = self._window
        known = old.start + len(old.tokens)
        if self.found is not None or len(tokens) <= known:
            return ""
        window = old.tokens + [int(token) for token in tokens[known:]]
        whole = whole_characters(window, self._decode)
        text = self._decode(window[:whole])
        if any(string in text for string in self._strings):
            self.found = find_stop([int(token) for token in tokens], self._strings, self._decode)
        self.shown = old.start + self._before_stop(window[:whole], text)
        self._window = self._moved(_Window(old.start, window, whole, text, old.marks))
        return text[len(old.text) :] if text.startswith(old.text) else None

    def _before_stop(self, window: list[int], text: str) -> int:
        """Of the window's tokens, those before the stop string, or before what may be the beginning of one."""
        if self.found is not None:
            through = self._decode(window[: self.found.count - self._window.start])
            return tokens_within(window, through.index(self.found.string), self._decode)
        begun = max(
            (n for s in self._strings for n in range(1, len(s)) if text.endswith(s[:n])), default=0
        )
        return tokens_within(window, len(text) - begun, self._decode) if begun else len(window)

    def _moved(self, window: _Window) -> _Window:
        """To the last mark behind which there is text enough for a stop string to end in what comes next."""
        marks = [*window.marks, (window.whole, len(window.text))]
        far = [mark for mark in window.marks if len(window.text) - mark[1] > self._longest]
        if not far:
            return window._replace(marks=marks)
        first, length = far[-1]
        tokens, whole = window.tokens[first:], window.whole - first
        marks = [(at - first, end - length) for at, end in marks if at > first]
        return _Window(window.start + first, tokens, whole, self._decode(tokens[:whole]), marks)

    def may_stop(self, token: int) -> bool:
        """Whether a token may become part of a stop string, or of a character, with neighbours not yet known."""
        if token not in self._uncertain:
            text = self._decode([token])
            overlaps = lambda s: any(
                text.endswith(s[:n]) or text.startswith(s[-n:]) for n in range(1, len(s))
            )
            inside = lambda s: s in text or (text and text in s)
            self._uncertain[token] = PART in text or any(
                inside(s) or overlaps(s) for s in self._strings
            )
        return self._uncertain[token]
