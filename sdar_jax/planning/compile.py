"""The real training step, compiled for devices that are not here, and what it holds and does on each."""

import math
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh

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
from sdar_jax.training.resolve_model import starting_shape, trained_shape
from sdar_jax.training.setup import abstract_state, check_run, configured_step


class Memory(NamedTuple):
    """Bytes of one device. temporaries: gradients, activations and what else the step holds for a while."""

    weights: float
    optimizer: float
    ema: float
    batch: float
    temporaries: float
    program: float

    @property
    def total(self) -> float:
        return sum(self)


class Compiled(NamedTuple):
    """counts: None where the compiler refused the step, as it does on TPU where it does not fit.

    tokens: of the rows of a step. seconds: that lowering and compiling took.
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
        """GPUs have somewhat more memory than the figure, which is left to CUDA and NCCL."""
        return self.counts is not None and self.memory.total <= self.chip.memory


def compile_step(config: TrainConfig, name: str) -> Compiled:
    """The step that `train` runs with this config on this topology; nothing of the recipe's files is read.

    Raises:
        ConfigError: a topology or a mesh that cannot be, or a model whose shape is not known.
    """
    model = trained_shape(config.model)
    devices = topology(name).devices
    mesh = make_mesh(config.mesh, devices)
    check_run(config, starting_shape(config.model), mesh)
    chip = CHIPS[name.partition(":")[0]]
    begun = time.perf_counter()
    with compiling_for(devices[0]):
        expected_counts = expected(config, model)
        rebuild, state, _ = abstract_state(config, model, mesh)
        batch = _abstract_batch(config, model, mesh)
        with sharding.activate_mesh(mesh):
            lowered = configured_step(config, model, rebuild).lower(state, batch)
        rounds = _loss_rounds(config, model, mesh, expected_counts)
    weights, optimizer, ema = map(_held, (state.weights, state.optimizer, state.ema))
    held = Memory(weights, optimizer, ema, _held((batch, state.key, state.step)), 0.0, 0.0)
    try:
        compiled = lowered.compile()
    except JaxRuntimeError as error:
        memory, counts = _refused(error, held), None
    else:
        memory = _memory(compiled.memory_analysis(), held)
        routed = 1 / mesh.shape["expert"]
        counts = count(parse(compiled.as_text() or ""), rounds, routed=routed)
    tokens = config.data.batch_size * config.data.sequence_length
    spent = time.perf_counter() - begun
    return Compiled(config, model, name, chip, mesh, expected_counts, memory, counts, tokens, spent)


def _abstract_batch(config: TrainConfig, model: ModelConfig, mesh: Mesh) -> Batch:
    data, place = config.data, batch_sharding(mesh)
    like = lambda length, dtype: jax.ShapeDtypeStruct((data.batch_size, length), dtype, sharding=place)
    row: Any = like(data.sequence_length, jnp.int32)
    noisy: Any = None if data.noisy_length is None else like(data.noisy_length, jnp.int32)
    loss_mask: Any = like(data.sequence_length, jnp.bool_)
    return Batch(row, row, loss_mask, noisy)


def _held(tree: Any) -> float:
    """Bytes of a device's part."""
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
    """What the compiler says that the step would need: of all, or of temporaries where these alone are too many."""
    said = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm|HLO temporaries \(([\d.]+)([KMGT])\)", str(error))
    if said is None:
        raise error
    size, unit = said[1] or said[3], said[2] or said[4]
    needed = float(size) * 1024 ** ("KMGT".index(unit) + 1)
    return held._replace(temporaries=max(needed - held.total, 0.0) if said[1] else needed)


def _loss_rounds(config: TrainConfig, model: ModelConfig, mesh: Mesh, step: Expected) -> Rounds:
    """Chunks of weighted tokens that a device walks over in each micro-batch, as the loss would choose them."""
    micro = config.data.batch_size // (config.micro_batch_size or config.data.batch_size)
    tensor = mesh.shape["tensor"] if model.vocab_size % mesh.shape["tensor"] == 0 else 1
    tokens = float(step.token_counts.num_loss_tokens) / micro / (mesh.size // mesh.shape["tensor"])
    outputs = float(step.token_counts.outputs) / micro / (mesh.size // mesh.shape["tensor"])
    chunk = min(chunk_size(model.vocab_size // tensor), outputs)
    rounds = math.ceil(tokens / chunk)

    def of(loop: Instruction) -> float | None:
        return rounds if "loss" in loop.scope.split("/") else None

    return of
