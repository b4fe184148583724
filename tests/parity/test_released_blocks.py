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
from sdar_jax.errors import ConfigError
from sdar_jax.hf import read_model_config
from sdar_jax.model import Model, stack_layers
from sdar_jax.model.quantization import QArray
from tests.bad_input import refused
from tests.parity.test_released import every_warning_is_new, tokens  # noqa: F401 (a fixture)
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


@pytest.mark.parametrize("name", [FAST, MINI])
def test_loss_and_gradients(name: str, models: dict[str, Model], tmp_path: Path) -> None:
    """Over [noisy | clean], stacked for training: Fast-dLLM's of the token after each position."""
    model = stack_layers(jax.tree.map(jnp.copy, models[name]))
    clean = np.asarray([tokens(64)])
    masked = np.random.default_rng(1).random(clean.shape) < 0.5
    # The first token has none before it.
    weights = masked & (np.arange(64) >= model.config.shifted)

    def loss(model: Model) -> jax.Array:
        noisy = np.where(masked, MASK, clean)
        return sdar_jax.block_diffusion_loss(
            model, clean, noisy, weights.astype(np.float32), block_size=32
        )

    value, gradient = jax.jit(jax.value_and_grad(loss))(model)
    assert float(value) == pytest.approx(float(EXPECTED[f"{name}/loss"]), rel=1e-5)
    # A gradient has the shape of a model, so saving it gives it the released names.
    sdar_jax.save_pretrained(gradient, tmp_path / "gradient")
    ours = load_file(tmp_path / "gradient" / "model.safetensors")
    prefix = f"{name}/gradient/"
    theirs = {key.removeprefix(prefix): EXPECTED[key] for key in EXPECTED if key.startswith(prefix)}
    assert len(theirs) >= 2
    for tensor, wanted in theirs.items():
        assert error(ours[tensor], wanted) <= 2e-5, tensor
    assert not any(ours[tensor].any() for tensor in ours if tensor.endswith("expert_bias"))


