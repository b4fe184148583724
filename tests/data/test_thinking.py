"""Templates that think: what they open in the prompt, keep in the last turn and leave out of those before it."""

import pytest

from sdar_jax.data import SourceConfig, make_dataset
from sdar_jax.data.chat import ChatRenderer, _warn_once
from sdar_jax.errors import DataError
from sdar_jax.training.stops import turn_ends
from tests.data.conftest import CHATML, make_byte_tokenizer
from tests.data.test_chat import assistant, call, marked, user
from tests.data.test_pipeline import EOS_ID, TOKENIZER, by_record, once

# As Qwen3's thinking models do: the prompt opens <think>; thinking is kept behind the last question alone.
QWEN3 = (
    "{%- set last = namespace(user=0) -%}"
    "{%- for m in messages if m.role == 'user' -%}{%- set last.user = m.content -%}{%- endfor -%}"
    "{%- set seen = namespace(last=false) -%}{%- for m in messages -%}"
    "{%- if m.role == 'assistant' -%}"
    "{%- set thought = m.reasoning_content or '' -%}{%- set content = m.content or '' -%}"
    "{%- if '</think>' in content -%}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') -%}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
    "{{- '<|im_start|>assistant\n' -}}"
    "{%- if seen.last -%}{{- '<think>\n' + thought + '\n</think>\n\n' -}}{%- endif -%}{{- content -}}"
    "{%- for c in m.tool_calls or [] -%}{{- '<call>' + c.function.name -}}{%- endfor -%}{{- '<|im_end|>\n' -}}"
    "{%- else -%}{%- if m.role == 'user' and m.content == last.user -%}{%- set seen.last = true -%}{%- endif -%}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n<think>\n' -}}{%- endif -%}"
)
QWEN3_HYBRID = QWEN3.replace(
    "{{- '<|im_start|>assistant\n<think>\n' -}}",
    "{{- '<|im_start|>assistant\n' + ('<think>\n\n</think>\n\n' if enable_thinking is false else '') -}}",
)
# As DeepSeek-R1 and QwQ do: the prompt opens <think>; no turn keeps its thinking.
R1 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<A>{{ (m.content or '').split('</think>')[-1] }}<end>"
    "{% else %}<U>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<A><think>\n{% endif %}"
)
# As DeepSeek-V3.1 does: turns begin with </think>, and so does the prompt where it does not open <think>.
V31 = R1.replace("<A>{{", "<A></think>{{").replace(
    "<A><think>\n", "<A>{{ '<think>' if thinking else '</think>' }}"
)
LEFT_OUT = "the chat template leaves out the thinking of turns that later ones follow"
OTHERWISE = "decoding begins an answer behind '<think>\\n', which the chat template does not write before some turns"
INLINE = assistant("<think>\nhm\n</think>\n\na")
BESIDE = assistant("a", reasoning_content="hm")


@pytest.fixture(autouse=True)
def nothing_said():
    _warn_once.cache_clear()


def forget(caplog):
    _warn_once.cache_clear()
    caplog.clear()


def shown(messages, template=QWEN3, **variables):
    pieces = ChatRenderer(make_byte_tokenizer(template)).pieces({"messages": messages}, variables)
    return (
        marked(pieces)
        .replace("<|im_start|>", "<")
        .replace("<|im_end|>\n", ">")
        .replace("<|im_end|>⟧\n", ">⟧")
    )


@pytest.mark.parametrize("turn", [INLINE, BESIDE])
def test_the_last_turn_goes_on_from_an_opened_thought(turn, caplog):
    assert shown([user("q"), turn]) == "<user\nq><assistant\n<think>\n⟦hm\n</think>\n\na>⟧"
    assert (
        shown([user("q"), turn], QWEN3_HYBRID)
        == "<user\nq><assistant\n⟦<think>\nhm\n</think>\n\na>⟧"
    )
    assert not caplog.messages


