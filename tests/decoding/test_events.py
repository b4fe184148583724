"""Events hold what the completion will: tokens, log-probabilities and open blocks, and no part of a stop string."""

import numpy as np
import pytest

from sdar_jax import DecodingConfig, Engine
from sdar_jax.decoding.text import TextReader, whole_characters
from tests.data.conftest import make_byte_tokenizer
from tests.tiny import tiny_model

CONFIG = DecodingConfig(confidence_threshold=0.2)
PROMPT = [7 * i % 20 + 1 for i in range(30)]


class Letters:
    """A tokenizer of which each token is a letter."""

    def decode(self, ids):
        return "".join(chr(97 + i % 26) for i in ids)


def engine(**options) -> Engine:
    sizes = {
        "batch_slots": 2,
        "pages": 14,
        "page_size": 8,
        "prefill_tokens": 8,
        "steps_per_call": 3,
    }
    return Engine(tiny_model(), tokenizer=Letters(), **{**sizes, **options})


def submit(served: Engine, length: int = 6, **options) -> int:
    return served.submit(PROMPT[:length], CONFIG, max_new_tokens=13, stop_token_ids=(), **options)


def test_finished_blocks_carry_their_log_probabilities(x64):
    served = engine()
    request = submit(served)
    events = list(served.stream(request))
    done = served.result(request)
    assert [p for event in events for p in event.logprobs] == done.logprobs
    assert all(event.finished == len(event.tokens) for event in events) and len(events) > 1


@pytest.mark.parametrize("length", [5, 8])
def test_changes_show_whole_blocks_and_which_are_open(length, x64):
    served = engine()
    request = submit(served, length)
    events = list(served.stream(request, changes=True))
    done = served.result(request)
    steps, ends = np.asarray(done.steps), [*range(4 - length % 4, 13, 4), 13]
    for event in events:
        assert event.logprobs == [
            p if step <= event.forward else None
            for p, step in zip(done.logprobs[: len(event.tokens)], steps, strict=False)
        ]
        assert len(event.tokens) in ends and event.finished in [0, *ends]
        assert (steps[: event.finished] < event.forward).all()
        # The last block of the two reaches past the limit, so a forward may commit nothing that is seen.
        opened = steps[event.finished : len(event.tokens)]
        assert event.forward in opened or (
            len(event.tokens) == 13 and (opened < event.forward).all()
        )
        assert len(event.tokens) - event.finished <= 4


def test_the_time_of_reading_prompts_is_known(x64):
    """26 positions: 24 in three chunks, each in a call of its own; again, from the cache; the rest decodes."""
    served = engine()
    served.generate([PROMPT[:26]], CONFIG, max_new_tokens=4, stop_token_ids=())
    first = served.stats()
    assert (first.prompt_tokens, first.prefill_tokens, first.prefix_tokens) == (26, 24, 0)
    assert first.prefill_alone_seconds > 0 and first.prefill_alone_tokens == 24
    served.generate([PROMPT[:26]], CONFIG, max_new_tokens=4, stop_token_ids=())
    second = served.stats()
    assert (second.prefill_tokens, second.prefix_tokens) == (24, 24)
    assert second.prefill_alone_seconds == first.prefill_alone_seconds


def test_what_is_streamed_is_no_part_of_a_stop_string(x64):
    free = engine().generate([PROMPT[:6]], CONFIG, max_new_tokens=13, stop_token_ids=())[0]
    served = engine()
    for count in range(2, 13):
        # One that is there, one that begins there but ends otherwise.
        for stop in (free.text[count - 2 : count + 1], free.text[count - 2 : count] + "#"):
            request = submit(served, stop_strings=[stop])
            before = told = ""
            for event in served.stream(request):
                before, told = told, told + Letters().decode(event.tokens)
            done = served.result(request)
            assert done.text.startswith(before) and told == done.text
            assert stop not in done.text and (done.finish_reason == "stop") == (stop in free.text)


def test_changes_are_no_part_of_a_stop_string(x64):
    """Finished or open, and the same for any number of steps per call; what cannot be part of one is shown."""
    free = engine().generate([PROMPT[:6]], CONFIG, max_new_tokens=13, stop_token_ids=())[0]
    alone, several = engine(steps_per_call=1), engine(steps_per_call=8)
    shown = 0
    for count in range(2, 13):
        for stop in (free.text[count - 2 : count + 1], free.text[count - 2 : count] + "#"):
            told = []
            for served in (alone, several):
                request = submit(served, stop_strings=[stop])
                told.append(list(served.stream(request, changes=True)))
                done = served.result(request)
            assert told[0] == told[1]
            for event in told[0]:
                assert None not in event.tokens[: event.finished] and len(event.tokens) == len(
                    event.logprobs
                )
                there = [*event.tokens, None].index(None)
                assert done.text.startswith(Letters().decode(event.tokens[:there]))
                beyond = [token for token in event.tokens[there:] if token is not None]
                assert not {*Letters().decode(beyond)} & {*stop}
                shown += len(beyond)
            if stop in free.text:
                assert (done.finish_reason, done.stop_reason) == ("stop", stop)
    assert shown > 20


def test_no_event_ends_inside_a_character(x64):
    """Of bytes of which most are parts of characters; changes of open blocks are told as they stand."""

    class Bytes:
        def decode(self, ids):
            return bytes([65, 0xC3, 0xA9, 0xE4, 0xBD, 0xA0][i % 6] for i in ids).decode(
                errors="replace"
            )

    decode, held = Bytes().decode, 0
    served = Engine(
        tiny_model(), tokenizer=Bytes(), batch_slots=1, pages=14, page_size=8, steps_per_call=1
    )
    for seed in range(8):
        options = dict(max_new_tokens=13, stop_token_ids=(), seed=seed)
        first, second = (
            served.submit(PROMPT[:6], DecodingConfig(temperature=1.0), **options) for _ in range(2)
        )
        told, shown = [], []
        for event in served.stream(first):
            told += event.tokens
            shown.append(decode(told))
        *_, last = served.stream(second, changes=True)
        done = served.result(first)
        assert last.tokens[: len(done.tokens)] == done.tokens
        # Half a character would be followed by the whole one in its place.
        assert all(done.text.startswith(text) for text in shown)
        assert told == done.tokens[: whole_characters(done.tokens, decode)]
        held += len(told) < len(done.tokens)
    assert held


def test_text_is_streamed_beside_stop_strings(x64):
    """Blocks that end no stop string are not held back."""
    served = engine()
    request = submit(served, stop_strings=["#"])
    assert len(list(served.stream(request))) > 1
    assert len(served.result(request).tokens) == 13


@pytest.mark.parametrize("text, held", [("abc", 0), ("ab<", 1), ("a<|", 2), ("<|x", 0), ("<<|", 2)])
def test_held_back(text, held):
    assert shown(text.encode(), ("<|e", "|#")) == len(text) - held


def test_half_a_character_is_held_back():
    assert shown("ab\u00e9".encode()[:3], ("\u00e9x",)) == 2


def shown(output: bytes, strings) -> int:
    reader = TextReader(make_byte_tokenizer().decode, strings)
    reader.read(byte_ids(output))
    return reader.shown


def byte_ids(output: bytes) -> list[int]:
    table = make_byte_tokenizer().convert_ids_to_tokens(range(260))
    return [table.index(_byte_name(byte)) for byte in output]


def _byte_name(byte: int) -> str:
    """What byte-level tokenizers call a byte: printable ones by themselves, others from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return chr(byte) if byte in plain else chr(256 + others.index(byte))
