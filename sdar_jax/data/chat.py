"""Conversations: rendered by the tokenizer's own template, with the assistant's turns found exactly.

A turn is never looked for in the text, since a message may hold any text. A template's own marks ({% generation %}) are
used. Else the response of turn i starts where the prompt of inference ends, render(messages[:i], add_generation_prompt=
True), and its end is seen by rendering again with one character, found nowhere else, behind the assistant's message.
"""

import contextlib
import functools
import itertools
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

from sdar_jax.data.conversation import (
    REASONING,
    Conversation,
    Message,
    mentions,
    read_conversation,
    turns_without_loss,
    unread_fields,
    wrong_variable,
)
from sdar_jax.data.tokenizer import PreTrainedTokenizerBase
from sdar_jax.errors import ConfigError, DataError

log = logging.getLogger(__name__)

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0002, 0xFFFFE), range(0x100000, 0x10FFFE))
END_OF_THINKING = re.compile(r"</(?:\w+:)?think(?:ing)?>|\[/THINK\]")
THINKING = "thinking"

Span = tuple[int, int]


@functools.cache
def _warn_once(message: str) -> None:
    log.warning("%s", message)


class ChatRenderer:
    """Renders conversations by a tokenizer's chat template.

    Args:
        warn: called, often with the same message, with what of the records is not read, and what is learned otherwise
            than it is written.

    Raises:
        ConfigError: the tokenizer has no chat template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, warn: Callable[[str], None] = _warn_once
    ):
        if not tokenizer.chat_template:
            raise ConfigError(
                "the tokenizer has no chat template, which format='chat' needs: set tokenizer.chat_template"
            )
        self._tokenizer = tokenizer
        self._warn = warn
        templates = tokenizer.chat_template
        self._source = "\n".join(templates.values()) if isinstance(templates, dict) else templates
        self._marking = threading.Lock()

    def check_variables(self, chat_template_kwargs: dict[str, Any]) -> None:
        """Raises ConfigError for a variable that the chat template does not read, or cannot have."""
        if wrong := wrong_variable(chat_template_kwargs):
            raise ConfigError(f"chat_template_kwargs: {wrong}")
        for name in chat_template_kwargs:
            if not mentions(self._source, name):
                raise ConfigError(
                    f"the chat template does not read {name!r} of chat_template_kwargs; remove it there"
                )

    def pieces(
        self, record: dict[str, Any], chat_template_kwargs: dict[str, Any] | None = None
    ) -> list[tuple[str, bool]]:
        """Splits a record {"messages": [...], "tools": [...]} into (text, is response) pieces that join to its
        rendering.

        A response runs from behind the generation prompt to its end-of-turn token, that included. What follows the last
        response to the end of the text (a line break, as a rule) belongs to it: when decoding, those positions are
        masked too, so left visible they would give the response's length away. Turns marked "weight": 0 or
        "train": false are no responses. Where the generation prompt opens the thinking of the last turn and the
        template then leaves it out, it is put back from the content: it is what decoding would have to write.

        Args:
            chat_template_kwargs: variables of the template; the record's own override them.

        Raises:
            DataError: without saying where, if the record is malformed, a turn's bounds are not certain, or something
                that a turn says is not in the text.
        """
        conversation = self._read(record, chat_template_kwargs)
        for unread in unread_fields(record, self._source):
            self._warn(unread)
        return self._pieces(conversation, turns_without_loss(record))

    def prompt(
        self, record: dict[str, Any], chat_template_kwargs: dict[str, Any] | None = None
    ) -> str:
        """Renders a conversation up to where the assistant is to answer. Raises DataError as `pieces` does."""
        text, _ = self._render(self._read(record, chat_template_kwargs), prompt=True)
        return text

    def _read(
        self, record: dict[str, Any], chat_template_kwargs: dict[str, Any] | None
    ) -> Conversation:
        conversation = read_conversation(record, chat_template_kwargs or {})
        for name in conversation.variables:
            if not mentions(self._source, name):
                self._warn(
                    f"the chat template does not read {name!r}, which chat_template_kwargs of records have"
                )
        return self._as_the_template_reads(conversation)

    def _as_the_template_reads(self, conversation: Conversation) -> Conversation:
        """Leaves null content null and arguments objects where the template can read that, as transformers advises.

        Else null becomes "", and arguments become JSON text: templates join either to other text.
        """
        nulls = any(message["content"] is None for message in conversation.messages)
        calls = any(_calls(message) for message in conversation.messages)
        if not nulls and not calls:
            return conversation
        forms = []
        errors = []
        ways_of_calls = (False, True) if calls else (False,)
        ways_of_nulls = (None, "") if nulls else ("",)
        for as_text, content in itertools.product(ways_of_calls, ways_of_nulls):
            form = _in_form(conversation, content, as_text)
            try:
                self._render(form)
                null_is_read = content is not None or self._reads_null(form)
                if null_is_read and (not calls or self._reads_arguments(form)):
                    return form
                forms.append(form)
            except DataError as error:
                errors.append(error)
        if not forms:
            raise errors[0]
        return forms[-1]

    def _reads_null(self, form: Conversation) -> bool:
        """Returns whether null content is not written as the word None."""
        mark = next(self._free_characters(form))
        marked = [{**m, "content": mark} if m["content"] is None else m for m in form.messages]
        text = self._render(form._replace(messages=marked))[0]
        return mark not in text or text.replace(mark, "None") != self._render(form)[0]

    def _reads_arguments(self, form: Conversation) -> bool:
        """Returns whether the arguments of calls are written, and not as Python would print an object."""
        known = _characters(form)
        word = next(word for n in itertools.count() if (word := f"argument_{n}") not in known)
        messages = [
            _with_calls(message, lambda function: _with_argument(function, word))
            for message in form.messages
        ]
        text = self._render(form._replace(messages=messages))[0]
        return word in text and f"'{word}': '{word}'" not in text

    def _pieces(
        self, conversation: Conversation, unlearned: frozenset[int]
    ) -> list[tuple[str, bool]]:
        messages = conversation.messages
        last = len(messages) - 1
        turns = [
            i
            for i, message in enumerate(messages)
            if message["role"] == "assistant" and i not in unlearned
        ]
        text, spans = self._spans(conversation, turns, unlearned)
        if spans and last in turns and self._is_of_last_turn(conversation, text, spans[-1]):
            spans[-1] = (spans[-1][0], len(text))
        for i, part in self._left_out(conversation, turns):
            if part == THINKING and i != last and _says_more(messages[i]):
                self._warn(_THINKING_LEFT_OUT)
            elif (
                part == THINKING
                and i == last
                and (opened := self._opened(conversation, text, spans))
            ):
                text, spans[-1] = opened
            else:
                raise DataError(
                    f"the {part} of messages[{i}] is not in the chat template's text; use a template that writes it,"
                    ' remove it from the record, or set "weight": 0 on the turn'
                )
        return _cut(text, spans)

    def _spans(
        self, conversation: Conversation, turns: list[int], unlearned: frozenset[int]
    ) -> tuple[str, list[Span]]:
        text, spans = self._render(conversation)
        if not self._marks_generation(conversation):
            mark = next(self._free_characters(conversation))
            spans = []
            for i in turns:
                start = self._start(text, conversation, i, mark)
                spans.append((start, self._end(text, conversation, i, mark)))
            return text, spans
        if not unlearned:
            return text, spans
        all_turns = [
            i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"
        ]
        if len(spans) != len(all_turns):
            raise DataError(
                f"the chat template marks {len(spans)} generations for {len(all_turns)} assistant turns, so it is not"
                ' certain which to leave out; mark one per turn in the template, or remove "weight" and the like'
            )
        return text, [span for i, span in zip(all_turns, spans, strict=True) if i in turns]

    def _is_of_last_turn(self, conversation: Conversation, text: str, span: Span) -> bool:
        if not self._marks_generation(conversation):
            return True
        before = self._render(conversation._replace(messages=conversation.messages[:-1]))[0]
        return span[1] > len(os.path.commonprefix([before, text]))

    def _marks_generation(self, conversation: Conversation) -> bool:
        return GENERATION.search(self._template(conversation)) is not None

    def _template(self, conversation: Conversation) -> str:
        return self._tokenizer.get_chat_template(tools=conversation.tools)

    def _render(self, conversation: Conversation, prompt: bool = False) -> tuple[str, list[Span]]:
        """Renders the text, and finds the spans that the template itself marks as generated."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            template = self._template(conversation)
            marks = GENERATION.search(template) is not None
            # transformers collects the marks in an object that all renderings of a template share.
            with self._marking if marks else contextlib.nullcontext():
                texts, spans = render_jinja_template(
                    [conversation.messages],
                    tools=[*conversation.tools] if conversation.tools else None,
                    chat_template=template,
                    return_assistant_tokens_mask=marks,
                    add_generation_prompt=prompt,
                    **{**self._tokenizer.special_tokens_map, **conversation.variables},
                )
        except Exception as error:  # a template may raise anything on a record it does not like
            raise _template_error(error) from error
        if not marks:
            return texts[0], []
        return texts[0], [(int(start), int(end)) for start, end in spans[0]]

    def _start(self, text: str, conversation: Conversation, i: int, mark: str) -> int:
        before = conversation._replace(messages=conversation.messages[:i])
        prompt = self._render(before, prompt=True)[0]
        if text.startswith(prompt):
            return len(prompt)
        # With the same messages before it, a turn may begin otherwise than a prompt that opens <think>.
        history = self._render(before)[0]
        bare = {
            key: value for key, value in conversation.messages[i].items() if key not in REASONING
        }
        header, found, _ = self._render(_replaced(conversation, i, {**bare, "content": mark}))[
            0
        ].partition(mark)
        if (
            found
            and text.startswith(header)
            and header.startswith(history)
            and prompt.startswith(history)
        ):
            if not _thinks(conversation.messages[i]):
                self._warn(
                    _BEGUN_OTHERWISE.format(prompt[len(os.path.commonprefix([prompt, header])) :])
                )
            return len(header)
        raise DataError(
            f"the chat template renders what precedes messages[{i}] otherwise in the whole than in its prompt,"
            " so its start is not certain; mark responses in the template with {% generation %}, or split the record:"
            ' one that ends with this turn, and one where it has "weight": 0'
        )

    def _end(self, text: str, conversation: Conversation, i: int, mark: str) -> int:
        if i == len(conversation.messages) - 1:
            return len(text)
        for message in _marked_messages(conversation.messages[i], mark):
            marked = self._render(_replaced(conversation, i, message))[0]
            if marked.count(mark) != 1 or marked.replace(mark, "") != text:
                continue
            # The turn as the last one shows what the template puts between the mark and the turn's end.
            alone = conversation._replace(messages=[*conversation.messages[:i], message])
            rest = self._render(alone)[0].partition(mark)[2]
            end = marked.index(mark)
            if text.startswith(rest, end):
                return end + (len(rest.rstrip()) or len(rest))
        raise DataError(
            f"the end of messages[{i}] is not certain in the chat template's text; mark responses in the template with"
            ' {% generation %}, or set "weight": 0 on this turn'
        )

    def _left_out(self, conversation: Conversation, turns: list[int]) -> list[tuple[int, str]]:
        """Lists what the turns with loss say that the template does not write, as (turn, part)."""
        marks = self._free_characters(conversation)
        messages = list(conversation.messages)
        parts = []
        for i in turns:
            messages[i], marked = _with_parts_marked(messages[i], marks)
            parts += [(mark, i, part) for mark, part in marked]
        if not parts:
            return []
        text = self._render(conversation._replace(messages=messages))[0]
        return [(i, part) for mark, i, part in parts if mark not in text]

    def _opened(
        self, conversation: Conversation, text: str, spans: list[Span]
    ) -> tuple[str, Span] | None:
        """Puts the thinking of the last turn back behind a prompt that opens it, where the content has it in that form.

        Returns the new text, and the turn in it.
        """
        content = conversation.messages[-1]["content"] or ""
        end = END_OF_THINKING.search(content)
        if end is None or self._marks_generation(conversation):
            return None
        prompt = self._render(
            conversation._replace(messages=conversation.messages[:-1]), prompt=True
        )[0]
        start = spans[-1][0]
        opening = prompt[start:]
        thought = content[: end.end()].lstrip()
        answer = content[end.end() :]
        rest = text[start:].lstrip()
        if (
            prompt[:start] != text[:start]
            or not opening.strip()
            or not thought.startswith(opening.strip())
        ):
            return None
        if not rest.startswith(answer.strip()):
            return None
        thought = thought.removeprefix(opening if thought.startswith(opening) else opening.strip())
        space = answer[: len(answer) - len(answer.lstrip())]
        text = prompt + thought + space + rest
        return text, (len(prompt), len(text))

    def _free_characters(self, conversation: Conversation) -> Iterator[str]:
        """Yields characters that are nowhere in the conversation or the template."""
        used = set(_characters(conversation)) | set(self._source)
        for character in map(chr, itertools.chain(*PRIVATE_USE)):
            if character not in used:
                yield character
        raise DataError(
            "it holds every private-use character, and none is left to find the turns with; remove a few"
        )


