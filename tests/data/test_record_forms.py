"""Conversations in the forms that people have them in: what becomes of each by hand, and what is refused."""

import json
import re

import pytest

from sdar_jax.data import DataConfig, SourceConfig, make_dataset
from sdar_jax.data.record_forms import as_messages
from sdar_jax.errors import ConfigError, DataError
from tests.data.conftest import CHATML, make_byte_tokenizer
from tests.data.test_chat import assistant, user
from tests.data.test_pipeline import EOS_ID, by_record, once

SYSTEM = {"role": "system", "content": "s"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def turn(sender, value, **fields):
    return {"from": sender, "value": value, **fields}


QA = [user("q"), assistant("a")]
HUMAN = [turn("human", "q"), turn("gpt", "a")]
CASES = {
    "openai": ({"messages": QA, "tools": []}, QA, {"tools": []}),
    "sharegpt": ({"conversations": HUMAN, "id": "1"}, QA, {"id": "1"}),
    "sharegpt, one conversation": ({"conversation": HUMAN}, QA, {}),
    "sharegpt under messages": ({"messages": HUMAN}, QA, {}),
    "openai's turns under conversations": ({"conversations": QA}, QA, {}),
    "sharegpt with other names": (
        {"conversations": [turn("user", "q"), turn("assistant", "a"), turn("user", "r"), turn("model", "b")]},
        [*QA, user("r"), assistant("b")],
        {},
    ),
    "sharegpt, system turn": ({"conversations": [turn("system", "s"), *HUMAN]}, [SYSTEM, *QA], {}),
    "sharegpt, system beside": ({"conversations": HUMAN, "system": "s"}, [SYSTEM, *QA], {}),
    "sharegpt, empty system": ({"conversations": HUMAN, "system": " "}, QA, {}),
    "sharegpt, null system": ({"conversations": HUMAN, "system": None}, QA, {"system": None}),
    "sharegpt with marks": (
        {"conversations": [HUMAN[0], turn("gpt", "a", weight=0), turn("human", "r", train=None), turn("gpt", "b")]},
        [QA[0], {**QA[1], "weight": 0}, {**user("r"), "train": None}, assistant("b")],
        {},
    ),
    "sharegpt, a call and its result": (
        {
            "conversations": [
                HUMAN[0],
                turn("function_call", '{"name": "f", "arguments": {"x": 1}}'),
                turn("observation", "2"),
                HUMAN[1],
            ],
            "tools": "[]",
        },
        [
            QA[0],
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "2"},
            QA[1],
        ],
        {"tools": "[]"},
    ),
    "sharegpt, two calls at once": (
        {"conversations": [HUMAN[0], turn("tool_call", json.dumps([CALL["function"], CALL]))]},
        [QA[0], {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]}],
        {},
    ),
    "alpaca": ({"instruction": "q", "input": "", "output": "a"}, QA, {}),
    "alpaca, no input": ({"instruction": "q", "output": "a"}, QA, {}),
    "alpaca, null input": ({"instruction": "q", "input": None, "output": "a"}, QA, {}),
    "alpaca, input": ({"instruction": "q", "input": "i", "output": "a"}, [user("q\ni"), QA[1]], {}),
    "alpaca, response": ({"instruction": "q", "response": "a", "category": "c"}, QA, {"category": "c"}),
    "alpaca, system": ({"instruction": "q", "output": "a", "system": "s"}, [SYSTEM, *QA], {}),
    "alpaca, history": (
        {"instruction": "r", "output": "b", "history": [["q", "a"]], "system": "s"},
        [SYSTEM, *QA, user("r"), assistant("b")],
        {},
    ),
    "alpaca, empty history": ({"instruction": "q", "output": "a", "history": []}, QA, {}),
    "texts": ({"prompt": "q", "completion": "a"}, QA, {}),
    "texts, response": ({"prompt": "q", "response": "a", "id": 3}, QA, {"id": 3}),
    "lists": ({"prompt": [SYSTEM, QA[0]], "completion": [QA[1]]}, [SYSTEM, *QA], {}),
    "a list and a text": ({"prompt": [QA[0]], "completion": "a"}, QA, {}),
    "lists of several turns": (
        {"prompt": [*QA, user("r")], "completion": [assistant("b")]},
        [QA[0], {"weight": 0, **QA[1]}, user("r"), assistant("b")],
        {},
    ),
    "sharegpt's lists": ({"prompt": HUMAN[:1], "completion": HUMAN[1:]}, QA, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_becomes_of_each_form(name):
    record, messages, rest = CASES[name]
    given = json.dumps(record)
    assert as_messages(record) == {"messages": messages, **rest}
    assert as_messages(as_messages(record)) == as_messages(record)
    assert json.dumps(record) == given


@pytest.mark.parametrize("name", CASES)
def test_each_form_is_learned_as_its_messages_are(name, write_jsonl):
    record, messages, rest = CASES[name]

    def documents(record):
        config = once(
            SourceConfig(write_jsonl([record]), "chat"), sequence_length=512, loss="response"
        )
        made = make_dataset(
            config, make_byte_tokenizer(TEMPLATE), block_size=4, eos_token_id=EOS_ID
        )
        return by_record(made)

    assert str(documents(record)) == str(documents({"messages": messages, **rest}))


TEMPLATE = CHATML.replace(
    "message.content",
    "(message.content or '') + (message.tool_calls | tojson if message.tool_calls else '')",
)


def test_columns_that_are_named():
    record = {"question": "q", "answer": "a", "id": 1, "messages": None}
    assert as_messages(record, prompt="question", answer="answer") == {"messages": QA}
    with pytest.raises(DataError, match="no field 'solution' among 'question', 'answer'"):
        as_messages(record, prompt="question", answer="solution")


def test_columns_of_a_source(write_jsonl):
    def documents(record, *columns):
        config = once(SourceConfig(write_jsonl([record]), "chat", *columns), loss="response")
        made = make_dataset(config, make_byte_tokenizer(), block_size=4, eos_token_id=EOS_ID)
        return str(by_record(made))

    found = documents({"question": "q", "answer": "a"}, "answer", "question")
    assert found == documents({"messages": QA})


REFUSED = [
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, 'write prompt and chosen as "messages"'),
    ({"text": "q"}, "for texts use format jsonl"),
    ({"question": "q", "answer": "a"}, "set prompt_field and field to the question and the answer among 'question'"),
    ({"messages": None}, '"messages" is missing, empty or not a list; give {"messages": [{"role"'),
    ({"conversations": HUMAN, "prompt": "q", "completion": "a"}, '"conversations" and "prompt" are two forms'),
    ({"conversations": []}, '"conversations" is no list with turns in it'),
    ({"conversations": "q"}, '"conversations" is no list with turns in it'),
    ({"conversations": [turn("narrator", "q")]}, "conversations[0] is \"from\" 'narrator'; use one of human"),
    ({"conversations": [turn("human", None)]}, 'conversations[0] has a "value" of type NoneType; give a string'),
    ({"conversations": [turn("human", ["q"])]}, 'conversations[0] has a "value" of type list; give a string'),
    ({"conversations": [turn("function_call", "f(x)")]}, "conversations[0] calls a tool with 'f(x)'; give JSON"),
    ({"conversations": [turn("system", "s"), *HUMAN], "system": "t"}, '"system" is given, and a system turn as well'),
    ({"instruction": 5, "output": "a"}, '"instruction" is of type int; give a string'),
    ({"instruction": "q", "output": ["a"]}, '"output" is of type list; give a string'),
    ({"instruction": "q", "input": {}, "output": "a"}, '"input" is of type dict; give a string'),
    ({"instruction": "q", "output": "a", "history": ["q"]}, "history[0] is 'q'; give [question, answer]"),
    ({"prompt": "", "completion": "a"}, '"prompt" is empty; fill it in or remove the record'),
    ({"prompt": "q", "completion": 7}, '"completion" is of type int; give a text, or a list of messages'),
    ({"prompt": [], "response": "a"}, '"prompt" is of type list; give a text, or a list of messages'),
]  # fmt: skip


