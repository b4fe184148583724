"""A run small enough to repeat: a character tokenizer, a page of sums, a model of two layers."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sdar_jax.training import CheckpointConfig, TrainConfig
from sdar_jax.training.checkpoint import Checkpoints
from sdar_jax.training.config_io import from_values

CHARACTERS = "0123456789+=? "


def write_tokenizer(directory: Path) -> None:
    """One token a character, and an end-of-text token."""
    vocabulary = {token: i for i, token in enumerate(("<eos>", *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(
        directory
    )


def write_sums(path: Path, count: int = 200, seed: int = 0) -> None:
    draw = random.Random(seed)
    pairs = [(draw.randrange(100), draw.randrange(100)) for _ in range(count)]
    path.write_text(
        "".join(json.dumps({"question": f"{a}+{b}=", "text": str(a + b)}) + "\n" for a, b in pairs)
    )


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with tokenizer/, sums.jsonl and held-out.jsonl."""
    directory = tmp_path_factory.mktemp("inputs")
    write_tokenizer(directory / "tokenizer")
    write_sums(directory / "sums.jsonl")
    write_sums(directory / "held-out.jsonl", count=20, seed=1)
    return directory


Values = dict[str, Any]


def data_values(path: Path, **changes: Any) -> Values:
    source = {"path": str(path), "format": "jsonl", "prompt_field": "question"}
    return {
        "sources": [source],
        "sequence_length": 16,
        "batch_size": 4,
        "num_threads": 1,
        **changes,
    }


def run_values(inputs: Path, run_dir: Path) -> Values:
    """A YAML file's content: block diffusion from random weights, 6 steps, a checkpoint after each second one."""
    shape = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_layers": 1,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 8,
    }
    model = {
        "shape": shape,
        "tokenizer": str(inputs / "tokenizer"),
        "objective": "block_diffusion",
        "block_size": 4,
    }
    return {
        "run_dir": str(run_dir),
        "steps": 6,
        "model": model,
        "data": data_values(inputs / "sums.jsonl"),
        "optimizer": {"learning_rate": 0.01, "schedule": "cosine"},
        "checkpoint": {"every": 2},
        "log_every": 2,
        "tensorboard": False,
    }


@pytest.fixture
def values(inputs: Path, tmp_path: Path) -> Values:
    return run_values(inputs, tmp_path / "run")


@pytest.fixture
def make_config(values: Values) -> Callable[..., TrainConfig]:
    """make_config(section={field: value}, field=value) -> the config above with these changes."""
    return lambda **changes: from_values(TrainConfig, merged(values, changes))


def merged(values: Values, changes: Values) -> Values:
    new = dict(values)
    for name, change in changes.items():
        both = isinstance(change, dict) and isinstance(new.get(name), dict)
        new[name] = merged(new[name], change) if both else change
    return new


@pytest.fixture
def write_yaml(tmp_path: Path) -> Callable[[Values], str]:
    def write(content: Values) -> str:
        path = tmp_path / "train.yaml"
        path.write_text(yaml.safe_dump(content))
        return str(path)

    return write


TIMES = ("tokens_per_second", "mfu")


def metrics_of(run_dir: Path) -> list[Values]:
    """metrics.jsonl without what depends on the clock."""
    lines = (json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def state_of(run_dir: Path) -> tuple[int | None, Any]:
    """The newest checkpoint's step, and all of its arrays."""
    with (
        Checkpoints(run_dir, CheckpointConfig()) as checkpoints,
        ocp.StandardCheckpointer() as reader,
    ):
        step = checkpoints.latest
        path = checkpoints.directory / str(step) / "state"
        # On one device, wherever they were saved from.
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
        return step, reader.restore(
            path, jax.tree.map(place, reader.metadata(path).item_metadata.tree)
        )


def assert_same_run(one: Path, other: Path) -> None:
    """Same lines of metrics, same last state, same exported files: bit for bit."""
    assert metrics_of(one) == metrics_of(other)
    (step, state), (other_step, other_state) = state_of(one), state_of(other)
    assert step == other_step
    jax.tree.map(np.testing.assert_array_equal, state, other_state)
    files = {path.name: path.read_bytes() for path in (one / "model").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (other / "model").iterdir()}
