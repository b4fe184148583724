"""Prepares what a run needs from its config: the tokenizer, the model it starts with, its data."""

import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding
from transformers import PreTrainedTokenizerBase

from sdar_jax import adapters
from sdar_jax.adapters.config import LoraConfig
from sdar_jax.data import DataConfig, PackedDataset, make_dataset
from sdar_jax.data.tokenizer import token_ids
from sdar_jax.devices import processes
from sdar_jax.devices.chips import peak_flops
from sdar_jax.devices.sharding import batch_sharding, make_mesh
from sdar_jax.errors import ConfigError, DataError
from sdar_jax.hf.released import model_directory
from sdar_jax.model import Model, stack_layers
from sdar_jax.model.axes import shardings
from sdar_jax.model.config import ModelConfig
from sdar_jax.objectives import Batch, LossInputs, make_inputs
from sdar_jax.paradigm import Paradigm, has_blocks
from sdar_jax.training.batches import GivenBatches
from sdar_jax.training.checkpoint import Checkpoints, HostState
from sdar_jax.training.checks import (
    check_context,
    check_phases_reached,
    check_run,
    trained_paradigm,
)
from sdar_jax.training.config import InitConfig, TrainConfig
from sdar_jax.training.config_io import from_values
from sdar_jax.training.data_files import Fingerprint, fingerprint, report_changes
from sdar_jax.training.extensions import Extensions, TrainingObjective
from sdar_jax.training.initial_model import (
    check_vocabulary,
    first_shape,
    initial_model,
    past_the_vocabulary,
)
from sdar_jax.training.noise_ramp import noise_schedule
from sdar_jax.training.optimizer import Weights, adamw, learning_rate
from sdar_jax.training.resume import check_same_extensions, check_schedule
from sdar_jax.training.step import (
    Rebuild,
    TrainState,
    compute_dtype,
    initial_state,
    make_step,
    model_weights,
)
from sdar_jax.training.stops import end_of_text, with_learned_stops
from sdar_jax.training.teacher import rebuild_teacher, teacher_copies, teacher_paradigm
from sdar_jax.training.trackers import Meter
from sdar_jax.weighted_loss import count_correct, training_loss

log = logging.getLogger(__name__)


class Setup(NamedTuple):
    """A run where it starts or resumes.

    Attributes:
        config: with its steps in place of `epochs`.
        epochs: those of the config as it was given.
        mesh: of all devices.
        model: the model's config; of `block_sizes` with the largest, which rows are laid out for.
        rebuild: weights by name -> model of that config, its layers stacked.
        state: before the next step.
        frozen: weights that are not trained, a teacher's among them.
        teacher: how the teacher reads; None without one.
        data: the batches.
        files: fingerprints of what was read to begin with.
        rows: of each batch, those that `data` gives out here.
        meter: with the sums since the last line of metrics.
    """

    config: TrainConfig
    epochs: int | None
    mesh: Mesh
    model: ModelConfig
    rebuild: Rebuild
    state: TrainState
    frozen: Weights
    teacher: Paradigm | None
    data: PackedDataset | GivenBatches
    files: Fingerprint
    rows: list[int]
    meter: Meter


def prepare(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    checkpoints: Checkpoints,
    host_state: HostState | None,
    extensions: Extensions = Extensions(),  # noqa: B008 (a tuple)
) -> Setup:
    """Prepares a run from the newest checkpoint, whose `host_state` is given, or from the beginning if that is None.

    Raises:
        ConfigError: a mesh that does not divide devices, model or batch, or as `initial_model` and `check_schedule`.
        CheckpointError, DataError: weights, checkpoint or data that cannot be read.
    """
    epochs = config.epochs
    mesh = make_mesh(config.mesh)
    files = processes.broadcast(
        lambda: fingerprint(config.data.sources, tokenizer_directory(config.model))
    )
    if host_state is None:
        teacher = _first_teacher(config, tokenizer)
        shape, rebuild, state, frozen = _first_state(config, tokenizer, mesh, extensions, teacher)
        checkpoints.save_frozen(frozen)
        config = _with_steps(config, tokenizer, shape)
        check_phases_reached(config)
    else:
        report_changes(host_state.files or {}, files)
        saved_shape = from_values(ModelConfig, host_state.model)
        shape = with_learned_stops(saved_shape, tokenizer, config.data.sources)
        same_epochs = config.epochs is not None and config.epochs == host_state.epochs
        steps = from_values(TrainConfig, host_state.config).steps if same_epochs else None
        config = _with_steps(config, tokenizer, shape, steps)
        check_schedule(host_state.config, config, checkpoints.latest or 0)
        teacher = None if host_state.teacher is None else Paradigm(**host_state.teacher)
        check_run(config, shape, mesh, teacher)
        rebuild, like, like_frozen = abstract_state(config, shape, mesh, extensions)
        check_same_extensions(host_state, extensions, like_frozen)
        state = checkpoints.state(like)
        frozen = checkpoints.frozen(like_frozen)
    rows = local_rows(mesh, config.data.batch_size)
    if extensions.data is None:
        data = open_dataset(config.data, tokenizer, shape, rows)
    else:
        # Every process has all rows of a user's own batches.
        rows = list(range(config.data.batch_size))
        data = GivenBatches(extensions.data, config.data, shape.vocab_size)
    peak = config.peak_flops or peak_flops(jax.devices()[0].device_kind)
    meter = Meter(shape, peak and peak * mesh.size, frozen=config.lora is not None)
    if host_state is not None:
        if isinstance(data, PackedDataset):
            _check_records(data, host_state)
        data.set_state(host_state.data)
        meter.set_state(host_state.meter)
    return Setup(
        config, epochs, mesh, shape, rebuild, state, frozen, teacher, data, files, rows, meter
    )


