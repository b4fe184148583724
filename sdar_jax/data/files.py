"""Which files a source names: on this machine or in a data set of the Hugging Face hub, compressed or not."""

import bz2
import contextlib
import errno
import glob
import gzip
import itertools
import logging
import lzma
import os
import re
import shlex
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from sdar_jax.data.config import SourceConfig
from sdar_jax.errors import DataError

log = logging.getLogger(__name__)

# What is looked for in a directory, where it holds none of the first the next.
SUFFIXES = {
    "text": [(".txt", ".md")],
    "jsonl": [(".jsonl", ".ndjson"), (".json",)],
    "chat": [(".jsonl", ".ndjson"), (".parquet",), (".json",)],
    "parquet": [(".parquet",)],
    "trajectory": [(".jsonl", ".ndjson"), (".json",)],
}
# How a compressed file begins, its name, what reads it, and the command that writes what is in it to standard output.
COMPRESSED: dict[bytes, tuple[str, Callable[[Path], Any] | None, str]] = {
    rb"\x1f\x8b\x08": ("gzip", gzip.open, "gzip -dc"),
    rb"\x28\xb5\x2f\xfd": (
        "zstandard",
        lambda path: pa.CompressedInputStream(str(path), "zstd"),
        "zstd -dc",
    ),
    rb"BZh[1-9]1AY&SY": ("bzip2", bz2.open, "bzip2 -dc"),
    rb"\xfd7zXZ\x00": ("xz", lzma.open, "xz -dc"),
    rb"PK\x03\x04": ("zip", None, "unzip -p"),
}
COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz", ".zip")
PARQUET = b"PAR1"
HUB = "hf://"


def find_files(config: SourceConfig) -> list[Path]:
    """Lists the files that a source's path names, sorted. A file that several names lead to is taken once, by the
    first.

    Linked directories are followed. What is hidden (its name begins with a dot) is left out, as a shell does, unless
    the path itself names it. Raises DataError if there is no file.
    """
    path = _of_hub(config) if config.path.startswith(HUB) else Path(config.path).expanduser()
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
        named = [path for path in files if _bare(path).suffix in suffixes and path.suffix != ".zip"]
        # Beside what it was made of, a compressed file would be read twice.
        found = [path for path in named if path == _bare(path) or _bare(path) not in named]
        if found:
            unread = [path for path in files if path not in found and _could_be_meant(path, format)]
            if unread:
                count = f"{directory}: {len(unread)} of its files not read, the first {unread[0]}"
                log.warning("%s; give them a source of their own, or move them away", count)
            return found
    _check_meant(files, format)
    wanted = " or ".join(itertools.chain(*SUFFIXES[format]))
    others = f", but {', '.join(path.name for path in files[:3])}; give a glob for other names"
    raise DataError(
        f"{directory}: no {wanted} file in this directory{others if files else '; give another'}"
    )


def _check_meant(files: list[Path], format: str) -> None:
    """Raises DataError for the first that is data, but of a kind that is not read here: parquet, or a zip archive."""
    for path in files:
        if path.suffix in (".parquet", ".zip"):
            with contextlib.suppress(OSError):
                check_content(path, head_of(path), format)


def _could_be_meant(path: Path, format: str) -> bool:
    """Returns whether the name is of data of this format, compressed or not."""
    return any(_bare(path).suffix in suffixes for suffixes in SUFFIXES[format])


def _bare(path: Path) -> Path:
    """The path as it is without compression."""
    return path.with_suffix("") if path.suffix in COMPRESSED_SUFFIXES else path


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


def _of_hub(config: SourceConfig) -> Path:
    """Brings `hf://OWNER/NAME[@REVISION][/GLOB]` to this machine; the directory there, or the glob in it.

    Raises:
        DataError: no such data set, or it cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    owner, name, *below = config.path.removeprefix(HUB).removeprefix("datasets/").split("/") + [""]
    name, _, revision = name.partition("@")
    pattern = "/".join(below).strip("/")
    if not owner or not name:
        raise DataError(
            f"{config.path}: give {HUB}OWNER/NAME, or {HUB}OWNER/NAME/GLOB for some files"
        )
    suffixes = itertools.chain(*SUFFIXES[config.format])
    packed = ("", *COMPRESSED_SUFFIXES)
    wanted = [pattern] if pattern else [f"*{a}{b}" for a, b in itertools.product(suffixes, packed)]
    try:
        directory = snapshot_download(
            f"{owner}/{name}", repo_type="dataset", revision=revision or None, allow_patterns=wanted
        )
    except LocalEntryNotFoundError:
        raise DataError(
            f"{config.path}: not on this machine, and the hub cannot be reached; connect, or give a path of files"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise DataError(
            f"{config.path}: {first_line(error)}; correct the name, or log in"
        ) from None
    return Path(directory, pattern)


def check_content(path: Path, head: bytes, format: str) -> None:
    """Raises DataError, without saying where, for a file of plainly another kind than `format`; head: its beginning."""
    if format in ("text", "jsonl", "trajectory") and head.startswith(PARQUET):
        raise DataError(
            "a parquet file; a source of format parquet reads it, or of format chat if it is conversations"
        )
    if found := _compression(head):
        name, _, command = found
        plain = path.with_suffix("")
        if path.suffix not in COMPRESSED_SUFFIXES:
            plain = path.with_name(f"plain-{path.name}")
        run = f"{command} {shlex.quote(str(path))} > {shlex.quote(str(plain))}"
        raise DataError(
            f"compressed with {name}, which is not read here; decompress it first: {run}"
        )


def decompressed(path: Path, scratch: Callable[[], Path]) -> Path:
    """The file itself, or where it is compressed a plain one in `scratch()`, since records are read in any order.

    Raises DataError, without saying where, for a damaged file, or where there is no room.
    """
    name, opened, _ = _compression(head_of(path)) or ("", None, "")
    if opened is None:
        return path
    directory = scratch()
    plain = directory / f"{len(list(directory.iterdir()))}-{path.name}"
    try:
        with opened(path) as packed, plain.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"compressed, and {directory} has no room for what is in it; set TMPDIR to a folder with more"
            ) from None
        raise DataError(_DAMAGED.format(name, first_line(error))) from None
    except (EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        raise DataError(_DAMAGED.format(name, first_line(error))) from None
    return plain


_DAMAGED = "compressed with {}, and damaged ({}); fetch it anew"


def _compression(head: bytes) -> tuple[str, Callable[[Path], Any] | None, str] | None:
    return next((how for magic, how in COMPRESSED.items() if re.match(magic, head)), None)


def head_of(path: Path) -> bytes:
    """The first bytes of a file, which tell its kind."""
    with path.open("rb") as file:
        return file.read(16)


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
