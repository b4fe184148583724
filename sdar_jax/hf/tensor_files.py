"""Safetensors files, a tensor at a time: read lazily from a directory's file or shards, written without a copy of all.

Format: https://huggingface.co/docs/safetensors: the length of a JSON header in 8 bytes, the header, the tensors' bytes.
"""

import contextlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from sdar_jax.errors import CheckpointError

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
log = logging.getLogger(__name__)
# Other places where weights may lie: what is not read of these is named.
_OTHER_WEIGHTS = (
    "*.safetensors",
    "pytorch_model*.bin",
    "adapter_model.bin",
    "consolidated*.pth",
    "original/*.pth",
    "original/*.safetensors",
    "*.gguf",
    "tf_model*.h5",
    "flax_model*.msgpack",
)
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
SUPPORTED_DTYPES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}


class TensorReader:
    """The tensors of a directory by name: of one file, or of the shards that an index names. A context manager.

    The one file comes first, as in transformers. A warning names other weights, which are not read.

    Raises:
        CheckpointError: on entry, where a file is missing, cut short, or not what the index says.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._stack = contextlib.ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> "TensorReader":
        with self._stack:
            self._files = self._locate()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def names(self) -> Set[str]:
        return self._files.keys()

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """Returns the shape, and the format's name for the dtype; reads no data."""
        header = self._files[name].get_slice(name)
        return tuple(header.get_shape()), header.get_dtype()

    def read(self, name: str, rows: int | slice | None = None) -> np.ndarray:
        """Reads the tensor, or a row or some rows of its first axis alone."""
        file = self._files[name]
        if rows is None:
            return file.get_tensor(name)
        return file.get_slice(name)[rows]

    def _locate(self) -> dict[str, Any]:
        single = self.directory / WEIGHTS_FILE
        index = self.directory / INDEX_FILE
        if single.exists():
            self._name_ignored({WEIGHTS_FILE}, WEIGHTS_FILE)
            file = self._open(single)
            return dict.fromkeys(file.keys(), file)
        if not index.exists():
            others = self._others(set())
            only = f", only {listed(others)}" if others else ""
            raise CheckpointError(
                f"{self.directory}: holds neither {WEIGHTS_FILE} nor {INDEX_FILE}{only}; give a directory with "
                "safetensors weights"
            )
        shard_of = _read_index(index)
        shards = {
            shard: self._open(self.directory / shard) for shard in sorted(set(shard_of.values()))
        }
        self._name_ignored(set(shards), f"the shards of {INDEX_FILE}")
        held = {shard: set(file.keys()) for shard, file in shards.items()}
        absent = [name for name, shard in shard_of.items() if name not in held[shard]]
        if absent:
            raise CheckpointError(
                f"{index}: names {listed(absent)}, which {shard_of[absent[0]]} does not hold; download index and "
                "shards again"
            )
        if unnamed := sorted(set().union(*held.values()) - set(shard_of)):
            log.warning(
                "%s: does not name %s, which its shards hold; they are not read",
                index,
                listed(unnamed),
            )
        return {name: shards[shard] for name, shard in shard_of.items()}

    def _others(self, read: Set[str]) -> list[str]:
        """Lists files with weights, by name, except those that are `read`."""
        found = [file for pattern in _OTHER_WEIGHTS for file in self.directory.glob(pattern)]
        return sorted({file.relative_to(self.directory).as_posix() for file in found} - read)

    def _name_ignored(self, read: Set[str], source: str) -> None:
        if others := self._others(read):
            log.warning(
                "%s: weights are read from %s; ignored: %s", self.directory, source, listed(others)
            )

    def _open(self, path: Path) -> Any:
        try:
            return self._stack.enter_context(safe_open(path, framework="numpy"))
        except FileNotFoundError:
            raise CheckpointError(f"{path}: this shard is missing; download it again") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: not a whole safetensors file ({error}); download it again"
            ) from None


def _read_index(path: Path) -> dict[str, str]:
    try:
        shard_of = dict(json.loads(path.read_text())["weight_map"])
        if all(isinstance(shard, str) for shard in shard_of.values()):
            return shard_of
    except (ValueError, KeyError, TypeError):
        pass
    raise CheckpointError(
        f"{path}: not a JSON object with a weight_map of file names; download it again"
    )


def is_weights_file(name: str) -> bool:
    """Returns whether `write_tensors` makes files of this name."""
    shard = re.fullmatch(r"model-\d{5,}-of-\d{5,}\.safetensors", name)
    return name in (WEIGHTS_FILE, INDEX_FILE) or shard is not None


def check_range(name: str, wide: np.ndarray, cast: np.ndarray) -> None:
    """Raises CheckpointError where float16, which ends at 65504, has made values infinite."""
    if cast.dtype == np.float16 and np.isinf(cast).sum() > np.isinf(wide).sum():
        raise CheckpointError(
            f"{name} holds values past 65504, where float16 ends; use bfloat16 or float32"
        )


def listed(names: list[str], limit: int = 5) -> str:
    """Joins the first names, and counts the others."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


class Tensor(NamedTuple):
    """A tensor to write; `read` is called once, when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(directory: Path, tensors: list[Tensor], max_shard_bytes: int) -> None:
    """Writes one file, or several of at most `max_shard_bytes` (but a full tensor at least) and their index."""
    shards = list(_shards(tensors, max_shard_bytes))
    if len(shards) == 1:
        return _write_file(directory / WEIGHTS_FILE, tensors)
    shard_of = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / file, shard)
        shard_of |= {tensor.name: file for tensor in shard}
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
        "weight_map": shard_of,
    }
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: list[Tensor], limit: int) -> Iterator[list[Tensor]]:
    shard = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard = []
            size = 0
        shard.append(tensor)
        size += tensor.nbytes
    yield shard


def _write_file(path: Path, tensors: list[Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start = end
        end += tensor.nbytes
        header[tensor.name] = {
            "dtype": SUPPORTED_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(_data(tensor).reshape(-1).view(np.uint8))
        file.flush()
        os.fsync(file.fileno())


def _data(tensor: Tensor) -> np.ndarray:
    wide = tensor.read()
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(wide.astype(tensor.dtype, copy=False))
    check_range(tensor.name, wide, cast)
    return cast
