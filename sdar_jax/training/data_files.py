"""Fingerprints of a run's files: a run that resumes says where it reads others than it began with."""

import contextlib
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdar_jax.data import SourceConfig
from sdar_jax.data.files import find_files

log = logging.getLogger(__name__)

# Of each larger file so many samples of so many bytes enter the digest.
_SAMPLES, _SAMPLE_BYTES = 8, 8192
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)

Fingerprint = dict[str, dict[str, Any]]


def fingerprint(sources: Sequence[SourceConfig], tokenizer: Path) -> Fingerprint:
    """Counts files and bytes of each source and of the tokenizer, and digests names, sizes and samples.

    A file of up to 64 KiB is read completely, of a larger one eight pieces: terabytes of data cost no more than their
    names.

    Raises:
        DataError: a source without files.
    """
    found = {
        f"data.sources.{i}.path {source.path}": find_files(source)
        for i, source in enumerate(sources)
    }
    found["the tokenizer"] = [
        file for name in _TOKENIZER_FILES if (file := tokenizer / name).is_file()
    ]
    return {name: _of_files(files) for name, files in found.items()}


def report_changes(before: Fingerprint, now: Fingerprint) -> None:
    """Logs a warning for each source whose files are not what they were."""
    for name, found in now.items():
        was = before.get(name, found)
        if was != found:
            log.warning(
                "%s is not what it was when the checkpoint was saved (%s, now %s); the run goes on, and reads what is "
                "there now at the place where it was",
                name,
                *(f"{each['files']} files of {each['bytes']} bytes" for each in (was, found)),
            )


def _of_files(files: Sequence[Path]) -> dict[str, Any]:
    digest = hashlib.sha256()
    total = 0
    for path in files:
        digest.update(path.name.encode("utf-8", "surrogateescape") + b"\0")
        # What cannot be read is for the data pipeline to report, or to leave out.
        with contextlib.suppress(OSError):
            size = path.stat().st_size
            total += size
            for piece in (str(size).encode(), *_samples(path, size)):
                digest.update(piece)
    return {"files": len(files), "bytes": total, "digest": digest.hexdigest()}


def _samples(path: Path, size: int) -> list[bytes]:
    with path.open("rb") as file:
        if size <= _SAMPLES * _SAMPLE_BYTES:
            return [file.read()]
        pieces = []
        for i in range(_SAMPLES):
            file.seek((size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
            pieces.append(file.read(_SAMPLE_BYTES))
        return pieces
