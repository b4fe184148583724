"""Text of outputs that grow, piece by piece, against decoding all of it at every token."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from sdar_jax.decoding.text import PART, TextReader, find_stop, tokens_within, whole_characters
from tests.data.conftest import make_byte_tokenizer

BYTES = make_byte_tokenizer()


def ids(text: str) -> list[int]:
    return BYTES.encode(text, add_special_tokens=False)


class Pieces:
    """A tokenizer of pieces of text, some of several letters, some that are parts of others."""

    pieces = ("a", "b", "ab", "ba", "c", "abc", "", "é")

    def decode(self, tokens) -> str:
        return "".join(self.pieces[t] for t in tokens)


def sentencepiece() -> Tokenizer:
    """As Llama's: words with their space, which the first of a text loses, and bytes for what is no word."""
    vocabulary = {
        piece: i for i, piece in enumerate(["▁a", "▁ab", "b", "<0xC3>", "<0xA9>", "▁", "c"])
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="c", byte_fallback=True))
    strip = decoders.Strip(content=" ", left=1)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    return tokenizer


TOKENIZERS = {
    "bytes": (BYTES, range(256)),
    "pieces": (Pieces(), range(8)),
    "words": (sentencepiece(), range(7)),
}


def first_stop(tokens, strings, decode):
    """By definition: tokens to the one that completes a stop string, and the text before it."""
    for count in range(len(tokens) + 1):
        text = decode(tokens[:count])
        if found := [text.index(s) for s in strings if s in text]:
            return count, text[: min(found)]
    return None


@st.composite
def outputs(draw):
    """A tokenizer, tokens in parts as they may come, and stop strings that are likely to be there, or to begin."""
    name = draw(st.sampled_from(sorted(TOKENIZERS)))
    tokenizer, known = TOKENIZERS[name]
    if name == "bytes":
        tokens = ids(draw(st.text(st.sampled_from("abé\U0001f600"), max_size=30)))
        strings = st.text(st.sampled_from("abé\U0001f600"), min_size=1, max_size=4)
    else:
        tokens = draw(st.lists(st.sampled_from(known), max_size=40))
        strings = st.text(st.sampled_from("ab cé"), min_size=1, max_size=4)
    ends = sorted(draw(st.lists(st.integers(0, len(tokens)), max_size=12)))
    return (
        tokenizer.decode,
        tokens,
        [*ends, len(tokens)],
        tuple(draw(st.lists(strings, min_size=1, max_size=3))),
    )


@given(outputs())
def test_stop_strings_are_found_as_by_definition(case):
    decode, tokens, _, strings = case
    found, wanted = find_stop(tokens, strings, decode), first_stop(tokens, strings, decode)
    assert (found and found[:2]) == wanted
    assert (
        found is None
        or found.string in strings
        and decode(tokens[: found.count]).startswith(found.text + found.string)
    )


@given(outputs())
def test_read_in_parts_as_decoded_at_once(case):
    """Stop strings are found by the read that has them; what is shown is sure, and no more held back than must be."""
    decode, tokens, ends, strings = case
    reader = TextReader(decode, strings)
    for end in ends:
        reader.read(tokens[:end])
        whole = whole_characters(tokens[:end], decode)
        text, stop = decode(tokens[:whole]), first_stop(tokens[:whole], strings, decode)
        assert (reader.found and reader.found[:2]) == stop
        if stop is not None:
            assert reader.shown == tokens_within(tokens[:whole], len(stop[1]), decode)
            return
        begun = max(
            (n for s in strings for n in range(1, len(s)) if text.endswith(s[:n])), default=0
        )
        assert reader.shown == (
            tokens_within(tokens[:whole], len(text) - begun, decode) if begun else whole
        )


@given(outputs())
def test_pieces_add_up_to_the_text(case):
    decode, tokens, ends, _ = case
    reader, text = TextReader(decode), ""
    for end in ends:
        text += reader.read(tokens[:end]) or ""
        assert text == decode(tokens[: whole_characters(tokens[:end], decode)])
        assert not text.endswith(PART)


def test_which_string_is_complete_first():
    decode = Pieces().decode
    found = find_stop([4, 5, 1], ("bb", "abc", "bc", "c"), decode)
    assert found == (1, "", "c")
    assert find_stop([5], ("bc", "abc"), decode) == (1, "", "abc")
    assert find_stop([5], (), decode) is None and find_stop([], ("a",), decode) is None


def test_bytes_that_are_no_text_do_not_pile_up():
    """What can be no part of a character any more is shown, and costs no more than text does."""
    broken = [BYTES.convert_tokens_to_ids("ÿ")] * 50  # The byte 0xFF.
    assert BYTES.decode(broken) == PART * 50
    reader, lengths = TextReader(BYTES.decode, ("x",)), []
    for end in range(1, 51):
        reader.read(broken[:end])
        assert reader.shown >= end - 3
        lengths.append(len(reader._window.tokens))
    assert max(lengths) < 12


@pytest.mark.parametrize("part", [1, 16])
def test_the_cost_grows_with_the_text(part):
    """16,000 tokens, a few at a time, with a stop string that never comes: tokens decoded, counted."""
    decoded = 0

    def decode(tokens):
        nonlocal decoded
        decoded += len(tokens)
        return "".join(chr(97 + t % 26) for t in tokens)

    tokens = [i * i % 1009 for i in range(16_000)]
    reader = TextReader(decode, ("this never occurs",))
    for end in range(part, len(tokens) + 1, part):
        reader.read(tokens[:end])
    assert reader.found is None and decoded < 150 * len(tokens)
