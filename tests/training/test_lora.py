"""Runs that train low-rank matrices: the base stays as it was, and they resume as any other run does."""

import json

import jax
import numpy as np
import pytest

from sdar_jax import adapters, load_pretrained, save_pretrained, train
from sdar_jax.errors import ConfigError
from sdar_jax.model import Model, stack_layers
from sdar_jax.model.config import ModelConfig
from sdar_jax.training import Outcome, TrainConfig, run
from sdar_jax.training.config_io import from_values, read_command_line
from sdar_jax.training.extensions import Extensions
from sdar_jax.training.step import model_weights
from tests.bad_input import refused
from tests.training.conftest import assert_same_run, merged, run_values
from tests.training.test_run import at_evaluation, terminate, total_weight
from tests.virtual_devices import run_module


@pytest.fixture(scope="module")
def start(inputs, tmp_path_factory):
    """A block-diffusion model to start from, with its tokenizer."""
    shape = run_values(inputs, inputs)["model"]["shape"] | {"num_layers": 3}
    purpose = {"objective": "block_diffusion", "block_size": 4, "mask_token_id": 30}
    model = Model(ModelConfig(**shape, **purpose), jax.random.key(3))
    directory = tmp_path_factory.mktemp("start") / "model"
    save_pretrained(model, directory, tokenizer_from=inputs / "tokenizer")
    return directory


def config_in(inputs, start, run_dir, **changes) -> TrainConfig:
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    values = {**run_values(inputs, run_dir), "model": {"init_from": str(start)}, "lora": lora}
    return from_values(TrainConfig, merged(values, changes))


def weights_of(model: Model) -> dict[str, np.ndarray]:
    return {name: np.asarray(each) for name, each in model_weights(model)[0].items()}


