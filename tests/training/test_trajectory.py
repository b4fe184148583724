"""Training on a model's own unmasking order, from sample.py's file to the masks of a step and a trained model."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from sdar_jax import load_pretrained, save_pretrained
from sdar_jax.cli import sample
from sdar_jax.data import load_tokenizer
from sdar_jax.errors import ConfigError, DataError
from sdar_jax.objectives import Batch, make_inputs
from sdar_jax.training import TrainConfig, run
from sdar_jax.training.config_io import from_values, read_config
from sdar_jax.training.extensions import Extensions
from sdar_jax.training.setup import open_dataset
from tests.bad_input import refused
from tests.tiny import tiny_model
from tests.training.conftest import assert_same_run, merged, metrics_of, write_tokenizer

MASK = 15
# The mask ends the vocabulary. An answer ends at one of these, and a document at 0.
STOPS = (3, 8)
# Ends of prompts at each place of a block of four.
PROMPTS = [[4, 5, 6, 7, 9, 10, 11][: i % 7 + 1] for i in range(20)]
LIMIT = 14


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("start")
    write_tokenizer(directory / "tokenizer")
    fields = {"vocab_size": MASK + 1, "mask_token_id": MASK, "eos_token_id": 0}
    model = tiny_model(jnp.float32, **fields, stop_token_ids=STOPS)
    save_pretrained(model, directory / "model", tokenizer_from=directory / "tokenizer")
    return directory / "model"


@pytest.fixture(scope="module")
def answers(start, tmp_path_factory) -> Path:
    """The file that sample.py writes: one token a step, some answers ended by a stop, some cut off."""
    home = tmp_path_factory.mktemp("answers")
    lines = (json.dumps({"prompt_ids": prompt}) + "\n" for prompt in PROMPTS)
    (home / "prompts.jsonl").write_text("".join(lines))
    options = ["--strategy", "low_confidence_static", "--temperature", "1.0"]
    files = ["--input", str(home / "prompts.jsonl"), "--output", str(home / "answers.jsonl")]
    limit = ["--max-new-tokens", str(LIMIT)]
    assert sample.main(["--model", str(start), *files, *options, *limit]) == 0
    return home / "answers.jsonl"


def values_of(start: Path, answers: Path, run_dir: Path, **changes):
    data = {
        "sources": [{"path": str(answers), "format": "trajectory"}],
        "sequence_length": 48,
        "noisy_length": 40,
        "batch_size": 4,
        "packing": "fit",
        "loss": "response",
        "pad_to_block": True,
        "num_threads": 1,
    }
    corruption = {"mask": "trajectory", "level": "block", "weighting": "unit", "t_max": 0.8}
    values = {
        "run_dir": str(run_dir),
        "steps": 6,
        "model": {"init_from": str(start)},
        "data": data,
        "objective": {
            "corruption": corruption | {"complementary": True},
            "normalizer": "masked",
            "confidence_beta": 2.0,
        },
        "block_sizes": [[0, 2], [3, 4]],
        "noise_ramp": {"t_min": 0.8},
        "optimizer": {"learning_rate": 0.01, "warmup": 0},
        "checkpoint": {"every": 2},
        "log_every": 1,
        "tensorboard": False,
    }
    return merged(values, changes)


@pytest.fixture
def make(start, answers, tmp_path):
    return lambda **changes: from_values(
        TrainConfig, values_of(start, answers, tmp_path / "run", **changes)
    )


def records_of(answers: Path) -> list[dict]:
    return [json.loads(line) for line in answers.read_text().splitlines()]


def test_a_file_of_answers_says_when_each_token_was_committed(answers):
    """One token a step, its stop token's step included; prompts end at every place of a block."""
    records = records_of(answers)
    assert [record["prompt_ids"] for record in records] == PROMPTS
    reasons = [record["finish_reason"] for record in records]
    assert {"stop", "length"} == set(reasons) and reasons.count("stop") > 3
    for record in records:
        steps = list(record["steps"])
        assert len(steps) == len(record["tokens"]) and len(set(steps)) == len(steps)
        if record["finish_reason"] == "stop":
            assert record["stop_reason"] in STOPS and record["stop_step"] not in steps
        else:
            assert record["stop_reason"] is None and record["stop_step"] is None
    assert any(list(record["steps"]) != sorted(record["steps"]) for record in records)


