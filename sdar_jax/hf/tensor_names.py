"""What other software calls the tensors of each weight, a table for each naming (`LAYOUTS`)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from sdar_jax.model.config import ModelConfig
from sdar_jax.model.hf_config import family_of


class Layout(NamedTuple):
    """The names of a family's tensors.

    Attributes:
        parts: of each weight of ours (shapes: see layer.py), the tensors that make it up and where in it they
            lie. Where experts have tensors of their own, the number of one goes where the braces are, and indexes the
            first axis of ours.
        layer: what precedes the names of a layer's tensors, with its number where the braces are.
        fused: tensors that may also hold a weight's parts of all experts, and where in that of one they lie.
        joined: weights whose one tensor has all queries, then all keys, then all values.
    """

    parts: Mapping[str, Mapping[str, Any]]
    layer: str
    fused: Mapping[str, Mapping[str, Any]]
    joined: tuple[str, ...] = ()

    @property
    def embedding(self) -> str:
        """The name of the embedding's tensor."""
        return next(iter(self.parts["embedding"]))

    @property
    def head(self) -> str:
        """The name of the output head's tensor."""
        return next(iter(self.parts["head"]))


ALL = np.s_[...]
# How many trailing axes of a matrix of ours are its inputs. Theirs is [outputs, inputs].
INPUT_AXES = {"embedding": 1, "head": 1, "qkv": 1, "output": 3, "gate_up": 1, "down": 1}
INPUT_AXES |= {"shared_gate_up": 1, "shared_down": 1}
_QUERIES, _KEY, _VALUE = np.s_[:, :-2], np.s_[:, -2], np.s_[:, -1]
_GATE, _UP = np.s_[0,], np.s_[1,]
# Of an expert.
_ITS_GATE, _ITS_UP = np.s_[:, 0], np.s_[:, 1]
_LLAMA = {
    "embedding": {"model.embed_tokens.weight": ALL},
    "final_norm": {"model.norm.weight": ALL},
    "head": {"lm_head.weight": ALL},
    "attention_norm": {"input_layernorm.weight": ALL},
    "qkv": {
        "self_attn.q_proj.weight": _QUERIES,
        "self_attn.k_proj.weight": _KEY,
        "self_attn.v_proj.weight": _VALUE,
    },
    "qkv_bias": {
        "self_attn.q_proj.bias": _QUERIES,
        "self_attn.k_proj.bias": _KEY,
        "self_attn.v_proj.bias": _VALUE,
    },
    "q_norm": {"self_attn.q_norm.weight": ALL},
    "k_norm": {"self_attn.k_norm.weight": ALL},
    "output": {"self_attn.o_proj.weight": ALL},
    "output_bias": {"self_attn.o_proj.bias": ALL},
    "mlp_norm": {"post_attention_layernorm.weight": ALL},
    "gate_up": {"mlp.gate_proj.weight": _GATE, "mlp.up_proj.weight": _UP},
    "gate_up_bias": {"mlp.gate_proj.bias": _GATE, "mlp.up_proj.bias": _UP},
    "down": {"mlp.down_proj.weight": ALL},
    "down_bias": {"mlp.down_proj.bias": ALL},
    "router": {"mlp.gate.weight": ALL},
    "experts_gate_up": {
        "mlp.experts.{}.gate_proj.weight": _ITS_GATE,
        "mlp.experts.{}.up_proj.weight": _ITS_UP,
    },
    "experts_down": {"mlp.experts.{}.down_proj.weight": ALL},
}
# The layout that transformers 5 computes in: all experts in one tensor, which it saves on request.
_LLAMA_FUSED = {
    "experts_gate_up": {"mlp.experts.gate_up_proj": ALL},
    "experts_down": {"mlp.experts.down_proj": ALL},
}

_OLMO = {
    "embedding": {"model.transformer.wte.weight": ALL},
    "final_norm": {"model.transformer.ln_f.weight": ALL},
    "head": {"model.transformer.ff_out.weight": ALL},
    "attention_norm": {"attn_norm.weight": ALL},
    "qkv": {"q_proj.weight": _QUERIES, "k_proj.weight": _KEY, "v_proj.weight": _VALUE},
    "output": {"attn_out.weight": ALL},
    "mlp_norm": {"ff_norm.weight": ALL},
    "gate_up": {"ff_proj.weight": _GATE, "up_proj.weight": _UP},
    "down": {"ff_out.weight": ALL},
}

# Ant's Bailing (Ling), and LLaDA2 after it.
_BAILING = {
    **_LLAMA,
    "embedding": {"model.word_embeddings.weight": ALL},
    "qkv": {"attention.query_key_value.weight": ALL},
    "qkv_bias": {"attention.query_key_value.bias": ALL},
    "q_norm": {"attention.query_layernorm.weight": ALL},
    "k_norm": {"attention.key_layernorm.weight": ALL},
    "output": {"attention.dense.weight": ALL},
    "output_bias": {"attention.dense.bias": ALL},
    "expert_bias": {"mlp.gate.expert_bias": ALL},
    "shared_gate_up": {
        "mlp.shared_experts.gate_proj.weight": _GATE,
        "mlp.shared_experts.up_proj.weight": _UP,
    },
    "shared_down": {"mlp.shared_experts.down_proj.weight": ALL},
}
# As dFactory merges them to train.
_BAILING_FUSED = {
    "experts_gate_up": {"mlp.experts.gate_proj": _ITS_GATE, "mlp.experts.up_proj": _ITS_UP},
    "experts_down": {"mlp.experts.down_proj": ALL},
}

LAYOUTS = {
    "bailing": Layout(_BAILING, "model.layers.{}.", _BAILING_FUSED, ("qkv", "qkv_bias")),
    "llama": Layout(_LLAMA, "model.layers.{}.", _LLAMA_FUSED),
    "olmo": Layout(_OLMO, "model.transformer.blocks.{}.", {}),
}


def joined_rows(shape: tuple[int, ...]) -> np.ndarray:
    """Finds each row of our [G, R + 2, K, ...], as one axis, among all queries, then all keys, then all values."""
    groups, heads, size = shape[:3]
    ends = np.cumsum([groups * (heads - 2) * size, groups * size])
    parts = np.split(np.arange(groups * heads * size), ends)
    return np.concatenate([part.reshape(groups, -1, size) for part in parts], axis=1).reshape(-1)


def layout_of(config: ModelConfig) -> Layout:
    """Returns what the files of a model's family call its tensors."""
    return LAYOUTS[family_of(config)[1].tensors]
