"""A request on a text stream as it is decoded: text as blocks finish, or every change of the open blocks.

Each view takes the events of `Engine.stream` in `show`, and the whole text in `end`.
"""

import io
import math
import os
import shutil
import unicodedata
from collections.abc import Iterable
from typing import TextIO

from sdar_jax.decoding.events import Event
from sdar_jax.decoding.text import PART, Decode, TextReader

Out = TextIO | io.TextIOBase

MASKED = "·"
_RESET, _DIM = "\x1b[0m", "\x1b[2m"
# Of the 256 colours: red, over yellow, to green.
_SCALE = (196, 202, 208, 214, 220, 226, 190, 154, 118, 82, 46)


class BlockText:
    """Text as blocks finish: what has been written never changes, so a character that is not whole waits."""

    def __init__(self, decode: Decode, out: Out):
        self._reader, self._out = TextReader(decode), out
        self._tokens: list[int] = []
        self._written = ""
        self._changed = False

    def show(self, event: Event) -> None:
        self._tokens += [token for token in event.tokens if token is not None]
        text = self._reader.read(self._tokens)
        # The tokenizer may join later tokens to earlier ones in a way that changes their text: that is for the end.
        self._changed |= text is None
        if text and not self._changed:
            self._write(text)

    def end(self, text: str) -> None:
        if not text.startswith(self._written):
            self._out.write("\n")
            self._written = ""
        self._write(text[len(self._written) :] + "\n")

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
        self._written += text


class ChangeLines:
    """A line a denoising forward: its number, the open blocks, and the probability of each of their tokens."""

    def __init__(self, decode: Decode, out: Out):
        self._decode, self._out = decode, out

    def show(self, event: Event) -> None:
        text = "".join(_pieces(event, self._decode))
        odds = " ".join(
            MASKED if p is None else f"{math.exp(p):.2f}" for p in event.logprobs[event.finished :]
        )
        self._out.write(f"{event.forward}\t{text}\t{odds}\n")
        self._out.flush()

    def end(self, text: str) -> None:
        self._out.write(text + "\n")


class LiveText:
    """Redrawn in place at every change: finished text plain, tokens of open blocks coloured by their probability.

    Lines of finished text are written once, and scroll away as ever; what is below the last of them is redrawn.
    """

    def __init__(self, decode: Decode, out: Out, *, colour: bool):
        self._decode, self._out, self._colour = decode, out, colour
        self._kept = 0
        self._drawn = 0

    def show(self, event: Event) -> None:
        text = self._decode(
            [token for token in event.tokens[: event.finished] if token is not None]
        ).rstrip(PART)
        line = text.rfind("\n") + 1
        styles = [self._style(logprob) for logprob in event.logprobs[event.finished :]]
        opened = list(zip(_pieces(event, self._decode), styles, strict=True))
        size = shutil.get_terminal_size()
        rows = wrap([(_printable(text[line:]), ""), *opened], size.columns - 1)[
            1 - max(size.lines, 2) :
        ]
        self._erase()
        self._out.write(text[self._kept : line] + "\n".join(rows))
        self._out.flush()
        self._kept, self._drawn = max(line, self._kept), len(rows)

    def end(self, text: str) -> None:
        self._erase()
        self._out.write(text[self._kept :] + "\n")
        self._out.flush()

    def _erase(self) -> None:
        up = f"\x1b[{self._drawn - 1}A" if self._drawn > 1 else ""
        self._out.write(f"\r{up}\x1b[J")
        self._drawn = 0

    def _style(self, logprob: float | None) -> str:
        if not self._colour:
            return ""
        return (
            _DIM
            if logprob is None
            else f"\x1b[38;5;{_SCALE[round(10 * math.exp(min(logprob, 0.0)))]}m"
        )


def watching(decode: Decode, out: Out) -> LiveText | ChangeLines:
    """Changes in place on a terminal, without colours where NO_COLOR is set; as lines, without codes, elsewhere."""
    if out.isatty() and os.environ.get("TERM") != "dumb":
        return LiveText(decode, out, colour=not os.environ.get("NO_COLOR"))
    return ChangeLines(decode, out)


def wrap(pieces: Iterable[tuple[str, str]], columns: int) -> list[str]:
    """Rows of at most `columns` cells, from (text, style) pieces; a style is an escape code or nothing."""
    rows, used = [""], 0
    for text, style in pieces:
        for character in text:
            width = _cells(character)
            if used + width > columns:
                rows.append("")
                used = 0
            rows[-1] += f"{style}{character}{_RESET}" if style else character
            used += width
    return rows


def _cells(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _pieces(event: Event, decode: Decode) -> list[str]:
    """The text of each token of the open blocks, by itself."""
    opened = event.tokens[event.finished :]
    return [MASKED if token is None else _printable(decode([token])) for token in opened]


def _printable(text: str) -> str:
    """On one line, and without what would move the cursor."""
    return "".join(c if c.isprintable() else "↵" if c == "\n" else " " for c in text)
