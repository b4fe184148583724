"""Outside truth: renderings written out by hand, and transformers' own mask where the template marks generation."""

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from sdar_jax.data.chat import ChatRenderer
from sdar_jax.errors import DataError
from tests.data.conftest import CHATML, make_byte_tokenizer

TAGGED = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\n' -}}"
    "{%- if message.role == 'assistant' -%}"
    "{%- generation -%}{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message.content + '<|im_end|>' -}}{%- endif -%}{{- '\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
TRIMMING = CHATML.replace("message.content", "message.content | trim")
NASTY = [
    "hello",
    "<|im_start|>assistant\n",
    "<|im_end|>",
    "<|im_end|>\n",
    "\n",
    "  ",
    "\ue000",
    "<think>\nhm\n</think>\n\n",
    "{% generation %}",
    "é",
]


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def marked(pieces):
    """Responses in ⟦ ⟧."""
    return "".join(f"⟦{text}⟧" if response else text for text, response in pieces)


@st.composite
def conversations(draw):
    content = st.lists(st.sampled_from(NASTY), min_size=1, max_size=4).map("".join)
    first = draw(st.sampled_from(["system", "user"]))
    roles = [first, *draw(st.lists(st.sampled_from(["user", "assistant", "tool"]), max_size=5))]
    return [{"role": role, "content": draw(content)} for role in roles]


def chatml_by_hand(messages, strip=str):
    parts = []
    for i, message in enumerate(messages):
        content = strip(message["content"])
        if message["role"] == "assistant":
            last = i == len(messages) - 1
            parts.append(
                "<|im_start|>assistant\n⟦"
                + content
                + ("<|im_end|>\n⟧" if last else "<|im_end|>⟧\n")
            )
        else:
            parts.append(f"<|im_start|>{message['role']}\n{content}<|im_end|>\n")
    return "".join(parts)


@given(conversations())
def test_chatml_turns_whatever_the_messages_hold(messages):
    pieces = ChatRenderer(make_byte_tokenizer()).pieces({"messages": messages})
    assert marked(pieces) == chatml_by_hand(messages)


@given(conversations())
def test_a_template_that_trims(messages):
    pieces = ChatRenderer(make_byte_tokenizer(TRIMMING)).pieces({"messages": messages})
    assert marked(pieces) == chatml_by_hand(messages, str.strip)


@given(conversations())
def test_marked_generation_is_transformers_own_mask(messages):
    tokenizer = make_byte_tokenizer(TAGGED)
    pieces = ChatRenderer(tokenizer).pieces({"messages": messages})
    assert marked(pieces) == chatml_by_hand(messages)
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    theirs = tokenizer.apply_chat_template(messages, tokenize=True, **options)
    ids, mask = [], []
    for text, response in pieces:
        ids += (piece := tokenizer.encode(text, add_special_tokens=False))
        mask += [int(response)] * len(piece)
    if messages[-1]["role"] == "assistant":
        mask[-1] = 0  # the line break behind the last turn, which is ours to add
    assert (ids, mask) == (theirs["input_ids"], theirs["assistant_masks"])


def test_marked_generation_is_rendered_by_one_thread_at_a_time(monkeypatch):
    """transformers keeps the marks of a template's rendering in one object: two at once would mix or fail."""
    rendering = threading.Lock()

    def alone(*arguments, **options):
        assert rendering.acquire(blocking=False), "two threads at once"
        try:
            time.sleep(0.001)
            return render_jinja_template(*arguments, **options)
        finally:
            rendering.release()

    monkeypatch.setattr("transformers.utils.chat_template_utils.render_jinja_template", alone)
    renderer = ChatRenderer(make_byte_tokenizer(TAGGED))
    records = [{"messages": [user("q" * n), assistant("a" * (20 - n))]} for n in range(20)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(renderer.pieces, records)) == [
            renderer.pieces(record) for record in records
        ]


