import dataclasses

import pytest
import tyro

from sdar_jax.data import DataConfig, SourceConfig, load_tokenizer, make_dataset
from sdar_jax.errors import CheckpointError, ConfigError, DataError
from tests.data.conftest import make_byte_tokenizer

SOURCE = SourceConfig("data", "jsonl")
GOOD = DataConfig((SOURCE,), sequence_length=32, batch_size=4, packing="fit")

BAD_DATA = [
    ({"sequence_length": 0}, "sequence_length=0"),
    ({"batch_size": -1}, "batch_size=-1"),
    ({"noisy_length": 0}, "noisy_length=0"),
    ({"noisy_length": 33}, "noisy_length=33 is above sequence_length=32"),
    ({"noisy_length": 16, "packing": "split"}, "noisy_length=16 with packing='split'"),
    ({"noisy_length": 16, "segments": "row"}, "set pad_to_block"),
    ({"pad_to_row": True, "packing": "split"}, "pad_to_row with packing='split'"),
    ({"pad_to_row": True, "pad_to_block": True}, "leave pad_to_block out"),
    ({"epochs": 0}, "epochs=0"),
    ({"num_threads": -1}, "num_threads=-1"),
    ({"seed": -1}, "seed=-1"),
    ({"packing": "best"}, "packing='best': choose one of split, fit"),
    ({"segments": "batch"}, "segments='batch'"),
    ({"loss": "prompt"}, "loss='prompt'"),
    ({"too_long": "keep"}, "too_long='keep'"),
    ({"on_error": "ignore"}, "on_error='ignore'"),
    ({"shards": 0}, "shards=0"),
    ({"shards": 3}, "shards=3 does not divide batch_size=4"),
    ({"shards": 2, "epochs": 1}, "shards=2 with epochs=1"),
]

BAD_SOURCE = [
    ({"format": "csv"}, "format='csv'"),
    ({"weight": 0.0}, "weight=0.0"),
    ({"weight": float("nan")}, "weight=nan"),
    ({"separator": "--"}, "separator='--' with format='jsonl'"),
    ({"format": "text", "separator": ""}, "separator=''"),
    ({"format": "chat", "field": "turns"}, "field='turns' with format='chat': set prompt_field"),
    ({"format": "text", "field": "q"}, "with format='text', which has none"),
    ({"format": "text", "prompt_field": "q"}, "with format='text', which has none"),
]


def replace_unchecked(config, **change):
    """dataclasses.replace without the type checks that only the tests add, so that the config's own are met."""
    changed = object.__new__(type(config))
    changed.__dict__.update(config.__dict__ | change)
    changed.__post_init__()
    return changed


@pytest.mark.parametrize(("change", "message"), BAD_DATA)
def test_bad_data_config(change, message):
    with pytest.raises(ConfigError, match=message) as raised:
        replace_unchecked(GOOD, **change)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("change", "message"), BAD_SOURCE)
def test_bad_source_config(change, message):
    with pytest.raises(ConfigError, match=message) as raised:
        replace_unchecked(SOURCE, **change)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "numbers", "message"),
    [
        ({}, {"block_size": 0}, "block_size=0"),
        (
            {"pad_to_block": True},
            {"block_size": 5},
            "sequence_length=32 is no multiple of block_size=5",
        ),
        (
            {},
            {"rows": [3, 4]},
            r"rows=\[3, 4\]: give ascending numbers from 0 to batch_size - 1, 3",
        ),
        ({}, {"rows": [1, 0]}, "rows="),
        ({}, {"rows": []}, "rows="),
    ],
)
def test_numbers_that_do_not_fit(write_jsonl, tokenizer, eos, change, numbers, message):
    source = SourceConfig(write_jsonl([{"text": "a"}]), "jsonl")
    config = dataclasses.replace(GOOD, sources=(source,), **change)
    with pytest.raises(ConfigError, match=message):
        make_dataset(config, tokenizer, **{"block_size": 4, "eos_token_id": eos, **numbers})


def test_a_length_that_pad_to_block_advises_is_taken(write_jsonl, tokenizer, eos):
    source = SourceConfig(write_jsonl([{"text": "a"}]), "jsonl")
    config = dataclasses.replace(GOOD, sources=(source,), pad_to_block=True)
    with pytest.raises(
        ConfigError, match="as pad_to_block needs; use 35, or leave pad_to_block out"
    ):
        make_dataset(config, tokenizer, block_size=5, eos_token_id=eos)
    for change in ({"sequence_length": 35}, {"pad_to_block": False}):
        next(
            make_dataset(
                dataclasses.replace(config, **change), tokenizer, block_size=5, eos_token_id=eos
            )
        )


def test_a_chat_source_needs_a_chat_template(write_jsonl):
    tokenizer = make_byte_tokenizer(chat_template=None)
    config = dataclasses.replace(
        GOOD, sources=(SourceConfig(write_jsonl([{"messages": []}]), "chat"),)
    )
    with pytest.raises(ConfigError, match="no chat template"):
        make_dataset(config, tokenizer, block_size=4, eos_token_id=0)


def test_the_command_line_sets_every_kind_of_field():
    arguments = ["--noisy-length", "16", "--epochs", "2", "--no-shuffle", "--pad-to-block"]
    config = tyro.cli(
        DataConfig, default=GOOD, args=[*arguments, "--too-long", "cut", "--seed", "3"]
    )
    changes = {
        "noisy_length": 16,
        "epochs": 2,
        "shuffle": False,
        "pad_to_block": True,
        "too_long": "cut",
        "seed": 3,
    }
    assert config == dataclasses.replace(GOOD, **changes)


def test_a_tokenizer_directory_that_cannot_be_read(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no tokenizer can be read"):
        load_tokenizer(tmp_path)


def test_a_saved_tokenizer_is_read_back(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.encode("é<|im_end|>") == tokenizer.encode("é<|im_end|>")
    assert again.chat_template == tokenizer.chat_template


def test_sources_without_files(tmp_path, tokenizer, eos):
    def make(path, format="jsonl"):
        return make_dataset(
            dataclasses.replace(GOOD, sources=(SourceConfig(str(path), format),)),
            tokenizer,
            block_size=4,
            eos_token_id=eos,
        )

    with pytest.raises(DataError, match=f"{tmp_path}/none.jsonl: no such file"):
        make(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no glob that matches"):
        make(tmp_path / "*.jsonl")
    with pytest.raises(DataError, match="no .jsonl or .ndjson or .json file in this directory"):
        make(tmp_path)
    (tmp_path / "blank.jsonl").write_text("\n  \n")
    with pytest.raises(DataError, match="blank.jsonl: no record in it"):
        make(tmp_path / "blank.jsonl")
    (tmp_path / "blank.txt").write_text("")
    with pytest.raises(DataError, match="blank.txt:1: the text is empty"):
        next(make(tmp_path / "blank.txt", "text"))


def test_a_dataset_needs_a_source(tokenizer, eos):
    """A config need not have one: a run may be given its batches from Python."""
    with pytest.raises(ConfigError, match="sources is empty: name at least one source to read"):
        make_dataset(
            dataclasses.replace(GOOD, sources=()), tokenizer, block_size=4, eos_token_id=eos
        )
