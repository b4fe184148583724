"""Records of conversations, checked and brought into the one form that chat templates are written for."""

import json
import re
from typing import Any, NamedTuple

from sdar_jax.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
# Three names of one thing, the first of which counts; templates are given it under the first two, as by transformers.
REASONING = ("reasoning_content", "thinking", "reasoning")
# What OpenAI and Mistral (weight), axolotl (train, training) and ms-swift (loss) call it.
NO_LOSS = ("weight", "train", "training", "loss")

# Fields that nothing here reads and whose loss changes nothing. Any other is named in the log.
_HARMLESS = {
    *(
        "id",
        "uuid",
        "idx",
        "index",
        "prompt_id",
        "conversation_id",
        "conv_id",
        "hash",
        "name",
        "tool_call_id",
    ),
    *(
        "source",
        "dataset",
        "origin",
        "split",
        "subset",
        "category",
        "domain",
        "task",
        "topic",
        "tags",
        "model",
    ),
    *(
        "language",
        "lang",
        "license",
        "url",
        "title",
        "metadata",
        "meta",
        "timestamp",
        "created",
        "created_at",
        "score",
    ),
    *("parallel_tool_calls", "turns", "num_turns"),
}
_READ = {"messages", "tools", "chat_template_kwargs", "enable_thinking"}
_MESSAGE_FIELDS = {"role", "content", "tool_calls", "function_call", *REASONING, *NO_LOSS}
_ABOUT_LOSS = re.compile(
    r"(^|_)(loss|losses|mask|masks|masked|train|trained|training|trainable|weights?|learn)(_|$)"
)
_RECORD_LOSS = re.compile(r"((sample_|loss_)?(weights?|masks?))|train(ing)?")
# Arguments of apply_chat_template and of its renderer, which are no variables of a template.
_RESERVED = {
    *(
        "messages",
        "conversation",
        "conversations",
        "tools",
        "chat_template",
        "add_generation_prompt",
        "tokenize",
    ),
    *(
        "continue_final_message",
        "return_assistant_tokens_mask",
        "sanitize_control_tokens",
        "return_dict",
    ),
    *("return_tensors", "padding", "truncation", "max_length", "tokenizer_kwargs"),
}
_SHAREGPT = '"from" is the role (human: user, gpt: assistant) and "value" the content'

Message = dict[str, Any]


class Conversation(NamedTuple):
    """A checked record.

    Attributes:
        messages: without fields that are null, but for content, which is a string, or None in an assistant turn; the
            arguments of tool calls are objects.
        tools: JSON schemas, or None.
        variables: what the template is given besides messages and tools.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    variables: dict[str, Any]


def read_conversation(record: dict[str, Any], chat_template_kwargs: dict[str, Any]) -> Conversation:
    """Reads and checks a record. Raises DataError.

    Args:
        chat_template_kwargs: variables of the template, which the record's own override.
    """
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(
            '"messages" is missing, empty or not a list; give {"messages": [{"role": ..., "content": ...}]}'
        )
    checked = [_check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    if checked[0]["role"] == "assistant":
        raise DataError(
            "messages[0] is an assistant turn; a conversation starts with a system or user message"
        )
    variables = {**chat_template_kwargs, **_read_variables(record)}
    return Conversation(checked, _read_tools(record.get("tools")), variables)


def turns_without_loss(record: dict[str, Any]) -> frozenset[int]:
    """Finds the indices of the assistant turns marked by "weight": 0 or "train": false (or another name in NO_LOSS).

    The record is one that read_conversation takes. Raises DataError for a mark about the loss that is not understood.
    """
    found = set()
    for i, message in enumerate(record["messages"]):
        for name, value in message.items():
            if value is None or not _ABOUT_LOSS.search(name):
                continue
            if name not in NO_LOSS or value not in (0, 1):
                raise DataError(
                    f'messages[{i}] has "{name}": {value!r}, which is not understood; mark a turn that is not to be'
                    ' learned with "weight": 0 or "train": false, and others not at all'
                )
            if message["role"] == "assistant":
                if value == 0:
                    found.add(i)
            elif value == 1:
                raise DataError(
                    f'messages[{i}] has "{name}": {value!r}, but only assistant turns can be learned by themselves;'
                    f' remove "{name}" there'
                )
    return frozenset(found)


def unread_fields(record: dict[str, Any], template: str) -> list[str]:
    """Lists what the record holds that neither training nor the template reads, one phrase each, but harmless fields.

    Raises DataError for a field of the record whose loss would change what is learned.
    """
    phrases = []
    for name in (name for name, value in record.items() if value is not None and name not in _READ):
        if name == "functions":
            raise DataError(
                '"functions" is an older name of "tools", which is read; give it as "tools"'
            )
        if name == "system" and isinstance(record[name], str):
            raise DataError(
                '"system" is given besides "messages"; give it as first message, with role system'
            )
        if _RECORD_LOSS.fullmatch(name) and record[name] != 1:
            raise DataError(
                f'the record has "{name}": {str(record[name])[:40]!r}, which is not understood; remove "{name}", and'
                ' mark turns that are not to be learned with "weight": 0'
            )
        if name not in _HARMLESS:
            phrases.append(f'"{name}", which records have besides "messages", is not read')
    if _read_tools(record.get("tools")) and not mentions(template, "tools"):
        phrases.append('"tools", which records have, is not read by the chat template')
    message_fields = {
        name
        for message in record["messages"]
        for name, value in message.items()
        if value is not None
    }
    for name in sorted(message_fields):
        if name not in _MESSAGE_FIELDS | _HARMLESS and not mentions(template, name):
            phrases.append(f'"{name}", which messages have, is not read by the chat template')
    return phrases


def mentions(template: str, name: str) -> bool:
    """Returns whether a name is in a template's source."""
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


