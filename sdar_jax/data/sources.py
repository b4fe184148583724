"""Random access to the records of files: an index of positions in memory, the text read when it is asked for."""

import bisect
import functools
import glob
import itertools
import json
import mmap
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sdar_jax.data.config import SourceConfig
from sdar_jax.errors import DataError

SUFFIXES = {
    "text": (".txt", ".md"),
    "jsonl": (".jsonl", ".ndjson"),
    "chat": (".jsonl", ".ndjson"),
    "parquet": (".parquet",),
}
ROW_GROUPS_KEPT = 8


@runtime_checkable
class RecordFile(Protocol):
    """One file of records, counted from 0."""

    path: Path

    def __len__(self) -> int: ...
    def read(self, k: int) -> Any:
        """The record: text, or a dict of fields. Raises DataError, without saying where, if it is malformed."""
        ...

    def line(self, k: int) -> int:
        """The record's line in the file, from 1; for parquet its row, from 1."""
        ...


class Source:
    """The records of all files of one SourceConfig, counted from 0 in the order of the sorted file names.

    `failures` are the files that could not be opened, one line each.
    """

    def __init__(self, config: SourceConfig):
        self.config = config
        self.failures: list[str] = []
        open_file, files = _opener(config), []
        for path in find_files(config):
            try:
                files.append(open_file(path))
            except (DataError, OSError, pa.ArrowException) as error:
                self.failures.append(f"{path}:1: {_reason(error)}")
        self._files: list[RecordFile] = files
        self._ends = list(itertools.accumulate(len(file) for file in files))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _locate(self, k: int) -> tuple[RecordFile, int]:
        number = bisect.bisect_right(self._ends, k)
        return self._files[number], k - (self._ends[number - 1] if number else 0)

    def read(self, k: int) -> Any:
        """Record k. Raises DataError, without saying where, if it cannot be read."""
        file, k = self._locate(k)
        try:
            return file.read(k)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"cannot be read ({_reason(error)}); restore the file") from error

    def where(self, k: int) -> str:
        """Record k's "file:line"."""
        file, k = self._locate(k)
        return f"{file.path}:{file.line(k)}"


def find_files(config: SourceConfig) -> list[Path]:
    """The files that a source's path names, sorted. Raises DataError if there is none."""
    path = Path(config.path).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        suffixes = SUFFIXES[config.format]
        found = [p for p in path.rglob("*") if p.suffix in suffixes and p.is_file()]
        missing = f"no {' or '.join(suffixes)} file in this directory; give a glob for other names"
    else:
        found = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
        missing = "no such file or directory, and no glob that matches one"
    if not found:
        raise DataError(f"{config.path}: {missing}")
    return sorted(found)


def _opener(config: SourceConfig) -> Callable[[Path], RecordFile]:
    if config.format == "text":
        return functools.partial(TextFile, separator=config.separator)
    if config.format == "parquet":
        columns = [name for name in (config.prompt_field, config.field) if name is not None]
        # One small cache a source, not one a file: a shuffled read jumps between files.
        read_group = functools.lru_cache(maxsize=ROW_GROUPS_KEPT)(ParquetFile.read_group)
        return functools.partial(ParquetFile, columns=columns, cached_group=read_group)
    return JsonlFile


class JsonlFile:
    """A JSON object a line. The index holds 8 bytes a record; blank lines are no records but count as lines."""

    def __init__(self, path: Path):
        self.path = path
        starts, blanks, position = array("q"), array("q"), 0
        with path.open("rb") as file:
            for line in file:
                if line.isspace():
                    blanks.append(len(starts))
                else:
                    starts.append(position)
                position += len(line)
        self._starts = np.frombuffer(starts, np.int64)
        self._records_before_blank = np.frombuffer(blanks, np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, k: int) -> dict[str, Any]:
        with self.path.open("rb") as file:
            file.seek(self._starts[k])
            line = _decode(file.readline()).strip()
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"not valid JSON ({error.msg}, column {error.colno}); write one object a line") from error
        except RecursionError as error:
            raise DataError("not valid JSON (nested too deeply); write one object a line") from error
        if not isinstance(record, dict):
            raise DataError(f"a JSON {type(record).__name__}, not an object; write one object a line")
        return record

    def line(self, k: int) -> int:
        return k + 1 + int(np.searchsorted(self._records_before_blank, k, side="right"))


class TextFile:
    """Plain text: one document, or the stretches between separators that are not blank."""

    def __init__(self, path: Path, separator: str | None):
        self.path = path
        spans = [(0, path.stat().st_size)] if separator is None else _split(path, separator.encode())
        self._spans = np.array(spans, np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._spans)

    def read(self, k: int) -> str:
        start, stop = self._spans[k].tolist()
        with self.path.open("rb") as file:
            file.seek(start)
            return _decode(file.read(stop - start))

    def line(self, k: int) -> int:
        with self.path.open("rb") as file:
            return file.read(int(self._spans[k, 0])).count(b"\n") + 1


class ParquetFile:
    """Columns of a parquet file, read a row group at a time. Shuffled reading wants small row groups (1,000 rows)."""

    def __init__(self, path: Path, columns: list[str], cached_group: "Callable[[ParquetFile, int], pa.Table]"):
        self.path = path
        with pq.ParquetFile(path) as file:
            self._metadata = file.metadata
            names = file.schema_arrow.names
        for column in columns:
            if column not in names:
                raise DataError(f"no column {column!r} among {', '.join(names)}; set field to one of them")
        self._columns, self._cached_group = columns, cached_group
        groups = range(self._metadata.num_row_groups)
        self._ends = list(itertools.accumulate(self._metadata.row_group(group).num_rows for group in groups))

    def __len__(self) -> int:
        return self._metadata.num_rows

    def read(self, k: int) -> dict[str, Any]:
        group = bisect.bisect_right(self._ends, k)
        table = self._cached_group(self, group)
        row = k - (self._ends[group - 1] if group else 0)
        return {name: table.column(name)[row].as_py() for name in self._columns}

    def read_group(self, group: int) -> pa.Table:
        with pq.ParquetFile(self.path, metadata=self._metadata) as file:
            return file.read_row_group(group, columns=self._columns, use_threads=False)

    def line(self, k: int) -> int:
        return k + 1


def _split(path: Path, separator: bytes) -> list[tuple[int, int]]:
    size = path.stat().st_size
    if not size:
        return []
    spans, start = [], 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while start <= size:
            stop = data.find(separator, start)
            stop = size if stop < 0 else stop
            if data[start:stop].strip():
                spans.append((start, stop))
            start = stop + len(separator)
    return spans


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"invalid UTF-8 at byte {error.start}; save the file as UTF-8") from error


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
