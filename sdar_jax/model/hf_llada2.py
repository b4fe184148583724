"""The fields of config.json that LLaDA2 has otherwise than Qwen3, in and out."""

from typing import TYPE_CHECKING, Any

from sdar_jax.errors import ConfigError
from sdar_jax.model.rope_config import RopeConfig

if TYPE_CHECKING:
    from sdar_jax.model.config import ModelConfig

_EXPERTS = {
    "num_experts": "num_experts",
    "num_experts_per_token": "num_experts_per_tok",
    "moe_intermediate_size": "moe_intermediate_size",
    "num_dense_layers": "first_k_dense_replace",
    "num_shared_experts": "num_shared_experts",
    "num_expert_groups": "n_group",
    "groups_per_token": "topk_group",
    "routed_scaling_factor": "routed_scaling_factor",
}
# Those that change the computation, at the values that are computed here.
FIXED = {
    "moe_router_enable_expert_bias": True,
    "norm_head": False,
    "norm_softmax": False,
    "score_function": "sigmoid",
    "use_rmsnorm": True,
    "using_split_qkv_in_self_attention": False,
}
READ = (
    *_EXPERTS.values(),
    "norm_topk_prob",
    "partial_rotary_factor",
    "rotary_dim",
    "router_aux_loss_coef",
    "use_bias",
    "use_qk_norm",
    "use_qkv_bias",
)


def read(config: dict[str, Any], rope: RopeConfig) -> dict[str, Any]:
    """Reads the fields of a `ModelConfig` that are otherwise than a Qwen3's.

    Raises:
        ConfigError: a field that is missing, or two that contradict each other.
    """
    if missing := [
        n for n in (*_EXPERTS.values(), "partial_rotary_factor") if config.get(n) is None
    ]:
        raise ConfigError(f"config.json lacks {', '.join(missing)}; restore the file")
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rotary_dim = config.get("rotary_dim")
    if rotary_dim not in (None, rope.rotary_dim(head_dim)):
        raise ConfigError(
            f"rotary_dim is {rotary_dim!r} and partial_rotary_factor {rope.partial_rotary_factor} of head_dim "
            f"{head_dim} is not; make them agree"
        )
    return {
        **{ours: config[theirs] for ours, theirs in _EXPERTS.items()},
        "score_function": "sigmoid",
        "norm_topk_prob": config.get("norm_topk_prob", True),
        "router_aux_loss_coef": config.get("router_aux_loss_coef", 0.0),
        "qk_norm": config.get("use_qk_norm", True),
        "qkv_bias": config.get("use_qkv_bias", False),
        "output_bias": config.get("use_bias", False),
    }


def write(config: "ModelConfig") -> dict[str, Any]:
    """Makes the same fields again; `FIXED` and what all families have are besides."""
    return {
        **{theirs: getattr(config, ours) for ours, theirs in _EXPERTS.items()},
        "norm_topk_prob": config.norm_topk_prob,
        "router_aux_loss_coef": config.router_aux_loss_coef,
        "rotary_dim": config.rope.rotary_dim(config.head_dim),
        "use_bias": config.output_bias,
        "use_qk_norm": config.qk_norm,
        "use_qkv_bias": config.qkv_bias,
    }
