"""Model directories as files: which are carried along with a model, and how one directory replaces another."""

import contextlib
import fcntl
import glob
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from sdar_jax.errors import CheckpointError
from sdar_jax.hf.tensor_files import is_weights_file, listed

GENERATION_FILE = "generation_config.json"
# Patterns of what is carried along: all that a tokenizer, its chat templates or a preprocessor may be read from.
CARRIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model*",
    "*.tiktoken",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "*processor_config.json",
    GENERATION_FILE,
)
# Of each weights file so many samples of so many bytes enter the fingerprint.
_SAMPLES, _SAMPLE_BYTES = 64, 4096


def carried_files(directory: Path) -> list[str]:
    """Lists the names of files to carry along, relative to a directory that holds a model or a tokenizer."""
    found = {
        file for pattern in CARRIED_FILES for file in directory.glob(pattern) if file.is_file()
    }
    return sorted(file.relative_to(directory).as_posix() for file in found)


def check_replaceable(path: Path) -> None:
    """Raises CheckpointError unless `path` is free, or a directory that holds nothing but what a save writes."""
    if not path.exists():
        return
    if not path.is_dir():
        raise CheckpointError(f"{path}: is a file; choose a directory")
    ours = {"config.json", *carried_files(path)}
    templates = path / "additional_chat_templates"
    files = list(path.iterdir())
    if templates.is_dir():
        files += templates.iterdir()
    names = [file.relative_to(path).as_posix() for file in files if file != templates]
    foreign = sorted(name for name in names if name not in ours and not is_weights_file(name))
    if foreign:
        raise CheckpointError(
            f"{path}: holds {listed(foreign)}, which a save would delete; choose a new directory"
        )


def fingerprint(directory: Path) -> str:
    """Hashes a model and its tokenizer, wherever they lie. Of weights it reads their size and samples."""
    digest = hashlib.sha256()
    for name in ("config.json", *carried_files(directory)):
        if (directory / name).is_file():
            digest.update(name.encode() + (directory / name).read_bytes())
    for file in sorted(directory.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as data:
            for part in range(_SAMPLES):
                data.seek(part * size // _SAMPLES)
                digest.update(data.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Makes a new directory next to `path`, which replaces it when the block ends without an error."""
    _remove_leftovers(path)
    staging = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    new = staging / "new"
    try:
        new.mkdir(parents=True)
        with _locked(staging):
            yield new
            _replace(path, new, staging / "old")
    finally:
        _discard(staging, path)
    _remove_leftovers(path)


def _replace(path: Path, new: Path, old: Path) -> None:
    """Moves what is at `path` to `old`, and `new` to `path`; or back, where that fails."""
    if not path.exists():
        new.rename(path)
        return
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise


def _remove_leftovers(path: Path) -> None:
    """Removes staging directories of saves to `path` that were killed. Those of living processes are locked."""
    for staging in path.parent.glob(f".{glob.escape(path.name)}.*"):
        suffix = staging.name.removeprefix(f".{path.name}.")
        if not re.fullmatch(r"[0-9a-f]{8}", suffix) or not staging.is_dir():
            continue
        with contextlib.suppress(OSError), _locked(staging) as locked:
            if locked:
                _discard(staging, path)


def _discard(staging: Path, path: Path) -> None:
    """Removes a staging directory, unless the old model in it is the only one, as its replacement never came."""
    if path.exists() or not (staging / "old").exists():
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Holds a directory until the block or this process ends; False if another does, or if that cannot be known."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except OSError:
            # Some network storage has no locks.
            locked = False
        yield locked
    finally:
        os.close(handle)