def wrong_variable(variables: dict[str, Any]) -> str | None:
    """Names the first of chat_template_kwargs that a template cannot have as a variable of its own, if one is."""
    for name in variables:
        if not isinstance(name, str) or not name.isidentifier() or name in _RESERVED:
            return f"{name!r} cannot be a variable of a chat template; remove it"
    return None


def _read_tools(tools: Any) -> list[dict[str, Any]] | None:
    if isinstance(tools, str):  # As data sets with columns of one type hold them.
        tools = _from_json(tools)
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    ):
        raise DataError('"tools" is not a list of objects; give JSON schemas, or leave it out')
    return tools or None


def _read_variables(record: dict[str, Any]) -> dict[str, Any]:
    own = record.get("chat_template_kwargs")
    own = {} if own is None else own
    if not isinstance(own, dict):
        raise DataError(
            f'"chat_template_kwargs" is of type {type(own).__name__}; give an object, or leave it out'
        )
    if wrong := wrong_variable(own):
        raise DataError(f'"chat_template_kwargs": {wrong}')
    variables = {"enable_thinking": record.get("enable_thinking"), **own}
    return {name: value for name, value in variables.items() if value is not None}


def _check_message(message: Any, name: str) -> Message:
    role = message.get("role") if isinstance(message, dict) else None
    if role is None and isinstance(message, dict) and "from" in message:
        raise DataError(f'{name} is in ShareGPT\'s form; write "role" and "content"; {_SHAREGPT}')
    if role not in ROLES:
        raise DataError(f"{name} has role {role!r}; use one of {', '.join(ROLES)}")
    checked = {
        key: value for key, value in message.items() if value is not None and key not in NO_LOSS
    }
    checked["content"] = _check_content(
        message.get("content"), name, may_be_null=role == "assistant"
    )
    if checked.get("tool_calls") in ([], ()):
        del checked["tool_calls"]
    reasoning = next((checked[key] for key in REASONING if key in checked), None)
    if reasoning is not None:
        checked = {"thinking": reasoning, **checked, "reasoning_content": reasoning}
    if role != "assistant":
        return checked
    if not (
        checked["content"]
        or any(checked.get(key) for key in ("tool_calls", "function_call", *REASONING))
    ):
        raise DataError(
            f"{name} is an assistant turn that says nothing; give it content or tool_calls"
        )
    if "tool_calls" in checked:
        checked["tool_calls"] = _check_calls(checked["tool_calls"], name)
    return checked


def _check_content(content: Any, name: str, *, may_be_null: bool) -> str | None:
    if isinstance(content, str) or (content is None and may_be_null):
        return content
    if not isinstance(content, list):
        raise DataError(f"{name} has content of type {type(content).__name__}; give a string")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else part
        if kind != "text" or not isinstance(part.get("text"), str):
            raise DataError(
                f"{name} has content of type list with a part {str(kind)[:40]!r}; give a string, or parts"
                ' {"type": "text", "text": ...}'
            )
    return "".join(part["text"] for part in content)


def _check_calls(calls: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise DataError(
            f'{name} has "tool_calls" of type {type(calls).__name__}; give a list of objects'
        )
    return [_check_call(call, f"{name}.tool_calls[{n}]") for n, call in enumerate(calls)]


def _check_call(call: Any, name: str) -> dict[str, Any]:
    """Checks a call, and makes its arguments, which may be JSON text (OpenAI's form), an object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(
            f'{name} names no function; give {{"function": {{"name": ..., "arguments": {{...}}}}}}'
        )
    given = function.get("arguments")
    arguments = _from_json(given) if isinstance(given, str) and given.strip() else given or {}
    if not isinstance(arguments, dict):
        raise DataError(
            f"{name} has arguments {str(given)[:40]!r}; give a JSON object, or one as a string"
        )
    function = {
        **{key: value for key, value in function.items() if value is not None},
        "arguments": arguments,
    }
    if "function" not in call:
        return function
    return {
        **{key: value for key, value in call.items() if value is not None},
        "function": function,
    }


def _from_json(text: str) -> Any:
    """Parses JSON text; text that is no JSON is left as it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
