"""Directories as released models have them: their fields, names of tensors and tokenizer files; small, random weights.

`write_released(root, name)` makes one from a fixed seed, with numpy alone, so that tests make again what the outputs of
the released code were computed from (parity/make_released.py).
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.data.conftest import EOS, SPECIAL, make_byte_tokenizer

MASK = len(SPECIAL) + 256
VOCAB = 272
IM_END = SPECIAL.index("<|im_end|>")
HIDDEN, FFN, LAYERS, HEADS, KV_HEADS = 32, 48, 2, 4, 2

# What Qwen's configs hold, at the size here.
QWEN = {
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": FFN,
    "max_position_embeddings": 256,
    "max_window_layers": 2,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.52.4",
    "use_cache": False,
    "use_sliding_window": False,
    "vocab_size": VOCAB,
}
SDAR = {
    **QWEN,
    "architectures": ["SDARForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_sdar.SDARConfig",
        "AutoModel": "modeling_sdar.SDARModel",
        "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
    },
    "attention_bias": False,
    "debug": False,
    "ep_size": 1,
    "fuse_cross_entropy": True,
    "head_dim": 16,
    "micro_forward": False,
    "model_type": "sdar",
    "skip_checkpoint": False,
    "use_deepep": False,
}
SDAR_MOE = {
    **SDAR,
    "architectures": ["SDARMoeForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_sdar_moe.SDARMoeForCausalLM"},
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "model_type": "sdar_moe",
    "moe_intermediate_size": 12,
    "norm_topk_prob": True,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
A2D_QWEN3 = {
    **QWEN,
    "architectures": ["A2DQwen3LMHeadModel"],
    "attention_bias": False,
    "head_dim": 16,
    "layer_types": ["full_attention"] * LAYERS,
    "model_type": "a2d-qwen3",
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
A2D_QWEN2 = {
    **QWEN,
    "architectures": ["A2DQwen2LMHeadModel"],
    "layer_types": ["full_attention"] * LAYERS,
    "model_type": "a2d-qwen2",
    "tie_word_embeddings": True,
}
_QWEN_ALONE = ("max_window_layers", "sliding_window", "use_sliding_window")
A2D_LLAMA = {
    **{name: value for name, value in QWEN.items() if name not in _QWEN_ALONE},
    "architectures": ["A2DLlamaLMHeadModel"],
    "attention_bias": False,
    "head_dim": 8,
    "mlp_bias": False,
    "model_type": "a2d-llama",
    "pretraining_tp": 1,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
LLADA = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModel": "modeling_llada.LLaDAModelLM",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": HIDDEN,
    "embedding_dropout": 0.0,
    "embedding_size": VOCAB,
    "eos_token_id": 0,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": MASK,
    "max_sequence_length": 256,
    "mlp_hidden_size": FFN,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": HEADS,
    "n_kv_heads": HEADS,
    "n_layers": LAYERS,
    "pad_token_id": 0,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": VOCAB,
    "weight_tying": False,
}
DREAM = {
    **QWEN,
    "architectures": ["DreamModel"],
    "auto_map": {
        "AutoConfig": "configuration_dream.DreamConfig",
        "AutoModel": "modeling_dream.DreamModel",
    },
    "mask_token_id": MASK,
    "model_type": "Dream",
    "pad_token_id": 0,
    "use_mrope": False,
}
FAST_DLLM = {
    **QWEN,
    "architectures": ["Fast_dLLM_QwenForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration.Fast_dLLM_QwenConfig",
        "AutoModel": "modeling.Fast_dLLM_QwenModel",
        "AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM",
    },
    "bd_size": 32,
    "conplemenrary_mask": True,
    "layer_types": ["full_attention"] * LAYERS,
    "model_type": "Fast_dLLM_Qwen",
    "pad_token_id": 0,
}
LLADA2 = {
    "architectures": ["LLaDA2MoeModelLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
        "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
        "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
    },
    "embedding_dropout": 0.0,
    "first_k_dense_replace": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": FFN,
    "max_position_embeddings": 256,
    "max_window_layers": 28,
    "model_type": "llada2_moe",
    "moe_intermediate_size": 12,
    "moe_router_enable_expert_bias": True,
    "n_group": 4,
    "norm_head": False,
    "norm_softmax": False,
    "norm_topk_prob": True,
    "num_attention_heads": HEADS,
    "num_experts": 12,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": KV_HEADS,
    "num_shared_experts": 1,
    "output_dropout": 0.0,
    "output_router_logits": False,
    "pad_token_id": 0,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 600000,
    "rotary_dim": 8,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "torch_dtype": "float32",
    "transformers_version": "4.52.3",
    "use_bias": False,
    "use_cache": False,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "use_sliding_window": False,
    "using_split_qkv_in_self_attention": False,
    "vocab_size": VOCAB,
}
# Names that hub ids end in, as the names themselves tell something.
RELEASED: dict[str, dict[str, Any]] = {
    "SDAR-1.7B-Chat": SDAR,
    "SDAR-8B-Chat-b8": SDAR,
    "TraDo-4B-Instruct": SDAR,
    "SDAR-30B-A3B-Chat": SDAR_MOE,
    "Qwen3-0.6B-diffusion-bd3lm-v0.1": A2D_QWEN3,
    "Qwen3-0.6B-diffusion-mdlm-v0.1": A2D_QWEN3,
    "Qwen2.5-Coder-0.5B-Instruct-diffusion-mdlm-v0.1": A2D_QWEN2,
    "Llama-3.2-1B-diffusion-bd3lm": A2D_LLAMA,
    "LLaDA-8B-Instruct": LLADA,
    "Dream-v0-Instruct-7B": DREAM,
    "Fast_dLLM_v2_7B": FAST_DLLM,
    "LLaDA2.0-mini": LLADA2,
}


def write_released(root: Path, name: str) -> Path:
    """Makes the directory of a released model below `root`, and returns it."""
    directory = root / name
    directory.mkdir(parents=True)
    config = RELEASED[name]
    _write_json(directory / "config.json", config)
    write_tokenizer(
        directory, "<|MASK|>" if config["model_type"].startswith("sdar") else "<|mask|>"
    )
    save_file(weights(config), directory / "model.safetensors", {"format": "pt"})
    return directory


def write_tokenizer(directory: Path, mask: str) -> None:
    """Writes the files of a byte tokenizer in the form of Qwen's; they spell the mask in two ways, as SDAR's do."""
    make_byte_tokenizer(mask_token=mask).backend_tokenizer.save(str(directory / "tokenizer.json"))
    added = {
        str(number): {"content": text, "special": True}
        for number, text in [*enumerate(SPECIAL), (MASK, mask)]
    }
    settings = {
        "added_tokens_decoder": added,
        "auto_map": {"AutoTokenizer": ["tokenization_qwen2.Qwen2Tokenizer", None]},
        "eos_token": EOS,
        "mask_token": mask,
        "pad_token": EOS,
        "tokenizer_class": "Qwen2Tokenizer",
    }
    _write_json(directory / "tokenizer_config.json", settings)
    _write_json(directory / "added_tokens.json", {"<MASK>": MASK})
    _write_json(directory / "special_tokens_map.json", {"mask_token": {"content": "<MASK>"}})
    generation = {"do_sample": True, "eos_token_id": [IM_END, 0], "temperature": 0.6, "top_p": 0.95}
    _write_json(directory / "generation_config.json", generation)


def weights(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Draws a model's tensors by their released names, float32, from a seed that is its model_type."""
    generator = np.random.default_rng(list(config["model_type"].encode()))
    drawn = {}
    for name, shape in shapes(config).items():
        values = generator.standard_normal(shape)
        if len(shape) == 2:
            drawn[name] = values * (1.5 / np.sqrt(shape[1]))
        else:
            drawn[name] = 0.2 * values + (not name.endswith("bias"))
        if name.endswith(("lm_head.weight", "transformer.ff_out.weight", "embed_tokens.weight")):
            # Released loops may propose the mask, and ours never does: no model does that with such a row.
            drawn[name][MASK] = 0.0
    return {name: array.astype(np.float32) for name, array in drawn.items()}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Lists the names and shapes of a model's tensors, [outputs, inputs] where they are matrices."""
    if config["model_type"] == "llada":
        layer = {"attn_norm": (HIDDEN,), "ff_norm": (HIDDEN,), "ff_out": (HIDDEN, FFN)}
        layer |= dict.fromkeys(("q_proj", "k_proj", "v_proj", "attn_out"), (HIDDEN, HIDDEN))
        layer |= dict.fromkeys(("ff_proj", "up_proj"), (FFN, HIDDEN))
        table = (VOCAB, HIDDEN)
        outer = {"wte": table, "ff_out": table, "ln_f": (HIDDEN,)}
        return {f"model.transformer.{name}.weight": shape for name, shape in outer.items()} | {
            f"model.transformer.blocks.{i}.{name}.weight": shape
            for i in range(LAYERS)
            for name, shape in layer.items()
        }
    table = "word_embeddings" if config["model_type"] == "llada2_moe" else "embed_tokens"
    found = {f"model.{table}.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (VOCAB, HIDDEN)
    for i in range(config["num_hidden_layers"]):
        layer = _llada2_layer(config, i) if table == "word_embeddings" else _layer(config)
        found |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return found


def _llada2_layer(config: dict[str, Any], index: int) -> dict[str, tuple[int, ...]]:
    head_dim, width = config["head_dim"], config["moe_intermediate_size"]
    found: dict[str, tuple[int, ...]] = {
        "attention.query_key_value.weight": ((HEADS + 2 * KV_HEADS) * head_dim, HIDDEN),
        "attention.dense.weight": (HIDDEN, HEADS * head_dim),
    }
    found |= {f"attention.{name}_layernorm.weight": (head_dim,) for name in ("query", "key")}
    norms = ("input_layernorm", "post_attention_layernorm")
    found |= {f"{name}.weight": (HIDDEN,) for name in norms}
    if index < config["first_k_dense_replace"]:
        return found | _feed_forward("mlp", FFN)
    found["mlp.gate.weight"] = (config["num_experts"], HIDDEN)
    found["mlp.gate.expert_bias"] = (config["num_experts"],)
    for expert in range(config["num_experts"]):
        found |= _feed_forward(f"mlp.experts.{expert}", width)
    return found | _feed_forward("mlp.shared_experts", config["num_shared_experts"] * width)


def _layer(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    kind = config["model_type"]
    head_dim = config.get("head_dim", HIDDEN // HEADS)
    heads = {"q": HEADS * head_dim, "k": KV_HEADS * head_dim, "v": KV_HEADS * head_dim}
    found: dict[str, tuple[int, ...]] = {
        f"self_attn.{name}_proj.weight": (size, HIDDEN) for name, size in heads.items()
    }
    found["self_attn.o_proj.weight"] = (HIDDEN, heads["q"])
    if kind in ("Dream", "Fast_dLLM_Qwen", "a2d-qwen2"):
        found |= {f"self_attn.{name}_proj.bias": (size,) for name, size in heads.items()}
    if kind in ("sdar", "sdar_moe", "a2d-qwen3"):
        found |= {f"self_attn.{name}_norm.weight": (head_dim,) for name in "qk"}
    norms = ("input_layernorm", "post_attention_layernorm")
    found |= {f"{name}.weight": (HIDDEN,) for name in norms}
    if "num_experts" not in config:
        return found | _feed_forward("mlp", FFN)
    found["mlp.gate.weight"] = (config["num_experts"], HIDDEN)
    for expert in range(config["num_experts"]):
        found |= _feed_forward(f"mlp.experts.{expert}", config["moe_intermediate_size"])
    return found


def _feed_forward(name: str, width: int) -> dict[str, tuple[int, ...]]:
    up = {f"{name}.{part}_proj.weight": (width, HIDDEN) for part in ("gate", "up")}
    return {**up, f"{name}.down_proj.weight": (HIDDEN, width)}


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    for released in RELEASED:
        write_released(Path(sys.argv[1]), released)