def test_turns_without_thinking_behind_an_opened_thought(caplog):
    text = shown([user("q"), assistant("a"), user("r"), assistant("b")])
    assert text == "<user\nq><assistant\n⟦a>⟧<user\nr><assistant\n<think>\n⟦\n</think>\n\nb>⟧"
    (said,) = caplog.messages
    assert said.startswith(OTHERWISE)
    forget(caplog)
    advised = [user("q"), assistant("a", weight=0), user("r"), assistant("b")]
    assert shown(advised) == text.replace("⟦a>⟧", "a>")
    assert not caplog.messages


def test_thinking_switched_off():
    messages = [user("q"), assistant("a"), user("r"), assistant("b")]
    text = shown(messages, QWEN3_HYBRID, enable_thinking=False)
    assert text == "<user\nq><assistant\n⟦a>⟧<user\nr><assistant\n<think>\n\n</think>\n\n⟦b>⟧"


@pytest.mark.parametrize("template", [QWEN3, QWEN3_HYBRID])
@pytest.mark.parametrize("turn", [INLINE, BESIDE])
def test_thinking_that_is_left_out_of_earlier_turns_is_said_once(turn, template, caplog):
    messages = [user("q"), turn, user("r"), assistant("b")]
    for _ in range(2):
        assert shown(messages, template).startswith(
            "<user\nq><assistant\n⟦a>⟧<user\nr><assistant\n"
        )
    (said,) = caplog.messages
    assert said.startswith(LEFT_OUT)
    # As is advised there: a record for each turn, and no loss on the turns before.
    forget(caplog)
    assert "hm\n</think>\n\na>⟧" in shown(messages[:2], template)
    second = shown([messages[0], {**turn, "weight": 0}, *messages[2:]], template)
    assert second.count("⟦") == 1 and second.endswith("b>⟧")
    assert not caplog.messages


def test_turns_between_calls_keep_their_thinking(caplog):
    messages = [user("q"), assistant(None, reasoning_content="h", tool_calls=[call("f", {})])]
    messages += [{"role": "tool", "content": "t"}, BESIDE]
    text = "<user\nq><assistant\n<think>\n⟦h\n</think>\n\n<call>f>⟧<tool\nt><assistant\n<think>\n⟦hm\n</think>\n\na>⟧"
    assert shown(messages) == text
    assert not caplog.messages


def test_what_is_advised_where_later_turns_change_earlier_ones():
    thinking = assistant(None, reasoning_content="h", tool_calls=[call("f", {})])
    messages = [
        user("q"),
        thinking,
        {"role": "tool", "content": "t"},
        assistant("a"),
        user("r"),
        assistant("b"),
    ]
    with pytest.raises(
        DataError, match=r"what precedes messages\[3\] .*; mark responses .*, or split the record"
    ):
        shown(messages)
    assert shown(messages[:4]).endswith("<tool\nt><assistant\n<think>\n⟦\n</think>\n\na>⟧")
    messages[3] = assistant("a", weight=0)
    assert shown(messages).endswith(
        "<tool\nt><assistant\na><user\nr><assistant\n<think>\n⟦\n</think>\n\nb>⟧"
    )


@pytest.mark.parametrize(
    "content", ["<think>\nhm\n</think>\n\na", "<think>hm</think>a", "\n<think>\nhm</think> a"]
)
@pytest.mark.parametrize("template", [R1, R1.replace("[-1]", "[-1] | trim")])
def test_thinking_that_the_template_leaves_out_of_the_last_turn_is_put_back(
    content, template, caplog
):
    """Decoding stands behind <think>, from where the model has to write the rest of the content."""
    rest = content.strip().removeprefix("<think>").removeprefix("\n")
    assert shown([user("q"), assistant(content)], template) == f"<U>q<A><think>\n⟦{rest}<end>⟧"
    assert not caplog.messages
    earlier = shown([user("p"), INLINE, user("q"), assistant(content)], template)
    space = "" if "trim" in template else "\n\n"
    assert earlier == f"<U>p<A>⟦{space}a<end>⟧<U>q<A><think>\n⟦{rest}<end>⟧"
    (said,) = caplog.messages
    assert said.startswith(LEFT_OUT)


