"""An objective, an evaluator, an iterator of batches, a callback and frozen weights, all of them defined here."""

import os
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdar_jax import TrainConfig, load_pretrained, save_pretrained, train
from sdar_jax.data import DataConfig
from sdar_jax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    TrainingError,
    TrainingInterrupted,
)
from sdar_jax.model import Model, stack_layers
from sdar_jax.model.config import ModelConfig
from sdar_jax.objectives import Batch, diffusion_inputs
from sdar_jax.training import CheckpointConfig, InitConfig, OptimizerConfig, TrainingObjective
from sdar_jax.training.step import model_weights
from sdar_jax.weighted_loss import weighted_loss
from tests.bad_input import refused
from tests.training.conftest import assert_same_run, metrics_of, state_of, write_tokenizer

ROWS, LENGTH, MASK = 4, 16, 20


def every_second(batch, key, config):
    """An objective: every second token is masked, and every mask weighs the same."""
    asked = batch.loss_mask & (jnp.arange(LENGTH) % 2 == 1)
    noisy = jnp.where(asked, config.mask_token_id, batch.tokens)
    return diffusion_inputs(config.paradigm, batch, noisy, asked.astype(jnp.float32))


def doubled(model, inputs, **options):
    """A loss: twice the cross-entropy."""
    total, metrics = weighted_loss(model, inputs, **options)
    return 2 * total, metrics


OBJECTIVE = TrainingObjective(every_second, doubled)


def batch_number(number: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(number)
    segments = np.ones((ROWS, LENGTH), np.int64)
    segments[:, -3:] = 0
    return {
        "tokens": draw.integers(1, 15, (ROWS, LENGTH)),
        "segment_ids": segments,
        "loss_mask": segments > 0,
    }


class Numbered(Iterator):
    """An iterator of batches that can say where it is, and go there."""

    def __init__(self):
        self.next, self.drawn = 0, 0

    def __next__(self):
        self.next, self.drawn = self.next + 1, self.drawn + 1
        return batch_number(self.next - 1)

    def get_state(self):
        return {"next": self.next}

    def set_state(self, state):
        self.next = state["next"]


def generated():
    """Batches from a generator, which cannot."""
    yield from map(batch_number, range(100))


def total(model, step):
    """An evaluator."""
    return {
        "total": sum(float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(model)),
        "step_again": step,
    }


def stopping_at(number: int):
    def evaluate(model, step):
        if step == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return total(model, step)

    return evaluate


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("extending")
    write_tokenizer(directory / "tokenizer")
    purpose = {
        "objective": "block_diffusion",
        "block_size": 4,
        "mask_token_id": MASK,
        "eos_token_id": 0,
    }
    model = Model(ModelConfig(32, 16, 32, 2, 2, 1, 8, **purpose), jax.random.key(0))
    save_pretrained(model, directory / "model", tokenizer_from=directory / "tokenizer")
    return directory / "model"


@pytest.fixture
def make_config(start, tmp_path):
    def make(name: str = "run", **changes) -> TrainConfig:
        fields = {
            "steps": 4,
            "data": DataConfig((), LENGTH, ROWS),
            "log_every": 1,
            "tensorboard": False,
        }
        fields |= {
            "optimizer": OptimizerConfig(1e-2, warmup=0),
            "checkpoint": CheckpointConfig(every=2),
        }
        return TrainConfig(
            run_dir=str(tmp_path / name),
            model=InitConfig(init_from=str(start)),
            **(fields | changes),
        )

    return make


def same_model(one: Model, other: Model) -> None:
    assert one.config == other.config
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("make_data", [Numbered, generated])
def test_a_run_of_one_s_own_goes_on_as_if_it_had_not_been_stopped(make_data, make_config, tmp_path):
    own = {"objective": OBJECTIVE}
    whole = train(make_config("whole", ema_decay=0.5), data=make_data(), evaluators=[total], **own)
    same_model(whole, load_pretrained(tmp_path / "whole" / "model"))
    config = make_config(ema_decay=0.5)
    with pytest.raises(
        TrainingInterrupted, match="stopped by signal 15 and saved at step 2; start it again"
    ) as raised:
        train(config, data=make_data(), evaluators=[stopping_at(2)], **own)
    assert raised.value.signal == signal.SIGTERM
    data = make_data()
    same_model(train(config, data=data, evaluators=[total], **own), whole)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    if isinstance(data, Numbered):
        assert data.drawn == 2, "what it had given is not drawn again"
    same_model(train(config, data=make_data(), **own), whole)


def test_what_is_learned_and_evaluated_is_what_was_given(make_config, start, tmp_path):
    model = train(make_config(steps=1), data=generated(), objective=OBJECTIVE, evaluators=[total])
    first, evaluated = metrics_of(tmp_path / "run")
    begun = load_pretrained(start)
    batch = Batch(**{name: jnp.asarray(array) for name, array in batch_number(0).items()})
    batch = batch._replace(
        tokens=batch.tokens.astype(jnp.int32), segment_ids=batch.segment_ids.astype(jnp.int32)
    )
    inputs = every_second(batch, None, begun.config)
    asked = ROWS * 6
    assert inputs.normalizer.sum() == asked
    loss, metrics = weighted_loss(begun, inputs)
    assert first["loss"] == pytest.approx(float(2 * loss / asked), rel=1e-5)
    assert first["nll"] == pytest.approx(float(metrics.nll / asked), rel=1e-5)
    assert evaluated == {
        "step": 1,
        "eval_total": pytest.approx(total(model, 1)["total"]),
        "eval_step_again": 1,
    }


def test_without_a_loss_of_its_own_an_objective_has_the_library_s(make_config, tmp_path):
    train(make_config(steps=1), data=generated(), objective=OBJECTIVE)
    train(
        make_config("plain", steps=1), data=generated(), objective=TrainingObjective(every_second)
    )
    ours, plain = (metrics_of(tmp_path / name)[0] for name in ("run", "plain"))
    assert ours["loss"] == pytest.approx(2 * plain["loss"]) and ours["nll"] == plain["nll"]


def test_callbacks_are_given_each_line_and_the_model_of_its_step(make_config, tmp_path):
    seen, models = [], {}

    def callback(step, line, model):
        seen.append({"step": step, **line})
        models[step] = jax.tree.map(jnp.copy, model())

    train(make_config(), data=generated(), evaluators=[total], callbacks=[callback])
    lines = metrics_of(tmp_path / "run")
    kept = [
        {name: value for name, value in line.items() if name != "tokens_per_second"}
        for line in seen
    ]
    assert kept == lines and [line["step"] for line in lines] == [1, 2, 2, 3, 4, 4]
    for step in (1, 2):
        short = train(make_config(f"short{step}", steps=step), data=generated())
        jax.tree.map(
            np.testing.assert_array_equal,
            *(model_weights(stack_layers(m))[0] for m in (models[step], short)),
        )


def only_layers(name: str) -> bool:
    return name.startswith("layers.") and not name.endswith("norm")


def test_frozen_weights_have_no_moments_and_are_saved_once(make_config, start, tmp_path):
    options = {"trainable": only_layers}
    whole = train(make_config("whole", ema_decay=0.5), data=generated(), **options)
    config = make_config(ema_decay=0.5)
    with pytest.raises(TrainingInterrupted):
        train(config, data=generated(), evaluators=[stopping_at(2)], **options)
    same_model(train(config, data=generated(), evaluators=[total], **options), whole)
    before, after = (
        model_weights(stack_layers(model))[0] for model in (load_pretrained(start), whole)
    )
    trained = {name for name in before if only_layers(name)}
    assert 0 < len(trained) < len(before)
    assert {name for name in before if (before[name] != after[name]).any()} == trained
    (step, state), (_, expected) = state_of(tmp_path / "run"), state_of(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert step == 4 and set(state["weights"]) == set(state["ema"]) == trained
    names = [
        jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state["optimizer"])
    ]
    assert not any(name in path for path in names for name in before.keys() - trained)
    assert any("qkv" in path for path in names)


def test_damaged_frozen_weights_are_noticed(make_config, tmp_path):
    with pytest.raises(TrainingInterrupted):
        train(make_config(), data=generated(), evaluators=[stopping_at(2)], trainable=only_layers)
    for file in (tmp_path / "run" / "frozen").rglob("*"):
        if file.is_file() and file.name != "sha256.json":
            file.write_bytes(file.read_bytes()[:-1])
    with refused(CheckpointError, "frozen", "damaged", "use a new run_dir"):
        train(make_config(), data=generated(), trainable=only_layers)


def test_a_run_goes_on_with_what_it_was_started_with(make_config):
    with pytest.raises(TrainingInterrupted):
        train(
            make_config(),
            data=generated(),
            evaluators=[stopping_at(2)],
            objective=OBJECTIVE,
            trainable=only_layers,
        )
    with refused(
        ConfigError, "was started with the objective every_second, doubled", "give the same"
    ):
        train(make_config(), data=generated(), trainable=only_layers)
    with refused(ConfigError, "trainable says of", "embedding", "give the same"):
        train(make_config(), data=generated(), objective=OBJECTIVE)


def test_data_that_ends_leaves_its_steps_saved(make_config, tmp_path):
    with pytest.raises(
        TrainingError, match="ended after 3 of 4 steps, .* set steps to 3, or give more data"
    ):
        train(make_config(), data=islice(generated(), 3))
    train(make_config(), data=generated())
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3, 4]
    with refused(DataError, "data ended after 1 batches, of which the run had used 3"):
        with pytest.raises(TrainingError):
            train(make_config("short"), data=islice(generated(), 3))
        train(make_config("short"), data=islice(generated(), 1))


