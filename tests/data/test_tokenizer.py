"""Tokenizers as people have them: what their files say is what is read, the same in training and in decoding."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from sdar_jax.data import DataConfig, SourceConfig, load_tokenizer, make_dataset
from sdar_jax.data.tokenizer import Encoder, TokenIds, token_ids
from sdar_jax.decoding.prompts import to_ids
from sdar_jax.errors import CheckpointError, DataError, DecodingError
from sdar_jax.hf import released
from tests.data.conftest import EOS, SPECIAL, make_byte_tokenizer

BYTES = len(make_byte_tokenizer())


def save(path: Path, made: PreTrainedTokenizerFast | None = None, /, **files: dict) -> Path:
    """A tokenizer's directory; `files` are merged into its JSON files of these names, "config" into config.json."""
    (made or make_byte_tokenizer()).save_pretrained(path)
    for name, values in files.items():
        file = path / f"{name}.json"
        file.write_text(
            json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **values})
        )
    return path


def added(token_id: int, content: str, **changes: bool) -> dict:
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return {"id": token_id, "content": content, **flags, **changes}


def with_tokens(path: Path, tokens: dict[str, int], **settings: str) -> Path:
    """Tokens at ids of their own, behind those of the bytes."""
    save(path, tokenizer_config=settings)
    file = path / "tokenizer.json"
    values = json.loads(file.read_text())
    values["added_tokens"] += [added(token_id, content) for content, token_id in tokens.items()]
    values["model"]["vocab"] |= tokens
    file.write_text(json.dumps(values))
    return path


def single(*template: str) -> dict:
    """A post-processor that sets special tokens around a text, which is "$A"."""
    tokens = [token for token in template if token != "$A"]
    return json.loads(
        TemplateProcessing(
            single=" ".join(template),
            special_tokens=[(token, SPECIAL.index(token)) for token in tokens],
        ).__getstate__()
    )


@pytest.mark.parametrize(
    ("tokens", "settings", "expected"),
    [
        ({}, {}, TokenIds(BYTES, None)),
        ({"<|a|>": BYTES + 2}, {}, TokenIds(BYTES + 3, None)),
        (
            {"<|a|>": BYTES + 2, "<|MASK|>": BYTES + 7},
            {"mask_token": "<|MASK|>"},
            TokenIds(BYTES + 3, BYTES + 7),
        ),
        (
            {"<|MASK|>": BYTES + 2, "<|a|>": BYTES + 7},
            {"mask_token": "<|MASK|>"},
            TokenIds(BYTES + 8, BYTES + 2),
        ),
    ],
    ids=["dense", "hole", "mask behind", "mask between"],
)
def test_the_ids_in_use_are_counted_from_the_largest(tmp_path, tokens, settings, expected):
    tokenizer = load_tokenizer(with_tokens(tmp_path, tokens, **settings))
    assert token_ids(tokenizer) == expected
    assert token_ids(tokenizer).largest == max(tokenizer.get_vocab().values())


def test_a_word_that_reads_none_is_no_mask():
    """As SmolLM2's vocabulary has one, and its tokenizer no mask."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "None": 1, "mask": 2}, unk_token="<unk>"))
    without = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    assert token_ids(without) == TokenIds(3, None)
    its_own = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", mask_token="None")
    assert token_ids(its_own) == TokenIds(3, 1)


def test_a_mask_that_the_tokenizers_config_adds_is_its_own(tmp_path):
    """As in SDAR, whose tokenizer.json is Qwen3's."""
    entry = added(BYTES, "<|MASK|>")
    config = {"added_tokens_decoder": {str(entry.pop("id")): entry}, "mask_token": "<|MASK|>"}
    tokenizer = load_tokenizer(save(tmp_path, tokenizer_config=config))
    assert token_ids(tokenizer) == TokenIds(BYTES, BYTES)


def spaced() -> PreTrainedTokenizerFast:
    tokenizer = make_byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def normalized() -> PreTrainedTokenizerFast:
    tokenizer = make_byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Lowercase()]
    )
    return tokenizer


def digits(**special: str) -> PreTrainedTokenizerFast:
    """It knows no letter, and refuses what it does not know."""
    raw = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate([*SPECIAL, *"0123456789"])})
    )
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    raw.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=EOS, **special)


