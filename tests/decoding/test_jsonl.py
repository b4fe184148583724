"""Files of prompts and answers: what is refused, and that what is advised then works."""

import json

import pytest

from sdar_jax.decoding.config import Completion
from sdar_jax.decoding.jsonl import answered, as_record, read_records
from sdar_jax.decoding.prompts import to_ids
from sdar_jax.errors import DataError, DecodingError
from tests.data.conftest import make_byte_tokenizer

ANSWER = as_record(
    Completion(
        tokens=[1],
        text="a",
        finish_reason="stop",
        logprobs=[0.0],
        steps=[0],
        denoising_forwards=1,
        commit_forwards=0,
        prefill_forwards=0,
    )
)


@pytest.mark.parametrize(
    ("line", "advice", "mended"),
    [
        (b"[1]", "a JSON list, not an object; write one object per line", b'{"prompt": "a"}'),
        (b'{"prompt": "a"', "not valid JSON .*; write one object per line", b'{"prompt": "a"}'),
        (b"[" * 100_000, "nested too deeply.*; write one object per line", b'{"prompt": "a"}'),
        (
            b'{"prompt": "\xe9"}',
            "invalid UTF-8 at byte 12; save the file as UTF-8",
            b'{"prompt": "\xc3\xa9"}',
        ),
        (
            b'{"prompt": "\\ud83d"}',
            "a lone surrogate .*; write it as valid Unicode",
            b'{"prompt": "\\ud83d\\ude00"}',
        ),
        (
            b'{"n": ' + b"7" * 5000 + b"}",
            "cannot be read .*; write it as a string",
            b'{"n": "' + b"7" * 5000 + b'"}',
        ),
    ],
    ids=["list", "cut", "deep", "latin", "surrogate", "integer"],
)
def test_a_bad_line_is_named_and_read_once_it_is_mended(tmp_path, line, advice, mended):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt": "x"}\n\n' + line)
    with pytest.raises(DataError, match=f"in.jsonl:3: .*{advice}"):
        list(read_records(path))
    path.write_bytes(b'{"prompt": "x"}\n\n' + mended)
    assert len(list(read_records(path))) == 2


def test_a_file_of_prompts_that_is_none(tmp_path):
    with pytest.raises(DataError, match="cannot be read .*; give a JSONL file"):
        list(read_records(tmp_path))
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}')
    assert list(read_records(tmp_path / "in.jsonl")) == [{"prompt": "a"}]


def test_another_output_is_taken_where_one_is_refused(tmp_path):
    records = [{"prompt": "a"}]
    other, none = tmp_path / "other.jsonl", tmp_path / "none.jsonl"
    other.write_text("notes\n")
    for path, match in [
        (other, "other.jsonl:1: not an answer to that line"),
        (tmp_path, "cannot be written"),
    ]:
        with pytest.raises(DataError, match=f"{match}.*; choose another --output"):
            answered(path, records)
    assert answered(none, records) == 0 and other.read_text() == "notes\n"
    none.write_text(json.dumps({**records[0], **ANSWER}) + "\n")
    assert answered(none, records) == 1


@pytest.mark.usefixtures("unchecked_types")
def test_a_prompt_is_given_as_is_advised():
    with pytest.raises(DecodingError, match="prompt 0 is a text; give tokenizer=, or token ids"):
        to_ids("ab", 0, None)
    tokenizer = make_byte_tokenizer()
    ids = to_ids("ab", 0, tokenizer)
    assert to_ids(ids.tolist(), 0, None).tolist() == ids.tolist()
    for wrong in ([1.5], [[1, 2]], ["a"], {"a": 1}):
        with pytest.raises(
            DecodingError, match="prompt 0 is not a list of token ids but .*; give integers"
        ):
            to_ids(wrong, 0, None)
    assert to_ids([1, 2], 0, None).tolist() == [1, 2]
