"""Records as people have them: every form, mark and field is read, refused with a fix that works, or named once."""

import dataclasses
import json
import logging

import pytest

from sdar_jax.data import DataConfig, SourceConfig, load_tokenizer, make_dataset
from sdar_jax.data.chat import ChatRenderer, _warn_once
from sdar_jax.errors import ConfigError, DataError
from sdar_jax.training.synthetic_data import write_source, write_tokenizer
from tests.data.conftest import CHATML, make_byte_tokenizer
from tests.data.test_chat import GOOD, TAGGED, assistant, call, marked, user
from tests.data.test_pipeline import EOS_ID, by_record, once

VARIABLE = CHATML.replace(
    "'<|im_start|>assistant\n'",
    "'<|im_start|>assistant\n' + ('<think></think>' if enable_thinking is defined and not enable_thinking else '')",
)
TURNS = [user("q"), assistant("a"), user("r"), assistant("b")]


@pytest.fixture(autouse=True)
def nothing_said():
    _warn_once.cache_clear()


def responses(record, template=CHATML, **variables):
    pieces = ChatRenderer(make_byte_tokenizer(template)).pieces(record, variables)
    return [text for text, response in pieces if response]


def refused(record, template=CHATML):
    with pytest.raises(DataError) as raised:
        ChatRenderer(make_byte_tokenizer(template)).pieces(record)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def with_fields(messages, i, **fields):
    return {
        "messages": [
            {**message, **fields} if n == i else message for n, message in enumerate(messages)
        ]
    }


# Content, and calls.


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


def test_text_parts_of_content_are_joined():
    record = {"messages": [user(parts("q", "r")), assistant(parts("a", " b"))]}
    text = marked(ChatRenderer(make_byte_tokenizer()).pieces(record))
    assert text == "<|im_start|>user\nqr<|im_end|>\n<|im_start|>assistant\n⟦a b<|im_end|>\n⟧"


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "'image_url'"),
        ({"type": "text"}, "'text'"),
        ("a", "'a'"),
        ({}, "'None'"),
    ],
)
def test_other_parts_of_content_are_refused(part, kind):
    message = refused({"messages": [user([*parts("q"), part]), assistant("a")]})
    assert message.startswith(f"messages[0] has content of type list with a part {kind}")
    assert 'give a string, or parts {"type": "text", "text": ...}' in message
    assert responses({"messages": [user("q"), assistant("a")]}) == responses(
        {"messages": [user(parts("q")), assistant("a")]}
    )


def test_fields_that_are_null_are_as_if_left_out():
    """Columns of a table have them; templates ask whether a field is there."""
    template = CHATML.replace(
        "message.content", "message.content + ('calls' if 'tool_calls' in message else '')"
    )
    nulls = {"tool_calls": None, "weight": None, "loss_mask": None, "name": None}
    record = {
        "messages": [{**message, **nulls} for message in GOOD],
        "tools": None,
        "functions": None,
        "weight": None,
    }
    assert (
        responses(record, template) == responses({"messages": GOOD}, template) == ["a<|im_end|>\n"]
    )
    assert responses(with_fields(GOOD, 1, tool_calls=[]), template) == ["a<|im_end|>\n"]


def test_tools_may_be_json_text():
    template = "{{ tools | tojson }}" + CHATML
    renderer, tools = (
        ChatRenderer(make_byte_tokenizer(template)),
        [{"type": "function", "function": {"name": "f"}}],
    )
    expected = renderer.prompt({"messages": GOOD, "tools": tools})
    assert renderer.prompt({"messages": GOOD, "tools": json.dumps(tools)}) == expected
    assert '"tools" is not a list of objects' in refused({"messages": GOOD, "tools": "f()"})


def asks(*calls, content=None):
    return {
        "messages": [
            user("q"),
            assistant(content, tool_calls=list(calls)),
            {"role": "tool", "content": "sun"},
        ]
    }