TEXT = "12 Ab <|im_end|>é"
A_BYTE, SPACE = (make_byte_tokenizer().encode(text) for text in (TEXT, " "))
LOWER = make_byte_tokenizer().encode(TEXT.lower())
TRUNCATION = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 40},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
}
PADDING |= {"pad_token": EOS}


@pytest.mark.parametrize(
    ("tokenizer", "changes", "expected"),
    [
        (make_byte_tokenizer, {}, A_BYTE),
        (make_byte_tokenizer, {"post_processor": single("$A", EOS)}, A_BYTE),
        (
            lambda: make_byte_tokenizer(bos_token="<s>"),
            {"post_processor": single("<s>", "$A", EOS)},
            [3, *A_BYTE],
        ),
        (make_byte_tokenizer, {"post_processor": single("<s>", "$A")}, [3, *A_BYTE]),
        (
            make_byte_tokenizer,
            {"post_processor": single("<|im_start|>", "<s>", "$A", EOS)},
            [1, 3, *A_BYTE],
        ),
        (
            lambda: make_byte_tokenizer(bos_token=EOS),
            {"post_processor": single(EOS, "$A", EOS)},
            [0, *A_BYTE],
        ),
        (spaced, {}, [*SPACE, *A_BYTE[:-2], *SPACE, *A_BYTE[-2:]]),
        (normalized, {}, LOWER),
        (make_byte_tokenizer, {"truncation": TRUNCATION}, A_BYTE),
        (make_byte_tokenizer, {"padding": PADDING}, A_BYTE),
    ],
    ids=[
        "plain",
        "end",
        "both",
        "undeclared",
        "two",
        "same",
        "space",
        "normalizer",
        "truncation",
        "padding",
    ],
)
def test_training_and_decoding_read_a_text_alike(
    tmp_path, write_jsonl, tokenizer, changes, expected
):
    loaded = load_tokenizer(save(tmp_path / "tokenizer", tokenizer(), tokenizer=changes))
    source = SourceConfig(write_jsonl([{"text": TEXT}]), "jsonl")
    data = make_dataset(
        DataConfig((source,), 64, 1, epochs=1), loaded, block_size=4, eos_token_id=0
    )
    batch = next(data)
    assert batch["tokens"][batch["segment_ids"] > 0].tolist() == [*expected, 0]
    assert to_ids(TEXT, 0, loaded).tolist() == Encoder(loaded).prompt(TEXT) == expected


def test_what_a_tokenizer_has_no_token_for_is_a_malformed_text(tmp_path, write_jsonl):
    """Also begin-of-text is found where no letter can be read."""
    loaded = load_tokenizer(save(tmp_path / "tokenizer", digits(bos_token="<s>")))
    loaded.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"<s> $A {EOS}", special_tokens=[("<s>", 3), (EOS, 0)]
    )
    path = write_jsonl([{"text": "12"}, {"text": "1a"}])
    config = DataConfig(
        (SourceConfig(path, "jsonl"),), 8, 1, epochs=1, shuffle=False, num_threads=0
    )
    data = make_dataset(config, loaded, block_size=4, eos_token_id=0)
    with pytest.raises(
        DataError, match=r"data.jsonl:2: text that the tokenizer cannot read \(.*Missing \[UNK\]"
    ):
        list(data)
    with pytest.raises(DecodingError, match="prompt 0 has text that the tokenizer cannot read"):
        to_ids("1a", 0, loaded)
    batch = next(
        make_dataset(replace(config, on_error="skip"), loaded, block_size=4, eos_token_id=0)
    )
    assert batch["tokens"][0, :4].tolist() == [*to_ids("12", 0, loaded), 0] == [3, 5, 6, 0]


