"""Prompts and completions in JSONL files, line by line; an output file that was cut short is gone on with."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdar_jax.decoding.config import Completion
from sdar_jax.errors import DataError


def as_record(completion: Completion) -> dict[str, Any]:
    """A completion as a JSON object; `text` only where there was a tokenizer."""
    record = {**completion._asdict(), "tokens_per_forward": round(completion.tokens_per_forward, 4)}
    return {key: value for key, value in record.items() if key != "text" or value is not None}


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file. Raises DataError with file and line."""
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); give a JSONL file") from None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            # A lone surrogate can be read but not written again.
            json.dumps(record, ensure_ascii=False).encode()
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON ({error}); give one object a line") from None
        if not isinstance(record, dict):
            raise DataError(f'{path}:{number}: not an object; write it as {{"prompt": ...}}')
        yield record


def answered(path: Path, records: list[dict[str, Any]]) -> int:
    """How many records an output file answers already; a last line that an interruption cut short is removed.

    Raises DataError, and leaves the file as it is, if it is not the output of these records.
    """
    try:
        with path.open("ab+") as file:
            file.seek(0)
            *lines, cut = file.read().split(b"\n")
            other = next((i for i, line in enumerate(lines) if not _answers(line, records[i : i + 1])), None)
            if other is not None or cut[:1] not in (b"", b"{"):
                place = f"{path}:{1 + (len(lines) if other is None else other)}"
                raise DataError(f"{place}: not an answer to that line of the input; choose another --output")
            file.truncate(sum(len(line) + 1 for line in lines))
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error}); choose another --output") from None
    return len(lines)


def _answers(line: bytes, asked: list[dict[str, Any]]) -> bool:
    """Whether an output line holds all of the record that it should, and a completion."""
    try:
        answer = json.loads(line)
    except ValueError:
        return False
    ours = {*Completion._fields, "tokens_per_forward"}
    kept = {key: value for record in asked for key, value in record.items() if key not in ours}
    if not asked or not isinstance(answer, dict):
        return False
    return ours - {"text"} <= set(answer) and kept.items() <= answer.items()