@pytest.mark.parametrize(
    "change",
    [
        {"partial_rotary_factor": 1.0, "rotary_dim": 16},
        {"partial_rotary_factor": 0.25, "rotary_dim": 4},
        {"n_group": 1, "topk_group": 1},
        {"n_group": 2, "topk_group": 1},
        {"topk_group": 3},
        {"routed_scaling_factor": 1.0},
        {"norm_topk_prob": False},
        {"num_experts_per_tok": 2},
        {"rope_theta": 10000},
        {"rms_norm_eps": 1e-2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_that_leaves_the_shapes_alone_changes_the_logits(
    change: dict, models: dict[str, Model]
) -> None:
    model = jax.tree.map(lambda leaf: leaf, models[MINI])
    config = ModelConfig.from_hf({**LLADA2, "block_size": 32, "mask_token_id": MASK, **change})
    changed = Model(config, jax.random.key(0))
    leaves = jax.tree.leaves(model)
    changed = jax.tree.unflatten(jax.tree.structure(changed), leaves)
    assert error(logits(changed), EXPECTED[f"{MINI}/logits"]) > 1e-3


@pytest.mark.parametrize(
    ("layer", "field"),
    [
        (0, "down"),
        (1, "expert_bias"),
        (1, "router"),
        (1, "shared_down"),
        (2, "shared_gate_up"),
        (2, "experts_down"),
        (2, "q_norm"),
        (2, "k_norm"),
    ],
)
def test_every_part_counts(layer: int, field: str, models: dict[str, Model]) -> None:
    model = jax.tree.map(jnp.copy, models[MINI])
    weight = getattr(model.layers[layer], field)
    weight[...] = jnp.zeros_like(weight[...])
    assert error(logits(model), EXPECTED[f"{MINI}/logits"]) > 1e-3


def test_merged_experts_are_read_and_saved_as_released(
    directories: dict[str, Path], models: dict[str, Model], tmp_path: Path
) -> None:
    """dFactory's directories: model_type llada2_moe_veomni, and a tensor for all experts' matrices of one kind."""
    released = load_file(directories[MINI] / "model.safetensors")
    merged = {name: array for name, array in released.items() if ".experts." not in name}
    for layer in (1, 2):
        for kind in ("gate_proj", "up_proj", "down_proj"):
            of = f"model.layers.{layer}.mlp.experts"
            merged[f"{of}.{kind}"] = np.stack(
                [released[f"{of}.{i}.{kind}.weight"] for i in range(12)]
            )
    config = {**LLADA2, "model_type": "llada2_moe_veomni", "mask_token_id": MASK}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(merged, tmp_path / "model.safetensors")
    model = sdar_jax.load_pretrained(tmp_path, dtype="float32")
    for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(models[MINI]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    sdar_jax.save_pretrained(model, tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == released.keys()
    assert read_model_config(tmp_path / "saved") == model.config
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written["model_type"] == "llada2_moe"


def test_int8_is_near(directories: dict[str, Path]) -> None:
    """Shared experts and dense layers are quantised with the rest. Few tokens come to other experts by it."""
    model = sdar_jax.load_pretrained(directories[MINI], dtype="int8")
    assert isinstance(model.layers[1].shared_down[...], QArray)
    assert isinstance(model.layers[0].gate_up[...], QArray)
    theirs = EXPECTED[f"{MINI}/logits"]
    assert 1e-4 < np.median(np.abs(logits(model) - theirs)) / np.abs(theirs).max() < 0.05


def test_biases_stay_wide(directories: dict[str, Path]) -> None:
    model = sdar_jax.load_pretrained(directories[MINI], dtype="bfloat16")
    wide = [leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(model)]
    assert sum(wide) == 2 and model.layers[1].expert_bias.dtype == jnp.float32


@pytest.mark.parametrize(
    ("name", "config", "vocab_size", "mask", "block_size"),
    [
        (FAST, FAST_DLLM, 152064, 151665, None),
        ("Fast_dLLM_v2_1.5B", FAST_DLLM, 151936, 151665, None),
        (MINI, LLADA2, 157184, 156895, 32),
    ],
)
def test_the_mask_that_no_file_says_is_the_familys(
    name: str,
    config: dict,
    vocab_size: int,
    mask: int,
    block_size: int | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    directory = tmp_path / name
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**config, "vocab_size": vocab_size}))
    read = read_model_config(directory)
    assert (read.mask_token_id, read.block_size) == (mask, 32)
    assert f"mask_token_id {mask} (the usual one)" in caplog.text
    assert ("block_size 32 (the usual one)" in caplog.text) == (block_size is not None)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"norm_head": True}, "norm_head True is not supported"),
        ({"score_function": "softmax"}, "score_function 'softmax' is not supported"),
        ({"n_group": None}, "config.json lacks n_group"),
        ({"rotary_dim": 16}, "rotary_dim is 16 and partial_rotary_factor 0.5"),
        ({"n_group": 5}, "num_expert_groups is 5; give a divisor of num_experts 12"),
        ({"n_group": 12}, "that leaves two for each"),
        ({"topk_group": 5}, "groups_per_token 5 is more than num_expert_groups 4"),
        ({"num_experts_per_tok": 7}, "num_experts_per_token 7 is more than 2 of 4 groups"),
        ({"first_k_dense_replace": 3}, "num_dense_layers 3 leaves no layer of 3"),
        ({"num_shared_experts": -1}, "num_shared_experts is -1; give an integer of 0 or more"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor is 0; give a positive number"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5; give a number above 0"),
        ({"partial_rotary_factor": 0.2, "rotary_dim": None}, "rotates 3 dimensions"),
        ({"experts_capacity": 48}, "experts_capacity may change what the model computes"),
    ],
    ids=str,
)
def test_what_a_llada2_may_not_be_is_named(change: dict, told: str) -> None:
    assert ModelConfig.from_hf(LLADA2).num_experts == 12
    with refused(ConfigError, told):
        ModelConfig.from_hf({**LLADA2, **change})


def test_other_architectures_have_no_groups_or_shared_experts() -> None:
    with refused(ConfigError, "architecture 'qwen3_moe' has no num_shared_experts"):
        dataclasses.replace(ModelConfig.preset("qwen3-30b-a3b"), num_shared_experts=1)
    with refused(ConfigError, "partial_rotary_factor 0.5 is not supported"):
        ModelConfig.from_hf({**FAST_DLLM, "partial_rotary_factor": 0.5})