def test_an_empty_prompt_is_what_stands_before_every_text(tmp_path):
    changes = {"post_processor": single("<s>", "$A", EOS)}
    loaded = load_tokenizer(save(tmp_path, tokenizer=changes))
    assert to_ids("", 0, loaded).tolist() == [3]


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "sdar", None])
def test_the_file_decides_whatever_model_it_lies_beside(tmp_path, model_type):
    """transformers would put Qwen's own pre-tokenizer, which splits each digit, into a qwen2 model's tokenizer."""
    letters = [EOS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "123"]
    raw = Tokenizer(
        models.BPE({token: i for i, token in enumerate(letters)}, [("1", "2"), ("12", "3")])
    )
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.add_special_tokens([EOS])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=EOS)
    made.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }}"}
    config = {} if model_type is None else {"config": {"model_type": model_type}}
    loaded = load_tokenizer(
        save(tmp_path, made, tokenizer_config={"tokenizer_class": "Qwen2Tokenizer"}, **config)
    )
    assert loaded.encode("a 123") == raw.encode("a 123").ids and len(loaded) == len(letters)
    assert (loaded.eos_token, loaded.bos_token, loaded.chat_template) == (
        EOS,
        None,
        made.chat_template,
    )


def test_the_class_that_is_named_reads_a_directory_without_tokenizer_json(tmp_path):
    """As SDAR's own, with vocab.json and merges.txt."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    (tmp_path / "vocab.json").write_text(
        json.dumps({token: i for i, token in enumerate([*alphabet, "ab"])})
    )
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "auto_map": {"AutoTokenizer": ["own.Tokenizer", None]},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "sdar"}))
    assert load_tokenizer(tmp_path).encode("ab") == [256]


@pytest.mark.parametrize("kind", ["tokenizer.json", "vocab.json"])
def test_code_of_a_directory_is_never_run_nor_asked_about(tmp_path, kind):
    """With standard input held open, as a terminal holds it."""
    save(tmp_path, config={"model_type": "sdar"})
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\nclass Own: pass\n"
    (tmp_path / "own.py").write_text(code)
    for name, key in [("config", "AutoConfig"), ("tokenizer_config", "AutoTokenizer")]:
        reference = "own.Own" if key == "AutoConfig" else ["own.Own", "own.Own"]
        save(tmp_path, **{name: {"auto_map": {key: reference}, "trust_remote_code": True}})
    if kind == "vocab.json":
        vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({**config, "tokenizer_class": "Qwen2Tokenizer"})
        )
    program = "import sys; from sdar_jax.data import load_tokenizer; load_tokenizer(sys.argv[1])"
    command = [sys.executable, "-c", program, str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as child:
        try:
            child.wait(timeout=60)
        finally:
            child.kill()
        assert (child.stdout.read(), child.returncode) == ("", 0), child.stderr.read()
    assert not (tmp_path / "ran").exists()


def test_a_hub_ids_tokenizer_comes_without_the_weights(tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(repo: str, *, allow_patterns: list[str]) -> str:
        asked[repo] = allow_patterns
        return str(save(tmp_path))

    monkeypatch.setattr(released, "snapshot_download", snapshot_download)
    assert len(load_tokenizer("org/name")) == BYTES
    assert (
        "tokenizer.json" in asked["org/name"]
        and "additional_chat_templates/*.jinja" in asked["org/name"]
    )
    assert not any("safetensors" in pattern for pattern in asked["org/name"])


def test_a_sound_tokenizer_put_where_none_could_be_read_is_read(tmp_path):
    for content in (None, "{"):
        if content is not None:
            (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(
            CheckpointError, match="no tokenizer can be read from it .*; put a sound tokenizer.json"
        ):
            load_tokenizer(tmp_path)
    (save(tmp_path / "sound") / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path).encode("a") == make_byte_tokenizer().encode("a")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "ab\ud83d",
            r"a lone surrogate at character 2 \(U\+D83D: half of a character\); write it as valid Unicode",
        ),
        (
            "ab\udcc3",
            r"at character 2 \(U\+DCC3, byte 0xc3 of text that is not UTF-8 or was cut: half of a ch",
        ),
    ],
)
def test_a_text_that_ends_inside_a_character_is_named(tokenizer, text, reason):
    with pytest.raises(DataError, match=reason):
        Encoder(tokenizer)(text)
    with pytest.raises(DecodingError, match=f"prompt 3 has .*{reason}"):
        to_ids(text, 3, tokenizer)
    assert len(to_ids("ab\u00e9", 3, tokenizer)) == 4
