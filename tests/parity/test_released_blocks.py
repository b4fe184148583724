"""Fast-dLLM v2 and LLaDA2, as published, against their released code; `make_released_blocks.py` made the numbers."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sdar_jax
from sdar_jax import DecodingConfig, ModelConfig
from sdar_jax.errors import CheckpointError, ConfigError
from sdar_jax.hf import read_model_config
from sdar_jax.model import Model, stack_layers
from tests.parity.test_released import tokens
from tests.released import FAST_DLLM, LLADA2, MASK, write_released

EXPECTED = np.load(Path(__file__).parent / "fixtures" / "released_blocks.npz")
FAST, MINI = "Fast_dLLM_v2_7B", "LLaDA2.0-mini"
# What `make_released_blocks.py` decodes with.
THRESHOLD = 0.08


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hub")
    return {name: write_released(root, name) for name in (FAST, MINI)}


@pytest.fixture(scope="module")
def models(directories: dict[str, Path]) -> dict[str, Model]:
    return {
        name: sdar_jax.load_pretrained(directories[name], dtype="float32") for name in directories
    }


def logits(model: Model) -> np.ndarray:
    scores = sdar_jax.logits(model, np.asarray([tokens(12)]), block_size=32)
    return np.asarray(scores)[0, :, ::8]


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("name", [FAST, MINI])
def test_logits(name: str, models: dict[str, Model]) -> None:
    assert error(logits(models[name]), EXPECTED[f"{name}/logits"]) <= 1e-5


@pytest.mark.parametrize(("name", "length"), [(FAST, 40), (FAST, 64), (MINI, 40)])
def test_greedy_decodes(name: str, length: int, models: dict[str, Model]) -> None:
    """Token for token, and in as many forwards: their own strategies are the released loops.

    Fast-dLLM's loop counts the prompt's forward and one that finishes each block, whose last logits give the next
    block's first token; for us that token takes the next block's first forward, which the other is part of.
    """
    model, wanted = models[name], EXPECTED[f"{name}/greedy{length}"].tolist()
    config = DecodingConfig(confidence_threshold=THRESHOLD)
    (done,) = sdar_jax.generate(
        model, [tokens(length)], config, max_new_tokens=len(wanted), stop_token_ids=()
    )
    assert done.tokens == wanted
    prefill_and_last_finish = 2 if name == FAST else 0
    if length % 32 == 0:
        # The prompt's forward gives the first token.
        prefill_and_last_finish -= 1
    forwards = int(EXPECTED[f"{name}/forwards{length}"])
    assert done.denoising_forwards == forwards - prefill_and_last_finish
    assert max(np.bincount(done.steps)) > 1
