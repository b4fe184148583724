"""Bad settings and requests: each is one typed line that names the value and the fix."""

import jax.numpy as jnp
import pytest

from sdar_jax import DecodingConfig, generate
from sdar_jax.errors import ConfigError, DecodingError
from tests.bad_input import refused
from tests.tiny import tiny_model

nan, infinite = float("nan"), float("inf")
CONFIGS = [
    ({"block_size": 0}, "block_size is 0", "positive integer"),
    ({"block_size": "4"}, "block_size is '4'", "positive integer"),
    ({"strategy": "static"}, "strategy 'static'", "'low_confidence_static'"),
    ({"schedule": "linear"}, "schedule 'linear'", "'released', 'paper'"),
    ({"confidence": "raw"}, "confidence 'raw'", "'pre_filter'"),
    ({"score": "entropy"}, "score 'entropy'", "'neg_entropy'"),
    ({"entropy_rule": "sum"}, "entropy_rule 'sum'", "'eb_sampler'"),
    ({"confidence_threshold": 1.5}, "confidence_threshold is 1.5", "[0, 1]"),
    ({"confidence_threshold": -0.1}, "confidence_threshold is -0.1", "[0, 1]"),
    ({"confidence_threshold": nan}, "confidence_threshold is nan", "finite"),
    (
        {"confidence_threshold": -infinite, "score": "neg_entropy"},
        "confidence_threshold is -inf",
        "finite",
    ),
    ({"denoising_steps": 0}, "denoising_steps is 0", "positive integer"),
    ({"denoising_steps": 2.5}, "denoising_steps is 2.5", "positive integer"),
    ({"temperature": -1.0}, "temperature is -1.0", "0 (greedy)"),
    ({"temperature": 1e-39}, "temperature is 1e-39", "1e-6"),
    ({"temperature": infinite}, "temperature is inf", "1e6"),
    ({"temperature": nan}, "temperature is nan", "0 (greedy)"),
    ({"top_k": -1}, "top_k is -1", "0 (off)"),
    ({"top_k": 1.5}, "top_k is 1.5", "positive integer"),
    ({"top_k": True}, "top_k is True", "positive integer"),
    ({"top_p": 0.0}, "top_p is 0.0", "(0, 1]"),
    ({"top_p": 1.01}, "top_p is 1.01", "(0, 1]"),
    ({"top_p": "0.9"}, "top_p is '0.9'", "(0, 1]"),
    ({"entropy_bound": -1.0}, "entropy_bound is -1.0", ">= 0"),
    ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0", "1 (off)"),
    ({"add_threshold": 1.1}, "add_threshold is 1.1", "[0, 1]"),
    ({"activate_threshold": -0.1}, "activate_threshold is -0.1", "[0, 1]"),
    ({"factor": nan}, "factor is nan", "finite"),
    ({"sub_block_size": 0}, "sub_block_size is 0", "a positive integer"),
]


@pytest.mark.parametrize("fields, value, fix", CONFIGS, ids=lambda part: str(part)[:40])
def test_config(fields, value, fix):
    with refused(ConfigError, value, fix):
        DecodingConfig(**fields)


AUTOREGRESSIVE = {"config": DecodingConfig(strategy="autoregressive")}
REQUESTS = [
    ({"prompts": [[1, 23]]}, "prompt 0 holds token id 23", "0 to 22"),
    ({"prompts": [[1], [-1]]}, "prompt 1 holds token id -1", "0 to 22"),
    ({"prompts": [[2**40]]}, f"token id {2**40}", "0 to 22"),
    ({"prompts": [["a"]]}, "prompt 0", "['a']", "integers"),
    ({"prompts": [[1.5]]}, "prompt 0", "[1.5]", "integers"),
    ({"prompts": [[True]]}, "prompt 0", "[True]", "integers"),
    ({"prompts": [[[1, 2]]]}, "prompt 0", "[[1, 2]]", "integers"),
    ({"prompts": [[[1], [2, 3]]]}, "prompt 0", "[[1], [2, 3]]", "integers"),
    ({"prompts": [None]}, "prompt 0", "None", "integers"),
    ({"prompts": [5, 9, 12]}, "prompt 0", "5", "integers"),
    ({"prompts": ["a text"]}, "prompt 0 is a text", "tokenizer="),
    (
        {"prompts": ["\udcff"], "tokenizer": str},
        "prompt 0 has a lone surrogate at character 0",
        "valid Unicode",
    ),
    ({"prompts": "a text"}, "'a text'", "list of prompts"),
    ({"prompts": [[]], **AUTOREGRESSIVE}, "prompt 0 is empty", "at least one token"),
    ({"max_new_tokens": -1}, "max_new_tokens is -1", ">= 0"),
    ({"max_new_tokens": 2.0}, "max_new_tokens is 2.0", ">= 0"),
    ({"max_new_tokens": True}, "max_new_tokens is True", ">= 0"),
    ({"max_new_tokens": 99}, "max_new_tokens is 99", "max_position_embeddings 64"),
    ({"stop_token_ids": 5}, "stop_token_ids is 5", "list of token ids"),
    ({"stop_token_ids": "5"}, "stop_token_ids is '5'", "list of token ids"),
    ({"stop_token_ids": ["<eos>"]}, "['<eos>']", "0 to 22"),
    ({"stop_token_ids": [23]}, "[23]", "0 to 22"),
    ({"stop_strings": ["x"]}, "stop_strings ['x']", "tokenizer="),
    ({"stop_strings": "x", "tokenizer": str}, "stop_strings is 'x'", "list of texts"),
    ({"stop_strings": [""], "tokenizer": str}, "stop_strings is ['']", "none of them empty"),
    ({"stop_strings": 5, "tokenizer": str}, "stop_strings is 5", "list of texts"),
    ({"window_slots": 0}, "window_slots is 0", "positive integer"),
    ({"config": [DecodingConfig()] * 2}, "2 configs are given for 1 prompts", "one for each"),
    (
        {"config": [DecodingConfig(), DecodingConfig(block_size=8)], "prompts": [[1], [2]]},
        "differ",
        "decode them apart",
    ),
    ({"seed": 2**40}, f"seed is {2**40}", "31 bits"),
    ({"seed": 0.5}, "seed is 0.5", "integer"),
    ({"config": DecodingConfig(denoising_steps=5)}, "denoising_steps 5", "block_size 4"),
]


@pytest.mark.parametrize(
    "changes, names", [(change, names) for change, *names in REQUESTS], ids=str
)
def test_request(changes, names):
    model = tiny_model(jnp.float32, max_position_embeddings=64)
    with refused(DecodingError, *names):
        generate(model, **{"prompts": [[1, 2]], "max_new_tokens": 3, **changes})


MODELS = [
    (
        {"block_size": None},
        "'low_confidence_dynamic' needs block_size",
        "DecodingConfig(block_size=...)",
    ),
    ({"mask_token_id": None}, "'low_confidence_dynamic' needs mask_token_id", "set it"),
]


@pytest.mark.parametrize("changes, value, fix", MODELS)
def test_a_model_that_lacks_what_the_strategy_needs(changes, value, fix):
    with refused(DecodingError, value, fix):
        generate(tiny_model(jnp.float32, **changes), [[1]], max_new_tokens=3)
