"""Data: sources -> tokens -> packed rows."""

import os

# Before transformers is imported: only its tokenizers are wanted, and it warns that it finds no torch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from sdar_jax.data.config import DataConfig, SourceConfig
from sdar_jax.data.pipeline import PackedDataset, join_states, make_dataset
from sdar_jax.data.tokenizer import load_tokenizer

__all__ = ["DataConfig", "PackedDataset", "SourceConfig", "join_states", "load_tokenizer", "make_dataset"]
