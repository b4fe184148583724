"""`ModelConfig`: the shape of a Qwen3-like decoder, and what it was trained to predict.

Field names are the field's; `from_hf` and `to_hf` translate to and from Hugging Face's config.json (hf_config.py).
"""

import dataclasses
from pathlib import Path
from typing import Any

from sdar_jax.errors import ConfigError, check_choices, is_int, is_number
from sdar_jax.experts import Scoring
from sdar_jax.model import hf_config
from sdar_jax.model.hf_config import Architecture
from sdar_jax.model.rope_config import RopeConfig
from sdar_jax.paradigm import BlockOrigin, Objective, Paradigm, has_blocks, paradigm_of
from sdar_jax.visibility import check_block_size


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and purpose of a model; hashable, saved with it and read back.

    An MoE (`num_experts` > 0, architecture "qwen3_moe" or "llada2_moe") has experts in every layer after the first
    `num_dense_layers`, which only a "llada2_moe" has, as it has shared experts and groups of experts.

    Raises:
        ConfigError: a field out of its range, or fields that contradict each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Width of the dense feed-forward; an MoE without dense layers only carries it."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    qk_norm: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    architecture: Architecture = "qwen3"
    num_experts: int = 0
    num_experts_per_token: int = 0
    moe_intermediate_size: int = 0
    """Width of each expert's feed-forward."""
    norm_topk_prob: bool = True
    """Whether the gates of a token's experts add up to one, before `routed_scaling_factor`."""
    router_aux_loss_coef: float = 0.001
    """Coefficient of the balance loss in training."""
    num_dense_layers: int = 0
    """How many of the first layers have a dense feed-forward in place of experts (`first_k_dense_replace`)."""
    num_shared_experts: int = 0
    """How many experts' width every token passes through besides its own."""
    score_function: Scoring = "softmax"
    """What makes scores of the router's logits; "sigmoid" comes with a bias for each expert, which is not trained."""
    num_expert_groups: int = 1
    """Into how many groups the experts are split, one after another (`n_group`)."""
    groups_per_token: int = 1
    """Of how many groups a token's experts are (`topk_group`)."""
    routed_scaling_factor: float = 1.0
    """On the gates."""
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    objective: Objective = "autoregressive"
    """What the weights were trained for."""
    block_size: int | None = None
    """S of block diffusion."""
    mask_token_id: int | None = None
    """The mask of diffusion models."""
    block_origin: BlockOrigin = "sequence"
    """Where blocks are counted from: the first token of the "sequence" (SDAR) or of the "response" (LLaDA, D2F)."""
    shifted: bool = False
    """As in `Paradigm`."""
    causal_clean: bool = False
    """As in `Paradigm`."""
    bidirectional_prompt: bool = False
    """As in `Paradigm`."""
    model_type: str | None = None
    """Hugging Face's `model_type`, where the architecture and the objective do not tell it."""
    stop_token_ids: tuple[int, ...] = ()
    """The tokens that end a generation: generation_config.json's list."""

    def __post_init__(self):
        for name in _SIZES:
            if not is_int(getattr(self, name)) or getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; give a positive integer")
        if self.num_heads % self.num_kv_heads:
            heads = (
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
            raise ConfigError(f"{heads}; change either")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; rotary embedding needs an even number")
        rotary_dim = self.rope.rotary_dim(self.head_dim)
        if rotary_dim % 2 or not rotary_dim:
            part = f"partial_rotary_factor {self.rope.partial_rotary_factor} of head_dim {self.head_dim}"
            raise ConfigError(
                f"{part} rotates {rotary_dim} dimensions; give an even number of them"
            )
        if not is_number(self.rms_norm_eps) or self.rms_norm_eps <= 0:
            raise ConfigError(f"rms_norm_eps is {self.rms_norm_eps!r}; give a positive number")
        if self.block_size is not None:
            check_block_size(self.block_size)
        mask = self.mask_token_id
        if mask is not None and not (is_int(mask) and 0 <= mask < self.vocab_size):
            raise ConfigError(
                f"mask_token_id is {mask!r}; give an id of the vocabulary, 0 to {self.vocab_size - 1}"
            )
        if not isinstance(self.stop_token_ids, tuple) or not all(map(is_int, self.stop_token_ids)):
            raise ConfigError(
                f"stop_token_ids is {self.stop_token_ids!r}; give a tuple of token ids"
            )
        check_choices(self)
        if self.model_type is not None and self.model_type not in hf_config.FAMILIES:
            known = list(hf_config.FAMILIES)
            raise ConfigError(f"model_type {self.model_type!r} is unknown; use one of {known}")
        for name in ("shifted", "causal_clean", "bidirectional_prompt"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; give true or false")
        if self.block_size is not None or not has_blocks(self.objective):
            self.paradigm  # noqa: B018 (values that do not go together are refused now)
        self._check_experts()

    @property
    def paradigm(self) -> Paradigm:
        """The way the model reads and predicts. Raises ConfigError where block diffusion has no block size yet."""
        return paradigm_of(self.objective, block_size=self.block_size, **self._diffusion)

    def with_blocks(self, block_size: int | None) -> Paradigm:
        """Returns the paradigm of the same model as one that fills masks in blocks of this size (None: in a
        document)."""
        objective = "masked_diffusion" if block_size is None else "block_diffusion"
        return paradigm_of(objective, block_size=block_size, **self._diffusion)

    @property
    def _diffusion(self) -> dict[str, Any]:
        return {
            "shifted": self.shifted,
            "block_origin": self.block_origin,
            "causal_clean": self.causal_clean,
            "bidirectional_prompt": self.bidirectional_prompt,
        }

    def has_experts(self, layer: int) -> bool:
        """Whether the feed-forward of this layer, counted from 0, is of experts."""
        return self.num_experts > 0 and layer >= self.num_dense_layers

    @property
    def mlp_widths(self) -> dict[str, int]:
        """The widths of the feed-forwards that there are, by what they are."""
        widths = {}
        if not self.num_experts or self.num_dense_layers:
            widths["intermediate_size"] = self.intermediate_size
        if self.num_experts:
            widths["moe_intermediate_size"] = self.moe_intermediate_size
        return widths

    def _check_experts(self) -> None:
        names = ("num_experts", "num_experts_per_token", "moe_intermediate_size")
        sizes = {name: getattr(self, name) for name in names}
        sparse = self.architecture in ("qwen3_moe", "llada2_moe")
        if not sparse and any(size != 0 for size in sizes.values()):
            raise ConfigError(
                f"architecture {self.architecture!r} has no experts; leave out {', '.join(sizes)}"
            )
        for name, size in sizes.items():
            if sparse and (not is_int(size) or size < 1):
                raise ConfigError(
                    f"{name} is {size!r}; architecture {self.architecture!r} needs a positive integer"
                )
        if self.num_experts_per_token > self.num_experts:
            chosen = f"num_experts_per_token {self.num_experts_per_token} is more than num_experts {self.num_experts}"
            raise ConfigError(f"{chosen}; give at most that many")
        if sparse and self.mlp_bias:
            raise ConfigError("mlp_bias is True; experts have none, leave it out")
        if not is_number(self.router_aux_loss_coef) or self.router_aux_loss_coef < 0:
            raise ConfigError(
                f"router_aux_loss_coef is {self.router_aux_loss_coef!r}; give a number >= 0"
            )
        self._check_sigmoid_router()

    def _check_sigmoid_router(self) -> None:
        """Checks what only a "llada2_moe" has."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        own = {name: getattr(self, name) for name in _LLADA2_FIELDS}
        changed = [name for name in own if own[name] != defaults[name]]
        if self.architecture != "llada2_moe":
            if changed:
                raise ConfigError(
                    f"architecture {self.architecture!r} has no {', '.join(changed)}; leave them out"
                )
            return
        if self.score_function != "sigmoid":
            raise ConfigError(
                f"score_function is {self.score_function!r}; architecture 'llada2_moe' needs 'sigmoid'"
            )
        for name, least in (
            ("num_dense_layers", 0),
            ("num_shared_experts", 0),
            ("groups_per_token", 1),
        ):
            if not is_int(own[name]) or own[name] < least:
                raise ConfigError(f"{name} is {own[name]!r}; give an integer of {least} or more")
        if self.num_dense_layers >= self.num_layers:
            raise ConfigError(
                f"num_dense_layers {self.num_dense_layers} leaves no layer of {self.num_layers} experts; give fewer"
            )
        groups, experts = self.num_expert_groups, self.num_experts
        if (
            not is_int(groups)
            or groups < 1
            or experts % groups
            or (groups > 1 and experts < 2 * groups)
        ):
            raise ConfigError(
                f"num_expert_groups is {groups!r}; give a divisor of num_experts {experts} that leaves two for each"
            )
        if self.groups_per_token > groups:
            raise ConfigError(
                f"groups_per_token {self.groups_per_token} is more than num_expert_groups {groups}; give at most that"
            )
        if self.num_experts_per_token > self.groups_per_token * experts // groups:
            raise ConfigError(
                f"num_experts_per_token {self.num_experts_per_token} is more than {self.groups_per_token} of {groups} "
                f"groups of {experts} experts hold; give fewer, or more groups_per_token"
            )
        if not is_number(self.routed_scaling_factor) or self.routed_scaling_factor <= 0:
            raise ConfigError(
                f"routed_scaling_factor is {self.routed_scaling_factor!r}; give a positive number"
            )

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        """Returns a released shape by name, such as "sdar-8b" or "qwen3-1.7b"."""
        if name not in PRESETS:
            raise ConfigError(f"preset {name!r} is unknown; use one of {sorted(PRESETS)}")
        return PRESETS[name]

    @classmethod
    def from_hf(cls, source: "dict[str, Any] | str | Path") -> "ModelConfig":
        """Reads a config.json: its dict, its path, or the directory that holds it.

        Raises:
            CheckpointError: no such file, or not JSON. ConfigError: a family or option that is not supported.
        """
        return cls(**hf_config.read(source))

    def to_hf(self) -> dict[str, Any]:
        """Makes the config.json: its architecture's own for an AR model; once converted, `model_type` sdar or
        sdar_moe; and that of a family which has its own, such as LLaDA."""
        return hf_config.write(self)


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_position_embeddings",
)
_LLADA2_FIELDS = (
    "num_dense_layers",
    "num_shared_experts",
    "score_function",
    "num_expert_groups",
    "groups_per_token",
    "routed_scaling_factor",
)


def _qwen3(
    hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, tied: bool
) -> ModelConfig:
    special = {"bos_token_id": 151643, "eos_token_id": 151643, "stop_token_ids": (151645, 151643)}
    return ModelConfig(
        151936, hidden, ffn, layers, heads, kv_heads, 128, tie_embeddings=tied, **special
    )


def _sdar(base: ModelConfig) -> ModelConfig:
    purpose = {"objective": "block_diffusion", "block_size": 4, "mask_token_id": 151669}
    return dataclasses.replace(base, tie_embeddings=False, **purpose)


PRESETS = {
    "qwen3-0.6b": _qwen3(1024, 28, 16, 8, 3072, tied=True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 8, 6144, tied=True),
    "qwen3-4b": _qwen3(2560, 36, 32, 8, 9728, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 8, 12288, tied=False),
    "qwen3-30b-a3b": dataclasses.replace(
        _qwen3(2048, 48, 32, 4, 6144, tied=False),
        architecture="qwen3_moe",
        num_experts=128,
        num_experts_per_token=8,
        moe_intermediate_size=768,
    ),
}
PRESETS["llada2-mini"] = ModelConfig(
    vocab_size=157184,
    hidden_size=2048,
    intermediate_size=5120,
    num_layers=20,
    num_heads=16,
    num_kv_heads=4,
    head_dim=128,
    rope=RopeConfig(theta=600_000.0, partial_rotary_factor=0.5),
    architecture="llada2_moe",
    num_experts=256,
    num_experts_per_token=8,
    moe_intermediate_size=512,
    router_aux_loss_coef=0.0,
    num_dense_layers=1,
    num_shared_experts=1,
    score_function="sigmoid",
    num_expert_groups=8,
    groups_per_token=4,
    routed_scaling_factor=2.5,
    eos_token_id=156892,
    stop_token_ids=(156892,),
    objective="block_diffusion",
    block_size=32,
    mask_token_id=156895,
)
PRESETS["llada-8b"] = ModelConfig(
    vocab_size=126464,
    hidden_size=4096,
    intermediate_size=12288,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=500_000.0),
    max_position_embeddings=4096,
    architecture="llama",
    qk_norm=False,
    eos_token_id=126081,
    stop_token_ids=(126081,),
    objective="masked_diffusion",
    block_origin="response",
    mask_token_id=126336,
    model_type="llada",
)
PRESETS["dream-7b"] = ModelConfig(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    max_position_embeddings=131072,
    architecture="qwen2",
    qk_norm=False,
    qkv_bias=True,
    bos_token_id=151643,
    eos_token_id=151643,
    stop_token_ids=(151643,),
    objective="masked_diffusion",
    shifted=True,
    block_origin="response",
    mask_token_id=151666,
    model_type="Dream",
)
PRESETS |= {
    f"sdar-{size}": _sdar(PRESETS[f"qwen3-{size}"]) for size in ("1.7b", "4b", "8b", "30b-a3b")
}
