"""Documents tokenised once and kept: a run then reads token ids from disk, in the same order as without.

A cache is a folder of its own under `DataConfig.token_cache`, named by all that documents depend on: files, tokenizer,
template, layout. It is complete or absent, and shared by processes and runs.

    index.npy     of each record: where its tokens begin, how many, noisy positions, whether its end was cut
    tokens.bin    int32, all documents one after the other
    masks.bin     uint8, 1 where a token carries loss
    orders.bin    int32, of trajectories: when each token was committed; empty where there are none
    rejected.json by record id: [reason, malformed] of those that give no document
"""

import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from transformers import PreTrainedTokenizerBase

from sdar_jax.data.config import DataConfig
from sdar_jax.data.documents import Document, DocumentMaker, Rejection
from sdar_jax.data.files import find_files
from sdar_jax.data.sources import Source
from sdar_jax.errors import DataError

log = logging.getLogger(__name__)

_INDEX = np.dtype(
    [("start", "<i8"), ("length", "<i4"), ("noisy", "<i4"), ("cut", "?"), ("made", "?")]
)
# What of a config no document depends on.
_FREE = (
    *("sources", "batch_size", "weights", "segments", "shuffle", "seed", "epochs", "on_error"),
    *("num_threads", "shards", "token_cache"),
)
_VERSION = 2
_CHUNK = 512
_RECORDS_FOR_PROCESSES = 20_000


class TokenCache:
    """Gives the documents of a cache; what `DocumentMaker` makes, without making it."""

    def __init__(self, folder: Path, maker: DocumentMaker):
        self._maker = maker
        self.block_size = maker.block_size
        self._index = np.load(folder / "index.npy")
        rejected = json.loads((folder / "rejected.json").read_text(encoding="utf-8"))
        self._rejected = {int(record): Rejection(*why) for record, why in rejected.items()}
        self._tokens = _mapped(folder / "tokens.bin", np.dtype("<i4"))
        self._masks = _mapped(folder / "masks.bin", np.dtype("u1"))
        self._orders = _mapped(folder / "orders.bin", np.dtype("<i4"))

    def __call__(self, record_id: int) -> Document | Rejection:
        """The document of a record, or why there is none; safe to call from several threads."""
        found = self._index[record_id]
        if not found["made"]:
            return self._rejected[record_id]
        part = slice(int(found["start"]), int(found["start"]) + int(found["length"]))
        mask = self._masks[part].view(bool)
        order = self._orders[part] if len(self._orders) else None
        return Document(
            record_id, self._tokens[part], mask, int(found["noisy"]), bool(found["cut"]), order
        )

    def where(self, record_id: int) -> str:
        """Returns a record's "file:line"."""
        return self._maker.where(record_id)


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


def open_cache(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    sources: list[Source],
    maker: DocumentMaker,
    eos_token_id: int,
) -> TokenCache:
    """Opens the cache of these documents under `config.token_cache`; makes it if it is not there.

    Raises:
        DataError: it cannot be written or read.
    """
    assert config.token_cache is not None
    home = Path(config.token_cache).expanduser()
    folder = home / _key(config, tokenizer, maker.block_size, eos_token_id)
    try:
        home.mkdir(parents=True, exist_ok=True)
        # One process makes it, and the others wait.
        with filelock.FileLock(f"{folder}.lock"):
            if not folder.exists():
                _make(folder, config, tokenizer, sources, maker, eos_token_id)
        return TokenCache(folder, maker)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"token_cache {folder}: {error}; remove it, or choose another folder"
        ) from None


def _key(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, block_size: int, eos_token_id: int
) -> str:
    """Names all that the documents depend on."""
    layout = {k: v for k, v in dataclasses.asdict(config).items() if k not in _FREE}
    sources = []
    for source in config.sources:
        files = [(str(path), *_state(path)) for path in find_files(source)]
        sources.append({**dataclasses.asdict(source), "weight": None, "files": files})
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # Without a fast tokenizer its class and vocabulary stand for it.
    words = (
        backend.to_str()
        if backend is not None
        else repr((type(tokenizer), sorted(tokenizer.get_vocab().items())))
    )
    values = {
        "version": _VERSION,
        "layout": layout,
        "sources": sources,
        "block_size": block_size,
        "eos": eos_token_id,
        "tokenizer": hashlib.sha256(words.encode()).hexdigest(),
        "template": tokenizer.chat_template,
        "special": tokenizer.special_tokens_map,
    }
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:24]


def _state(path: Path) -> tuple[int, int]:
    """Size and time of a file: of a broken link neither."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _make(
    folder: Path,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    sources: list[Source],
    maker: DocumentMaker,
    eos_token_id: int,
) -> None:
    """Tokenises all records into a folder beside, which takes its name when it is complete."""
    count = sum(len(source) for source in sources)
    log.info("tokenising %d records into %s, once", count, folder)
    new = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    try:
        index = np.zeros(count, _INDEX)
        rejected, start = {}, 0
        made = _outcomes(config, tokenizer, maker, eos_token_id, count)
        with (
            (new / "tokens.bin").open("wb") as tokens,
            (new / "masks.bin").open("wb") as masks,
            (new / "orders.bin").open("wb") as orders,
        ):
            for record, outcome in enumerate(made):
                if isinstance(outcome, Rejection):
                    rejected[record] = (outcome.reason, outcome.malformed)
                    continue
                index[record] = (start, len(outcome), outcome.noisy, outcome.cut, True)
                start += len(outcome)
                tokens.write(outcome.tokens.astype("<i4").tobytes())
                masks.write(outcome.loss_mask.astype("u1").tobytes())
                if config.has_order:
                    none = np.full(len(outcome), -1)
                    order = none if outcome.order is None else outcome.order
                    orders.write(order.astype("<i4").tobytes())
        np.save(new / "index.npy", index)
        (new / "rejected.json").write_text(json.dumps(rejected), encoding="utf-8")
        os.replace(new, folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _outcomes(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    maker: DocumentMaker,
    eos_token_id: int,
    count: int,
) -> Iterator[Document | Rejection]:
    """What each record gives, in order; of many, made by as many processes as there are cores."""
    processes = os.cpu_count() or 1
    if count < _RECORDS_FOR_PROCESSES or processes == 1:
        yield from map(maker, range(count))
        return
    arguments = (config, tokenizer, maker.block_size, eos_token_id)
    # Not forked: other threads may hold locks.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _begin, arguments) as pool:
        chunks = (range(i, min(i + _CHUNK, count)) for i in range(0, count, _CHUNK))
        for made in pool.map(_make_chunk, chunks):
            yield from made


_worker_maker: DocumentMaker | None = None


def _begin(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, block_size: int, eos: int
) -> None:
    global _worker_maker
    sources = [Source(source) for source in config.sources]
    options: dict[str, Any] = {"block_size": block_size, "eos_token_id": eos}
    _worker_maker = DocumentMaker(config, tokenizer, sources, **options)


def _make_chunk(records: range) -> list[Document | Rejection]:
    assert _worker_maker is not None
    return [_worker_maker(record) for record in records]
