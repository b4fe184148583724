"""`ModelConfig`: the shape of a Qwen3-like decoder, and what it was trained to predict.

Field names are the field's; `from_hf` and `to_hf` translate to and from Hugging Face's config.json.
"""

import dataclasses
import json
import logging
import math
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from sdar_jax.errors import CheckpointError, ConfigError, check_choices, is_int, is_number
from sdar_jax.model.hf_fields import (
    HARMLESS,
    ROPE_HARMLESS,
    SUPPORTED_AT,
    is_harmless,
    unread_fields,
)
from sdar_jax.paradigm import BlockOrigin, Objective, Paradigm, fills_masks, has_blocks, paradigm_of
from sdar_jax.visibility import check_block_size

Architecture = Literal["qwen3", "qwen3_moe", "qwen2", "llama"]
RopeType = Literal["default", "linear", "llama3", "yarn"]

log = logging.getLogger(__name__)
# A run reads the same config.json more than once.
_warn_once = cache(log.warning)

# What Hugging Face calls each RoPE parameter is what we call it, so one list serves reading and writing.
_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "beta_fast",
        "beta_slow",
        "original_max_position_embeddings",
        "attention_factor",
    ),
}
_ROPE_REQUIRED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
# A type that is named does not use the parameters of another, which are left behind when a type is changed.
_ROPE_UNUSED = {**{name: () for names in _ROPE_FIELDS.values() for name in names}, **ROPE_HARMLESS}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base `theta`, and how its frequencies are scaled, with Hugging Face's parameter names."""

    theta: float = 1_000_000.0
    rope_type: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self):
        if self.rope_type not in _ROPE_FIELDS:
            raise ConfigError(
                f"rope_type {self.rope_type!r} is not supported; use one of {list(_ROPE_FIELDS)}"
            )
        if self.rope_type == "llama3" and self.original_max_position_embeddings is None:
            raise ConfigError(
                "rope_type 'llama3' needs original_max_position_embeddings; add it to rope_scaling"
            )
        for name in (
            "theta",
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "beta_fast",
            "beta_slow",
        ):
            if not is_number(getattr(self, name)) or getattr(self, name) <= 0:
                raise ConfigError(f"rope {name} is {getattr(self, name)!r}; give a positive number")
        if self.attention_factor is not None and not is_number(self.attention_factor):
            raise ConfigError(
                f"rope attention_factor is {self.attention_factor!r}; give a number, or leave it out"
            )
        original = self.original_max_position_embeddings
        if original is not None and not (is_int(original) and original > 0):
            raise ConfigError(
                f"rope original_max_position_embeddings is {original!r}; give a positive integer"
            )
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            factors = f"low_freq_factor {self.low_freq_factor} is not below high_freq_factor {self.high_freq_factor}"
            raise ConfigError(f"rope {factors}; give a lower one")

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "RopeConfig":
        """Reads `rope_theta` and `rope_scaling`, or transformers 5's `rope_parameters`.

        Where both are there, `rope_scaling` was added by hand and is what counts, as in transformers 5.
        """
        written = _rope_table(config, "rope_parameters")
        added = _rope_table(config, "rope_scaling")
        scaling = added or written
        rope_type = scaling.get("rope_type") or scaling.get("type") or "default"
        if added and written.get("rope_type", "default") not in ("default", rope_type):
            _warn_once(
                "config.json: rope_scaling is read and rope_parameters, which says otherwise, is ignored"
            )
        thetas = (
            scaling.get("rope_theta"),
            config.get("rope_theta"),
            written.get("rope_theta"),
            10_000.0,
        )
        theta = next(theta for theta in thetas if theta is not None)
        if rope_type not in _ROPE_FIELDS:
            raise ConfigError(
                f"rope_type {rope_type!r} is not supported; use one of {list(_ROPE_FIELDS)}"
            )
        given = {
            name: scaling[name] for name in _ROPE_FIELDS[rope_type] if scaling.get(name) is not None
        }
        if rope_type == "yarn":
            scaling, given = _with_mscale(scaling, given)
        unread = {
            name
            for name in set(scaling) - set(given)
            if not is_harmless(name, scaling[name], _ROPE_UNUSED)
        }
        if unread:
            raise ConfigError(
                f"rope_scaling of type {rope_type!r} has unsupported fields {sorted(unread)}; remove them, or give the "
                "rope_type that they belong to"
            )
        lacking = [name for name in _ROPE_REQUIRED.get(rope_type, ()) if name not in given]
        if lacking:
            raise ConfigError(
                f"rope_scaling of type {rope_type!r} lacks {', '.join(lacking)}; add what the model had"
            )
        return cls(theta=theta, rope_type=rope_type, **given)

    def to_hf(self) -> dict[str, Any]:
        """Writes the classic keys, which every transformers version reads."""
        if self.rope_type == "default":
            return {"rope_theta": self.theta}
        values = {name: getattr(self, name) for name in _ROPE_FIELDS[self.rope_type]}
        given = {name: value for name, value in values.items() if value is not None}
        return {"rope_theta": self.theta, "rope_scaling": {"rope_type": self.rope_type, **given}}


