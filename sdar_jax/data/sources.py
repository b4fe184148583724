"""Random access to the records of files: an index of positions in memory, the text read when it is asked for."""

import bisect
import contextlib
import functools
import glob
import itertools
import json
import logging
import mmap
import os
import re
import shlex
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sdar_jax.data.config import SourceConfig
from sdar_jax.errors import DataError

log = logging.getLogger(__name__)

# What is looked for in a directory, where it holds none of the first the second.
SUFFIXES = {
    "text": [(".txt", ".md")],
    "jsonl": [(".jsonl", ".ndjson")],
    "chat": [(".jsonl", ".ndjson"), (".parquet",)],
    "parquet": [(".parquet",)],
}
# How a compressed file begins, and the command that writes what is in it to standard output.
COMPRESSED = {
    rb"\x1f\x8b\x08": ("gzip", "gzip -dc"),
    rb"\x28\xb5\x2f\xfd": ("zstandard", "zstd -dc"),
    rb"BZh[1-9]1AY&SY": ("bzip2", "bzip2 -dc"),
    rb"\xfd7zXZ\x00": ("xz", "xz -dc"),
    rb"PK\x03\x04": ("zip", "unzip -p"),
}
COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz", ".zip")
PARQUET = b"PAR1"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
ROW_GROUPS_KEPT = 8


@runtime_checkable
class RecordFile(Protocol):
    """One file of records, counted from 0."""

    path: Path

    def __len__(self) -> int: ...
    def read(self, k: int) -> Any:
        """Reads the record: text, or a dict of fields. Raises DataError, without saying where, if it is malformed."""
        ...

    def line(self, k: int) -> int:
        """Finds the record's line in the file, from 1; for parquet its row, from 1."""
        ...


class Source:
    """The records of all files of one SourceConfig, counted from 0 in the order of the sorted file names.

    `failures` are the files that could not be opened, one line each.
    """

    def __init__(self, config: SourceConfig):
        self.config = config
        self.failures: list[str] = []
        open_file = _opener(config)
        files = []
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
        if k >= len(self):
            raise DataError(
                f"record {k} of {len(self)}; {', '.join(self.failures) or 'give a smaller number'}"
            )
        number = bisect.bisect_right(self._ends, k)
        start = self._ends[number - 1] if number else 0
        return self._files[number], k - start

    def read(self, k: int) -> Any:
        """Reads record k. Raises DataError, without saying where, if it cannot be read."""
        file, k = self._locate(k)
        try:
            return file.read(k)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"cannot be read ({_reason(error)}); restore the file") from error

    def where(self, k: int) -> str:
        """Returns record k's "file:line"."""
        file, k = self._locate(k)
        return f"{file.path}:{file.line(k)}"


def find_files(config: SourceConfig) -> list[Path]:
    """Lists the files that a source's path names, sorted. A file that several names lead to is taken once, by the
    first.

    Linked directories are followed. What is hidden (its name begins with a dot) is left out, as a shell does, unless
    the path itself names it. Raises DataError if there is no file.
    """
    path = Path(config.path).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _without_copies(_of_directory(path, config.format))
    if path.exists():
        raise DataError(
            f"{path}: a pipe or device, and records are read in any order; write its content to a file"
        )
    found = _files(path)
    if not found:
        raise DataError(
            f"{path}: no such file or directory, and no glob that matches one; correct the path"
        )
    return _without_copies(found)


def _of_directory(directory: Path, format: str) -> list[Path]:
    files = _files(Path(glob.escape(str(directory)), "**"))
    for suffixes in SUFFIXES[format]:
        if found := [path for path in files if path.suffix in suffixes]:
            unread = [
                path
                for path in files
                if path.suffix not in suffixes and _could_be_meant(path, format)
            ]
            if unread:
                count = f"{directory}: {len(unread)} of its files not read, the first {unread[0]}"
                log.warning("%s; decompress them, or give them a source of their own", count)
            return found
    _check_meant(files, format)
    wanted = " or ".join(itertools.chain(*SUFFIXES[format]))
    others = f", but {', '.join(path.name for path in files[:3])}; give a glob for other names"
    raise DataError(
        f"{directory}: no {wanted} file in this directory{others if files else '; give another'}"
    )


def _check_meant(files: list[Path], format: str) -> None:
    """Raises DataError for the first that only its compression, or being parquet, keeps from being read."""
    other_kinds = (*COMPRESSED_SUFFIXES, ".parquet")
    all_of_other_kinds = all(path.suffix in other_kinds for path in files)
    for path in files:
        if all_of_other_kinds or _could_be_meant(path, format):
            with contextlib.suppress(OSError):
                check_content(path, _head(path), format)


def _could_be_meant(path: Path, format: str) -> bool:
    """Returns whether the name is of data of this format, compressed or not."""
    bare = Path(path.stem) if path.suffix in COMPRESSED_SUFFIXES else path
    return any(bare.suffix in suffixes for suffixes in SUFFIXES[format])


def _files(pattern: Path) -> list[Path]:
    """Lists the files that a glob matches, sorted; a broken link is one, which then cannot be opened."""
    return sorted({path for path in _matches(pattern) if path.is_file() or not path.exists()})


