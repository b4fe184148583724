"""Runs that distil the model they start from: D2F in full and by LoRA, from YAML, resumed, and what stays as it was."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from sdar_jax import adapters, load_pretrained, save_pretrained, train
from sdar_jax.data import load_tokenizer
from sdar_jax.errors import ConfigError
from sdar_jax.model import Model, stack_layers
from sdar_jax.model.config import ModelConfig
from sdar_jax.objectives import Batch, make_inputs
from sdar_jax.training import CheckpointConfig, TrainConfig, TrainingObjective, run
from sdar_jax.training.checkpoint import Checkpoints
from sdar_jax.training.config_io import from_values
from sdar_jax.training.extensions import Extensions
from sdar_jax.training.optimizer import adamw
from sdar_jax.training.setup import configured_step, open_dataset
from sdar_jax.training.step import initial_state, model_weights
from sdar_jax.training.teacher import teacher_copies
from sdar_jax.visibility import segments
from sdar_jax.weighted_loss import training_loss
from tests.bad_input import refused
from tests.training.conftest import assert_same_run, merged, run_values
from tests.training.test_run import at_evaluation, terminate, total_weight
from tests.virtual_devices import run_module

MASK = 30
STUDENT = {
    "objective": "block_diffusion",
    "block_size": 4,
    "block_origin": "response",
    "bidirectional_prompt": True,
}
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
RUNS = {
    "full": {},
    "lora": {"lora": LORA},
    "lora and whole modules": {"lora": {**LORA, "modules_to_save": ["embed_tokens", "lm_head"]}},
    "lora beside int8": {"lora": {**LORA, "base_dtype": "int8"}},
    "growing blocks": {"block_sizes": [[0, 2], [1, 4]], "model": {"block_size": None}},
    "kl": {"objective": {"distill": {"loss": "kl"}}},
    "micro-batches": {"micro_batch_size": 2},
}
SLOW = [pytest.mark.slow, pytest.mark.ci]
QUICK = ("full", "lora and whole modules")


def start_in(inputs: Path, directory: Path, **purpose) -> Path:
    """A model to start from, with its tokenizer; a canvas unless told otherwise."""
    shape = run_values(inputs, inputs)["model"]["shape"] | {"num_layers": 2}
    purpose = {"objective": "masked_diffusion", "mask_token_id": MASK, **purpose}
    model = Model(ModelConfig(**shape, initializer_range=0.5, **purpose), jax.random.key(3))
    save_pretrained(model, directory, tokenizer_from=inputs / "tokenizer")
    return directory


@pytest.fixture(scope="module")
def start(inputs, tmp_path_factory) -> Path:
    return start_in(inputs, tmp_path_factory.mktemp("start") / "model")


def config_in(inputs, start, run_dir, **changes) -> TrainConfig:
    values = run_values(inputs, run_dir)
    values["model"] = {"init_from": str(start), **STUDENT}
    values["data"] |= {"loss": "response", "packing": "fit"}
    values["objective"] = {"normalizer": "masked", "noisy_context": True, "distill": {}}
    values["optimizer"] = {"learning_rate": 0.05, "warmup": 0}
    return from_values(TrainConfig, merged(values, {"log_every": 1, **changes}))


def by_hand(student, teacher, config: TrainConfig, step: int, batch: Batch) -> float:
    """The loss of a step: logits of both models in full, and a softmax; masks are what the corruption drew."""
    _, key = jax.random.split(jax.random.key(config.seed))
    plain = dataclasses.replace(config.objective, distill=None)
    shape = student.config
    inputs = make_inputs(batch, jax.random.fold_in(key, step - 1), plain, shape)
    assert inputs.tokens.shape == batch.tokens.shape
    bounds = segments(batch.segment_ids)
    # The canvas: a range of all of the document.
    everything = jax.tree.map(lambda x: jnp.zeros_like(x), inputs.ranges)
    everything = everything._replace(
        start=everything.start.at[..., 0].set(bounds.start),
        end=everything.end.at[..., 0].set(bounds.end),
    )

    @jax.jit
    def log_probs(model, ranges):
        hidden = model.hidden(inputs.tokens, inputs.positions, ranges)
        return jax.nn.log_softmax(model.unembed(hidden))

    ours, theirs = log_probs(student, inputs.ranges), log_probs(teacher, everything)
    distill = config.objective.distill
    nats = theirs - ours if distill and distill.loss == "kl" else -ours
    total = (inputs.weights * (jnp.exp(theirs) * nats).sum(-1)).sum()
    masked = jnp.count_nonzero(inputs.weights)
    assert masked > 3
    return float(total / masked)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else SLOW) for name in RUNS]
)
def test_each_step_s_loss_is_that_of_the_start_as_teacher(name, inputs, start, tmp_path):
    """By hand, of the student as it was before the step; its teacher is still the model that training started from."""
    config = config_in(inputs, start, tmp_path / "run", steps=3, **RUNS[name])
    students, losses = [], []

    def note(step, line, model):
        students.append(jax.tree.map(jnp.copy, model()))
        losses.append(line["loss"])

    trained = train(config, callbacks=(note,))
    teacher = stack_layers(load_pretrained(start))
    if config.lora is not None:
        teacher = adapters.frozen_base(teacher, config.lora)
    data = open_dataset(config.data, load_tokenizer(start), students[0].config)
    fields = ("tokens", "segment_ids", "loss_mask")
    batches = [
        Batch(*(jnp.asarray(each[field]) for field in fields))
        for each in (next(data) for _ in range(3))
    ]
    expected = []
    for step, batch in enumerate(batches, 1):
        before = teacher if step == 1 else students[step - 2]
        size = config.block_size_at(step) or 4
        before = jax.tree.map(lambda leaf: leaf, before)
        before.config = dataclasses.replace(students[0].config, block_size=size)
        expected.append(by_hand(before, teacher, config, step, batch))
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    assert trained.config.paradigm.bidirectional_prompt and trained.config.block_size == 4


class Undisturbed:
    """A run from its beginning to its end."""

    def __init__(self, inputs, start, home: Path, name: str):
        self.name, self.path = name, home / "run"
        self.config = config_in(inputs, start, self.path, **RUNS[name])
        assert run(self.config, Extensions(evaluators=(total_weight,))).finished


@pytest.fixture(
    scope="module",
    params=["full", pytest.param("lora and whole modules", marks=SLOW)],
)
def undisturbed(request, inputs, start, tmp_path_factory) -> Undisturbed:
    return Undisturbed(inputs, start, tmp_path_factory.mktemp("undisturbed"), request.param)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(undisturbed, inputs, start, tmp_path):
    config = config_in(inputs, start, tmp_path / "run", **RUNS[undisturbed.name])
    assert not run(config, at_evaluation(1, terminate)).finished
    assert run(config, Extensions(evaluators=(total_weight,))).finished
    assert_same_run(undisturbed.path, tmp_path / "run")


def test_the_teacher_is_saved_once_and_stays_out_of_what_is_exported(undisturbed, start):
    with ocp.StandardCheckpointer() as reader:
        frozen = reader.restore(undisturbed.path / "frozen" / "state")
    own = {name.removeprefix("teacher."): x for name, x in frozen.items() if "teacher." in name}
    before = model_weights(stack_layers(load_pretrained(start)))[0]
    if undisturbed.name == "full":
        assert frozen.keys() == {f"teacher.{name}" for name in before}
    else:
        assert own.keys() == {"embedding", "head"}, "the base is frozen anyway, and held once"
    for name, weight in own.items():
        np.testing.assert_array_equal(weight, before[name], err_msg=name)
    after = model_weights(stack_layers(load_pretrained(undisturbed.path / "model")))[0]
    assert after.keys() == before.keys()
    assert (after["layers.last.qkv"] != before["layers.last.qkv"]).any()
    (index,) = (undisturbed.path / "model").glob("*.safetensors")
    assert b"teacher" not in index.read_bytes()
    if undisturbed.name != "full":
        assert b"teacher" not in b"".join(
            path.read_bytes() for path in (undisturbed.path / "adapter").iterdir()
        )


def test_a_run_does_not_go_on_with_another_objective(undisturbed, inputs, start):
    changes = merged(RUNS[undisturbed.name], {"steps": 7, "objective": {"distill": {"loss": "kl"}}})
    with refused(ConfigError, "objective.distill.loss", "new run_dir"):
        run(config_in(inputs, start, undisturbed.path, **changes))


@pytest.mark.parametrize("beta", [pytest.param(0.0, marks=SLOW), 0.5])
def test_micro_batches_change_nothing(beta, inputs, start, x64):
    """With CAP's entropy too, whose right guesses are those of the data's tokens."""
    draw = np.random.default_rng(0)
    tokens = jnp.asarray(draw.integers(0, 3, (4, 16)), jnp.int32)
    response = jnp.arange(16) >= jnp.asarray([3, 9, 14, 1])[:, None]
    batch = Batch(tokens, jnp.ones_like(tokens), response)
    model = stack_layers(load_pretrained(start, dtype=jnp.float64))
    model.config = dataclasses.replace(model.config, **STUDENT)
    weights, rebuild = model_weights(model)
    teacher = load_pretrained(start).config.paradigm
    # The student is not the teacher any more, and guesses a third of the tokens.
    student = {**weights, "head": weights["head"].at[3:].multiply(0.1)}
    found = []
    for micro in (4, 1):
        objective = {"confidence_beta": beta}
        config = config_in(inputs, start, "unused", micro_batch_size=micro, objective=objective)
        own = jax.tree.map(jnp.copy, student)
        state = initial_state(adamw(config.optimizer), own, jax.random.key(1), averaged=False)
        step = configured_step(config, model.config, rebuild, teacher=teacher)
        state, metrics = step(state, batch, teacher_copies(weights))
        found.append(jax.tree.map(np.asarray, (state.weights, metrics)))
    if beta:
        assert found[0][1].scores.entropy > 0.01
    (whole_state, whole), (state, parts) = found
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-12), parts, whole)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-12), state, whole_state)


@pytest.mark.slow
@pytest.mark.ci
def test_an_objective_of_one_s_own_is_given_the_teacher(inputs, start, tmp_path):
    config = config_in(inputs, start, tmp_path / "run", steps=1)
    teacher = load_pretrained(start).config.paradigm

    def make(batch, key, model):
        return make_inputs(batch, key, config.objective, model, teacher=teacher)

    def doubled(model, inputs, *, teacher, **options):
        total, metrics = training_loss(model, inputs, config.objective, teacher=teacher, **options)
        return 2 * total, metrics

    lines = []
    for name, loss in (("own", doubled), ("plain", None)):
        changed = dataclasses.replace(config, run_dir=str(tmp_path / name))
        note = lambda step, line, model: lines.append(line["loss"])
        train(changed, objective=TrainingObjective(make, loss), callbacks=(note,))
    assert lines[0] == pytest.approx(2 * lines[1])


@pytest.mark.parametrize(
    ("purpose", "changes", "told"),
    [
        (
            {"objective": "autoregressive", "mask_token_id": None},
            {},
            "the model that training starts from fills no masks (it is autoregressive)",
        ),
        ({}, {"model": {"shifted": True}}, "has shifted=False and the trained one shifted=True"),
        ({}, {"data": {"noisy_length": 8}}, "noisy_length is set and objective.noisy_context"),
        (
            {},
            {"data": {"noisy_length": 8}, "objective": {"noisy_context": False}},
            "noisy_length is set and objective.distill",
        ),
        (
            {},
            {"model": {"bidirectional_prompt": None, "causal_clean": True}},
            "objective.noisy_context is True and causal_clean",
        ),
        (
            {},
            {
                "model": {
                    "objective": "masked_diffusion",
                    "block_size": None,
                    "bidirectional_prompt": None,
                }
            },
            "objective.noisy_context is True and the model has no blocks",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_early(purpose, changes, told, inputs, tmp_path):
    start = start_in(inputs, tmp_path / "start", **purpose)
    with refused(ConfigError, told):
        run(config_in(inputs, start, tmp_path / "run", **changes))


def test_a_teacher_reads_in_blocks_of_its_own(inputs, tmp_path):
    """One of blocks of two teaches blocks of four: it reads the hybrid layout, its student the noisy row."""
    start = start_in(inputs, tmp_path / "start", objective="block_diffusion", block_size=2)
    assert run(config_in(inputs, start, tmp_path / "run", steps=1)).finished
    with Checkpoints(tmp_path / "run", CheckpointConfig()) as checkpoints:
        saved = checkpoints.host_state()
    assert saved and saved.teacher
    assert saved.teacher["block_size"] == 2 and not saved.teacher["bidirectional_prompt"]
    assert load_pretrained(tmp_path / "run" / "model").config.block_size == 4


@pytest.mark.slow
@pytest.mark.ci
def test_meshes_give_the_same_losses(tmp_path):
    """Weights, vocabulary and positions split, or rows alone; in full and by LoRA."""
    found = json.loads(run_module("tests.training.distill_on_mesh", tmp_path).splitlines()[-1])
    for name in ("full", "lora"):
        np.testing.assert_allclose(found[f"{name} split"], found[f"{name} rows"], rtol=1e-5)
