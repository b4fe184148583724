"""Makes the fixtures beside this file: tiny random Hugging Face models, their logits and their gradients.

    python tests/parity/make_fixtures.py [OUTPUT_DIRECTORY]

Needs torch and transformers; the stored files were made with torch 2.13 and transformers 4.52.4 (5.23 gives the same).
Every config field that changes the numbers is off its default. Each directory is what `save_pretrained` of transformers
writes, and holds outputs.npz as well: `tokens`, float32 `logits`, and one array for each gradient of the mean
next-token cross-entropy, named as the weight. Mixtures of experts: also `aux_loss`, the balance loss, and the gradients
are those of the cross-entropy plus router_aux_loss_coef times it.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

COMMON = {
    "rms_norm_eps": 1e-3,
    "initializer_range": 0.05,
    "bos_token_id": 3,
    "eos_token_id": 5,
    "use_cache": False,
}
SMALL = {
    **COMMON,
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 1.0,
    "beta_slow": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 32,
}
QWEN3 = {
    **SMALL,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "max_position_embeddings": 48,
    "rope_theta": 700.0,
}
QWEN3_YARN = {
    **SMALL,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
    "rope_theta": 300.0,
    "rope_scaling": dict(YARN),
}
QWEN2_LINEAR = {
    **SMALL,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 48,
    "rope_theta": 500.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.5},
}
LLAMA = {
    **SMALL,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": False,
    "max_position_embeddings": 256,
    "rope_theta": 900.0,
    "rope_scaling": dict(LLAMA3),
}
MOE = {
    **SMALL,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "attention_bias": True,
    "max_position_embeddings": 48,
    "rope_theta": 700.0,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 10,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.5,
}
MOE_PLAIN = {
    **MOE,
    "attention_bias": False,
    "num_experts": 4,
    "num_experts_per_tok": 1,
    "norm_topk_prob": False,
    "tie_word_embeddings": True,
}
CASES = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**QWEN3), torch.float32, "5GB"),
    "qwen3-tied-yarn-bf16": (Qwen3ForCausalLM, Qwen3Config(**QWEN3_YARN), torch.bfloat16, "5GB"),
    "qwen2-tied-linear-f16": (Qwen2ForCausalLM, Qwen2Config(**QWEN2_LINEAR), torch.float16, "5GB"),
    "llama-llama3-sharded": (LlamaForCausalLM, LlamaConfig(**LLAMA), torch.float32, "30KB"),
    "qwen3-moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**MOE), torch.float32, "5GB"),
    "qwen3-moe-tied-bf16": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**MOE_PLAIN),
        torch.bfloat16,
        "5GB",
    ),
}
ROPES = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn-defaults": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-attention-factor": {**YARN, "attention_factor": 0.7},
}


def randomise(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Weights of some size, norms about one, biases off zero; exactly representable in the type they are stored in."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            value = 0.25 * torch.randn(weight.shape)
            weight.copy_((1 + value if "norm" in name else value).to(dtype).float())


def outputs(model: torch.nn.Module, tokens: torch.Tensor) -> dict[str, np.ndarray]:
    sparse = isinstance(model, Qwen3MoeForCausalLM)
    out = model(tokens, **({"output_router_logits": True} if sparse else {}))
    loss = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    aux = {"aux_loss": out.aux_loss.detach().numpy()} if sparse else {}
    (loss + model.config.router_aux_loss_coef * out.aux_loss if sparse else loss).backward()
    gradients = {name: weight.grad.numpy() for name, weight in model.named_parameters()}
    return {
        "tokens": tokens.int().numpy(),
        "logits": out.logits.detach().numpy(),
        **aux,
        **gradients,
    }


def frequencies(scaling: dict) -> np.ndarray:
    """Inverse frequencies, then the attention factor."""
    # transformers 4 takes YaRN's factor from the two lengths, 5 from `factor`: here they agree.
    longest = int(scaling.get("original_max_position_embeddings", 64) * scaling.get("factor", 1))
    config = Qwen3Config(
        head_dim=32,
        max_position_embeddings=longest,
        rope_theta=5000.0,
        rope_scaling=dict(scaling) or None,
    )
    if not scaling:
        return np.append(1 / 5000.0 ** (np.arange(0, 32, 2) / 32), 1.0)
    inverse, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
    return np.append(inverse.numpy(), factor)


def main() -> None:
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "fixtures"
    for name, (kind, config, dtype, shard) in CASES.items():
        config._attn_implementation = "eager"
        model = kind(config).float()
        randomise(model, dtype)
        arrays = outputs(model, torch.randint(0, config.vocab_size, (2, 20)))
        model.to(dtype).save_pretrained(directory / name, max_shard_size=shard)
        np.savez_compressed(directory / name / "outputs.npz", **arrays)
    np.savez_compressed(
        directory / "rope.npz", **{name: frequencies(scaling) for name, scaling in ROPES.items()}
    )


if __name__ == "__main__":
    main()
