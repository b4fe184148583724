"""What is drawn as a request is decoded, seen as a terminal would show it."""

import io
import math
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar_jax.decoding.events import Event
from sdar_jax.decoding.terminal import MASKED, BlockText, ChangeLines, LiveText, watching, wrap
from tests.data.conftest import make_byte_tokenizer

TOKENIZER = make_byte_tokenizer()
decode = TOKENIZER.decode


class Screen(io.StringIO):
    """A terminal of few cells: what is written ends up in `rows`, of which the last `height` can be redrawn."""

    def __init__(self, columns: int, height: int):
        super().__init__()
        self.rows, self.row, self.column = [""], 0, 0
        self.columns, self.height = columns, height

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for code, character in re.findall(r"(\x1b\[[\d;]*[A-Za-z])|([\s\S])", text):
            self._code(code) if code else self._put(character)
        return super().write(text)

    def _code(self, code: str) -> None:
        if code.endswith("A"):
            self.row -= int(code[2:-1])
            assert self.row >= len(self.rows) - self.height, "above the top of the screen"
        elif code == "\x1b[J":
            self.rows = [*self.rows[: self.row], self.rows[self.row][: self.column]]
        else:
            assert code.endswith("m"), code

    def _put(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n" or self.column == self.columns:
            self.row, self.column = self.row + 1, 0
            self.rows += [""] * (self.row == len(self.rows))
        if character not in "\r\n":
            row = self.rows[self.row]
            self.rows[self.row] = row[: self.column] + character + row[self.column + 1 :]
            self.column += 1


def changes(tokens: list[int], order: list[int], size: int = 4) -> list[Event]:
    """Events of blocks of `size`, each of which fills in the order given."""
    events, known = [], set()
    for first in range(0, len(tokens), size):
        for place in order:
            if first + place >= len(tokens):
                continue
            known.add(first + place)
            shown = range(min(first + size, len(tokens)))
            found = [tokens[i] if i in known else None for i in shown]
            logprobs = [math.log(0.5) if i in known else None for i in shown]
            events.append(Event(0, found, logprobs, first, len(events)))
    return events


def blocks(tokens: list[int], size: int = 4) -> list[Event]:
    parts = [tokens[i : i + size] for i in range(0, len(tokens), size)]
    return [
        Event(i * size, list(part), [0.0] * len(part), len(part), i) for i, part in enumerate(parts)
    ]


texts = st.text(st.sampled_from("ab \né\U0001f600"), max_size=60)


@given(texts)
def test_blocks_of_text_add_up_and_no_character_is_cut(text):
    """é and an emoji are several tokens each, which end in different blocks."""
    out = io.StringIO()
    view = BlockText(decode, out)
    for event in blocks(TOKENIZER.encode(text)):
        view.show(event)
        assert text.startswith(out.getvalue())
    view.end(text)
    assert out.getvalue() == text + "\n"


def test_text_that_later_tokens_change_is_written_again():
    view = BlockText(
        lambda ids: "a b" if len(ids) == 2 else "a , b".replace(" ,", ","), out := io.StringIO()
    )
    for event in blocks([1, 2, 3], size=2):
        view.show(event)
    view.end("a, b")
    assert out.getvalue() == "a b\na, b\n"


@given(texts, st.permutations(range(4)), st.sampled_from([(7, 3), (80, 24)]))
def test_the_screen_ends_with_the_text(text, order, size):
    columns, height = size
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        patch.setenv("LINES", str(height))
        screen = Screen(columns, height)
        view = LiveText(decode, screen, colour=True)
        for event in changes(TOKENIZER.encode(text), order):
            view.show(event)
            assert len(screen.rows) - screen.row <= height
        view.end(text)
    wanted = [row for line in text.split("\n") for row in wrap([(line, "")], columns)]
    # A wide character is one cell of this screen and two of a real one.
    if text.isascii():
        assert screen.rows == [*wanted, ""]
    assert "".join(screen.rows) == text.replace("\n", "")


def test_a_screen_in_the_middle(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    ids = TOKENIZER.encode("one\ntwo\ntree")
    screen = Screen(80, 24)
    view = LiveText(decode, screen, colour=False)
    event = changes(ids, [3, 0, 1, 2])[9]
    assert event.finished == 8
    view.show(event)
    assert screen.rows == ["one", "two", f"t{MASKED}{MASKED}e"]


def test_colours_go_from_red_to_green():
    screen = Screen(80, 24)
    view = LiveText(decode, screen, colour=True)
    view.show(
        Event(
            0,
            [*TOKENIZER.encode("abc"), None],
            [math.log(p) for p in (0.01, 0.5, 0.999)] + [None],
            0,
            0,
        )
    )
    assert (
        "\x1b[38;5;196ma\x1b[0m" in screen.getvalue()
        and "\x1b[38;5;46mc\x1b[0m" in screen.getvalue()
    )
    assert (
        "\x1b[38;5;226mb\x1b[0m" in screen.getvalue()
        and f"\x1b[2m{MASKED}\x1b[0m" in screen.getvalue()
    )


@pytest.mark.parametrize("variable, coded", [("NO_COLOR", True), ("TERM", False)])
def test_terminals_that_want_less(monkeypatch, variable, coded):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(variable, "dumb")
    screen = Screen(80, 24)
    watching(decode, screen).show(changes(TOKENIZER.encode("abcd"), [1, 0, 2, 3])[1])
    assert ("\x1b[J" in screen.getvalue()) == coded and "\x1b[38" not in screen.getvalue()


def test_lines_say_what_a_forward_left_open():
    out = io.StringIO()
    view = watching(decode, out)
    assert isinstance(view, ChangeLines)
    for event in changes(TOKENIZER.encode("ab\nde"), [2, 0, 1, 3]):
        view.show(event)
    view.end("ab\nde")
    first, second, *_, last, one, two = out.getvalue().splitlines()
    assert first == f"0\t{MASKED}{MASKED}↵{MASKED}\t{MASKED} {MASKED} 0.50 {MASKED}"
    assert second == f"1\ta{MASKED}↵{MASKED}\t0.50 {MASKED} 0.50 {MASKED}"
    assert (last, one, two) == ("4\te\t0.50", "ab", "de") and "\x1b" not in out.getvalue()


@given(
    st.lists(st.text(st.sampled_from("aé\U0001f600漢e\u0301"), max_size=9), max_size=9),
    st.integers(2, 9),
)
def test_rows_are_as_wide_as_the_screen(pieces, columns):
    """Twice as wide for ideographs and emoji, and nothing for what goes on top of another."""
    rows = wrap([(piece, "") for piece in pieces], columns)
    width = lambda row: sum(0 if c == "\u0301" else 2 if c in "漢\U0001f600" else 1 for c in row)
    assert "".join(rows) == "".join(pieces) and all(width(row) <= columns for row in rows)
    assert all(width(row) + width(following[0]) > columns for row, following in pairwise(rows))
