"""ModelConfig: released shapes, config.json in and out, and what it refuses."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import pytest

from sdar_jax.config import PRESETS, ModelConfig, RopeConfig
from sdar_jax.errors import CheckpointError, ConfigError
from sdar_jax.model import Model

# As published: the tensors of the released checkpoints, added up.
PARAMETERS = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "sdar-1.7b": 1_720_574_976 + 151_936 * 2048,
    "sdar-4b": 4_022_468_096 + 151_936 * 2560,
    "sdar-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "sdar-30b-a3b": 30_532_122_624,
}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_have_the_released_sizes(name: str) -> None:
    config = ModelConfig.preset(name)
    model = jax.eval_shape(partial(Model, config, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == PARAMETERS[name]
    assert config.rope == RopeConfig(1e6) and config.rms_norm_eps == 1e-6 and config.head_dim == 128
    assert (config.objective == "block_diffusion") == name.startswith("sdar")


YARN = RopeConfig(5e3, "yarn", 4.0, beta_fast=16.0, beta_slow=2.0, attention_factor=0.9)
SMALL = ModelConfig(40, 16, 24, 3, 4, 2, 8, bos_token_id=1, eos_token_id=2, stop_token_ids=(2,))
ODD = {
    "qwen3": dataclasses.replace(SMALL, qkv_bias=True, output_bias=True, rope=YARN, rms_norm_eps=1e-4),
    "qwen2": dataclasses.replace(SMALL, architecture="qwen2", qk_norm=False, qkv_bias=True, tie_embeddings=True),
    "llama": dataclasses.replace(
        SMALL, architecture="llama", qk_norm=False, mlp_bias=True, max_position_embeddings=99, initializer_range=0.3
    ),
}
EXPERTS = {"num_experts": 6, "num_experts_per_token": 3, "moe_intermediate_size": 10}
ODD["qwen3_moe"] = dataclasses.replace(
    SMALL, architecture="qwen3_moe", norm_topk_prob=False, router_aux_loss_coef=0.02, **EXPERTS
)
PURPOSES = [
    {},
    {"objective": "block_diffusion", "block_size": 8, "mask_token_id": 39},
    {"objective": "block_diffusion", "block_size": 8, "mask_token_id": 39, "block_origin": "response"},
    {"objective": "masked_diffusion", "mask_token_id": 5},
]


@pytest.mark.parametrize("purpose", PURPOSES)
@pytest.mark.parametrize("name", sorted(ODD))
def test_config_json_round_trip(name: str, purpose: dict) -> None:
    config = dataclasses.replace(ODD[name], **purpose)
    values = json.loads(json.dumps(config.to_hf()))
    assert ModelConfig.from_hf(values) == config
    assert values["model_type"] == ({"qwen3_moe": "sdar_moe"}.get(name, "sdar") if purpose else name)


def test_a_hosted_sdar_config() -> None:
    """block_size and mask_token_id may be missing; fields of no consequence are there."""
    values = {**PRESETS["sdar-8b"].to_hf(), "auto_map": {"AutoModel": "x"}, "fuse_cross_entropy": True, "debug": False}
    assert dataclasses.replace(ModelConfig.from_hf(values), stop_token_ids=(151645, 151643)) == PRESETS["sdar-8b"]
    bare = {key: value for key, value in values.items() if key not in ("block_size", "mask_token_id")}
    config = ModelConfig.from_hf(bare)
    assert config.objective == "block_diffusion" and config.block_size is None and config.mask_token_id is None


def test_defaults_are_those_of_transformers() -> None:
    """A config.json that leaves out what transformers has a default for."""
    small = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    qwen3 = ModelConfig.from_hf({**small, "model_type": "qwen3", "num_attention_heads": 4, "num_key_value_heads": 2})
    assert qwen3.head_dim == 128 and qwen3.qk_norm and not qwen3.qkv_bias and qwen3.rope == RopeConfig(1e4)
    llama = ModelConfig.from_hf({**small, "model_type": "llama", "num_attention_heads": 4})
    assert llama.head_dim == 4 and llama.num_kv_heads == 4 and not llama.qk_norm
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    mixture = ModelConfig.from_hf({**small, "model_type": "qwen3_moe", "num_attention_heads": 4, **experts})
    assert mixture.head_dim == 4 and mixture.qk_norm and not mixture.norm_topk_prob
    assert mixture.router_aux_loss_coef == 0.001


GOOD = SMALL.to_hf()
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
BAD = {
    "model type": ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; only 'silu'"),
    "sliding window": ({"use_sliding_window": True}, "use_sliding_window is true; only full"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads is 0; give a positive"),
    "size as text": ({"hidden_size": "16"}, "hidden_size is '16'; give a positive integer"),
    "layers": ({"num_hidden_layers": -1}, "num_hidden_layers is -1; give"),
    "group": ({"num_key_value_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
    "odd head": ({"head_dim": 7}, "head_dim is 7; rotary embedding needs an even number"),
    "eps": ({"rms_norm_eps": None}, "rms_norm_eps is None; give a positive number"),
    "block size": ({"block_size": 0}, "block_size is 0; give a positive integer"),
    "mask": ({"mask_token_id": 40}, "mask_token_id is 40; give an id of the vocabulary, 0 to 39"),
    "mask as text": ({"mask_token_id": "5"}, "mask_token_id is '5'; give an id of the vocabulary"),
    "origin": ({"block_origin": "end"}, "block_origin 'end' is unknown; use one of"),
    "rope type": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not supported"),
    "rope factor": ({"rope_scaling": {"rope_type": "linear"}}, "of type 'linear' lacks factor; add"),
    "rope field": ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 1.0}}, r"fields \['mscale'\]"),
    "rope zero": ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "rope factor is 0; give a positive"),
    "theta": ({"rope_theta": "1e6"}, "rope theta is '1e6'; give a positive number"),
    "llama3": ({"rope_scaling": LLAMA3}, "needs original_max_position_embeddings; add"),
}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_config_json(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ModelConfig.from_hf({**GOOD, **change})
    assert "\n" not in str(caught.value)


BAD_EXPERTS = {
    "sparse step": ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2; only 1 is supported, experts in every"),
    "dense layers": ({"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]; only an empty list is supported"),
    "none": ({"num_experts": 0}, "num_experts is 0; architecture 'qwen3_moe' needs a positive integer"),
    "width": ({"moe_intermediate_size": "8"}, "moe_intermediate_size is '8'; architecture 'qwen3_moe' needs"),
    "chosen": ({"num_experts_per_tok": 7}, "num_experts_per_token 7 is more than num_experts 6; give"),
    "coefficient": ({"router_aux_loss_coef": -1}, "router_aux_loss_coef is -1; give a number >= 0"),
    "missing": ({"num_experts": None}, "config.json lacks num_experts; restore the file"),
}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(("change", "message"), BAD_EXPERTS.values(), ids=BAD_EXPERTS)
def test_bad_mixtures(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ModelConfig.from_hf({**ODD["qwen3_moe"].to_hf(), **change})
    assert "\n" not in str(caught.value)


def test_experts_of_a_dense_model_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="architecture 'qwen3' has no experts; leave out num_experts, num_experts_per"
    ):
        dataclasses.replace(SMALL, **EXPERTS)
    with pytest.raises(ConfigError, match="mlp_bias is True; experts have none, leave it out"):
        dataclasses.replace(ODD["qwen3_moe"], mlp_bias=True)


def test_what_is_missing_is_listed() -> None:
    with pytest.raises(ConfigError, match="lacks vocab_size, hidden_size; restore"):
        ModelConfig.from_hf({key: GOOD[key] for key in GOOD if key not in ("vocab_size", "hidden_size")})


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[]", "not a JSON object"), (None, "no such file")])
def test_bad_files(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"config.json: {message}.*; (restore|give)"):
        ModelConfig.from_hf(tmp_path)


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="preset 'sdar-9b' is unknown; use one of"):
        ModelConfig.preset("sdar-9b")
