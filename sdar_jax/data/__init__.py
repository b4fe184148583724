"""Data: sources -> tokens -> packed rows."""

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
