"""Fields of Hugging Face's JSON files that this library does not read: which change nothing, which must be refused.

Each table maps a field to the values at which it changes nothing; null and what is empty never do.
"""

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

# A run reads the same config.json more than once.
warn_once = cache(logging.getLogger(__name__).warning)

Harmless = Mapping[str, tuple[Any, ...]]


def is_harmless(name: str, value: Any, harmless: Harmless) -> bool:
    """Returns whether a field that is not read changes nothing."""
    if value in (None, {}, []):
        return True
    if name not in harmless:
        return False
    return not harmless[name] or value in harmless[name]


def unread_fields(fields: Mapping[str, Any], harmless: Harmless) -> list[str]:
    """Lists the names, sorted, of those that may change something."""
    return sorted(name for name, value in fields.items() if not is_harmless(name, value, harmless))


def _any_value(names: str) -> dict[str, tuple[Any, ...]]:
    return dict.fromkeys(names.split(), ())


# Fields of config.json that change what a model computes: other values than these are refused; () is any value. A field
# that brings tensors of its own needs no entry, as tensors that the config does not account for are refused.
SUPPORTED_AT: Harmless = {
    "hidden_act": ("silu",),
    "use_regular_causal": (False,),
    "block_causal_prompt": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "use_mrope": (False,),
    "alibi": (False,),
    "no_rope_layers": (),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "attention_logit_cap": (0,),
    "logits_soft_cap": (0,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "scale_emb": (1,),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "scale_depth": (),
    "clip_qkv": (),
    "quantization_config": (),
    "compression_config": (),
    "quantization": (),
}

# From here on, fields that need not be read; () is harmless at any value.
# Of config.json: they do not change what a model computes.
HARMLESS: Harmless = {
    # Where it comes from.
    **_any_value(
        "_name_or_path _commit_hash architectures auto_map finetuning_task tokenizer_class"
    ),
    **_any_value("transformers_version unsloth_fixed unsloth_version"),
    # How other software holds, runs or trains it.
    **_any_value(
        "_attn_implementation _attn_implementation_autoset attn_implementation experts_implementation"
    ),
    **_any_value(
        "chunk_size_feed_forward debug dtype torch_dtype ep_size fuse_cross_entropy gradient_checkpointing"
    ),
    **_any_value(
        "keys_to_ignore_at_inference micro_forward output_attentions output_hidden_states"
    ),
    **_any_value(
        "output_router_logits pretraining_tp return_dict skip_checkpoint tf_legacy_loss torchscript"
    ),
    **_any_value("use_bfloat16 use_cache use_deepep use_liger_kernel"),
    # Of training, in which nothing is dropped here.
    **_any_value("attention_dropout hidden_dropout embd_pdrop resid_pdrop neftune_noise_alpha"),
    # Heads of other tasks, and encoders.
    **_any_value(
        "cross_attention_hidden_size decoder_start_token_id id2label is_decoder label2id pad_token_id prefix"
    ),
    **_any_value("problem_type pruned_heads sep_token_id task_specific_params tie_encoder_decoder"),
    # Defaults of decoding, which old files hold; DecodingConfig decides.
    **_any_value(
        "bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping length_penalty"
    ),
    **_any_value(
        "encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id"
    ),
    **_any_value(
        "forced_eos_token_id max_length max_new_tokens min_length no_repeat_ngram_size num_beam_groups"
    ),
    **_any_value(
        "num_beams num_return_sequences output_scores remove_invalid_values repetition_penalty"
    ),
    **_any_value("return_dict_in_generate suppress_tokens temperature top_k top_p typical_p"),
}

# Of LLaDA's config.json, in OLMo's words: how it was made, run and first drawn.
LLADA_HARMLESS: Harmless = _any_value(
    "alibi_bias_max attention_layer_norm_with_affine embedding_dropout flash_attention init_cutoff_factor init_device "
    "init_fn mlp_ratio precision residual_dropout rope_full_precision train_max_sequence_length"
)

# Of LLaDA2's config.json: how it was trained, and the dtype of the router, float32 here too.
LLADA2_HARMLESS: Harmless = _any_value("embedding_dropout output_dropout router_dtype")

# Of rope_scaling, whatever its type.
ROPE_HARMLESS: Harmless = {
    **_any_value("rope_type type rope_theta finetuned"),
    "factor": (1,),
    "attention_factor": (1,),
    "attn_factor": (1,),
    "extrapolation_factor": (1,),
    "partial_rotary_factor": (1,),
    "truncate": (True,),
}

# Of generation_config.json: how to sample and how long is for DecodingConfig and the caller to say.
GENERATION_HARMLESS: Harmless = {
    **_any_value(
        "_from_model_config bos_token_id decoder_start_token_id eos_token_id pad_token_id"
    ),
    **_any_value(
        "do_sample max_length max_new_tokens min_p temperature top_k top_p transformers_version"
    ),
    **_any_value(
        "cache_config cache_implementation compile_config disable_compile low_memory max_time use_cache"
    ),
    **_any_value(
        "output_attentions output_hidden_states output_logits output_scores return_dict_in_generate"
    ),
    "diversity_penalty": (0,),
    "early_stopping": (False,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "guidance_scale": (1,),
    "length_penalty": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "repetition_penalty": (1,),
    "token_healing": (False,),
    "typical_p": (1,),
}
