"""Random access to the records of one file: an index of positions in memory, the text read when it is asked for."""

import bisect
import itertools
import json
import mmap
import re
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sdar_jax.data.files import first_line, head_of
from sdar_jax.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@runtime_checkable
class RecordFile(Protocol):
    """One file of records, counted from 0; `path` is its name for people, what is read may be a copy of it."""

    path: Path

    def __len__(self) -> int: ...
    def read(self, k: int) -> Any:
        """Reads the record: text, or a dict of fields. Raises DataError, without saying where, if it is malformed."""
        ...

    def line(self, k: int) -> int:
        """Finds the record's line in the file, from 1; for parquet its row, from 1."""
        ...


def is_blank(line: bytes) -> bool:
    """Returns whether a line of a JSONL file is no record: white space, or the byte order mark of a file without a
    first."""
    return (line.removeprefix(BYTE_ORDER_MARK) or b"\n").isspace()


def parse_object(line: bytes) -> dict[str, Any]:
    """Parses the object on a line of a JSONL file. Raises DataError, without saying where."""
    text = decode(line).strip()
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"not valid JSON ({error.msg}, column {error.colno}); write one object per line"
        ) from error
    # Python reads no integer of more than 4,300 digits.
    except ValueError as error:
        raise DataError(
            f"a number that cannot be read ({first_line(error)}); write it as a string"
        ) from error
    except RecursionError as error:
        raise DataError("not valid JSON (nested too deeply); write one object per line") from error
    if not isinstance(record, dict):
        raise DataError(f"a JSON {type(record).__name__}, not an object; write one object per line")
    return record


class JsonlFile:
    """Reads a JSON object per line. The index holds 8 bytes per record; blank lines are no records but count as
    lines."""

    def __init__(self, path: Path, content: Path):
        self.path = path
        self._content = content
        starts = array("q")
        blanks = array("q")
        position = 0
        with content.open("rb") as file:
            for line in file:
                if is_blank(line):
                    blanks.append(len(starts))
                else:
                    starts.append(position)
                position += len(line)
        self._starts = np.frombuffer(starts, np.int64)
        self._records_before_blank = np.frombuffer(blanks, np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, k: int) -> dict[str, Any]:
        with self._content.open("rb") as file:
            file.seek(self._starts[k])
            return parse_object(file.readline())

    def line(self, k: int) -> int:
        return k + 1 + int(np.searchsorted(self._records_before_blank, k, side="right"))


class JsonFile:
    """Reads one JSON document: a list of objects, or an object that holds one such list ({"data": [...]})."""

    def __init__(self, path: Path, content: Path):
        self.path = path
        self._content = content
        text = decode(content.read_bytes())
        spans = _elements(text, _list_start(text))
        # Positions of characters, which are those of bytes only where all are ASCII.
        if not text.isascii():
            spans = _in_bytes(text, spans)
        mark = len(BYTE_ORDER_MARK) if head_of(content).startswith(BYTE_ORDER_MARK) else 0
        self._spans = np.array(spans, np.int64).reshape(-1, 2) + mark

    def __len__(self) -> int:
        return len(self._spans)

    def read(self, k: int) -> dict[str, Any]:
        start, stop = self._spans[k].tolist()
        with self._content.open("rb") as file:
            file.seek(start)
            return parse_object(file.read(stop - start))

    def line(self, k: int) -> int:
        with self._content.open("rb") as file:
            return file.read(int(self._spans[k, 0])).count(b"\n") + 1


def is_lines(content: Path) -> bool:
    """Returns whether a file that is called JSON has an object on each line."""
    with content.open("rb") as file:
        first = next((line for line in file if not is_blank(line)), b"{}")
    if not decode(first).lstrip().startswith("{"):
        return False
    try:
        parse_object(first)
    except DataError:
        return False
    return True


_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"\s*")


def _list_start(text: str) -> int:
    """Finds where the list of records begins. Raises DataError."""
    at = _skip(text, 0)
    if text.startswith("[", at):
        return at
    # Of an object, a list of objects that is not inside of another one.
    values = _parse(text, at)[0] if text.startswith("{", at) else None
    lists = [name for name, value in (values or {}).items() if _is_records(value)]
    if not isinstance(values, dict) or len(lists) != 1:
        raise DataError(
            "neither a list of records nor an object with one list of them; write [{...}, {...}], or an object a line"
        )
    at = _skip(text, at + 1)
    while True:
        name, at = _parse(text, at)
        at = _skip(text, _skip(text, at) + 1)
        if name == lists[0]:
            return at
        at = _skip(text, _skip(text, _parse(text, at)[1]) + 1)