def _matches(pattern: Path) -> Iterator[Path]:
    """Yields what a glob matches. Unlike the library's, its `**` follows links in a circle once."""
    if "**" not in pattern.parts:
        yield from map(Path, glob.iglob(str(pattern)))
        return
    at = pattern.parts.index("**")
    rest = pattern.parts[at + 1 :] or ("*",)
    for start in _matches(Path(*pattern.parts[:at])):
        for directory in _directories(start, set()):
            yield from _matches(Path(glob.escape(str(directory)), *rest))


def _directories(directory: Path, seen: set[str]) -> Iterator[Path]:
    """Yields the directory and those below it that are not hidden, none of them twice."""
    real = os.path.realpath(directory)
    if real in seen or not directory.is_dir():
        return
    seen.add(real)
    yield directory
    try:
        below = sorted(path for path in directory.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(
            f"{directory}: cannot be read ({error.strerror}); change its mode, or move it away"
        ) from None
    for path in below:
        yield from _directories(path, seen)


def _without_copies(files: list[Path]) -> list[Path]:
    first: dict[str, Path] = {}
    for path in files:
        first.setdefault(os.path.realpath(path), path)
    kept = set(first.values())
    copies = [path for path in files if path not in kept]
    if copies:
        log.warning(
            "%d files are links to others that are read, the first %s; each is read once",
            len(copies),
            copies[0],
        )
    return list(first.values())


def _opener(config: SourceConfig) -> Callable[[Path], RecordFile]:
    # One small cache per source, not per file: a shuffled read jumps between files.
    read_group = functools.lru_cache(maxsize=ROW_GROUPS_KEPT)(ParquetFile.read_group)
    fields = {"field": config.field, "prompt_field": config.prompt_field}
    columns = {setting: name for setting, name in fields.items() if name is not None}

    def open_file(path: Path) -> RecordFile:
        head = _head(path)
        check_content(path, head, config.format)
        if config.format == "text":
            return TextFile(path, config.separator)
        if config.format == "parquet":
            return ParquetFile(path, columns, read_group)
        if config.format == "chat" and head.startswith(PARQUET):
            return ParquetFile(path, None, read_group)
        return JsonlFile(path)

    return open_file


def check_content(path: Path, head: bytes, format: str) -> None:
    """Raises DataError, without saying where, for a file of plainly another kind than `format`; head: its beginning."""
    if format in ("text", "jsonl") and head.startswith(PARQUET):
        raise DataError(
            "a parquet file; a source of format parquet reads it, or of format chat if it is conversations"
        )
    for magic, (name, command) in COMPRESSED.items():
        if re.match(magic, head):
            plain = path.with_name(f"plain-{path.name}")
            if path.suffix in COMPRESSED_SUFFIXES:
                plain = path.with_suffix("")
            run = f"{command} {shlex.quote(str(path))} > {shlex.quote(str(plain))}"
            raise DataError(
                f"compressed with {name}, and records are read in any order; decompress it first: {run}"
            )


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(16)


def is_blank(line: bytes) -> bool:
    """Returns whether a line of a JSONL file is no record: white space, or the byte order mark of a file without a
    first."""
    return (line.removeprefix(BYTE_ORDER_MARK) or b"\n").isspace()


def parse_object(line: bytes) -> dict[str, Any]:
    """Parses the object on a line of a JSONL file. Raises DataError, without saying where."""
    text = _decode(line).strip()
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"not valid JSON ({error.msg}, column {error.colno}); write one object per line"
        ) from error
    # Python reads no integer of more than 4,300 digits.
    except ValueError as error:
        raise DataError(
            f"a number that cannot be read ({_reason(error)}); write it as a string"
        ) from error
    except RecursionError as error:
        raise DataError("not valid JSON (nested too deeply); write one object per line") from error
    if not isinstance(record, dict):
        raise DataError(f"a JSON {type(record).__name__}, not an object; write one object per line")
    return record


class JsonlFile:
    """Reads a JSON object per line. The index holds 8 bytes per record; blank lines are no records but count as
    lines."""

    def __init__(self, path: Path):
        self.path = path
        starts = array("q")
        blanks = array("q")
        position = 0
        with path.open("rb") as file:
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
        with self.path.open("rb") as file:
            file.seek(self._starts[k])
            return parse_object(file.readline())

    def line(self, k: int) -> int:
        return k + 1 + int(np.searchsorted(self._records_before_blank, k, side="right"))


class TextFile:
    """Reads plain text: one document, or the stretches between separators that are not blank."""

    def __init__(self, path: Path, separator: str | None):
        self.path = path
        spans = (
            [(0, path.stat().st_size)] if separator is None else _split(path, separator.encode())
        )
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
    """Reads columns of a parquet file, a row group at a time. Shuffled reading wants small row groups (1,000 rows).

    Args:
        columns: their names by the setting that gives them; None is all, as JSON would have them: a column gives all
            its objects the same keys, and those that are null are left out.
        cached_group: `read_group` of any file, cached.
    """

    def __init__(
        self,
        path: Path,
        columns: dict[str, str] | None,
        cached_group: "Callable[[ParquetFile, int], pa.Table]",
    ):
        self.path = path
        with pq.ParquetFile(path) as file:
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
        with pq.ParquetFile(self.path, metadata=self._metadata) as file:
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


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"invalid UTF-8 at byte {error.start}; save the file as UTF-8") from error


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
