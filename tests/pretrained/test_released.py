"""Where a model's name and its mask's id are read from."""

import json
from pathlib import Path

import pytest

from sdar_jax.errors import CheckpointError
from sdar_jax.hf import read_model_config, released
from tests.released import MASK, write_released

CACHED = "models--JetLM--SDAR-8B-Chat-b32/snapshots/3f0c9a"


@pytest.mark.parametrize(
    ("directory", "size"),
    [
        (CACHED, 32),
        ("SDAR-8B-Chat-b16", 16),
        ("SDAR-8B-Chat-b0", 4),
        ("SDAR-8B-Chat-b16-sft", 4),
        ("runs/model", 4),
    ],
)
def test_the_name_tells_the_block_size(directory: str, size: int, tmp_path: Path) -> None:
    (tmp_path / directory).parent.mkdir(parents=True, exist_ok=True)
    write_released(tmp_path, "SDAR-1.7B-Chat").rename(tmp_path / directory)
    assert read_model_config(tmp_path / directory).block_size == size


def test_a_hub_id_is_read_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / CACHED
    cached.parent.mkdir(parents=True)
    write_released(tmp_path, "SDAR-1.7B-Chat").rename(cached)
    monkeypatch.setattr(released, "snapshot_download", lambda *_, **__: str(cached))
    assert read_model_config("JetLM/SDAR-8B-Chat-b32").block_size == 32


MASKED = {"mask_token": "<|M|>"}
SPELLINGS = [
    ({"mask_token": {"content": "<|M|>"}, "added_tokens_decoder": {"7": {"content": "<|M|>"}}}, {}),
    (MASKED, {"tokenizer.json": {"added_tokens": [{"id": 7, "content": "<|M|>"}]}}),
    (MASKED, {"tokenizer.json": {"model": {"vocab": {"<|M|>": 7}}}}),
    (MASKED, {"added_tokens.json": {"<|M|>": 7}}),
    ({}, {"special_tokens_map.json": MASKED, "added_tokens.json": {"<|M|>": 7}}),
    # The id that the first file has counts, as in SDAR, whose files disagree on the text.
    (
        {"mask_token": "<|M|>", "added_tokens_decoder": {"7": {"content": "<|M|>"}}},
        {"special_tokens_map.json": {"mask_token": "<M>"}, "added_tokens.json": {"<M>": 9}},
    ),
]


@pytest.mark.parametrize(("settings", "others"), SPELLINGS)
def test_the_tokenizers_files_tell_the_mask(settings: dict, others: dict, tmp_path: Path) -> None:
    directory = write_released(tmp_path, "SDAR-1.7B-Chat")
    for file in ("tokenizer.json", "special_tokens_map.json", "added_tokens.json"):
        (directory / file).unlink()
    for file, values in {"tokenizer_config.json": settings, **others}.items():
        (directory / file).write_text(json.dumps(values))
    assert read_model_config(directory).mask_token_id == 7


def test_without_one_there_is_none(tmp_path: Path) -> None:
    directory = write_released(tmp_path, "SDAR-1.7B-Chat")
    assert read_model_config(directory).mask_token_id == MASK
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (directory / file).unlink()
    assert read_model_config(directory).mask_token_id is None


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    directory = write_released(tmp_path, "SDAR-1.7B-Chat")
    (directory / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer_config.json: not JSON"):
        read_model_config(directory)
