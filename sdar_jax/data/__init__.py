"""Data: sources -> tokens -> packed rows."""

from typing import TYPE_CHECKING

from sdar_jax.lazy import importer

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
__getattr__ = importer(
    __name__,
    {
        "DataConfig": "config",
        "PackedDataset": "pipeline",
        "SourceConfig": "config",
        "join_states": "pipeline",
        "load_tokenizer": "tokenizer",
        "make_dataset": "pipeline",
    },
)