def known_order(record: dict) -> list[int]:
    """What the file says of a document: the prompt, the answer, and its stop."""
    ended = record["finish_reason"] == "stop"
    steps = record["steps"] + ([record["stop_step"]] if ended else [])
    order = [-1] * len(record["prompt_ids"]) + steps
    return order if ended else order[: len(order) // 4 * 4]


def documents(batch):
    """The record and the place of each document of a batch."""
    for b, segments in enumerate(np.asarray(batch["segment_ids"])):
        for number in range(1, segments.max() + 1):
            places = np.flatnonzero(segments == number)
            yield int(batch["record_ids"][b, places[0]]), b, slice(places[0], places[-1] + 1)


@pytest.mark.parametrize("token_cache", [False, True])
def test_batches_have_the_steps_of_the_answers(make, start, answers, tmp_path, token_cache):
    cache = str(tmp_path / "cache") if token_cache else None
    config = make(data={"token_cache": cache, "epochs": 1})
    model, records = load_pretrained(start).config, records_of(answers)
    data, seen, most = open_dataset(config.data, load_tokenizer(start), model), set(), 0
    for batch in data:
        most = max(most, batch["segment_ids"].max())
        for number, b, places in documents(batch):
            seen.add(number)
            record, order = records[number], batch["order"][b, places].tolist()
            known = known_order(record)
            assert order[: len(known)] == known
            tokens = batch["tokens"][b, places].tolist()
            said = [*record["prompt_ids"], *record["tokens"], record["stop_reason"]]
            assert tokens[: len(known)] == said[: len(known)]
            if record["finish_reason"] == "stop":
                assert set(order[len(known) :]) <= {max(known) + 1}
                assert set(tokens[len(known) :]) <= {0}
            else:
                assert len(order) == len(known)
    assert len(seen) == len(records) and most > 1


def test_masks_of_a_step_are_states_of_the_decoding(make, start, answers):
    """Whatever the network reads of a block is what the decoder saw: the tokens of later steps masked, and no other."""
    config = make(objective={"corruption": {"complementary": False}})
    model, records = load_pretrained(start).config, records_of(answers)
    batch = next(open_dataset(config.data, load_tokenizer(start), model))
    arrays = Batch(**{name: jnp.asarray(batch[name]) for name in Batch._fields})
    inputs = make_inputs(arrays, jax.random.key(0), config.objective, model)
    count = batch["noisy_index"].shape[1]
    noisy = np.full(batch["tokens"].shape, -1)
    for row, index, tokens in zip(noisy, batch["noisy_index"], inputs.tokens, strict=True):
        row[index[index >= 0]] = np.asarray(tokens)[:count][index >= 0]
    checked, partial = 0, 0
    for number, b, places in documents(batch):
        known = np.array(known_order(records[number]))
        for first in range(0, len(known) // 4 * 4, 4):
            steps, read = known[first : first + 4], noisy[b, places][first : first + 4]
            if (steps < 0).all():
                continue
            masked = read == MASK
            assert masked.any() and not masked[steps < 0].any()
            before, after = steps[~masked], steps[masked]
            assert before.max(initial=-1) < after.min()
            checked += 1
            partial += bool((before >= 0).any())
    assert checked > 10 and partial > 3


@pytest.mark.slow
@pytest.mark.ci
def test_the_whole_path(start, answers, tmp_path):
    """A run reads the file as it is, with CAP, both views, a ramp and a growing block; stopped, it goes on."""
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values_of(start, answers, tmp_path / "run")))
    assert run(read_config(file)).finished
    lines = [line for line in metrics_of(tmp_path / "run") if "loss" in line]
    assert len(lines) == 6 and all(np.isfinite(line["loss"]) for line in lines)
    assert [line["block_size"] for line in lines] == [2, 2, 2, 4, 4, 4]
    trained = load_pretrained(tmp_path / "run" / "model")
    assert trained.config.stop_token_ids[1:] == STOPS

    class Stop(Exception):
        pass

    def stop(step, line, model):
        if step == 3:
            raise Stop

    cached = {"data": {"token_cache": str(tmp_path / "cache")}}
    config = from_values(TrainConfig, values_of(start, answers, tmp_path / "again", **cached))
    with pytest.raises(Stop):
        run(config, Extensions(callbacks=(stop,)))
    assert run(config).finished
    assert_same_run(tmp_path / "run", tmp_path / "again")


def given(order) -> list[dict]:
    tokens = np.ones((4, 48), np.int32)
    batch = {"tokens": tokens, "segment_ids": tokens, "loss_mask": tokens > 0}
    return [batch | ({} if order is None else {"order": order})] * 8


GIVEN = {
    "data": {"sources": [], "noisy_length": None},
    "steps": 1,
    "block_sizes": [],
    "noise_ramp": {"t_min": None},
}


@pytest.mark.parametrize(
    ("order", "error", "told"),
    [
        (None, ConfigError, "the batch has no order; use sources of format trajectory"),
        (np.zeros((4, 47), np.int32), DataError, "order is of shape (4, 47)"),
        (np.zeros((4, 48)), DataError, "order is float64; give"),
        (np.full((4, 48), -1), DataError, "a token with loss and an order below 0"),
    ],
)
def test_given_batches_that_are_refused(order, error, told, make):
    config = make(**GIVEN)
    with refused(error, told):
        run(config, Extensions(data=given(order)))


@pytest.mark.slow
@pytest.mark.ci
def test_given_batches_may_have_an_order(make):
    order = np.tile(np.arange(48, dtype=np.int32), (4, 1))
    config = make(**GIVEN)
    assert run(config, Extensions(data=given(order))).finished


def test_masks_of_an_order_need_one_everywhere(make, answers, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "1+1=2"}\n')
    sources = [
        {"path": str(answers), "format": "trajectory"},
        {"path": str(texts), "format": "jsonl"},
    ]
    with refused(ConfigError, "mask is trajectory and", "texts.jsonl of format jsonl", "no order"):
        run(make(data={"sources": sources}))
