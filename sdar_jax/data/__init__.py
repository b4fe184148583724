"""Data: sources -> tokens -> packed rows."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdar_jax.data.config import DataConfig, SourceConfig
    from sdar_jax.data.pipeline import PackedDataset, join_states, make_dataset
    from sdar_jax.data.tokenizer import load_tokenizer

__all__ = [
    "DataConfig",
    "PackedDataset",
    "SourceConfig",
    "join_states",
    "load_tokenizer",
    "make_dataset",
]

# Where each name is imported from when it is first used: grain and orbax take a second, and decoding needs neither.
_HOMES = {
    "DataConfig": "config",
    "PackedDataset": "pipeline",
    "SourceConfig": "config",
    "join_states": "pipeline",
    "load_tokenizer": "tokenizer",
    "make_dataset": "pipeline",
}


def __getattr__(name: str) -> Any:
    """Returns one of these names on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
