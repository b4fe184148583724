"""Model settings that no config.json can hold (tests/model has those that one can), as they are made in Python."""

import pytest

from sdar_jax import ModelConfig
from sdar_jax.errors import ConfigError
from sdar_jax.model.config import RopeConfig
from tests.bad_input import refused

nan, infinite = float("nan"), float("inf")
GOOD = dict(
    vocab_size=9,
    hidden_size=8,
    intermediate_size=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
)
MODELS = [
    ({"num_layers": True}, "num_layers is True", "positive integer"),
    ({"hidden_size": 8.0}, "hidden_size is 8.0", "positive integer"),
    ({"max_position_embeddings": 0}, "max_position_embeddings is 0", "positive integer"),
    ({"num_kv_heads": 3}, "num_heads 2 is not a multiple of num_kv_heads 3", "change either"),
    ({"rms_norm_eps": nan}, "rms_norm_eps is nan", "positive number"),
    ({"mask_token_id": 3.0}, "mask_token_id is 3.0", "0 to 8"),
    ({"mask_token_id": -1}, "mask_token_id is -1", "0 to 8"),
    ({"stop_token_ids": [1]}, "stop_token_ids is [1]", "tuple of token ids"),
    ({"stop_token_ids": ("<eos>",)}, "stop_token_ids is ('<eos>',)", "tuple of token ids"),
    ({"objective": "diffusion"}, "objective 'diffusion'", "'block_diffusion'"),
    ({"block_size": True}, "block_size is True", "positive integer"),
]
ROPES = [
    ({"theta": nan}, "rope theta is nan", "positive number"),
    ({"theta": infinite}, "rope theta is inf", "positive number"),
    ({"factor": -2.0}, "rope factor is -2.0", "positive number"),
    ({"rope_type": "dynamic"}, "rope_type 'dynamic'", "'yarn'"),
    ({"rope_type": "llama3"}, "'llama3' needs original_max_position_embeddings", "add it"),
    (
        {"rope_type": "llama3", "original_max_position_embeddings": 8, "low_freq_factor": 4.0},
        "low_freq_factor 4.0 is not below high_freq_factor 4.0",
        "lower",
    ),
]


@pytest.mark.parametrize("fields, value, fix", MODELS, ids=lambda part: str(part)[:40])
def test_model(fields, value, fix):
    with refused(ConfigError, value, fix):
        ModelConfig(**{**GOOD, **fields})


@pytest.mark.parametrize("fields, value, fix", ROPES, ids=lambda part: str(part)[:40])
def test_rope(fields, value, fix):
    with refused(ConfigError, value, fix):
        RopeConfig(**fields)


def test_unknown_preset():
    with refused(ConfigError, "preset 'sdar-7b'", "'sdar-8b'"):
        ModelConfig.preset("sdar-7b")