def _with_steps(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    model: ModelConfig,
    counted: int | None = None,
) -> TrainConfig:
    """Puts a run's steps in the place of its `epochs`: all batches of the data are made once, and counted.

    Args:
        counted: how many they were when the run began with as many epochs.
    """
    if config.steps is not None:
        return config
    data = replace(config.data, epochs=config.epochs)

    def count() -> int:
        log.info("counting the steps of %s epochs, which reads the data once", config.epochs)
        # The last row: giving out the first one would report what is wrong with records, which training will do.
        with closing(open_dataset(data, tokenizer, model, rows=[data.batch_size - 1])) as batches:
            return sum(1 for _ in batches)

    return replace(config, steps=counted or processes.broadcast(count), epochs=None, data=data)


def _check_records(data: PackedDataset, host_state: HostState) -> None:
    """Raises DataError where the sources hold another number of records: their order would be another."""
    before = host_state.data["order"]["records"]
    now = data.get_state()["order"]["records"]
    if before != now:
        raise DataError(
            f"the data sources hold {now} records and held {before} when the checkpoint was saved, so that their order "
            "is another: restore the files (data.on_error: skip leaves out a malformed record that stands in its "
            "place), or use a new run_dir"
        )


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Lists the rows of a batch that this process' devices compute, ascending; others may compute the same."""
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    rows = set()
    for index in places.values():
        if index:
            rows |= set(range(batch_size)[index[0]])
    return sorted(rows)


