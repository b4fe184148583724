"""Directories that we save, read by transformers' own classes (check_transformers.py, in a Python that has torch)."""

import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdar_jax.hf.pretrained import load_pretrained, save_pretrained
from sdar_jax.model import Model, logits, stack_layers
from sdar_jax.model.config import ModelConfig, RopeConfig
from sdar_jax.model.conversion import to_diffusion

PYTHON = os.environ.get("SDAR_TORCH_PYTHON")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        PYTHON is None, reason="set SDAR_TORCH_PYTHON to a Python with torch and transformers"
    ),
]
FIXTURES = Path(__file__).parent / "fixtures"


def check(model: Model, directory: Path, *model_type: str) -> None:
    tokens = jax.random.randint(jax.random.key(1), (2, 20), 0, model.config.vocab_size, jnp.int32)
    arrays = {
        "tokens": np.asarray(tokens),
        "logits": np.asarray(logits(model, tokens, block_size=1)),
    }
    np.savez(directory.with_suffix(".npz"), **arrays)
    script = Path(__file__).parent / "check_transformers.py"
    command = [
        str(PYTHON),
        str(script),
        str(directory),
        str(directory.with_suffix(".npz")),
        *model_type,
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*/")), ids=lambda path: path.name)
def test_what_was_loaded_and_saved(path: Path, tmp_path: Path) -> None:
    model = load_pretrained(path)
    save_pretrained(model, tmp_path / "model", max_shard_bytes=20_000)
    check(model, tmp_path / "model")


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "llama"])
def test_what_was_made_here(architecture: str, tmp_path: Path) -> None:
    own = {
        "qwen3": {},
        "qwen2": {"qkv_bias": True},
        "llama": {"qkv_bias": True, "output_bias": True},
    }[architecture]
    shape = ModelConfig(
        53, 20, 28, 2, 4, 2, 10, 1e-5, RopeConfig(5e4), architecture == "qwen3", **own
    )
    model = Model(
        ModelConfig(**{**shape.__dict__, "architecture": architecture, "initializer_range": 0.3}),
        jax.random.key(0),
    )
    save_pretrained(model, tmp_path / "model")
    check(model, tmp_path / "model")


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", ["qwen3", "qwen3-tied-yarn-bf16"])
def test_a_converted_one_reads_as_qwen3(name: str, stacked: bool, tmp_path: Path) -> None:
    """Causally, and with the weights that conversion gave it: untied, and with a row appended for the mask."""
    model = to_diffusion(load_pretrained(FIXTURES / name), block_size=4, tokenizer_size=61)
    save_pretrained(stack_layers(model) if stacked else model, tmp_path / "model")
    check(load_pretrained(tmp_path / "model"), tmp_path / "model", "qwen3")