@pytest.mark.parametrize(("record", "told"), REFUSED)
def test_what_is_refused(record, told):
    with pytest.raises(DataError) as raised:
        as_messages(record)
    assert told in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"conversations": [HUMAN[1], HUMAN[0]]}, "messages[0] is an assistant turn"),
        ({"conversations": [HUMAN[0], QA[1]]}, "messages[0] is in ShareGPT's form"),
        ({"instruction": "q", "output": ""}, "messages[1] is an assistant turn that says nothing"),
    ],
)
def test_a_form_is_then_read_as_messages_are(record, told, write_jsonl):
    config = once(SourceConfig(write_jsonl([record]), "chat"))
    data = make_dataset(config, make_byte_tokenizer(), block_size=4, eos_token_id=EOS_ID)
    with pytest.raises(DataError, match=re.escape(told)):
        next(data)


def lengths(data, batches):
    """Tokens that some batches hold of the first 40 records, which are the first source's, and of the others."""
    found = {"a": 0, "b": 0}
    for _ in range(batches):
        records = next(data)["record_ids"]
        found["a"] += int(((records >= 0) & (records < 40)).sum())
        found["b"] += int((records >= 40).sum())
    return found


def test_weights_may_be_shares_of_tokens(tmp_path):
    """Two sources of equal weight, whose records differ in length ten times."""
    for name, length in (("a", 10), ("b", 100)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": name * length}) + "\n" for _ in range(40))
        )
    sources = tuple(SourceConfig(str(tmp_path / f"{name}.jsonl"), "jsonl") for name in "ab")

    def data(**fields):
        config = DataConfig(sources, sequence_length=128, batch_size=8, **fields)
        return make_dataset(config, make_byte_tokenizer(), block_size=4, eos_token_id=EOS_ID)

    by_tokens = data(weights="tokens")
    shares = lengths(by_tokens, 30)
    assert shares["a"] / sum(shares.values()) == pytest.approx(1 / 2, abs=0.03)
    shares = lengths(data(), 30)
    assert shares["a"] / sum(shares.values()) == pytest.approx(11 / 112, abs=0.03)

    position = json.loads(json.dumps(by_tokens.get_state()))
    expected = next(by_tokens)
    resumed = data(weights="tokens")
    resumed.set_state(position)
    assert (next(resumed)["tokens"] == expected["tokens"]).all()
    with pytest.raises(DataError, match="the saved position was taken with weights="):
        data().set_state(position)


def test_weights_of_tokens_need_documents_to_measure(tmp_path, unchecked_types):
    for name, text in (("a", "fine"), ("b", "")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    sources = tuple(SourceConfig(str(tmp_path / f"{name}.jsonl"), "jsonl") for name in "ab")
    config = DataConfig(
        sources, sequence_length=32, batch_size=2, weights="tokens", on_error="skip"
    )
    with pytest.raises(
        DataError, match=r"b.jsonl: none of 1 records can be used to measure weights in tokens"
    ):
        make_dataset(config, make_byte_tokenizer(), block_size=4, eos_token_id=EOS_ID)
    with pytest.raises(ConfigError, match="weights='token': choose one of records, tokens"):
        DataConfig(sources, sequence_length=32, batch_size=2, weights="token")
