"""Answers and scores on a mesh are those of one device: `python -m tests.evaluation.on_devices FOLDER`."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from sdar_jax import DecodingConfig, adapters, save_pretrained
from sdar_jax.adapters import LoraConfig
from sdar_jax.cli import main as command
from sdar_jax.devices.sharding import tensor_mesh
from sdar_jax.evaluation import evaluate
from sdar_jax.hf import load_pretrained
from sdar_jax.model import Model
from tests.data.conftest import make_byte_tokenizer
from tests.evaluation.test_evaluate import TASK, problems
from tests.tiny import tiny_model

SAMPLED = DecodingConfig(temperature=1.0, confidence_threshold=0.4)


def saved(folder: Path) -> Path:
    """A model of four key-value heads with its tokenizer, and an adapter beside it."""
    model = tiny_model(jnp.float32, vocab_size=320, mask_token_id=300, num_heads=4, num_kv_heads=4)
    make_byte_tokenizer().save_pretrained(folder / "tokenizer")
    save_pretrained(model, folder / "model", tokenizer_from=folder / "tokenizer")
    adapted = adapters.add(model, LoraConfig(r=2), jax.random.key(3))
    adapters.save(adapted, folder / "adapter")
    return folder / "model"


def answers(model: Model, folder: Path) -> list[dict]:
    evaluate(
        model,
        make_byte_tokenizer(),
        [(TASK, problems())],
        SAMPLED,
        max_new_tokens=12,
        samples=2,
        output=folder,
    )
    found = [json.loads(line) for line in (folder / "toy.jsonl").read_text().splitlines()]
    for each in found:
        each["confidence"] = round(each["confidence"], 9)
    return sorted(found, key=lambda each: (each["id"], each["sample"]))


def main(folder: Path) -> None:
    path = saved(folder)
    with jax.enable_x64(True):
        alone = answers(load_pretrained(path, dtype="float64"), folder / "one")
        for devices in (2, 4):
            model = load_pretrained(path, dtype="float64", mesh=tensor_mesh(devices))
            assert answers(model, folder / str(devices)) == alone, devices
    (folder / "gsm8k.json").write_text(
        json.dumps([{"question": f"q{i}", "answer": "#### 1"} for i in range(3)])
    )
    for name, more in (
        ("command", []),
        ("adapter", ["--adapter", str(folder / "adapter")]),
        ("int8", ["--adapter", str(folder / "adapter"), "--dtype", "int8"]),
    ):
        scores = []
        for devices in ("1", "4"):
            output = folder / f"{name}{devices}"
            words = ["evaluate", "--model", str(path), "--tasks", f"gsm8k={folder}/gsm8k.json"]
            words += ["--output", str(output), "--plain", "--max-new-tokens", "8"]
            assert command([*words, "--tensor", devices, *more]) == 0, (name, devices)
            (row,) = json.loads((output / "results.json").read_text())
            scores.append((row["score"], row["problems"]))
        assert scores[0] == scores[1], name
    words = ["sample", "--model", str(path), "--prompt-ids", "1,2,3", "--max-new-tokens", "4"]
    assert command([*words, "--tensor", "-1"]) == 0
    assert command([*words, "--tensor", "5"]) == 2
    print("the same on 1, 2 and 4 devices")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
