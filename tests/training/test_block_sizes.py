"""A schedule of the block size: the run is its phases one after the other, and goes on in the right one."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdar_jax import load_pretrained, save_pretrained
from sdar_jax.data import load_tokenizer
from sdar_jax.errors import ConfigError
from sdar_jax.model import Model, stack_layers
from sdar_jax.model.config import ModelConfig
from sdar_jax.objectives import Batch, ObjectiveConfig, make_inputs
from sdar_jax.training import TrainConfig, loop, run
from sdar_jax.training.config_io import from_values
from sdar_jax.training.extensions import Extensions
from sdar_jax.training.optimizer import adamw, learning_rate
from sdar_jax.training.setup import open_dataset
from sdar_jax.training.step import initial_state, make_step, model_weights
from sdar_jax.training.tiny import tiny
from sdar_jax.weighted_loss import training_loss, weighted_loss
from tests.bad_input import refused
from tests.tiny import VOCAB, tiny_model
from tests.training.conftest import assert_same_run, data_values, merged, metrics_of, run_values

# From blocks of one, a start as a share of the steps, and a size that comes back.
PHASES = [[0, 1], [2, 4], [0.5, 8], [5, 4]]
SIZES = [1, 1, 4, 8, 8, 4]


@pytest.fixture(scope="module")
def start(inputs, tmp_path_factory) -> Path:
    """A model to start from, of other blocks."""
    path = tmp_path_factory.mktemp("start")
    shape = run_values(inputs, path)["model"]["shape"]
    config = ModelConfig(**shape, objective="block_diffusion", block_size=2, mask_token_id=20)
    save_pretrained(Model(config, jax.random.key(0)), path, tokenizer_from=inputs / "tokenizer")
    return path


def config_in(inputs: Path, start: Path, run_dir: Path, **changes) -> TrainConfig:
    values = run_values(inputs, run_dir)
    values["model"] = {"init_from": str(start)}
    values["block_sizes"] = PHASES
    held_out = data_values(inputs / "held-out.jsonl", epochs=1)
    values["eval"] = {"data": held_out, "every": 2, "by": ["position"], "best": "nelbo"}
    return from_values(TrainConfig, merged(values, changes))


def evaluator(seen: list[int | None], act=lambda step: None) -> Extensions:
    """Notes the block size of the model that it is given."""

    def evaluate(model, step):
        seen.append(model.config.block_size)
        act(step)
        return {}

    return Extensions(evaluators=(evaluate,))


class Undisturbed:
    """A run from its beginning to its end, and the block sizes that it evaluated."""

    def __init__(self, config: TrainConfig):
        self.config, self.path = config, Path(config.run_dir)
        self.evaluated: list[int | None] = []
        assert run(config, evaluator(self.evaluated)).finished


@pytest.fixture(scope="module")
def undisturbed(inputs, start, tmp_path_factory) -> Undisturbed:
    return Undisturbed(config_in(inputs, start, tmp_path_factory.mktemp("undisturbed") / "run"))


def test_a_run_is_its_phases_one_after_the_other(undisturbed, start):
    """By hand: a step for each block size, on one state, one key and one stream of rows that are laid out for eight."""
    config = undisturbed.config
    models = {size: stack_layers(load_pretrained(start, block_size=size)) for size in {*SIZES}}
    weights, _ = model_weights(models[8])
    _, key = jax.random.split(jax.random.key(config.seed))
    state = initial_state(adamw(config.optimizer), weights, key, averaged=False)

    def step_of(size: int):
        shape = models[size].config
        return make_step(
            lambda batch, key: make_inputs(batch, key, config.objective, shape),
            partial(training_loss, config=config.objective),
            model_weights(models[size])[1],
            adamw(config.optimizer),
            learning_rate(config.optimizer, 6),
        )

    steps = {size: step_of(size) for size in models}
    data = open_dataset(config.data, load_tokenizer(start), models[8].config)
    for size in SIZES:
        batch = next(data)
        arrays = (jnp.asarray(batch[name]) for name in ("tokens", "segment_ids", "loss_mask"))
        state, _ = steps[size](jax.tree.map(jnp.copy, state), Batch(*arrays))
    trained = load_pretrained(undisturbed.path / "model")
    assert trained.config.block_size == 4
    found, _ = model_weights(stack_layers(trained))
    for name, weight in state.weights.items():
        np.testing.assert_array_equal(found[name], weight, err_msg=name)
    before = model_weights(models[8])[0]["layers.last.qkv"]
    assert np.abs(found["layers.last.qkv"] - before).max() > 1e-3


def test_evaluations_and_lines_have_the_block_size_of_their_step(undisturbed):
    assert undisturbed.evaluated == [1, 8, 4]
    lines = metrics_of(undisturbed.path)
    logged = {line["step"]: line["block_size"] for line in lines if "block_size" in line}
    assert logged == {2: 1, 4: 8, 6: 4}
    places = {
        line["step"]: [name.partition("/")[2] for name in line if "/" in name]
        for line in lines
        if "eval_nelbo" in line
    }
    first = ["0", "1", "2", "3"]
    assert places == {2: ["0"], 4: [*first, "4-7"], 6: first}


def test_the_best_model_is_of_the_last_block_size(undisturbed):
    """Bounds of others are lower or higher for that alone."""
    assert load_pretrained(undisturbed.path / "best").config.block_size == 4
    assert '"step": 6' in (undisturbed.path / "best.json").read_text()


@pytest.mark.slow
@pytest.mark.ci
def test_a_run_goes_on_in_its_phase_and_compiles_each_size_once(
    undisturbed, inputs, start, tmp_path, monkeypatch
):
    """Stopped between two checkpoints, in blocks of eight; it goes on from blocks of four, bit for bit."""
    compiled = []

    def configured_step(config, model, *rest):
        compiled.append(model.block_size)
        return original(config, model, *rest)

    class Stop(Exception):
        pass

    def stop(step):
        if step == 4:
            raise Stop

    original = loop.configured_step
    monkeypatch.setattr(loop, "configured_step", configured_step)
    config, seen = config_in(inputs, start, tmp_path / "run"), []
    with pytest.raises(Stop):
        run(config, evaluator(seen, stop))
    assert compiled == [1, 4, 8]
    assert run(config, evaluator(seen)).finished
    assert compiled == [1, 4, 8, 4, 8] and seen == [1, 8, 8, 4]
    assert_same_run(undisturbed.path, tmp_path / "run")


def test_rows_laid_out_for_the_largest_block_are_the_same_for_smaller_ones(x64):
    """Noisy copies of whole blocks of eight: of two, the tokens with loss see and are asked the same."""
    model = tiny_model(block_size=2)
    draw = np.random.default_rng(0)
    tokens = jnp.asarray(draw.integers(0, VOCAB - 1, (2, 32)), jnp.int32)
    mask = np.zeros((2, 32), bool)
    mask[0, 9:15], mask[1, 20] = True, True
    index = np.full((2, 16), -1, np.int32)
    index[0, :8], index[1, :8] = np.arange(8, 16), np.arange(16, 24)
    batch = Batch(tokens, jnp.ones_like(tokens), jnp.asarray(mask))

    @jax.jit
    def loss(batch: Batch) -> jax.Array:
        inputs = make_inputs(batch, jax.random.key(3), ObjectiveConfig(), model.config)
        return weighted_loss(model, inputs)[0]

    expected = loss(batch)
    assert expected > 0
    found = loss(batch._replace(noisy_index=jnp.asarray(index)))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


BAD = [
    ([[1, 4]], "block_sizes is [[1.0, 4]]; give 0 steps before the first"),
    ([[0, 0]], "block_sizes is 0; give a block size of at least 1"),
    ([[0, 4], [2, 6]], "block_sizes is 4; give a divisor of the largest, 6"),
    ([[0, 4], [2.5, 8]], "block_sizes is 2.5; give a share of the steps in [0, 1) or a whole"),
    ([[0, 4], [-1, 8]], "block_sizes is -1.0; give a share"),
    ([[0, 4], [2, 4]], "give another block size in each pair than in the one before"),
    ([[0, 4], [3, 8], [0.5, 16]], "give more of the 6 steps before each pair than before the last"),
    ([[0, 4], [3, "8"]], "block_sizes.1.1 is '8'; give a whole number"),
    ([[0, 4, 8]], "block_sizes.0 is [0, 4, 8]; give a list of 2"),
]


@pytest.mark.parametrize(("pairs", "told"), BAD)
def test_schedules_that_cannot_be(pairs, told, make_config):
    with refused(ConfigError, told):
        make_config(block_sizes=pairs, model={"block_size": None})


def test_a_schedule_and_one_block_size_are_two(make_config):
    with refused(ConfigError, "model.block_size is 4 and block_sizes [[0.0, 4]]; give one"):
        make_config(block_sizes=[[0, 4]])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"block_sizes": [[0, 4], [6, 8]]}, "8 after 6 steps and the run has 6; start it earlier"),
        ({"model": {"objective": "masked_diffusion"}}, "the model has no blocks; leave it out"),
        ({"model": {"objective": "autoregressive"}}, "the model has no blocks; leave it out"),
    ],
)
def test_schedules_that_do_not_fit_are_refused_early(changes, told, make_config):
    base = {"block_sizes": [[0, 4], [2, 8]], "model": {"block_size": None}}
    with refused(ConfigError, told):
        run(make_config(**merged(base, changes)))


@pytest.mark.parametrize(
    ("pairs", "told"),
    [
        ([[0, 1], [3, 4], [0.9, 8]], "6 steps would have had other blocks; restore it"),
        ([[0, 1], [2, 4], [3, 8], [5, 4], [6, 16]], "rows are laid out for the largest; keep that"),
    ],
)
def test_the_past_of_a_schedule_stays(pairs, told, undisturbed, inputs, start):
    changes = {"block_sizes": pairs, "steps": 8, "optimizer": {"schedule": "constant"}}
    with refused(ConfigError, "was started otherwise", told):
        run(config_in(inputs, start, undisturbed.path, **changes))


@pytest.mark.slow
@pytest.mark.ci
def test_a_run_may_grow_further(inputs, start, tmp_path):
    """A finished run that is given more steps, and a phase for them, equals one that had them from the start."""
    constant = {"optimizer": {"schedule": "constant", "warmup": 0}, "eval": None}
    config = partial(config_in, inputs, start, **constant)
    short = {"steps": 2, "block_sizes": [[0, 8], [1, 2]]}
    long = {"steps": 4, "block_sizes": [[0, 8], [1, 2], [3, 4]]}
    assert run(config(tmp_path / "run", **short)).finished
    assert load_pretrained(tmp_path / "run" / "model").config.block_size == 2
    assert run(config(tmp_path / "run", **long)).finished
    assert run(config(tmp_path / "whole", **long)).finished
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_the_models_that_rows_and_later_runs_are_for(inputs, start, tmp_path):
    config = config_in(inputs, start, tmp_path)
    assert (config.layout_model.block_size, config.final_model.block_size) == (8, 4)
    assert [config.block_size_at(step) for step in range(1, 7)] == SIZES
    plain = replace(config, block_sizes=())
    assert plain.layout_model == plain.final_model == plain.model and plain.block_size_at(1) is None


@pytest.mark.parametrize(
    ("steps", "pairs", "found"),
    [
        (1000, [[0, 4], [0.5, 8], [800, 16]], [(0, 4), (2, 8), (3, 16)]),
        (1000, [[0, 4], [10, 8], [20, 16]], [(0, 4), (1, 8), (2, 16)]),
        (
            1000,
            [[0, 1], [0.96, 2], [0.97, 4], [0.98, 8], [0.99, 16]],
            [(i, 1 << i) for i in range(5)],
        ),
    ],
)
def test_a_tiny_run_has_all_phases(steps, pairs, found, inputs, start, tmp_path):
    config = config_in(
        inputs, start, tmp_path / "run", steps=steps, block_sizes=pairs, eval={"best": None}
    )
    small = tiny(config)
    assert list(small.block_sizes) == found and small.model.block_size is None
    assert small.steps == max(4, len(pairs)) and small.data.sequence_length == 16
