"""Directories as published: what is read of them, and logits and greedy decodes against the released code.

`make_released.py` made the numbers, and says with which code.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import sdar_jax
from sdar_jax import DecodingConfig
from sdar_jax.hf import read_model_config
from sdar_jax.model import Model
from sdar_jax.model.hf_fields import warn_once
from tests.released import MASK, RELEASED, write_released

EXPECTED = np.load(Path(__file__).parent / "fixtures" / "released.npz")
STATIC = DecodingConfig(strategy="low_confidence_static")
# What each is decoded by: the length of the prompt, the config, and for how many tokens.
DECODED = {
    "SDAR-1.7B-Chat": (6, DecodingConfig(), 8),
    "SDAR-8B-Chat-b8": (6, DecodingConfig(), 16),
    "TraDo-4B-Instruct": (6, DecodingConfig(), 8),
    "SDAR-30B-A3B-Chat": (6, DecodingConfig(), 8),
    "Qwen3-0.6B-diffusion-bd3lm-v0.1": (64, STATIC, 64),
    "Llama-3.2-1B-diffusion-bd3lm": (64, STATIC, 64),
    "Qwen3-0.6B-diffusion-mdlm-v0.1": (11, DecodingConfig(), 64),
    "Qwen2.5-Coder-0.5B-Instruct-diffusion-mdlm-v0.1": (11, DecodingConfig(), 64),
    "LLaDA-8B-Instruct": (11, DecodingConfig(), 64),
    # Its own loop has no blocks: the whole answer is one.
    "Dream-v0-Instruct-7B": (11, DecodingConfig(block_size=16), 16),
}


@pytest.fixture(autouse=True)
def every_warning_is_new() -> Iterator[None]:
    warn_once.cache_clear()
    yield
    warn_once.cache_clear()


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hub")
    return {name: write_released(root, name) for name in RELEASED}


def tokens(length: int) -> list[int]:
    return np.random.default_rng(length).integers(4, MASK, length).tolist()


def greedy(model: Model, name: str, **changes) -> list[int]:
    length, config, new = DECODED[name]
    config = DecodingConfig(**{**vars(config), **changes})
    (done,) = sdar_jax.generate(
        model, [tokens(length)], config, max_new_tokens=new, stop_token_ids=()
    )
    return done.tokens


@pytest.mark.parametrize("name", DECODED)
def test_logits_and_greedy_decodes_are_the_released_codes(
    name: str, directories: dict[str, Path]
) -> None:
    model = sdar_jax.load_pretrained(directories[name], dtype="float32")
    block_size = model.config.block_size if RELEASED[name]["model_type"][:4] == "sdar" else None
    ours = sdar_jax.logits(model, np.asarray([tokens(12)]), block_size=block_size)
    theirs = EXPECTED[f"{name}/logits"]
    assert np.abs(np.asarray(ours)[0, :, ::8] - theirs).max() <= 1e-5 * np.abs(theirs).max()
    assert greedy(model, name) == EXPECTED[f"{name}/greedy"].tolist()
    if name.startswith("Dream"):
        by_entropy = greedy(model, name, score="neg_entropy")
        assert by_entropy == EXPECTED[f"{name}/greedy_entropy"].tolist()


@pytest.mark.parametrize("name", RELEASED)
def test_a_saved_one_is_as_it_came(name: str, directories: dict[str, Path], tmp_path: Path) -> None:
    model = sdar_jax.load_pretrained(directories[name], dtype="float32")
    sdar_jax.save_pretrained(model, tmp_path / "any-name", tokenizer_from=directories[name])
    saved, released = (
        load_file(path / "model.safetensors") for path in (tmp_path / "any-name", directories[name])
    )
    assert saved.keys() == released.keys()
    assert all(np.array_equal(saved[tensor], released[tensor]) for tensor in saved)
    written = json.loads((tmp_path / "any-name" / "config.json").read_text())
    # What other code reads of them is as it was; how it held or ran them need not be.
    published = RELEASED[name]
    own = {"block_size", "mask_token_id", "objective", "stop_token_ids"}
    assert {field: published.get(field) for field in written.keys() - own} == {
        field: value if field in published else None
        for field, value in written.items()
        if field not in own
    }
    assert read_model_config(tmp_path / "any-name") == model.config


@pytest.mark.parametrize(
    ("name", "said"),
    {
        "SDAR-1.7B-Chat": f"block_size 4 (the usual one), mask_token_id {MASK}",
        "SDAR-8B-Chat-b8": f"block_size 8 (the name ends so), mask_token_id {MASK}",
        "SDAR-30B-A3B-Chat": f"block_size 4 (the usual one), mask_token_id {MASK}",
        "Qwen3-0.6B-diffusion-bd3lm-v0.1": (
            f"objective block_diffusion (by its name), block_size 32 (the usual one), mask_token_id {MASK}"
        ),
        "Qwen3-0.6B-diffusion-mdlm-v0.1": "objective masked_diffusion (by its name), block_size 32",
        "LLaDA-8B-Instruct": "block_size 32 (the usual one);",
        "Dream-v0-Instruct-7B": "block_size 32 (the usual one);",
    }.items(),
)
def test_what_config_json_leaves_out_is_said_once(
    name: str, said: str, directories: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        read_model_config(directories[name])
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"{name}: config.json does not say all") and said in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["SDAR-1.7B-Chat", "LLaDA-8B-Instruct"])
def test_what_is_given_counts_and_nothing_is_said(
    name: str, directories: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    config = read_model_config(directories[name], block_size=16, mask_token_id=7)
    assert (config.block_size, config.mask_token_id) == (16, 7)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
