"""Batches that a user's own iterator gives, in place of those that are packed from files."""

import json
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from sdar_jax.data import DataConfig
from sdar_jax.errors import ConfigError, DataError

log = logging.getLogger(__name__)

_DTYPES = {
    "tokens": np.int32,
    "segment_ids": np.int32,
    "loss_mask": np.bool_,
    "noisy_index": np.int32,
    "order": np.int32,
}


class GivenBatches(Iterator[dict[str, np.ndarray]]):
    """Checks a user's batches, and counts how many were given out.

    An iterator with `get_state` and `set_state` (as grain's have) is saved and resumed by them. Of any other, a run
    that resumes draws again as many batches as it had used, and leaves them out: exact where they come in the same
    order each time.

    Args:
        data: the user's batches.
        config: its batch_size, sequence_length and noisy_length are those of the batches.
        vocab_size: of the model.

    Raises:
        ConfigError: a state that JSON cannot hold.
    """

    def __init__(self, data: Iterable[dict[str, Any]], config: DataConfig, vocab_size: int):
        self._source: Any = iter(data)
        self._config = config
        self._vocab_size = vocab_size
        self._used = 0
        self._has_state = hasattr(self._source, "get_state") and hasattr(self._source, "set_state")
        self.get_state()

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._source)
        self._used += 1
        return self._checked(batch)

    def get_state(self) -> dict[str, Any]:
        """Returns the position behind the last batch given out; JSON can hold it."""
        iterator_state = self._source.get_state() if self._has_state else None
        state = {"used": self._used, "iterator": iterator_state}
        try:
            # A copy: the iterator may keep changing what it gave.
            return json.loads(json.dumps(state))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"data.get_state() gives what JSON cannot hold ({error}); give plain values"
            ) from None

    def set_state(self, state: dict[str, Any]) -> None:
        """Resumes behind as many batches as `state` had used.

        Raises:
            DataError: there are not that many.
        """
        self._used = state["used"]
        if self._has_state and state["iterator"] is not None:
            self._source.set_state(state["iterator"])
            return
        log.warning(
            "data keeps no state (get_state, set_state): its first %d batches are drawn again",
            self._used,
        )
        for number in range(self._used):
            if next(self._source, None) is None:
                raise DataError(
                    f"data ended after {number} batches, of which the run had used {self._used}; give all"
                )

    def describe(self, record_ids: Any) -> list[str]:
        """Names batches by their number, as a user's own have no files and lines."""
        return [f"batch {number} of data" for number in np.unique(record_ids)]

    def close(self) -> None:
        """Does nothing: the user's iterator is the user's to close."""

    def _checked(self, batch: dict[str, Any]) -> dict[str, np.ndarray]:
        rows = self._config.batch_size
        noisy = self._config.noisy_length
        shape = (rows, self._config.sequence_length)
        shapes: dict[str, tuple[int, ...]] = {
            "tokens": shape,
            "segment_ids": shape,
            "loss_mask": shape,
        }
        if noisy is not None:
            shapes["noisy_index"] = (rows, noisy)
        where = f"batch {self._used} of data"
        if "order" in batch:
            shapes["order"] = shape
        if absent := [name for name in shapes if name not in batch]:
            raise DataError(f"{where} lacks {', '.join(absent)}; give arrays of these names")
        if noisy is None and "noisy_index" in batch:
            raise DataError(
                f"{where} has noisy_index and config.data no noisy_length; set it, or leave it out"
            )
        checked = {}
        for name, shape in shapes.items():
            checked[name] = _array(batch[name], f"{where}: {name}", shape, _DTYPES[name])
        tokens = checked["tokens"]
        wrong = (tokens < 0) | (tokens >= self._vocab_size)
        if wrong.any():
            raise DataError(
                f"{where} holds token {tokens[wrong][0]}; the vocabulary is 0 to {self._vocab_size - 1}"
            )
        if "order" in batch and (checked["loss_mask"] & (checked["order"] < 0)).any():
            raise DataError(
                f"{where} has a token with loss and an order below 0; give the step that committed it"
            )
        return checked | {"record_ids": np.full(1, self._used)}


def _array(value: Any, name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    array = np.asarray(value)
    if array.shape != shape:
        raise DataError(
            f"{name} is of shape {array.shape}, and the config's batches of {shape}; give both one shape"
        )
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        raise DataError(f"{name} is {array.dtype}; give {np.dtype(dtype)}")
    return array.astype(dtype, copy=False)