HEAD = "{% for m in messages %}{% if m.role == 'assistant' %}<A>"
TAIL = "<end>{% else %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<A>{% endif %}"
CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} ARGUMENTS</call>{% endfor %}"
WITH_TOJSON = CALLS.replace("ARGUMENTS", "{{ c.function.arguments | tojson }}")
PRINTED = CALLS.replace("ARGUMENTS", "{{ c.function.arguments }}")
JOINED = CALLS.replace("ARGUMENTS", "{{ '' + c.function.arguments }}")
BY_NAME = CALLS.replace(
    "ARGUMENTS", "{% for k, v in c.function.arguments|items %}{{ k }}={{ v }}{% endfor %}"
)
# How templates treat null content: only where there is none are calls written (DeepSeek), as text (GLM), ...
CONTENTS = {
    "calls only beside null": "{% if m.content is none %}CALLS{% else %}{{ m.content }}{% endif %}",
    "any content is printed": "{{ m.content }}CALLS",
    "any content is joined": "{{ m.content + '' }}CALLS",
    "content by its truth": "{% if m.content %}{{ m.content }}{% endif %}CALLS",
    "a sign wherever content is not null": "{% if m.content is not none %}{{ m.content + '#' }}{% endif %}CALLS",
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("calls", [WITH_TOJSON, PRINTED, JOINED])
@pytest.mark.parametrize("arguments", [{"at": "é"}, '{"at": "é"}', '{"at":"é"}'])
def test_a_call_beside_null_content_is_written_whatever_the_template_reads(
    content, calls, arguments
):
    template = HEAD + CONTENTS[content].replace("CALLS", calls) + TAIL
    (said,) = responses(asks(call("f", arguments)), template)
    assert said == '<call>f {"at": "é"}</call><end>'


@pytest.mark.parametrize(
    ("arguments", "written"), [({}, "{}"), ("", "{}"), ("{}", "{}"), (None, "{}")]
)
@pytest.mark.parametrize("calls", [WITH_TOJSON, PRINTED, JOINED])
def test_a_call_without_arguments(calls, arguments, written):
    (said,) = responses(asks(call("f", arguments)), HEAD + calls + TAIL)
    assert said == f"<call>f {written}</call><end>"


def test_arguments_that_the_template_takes_apart_stay_objects():
    (said,) = responses(asks(call("f", '{"x": "y"}')), HEAD + BY_NAME + TAIL)
    assert said == "<call>f x=y</call><end>"


@pytest.mark.parametrize("arguments", ["{'at': 1}", "[1]", "at", [1], 5, "1" * 5000])
def test_arguments_that_are_no_object_are_refused(arguments):
    message = refused(asks(call("f", arguments)), HEAD + WITH_TOJSON + TAIL)
    assert message.startswith("messages[1].tool_calls[0] has arguments ")
    assert message.endswith("give a JSON object, or one as a string")


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ("f()", 'messages[1] has "tool_calls" of type str; give a list'),
        (["f"], "messages[1].tool_calls[0] names no function"),
        (
            [{"function": {"arguments": {}}}],
            'names no function; give {"function": {"name": ..., "arguments": {...}}}',
        ),
    ],
)
def test_malformed_calls(calls, message):
    assert message in refused({"messages": [user("q"), assistant(None, tool_calls=calls)]})


def test_a_bare_call_is_read():
    template = HEAD + WITH_TOJSON.replace("c.function", "c") + TAIL
    assert responses(asks({"name": "f", "arguments": '{"x": 1}'}), template) == [
        '<call>f {"x": 1}</call><end>'
    ]


# What a turn says stands in its text.