def changed(**arrays):
    return lambda: iter([batch_number(0) | arrays])


class Opaque(Numbered):
    def get_state(self):
        return b"here"


BAD = {
    "no data": (None, {}, ConfigError, "data.sources is empty", "give train() data"),
    "epochs": (generated, {"steps": None, "epochs": 1}, ConfigError, "epochs is 1", "give steps"),
    "a state of bytes": (Opaque, {}, ConfigError, "get_state", "plain values"),
    "a shape": (
        changed(tokens=np.ones((4, 9), int)),
        {},
        DataError,
        "batch 1 of data: tokens is of shape (4, 9)",
    ),
    "a token": (
        changed(tokens=np.full((4, 16), 32)),
        {},
        DataError,
        "batch 1 of data holds token 32",
        "0 to 31",
    ),
    "a type": (
        changed(loss_mask=np.ones((4, 16))),
        {},
        DataError,
        "loss_mask is float64; give bool",
    ),
    "noisy_index": (
        changed(noisy_index=np.ones((4, 4), int)),
        {},
        DataError,
        "noisy_length",
        "leave it out",
    ),
    "an array that lacks": (
        lambda: iter([{"tokens": 1}]),
        {},
        DataError,
        "lacks segment_ids, loss_mask",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_refused(name, make_config):
    data, changes, kind, *told = BAD[name]
    with refused(kind, *told):
        train(make_config(**changes), data=data and data())


def test_names_and_choices_that_do_not_work(make_config):
    with refused(ConfigError, "trainable chooses none of the weights", "embedding"):
        train(make_config(), data=generated(), trainable=lambda name: False)
    with refused(ConfigError, "two evaluators give step_again, total"):
        train(make_config(), data=generated(), evaluators=[total, total])
