"""`--tiny`: only sizes shrink, and what runs in a minute here is the recipe's own path, from its files to a model."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sdar_jax import DecodingConfig, generate, load_pretrained
from sdar_jax.devices.sharding import MeshConfig
from sdar_jax.errors import ConfigError
from sdar_jax.training import (
    EvalConfig,
    InitConfig,
    OptimizerConfig,
    TrainConfig,
    read_config,
    run,
    tiny,
)
from sdar_jax.training.config_io import to_values
from sdar_jax.training.resolve_model import starting_shape, trained_shape
from tests.recipes.conftest import CONFIGS, RECIPES, ROOT, flat
from tests.virtual_devices import run_module

DEMO = sorted(f"demo/{path.stem}" for path in (CONFIGS / "demo").glob("*.yaml"))
MANY_BLOCKS = sorted(
    f"{path.parent.name}/{path.stem}" for path in CONFIGS.glob("multiblock*/*.yaml")
)
SIZES = {
    "run_dir",
    "steps",
    "model.init_from",
    "model.tokenizer",
    "data.sources.0.path",
    "data.sequence_length",
    "data.batch_size",
    "data.noisy_length",
    "optimizer.warmup",
    "optimizer.decay",
    "block_sizes.1.0",
    "checkpoint.every",
    "mesh.fsdp",
    "mesh.expert",
    "mesh.context",
    "micro_batch_size",
    "log_every",
}
# Of a shape, what says how it computes and not how much.
KINDS = (
    "architecture",
    "qk_norm",
    "tie_embeddings",
    "norm_topk_prob",
    "router_aux_loss_coef",
    "rope",
    "qkv_bias",
)
KINDS += ("objective", "block_size", "block_origin")


def recipe_at(recipe: str, home: Path) -> TrainConfig:
    """The recipe, with a run_dir under `home`."""
    config = read_config(CONFIGS / f"{recipe}.yaml")
    return replace(config, run_dir=str(home / config.run_dir))


@pytest.fixture
def unwritten(monkeypatch: pytest.MonkeyPatch) -> list:
    """No weights are made; the shapes that would have been."""
    shapes = []
    module = sys.modules[tiny.__module__]
    monkeypatch.setattr(module, "Model", lambda shape, key: shapes.append(shape))
    monkeypatch.setattr(module, "save_pretrained", lambda *_, **__: None)
    return shapes


@pytest.mark.parametrize("recipe", [*DEMO, "lora/8b_sft", *MANY_BLOCKS, *RECIPES])
def test_only_sizes_shrink(recipe, tmp_path, unwritten):
    config = recipe_at(recipe, tmp_path)
    small = tiny(config)
    before, after = (
        {
            name: value
            for name, value in flat(to_values(run)).items()
            if not name.startswith("model.shape.")
        }
        for run in (config, small)
    )
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} <= SIZES
    assert all((before[name] is None) == (after[name] is None) for name in before)
    start, own = starting_shape(config.model), unwritten[0] if unwritten else small.model.shape
    assert [getattr(own, name) for name in KINDS] == [getattr(start, name) for name in KINDS]
    assert (own.num_heads > own.num_kv_heads) == (start.num_heads > start.num_kv_heads)
    assert own.num_kv_heads > 1
    assert (own.num_experts > own.num_experts_per_token > 1) == bool(start.num_experts)
    block = trained_shape(config.model).block_size or 1
    assert small.data.sequence_length >= min(8 * block, config.data.sequence_length)
    parts = [
        run.data.batch_size // (run.micro_batch_size or run.data.batch_size)
        for run in (config, small)
    ]
    assert (parts[0] > 1) == (parts[1] > 1)


def test_a_start_on_this_machine_says_its_own_shape(tmp_path, unwritten):
    config = recipe_at("study2/1.7b_cpt", tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps(replace(starting_shape(config.model), qkv_bias=True).to_hf())
    )
    tiny(replace(config, model=replace(config.model, init_from=str(tmp_path))))
    assert unwritten[0].qkv_bias


def test_a_start_that_says_nothing(tmp_path):
    config = recipe_at("study2/1.7b_cpt", tmp_path)
    for name in ("org/unknown-1b", "Qwen/Qwen3-999B", ""):
        with pytest.raises(ConfigError, match=f"{name}.*hub id of a Qwen3, SDAR"):
            tiny(replace(config, model=InitConfig(init_from=name)))
    with pytest.raises(ConfigError, match="runs/nowhere/run/model.*no recipe"):
        tiny(replace(config, model=InitConfig(init_from="runs/nowhere/run/model")))
    assert not list(tmp_path.iterdir())


def test_what_is_not_its_own_is_left_alone(tmp_path, unwritten):
    config = recipe_at("study2/1.7b_cpt", tmp_path)
    home = Path(f"{config.run_dir}-tiny")
    home.mkdir(parents=True)
    (home / "notes").touch()
    with pytest.raises(ConfigError, match="in the way"):
        tiny(config)
    assert (home / "notes").exists()
    (home / "notes").rename(tmp_path / "notes")
    home.rmdir()
    tiny(config)
    (home / "checkpoints").mkdir()
    tiny(config)
    assert not (home / "checkpoints").exists() and (home / "inputs").exists()


@pytest.mark.parametrize(
    "devices, wanted, sizes",
    [
        (1, {"fsdp": -1, "expert": 8, "context": 4}, {}),
        (8, {"fsdp": -1, "expert": 8, "context": 4}, {"fsdp": 2, "expert": 2, "context": 2}),
        (8, {"fsdp": -1, "expert": 8}, {"fsdp": 4, "expert": 2}),
        (8, {"fsdp": -1}, {"fsdp": 8}),
        (8, {"fsdp": 1, "tensor": 4}, {"tensor": 4, "data": 2}),
        (12, {"fsdp": 2, "tensor": -1}, {"fsdp": 2, "tensor": 2, "data": 3}),
        (1024, {"fsdp": -1}, {"fsdp": 64, "data": 16}),
    ],
)
def test_mesh(devices, wanted, sizes, tmp_path, unwritten, monkeypatch):
    monkeypatch.setattr("jax.device_count", lambda: devices)
    small = tiny(replace(recipe_at("study4/sci_cpt", tmp_path), mesh=MeshConfig(**wanted)))
    assert small.mesh == MeshConfig(**({"fsdp": 1} | sizes))
    rows = small.mesh.data * small.mesh.fsdp * small.mesh.expert
    assert small.micro_batch_size is not None and small.micro_batch_size % rows == 0
    assert math.prod(small.mesh.sizes(devices).values()) == devices


@pytest.mark.parametrize(
    "warmup, decay, expected",
    [
        (0.03, 0.1, (1, 1)),
        (2000, 0, (2, 0)),
        (0.5, 0.5, (2, 2)),
        (0.6, 0.4, (2, 1)),
        (0, 1000, (0, 1)),
        (3000, 1, (3, 1)),
    ],
)
def test_schedule(warmup, decay, expected, tmp_path, unwritten):
    optimizer = OptimizerConfig(schedule="wsd", warmup=warmup, decay=decay)
    config = replace(recipe_at("study2/8b_cpt", tmp_path), steps=4000, optimizer=optimizer)
    small = tiny(config)
    assert (small.optimizer.warmup, small.optimizer.decay) == expected


def test_a_run_of_epochs_has_few_steps_too(tmp_path, unwritten):
    optimizer = OptimizerConfig(schedule="wsd", warmup=2000, decay=0.1)
    small = tiny(
        replace(recipe_at("study2/8b_cpt", tmp_path), steps=None, epochs=3, optimizer=optimizer)
    )
    assert (small.steps, small.epochs, small.optimizer.warmup, small.optimizer.decay) == (
        4,
        None,
        1,
        1,
    )


def test_an_evaluation_shrinks_too(tmp_path, unwritten):
    config = recipe_at("study2/8b_sft", tmp_path)
    small = tiny(replace(config, eval=EvalConfig(config.data, every=500, rows=4096)))
    assert small.eval is not None and (small.eval.every, small.eval.rows) == (2, 2)
    assert small.eval.data.sequence_length == small.data.sequence_length
    assert small.eval.data.sources != small.data.sources


def check_run(recipe: str, config: TrainConfig) -> None:
    """Trains, and decodes with what was exported."""
    assert run(config).finished
    expected = trained_shape(read_config(CONFIGS / f"{recipe}.yaml").model)
    model = load_pretrained(Path(config.run_dir) / "model")
    own = model.config
    assert (own.objective, own.architecture, bool(own.num_experts)) == (
        expected.objective,
        expected.architecture,
        bool(expected.num_experts),
    )
    if expected.objective == "block_diffusion":
        assert own.block_size == expected.block_size
    strategies = {
        "autoregressive": DecodingConfig(strategy="autoregressive"),
        "masked_diffusion": DecodingConfig(strategy="semi_autoregressive", block_size=16),
        "block_diffusion": DecodingConfig(),
    }
    decoding = strategies[expected.objective]
    block = decoding.resolve_block_size(own)
    assert block == (expected.block_size or (16 if expected.objective == "masked_diffusion" else 1))
    new = block + 3
    done = generate(model, [[70, 71, 72], [80]], decoding, max_new_tokens=new, stop_token_ids=())
    assert [len(one.tokens) for one in done] == [new, new]
    assert all(own.mask_token_id not in one.tokens for one in done)


IN_CI = {
    *("study2/8b_cpt", "study2/1.7b_sft", "study2/30b-a3b_cpt"),
    *("multiblock/8b_b4_math", "multiblock/dream_7b_d2f"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(name, marks=[pytest.mark.ci] * (name in IN_CI))
        for name in [
            "demo/pretrain",
            "demo/block4_sft",
            "lora/8b_sft",
            *MANY_BLOCKS,
            *RECIPES,
        ]
    ],
)
def test_every_recipe_runs(recipe, tmp_path):
    config = tiny(recipe_at(recipe, tmp_path))
    check_run(recipe, config)
    lines = [
        json.loads(line)
        for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert ("balance_loss" in lines[-1]) == ("30b" in recipe or "sci" in recipe)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", ["study2/4b_cpt", "study2/30b-a3b_sft", "study4/sci_cpt", "study4/sci_sft"]
)
def test_on_eight_devices(recipe, tmp_path):
    """With the axes of its mesh: positions, and what is left on fsdp."""
    printed = run_module("tests.recipes.on_mesh", recipe, tmp_path)
    used = json.loads(printed.splitlines()[-1])
    wanted = read_config(CONFIGS / f"{recipe}.yaml").mesh
    assert math.prod(used.values()) == 8
    assert {axis for axis, size in used.items() if size > 1} == {
        axis for axis, size in vars(wanted).items() if size != 1
    }


@pytest.mark.slow
@pytest.mark.ci
def test_the_command(tmp_path):
    """`train.py RECIPE --tiny`, with an option that holds for the small run."""
    (tmp_path / "configs").symlink_to(CONFIGS)
    command = [
        sys.executable,
        ROOT / "train.py",
        "configs/study2/1.7b_cpt.yaml",
        "--tiny",
        "--steps",
        "2",
    ]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stderr.startswith("tiny: ")
        and "runs/study2/1.7b_cpt-tiny" in done.stderr.splitlines()[0]
    )
    assert "step 2/2" in done.stdout
    assert (tmp_path / "runs/study2/1.7b_cpt-tiny/model/config.json").exists()
    assert [path.name for path in (tmp_path / "runs/study2").iterdir()] == ["1.7b_cpt-tiny"]