def abstract_state(
    config: TrainConfig,
    model: ModelConfig,
    mesh: Mesh,
    extensions: Extensions = Extensions(),  # noqa: B008 (a tuple)
) -> tuple[Rebuild, TrainState, dict[str, Any]]:
    """Describes how weights become a model, and what a step takes besides its batch: the state, and what is frozen.

    These are ShapeDtypeStructs with shardings; nothing is computed or held.
    """
    weights, rebuild = model_weights(_abstract_model(model, config.lora))
    trained, frozen = _split(config, extensions, weights)
    if config.objective.distill is not None:
        frozen = frozen | teacher_copies(trained)
    state = jax.eval_shape(partial(_initial_state, config), trained, jax.random.key(0))

    def placed[Tree](tree: Tree) -> Tree:
        def place(x: Any, sharding: Sharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        return jax.tree.map(place, tree, shardings(tree, mesh))

    return rebuild, placed(state), placed(frozen)


def _initial_state(config: TrainConfig, weights: Weights, key: jax.Array) -> TrainState:
    return initial_state(
        adamw(config.optimizer), weights, key, averaged=config.ema_decay is not None
    )


def configured_step(
    config: TrainConfig,
    model: ModelConfig,
    rebuild: Rebuild,
    objective: TrainingObjective | None = None,
    teacher: Paradigm | None = None,
) -> jax.stages.Wrapped:
    """Makes the step of a run (`make_step`), with the config's objective or one of the user's own.

    Args:
        teacher: how the teacher reads that `config.objective.distill` asks for.
    """
    inputs_of = objective.make_inputs if objective else partial(_configured_inputs, config, teacher)
    own_loss = objective and objective.loss
    loss = own_loss or partial(training_loss, config=config.objective)
    dtype = compute_dtype(config.compute_dtype)
    counts = config.objective.confidence_beta and not own_loss
    batch_size = config.data.batch_size
    return make_step(
        lambda batch, key, **moving: inputs_of(batch, key, model, **moving),
        partial(loss, remat=config.remat, compute_dtype=dtype),
        rebuild,
        adamw(config.optimizer),
        learning_rate(config.optimizer, config.total_steps),
        teacher=_teacher_rebuild(config, model) if config.objective.distill else None,
        count_correct=partial(count_correct, compute_dtype=dtype) if counts else None,
        noise_schedule=noise_schedule(config),
        micro_batches=batch_size // (config.micro_batch_size or batch_size),
        ema_decay=config.ema_decay,
    )


def _configured_inputs(
    config: TrainConfig,
    teacher: Paradigm | None,
    batch: Batch,
    key: jax.Array,
    model: ModelConfig,
    **moving: Any,
) -> LossInputs:
    return make_inputs(batch, key, config.objective, model, teacher=teacher, **moving)


def _teacher_rebuild(config: TrainConfig, model: ModelConfig) -> Rebuild:
    # The key is made inside: plans have no device to make it on.
    base = jax.eval_shape(lambda: _base(model, config.lora, jax.random.key(0)))
    return rebuild_teacher(model_weights(base)[1])


def _split(
    config: TrainConfig, extensions: Extensions, weights: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits weights (or their shapes) by name into those that are trained and those that are frozen."""
    if config.lora is None:
        return extensions.split(weights)
    if extensions.trainable is not None:
        raise ConfigError(
            "lora and trainable are given, and each says what is trained; leave one out (lora.modules_to_save trains "
            "embed_tokens and lm_head as well)"
        )
    lora_trains = partial(adapters.is_trained, config=config.lora)
    return extensions._replace(trainable=lora_trains).split(weights)


def _abstract_model(config: ModelConfig, lora: LoraConfig | None = None) -> Model:
    def make(key: jax.Array) -> Model:
        base = _base(config, lora, key)
        return base if lora is None else adapters.add(base, lora)

    return jax.eval_shape(make, jax.random.key(0))


def _base(config: ModelConfig, lora: LoraConfig | None, key: jax.Array) -> Model:
    model = Model(config, key, _dtype(lora), stacked=True)
    return model if lora is None else adapters.frozen_base(model, lora)


def _dtype(lora: LoraConfig | None) -> jnp.dtype:
    """Returns the dtype of the weights that a run starts from."""
    return jnp.dtype(jnp.float32) if lora is None else adapters.base_dtype(lora)


def _first_teacher(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Paradigm | None:
    """Finds how the model reads that training starts from, in blocks of its own."""
    if config.objective.distill is None:
        return None
    start = first_shape(config.layout_model, tokenizer)
    if has_blocks(start.objective):
        start = first_shape(replace(config.model, block_size=None), tokenizer)
    return teacher_paradigm(config.objective, start)


def _first_state(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    mesh: Mesh,
    extensions: Extensions,
    teacher: Paradigm | None,
) -> tuple[ModelConfig, Rebuild, TrainState, Weights]:
    model_key, step_key = jax.random.split(jax.random.key(config.seed))
    init = config.layout_model
    shape = first_shape(init, tokenizer)
    check_run(config, shape, mesh, teacher)
    check_context(config, shape)
    model = initial_model(init, tokenizer, model_key, mesh, _dtype(config.lora))
    model.config = with_learned_stops(model.config, tokenizer, config.data.sources)
    if config.lora is not None:
        model = adapters.frozen_base(model, config.lora)
    model = stack_layers(model)
    if config.lora is not None:
        # A key of its own: what else the seed gives is the same with other ranks and targets.
        model = adapters.add(model, config.lora, jax.random.fold_in(model_key, 1))
    weights, rebuild = model_weights(model)
    _, like, like_frozen = abstract_state(config, model.config, mesh, extensions)

    def start(trained: Weights, frozen: Weights, key: jax.Array) -> tuple[TrainState, Weights]:
        copies = teacher_copies(trained) if config.objective.distill else {}
        return _initial_state(config, trained, key), frozen | jax.tree.map(jnp.copy, copies)

    # Donated: the state takes the weights over, and nothing is held twice. Low-rank matrices are small, and not yet on
    # the mesh, where those of one shape lie in different ways.
    donated = (0, 1) if config.lora is None else (1,)
    jitted = jax.jit(
        start,
        donate_argnums=donated,
        out_shardings=jax.tree.map(lambda x: x.sharding, (like, like_frozen)),
    )
    trained, frozen = _split(config, extensions, weights)
    state, frozen = jitted(trained, frozen, step_key)
    return model.config, rebuild, state, frozen


def tokenizer_directory(config: InitConfig) -> Path:
    """Finds the tokenizer on this machine; that of a hub id is fetched."""
    return model_directory(
        config.tokenizer or config.init_from or "", weights=config.tokenizer is None
    )


def data_layout(config: InitConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, int]:
    """What a run's documents are laid out for: its block size, and the end of text. No weight is read.

    Raises ConfigError as a run that starts would.
    """
    shape = first_shape(config, tokenizer)
    check_vocabulary(config, shape, tokenizer, token_ids(tokenizer))
    return trained_paradigm(config, shape).block_size, end_of_text(tokenizer, shape)


def open_dataset(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    model: ModelConfig,
    rows: Sequence[int] | None = None,
) -> PackedDataset:
    """Opens the data, laid out for the model; of each batch these `rows`, all if None.

    Raises:
        ConfigError: neither model nor tokenizer has an end-of-text token, the tokenizer has ids past the model's
            vocabulary, or as `make_dataset`. DataError: likewise.
    """
    last = token_ids(tokenizer).largest
    if last >= model.vocab_size:
        raise ConfigError(
            past_the_vocabulary(last, tokenizer, model) + "use the tokenizer it was trained with"
        )
    return make_dataset(
        config,
        tokenizer,
        block_size=model.paradigm.block_size,
        eos_token_id=end_of_text(tokenizer, model),
        rows=rows,
    )
