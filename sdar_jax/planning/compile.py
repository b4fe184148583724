"""Compiles the real training step for devices that are not here, and reads what it holds and does on each."""

import math
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh
from jax.typing import DTypeLike

from sdar_jax.devices import sharding
from sdar_jax.devices.chips import CHIPS, Chip, compiling_for, topology
from sdar_jax.devices.sharding import batch_sharding, make_mesh
from sdar_jax.losses import chunk_size
from sdar_jax.model.config import ModelConfig
from sdar_jax.objectives import Batch
from sdar_jax.planning.count import Counts, Rounds, count
from sdar_jax.planning.hlo import Instruction, parse
from sdar_jax.planning.work import Expected, expected
from sdar_jax.training import TrainConfig
from sdar_jax.training.checks import check_run
from sdar_jax.training.resolve_model import starting_shape, trained_shape
from sdar_jax.training.setup import abstract_state, configured_step
from sdar_jax.training.teacher import teacher_paradigm


class Memory(NamedTuple):
    """Bytes of one device.

    `weights` are those that are trained; `temporaries` are gradients, activations and what else the step holds for a
    while.
    """

    weights: float
    frozen: float
    optimizer: float
    ema: float
    batch: float
    temporaries: float
    program: float

    @property
    def total(self) -> float:
        return sum(self)


class Compiled(NamedTuple):
    """A compiled step.

    Attributes:
        config: of the run.
        model: the config of the model that is trained.
        topology: its name.
        chip: its figures.
        mesh: of all devices.
        expected: what the step computes, where the program leaves it to the data.
        memory: of one device.
        counts: of one device; None where the compiler refused the step, as it does on TPU where it does not fit.
        tokens: of the rows of a step.
        seconds: that lowering and compiling took.
    """

    config: TrainConfig
    model: ModelConfig
    topology: str
    chip: Chip
    mesh: Mesh
    expected: Expected
    memory: Memory
    counts: Counts | None
    tokens: int
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether memory suffices; what GPUs have beyond the figure is left to CUDA and NCCL."""
        return self.counts is not None and self.memory.total <= self.chip.memory


def compile_step(config: TrainConfig, name: str) -> Compiled:
    """Compiles the step that `train` runs with this config on this topology; none of the recipe's files is read.

    Of `block_sizes` it is that of the largest, in whose blocks a position sees most.

    Raises:
        ConfigError: a topology or a mesh that cannot be, or a model whose shape is not known.
    """
    model = trained_shape(config.layout_model)
    devices = topology(name).devices
    mesh = make_mesh(config.mesh, devices)
    start = starting_shape(config.model)
    teacher = teacher_paradigm(config.objective, start)
    check_run(config, start, mesh, teacher)
    chip = CHIPS[name.partition(":")[0]]
    begun = time.perf_counter()
    with compiling_for(devices[0]):
        expected_counts = expected(config, model, teacher)
        rebuild, state, frozen = abstract_state(config, model, mesh)
        batch = _abstract_batch(config, model, mesh)
        with sharding.activate_mesh(mesh):
            step = configured_step(config, model, rebuild, teacher=teacher)
            lowered = step.lower(state, batch, frozen)
        rounds = _loss_rounds(config, model, mesh, expected_counts)
    held = Memory(
        weights=_held(state.weights),
        frozen=_held(frozen),
        optimizer=_held(state.optimizer),
        ema=_held(state.ema),
        batch=_held((batch, state.key, state.step)),
        temporaries=0.0,
        program=0.0,
    )
    try:
        compiled = lowered.compile()
    except JaxRuntimeError as error:
        memory = _refused(error, held)
        counts = None
    else:
        memory = _memory(compiled.memory_analysis(), held)
        routed = 1 / mesh.shape["expert"]
        counts = count(parse(compiled.as_text() or ""), rounds, routed=routed)
    tokens = config.data.batch_size * config.data.sequence_length
    spent = time.perf_counter() - begun
    return Compiled(config, model, name, chip, mesh, expected_counts, memory, counts, tokens, spent)


def _abstract_batch(config: TrainConfig, model: ModelConfig, mesh: Mesh) -> Batch:
    data = config.data
    place = batch_sharding(mesh)

    def like(length: int, dtype: DTypeLike) -> Any:
        return jax.ShapeDtypeStruct((data.batch_size, length), dtype, sharding=place)

    return Batch(
        tokens=like(data.sequence_length, jnp.int32),
        segment_ids=like(data.sequence_length, jnp.int32),
        loss_mask=like(data.sequence_length, jnp.bool_),
        noisy_index=None if data.noisy_length is None else like(data.noisy_length, jnp.int32),
        order=like(data.sequence_length, jnp.int32) if data.has_order else None,
    )


def _held(tree: Any) -> float:
    """Adds up the bytes of a device's part."""
    leaves = jax.tree.leaves(tree)
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves))


def _memory(stats: Any, held: Memory) -> Memory:
    # What the compiler holds of the arguments is a little more than their elements: layouts are padded.
    padding = stats.argument_size_in_bytes - held.total
    # Its temporaries add up to more than there are at any time: what is held at once is the peak, arguments included.
    return held._replace(
        batch=held.batch + max(padding, 0.0),
        temporaries=float(stats.peak_memory_in_bytes - stats.argument_size_in_bytes),
        program=float(stats.generated_code_size_in_bytes),
    )


def _refused(error: Exception, held: Memory) -> Memory:
    """Reads from the compiler's error what the step would need: in all, or of temporaries where these are too many."""
    message = re.search(
        r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm|HLO temporaries \(([\d.]+)([KMGT])\)",
        str(error),
    )
    if message is None:
        raise error
    size = message[1] or message[3]
    unit = message[2] or message[4]
    needed = float(size) * 1024 ** ("KMGT".index(unit) + 1)
    if message[1]:
        needed = max(needed - held.total, 0.0)
    return held._replace(temporaries=needed)


def _loss_rounds(config: TrainConfig, model: ModelConfig, mesh: Mesh, step: Expected) -> Rounds:
    """Counts the chunks of tokens with loss of a device in each micro-batch, as the loss would choose them."""
    micro_batches = config.data.batch_size // (config.micro_batch_size or config.data.batch_size)
    tensor = mesh.shape["tensor"]
    vocab_parts = tensor if model.vocab_size % tensor == 0 else 1
    token_parts = mesh.size // tensor
    tokens = float(step.token_counts.num_loss_tokens) / micro_batches / token_parts
    outputs = float(step.token_counts.outputs) / micro_batches / token_parts
    chunk = min(chunk_size(model.vocab_size // vocab_parts), outputs)
    rounds = math.ceil(tokens / chunk)

    def of(loop: Instruction) -> float | None:
        return rounds if "loss" in loop.scope.split("/") else None

    return of