_THINKING_LEFT_OUT = (
    "the chat template leaves out the thinking of turns that later ones follow, and these are learned without it; to"
    ' learn it, end a record with each such turn, and set "weight": 0 on the turns before'
)
_BEGUN_OTHERWISE = (
    "decoding begins an answer behind {!r}, which the chat template does not write before some turns that are learned;"
    ' these are learned as it writes them (set "weight": 0 on them to leave them out)'
)


def _in_form(conversation: Conversation, content: str | None, as_text: bool) -> Conversation:
    """Puts this content where it is null, and writes arguments as JSON text or leaves them objects."""
    messages = [
        {**message, "content": content if message["content"] is None else message["content"]}
        for message in conversation.messages
    ]
    if as_text:
        messages = [_with_calls(message, _with_text_arguments) for message in messages]
    return conversation._replace(messages=messages)


def _calls(message: Message) -> list[dict[str, Any]]:
    return message.get("tool_calls", []) if message["role"] == "assistant" else []


def _with_calls(message: Message, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Message:
    """Changes the function of each call of a message."""
    if not _calls(message):
        return message
    calls = []
    for call in _calls(message):
        if "function" in call:
            calls.append({**call, "function": change(call["function"])})
        else:
            calls.append(change(call))
    return {**message, "tool_calls": calls}


def _with_text_arguments(function: dict[str, Any]) -> dict[str, Any]:
    return {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}


def _with_argument(function: dict[str, Any], word: str) -> dict[str, Any]:
    arguments = function["arguments"]
    if isinstance(arguments, str):
        return _with_text_arguments(
            {**function, "arguments": {**json.loads(arguments), word: word}}
        )
    return {**function, "arguments": {**arguments, word: word}}


def _characters(conversation: Conversation) -> str:
    return json.dumps(conversation, ensure_ascii=False, default=str)


def _replaced(conversation: Conversation, i: int, message: Message) -> Conversation:
    messages = conversation.messages
    return conversation._replace(messages=[*messages[:i], message, *messages[i + 1 :]])


def _thinks(message: Message) -> bool:
    return any(message.get(name) for name in REASONING) or bool(
        END_OF_THINKING.search(message["content"] or "")
    )


def _says_more(message: Message) -> bool:
    """Returns whether a turn holds anything besides its thinking."""
    return bool(_calls(message) or END_OF_THINKING.split(message["content"] or "")[-1].strip())


def _with_parts_marked(
    message: Message, marks: Iterator[str]
) -> tuple[Message, list[tuple[str, str]]]:
    """Puts a mark in each part of a message; gives it and (mark, the part's name) for each."""
    message = dict(message)
    marked = []

    def mark(part: str) -> str:
        character = next(marks)
        marked.append((character, part))
        return character

    thoughts = [
        name for name in REASONING if isinstance(message.get(name), str) and message[name].strip()
    ]
    if thoughts:
        sign = mark(THINKING)
        message.update({name: message[name] + sign for name in thoughts})
    content = message["content"] or ""
    end = END_OF_THINKING.search(content)
    thought, answer = (content[: end.start()], content[end.start() :]) if end else ("", content)
    if re.sub(r"^\s*[<\[][^<>\[\]]*[>\]]", "", thought).strip():
        thought += mark(THINKING)
    if (answer[end.end() - end.start() :] if end else answer).strip():
        answer += mark("content")
    if content:
        message["content"] = thought + answer
    if isinstance(function := message.get("function_call"), dict):
        message["function_call"] = {
            **function,
            "name": str(function.get("name")) + mark('"function_call"'),
        }
    return _with_calls(
        message, lambda each: {**each, "name": each["name"] + mark("tool call")}
    ), marked


def _marked_messages(message: Message, mark: str) -> list[Message]:
    """Puts `mark` where a message may end: behind its content, before white space that a template may strip, or in its
    last tool call. Which of them leaves the rendering as it was depends on the template."""
    content = message["content"] or ""
    stripped = content.rstrip()
    space = content[len(stripped) :]
    marked = [
        {**message, "content": content + mark},
        {**message, "content": stripped + mark + space},
    ]
    if calls := _calls(message):
        last = _with_calls(
            {**message, "tool_calls": calls[-1:]},
            lambda each: {**each, "name": each["name"] + mark},
        )
        marked.append({**message, "tool_calls": [*calls[:-1], *last["tool_calls"]]})
    return marked


def _cut(text: str, spans: list[Span]) -> list[tuple[str, bool]]:
    pieces = []
    position = 0
    for start, end in spans:
        pieces += [(text[position:start], False), (text[start:end], True)]
        position = end
    pieces.append((text[position:], False))
    return [(piece, response) for piece, response in pieces if piece]


def _template_error(error: Exception) -> DataError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DataError(
        f"the chat template refuses the conversation ({reason}); fix the record or the template"
    )
