"""`sdar-jax data`: what a run would read, against counts made by hand and against what training then reads."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from sdar_jax.cli import main
from sdar_jax.data import make_dataset
from sdar_jax.training import read_command_line
from tests.data.conftest import make_byte_tokenizer
from tests.data.test_chat import assistant, user

TALK = {"messages": [user("question"), assistant("answer")]}
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 8,
}


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A run on three conversations and ten texts, with faults; writes its YAML file, and gives its path."""
    monkeypatch.chdir(tmp_path)
    make_byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    chats = [TALK, {"messages": []}, TALK, {"messages": [user("q" * 200), assistant("a")]}, TALK]
    (tmp_path / "chats.jsonl").write_text(
        "".join(json.dumps(chat) + "\n" for chat in chats) + "{\n[\n"
    )
    (tmp_path / "texts.json").write_text(json.dumps([{"text": "t" * n} for n in range(1, 11)]))
    values = {
        "run_dir": "run",
        "steps": 1,
        "model": {"shape": SHAPE, "tokenizer": "tokenizer", "objective": "block_diffusion", "block_size": 4},
        "data": {
            "sources": [
                {"path": "chats.jsonl", "format": "chat"},
                {"path": "texts.json", "format": "jsonl"},
            ],
            "sequence_length": 128,
            "batch_size": 2,
            "packing": "fit",
            "loss": "response",
        },
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "config.yaml")


def values(capsys, *arguments) -> tuple[int, dict]:
    status = main(["data", *arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_what_is_counted(config, capsys):
    status, found = values(capsys, config, "--records", "0", "--data.shuffle", "False")
    chats, texts = found["sources"]
    assert status == 1
    assert (chats["records"], chats["share"], texts["records"], texts["share"]) == (7, 0.5, 10, 0.5)
    # An epoch draws from both alike until the longer one is through.
    assert chats["read"] >= 7 and texts["read"] >= 10
    first = {problem["reason"]: problem for problem in chats["problems"]}
    kinds = sorted((each["kind"], each["example"].split(": ")[0]) for each in first.values())
    assert kinds == [
        ("malformed", "chats.jsonl:2"),
        ("malformed", "chats.jsonl:6"),
        ("malformed", "chats.jsonl:7"),
        ("too long", "chats.jsonl:4"),
    ]
    assert texts["problems"] == [] and texts["documents"] == texts["read"]
    # The text of n letters has its end behind it, and all of it is learned.
    assert (
        texts["tokens"] == texts["learned"] and sum(found["lengths"].values()) == found["documents"]
    )


def test_rows_and_what_is_learned_are_those_of_training(config, capsys):
    """Without faults, and one batch after the other."""
    Path("chats.jsonl").write_text(json.dumps(TALK) + "\n")
    options = ["--data.sequence_length", "64", "--data.packing", "split"]
    _, found = values(capsys, config, "--records", "400", *options)
    run = read_command_line([config, *options])
    data = make_dataset(run.data, make_byte_tokenizer(), block_size=4, eos_token_id=0)
    rows = found["rows"]
    batches = [next(data) for _ in range(-(-rows // 2))]
    segments = np.concatenate([batch["segment_ids"] for batch in batches])[:rows]
    learned = np.concatenate([batch["loss_mask"] for batch in batches])[:rows]
    assert rows > 4
    assert found["full"] == pytest.approx((segments > 0).mean())
    assert found["learned_a_row"] == pytest.approx(learned.sum(1).mean())


def test_what_is_learned_is_marked(config, capsys):
    options = [config, "--data.shuffle", "False", "--show", "1", "--data.pad_to_block", "True"]
    assert main(["data", *options]) == 1
    shown = capsys.readouterr().out
    ending = "<|im_end|>\n"
    assert (
        f"<|im_start|>user\nquestion{ending}<|im_start|>assistant\n⟦answer{ending}<|endoftext|>"
        in shown
    )
    assert ", too long: chats.jsonl:4: " in shown and "chats.jsonl (chat): 7 records" in shown
    main(["data", *options, "--color", "always"])
    assert "<|im_start|>assistant\n\x1b[32manswer" in capsys.readouterr().out


def test_clean_data_ends_well(config, capsys):
    Path("chats.jsonl").write_text(json.dumps(TALK) + "\n")
    assert main(["data", config, "--show", "0"]) == 0
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["gone.yaml"], "gone.yaml"),
        (["--records", "-1"], "--records and --show: give 0 or more"),
        (["--data.sources.0.path", "gone.jsonl"], "gone.jsonl: no such file or directory"),
        (["--data.sources", "[]"], "data.sources"),
        (["--data.sequence_length", "0"], "sequence_length=0"),
        (["--model.tokenizer", "gone"], "gone"),
        (["--model.shape.vocab_size", "100"], "the tokenizer has ids up to"),
    ],
)
def test_bad_input(config, capsys, arguments, told):
    assert main(["data", *([config] if arguments[0].startswith("--") else []), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and told in error