def test_the_record_is_left_as_it_was():
    messages = [
        user("q"),
        assistant(None, tool_calls=[call("f", {"x": 1})]),
        user("r"),
        assistant("a"),
    ]
    record = {"messages": messages, "tools": []}
    before = copy.deepcopy(record)
    template = CHATML.replace(
        "'<|im_end|>", "(message.tool_calls | tojson if message.tool_calls else '') + '<|im_end|>"
    )
    ChatRenderer(make_byte_tokenizer(template)).pieces(record)
    assert record == before


def test_a_turn_end_without_a_special_token_is_its_white_space():
    template = CHATML.replace("<|im_end|>", "")
    pieces = ChatRenderer(make_byte_tokenizer(template)).pieces(
        {"messages": [user("q"), assistant("a"), user("r")]}
    )
    assert (
        marked(pieces) == "<|im_start|>user\nq\n<|im_start|>assistant\n⟦a\n⟧<|im_start|>user\nr\n"
    )


GOOD = [user("q"), assistant("a")]
MALFORMED = [
    ({}, '"messages" is missing'),
    ({"messages": []}, '"messages" is missing, empty'),
    ({"messages": "hi"}, "not a list"),
    ({"messages": ["hi"]}, r"messages\[0\] has role None"),
    (
        {"messages": [{"role": "bot", "content": "x"}]},
        r"messages\[0\] has role 'bot'; use one of system, user",
    ),
    ({"messages": [user(None), assistant("a")]}, r"messages\[0\] has content of type NoneType"),
    ({"messages": [user("q"), assistant(["a"])]}, r"messages\[1\] has content of type list"),
    (
        {"messages": [user("q"), assistant("")]},
        r"messages\[1\] is an assistant turn that says nothing",
    ),
    ({"messages": [assistant("a")]}, r"messages\[0\] is an assistant turn"),
    ({"messages": GOOD, "tools": "f"}, '"tools" is not a list'),
]


@pytest.mark.parametrize(("record", "message"), MALFORMED)
def test_malformed_conversations(record, message):
    with pytest.raises(DataError, match=message) as raised:
        ChatRenderer(make_byte_tokenizer()).pieces(record)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages | length }}" + CHATML, "start is not certain"),
        (
            CHATML.replace("message.content", "message.content[:3]"),
            r"end of messages\[1\] is not certain",
        ),
        (
            CHATML.replace("message.content", "(message.content | length | string)"),
            r"end of messages\[1\] is not certain",
        ),
        (
            CHATML.replace("message.content", "message.content + message.content"),
            r"end of messages\[1\] is not certain",
        ),
        ("{{ raise_exception('only one turn') }}", r"refuses the conversation \(only one turn\)"),
        (
            "{% generation %}{{ raise_exception('no') }}{% endgeneration %}",
            r"refuses the conversation \(no\)",
        ),
    ],
)
def test_templates_whose_turns_are_not_certain(template, message):
    record = {"messages": [user("q"), assistant("aha"), user("r"), assistant("b")]}
    with pytest.raises(DataError, match=message) as raised:
        ChatRenderer(make_byte_tokenizer(template)).pieces(record)
    assert "\n" not in str(raised.value)


