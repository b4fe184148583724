"""What the messages about records and sources advise works: each error is met, and its advice followed."""

import pytest

from sdar_jax.data import DataConfig, SourceConfig
from sdar_jax.data.chat import ChatRenderer
from sdar_jax.errors import ConfigError, DataError
from tests.data.conftest import CHATML, make_byte_tokenizer
from tests.data.test_chat import GOOD, TAGGED, assistant, user
from tests.data.test_conversation import dataset, refused, responses
from tests.data.test_pipeline import once

UNCERTAIN = [
    ("{{ messages | length }}" + CHATML, "{{ messages | length }}" + TAGGED),
    (CHATML.replace("content", "content[:3]"), TAGGED.replace("content + ", "content[:9] + ")),
]


@pytest.mark.parametrize(("template", "tagged"), UNCERTAIN)
def test_marking_generation_makes_turns_certain(template, tagged):
    record = {"messages": [user("q"), assistant("aha"), user("r"), assistant("b")]}
    assert "is not certain" in refused(
        record, template
    ) and "mark responses in the template" in refused(record, template)
    assert responses(record, tagged) == ["aha<|im_end|>", "b<|im_end|>\n"]


def test_a_template_that_is_set_is_used():
    tokenizer = make_byte_tokenizer(chat_template=None)
    with pytest.raises(ConfigError, match="set tokenizer.chat_template"):
        ChatRenderer(tokenizer)
    tokenizer.chat_template = CHATML
    assert ChatRenderer(tokenizer).pieces({"messages": GOOD})


MENDED = [
    (
        {"messages": [{"role": "bot", "content": "x"}]},
        "use one of system, user",
        {"messages": [user("x"), *GOOD[1:]]},
    ),
    ({"messages": [user(None), GOOD[1]]}, "give a string", {"messages": [user(""), GOOD[1]]}),
    ({"messages": [user("q"), assistant("")]}, "give it content or tool_calls", {"messages": GOOD}),
    ({"messages": GOOD[1:]}, "starts with a system or user message", {"messages": GOOD}),
    (
        {"messages": GOOD, "tools": "f"},
        "give JSON schemas, or leave it out",
        {"messages": GOOD, "tools": [{"name": "f"}]},
    ),
    ({"messages": GOOD, "tools": [5]}, "give JSON schemas, or leave it out", {"messages": GOOD}),
    ({"messages": {}}, 'give {"messages": [{"role": ..., "content": ...}]}', {"messages": GOOD}),
    (
        {"messages": GOOD, "chat_template_kwargs": 5},
        "give an object",
        {"messages": GOOD, "chat_template_kwargs": {}},
    ),
    ({"messages": GOOD, "chat_template_kwargs": {"tools": 5}}, "remove it", {"messages": GOOD}),
]


@pytest.mark.parametrize(("record", "advice", "mended"), MENDED)
def test_records_mended_as_advised(record, advice, mended):
    assert advice in refused(record)
    assert responses(mended) == ["a<|im_end|>\n"]


@pytest.mark.parametrize(
    ("record", "advice", "mended"),
    [
        ({"txt": "x"}, "add it, or set field to another", {"text": "x"}),
        ({"text": 5}, "give a string", {"text": "5"}),
        ({"text": " "}, "fill it in or remove the record", {"text": "x"}),
    ],
)
def test_texts_mended_as_advised(write_jsonl, record, advice, mended):
    with pytest.raises(DataError, match=advice):
        list(dataset(once(SourceConfig(write_jsonl([record]), "jsonl"))))
    assert list(dataset(once(SourceConfig(write_jsonl([mended]), "jsonl"))))
    if "txt" in record:
        assert list(dataset(once(SourceConfig(write_jsonl([record]), "jsonl", field="txt"))))


def test_a_record_without_a_response_mended_as_advised(write_jsonl):
    config = once(
        SourceConfig(write_jsonl([{"messages": GOOD[:1]}]), "chat"),
        loss="response",
        sequence_length=64,
    )
    with pytest.raises(
        DataError, match="no token of it can carry loss; give it a response, or leave it out"
    ):
        list(dataset(config))
    write_jsonl([{"messages": GOOD}])
    assert list(dataset(config))


SIZES = {"sequence_length": 32, "batch_size": 4, "packing": "fit"}


@pytest.mark.parametrize(
    ("bad", "advice", "mended"),
    [
        ({"noisy_length": 33}, "lower it, or leave it out", {"noisy_length": 32}),
        ({"noisy_length": 16, "packing": "split"}, "use packing='fit'", {"packing": "fit"}),
        ({"noisy_length": 16, "segments": "row"}, "set pad_to_block", {"pad_to_block": True}),
        ({"shards": 3}, "use a divisor of it", {"shards": 2}),
        ({"shards": 2, "epochs": 1}, "leave epochs out", {"epochs": None}),
        ({"num_threads": -1}, "give a whole number of at least 0", {"num_threads": 0}),
    ],
)
def test_configs_mended_as_advised(bad, advice, mended):
    source = (SourceConfig("x", "jsonl"),)
    with pytest.raises(ConfigError, match=advice):
        DataConfig(source, **{**SIZES, **bad})
    assert DataConfig(source, **{**SIZES, **bad, **mended})


@pytest.mark.parametrize(
    ("bad", "advice", "mended"),
    [
        ({"separator": "-"}, "only text takes one", {"format": "text"}),
        (
            {"format": "chat", "field": "turns"},
            "set prompt_field, the question's column, as well",
            {"prompt_field": "question"},
        ),
        ({"weight": 0.0}, "give a finite number above 0", {"weight": 0.1}),
        (
            {"chat_template_kwargs": {"a": 1}},
            "only chat has them; leave them out",
            {"chat_template_kwargs": {}},
        ),
    ],
)
def test_sources_mended_as_advised(bad, advice, mended):
    with pytest.raises(ConfigError, match=advice):
        SourceConfig("x", **{"format": "jsonl", **bad})
    assert SourceConfig("x", **{"format": "jsonl", **bad, **mended})