def test_plain_answers_behind_a_prompt_that_opens_a_thought(caplog):
    assert shown([user("q"), assistant("a")], R1) == "<U>q<A>⟦a<end>⟧"
    (said,) = caplog.messages
    assert said.startswith(OTHERWISE)


@pytest.mark.parametrize(
    "template", [R1, CHATML, CHATML.replace("content", "content.split('</think>')[-1]")]
)
def test_thinking_that_cannot_be_put_back_is_refused(template):
    turn = BESIDE if template in (R1, CHATML) else INLINE
    with pytest.raises(
        DataError,
        match=r"the thinking of messages\[1\] is not in .*; use a template that writes it",
    ):
        shown([user("q"), turn], template)
    assert shown([user("q"), assistant("a")], template)


def test_turns_and_a_prompt_that_differ_behind_the_same_messages():
    messages = [user("p"), assistant("a"), user("q"), assistant("b")]
    text = "<U>p<A></think>⟦a<end>⟧<U>q<A></think>⟦b<end>⟧"
    assert shown(messages, V31) == shown(messages, V31, thinking=True) == text


def test_a_mark_in_place_of_generation_tags_ends_a_turn_that_is_not_certain():
    template = CHATML.replace("message.content", "message.content[:3]")
    messages = [user("q"), assistant("aha"), user("r"), assistant("b")]
    with pytest.raises(
        DataError, match=r'end of messages\[1\] .*, or set "weight": 0 on this turn'
    ):
        shown(messages, template)
    messages[1]["weight"] = 0
    assert shown(messages, template).endswith("aha><user\nr><assistant\n⟦b>⟧")


def test_a_turn_that_only_thinks_is_not_learned_as_an_empty_one():
    messages = [user("q"), assistant("", reasoning_content="hm"), user("r"), assistant("b")]
    with pytest.raises(DataError, match=r"the thinking of messages\[1\] is not in"):
        shown(messages)
    messages[1]["weight"] = 0
    assert shown(messages).count("⟦") == 1
    generation = QWEN3.replace(
        "{{- content -}}", "{%- generation -%}{{- content -}}{%- endgeneration -%}"
    )
    with pytest.raises(DataError, match=r"the thinking of messages\[1\] is not in"):
        shown([user("q"), INLINE], generation.replace("'<think>\n' + thought", "'<think>\n'"))


def test_where_a_thinking_model_stops_is_found_without_a_word(caplog):
    tokenizer = make_byte_tokenizer(QWEN3)
    assert turn_ends(tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert not caplog.messages


# What ends a stream.


def icons(text):
    turns = (user(text), assistant("a"), user("b"), assistant("c"))
    return {"messages": list(turns)}


@pytest.mark.parametrize("threads", [0, 2])
def test_a_text_of_every_private_use_character_ends_nothing(write_jsonl, threads):
    table = "".join(map(chr, range(0xE000, 0xF900)))
    path = write_jsonl([icons("hi"), icons(table), icons("ho")])
    config = once(
        SourceConfig(path, "chat"), sequence_length=32_768, batch_size=1, num_threads=threads
    )
    batches = list(make_dataset(config, TOKENIZER, block_size=4, eos_token_id=EOS_ID))
    assert sorted(by_record(batches)) == [0, 1, 2]


def test_no_character_left_to_find_turns_with_is_an_error_of_the_record():
    table = "".join(
        map(chr, [*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE)])
    )
    renderer = ChatRenderer(make_byte_tokenizer())
    with pytest.raises(DataError, match="it holds every private-use character, .*; remove a few"):
        renderer.pieces(icons(table))
    assert renderer.pieces(icons(table[:-3]))