FIRST_CALL = (
    HEAD
    + "{{ m.content or '' }}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}"
    + TAIL
)
EITHER = (
    HEAD
    + "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% else %}{{ m.content }}{% endif %}"
    + TAIL
)
WRITES_ALL = (
    HEAD
    + "{{ m.reasoning_content or '' }}{{ m.content or '' }}{{ m.function_call.name if m.function_call else '' }}"
    + WITH_TOJSON
    + TAIL
)
F, G = call("f", {}), call("g", {})
# A turn, a template, what of the turn is not in its text, and the turn without it.
LEFT_OUT = {
    "calls": (assistant(None, tool_calls=[F]), CHATML, "tool call", assistant("a")),
    "calls beside content": (assistant("a", tool_calls=[F]), CHATML, "tool call", assistant("a")),
    "calls where generation is marked": (
        assistant(None, tool_calls=[F]),
        TAGGED,
        "tool call",
        assistant("a"),
    ),
    "a second call": (
        assistant(None, tool_calls=[F, G]),
        FIRST_CALL,
        "tool call",
        assistant(None, tool_calls=[F]),
    ),
    "content beside a call": (
        assistant("a", tool_calls=[F]),
        EITHER,
        "content",
        assistant(None, tool_calls=[F]),
    ),
    "reasoning alone": (
        assistant(None, reasoning_content="hm"),
        CHATML,
        "thinking",
        assistant("a"),
    ),
    "reasoning by another name": (
        assistant("a", reasoning="hm"),
        CHATML,
        "thinking",
        assistant("a"),
    ),
    "thinking by another name": (assistant("a", thinking="hm"), CHATML, "thinking", assistant("a")),
    "an older way to call": (
        assistant(None, function_call={"name": "f", "arguments": "{}"}),
        CHATML,
        '"function_call"',
        assistant("a"),
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_the_template_leaves_out_of_a_turn_is_named(name):
    turn, template, part, without = LEFT_OUT[name]
    assert refused({"messages": [user("q"), turn]}, template) == (
        f"the {part} of messages[1] is not in the chat template's text;"
        ' use a template that writes it, remove it from the record, or set "weight": 0 on the turn'
    )
    assert responses({"messages": [user("q"), turn]}, WRITES_ALL)
    assert responses({"messages": [user("q"), without]}, template)
    assert not responses({"messages": [user("q"), {**turn, "weight": 0}]}, template)


def test_content_that_is_written_nowhere():
    assert refused({"messages": GOOD}, HEAD + TAIL).startswith(
        "the content of messages[1] is not in"
    )


# Which turns are learned.


@pytest.mark.parametrize("template", [CHATML, TAGGED])
@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": 0}, {"loss": False}]
)
def test_a_turn_marked_so_takes_no_loss(template, mark):
    assert responses(with_fields(TURNS, 1, **mark), template) == ["b<|im_end|>\n"]
    assert responses(with_fields(TURNS, 3, **mark), template) == ["a<|im_end|>"]
    record = with_fields(TURNS, 3, **mark)
    pieces = ChatRenderer(make_byte_tokenizer(template)).pieces(record)
    plain = ChatRenderer(make_byte_tokenizer(template)).pieces({"messages": TURNS})
    assert "".join(text for text, _ in pieces) == "".join(text for text, _ in plain)


@pytest.mark.parametrize("mark", [{"weight": 1}, {"weight": 1.0}, {"train": True}, {"train": None}])
def test_a_mark_that_asks_for_what_is_done_anyway(mark):
    assert responses(with_fields(TURNS, 1, **mark)) == ["a<|im_end|>", "b<|im_end|>\n"]
    assert responses(with_fields(TURNS, 0, train=False)) == ["a<|im_end|>", "b<|im_end|>\n"]


def test_marks_are_not_shown_to_the_template():
    template = CHATML.replace("message.content", "(message | tojson)")
    plain = ChatRenderer(make_byte_tokenizer(template)).prompt({"messages": GOOD})
    assert (
        ChatRenderer(make_byte_tokenizer(template)).prompt(with_fields(GOOD, 1, weight=0)) == plain
    )


@pytest.mark.parametrize(
    ("i", "fields", "message"),
    [
        (1, {"weight": 0.5}, 'messages[1] has "weight": 0.5, which is not understood'),
        (1, {"weight": "0"}, "messages[1] has \"weight\": '0', which is not understood"),
        (1, {"mask": True}, 'messages[1] has "mask": True, which is not understood'),
        (1, {"loss_mask": [0, 1]}, 'messages[1] has "loss_mask": [0, 1], which is not understood'),
        (1, {"train_detail": []}, 'messages[1] has "train_detail": [], which is not understood'),
        (0, {"train": True}, "but only assistant turns can be learned by themselves; remove"),
    ],
)
def test_marks_about_the_loss_that_cannot_be_honoured(i, fields, message):
    assert message in refused(with_fields(TURNS, i, **fields))
    assert responses({"messages": TURNS}) == ["a<|im_end|>", "b<|im_end|>\n"]


def test_marks_of_generation_that_cannot_be_told_apart():
    template = TAGGED.replace(
        "{%- generation -%}", "{%- generation -%}{%- endgeneration -%}{%- generation -%}"
    )
    message = refused(with_fields(TURNS, 1, weight=0), template)
    assert message.startswith("the chat template marks 4 generations for 2 assistant turns")
    assert "".join(responses({"messages": TURNS}, template)) == "a<|im_end|>b<|im_end|>\n"
    assert responses(with_fields(TURNS, 1, weight=0), TAGGED) == ["b<|im_end|>\n"]


def test_a_last_turn_that_the_template_does_not_mark_is_not_learned():
    template = TAGGED.replace(
        "message.role == 'assistant'", "message.role == 'assistant' and message.content == 'a'"
    )
    assert responses({"messages": TURNS}, template) == ["a<|im_end|>"]


def test_a_mark_under_loss_all_is_refused(write_jsonl):
    source = SourceConfig(write_jsonl([with_fields(TURNS, 1, weight=0)]), "chat")
    config = once(source, sequence_length=128)
    with pytest.raises(
        DataError, match=r"messages\[1\] is marked not to be learned, .*; set loss: response"
    ):
        next(dataset(config))
    batch = next(dataset(dataclasses.replace(config, loss="response")))
    tokenizer = make_byte_tokenizer()
    assert tokenizer.decode(batch["tokens"][batch["loss_mask"]]).startswith("b<|im_end|>\n")


def dataset(config, template=CHATML):
    return make_dataset(config, make_byte_tokenizer(template), block_size=4, eos_token_id=EOS_ID)


# Variables of the template.


@pytest.mark.parametrize(
    "own",
    [
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"enable_thinking": False},
        {"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}},
        {"enable_thinking": None, "chat_template_kwargs": {"enable_thinking": False}},
    ],
)
def test_a_records_variables_reach_the_template(own):
    renderer = ChatRenderer(make_byte_tokenizer(VARIABLE))
    assert renderer.prompt({"messages": [user("q")], **own}).endswith("assistant\n<think></think>")
    assert renderer.prompt({"messages": [user("q")], **own}, {"enable_thinking": True}).endswith(
        "<think></think>"
    )
    assert renderer.prompt({"messages": [user("q")]}, {"enable_thinking": False}).endswith(
        "<think></think>"
    )
    assert renderer.prompt({"messages": [user("q")]}).endswith("assistant\n")


@pytest.mark.parametrize("template", [CHATML, TAGGED])
def test_training_and_decoding_have_the_same_prompt(template):
    template = template.replace("message.content + '", "message.content + sign + '")
    record = {"messages": TURNS, "chat_template_kwargs": {"sign": "!"}}
    renderer = ChatRenderer(make_byte_tokenizer(template))
    pieces = renderer.pieces(record, {"sign": "?"})
    assert [text for text, response in pieces if response] == ["a!<|im_end|>", "b!<|im_end|>\n"]
    prompt = renderer.prompt({**record, "messages": TURNS[:3]}, {"sign": "?"})
    assert "".join(text for text, _ in pieces[:-1]) == prompt


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["enable_thinking"],
            '"chat_template_kwargs" is of type list; give an object, or leave it out',
        ),
        ({"tokenize": True}, "'tokenize' cannot be a variable of a chat template; remove it"),
        ({"messages": []}, "'messages' cannot be"),
        ({"enable-thinking": True}, "'enable-thinking' cannot be"),
    ],
)
def test_variables_that_cannot_be(given, message):
    assert message in refused({"messages": GOOD, "chat_template_kwargs": given})
    if isinstance(given, dict):
        with pytest.raises(ConfigError, match=f"source 'x': {message}"):
            SourceConfig("x", "chat", chat_template_kwargs=given)
        with pytest.raises(ConfigError, match=f"chat_template_kwargs: {message}"):
            ChatRenderer(make_byte_tokenizer()).check_variables(given)


