"""Conversations in the forms that people have them in, brought into OpenAI's: {"messages": [...]}.

    {"conversations": [{"from": "human", "value": ...}, ...]}     ShareGPT, with "system" and "tools" beside it
    {"instruction": ..., "input": ..., "output": ...}             alpaca, with "system" and "history"
    {"prompt": ..., "completion": ...}                            TRL, texts or lists of messages; also "response"
    any two columns that are named                                question and answer

All else of a record is kept. Only what its form leaves open is checked here; the rest by `conversation`.
"""

import json
from collections.abc import Callable
from typing import Any

from sdar_jax.errors import DataError

Record = dict[str, Any]

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_CALLS = ("function_call", "tool_call")


def as_messages(record: Record, *, prompt: str | None = None, answer: str | None = None) -> Record:
    """The record with its conversation under "messages"; the same record if it has them already.

    Args:
        prompt, answer: columns of the question and of the answer, which then are the conversation.

    Raises:
        DataError: none of the forms, two of them at once, or a form that is not filled in.
    """
    if answer is not None:
        return _pair(record, prompt or "", answer)
    if record.get("messages") is not None:
        messages = record["messages"]
        if _is_sharegpt(messages):
            return {**record, "messages": _from_sharegpt(messages, "messages")}
        return record
    found = [form for form in _FORMS if all(record.get(name) is not None for name in form)]
    if len(found) > 1:
        both = " and ".join(f'"{form[0]}"' for form in found)
        raise DataError(f"{both} are two forms of a conversation; leave one of them")
    if not found:
        raise DataError(_no_form(record))
    return _FORMS[found[0]](record, *found[0])


def _sharegpt(record: Record, name: str) -> Record:
    turns = record[name]
    if not isinstance(turns, list) or not turns:
        raise DataError(f'"{name}" is no list with turns in it; give one, or leave the record out')
    messages = _from_sharegpt(turns, name) if _is_sharegpt(turns) else turns
    return _made(record, messages, name, system=True)


def _alpaca(record: Record, instruction: str, output: str) -> Record:
    asked = _text(record, instruction)
    if record.get("input") is not None and (given := _text(record, "input")):
        asked = f"{asked}\n{given}"
    messages = [
        *_history(record),
        _message("user", asked),
        _message("assistant", _text(record, output)),
    ]
    return _made(record, messages, instruction, "input", output, "history", system=True)


def _prompted(record: Record, prompt: str, answer: str) -> Record:
    asked = _messages(record[prompt], "user", prompt)
    # Of such a record the answer alone is learned, as its name says.
    asked = [
        {"weight": 0, **message} if _role(message) == "assistant" else message for message in asked
    ]
    return _made(record, [*asked, *_messages(record[answer], "assistant", answer)], prompt, answer)


def _pair(record: Record, prompt: str, answer: str) -> Record:
    for name in (prompt, answer):
        if record.get(name) is None:
            raise DataError(
                f"no field {name!r} among {', '.join(map(repr, record))}; add it, or set field and prompt_field"
            )
    return _prompted({name: record[name] for name in (prompt, answer)}, prompt, answer)


_FORMS: dict[tuple[str, ...], Callable[..., Record]] = {
    ("conversations",): _sharegpt,
    ("conversation",): _sharegpt,
    ("instruction", "output"): _alpaca,
    ("instruction", "response"): _alpaca,
    ("prompt", "completion"): _prompted,
    ("prompt", "response"): _prompted,
}


def _made(record: Record, messages: list[Any], *names: str, system: bool = False) -> Record:
    """The record with these messages in place of the fields that they were made of."""
    rest = {name: value for name, value in record.items() if name not in (*names, "messages")}
    if system and isinstance(text := rest.get("system"), str):
        del rest["system"]
        if text.strip() and _role(messages[0]) == "system":
            raise DataError('"system" is given, and a system turn as well; leave one of them')
        messages = [_message("system", text), *messages] if text.strip() else messages
    return {"messages": messages, **rest}


def _is_sharegpt(turns: Any) -> bool:
    return (
        isinstance(turns, list)
        and bool(turns)
        and all(isinstance(turn, dict) and "from" in turn and "role" not in turn for turn in turns)
    )


def _from_sharegpt(turns: list[Record], name: str) -> list[Record]:
    return [_sharegpt_turn(turn, f"{name}[{i}]") for i, turn in enumerate(turns)]


def _sharegpt_turn(turn: Record, where: str) -> Record:
    sender, value = turn["from"], turn.get("value")
    rest = {name: field for name, field in turn.items() if name not in ("from", "value")}
    if sender in _CALLS:
        return {**_call(value, where), **rest}
    if sender not in _SHAREGPT_ROLES:
        known = ", ".join((*_SHAREGPT_ROLES, *_CALLS))
        raise DataError(f'{where} is "from" {sender!r}; use one of {known}')
    if not isinstance(value, str):
        raise DataError(f'{where} has a "value" of type {type(value).__name__}; give a string')
    return {**_message(_SHAREGPT_ROLES[sender], value), **rest}


def _call(value: Any, where: str) -> Record:
    """A turn that calls tools, from JSON text of one call or of a list of them."""
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise DataError(
            f'{where} calls a tool with {value[:40]!r}; give JSON: {{"name": ..., "arguments": {{...}}}}'
        ) from None
    calls = calls if isinstance(calls, list) else [calls]
    calls = [
        {"type": "function", "function": call}
        if isinstance(call, dict) and "function" not in call
        else call
        for call in calls
    ]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def _history(record: Record) -> list[Record]:
    """Earlier rounds, [question, answer] each."""
    messages = []
    for i, round_ in enumerate(record.get("history") or []):
        if not (
            isinstance(round_, list)
            and len(round_) == 2
            and all(isinstance(x, str) for x in round_)
        ):
            raise DataError(f"history[{i}] is {str(round_)[:40]!r}; give [question, answer]")
        messages += [_message("user", round_[0]), _message("assistant", round_[1])]
    return messages


def _messages(given: Any, role: str, name: str) -> list[Any]:
    if isinstance(given, str):
        if not given.strip():
            raise DataError(f'"{name}" is empty; fill it in or remove the record')
        return [_message(role, given)]
    if isinstance(given, list) and given:
        return _from_sharegpt(given, name) if _is_sharegpt(given) else given
    raise DataError(
        f'"{name}" is of type {type(given).__name__}; give a text, or a list of messages'
    )


def _text(record: Record, name: str) -> str:
    if not isinstance(record[name], str):
        raise DataError(f'"{name}" is of type {type(record[name]).__name__}; give a string')
    return record[name]


def _message(role: str, content: str) -> Record:
    return {"role": role, "content": content}


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _no_form(record: Record) -> str:
    missing = '"messages" is missing'
    if "chosen" in record:
        return f'{missing}; "chosen" belongs to a pair of answers: write prompt and chosen as "messages"'
    if "text" in record:
        return f"{missing}; for texts use format jsonl"
    if len(record) > 1:
        names = ", ".join(map(repr, record))
        return f"{missing}; set prompt_field and field to the question and the answer among {names}"
    return f'{missing}, empty or not a list; give {{"messages": [{{"role": ..., "content": ...}}]}}'