def _is_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, dict) for x in value)


def _elements(text: str, at: int) -> list[tuple[int, int]]:
    """Finds the elements of the list that begins at a place. Raises DataError."""
    spans = []
    at = _skip(text, at + 1)
    while not text.startswith("]", at):
        _, end = _parse(text, at)
        spans.append((at, end))
        at = _skip(text, end)
        if text.startswith(",", at):
            at = _skip(text, at + 1)
        elif not text.startswith("]", at):
            line = text.count("\n", 0, at) + 1
            raise DataError(
                f"not valid JSON (no comma or end of the list, line {line}); correct it"
            )
    return spans


def _parse(text: str, at: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise DataError(
            f"not valid JSON ({error.msg}, line {error.lineno} column {error.colno}); correct it"
        ) from error
    except ValueError as error:
        raise DataError(
            f"a number that cannot be read ({first_line(error)}); write it as a string"
        ) from error
    except RecursionError as error:
        raise DataError("not valid JSON (nested too deeply); correct it") from error


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def _in_bytes(text: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    found = []
    at = position = 0
    for start, stop in spans:
        first = position + len(text[at:start].encode())
        position = first + len(text[start:stop].encode())
        found.append((first, position))
        at = stop
    return found


class TextFile:
    """Reads plain text: one document, or the stretches between separators that are not blank."""

    def __init__(self, path: Path, content: Path, separator: str | None):
        self.path = path
        self._content = content
        spans = (
            [(0, content.stat().st_size)]
            if separator is None
            else _split(content, separator.encode())
        )
        self._spans = np.array(spans, np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._spans)

    def read(self, k: int) -> str:
        start, stop = self._spans[k].tolist()
        with self._content.open("rb") as file:
            file.seek(start)
            return decode(file.read(stop - start))

    def line(self, k: int) -> int:
        with self._content.open("rb") as file:
            return file.read(int(self._spans[k, 0])).count(b"\n") + 1


class ParquetFile:
    """Reads columns of a parquet file, a row group at a time. Shuffled reading wants small row groups (1,000 rows).

    Args:
        columns: their names by the setting that gives them; None is all, as JSON would have them: a column gives all
            its objects the same keys, and those that are null are left out.
        cached_group: `read_group` of any file, cached.
    """

    def __init__(
        self,
        path: Path,
        content: Path,
        columns: dict[str, str] | None,
        cached_group: "Callable[[ParquetFile, int], pa.Table]",
    ):
        self.path = path
        self._content = content
        with pq.ParquetFile(content) as file:
            self._metadata = file.metadata
            names = file.schema_arrow.names
        for setting, column in (columns or {}).items():
            if column not in names:
                raise DataError(
                    f"no column {column!r} among {', '.join(names)}; set {setting} to one of them"
                )
        self._columns = names if columns is None else list(columns.values())
        self._drops_nulls = columns is None
        self._cached_group = cached_group
        groups = range(self._metadata.num_row_groups)
        self._ends = list(
            itertools.accumulate(self._metadata.row_group(group).num_rows for group in groups)
        )

    def __len__(self) -> int:
        return self._metadata.num_rows

    def read(self, k: int) -> dict[str, Any]:
        group = bisect.bisect_right(self._ends, k)
        table = self._cached_group(self, group)
        start = self._ends[group - 1] if group else 0
        row = k - start
        record = {name: table.column(name)[row].as_py() for name in self._columns}
        return _without_nulls(record) if self._drops_nulls else record

    def read_group(self, group: int) -> pa.Table:
        with pq.ParquetFile(self._content, metadata=self._metadata) as file:
            return file.read_row_group(group, columns=self._columns, use_threads=False)

    def line(self, k: int) -> int:
        return k + 1


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _split(path: Path, separator: bytes) -> list[tuple[int, int]]:
    size = path.stat().st_size
    if not size:
        return []
    spans = []
    start = 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while start <= size:
            stop = data.find(separator, start)
            stop = size if stop < 0 else stop
            if data[start:stop].strip():
                spans.append((start, stop))
            start = stop + len(separator)
    return spans


def decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"invalid UTF-8 at byte {error.start}; save the file as UTF-8") from error