def test_a_source_gives_its_records_variables(write_jsonl):
    template = CHATML.replace("message.content", "message.content + (sign or '')")
    path = write_jsonl(
        [{"messages": GOOD}, {"messages": GOOD, "chat_template_kwargs": {"sign": "?"}}]
    )
    sources = tuple(
        SourceConfig(path, "chat", chat_template_kwargs=given) for given in ({"sign": "!"}, {})
    )
    config = DataConfig(sources, 64, 1, loss="response", shuffle=False, epochs=1, num_threads=0)
    decode = make_byte_tokenizer().decode
    batches = list(dataset(config, template))
    learned, tokens = by_record(batches, "loss_mask"), by_record(batches)
    found = [
        decode([t for t, can in zip(tokens[i], learned[i], strict=True) if can])[:2]
        for i in range(4)
    ]
    assert found == ["a!", "a?", "a<", "a?"]


def test_a_variable_that_no_template_reads_is_refused_in_a_config_and_named_in_records(
    write_jsonl, caplog
):
    path = write_jsonl([{"messages": GOOD, "enable_thinking": False}] * 3)
    config = once(SourceConfig(path, "chat", chat_template_kwargs={"enable_thinkin": False}))
    with pytest.raises(
        ConfigError, match="does not read 'enable_thinkin' of chat_template_kwargs; remove it there"
    ):
        dataset(config, VARIABLE)
    config = once(SourceConfig(path, "chat"))
    with caplog.at_level(logging.WARNING):
        list(dataset(config, "{% if enable_thinking %}{% endif %}" + CHATML))
        assert not caplog.records
        list(dataset(config))
    (said,) = caplog.messages
    assert said.startswith("the chat template does not read 'enable_thinking'")


