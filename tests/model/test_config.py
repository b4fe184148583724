"""ModelConfig: released shapes, config.json in and out, and what it refuses."""

import dataclasses
import json
import math
import re
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from sdar_jax.errors import CheckpointError, ConfigError
from sdar_jax.model import Model, hf_fields, rope_config
from sdar_jax.model.config import PRESETS, ModelConfig, RopeConfig
from sdar_jax.model.hf_fields import SUPPORTED_AT
from sdar_jax.model.rope import rope_frequencies

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


# As LLaDA's and Qwen2.5's model cards count them.
CANVAS = {"llada-8b": 8_015_581_184, "dream-7b": 7_615_616_512}


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_presets_have_the_released_sizes(name: str) -> None:
    config = ModelConfig.preset(name)
    model = jax.eval_shape(partial(Model, config, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == PARAMETERS[name]
    assert config.rope == RopeConfig(1e6) and config.rms_norm_eps == 1e-6 and config.head_dim == 128
    assert (config.objective == "block_diffusion") == name.startswith("sdar")


def test_llada2_mini_has_16_billion_weights() -> None:
    """As its model card says; the config is its published one."""
    assert set(PRESETS) == {*PARAMETERS, *CANVAS, "llada2-mini"}
    config = ModelConfig.preset("llada2-mini")
    model = jax.eval_shape(partial(Model, config, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == pytest.approx(16e9, rel=0.02)
    assert ModelConfig.from_hf(config.to_hf()) == config


YARN = RopeConfig(5e3, "yarn", 4.0, beta_fast=16.0, beta_slow=2.0, attention_factor=0.9)
SMALL = ModelConfig(40, 16, 24, 3, 4, 2, 8, bos_token_id=1, eos_token_id=2, stop_token_ids=(2,))
ODD = {
    "qwen3": dataclasses.replace(
        SMALL, qkv_bias=True, output_bias=True, rope=YARN, rms_norm_eps=1e-4
    ),
    "qwen2": dataclasses.replace(
        SMALL, architecture="qwen2", qk_norm=False, qkv_bias=True, tie_embeddings=True
    ),
    "llama": dataclasses.replace(
        SMALL,
        architecture="llama",
        qk_norm=False,
        mlp_bias=True,
        max_position_embeddings=99,
        initializer_range=0.3,
    ),
}
EXPERTS = {"num_experts": 6, "num_experts_per_token": 3, "moe_intermediate_size": 10}
ODD["qwen3_moe"] = dataclasses.replace(
    SMALL, architecture="qwen3_moe", norm_topk_prob=False, router_aux_loss_coef=0.02, **EXPERTS
)
PURPOSES = [
    {},
    {"objective": "block_diffusion", "block_size": 8, "mask_token_id": 39},
    {
        "objective": "block_diffusion",
        "block_size": 8,
        "mask_token_id": 39,
        "block_origin": "response",
    },
    {"objective": "masked_diffusion", "mask_token_id": 5},
]


@pytest.mark.parametrize("purpose", PURPOSES)
@pytest.mark.parametrize("name", sorted(ODD))
def test_config_json_round_trip(name: str, purpose: dict) -> None:
    config = dataclasses.replace(ODD[name], **purpose)
    values = json.loads(json.dumps(config.to_hf()))
    assert ModelConfig.from_hf(values) == config
    assert values["model_type"] == (
        {"qwen3_moe": "sdar_moe"}.get(name, "sdar") if purpose else name
    )


def test_a_hosted_sdar_config() -> None:
    """block_size and mask_token_id may be missing; fields of no consequence are there."""
    values = {
        **PRESETS["sdar-8b"].to_hf(),
        "auto_map": {"AutoModel": "x"},
        "fuse_cross_entropy": True,
        "debug": False,
    }
    assert (
        dataclasses.replace(ModelConfig.from_hf(values), stop_token_ids=(151645, 151643))
        == PRESETS["sdar-8b"]
    )
    bare = {
        key: value for key, value in values.items() if key not in ("block_size", "mask_token_id")
    }
    config = ModelConfig.from_hf(bare)
    assert (
        config.objective == "block_diffusion"
        and config.block_size is None
        and config.mask_token_id is None
    )


def test_defaults_are_those_of_transformers() -> None:
    """A config.json that leaves out what transformers has a default for."""
    small = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    qwen3 = ModelConfig.from_hf(
        {**small, "model_type": "qwen3", "num_attention_heads": 4, "num_key_value_heads": 2}
    )
    assert (
        qwen3.head_dim == 128
        and qwen3.qk_norm
        and not qwen3.qkv_bias
        and qwen3.rope == RopeConfig(1e4)
    )
    llama = ModelConfig.from_hf({**small, "model_type": "llama", "num_attention_heads": 4})
    assert llama.head_dim == 4 and llama.num_kv_heads == 4 and not llama.qk_norm
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    moe = ModelConfig.from_hf(
        {**small, "model_type": "qwen3_moe", "num_attention_heads": 4, **experts}
    )
    assert moe.head_dim == 4 and moe.qk_norm and not moe.norm_topk_prob
    assert moe.router_aux_loss_coef == 0.001


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
    "eos": ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; give a token id, or a list of them"),
    "eos list": (
        {"eos_token_id": [2, None]},
        r"eos_token_id is \[2, None\]; give a token id, or a list",
    ),
    "mask": ({"mask_token_id": 40}, "mask_token_id is 40; give an id of the vocabulary, 0 to 39"),
    "mask as text": ({"mask_token_id": "5"}, "mask_token_id is '5'; give an id of the vocabulary"),
    "origin": ({"block_origin": "end"}, "block_origin 'end' is unknown; use one of"),
    "rope type": (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        "rope_type 'dynamic' is not supported",
    ),
    "rope factor": (
        {"rope_scaling": {"rope_type": "linear"}},
        "of type 'linear' lacks factor; add",
    ),
    "rope field": (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 1.0}},
        r"fields \['mscale'\]",
    ),
    "rope zero": (
        {"rope_scaling": {"rope_type": "linear", "factor": 0}},
        "rope factor is 0; give a positive",
    ),
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
    "sparse step": (
        {"decoder_sparse_step": 2},
        "decoder_sparse_step is 2; only 1 is supported, experts in every",
    ),
    "dense layers": (
        {"mlp_only_layers": [0]},
        r"mlp_only_layers is \[0\]; only an empty list is supported",
    ),
    "none": (
        {"num_experts": 0},
        "num_experts is 0; architecture 'qwen3_moe' needs a positive integer",
    ),
    "width": (
        {"moe_intermediate_size": "8"},
        "moe_intermediate_size is '8'; architecture 'qwen3_moe' needs",
    ),
    "chosen": (
        {"num_experts_per_tok": 7},
        "num_experts_per_token 7 is more than num_experts 6; give",
    ),
    "coefficient": ({"router_aux_loss_coef": -1}, "router_aux_loss_coef is -1; give a number >= 0"),
    "missing": ({"num_experts": None}, "config.json lacks num_experts; restore the file"),
}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(("change", "message"), BAD_EXPERTS.values(), ids=BAD_EXPERTS)
def test_bad_moes(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ModelConfig.from_hf({**ODD["qwen3_moe"].to_hf(), **change})
    assert "\n" not in str(caught.value)


def test_experts_of_a_dense_model_are_refused() -> None:
    with pytest.raises(
        ConfigError,
        match="architecture 'qwen3' has no experts; leave out num_experts, num_experts_per",
    ):
        dataclasses.replace(SMALL, **EXPERTS)
    with pytest.raises(ConfigError, match="mlp_bias is True; experts have none, leave it out"):
        dataclasses.replace(ODD["qwen3_moe"], mlp_bias=True)


def test_what_is_missing_is_listed() -> None:
    with pytest.raises(ConfigError, match="lacks vocab_size, hidden_size; restore"):
        ModelConfig.from_hf(
            {key: GOOD[key] for key in GOOD if key not in ("vocab_size", "hidden_size")}
        )


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not JSON"), ("[]", "not a JSON object"), (None, "no such file")]
)
def test_bad_files(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"config.json: {message}.*; (restore|give)"):
        ModelConfig.from_hf(tmp_path)


def test_presets_of_canvas_models_are_their_released_files() -> None:
    llada = {
        **{"model_type": "llada", "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32},
        **{"mlp_hidden_size": 12288, "vocab_size": 126464, "embedding_size": 126464},
        **{"mask_token_id": 126336, "eos_token_id": 126081, "rope_theta": 500000.0},
        **{"weight_tying": False, "rms_norm_eps": 1e-5, "max_sequence_length": 4096},
    }
    dream = {
        **{"model_type": "Dream", "hidden_size": 3584, "intermediate_size": 18944},
        **{"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4},
        **{"vocab_size": 152064, "mask_token_id": 151666, "bos_token_id": 151643},
        **{"eos_token_id": 151643, "rope_theta": 1e6, "max_position_embeddings": 131072},
        **{"rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    }
    assert ModelConfig.from_hf(llada) == ModelConfig.preset("llada-8b")
    assert ModelConfig.from_hf(dream) == ModelConfig.preset("dream-7b")
    for name, parameters in CANVAS.items():
        model = jax.eval_shape(partial(Model, ModelConfig.preset(name), jax.random.key(0)))
        assert sum(leaf.size for leaf in jax.tree.leaves(model)) == parameters


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="preset 'sdar-9b' is unknown; use one of"):
        ModelConfig.preset("sdar-9b")


@pytest.fixture(autouse=True)
def every_warning_is_new() -> None:
    """Warnings are said once a process; here, once a test."""
    hf_fields.warn_once.cache_clear()


# Of a hosted SDAR, and what other tools leave in a config.json.
BOILERPLATE = {
    "auto_map": {"AutoModel": "modeling_sdar.SDARModel"},
    "fuse_cross_entropy": True,
    "ep_size": 1,
    "micro_forward": False,
    "skip_checkpoint": False,
    "use_deepep": False,
    "debug": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 36,
    "layer_types": ["full_attention"] * 3,
    "transformers_version": "5.23.0",
    "torch_dtype": "bfloat16",
    "dtype": "bfloat16",
    "attn_implementation": "flash_attention_2",
    "pretraining_tp": 1,
    "pad_token_id": 0,
    "unsloth_version": "2025.1",
    "num_labels_of_no_consequence": None,
    "id2label": {"0": "LABEL_0"},
    "quantization_config": {},
    "partial_rotary_factor": 1.0,
    "temperature": 0.6,
}


def test_fields_that_change_nothing_are_read_over(caplog: pytest.LogCaptureFixture) -> None:
    for values in (SMALL.to_hf(), ODD["qwen3_moe"].to_hf(), PRESETS["sdar-8b"].to_hf()):
        plain = ModelConfig.from_hf(values)
        assert ModelConfig.from_hf({**values, **BOILERPLATE}) == plain
    assert not caplog.records


@pytest.mark.parametrize("name", sorted(ODD))
def test_what_transformers_itself_writes_is_known(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    transformers = pytest.importorskip("transformers")
    written = transformers.AutoConfig.for_model(
        **json.loads(json.dumps(ODD[name].to_hf()))
    ).to_dict()
    ModelConfig.from_hf(written)
    assert [record for record in caplog.records if "original_max" not in record.message] == []


def test_other_fields_are_refused_in_one_line(tmp_path: Path) -> None:
    values = {**SMALL.to_hf(), "zeta_gain": 2.0, "bd_size": 32, "sliding_window": 8}
    (tmp_path / "config.json").write_text(json.dumps(values))
    named = "bd_size, sliding_window, zeta_gain may change what the model computes"
    with pytest.raises(ConfigError, match=f"^{tmp_path}: {named}.*; remove") as raised:
        ModelConfig.from_hf(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_dense_model_with_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_experts, num_experts_per_tok may change"):
        ModelConfig.from_hf({**SMALL.to_hf(), "num_experts": 8, "num_experts_per_tok": 2})


LLADA = {
    "model_type": "llada",
    "d_model": 16,
    "n_layers": 2,
    "n_heads": 2,
    "mlp_hidden_size": 24,
    "vocab_size": 39,
    "embedding_size": 40,
}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["LLaDAMoEModelLM"]}, "architectures ['LLaDAMoEModelLM'] of model_type"),
        ({"mlp_hidden_size": None}, "config.json lacks mlp_hidden_size"),
        ({"n_heads": 0}, "n_heads is 0"),
        ({"block_type": "sequential"}, "block_type 'sequential' is not supported; only 'llama' is"),
        ({"rope": False}, "rope False is not supported"),
        ({"scale_logits": True}, "scale_logits True is not supported"),
        ({"include_qkv_bias": True}, "include_qkv_bias True is not supported"),
        ({"attention_layer_norm": True}, "attention_layer_norm True is not supported"),
        ({"input_emb_norm": True}, "input_emb_norm True is not supported"),
        ({"layer_norm_type": "default"}, "layer_norm_type 'default' is not supported"),
    ],
)
def test_what_a_llada_may_not_be_is_named_as_its_file_does(change: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        ModelConfig.from_hf({**LLADA, **change})
    assert ModelConfig.from_hf(LLADA).vocab_size == 40


def test_a_dream_of_another_class_is_refused() -> None:
    values = {**SMALL.to_hf(), "model_type": "Dream", "architectures": ["DreamForCausalLM"]}
    with pytest.raises(ConfigError, match="DreamForCausalLM.*; only 'DreamModel' is"):
        ModelConfig.from_hf(values)


UNSUPPORTED = {
    "use_regular_causal": True,
    "block_causal_prompt": True,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "partial_rotary_factor": 0.5,
    "clip_qkv": 8.0,
    "quantization_config": {"quant_method": "fp8", "ignored_layers": ["x"] * 100},
    "hidden_act": "gelu",
    "logits_scaling": 8.0,
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_fields_that_change_the_computation_are_refused(name: str) -> None:
    """At other values than ours; and the advice works."""
    values = {**SMALL.to_hf(), name: UNSUPPORTED[name]}
    with pytest.raises(
        ConfigError, match=f"{name} {re.escape(repr(UNSUPPORTED[name])[:60])} is not supported; "
    ) as caught:
        ModelConfig.from_hf(values)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 150
    allowed = SUPPORTED_AT[name]
    assert (f"only {allowed[0]!r} is" if allowed else "a model without it") in str(caught.value)
    assert ModelConfig.from_hf({**values, name: allowed[0] if allowed else None}) == SMALL


def test_other_attention_and_biases_are_refused() -> None:
    layers = {"layer_types": ["full_attention", "linear_attention", "chunked_attention"]}
    with pytest.raises(
        ConfigError, match="holds chunked_attention, linear_attention; only full_attention is"
    ):
        ModelConfig.from_hf({**GOOD, **layers})
    with pytest.raises(
        ConfigError, match="mlp_bias is true; model_type 'qwen3' has none, set it to false"
    ):
        ModelConfig.from_hf({**GOOD, "mlp_bias": True})
    assert ModelConfig.from_hf({**GOOD, "mlp_bias": False}) == SMALL


def test_a_byte_order_mark_is_no_damage(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GOOD), encoding="utf-8-sig")
    assert ModelConfig.from_hf(tmp_path) == SMALL


# As Qwen3's model card has it added to config.json.
CARD = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize("stated", [32768, 40960, 131072])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1e6, "rope_scaling": CARD},
        {
            "rope_theta": 1e6,
            "rope_scaling": {"type": "yarn", **{k: v for k, v in CARD.items() if k != "rope_type"}},
        },
        {"rope_parameters": {**CARD, "rope_theta": 1e6}},
        {"rope_parameters": {"full_attention": {**CARD, "rope_theta": 1e6}}},
        # Added by hand to what transformers 5 wrote.
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": CARD},
    ],
    ids=["rope_type", "type", "rope_parameters", "nested", "added"],
)
def test_yarn_as_model_cards_set_it_up(
    rope: dict, stated: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The context is factor * original, whatever max_position_embeddings was left at."""
    values = {key: value for key, value in GOOD.items() if not key.startswith("rope")}
    config = ModelConfig.from_hf({**values, **rope, "max_position_embeddings": stated})
    assert config.max_position_embeddings == 131072
    assert config.rope == RopeConfig(1e6, "yarn", 4.0, original_max_position_embeddings=32768)
    assert ModelConfig.from_hf(config.to_hf()) == config
    assert not caplog.records


def test_yarn_that_lacks_its_original_length_says_so(caplog: pytest.LogCaptureFixture) -> None:
    config = ModelConfig.from_hf({**GOOD, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}})
    assert config.max_position_embeddings == SMALL.max_position_embeddings
    assert (
        "lacks original_max_position_embeddings; max_position_embeddings 32768 is taken"
        in caplog.text
    )


def test_yarn_of_the_published_formula() -> None:
    """Section 3 of arXiv 2309.00071 with its reference code's ramp over whole dimensions, at Qwen3's numbers."""
    rope = ModelConfig.from_hf(
        {**GOOD, "rope_scaling": CARD, "max_position_embeddings": 40960, "rope_theta": 1e6}
    ).rope
    found, scale = rope_frequencies(rope, 128, 131072)
    low = math.floor(128 * math.log(32768 / (32 * 2 * math.pi)) / (2 * math.log(1e6)))
    high = math.ceil(128 * math.log(32768 / (1 * 2 * math.pi)) / (2 * math.log(1e6)))
    for i in range(64):
        frequency = 1e6 ** (-2 * i / 128)
        interpolated = min(max((i - low) / (high - low), 0), 1)
        assert found[i] == pytest.approx(
            frequency * (1 - interpolated) + frequency / 4 * interpolated, rel=1e-6
        )
    assert scale == pytest.approx(0.1 * math.log(4) + 1)
    assert np.ptp(found * 1e6 ** (np.arange(64) / 64)) == pytest.approx(0.75, abs=1e-6)


def test_yarn_with_deepseeks_scales() -> None:
    """The ratio of two attention factors; one alone is the usual factor only at 1."""
    scaled = lambda **scales: (
        ModelConfig.from_hf({**GOOD, "rope_scaling": {**CARD, **scales}}).rope.attention_factor
    )
    assert scaled(mscale=0.707, mscale_all_dim=0.707) == 1
    assert scaled(mscale=2.0, mscale_all_dim=0.5) == pytest.approx(
        (0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1)
    )
    assert scaled(mscale=2.0, mscale_all_dim=0.5, attention_factor=0.9) == 0.9
    with pytest.raises(ConfigError, match=r"unsupported fields \['mscale'\]"):
        scaled(mscale=0.707)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default", "factor": 1.0, "original_max_position_embeddings": 32768},
        {
            "type": "linear",
            "factor": 2.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "low_freq_factor": 1.0,
            "attention_factor": None,
        },
        {
            **CARD,
            "finetuned": True,
            "truncate": True,
            "attn_factor": 1.0,
            "partial_rotary_factor": 1.0,
            "beta_fast": None,
        },
        {
            **CARD,
            "type": "yarn",
            "extrapolation_factor": 1,
            "high_freq_factor": 4.0,
            "rope_theta": 1e6,
        },
    ],
)
def test_rope_fields_that_change_nothing(scaling: dict, caplog: pytest.LogCaptureFixture) -> None:
    read = RopeConfig.from_hf({"rope_theta": 1e6, "rope_scaling": scaling})
    assert read.rope_type in (scaling.get("rope_type"), scaling.get("type"))
    kept = {
        name: scaling[name] for name in rope_config.ROPE_FIELDS[read.rope_type] if name in scaling
    }
    plain = {"rope_type": read.rope_type, **kept}
    assert (
        read == RopeConfig.from_hf({"rope_theta": 1e6, "rope_scaling": plain})
        and not caplog.records
    )


def test_two_ropes_that_differ_are_said(caplog: pytest.LogCaptureFixture) -> None:
    llama3 = {**LLAMA3, "original_max_position_embeddings": 8192, "rope_theta": 5e5}
    rope = RopeConfig.from_hf({"rope_parameters": llama3, "rope_scaling": CARD})
    assert rope == RopeConfig(5e5, "yarn", 4.0, original_max_position_embeddings=32768)
    assert (
        "rope_scaling is read and rope_parameters, which says otherwise, is ignored" in caplog.text
    )


BAD_ROPES = {
    "no table": ("yarn", "rope_scaling is 'yarn'; give an object"),
    "factor without a type": (
        {"factor": 4.0},
        r"unsupported fields \['factor'\]; .* or give the rope_type",
    ),
    "partial": ({**CARD, "partial_rotary_factor": 0.5}, r"fields \['partial_rotary_factor'\]"),
    "not truncated": ({**CARD, "truncate": False}, r"fields \['truncate'\]"),
    "sections": ({"type": "default", "mrope_section": [2, 1, 1]}, r"fields \['mrope_section'\]"),
    "original": (
        {**CARD, "original_max_position_embeddings": "32768"},
        "embeddings is '32768'; give a positive integer",
    ),
    "attention factor": (
        {**CARD, "attention_factor": "1"},
        "attention_factor is '1'; give a number, or leave it out",
    ),
}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(("scaling", "message"), BAD_ROPES.values(), ids=BAD_ROPES)
def test_bad_ropes(scaling: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ModelConfig.from_hf({**GOOD, "rope_scaling": scaling})
    assert "\n" not in str(caught.value)


MENDED = {
    "eos": {"eos_token_id": [2, 3]},
    "no end": {"eos_token_id": []},
    "factor": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "field removed": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40}
    },
    "llama3": {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 40}},
    "sliding window": {"use_sliding_window": False, "sliding_window": 4096},
    "heads": {"num_key_value_heads": 1},
    "mask": {"mask_token_id": 39},
    "origin": {"block_origin": "response"},
}


@pytest.mark.parametrize("change", MENDED.values(), ids=MENDED)
def test_what_the_errors_advise_is_read(change: dict) -> None:
    config = ModelConfig.from_hf({**GOOD, **change})
    assert config.stop_token_ids == tuple(change.get("eos_token_id", [2]))
