"""What a message of decoding advises is done here, and works."""

import json

import jax.numpy as jnp
import pytest

from sdar_jax import (
    DecodingConfig,
    Engine,
    generate,
    load_pretrained,
    save_pretrained,
    to_diffusion,
)
from sdar_jax.errors import ConfigError, DecodingError
from tests.bad_input import refused
from tests.tiny import MASK, VOCAB, tiny_model

AUTOREGRESSIVE = dict(objective="autoregressive", block_size=None, mask_token_id=None)


def model(**changes):
    return tiny_model(jnp.float32, **changes)


def engine(of=None, **options) -> Engine:
    return Engine(
        model() if of is None else of, **{"batch_slots": 1, "pages": 6, "page_size": 8, **options}
    )


def decodes(of, config: DecodingConfig) -> bool:
    return len(generate(of, [[1, 2]], config, max_new_tokens=3, stop_token_ids=())[0].tokens) == 3


# Fields that are refused, what the message names instead, and that.
CONFIGS = [
    ({"block_size": 0}, "positive integer", {"block_size": 1}),
    ({"denoising_steps": 0}, "positive integer", {"denoising_steps": 1}),
    ({"temperature": 1e7}, "0 (greedy) or 1e-6 to 1e6", {"temperature": 1e6}),
    ({"temperature": 1e-7}, "0 (greedy) or 1e-6 to 1e6", {"temperature": 1e-6}),
    ({"top_k": -1}, "0 (off) or a positive integer", {"top_k": 0}),
    ({"top_p": 0}, "(0, 1]", {"top_p": 1.0}),
    ({"repetition_penalty": 0}, "1 (off) or 1e-3 to 1e3", {"repetition_penalty": 1e-3}),
    ({"repetition_penalty": 1e4}, "1 (off) or 1e-3 to 1e3", {"repetition_penalty": 1e3}),
    ({"entropy_bound": -1}, ">= 0", {"entropy_bound": 0.0}),
    ({"factor": -1}, ">= 0", {"factor": 0.0}),
    ({"sub_block_size": 0.5}, "a positive integer", {"sub_block_size": 1}),
    ({"add_threshold": 2}, "[0, 1]", {"add_threshold": 0.0}),
    ({"activate_threshold": 2}, "[0, 1]", {"activate_threshold": 1.0}),
    ({"confidence_threshold": 2}, "[0, 1]", {"confidence_threshold": 1.0}),
    (
        {"confidence_threshold": "a", "score": "neg_entropy"},
        "finite",
        {"confidence_threshold": -9.0},
    ),
    ({"min_new_tokens": -1}, "0 (off) or a positive integer", {"min_new_tokens": 0}),
    ({"top_logprobs": -1}, "0 (off) or a positive integer", {"top_logprobs": 1}),
    ({"suppress_token_ids": 3}, "a list of token ids", {"suppress_token_ids": (3,)}),
    ({"eos_last": "yes"}, "True or False", {"eos_last": True}),
]


@pytest.mark.parametrize("wrong, fix, right", CONFIGS, ids=str)
def test_a_config_as_the_message_says(wrong, fix, right):
    with refused(ConfigError, fix):
        DecodingConfig(**wrong)
    DecodingConfig(**{**wrong, **right})


@pytest.mark.parametrize("name", ["strategy", "schedule", "confidence", "score", "entropy_rule"])
def test_every_name_that_a_message_lists_is_known(name, unchecked_types):
    with pytest.raises(ConfigError) as caught:
        DecodingConfig(**{name: "no such"})
    listed = str(caught.value).split("use one of ")[1].strip("()").split(", ")
    assert len(listed) > 1
    for each in listed:
        DecodingConfig(**{name: each.strip("'")})


def test_an_autoregressive_model_is_decoded_or_converted():
    plain = model(**AUTOREGRESSIVE)
    with refused(
        DecodingError,
        "this model is autoregressive",
        "strategy='autoregressive'",
        "sdar_jax.to_diffusion",
    ):
        decodes(plain, DecodingConfig(block_size=4))
    assert decodes(plain, DecodingConfig(strategy="autoregressive"))
    assert decodes(to_diffusion(plain, block_size=4, mask_token_id=VOCAB), DecodingConfig())


