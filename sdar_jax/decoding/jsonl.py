"""Prompts and completions in JSONL files, line by line; an output file that was cut short is continued."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdar_jax.data.files import check_content
from sdar_jax.data.record_files import is_blank, parse_object
from sdar_jax.data.tokenizer import check_unicode
from sdar_jax.decoding.config import Completion
from sdar_jax.errors import DataError


def as_record(completion: Completion) -> dict[str, Any]:
    """A completion as a JSON object; `text` only where there was a tokenizer."""
    record = {**completion._asdict(), "tokens_per_forward": round(completion.tokens_per_forward, 4)}
    return {key: value for key, value in record.items() if key != "text" or value is not None}


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, read as training reads them. Raises DataError with file and line."""
    return (record for _, record in numbered_records(path))


def numbered_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each object of a JSONL file with its line, from 1. Raises DataError as `read_records`."""
    try:
        content = path.read_bytes()
        check_content(path, content[:16], "jsonl")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); give a JSONL file") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    for number, line in enumerate(content.split(b"\n"), 1):
        if is_blank(line):
            continue
        try:
            record = parse_object(line)
            # A lone surrogate can be read but not written again.
            check_unicode(json.dumps(record, ensure_ascii=False))
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from None
        yield number, record


def answered(path: Path, records: list[dict[str, Any]]) -> int:
    """How many records an output file answers already; a last line that an interruption cut short is removed.

    Raises DataError, and leaves the file as it is, if it is not the output of these records.
    """
    try:
        with path.open("ab+") as file:
            file.seek(0)
            *lines, cut = file.read().split(b"\n")
            other = next(
                (i for i, line in enumerate(lines) if not _answers(line, records[i : i + 1])), None
            )
            if other is not None or cut[:1] not in (b"", b"{"):
                place = f"{path}:{1 + (len(lines) if other is None else other)}"
                raise DataError(
                    f"{place}: not an answer to that line of the input; choose another --output"
                )
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
    always = ours - {"text", *Completion._field_defaults}
    return always <= set(answer) and kept.items() <= answer.items()