THOUGHT = "<think>\nhm\n</think>\n\n"
NO_THOUGHT = "<think>\n\n</think>\n\n"
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {}}}
QWEN3_RENDERINGS = {
    "system and two turns, the first thought forgotten": (
        [
            {"role": "system", "content": "S"},
            user("q"),
            assistant(THOUGHT + "a"),
            user("r"),
            assistant(THOUGHT + "b"),
        ],
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>⟧\n"
        "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n⟦<think>\nhm\n</think>\n\nb<|im_end|>\n⟧",
    ),
    "literal special tokens": (
        [
            user("<|im_start|>assistant\nfake<|im_end|>"),
            assistant("<|im_end|><|im_start|>assistant\n"),
            user("r"),
        ],
        "<|im_start|>user\n<|im_start|>assistant\nfake<|im_end|><|im_end|>\n"
        "<|im_start|>assistant\n⟦<|im_end|><|im_start|>assistant\n<|im_end|>⟧\n<|im_start|>user\nr<|im_end|>\n",
    ),
    "line breaks around": (
        [user("\nq\n"), assistant("\n\na\n\n"), user("r"), assistant("\n\nb\n\n")],
        "<|im_start|>user\n\nq\n<|im_end|>\n<|im_start|>assistant\n⟦\n\na\n\n<|im_end|>⟧\n"
        f"<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n⟦{NO_THOUGHT}b\n\n<|im_end|>\n⟧",
    ),
    "reasoning beside the content": (
        [user("q"), assistant("a", reasoning_content="hm")],
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n⟦<think>\nhm\n</think>\n\na<|im_end|>\n⟧",
    ),
    "tool calls with and without content": (
        [
            user("q"),
            assistant(None, tool_calls=[call("weather", {"at": "<|im_end|>\n"})]),
            {"role": "tool", "content": "sun"},
            assistant("let me", tool_calls=[call("weather", {}), call("weather", '{"at": "x"}')]),
            {"role": "tool", "content": "rain"},
            assistant("a"),
        ],
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
        '⟦<tool_call>\n{"name": "weather", "arguments": {"at": "<|im_end|>\\n"}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>user\n<tool_response>\nsun\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        '⟦let me\n<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"at": "x"}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>\n"
        f"<|im_start|>assistant\n⟦{NO_THOUGHT}a<|im_end|>\n⟧",
    ),
}


@pytest.mark.network
@pytest.mark.parametrize("name", QWEN3_RENDERINGS)
def test_qwen3s_own_template(qwen3, name):
    messages, expected = QWEN3_RENDERINGS[name]
    assert marked(ChatRenderer(qwen3).pieces({"messages": messages})) == expected


@pytest.mark.network
def test_qwen3_tools_stand_in_the_prompt(qwen3):
    pieces = ChatRenderer(qwen3).pieces({"messages": GOOD, "tools": [WEATHER]})
    assert [response for _, response in pieces] == [False, True]
    assert pieces[0][0] == qwen3.apply_chat_template(
        GOOD[:1], tools=[WEATHER], tokenize=False, add_generation_prompt=True
    )
    assert "weather" in pieces[0][0]


@pytest.mark.network
@example(messages=[{"role": "system", "content": "hello"}, assistant("<think>\nhm\n</think>\n\n")])
@given(messages=conversations())
def test_qwen3_prompts_are_those_of_inference(qwen3, messages):
    """Each response follows exactly the text that inference would give the model; where none can, it is refused."""
    full = qwen3.apply_chat_template(messages, tokenize=False)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = [
        qwen3.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        for i in turns
    ]
    renderer = ChatRenderer(qwen3)
    if not all(full.startswith(prompt) for prompt in prompts):
        with pytest.raises(DataError, match="start is not certain"):
            renderer.pieces({"messages": messages})
        return
    try:
        pieces = renderer.pieces({"messages": messages})
    except DataError as error:
        # A turn of nothing but thinking, which the template leaves out where nobody asked.
        assert "the thinking of messages" in str(error)
        assert full.count("hm") < sum(message["content"].count("hm") for message in messages)
        return
    texts = [text for text, _ in pieces]
    assert "".join(texts) == full
    assert ["".join(texts[:n]) for n, (_, response) in enumerate(pieces) if response] == prompts
    assert all(text.rstrip("\n").endswith("<|im_end|>") for text, response in pieces if response)


@pytest.mark.network
def test_qwen3_turns_that_later_ones_change_are_refused(qwen3):
    thinking = assistant("", reasoning_content="hm", tool_calls=[call("weather", {})])
    messages = [
        user("q"),
        thinking,
        {"role": "tool", "content": "sun"},
        assistant("a"),
        user("r"),
        assistant("b"),
    ]
    with pytest.raises(DataError, match=r"what precedes messages\[3\]"):
        ChatRenderer(qwen3).pieces({"messages": messages})
