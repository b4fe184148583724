"""Training that continues released models, from their directories as published."""

import json
import logging
from pathlib import Path

import jax
import pytest

from sdar_jax.data import load_tokenizer
from sdar_jax.devices.sharding import MeshConfig, make_mesh
from sdar_jax.hf import load_pretrained, read_model_config
from sdar_jax.model.hf_fields import warn_once
from sdar_jax.training import TrainConfig, run
from sdar_jax.training.config import InitConfig
from sdar_jax.training.config_io import from_values
from sdar_jax.training.resolve_model import trained_shape
from sdar_jax.training.setup import initial_model
from tests.released import MASK, write_released
from tests.training.conftest import run_values


@pytest.mark.parametrize(
    "name", ["SDAR-8B-Chat-b8", "LLaDA-8B-Instruct", "Dream-v0-Instruct-7B", "LLaDA2.0-mini"]
)
def test_a_run_starts_as_the_model_is(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = write_released(tmp_path, name)
    start = InitConfig(init_from=str(directory))
    warn_once.cache_clear()
    model = initial_model(
        start, load_tokenizer(directory), jax.random.key(0), make_mesh(MeshConfig())
    )
    assert model.config == read_model_config(directory)
    assert model.config.mask_token_id == MASK
    assert trained_shape(start).paradigm == model.config.paradigm
    (said,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "config.json does not say all" in said.getMessage()


def test_what_a_run_says_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = write_released(tmp_path, "SDAR-1.7B-Chat")
    start = InitConfig(init_from=str(directory), block_size=16, mask_token_id=MASK + 1)
    warn_once.cache_clear()
    model = initial_model(
        start, load_tokenizer(directory), jax.random.key(0), make_mesh(MeshConfig())
    )
    assert (model.config.block_size, model.config.mask_token_id) == (16, MASK + 1)
    assert not [r for r in caplog.records if "config.json does not say all" in r.getMessage()]


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    "name",
    [
        "LLaDA-8B-Instruct",
        "Dream-v0-Instruct-7B",
        "Qwen3-0.6B-diffusion-bd3lm-v0.1",
        "Fast_dLLM_v2_7B",
        "LLaDA2.0-mini",
    ],
)
def test_a_run_leaves_a_model_of_the_same_family(name: str, inputs: Path, tmp_path: Path) -> None:
    directory = write_released(tmp_path, name)
    values = run_values(inputs, tmp_path / "run")
    values["model"] = {"init_from": str(directory)}
    run(from_values(TrainConfig, values))
    trained = tmp_path / "run" / "model"
    published, left = (
        json.loads((path / "config.json").read_text()) for path in (directory, trained)
    )
    for field in ("model_type", "architectures"):
        assert left[field] == published[field]
    before, after = load_pretrained(directory), load_pretrained(trained)
    assert after.config.paradigm == before.config.paradigm
    assert (after.embedding[...] != before.embedding[...]).any()
