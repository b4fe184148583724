"""The records of all files of a source, read in any order."""

import bisect
import functools
import itertools
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from sdar_jax.data.config import SourceConfig
from sdar_jax.data.files import (
    COMPRESSED_SUFFIXES,
    HUB,
    PARQUET,
    check_content,
    decompressed,
    find_files,
    first_line,
    head_of,
)
from sdar_jax.data.record_files import (
    JsonFile,
    JsonlFile,
    ParquetFile,
    RecordFile,
    TextFile,
    is_lines,
)
from sdar_jax.errors import DataError

ROW_GROUPS_KEPT = 8
_KNOWN_SUFFIXES = (".txt", ".md", ".jsonl", ".ndjson", ".json", ".parquet")


class Source:
    """The records of all files of one SourceConfig, counted from 0 in the order of the sorted file names.

    `failures` are the files that could not be opened, one line each.
    """

    def __init__(self, config: SourceConfig):
        self.config = config
        self.failures: list[str] = []
        open_file = _opener(config, lambda: self._scratch)
        files = []
        for path in find_files(config):
            try:
                files.append(open_file(path))
            except (DataError, OSError, pa.ArrowException) as error:
                self.failures.append(f"{path}:1: {first_line(error)}")
        self._files: list[RecordFile] = files
        self._ends = list(itertools.accumulate(len(file) for file in files))

    @functools.cached_property
    def _scratch(self) -> Path:
        """For what was compressed; removed with the source."""
        directory = tempfile.mkdtemp(prefix="sdar-jax-")
        weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        return Path(directory)

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
            raise DataError(f"cannot be read ({first_line(error)}); restore the file") from error

    def where(self, k: int) -> str:
        """Returns record k's "file:line"."""
        file, k = self._locate(k)
        return f"{file.path}:{file.line(k)}"


def source_names(paths: Sequence[str]) -> list[str]:
    """Makes short names of sources: the ends of their paths, without suffixes, as long as it takes to differ.

    Wildcards that are all of a component are left out: "data/web/*.parquet" is web. One path given twice is numbered.
    """
    places = [_components(path) for path in paths]

    def name(i: int) -> str:
        others = [place for place in places if place != places[i]]
        for size in range(1, len(places[i])):
            if all(place[-size:] != places[i][-size:] for place in others):
                return "/".join(places[i][-size:])
        return "/".join(places[i])

    names = [name(i) for i in range(len(paths))]
    return [
        f"{each}.{names[: i + 1].count(each)}" if names.count(each) > 1 else each
        for i, each in enumerate(names)
    ]


def _components(path: str) -> list[str]:
    *folders, last = path.removeprefix(HUB).rstrip("/").split("/")
    for suffix in (*COMPRESSED_SUFFIXES, *_KNOWN_SUFFIXES):
        last = last.removesuffix(suffix)
    return [part for part in (*folders, last) if part.strip("*?")] or [path]


def _opener(config: SourceConfig, scratch: Callable[[], Path]) -> Callable[[Path], RecordFile]:
    # One small cache per source, not per file: a shuffled read jumps between files.
    read_group = functools.lru_cache(maxsize=ROW_GROUPS_KEPT)(ParquetFile.read_group)
    fields = {"field": config.field, "prompt_field": config.prompt_field}
    columns = {setting: name for setting, name in fields.items() if name is not None}

    def open_file(path: Path) -> RecordFile:
        content = decompressed(path, scratch)
        head = head_of(content)
        check_content(content, head, config.format)
        if config.format == "text":
            return TextFile(path, content, config.separator)
        if config.format == "parquet":
            return ParquetFile(path, content, columns, read_group)
        if config.format == "chat" and head.startswith(PARQUET):
            return ParquetFile(path, content, None, read_group)
        if ".json" in path.suffixes and not is_lines(content):
            return JsonFile(path, content)
        return JsonlFile(path, content)

    return open_file
