"""Conversations: rendered by the tokenizer's own template, the assistant's turns found exactly.

A turn is never looked for in the text, since a message may hold any text. Where a template marks generation itself
({% generation %}), its marks are used. Else the response of turn i starts where the prompt of inference ends, that is
render(messages[:i], add_generation_prompt=True), and its end is seen by rendering again with one character, which is
nowhere in the conversation, set at the end of what the assistant said.
"""

import re
import threading
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from sdar_jax.errors import ConfigError, DataError

ROLES = ("system", "user", "assistant", "tool")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
PRIVATE_USE = range(0xE000, 0xF900)

Message = dict[str, Any]
Span = tuple[int, int]


class ChatRenderer:
    """Raises ConfigError if the tokenizer has no chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if not tokenizer.chat_template:
            raise ConfigError(
                "the tokenizer has no chat template, which format='chat' needs: set tokenizer.chat_template"
            )
        self._tokenizer = tokenizer
        self._marking = threading.Lock()

    def pieces(self, record: dict[str, Any]) -> list[tuple[str, bool]]:
        """A record {"messages": [...], "tools": [...]} as (text, is response) pieces whose texts join to the rendering.

        A response runs from behind the generation prompt to its end-of-turn token, that included. What follows the last
        response to the end of the text (a line break, as a rule) belongs to it: when decoding, those positions are
        masked too, so left visible they would give the response's length away.
        Raises DataError, without saying where, if the record is malformed or a turn's bounds are not certain.
        """
        messages, tools = check_conversation(record)
        text, spans = self._spans(messages, tools)
        if spans and messages[-1]["role"] == "assistant":
            spans[-1] = (spans[-1][0], len(text))
        return _cut(text, spans)

    def prompt(self, record: dict[str, Any]) -> str:
        """The rendering of a conversation up to where the assistant is to answer. Raises DataError as `pieces` does."""
        messages, tools = check_conversation(record)
        return self._render(messages, tools, prompt=True)

    def _spans(self, messages: list[Message], tools: list[Any] | None) -> tuple[str, list[Span]]:
        template = self._tokenizer.get_chat_template(tools=tools)
        if GENERATION.search(template):
            return self._marked(template, messages, tools)
        text = self._render(messages, tools)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        return text, [(self._start(text, messages, tools, i), self._end(text, messages, tools, i)) for i in turns]

    def _marked(self, template: str, messages: list[Message], tools: list[Any] | None) -> tuple[str, list[Span]]:
        options: dict[str, Any] = {"tools": tools, "chat_template": template, **self._tokenizer.special_tokens_map}
        try:
            # transformers collects the marks in an object that all renderings of a template share.
            with self._marking:
                texts, spans = render_jinja_template([messages], return_assistant_tokens_mask=True, **options)
        except Exception as error:  # a template may raise anything on a record it does not like
            raise _template_error(error) from error
        return texts[0], [(int(start), int(end)) for start, end in spans[0]]

    def _render(self, messages: list[Message], tools: list[Any] | None, prompt: bool = False) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # a template may raise anything on a record it does not like
            raise _template_error(error) from error
        assert isinstance(text, str)
        return text

    def _start(self, text: str, messages: list[Message], tools: list[Any] | None, i: int) -> int:
        prompt = self._render(messages[:i], tools, prompt=True)
        if not text.startswith(prompt):
            raise DataError(
                f"the chat template renders what precedes messages[{i}] otherwise once later turns follow, so"
                " its start is not certain; mark responses in the template with {% generation %}, or split the record"
            )
        return len(prompt)

    def _end(self, text: str, messages: list[Message], tools: list[Any] | None, i: int) -> int:
        if i == len(messages) - 1:
            return len(text)
        mark = next(chr(code) for code in PRIVATE_USE if chr(code) not in text)
        for message in _marked_messages(messages[i], mark):
            marked = self._render([*messages[:i], message, *messages[i + 1 :]], tools)
            if marked.count(mark) != 1 or marked.replace(mark, "") != text:
                continue
            # The turn as the last one shows what the template puts between the mark and the turn's end.
            rest = self._render([*messages[:i], message], tools).partition(mark)[2]
            end = marked.index(mark)
            if text.startswith(rest, end):
                return end + (len(rest.rstrip()) or len(rest))
        raise DataError(
            f"the end of messages[{i}] is not certain in the chat template's text; mark responses in the template with"
            " {% generation %}"
        )


def check_conversation(record: dict[str, Any]) -> tuple[list[Message], list[Any] | None]:
    """The record's messages, with content None or absent made "" (templates differ on it), and its tools or None."""
    messages, tools = record.get("messages"), record.get("tools")
    if not isinstance(messages, list) or not messages:
        raise DataError(
            '"messages" is missing, empty or not a list; give {"messages": [{"role": ..., "content": ...}]}'
        )
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError('"tools" is not a list of objects; give JSON schemas, or leave it out')
    checked = [_check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    if checked[0]["role"] == "assistant":
        raise DataError("messages[0] is an assistant turn; a conversation starts with a system or user message")
    return checked, tools or None


def _check_message(message: Any, name: str) -> Message:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise DataError(f"{name} has role {role!r}; use one of {', '.join(ROLES)}")
    said = message.get("content")
    content = "" if said is None and role == "assistant" else said
    if not isinstance(content, str):
        raise DataError(f"{name} has content of type {type(content).__name__}; give a string")
    if role == "assistant" and not (content or message.get("tool_calls") or message.get("reasoning_content")):
        raise DataError(f"{name} is an assistant turn that says nothing; give it content or tool_calls")
    return {**message, "content": content}


def _marked_messages(message: Message, mark: str) -> list[Message]:
    """The message with `mark` where its speech ends: behind its content, before white space that a template may strip,
    or in its last tool call. Which of them leaves the rendering as it was depends on the template."""
    content = message["content"]
    said = content.rstrip()
    marked = [{**message, "content": content + mark}, {**message, "content": said + mark + content[len(said) :]}]
    calls = message.get("tool_calls")
    if isinstance(calls, list) and calls and isinstance(calls[-1], dict):
        function = calls[-1].get("function", calls[-1])
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            named = {**function, "name": function["name"] + mark}
            last = {**calls[-1], "function": named} if "function" in calls[-1] else named
            marked.append({**message, "tool_calls": [*calls[:-1], last]})
    return marked


def _cut(text: str, spans: list[Span]) -> list[tuple[str, bool]]:
    pieces, position = [], 0
    for start, end in spans:
        pieces += [(text[position:start], False), (text[start:end], True)]
        position = end
    pieces.append((text[position:], False))
    return [(piece, response) for piece, response in pieces if piece]


def _template_error(error: Exception) -> DataError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DataError(f"the chat template refuses the conversation ({reason}); fix the record or the template")