def test_made_up_data_has_a_template_without_variables(tmp_path):
    source = SourceConfig("x", "chat", chat_template_kwargs={"enable_thinking": False})
    written = write_source(source, tmp_path / "made-up", 200)
    write_tokenizer(tmp_path / "tokenizer")
    config = once(written, sequence_length=64)
    assert next(
        make_dataset(config, load_tokenizer(tmp_path / "tokenizer"), block_size=4, eos_token_id=0)
    )


def test_variables_belong_to_chat():
    with pytest.raises(
        ConfigError, match="chat_template_kwargs with format='jsonl': only chat has them"
    ):
        SourceConfig("x", "jsonl", chat_template_kwargs={"a": 1})


# Fields that are not read.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"functions": [{"name": "f"}]}, 'give it as "tools"'),
        ({"system": "be kind"}, "give it as first message, with role system"),
        ({"weight": 0.5}, "the record has \"weight\": '0.5', which is not understood; remove"),
        ({"train": False}, "mark turns that are not to be learned with"),
    ],
)
def test_fields_of_a_record_that_would_change_what_is_learned_are_refused(fields, message):
    assert message in refused({"messages": GOOD, **fields})
    fixed = [{"role": "system", "content": fields["system"]}, *GOOD] if "system" in fields else GOOD
    assert responses({"messages": fixed, "tools": fields.get("functions")}) == ["a<|im_end|>\n"]


@pytest.mark.parametrize("tools", [[{"name": "f"}], '[{"name": "f"}]', [], "[]"])
@pytest.mark.parametrize("template", [CHATML, "{{ tools | tojson }}" + CHATML])
def test_tools_that_the_template_does_not_show_are_named(tools, template):
    said = []
    renderer = ChatRenderer(make_byte_tokenizer(template), warn=said.append)
    renderer.pieces({"messages": GOOD, "tools": tools})
    unread = '"tools", which records have, is not read by the chat template'
    assert said == ([unread] if "f" in str(tools) and template == CHATML else [])


def test_fields_that_are_not_read_are_named_once(write_jsonl, caplog):
    messages = [{**message, "id": 1, "mood": "good", "date": "today"} for message in GOOD]
    record = {"messages": messages, "id": 5, "source": "x", "prompt": "q", "documents": None}
    template = CHATML.replace("message.content", "message.content + message.date")
    config = once(SourceConfig(write_jsonl([record] * 5), "chat"), sequence_length=256)
    with caplog.at_level(logging.WARNING):
        list(dataset(config, template))
    assert sorted(caplog.messages) == [
        '"mood", which messages have, is not read by the chat template',
        '"prompt", which records have besides "messages", is not read',
    ]
    ChatRenderer(make_byte_tokenizer()).prompt({"messages": GOOD, "seed": 1, "topic_": "x"})
    assert len(caplog.messages) == 2, "a line of prompts may hold anything"
