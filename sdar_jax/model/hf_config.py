"""Hugging Face's config.json in and out, for every family of models.

`FAMILIES` has an entry for each `model_type`; the rest is what they have in common. A family that names a field
otherwise says so (`renamed`), and from there on the field has the name that most give it.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from sdar_jax.errors import CheckpointError, ConfigError, is_int
from sdar_jax.model import hf_llada2
from sdar_jax.model.hf_fields import (
    HARMLESS,
    LLADA2_HARMLESS,
    LLADA_HARMLESS,
    SUPPORTED_AT,
    Harmless,
    unread_fields,
    warn_once,
)
from sdar_jax.model.rope_config import RopeConfig
from sdar_jax.paradigm import fills_masks

if TYPE_CHECKING:
    from sdar_jax.model.config import ModelConfig

Architecture = Literal["qwen3", "qwen3_moe", "qwen2", "llama", "llada2_moe"]


@dataclasses.dataclass(frozen=True)
class Family:
    """How the models of one `model_type` are written.

    Attributes:
        architecture: what shape they have, unless `base_model_type` names another.
        hf_class: what config.json gives as `architectures`.
        purpose: what its models are for, where config.json does not say: values other than those of `_PURPOSE`.
        converted: the `model_type` of its models once they fill masks; None: they keep this one.
        block_size: in what blocks its models are decoded, where neither config.json nor their name says it.
        mask_token_id: their mask, where neither config.json nor the tokenizer's files say it.
        named: purposes that its config.json does not tell apart, each by the part of a released name that does.
        one_class: whether other models, which `architectures` tells apart, go by the same `model_type`.
        renamed: fields that config.json has under other names, each to the name that most give it.
        reads: more fields that are read, whatever `SUPPORTED_AT` says of them.
        written: fields that are always written, and with what.
        not_written: fields that its config.json does not have.
        supported_at: more fields that change the computation, as `SUPPORTED_AT`.
        harmless: more fields that change nothing, as `HARMLESS`.
        tensors: which table of hf/tensor_names.py has its tensors' names.
    """

    architecture: Architecture
    hf_class: str
    purpose: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    converted: str | None = None
    block_size: int | None = None
    mask_token_id: int | None = None
    named: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    one_class: bool = True
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    reads: tuple[str, ...] = ()
    written: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    not_written: tuple[str, ...] = ()
    supported_at: Harmless = dataclasses.field(default_factory=dict)
    harmless: Harmless = dataclasses.field(default_factory=dict)
    tensors: str = "llama"

    def usual(self, objective: str | None) -> dict[str, Any]:
        """Returns what its models are for where their config.json says no more than this objective."""
        named = (each for each in self.named.values() if each["objective"] == objective)
        return {**_PURPOSE, **next(named, self.purpose)}


_SDAR = {"objective": "block_diffusion"}
_CANVAS = {"objective": "masked_diffusion", "block_origin": "response"}
# dllm's conversions: one model_type for what was trained with either of its objectives.
_A2D = {
    "purpose": _CANVAS,
    "block_size": 32,
    "named": {"bd3lm": {"objective": "block_diffusion"}, "mdlm": _CANVAS},
}
# OLMo's fields. Those that change the computation are as they are in a Llama.
_LLADA_NAMES = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "mlp_hidden_size": "intermediate_size",
    "embedding_size": "vocab_size",
    "weight_tying": "tie_word_embeddings",
    "max_sequence_length": "max_position_embeddings",
    "init_std": "initializer_range",
}
_LLADA_FIXED = {
    "activation_type": "silu",
    "attention_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "rope": True,
    "scale_logits": False,
}
_LLADA2 = {
    "purpose": {"objective": "block_diffusion"},
    "block_size": 32,
    "mask_token_id": 156895,
    "reads": hf_llada2.READ,
    "written": hf_llada2.FIXED,
    "not_written": ("attention_bias",),
    "supported_at": {name: (value,) for name, value in hf_llada2.FIXED.items()},
    "harmless": LLADA2_HARMLESS,
    "tensors": "bailing",
}
FAMILIES = {
    "sdar": Family("qwen3", "SDARForCausalLM", _SDAR, block_size=4),
    "sdar_moe": Family("qwen3_moe", "SDARMoeForCausalLM", _SDAR, block_size=4),
    "a2d-qwen3": Family("qwen3", "A2DQwen3LMHeadModel", **_A2D),
    "a2d-qwen2": Family("qwen2", "A2DQwen2LMHeadModel", **_A2D),
    "a2d-llama": Family("llama", "A2DLlamaLMHeadModel", **_A2D),
    "llada": Family(
        "llama",
        "LLaDAModelLM",
        _CANVAS,
        block_size=32,
        one_class=False,
        renamed=_LLADA_NAMES,
        written=_LLADA_FIXED,
        not_written=("attention_bias", "bos_token_id", "head_dim", "hidden_act", "mlp_bias"),
        supported_at={
            **{name: (value,) for name, value in _LLADA_FIXED.items()},
            "bias_for_layer_norm": (False,),
            "multi_query_attention": (False,),
        },
        harmless=LLADA_HARMLESS,
        tensors="olmo",
    ),
    "Dream": Family(
        "qwen2",
        "DreamModel",
        {**_CANVAS, "shifted": True},
        block_size=32,
        one_class=False,
        not_written=("head_dim",),
    ),
    "Fast_dLLM_Qwen": Family(
        "qwen2",
        "Fast_dLLM_QwenForCausalLM",
        {"objective": "block_diffusion", "shifted": True},
        block_size=32,
        mask_token_id=151665,
        renamed={"bd_size": "block_size"},
        not_written=("head_dim",),
        # Spelled so; its masks are an objective's to choose.
        harmless={"conplemenrary_mask": ()},
    ),
    "llada2_moe": Family("llada2_moe", "LLaDA2MoeModelLM", **_LLADA2),
    # dFactory's, with the experts' tensors merged; saved as released.
    "llada2_moe_veomni": Family(
        "llada2_moe", "LLaDA2MoeModelLM", converted="llada2_moe", **_LLADA2
    ),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", converted="sdar"),
    "qwen3_moe": Family("qwen3_moe", "Qwen3MoeForCausalLM", converted="sdar_moe"),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", converted="sdar"),
    "llama": Family("llama", "LlamaForCausalLM", converted="sdar"),
}
_PURPOSE = {
    "objective": "autoregressive",
    "block_size": None,
    "mask_token_id": None,
    "block_origin": "sequence",
    "shifted": False,
    "causal_clean": False,
    "bidirectional_prompt": False,
}
_NAMES = {
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
_EXPERTS = {
    "num_experts": "num_experts",
    "num_experts_per_token": "num_experts_per_tok",
    "moe_intermediate_size": "moe_intermediate_size",
    "norm_topk_prob": "norm_topk_prob",
    "router_aux_loss_coef": "router_aux_loss_coef",
}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_READ = {
    *_NAMES.values(),
    *_PURPOSE,
    "model_type",
    "base_model_type",
    "attention_bias",
    "mlp_bias",
}
_READ |= {"rope_theta", "rope_scaling", "rope_parameters", "layer_types", "use_sliding_window"}
_READ_OF_EXPERTS = {
    *_EXPERTS.values(),
    "num_local_experts",
    "decoder_sparse_step",
    "mlp_only_layers",
}


def read(source: "dict[str, Any] | str | Path") -> dict[str, Any]:
    """Reads the fields of a `ModelConfig` from a config.json: its dict, its path, or the directory that holds it.

    Raises:
        CheckpointError: no such file, or not JSON. ConfigError: a family or option that is not supported.
    """
    config = source if isinstance(source, dict) else _read_config(Path(source))
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ConfigError(
            f"model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    architecture = config.get("base_model_type", family.architecture)
    if architecture not in get_args(Architecture):
        raise ConfigError(
            f"base_model_type {architecture!r} is not supported; supported: {', '.join(get_args(Architecture))}"
        )
    named = config.get("architectures") or [family.hf_class]
    if not family.one_class and named != [family.hf_class]:
        raise ConfigError(
            f"architectures {named} of model_type {model_type!r} are not supported; only {family.hf_class!r} is"
        )
    config = _classic(config, family)
    _refuse_unsupported(config, family, architecture)
    if unread := _unread(config, family, architecture):
        file = "config.json" if isinstance(source, dict) else str(source)
        raise ConfigError(
            f"{file}: {', '.join(unread)} may change what the model computes and is not known here; remove what does "
            "not change it, or use another model"
        )
    usual = family.usual(config.get("objective"))
    purpose = {name: config.get(name, default) for name, default in usual.items()}
    told = (architecture, FAMILIES[architecture].converted)
    is_told = model_type in told or family.converted == architecture
    own = {} if is_told else {"model_type": model_type}
    return {**_shape(config, architecture), **purpose, **own}


def write(config: "ModelConfig") -> dict[str, Any]:
    """Makes the config.json of a model."""
    model_type, family = family_of(config)
    values = {
        "architectures": [family.hf_class],
        "model_type": model_type,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        # Released code of canvases refuses a cache.
        "use_cache": not fills_masks(config.objective),
        **{theirs: getattr(config, ours) for ours, theirs in _NAMES.items()},
        **config.rope.to_hf(),
    }
    if config.architecture != "qwen2":
        values["attention_bias"] = config.qkv_bias
    if config.architecture == "llama":
        values["mlp_bias"] = config.mlp_bias
    if config.architecture == "llada2_moe":
        values |= hf_llada2.write(config)
    elif config.num_experts:
        values |= {theirs: getattr(config, ours) for ours, theirs in _EXPERTS.items()}
        values |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    if family.architecture != config.architecture:
        values["base_model_type"] = config.architecture
    usual = family.usual(config.objective)
    if family.named:
        # A name would tell it, and the directory's may be any.
        del usual["objective"]
    purpose = {name: getattr(config, name) for name in _PURPOSE}
    values |= {n: value for n, value in purpose.items() if n not in usual or value != usual[n]}
    values |= {n: values[classic] for n, classic in family.renamed.items() if classic in values}
    # The tokenizer's size beside the table's; here they are one.
    unused = {*family.not_written, *family.renamed.values()} - {"vocab_size"}
    return {n: value for n, value in values.items() if n not in unused} | dict(family.written)


def family_of(config: "ModelConfig") -> tuple[str, Family]:
    """Finds the `model_type` that a model is saved as, and its family."""
    model_type = config.model_type or config.architecture
    converted = FAMILIES[model_type].converted
    if fills_masks(config.objective) and converted is not None:
        model_type = converted
    return model_type, FAMILIES[model_type]


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


def _classic(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """Gives the fields of a family the names that most give them; its own name for one counts where it has both."""
    others = {name: value for name, value in config.items() if name not in family.renamed}
    given = {name: config[name] for name in family.renamed if config.get(name) is not None}
    return {**others, **{family.renamed[name]: value for name, value in given.items()}}


def _refuse_unsupported(config: dict[str, Any], family: Family, architecture: Any) -> None:
    for name, values in {**SUPPORTED_AT, **family.supported_at}.items():
        value = None if name in family.reads else config.get(name)
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
    theirs = {classic: name for name, classic in family.renamed.items()}
    missing = [theirs.get(name, name) for name in _REQUIRED if name not in config]
    if missing:
        raise ConfigError(f"config.json lacks {', '.join(missing)}; restore the file")
    for name in _REQUIRED:
        if not isinstance(config[name], int) or config[name] < 1:
            raise ConfigError(
                f"{theirs.get(name, name)} is {config[name]!r}; give a positive integer"
            )


def _unread(config: dict[str, Any], family: Family, architecture: Any) -> list[str]:
    """Lists the fields that are neither read nor known to change nothing."""
    read = _READ | set(SUPPORTED_AT) | set(family.supported_at) | set(family.reads)
    if architecture == "qwen3_moe":
        read |= _READ_OF_EXPERTS
    if "use_sliding_window" in config or config.get("sliding_window") is None:
        read |= {"sliding_window", "max_window_layers"}
    return unread_fields(
        {name: value for name, value in config.items() if name not in read},
        {**HARMLESS, **family.harmless},
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
        **(_experts(config) if architecture == "qwen3_moe" else {}),
        **(hf_llada2.read(config, rope) if architecture == "llada2_moe" else {}),
    }


def _context_length(stated: Any, rope: RopeConfig) -> Any:
    """Computes what YaRN reaches, `factor` times the original length; files leave max_position_embeddings as it was."""
    if rope.rope_type != "yarn" or not is_int(stated):
        return stated
    if rope.original_max_position_embeddings is None:
        warn_once(
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
    found |= {theirs: config[theirs] for theirs in _EXPERTS.values() if theirs in config}
    missing = [theirs for theirs in _EXPERTS.values() if found.get(theirs) is None]
    if missing:
        raise ConfigError(f"config.json lacks {', '.join(missing)}; restore the file")
    return {ours: found[theirs] for ours, theirs in _EXPERTS.items()}