def _rope_table(config: dict[str, Any], name: str) -> dict[str, Any]:
    table = config.get(name) or {}
    if not isinstance(table, dict):
        raise ConfigError(
            f"{name} is {table!r}; give an object such as {{'rope_type': 'yarn', 'factor': 4.0}}"
        )
    # transformers 5 may write a table for each kind of attention; other kinds are refused by layer_types.
    return table.get("full_attention", table)


def _with_mscale(
    scaling: dict[str, Any], given: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Derives YaRN's attention factor from DeepSeek's two scales, where both are there, and takes these out."""
    names = ("mscale", "mscale_all_dim")
    scales = [scaling.get(name, 0) for name in names]
    factor = given.get("factor", 0)
    if not all(is_number(value) and value > 0 for value in (*scales, factor)):
        return scaling, given
    numerator, denominator = (0.1 * scale * math.log(max(factor, 1)) + 1.0 for scale in scales)
    rest = {name: value for name, value in scaling.items() if name not in names}
    return rest, {"attention_factor": numerator / denominator, **given}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and purpose of a model; hashable, saved with it and read back.

    An MoE (`num_experts` > 0, architecture "qwen3_moe") has experts in every layer.

    Raises:
        ConfigError: a field out of its range, or fields that contradict each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Width of the dense feed-forward; an MoE only carries it."""
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
    """Whether the gates of a token's experts add up to one."""
    router_aux_loss_coef: float = 0.001
    """Coefficient of the balance loss in training."""
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

    def _check_experts(self) -> None:
        names = ("num_experts", "num_experts_per_token", "moe_intermediate_size")
        sizes = {name: getattr(self, name) for name in names}
        sparse = self.architecture == "qwen3_moe"
        if not sparse and any(size != 0 for size in sizes.values()):
            raise ConfigError(
                f"architecture {self.architecture!r} has no experts; leave out {', '.join(sizes)}"
            )
        for name, size in sizes.items():
            if sparse and (not is_int(size) or size < 1):
                raise ConfigError(
                    f"{name} is {size!r}; architecture 'qwen3_moe' needs a positive integer"
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
            CheckpointError: no such file, or not JSON. ConfigError: an architecture or option that is not supported.
        """
        config = source if isinstance(source, dict) else _read_config(Path(source))
        model_type = config.get("model_type")
        if model_type in _CONVERTED:
            defaults = {"objective": "block_diffusion"}
            architecture = config.get("base_model_type", _CONVERTED[model_type])
        else:
            defaults = {"objective": "autoregressive"}
            architecture = model_type
        if architecture not in get_args(Architecture):
            supported = ", ".join((*_CONVERTED, *get_args(Architecture)))
            raise ConfigError(f"model_type {model_type!r} is not supported; supported: {supported}")
        _refuse_unsupported(config, architecture)
        if unread := _unread(config, architecture):
            file = "config.json" if isinstance(source, dict) else str(source)
            _warn_once(
                f"{file}: unknown fields are ignored: {', '.join(unread)}; if they change what the model computes, its "
                "results here are wrong"
            )
        purpose = {
            name: config.get(name, default) for name, default in {**_PURPOSE, **defaults}.items()
        }
        return cls(**_shape(config, architecture), **purpose)

    def to_hf(self) -> dict[str, Any]:
        """Makes the config.json: its architecture's own for an AR model; once converted, `model_type` sdar or
        sdar_moe."""
        model_type: str = self.architecture
        if fills_masks(self.objective):
            model_type = "sdar_moe" if self.num_experts else "sdar"
        config = {
            "architectures": [_HF_CLASS[model_type]],
            "model_type": model_type,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "use_cache": True,
            **{theirs: getattr(self, ours) for ours, theirs in _HF_NAMES.items()},
            **self.rope.to_hf(),
        }
        if self.architecture != "qwen2":
            config["attention_bias"] = self.qkv_bias
        if self.architecture == "llama":
            config["mlp_bias"] = self.mlp_bias
        if self.num_experts:
            config |= {theirs: getattr(self, ours) for ours, theirs in _HF_EXPERTS.items()}
            config |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
        if _CONVERTED.get(model_type, self.architecture) != self.architecture:
            config["base_model_type"] = self.architecture
        purpose = {name: getattr(self, name) for name in _PURPOSE}
        changed = {name: value for name, value in purpose.items() if value != _PURPOSE[name]}
        return {**config, **changed}


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
_PURPOSE = {
    "objective": "autoregressive",
    "block_size": None,
    "mask_token_id": None,
    "block_origin": "sequence",
    "shifted": False,
    "causal_clean": False,
    "bidirectional_prompt": False,
}
# Model types of converted models, and the architecture that each has unless its config says otherwise.
_CONVERTED = {"sdar": "qwen3", "sdar_moe": "qwen3_moe"}
_HF_CLASS = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "sdar": "SDARForCausalLM",
    "sdar_moe": "SDARMoeForCausalLM",
}
_HF_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "max_position_embeddings": "max_position_embeddings",
    "initializer_range": "initializer_range",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}
_HF_EXPERTS = {
    "num_experts": "num_experts",
    "num_experts_per_token": "num_experts_per_tok",
    "moe_intermediate_size": "moe_intermediate_size",
    "norm_topk_prob": "norm_topk_prob",
    "router_aux_loss_coef": "router_aux_loss_coef",
}
_HF_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_HF_READ = {
    *_HF_NAMES.values(),
    *_PURPOSE,
    "model_type",
    "base_model_type",
    "attention_bias",
    "mlp_bias",
}
_HF_READ |= {"rope_theta", "rope_scaling", "rope_parameters", "layer_types", "use_sliding_window"}
_HF_READ_OF_EXPERTS = {
    *_HF_EXPERTS.values(),
    "num_local_experts",
    "decoder_sparse_step",
    "mlp_only_layers",
}


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{file}: no such file; give a Hugging Face model directory"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: not JSON ({error}); restore the file") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: not a JSON object; restore the file")
    return config


def _refuse_unsupported(config: dict[str, Any], architecture: Any) -> None:
    for name, values in SUPPORTED_AT.items():
        value = config.get(name)
        if value not in (None, {}, [], *values):
            fix = f"only {values[0]!r} is" if values else "use a model without it"
            raise ConfigError(f"{name} {repr(value)[:60]} is not supported; {fix}")
    if config.get("use_sliding_window"):
        raise ConfigError("use_sliding_window is true; only full attention is supported")
    if other := set(config.get("layer_types") or ()) - {"full_attention"}:
        raise ConfigError(
            f"layer_types holds {', '.join(sorted(other))}; only full_attention is supported"
        )
    if config.get("mlp_bias") and architecture != "llama":
        raise ConfigError(
            f"mlp_bias is true; model_type {config['model_type']!r} has none, set it to false"
        )
    missing = [name for name in _HF_REQUIRED if name not in config]
    if missing:
        raise ConfigError(f"config.json lacks {', '.join(missing)}; restore the file")
    for name in _HF_REQUIRED:
        if not isinstance(config[name], int) or config[name] < 1:
            raise ConfigError(f"{name} is {config[name]!r}; give a positive integer")


def _unread(config: dict[str, Any], architecture: Any) -> list[str]:
    """Lists the fields that are neither read nor known to change nothing."""
    read = _HF_READ | set(SUPPORTED_AT)
    if architecture == "qwen3_moe":
        read |= _HF_READ_OF_EXPERTS
    if "use_sliding_window" in config or config.get("sliding_window") is None:
        read |= {"sliding_window", "max_window_layers"}
    return unread_fields(
        {name: value for name, value in config.items() if name not in read}, HARMLESS
    )


def _shape(config: dict[str, Any], architecture: Any) -> dict[str, Any]:
    """Reads the shape's fields, with the defaults that transformers gives each architecture."""
    heads = config["num_attention_heads"]
    rope = RopeConfig.from_hf(config)
    bias = config.get("attention_bias", False)
    eos = config.get("eos_token_id")
    stops = eos if isinstance(eos, list) else [eos]
    if eos is None:
        stops = []
    if not all(map(is_int, stops)):
        raise ConfigError(f"eos_token_id is {eos!r}; give a token id, or a list of them")
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim")
        or (128 if architecture == "qwen3" else config["hidden_size"] // heads),
        **(_experts(config) if architecture == "qwen3_moe" else {}),
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope": rope,
        "qk_norm": architecture in ("qwen3", "qwen3_moe"),
        "qkv_bias": architecture == "qwen2" or bias,
        "output_bias": architecture != "qwen2" and bias,
        "mlp_bias": architecture == "llama" and config.get("mlp_bias", False),
        "tie_embeddings": config.get("tie_word_embeddings", False),
        "max_position_embeddings": _context_length(
            config.get("max_position_embeddings", 32768), rope
        ),
        "initializer_range": config.get("initializer_range", 0.02),
        "architecture": architecture,
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_id": stops[0] if stops else None,
        "stop_token_ids": tuple(stops),
    }


def _context_length(stated: Any, rope: RopeConfig) -> Any:
    """Computes what YaRN reaches, `factor` times the original length; files leave max_position_embeddings as it was."""
    if rope.rope_type != "yarn" or not is_int(stated):
        return stated
    if rope.original_max_position_embeddings is None:
        _warn_once(
            "config.json: rope_scaling of type 'yarn' lacks original_max_position_embeddings; "
            f"max_position_embeddings {stated} is taken for it, and the context stays that long"
        )
        return stated
    return max(stated, round(rope.factor * rope.original_max_position_embeddings))


def _experts(config: dict[str, Any]) -> dict[str, Any]:
    """Reads the experts' fields of an MoE that has experts in every layer."""
    step = config.get("decoder_sparse_step", 1)
    dense = config.get("mlp_only_layers") or []
    if step != 1:
        raise ConfigError(
            f"decoder_sparse_step is {step!r}; only 1 is supported, experts in every layer"
        )
    if dense:
        raise ConfigError(
            f"mlp_only_layers is {dense!r}; only an empty list is supported, experts in every layer"
        )
    # Transformers 5 writes num_local_experts.
    found = {
        "num_experts": config.get("num_local_experts"),
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.001,
    }
    found |= {theirs: config[theirs] for theirs in _HF_EXPERTS.values() if theirs in config}
    missing = [theirs for theirs in _HF_EXPERTS.values() if found.get(theirs) is None]
    if missing:
        raise ConfigError(f"config.json lacks {', '.join(missing)}; restore the file")
    return {ours: found[theirs] for ours, theirs in _HF_EXPERTS.items()}


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
PRESETS |= {
    f"sdar-{size}": _sdar(PRESETS[f"qwen3-{size}"]) for size in ("1.7b", "4b", "8b", "30b-a3b")
}