def test_a_block_size_and_a_mask_where_the_model_has_none(tmp_path):
    with refused(DecodingError, "needs block_size", "DecodingConfig(block_size=...)"):
        decodes(model(block_size=None), DecodingConfig())
    assert decodes(model(block_size=None), DecodingConfig(block_size=4))
    save_pretrained(model(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("mask_token_id")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with refused(DecodingError, "needs mask_token_id", "load_pretrained(..., mask_token_id=...)"):
        decodes(load_pretrained(tmp_path), DecodingConfig())
    assert decodes(load_pretrained(tmp_path, mask_token_id=MASK), DecodingConfig())


def test_the_log_probabilities_of_a_prompt_are_left_out():
    with refused(
        DecodingError, "prompt_logprobs with strategy 'low_confidence_dynamic'", "leave it out"
    ):
        decodes(model(), DecodingConfig(prompt_logprobs=True))
    assert decodes(model(), DecodingConfig())


def test_steps_that_fit_the_block():
    with refused(DecodingError, "denoising_steps 5", "block_size 4", "use at most that"):
        engine().submit([1], DecodingConfig(denoising_steps=5), max_new_tokens=1)
    engine().submit([1], DecodingConfig(denoising_steps=4), max_new_tokens=1)


def test_strategies_that_an_engine_does_not_serve():
    canvas, causal = (
        DecodingConfig(strategy="semi_autoregressive"),
        DecodingConfig(strategy="autoregressive"),
    )
    for config in (canvas, causal):
        with refused(DecodingError, config.strategy, "sdar_jax.generate"):
            engine().submit([1], config, max_new_tokens=1)
        assert decodes(model(), config)
    served = engine(model(**AUTOREGRESSIVE))
    with refused(DecodingError, "an autoregressive model's engine", "strategy='autoregressive'"):
        served.submit([1], DecodingConfig(strategy="sequential"), max_new_tokens=1)
    served.submit([1], causal, max_new_tokens=1)
    with refused(DecodingError, "block_size is 8", "leave it None"):
        engine().submit([1], DecodingConfig(block_size=8), max_new_tokens=1)
    engine().submit([1], DecodingConfig(block_size=None), max_new_tokens=1)


def test_requests_that_an_engine_has_no_room_for():
    """By its pages, or by its own limit: each message names the one to make larger, and less is served as well."""
    asked = dict(prompt=[1] * 40, max_new_tokens=10)
    for small, limit, large in (
        ({}, "pages", {"pages": 7}),
        ({"max_length": 30}, "max_length", {"max_length": 50}),
    ):
        sizes = {"pages": 8} if small else {}
        served = engine(**sizes, **small)
        with refused(DecodingError, "40 tokens", "ask for less", f"a larger {limit}"):
            served.submit(**asked)
        served.submit([1] * 20, max_new_tokens=10)
        engine(**{**sizes, **large}).submit(**asked)


def test_a_full_queue_has_room_when_a_result_was_taken():
    served = engine(max_queue=1)
    first = served.submit([1], max_new_tokens=1)
    with refused(DecodingError, "queue holds 1", "take a result first"):
        served.submit([1], max_new_tokens=1)
    served.result(first)
    served.submit([1], max_new_tokens=1)


def test_stops_of_an_engine():
    with refused(DecodingError, "9 stop tokens", "use at most 8"):
        engine().submit([1], max_new_tokens=1, stop_token_ids=tuple(range(9)))
    engine().submit([1], max_new_tokens=1, stop_token_ids=tuple(range(8)))
    with refused(DecodingError, "stop_strings ['x']", "tokenizer="):
        engine().submit([1], max_new_tokens=1, stop_strings=["x"])
    letters = type("Letters", (), {"decode": lambda self, ids: "a" * len(ids)})()
    engine(tokenizer=letters).submit([1], max_new_tokens=1, stop_strings=["x"])


def test_sizes_of_an_engine():
    with refused(ConfigError, "page_size is 6", "multiple of the block size 4"):
        engine(page_size=6)
    with refused(ConfigError, "pages is 0", "at least 1"):
        engine(pages=0)
    served = engine(
        pages=1, page_size=4, batch_slots=1, max_queue=1, steps_per_call=1, prefill_tokens=1
    )
    assert len(served.result(served.submit([1], max_new_tokens=3, stop_token_ids=())).tokens) == 3


def test_configs_of_one_batch_and_seeds():
    differ = [DecodingConfig(), DecodingConfig(block_size=8)]
    with refused(DecodingError, "decode them apart"):
        generate(model(), [[1], [2]], differ, max_new_tokens=1)
    assert all(decodes(model(), config) for config in differ)
    with refused(DecodingError, "31 bits"):
        generate(model(), [[1]], max_new_tokens=3, seed=2**31 - 1)
    assert generate(model(), [[1]], max_new_tokens=3, seed=2**31 - 2)


def test_lengths_and_empty_prompts():
    short = model(max_position_embeddings=16)
    with refused(DecodingError, "together at most max_position_embeddings 16"):
        generate(short, [[1] * 10], max_new_tokens=7)
    assert generate(short, [[1] * 10], max_new_tokens=6, stop_token_ids=())
    causal = DecodingConfig(strategy="autoregressive")
    with refused(DecodingError, "at least one token"):
        generate(model(), [[]], causal, max_new_tokens=1)
    assert generate(model(), [[1]], causal, max_new_tokens=1, stop_token_ids=())[0].tokens