@pytest.fixture(scope="module")
def undisturbed(inputs, start, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("lora") / "run"
    config = config_in(inputs, start, run_dir, ema_decay=0.5)
    assert run(config, Extensions(evaluators=(total_weight,))) == Outcome(6, finished=True)
    return run_dir


def test_the_exported_model_is_the_start_with_its_adapter_merged(undisturbed, start):
    base = load_pretrained(start)
    found = weights_of(load_pretrained(undisturbed / "model"))
    again = weights_of(adapters.merge(adapters.load(base, undisturbed / "adapter")))
    before = weights_of(base)
    assert found.keys() == again.keys() == before.keys()
    changed = set()
    for name, expected in again.items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=1e-7)
        if (found[name] != before[name]).any():
            changed.add(name.rpartition(".")[2])
        else:
            np.testing.assert_array_equal(found[name], before[name])
    assert changed == {"qkv", "down"}
    # Of qkv, the keys had no matrices.
    np.testing.assert_array_equal(found["layers.0.qkv"][:, -2], before["layers.0.qkv"][:, -2])


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(undisturbed, inputs, start, tmp_path):
    config = config_in(inputs, start, tmp_path / "run", ema_decay=0.5)
    assert not run(config, at_evaluation(1, terminate)).finished
    assert run(config, Extensions(evaluators=(total_weight,))).finished
    assert_same_run(undisturbed, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.ci
def test_an_interrupted_run_of_experts_goes_on_as_well(inputs, tmp_path):
    shape = run_values(inputs, inputs)["model"]["shape"] | {
        "architecture": "qwen3_moe", "num_experts": 4, "num_experts_per_token": 2, "moe_intermediate_size": 8,
    }  # fmt: skip
    purpose = {"objective": "block_diffusion", "block_size": 4, "mask_token_id": 30}
    model = Model(ModelConfig(**shape, **purpose), jax.random.key(3))
    start = tmp_path / "start"
    save_pretrained(model, start, tokenizer_from=inputs / "tokenizer")
    lora = {"target_modules": ["all-linear"], "base_dtype": "int8"}
    whole, parts = (
        config_in(inputs, start, tmp_path / name, lora=lora) for name in ("whole", "parts")
    )
    extensions = Extensions(evaluators=(total_weight,))
    assert run(whole, extensions).finished
    assert not run(parts, at_evaluation(1, terminate)).finished
    assert run(parts, extensions).finished
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    adapted = adapters.load(load_pretrained(start), tmp_path / "whole" / "adapter")
    low_rank = weights_of(adapted)["layers.0.experts_down.lora_b.down_proj"]
    assert low_rank.any(axis=(1, 2)).all()


def test_the_base_stays_bit_for_bit(inputs, start, tmp_path):
    seen = []

    def note(step, line, model):
        seen.append(weights_of(model()))

    train(config_in(inputs, start, tmp_path / "run"), callbacks=(note,))
    before = weights_of(stack_layers(load_pretrained(start)))
    for now in seen:
        for name, expected in before.items():
            np.testing.assert_array_equal(now.get(f"{name}.base", now.get(name)), expected)
    low_rank = [name for name in seen[0] if ".lora_" in name]
    assert low_rank and all((seen[0][name] != seen[-1][name]).any() for name in low_rank)


def test_an_int8_base_is_learned_beside(inputs, start, tmp_path):
    lora = {"base_dtype": "int8", "target_modules": ["all-linear"]}
    seen = []

    def note(step, line, model):
        assert np.isfinite(line["loss"])
        seen.append(weights_of(model()))

    train(config_in(inputs, start, tmp_path / "run", lora=lora), callbacks=(note,))
    first, last = seen[0], seen[-1]
    integers = [name for name in first if first[name].dtype == np.int8]
    # Four weights in the stack of the first two layers, and four in the last one.
    assert len(integers) == 8 and all(".base.qvalue" in name for name in integers)
    for name in first:
        assert (".lora_" in name) == bool((first[name] != last[name]).any()), name


def test_modules_are_trained_whole(inputs, start, tmp_path):
    lora = {"modules_to_save": ["embed_tokens", "lm_head"]}
    train(config_in(inputs, start, tmp_path / "run", lora=lora))
    before = load_pretrained(start)
    after = adapters.load(load_pretrained(start), tmp_path / "run" / "adapter")
    for field in ("embedding", "head"):
        trained = getattr(after, field)[...]
        assert (trained != getattr(before, field)[...]).any()
        exported = getattr(load_pretrained(tmp_path / "run" / "model"), field)[...]
        np.testing.assert_array_equal(trained, exported)


def test_two_answers_to_what_is_trained_are_refused(inputs, start, tmp_path):
    with refused(ConfigError, "lora and trainable", "modules_to_save"):
        train(config_in(inputs, start, tmp_path / "run"), trainable=lambda name: True)


def test_a_run_is_not_resumed_with_another_rank(undisturbed, inputs, start):
    config = config_in(inputs, start, undisturbed, ema_decay=0.5, lora={"r": 3}, steps=7)
    with refused(ConfigError, "lora.r (was 2, is 3)", "new run_dir"):
        run(config)


def test_flags(inputs, start, tmp_path, write_yaml):
    values = {**run_values(inputs, tmp_path / "run"), "model": {"init_from": str(start)}}
    config = read_command_line(
        [write_yaml(values), "--lora.r", "8", "--lora.target_modules", "q_proj"]
    )
    assert config.lora is not None
    assert (config.lora.r, config.lora.target_modules) == (8, ("q_proj",))
    assert read_command_line([write_yaml(values)]).lora is None


@pytest.mark.slow
@pytest.mark.ci
def test_meshes_give_the_same_losses(tmp_path):
    """Weights split over fsdp, and over tensor alone; int8 rounds a little. Experts over four devices, and on each."""
    found = json.loads(run_module("tests.training.lora_on_mesh", tmp_path).splitlines()[-1])
    expected = found["float32 rows"]
    np.testing.assert_allclose(found["float32 split"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["int8 split"], found["int8 rows"], rtol=1e-5)
    np.testing.assert_allclose(found["int8 rows"], expected, rtol=1e-2)
    np.testing.assert_allclose(found["experts split"], found["experts rows"], rtol=1e-5)
