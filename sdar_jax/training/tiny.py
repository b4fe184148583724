"""A recipe made small enough for any machine: the same code path on synthetic inputs. `python train.py CONFIG.yaml
--tiny`.

Sizes shrink, and nothing else: objective, corruption, normalizer, packing, formats of the data, optimiser and schedule,
accumulation, remat, experts, the axes of the mesh as far as there are devices, checkpoints and export stay.
"""

import logging
import math
import shutil
from dataclasses import replace
from pathlib import Path

import jax
from transformers import PreTrainedTokenizerBase

from sdar_jax.data import DataConfig
from sdar_jax.devices import processes
from sdar_jax.devices.chips import check_backend
from sdar_jax.devices.sharding import MESH_AXES, MeshConfig
from sdar_jax.errors import ConfigError
from sdar_jax.evaluation.config import EvalConfig
from sdar_jax.hf.pretrained import save_pretrained
from sdar_jax.model import Model
from sdar_jax.model.config import ModelConfig
from sdar_jax.training.config import InitConfig, NoiseRampConfig, OptimizerConfig, TrainConfig
from sdar_jax.training.config_io import from_values, to_values
from sdar_jax.training.resolve_model import starting_shape, trained_shape
from sdar_jax.training.synthetic_data import write_source, write_tokenizer

log = logging.getLogger(__name__)

_STEPS, _LAYERS, _WIDTH, _HEAD_DIM, _VOCABULARY = 4, 3, 64, 16, 320
# The limits keep grouped queries, more experts than a token has, and what the axes of a mesh divide.
_KV_HEADS, _GROUP, _EXPERTS, _EXPERTS_PER_TOKEN = 4, 2, 8, 4
_LENGTH, _BLOCKS, _ROWS_PER_DEVICE = 128, 8, 2
# The largest size of a mesh axis that divides what is left of a model.
_AXIS_LIMITS = {
    "fsdp": _WIDTH,
    "expert": _EXPERTS,
    "context": _BLOCKS,
    "tensor": _KV_HEADS,
    "data": math.inf,
}


def tiny(config: TrainConfig) -> TrainConfig:
    """Shrinks `config` to a few steps of a few short rows, with inputs that are written here, under run_dir + "-tiny".

    Synthetic are a tokenizer of bytes with a chat template, files in the formats of the sources, and, where `init_from`
    is set, the model to start from: random, of the architecture, objective and block size that it would have. What an
    earlier call left there is removed.

    Of several processes the main one writes.

    Raises:
        ConfigError: a directory in the way, or as `starting_shape`.
    """
    check_backend()
    values = processes.broadcast(lambda: to_values(_shrink(config)))
    return from_values(TrainConfig, values)


def _shrink(config: TrainConfig) -> TrainConfig:
    trained = trained_shape(config.layout_model)
    home = Path(f"{config.run_dir}-tiny")
    _remove(home)
    inputs = home / "inputs"
    mesh = _mesh(config.mesh, jax.device_count())
    rows = max(_ROWS_PER_DEVICE, mesh.data * mesh.fsdp * mesh.expert)
    parts = min(2, config.data.batch_size // (config.micro_batch_size or config.data.batch_size))
    block_size = trained.paradigm.block_size or 1
    steps = _STEPS if config.steps is None else min(_STEPS, config.steps)
    steps = max(steps, len(config.block_sizes))
    small = replace(
        config,
        run_dir=str(home),
        steps=steps,
        epochs=None,
        model=_model(config, inputs),
        block_sizes=_block_sizes(config, steps),
        noise_ramp=_noise_ramp(config, steps),
        data=_data(config.data, rows * parts, block_size, inputs / "data"),
        optimizer=_optimizer(config.optimizer, config.steps or math.inf, steps),
        checkpoint=replace(config.checkpoint, every=2),
        eval=config.eval
        and config.eval.data
        and _eval(config.eval, rows, block_size, inputs / "held-out"),
        mesh=mesh,
        micro_batch_size=config.micro_batch_size and rows,
        log_every=1,
    )
    log.info("tiny: %d steps, random weights, made-up data; all of it in %s", steps, home)
    return small


def _remove(home: Path) -> None:
    """Removes what an earlier call made; nothing else."""
    if home.exists() and not (home / "inputs").is_dir():
        raise ConfigError(
            f"{home} is in the way and not of an earlier --tiny; move it, or change run_dir in the file"
        )
    shutil.rmtree(home, ignore_errors=True)


def _model(run: TrainConfig, inputs: Path) -> InitConfig:
    """Writes the tokenizer, and the model to start from where there is one, to `inputs`."""
    config = run.model
    tokenizer = write_tokenizer(inputs / "tokenizer")
    shape = _shrunk(starting_shape(run.layout_model), tokenizer)
    changes = {
        "tokenizer": config.tokenizer and str(inputs / "tokenizer"),
        "mask_token_id": None if config.mask_token_id is None else len(tokenizer),
    }
    if config.init_from is None:
        return replace(config, preset=None, shape=shape, **changes)
    save_pretrained(
        Model(shape, jax.random.key(0)), inputs / "start", tokenizer_from=inputs / "tokenizer"
    )
    return replace(config, init_from=str(inputs / "start"), **changes)


def _shrunk(shape: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> ModelConfig:
    kv_heads = min(shape.num_kv_heads, _KV_HEADS)
    heads = kv_heads * min(shape.num_heads // shape.num_kv_heads, _GROUP)
    # Files of older families have no head size: it is the width's share of a head.
    shared = shape.architecture in ("llama", "qwen2")
    layers, groups = min(shape.num_layers, _LAYERS), min(shape.num_expert_groups, 2)
    return replace(
        shape,
        vocab_size=_VOCABULARY,
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_WIDTH // heads if shared else _HEAD_DIM,
        num_experts=min(shape.num_experts, _EXPERTS),
        num_experts_per_token=min(shape.num_experts_per_token, _EXPERTS_PER_TOKEN),
        moe_intermediate_size=min(shape.moe_intermediate_size, _WIDTH),
        num_dense_layers=min(shape.num_dense_layers, layers - 1),
        num_expert_groups=groups,
        groups_per_token=min(shape.groups_per_token, groups),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        stop_token_ids=(tokenizer.eos_token_id,),
        mask_token_id=None if shape.mask_token_id is None else len(tokenizer),
    )


def _data(config: DataConfig, batch_size: int, block_size: int, home: Path) -> DataConfig:
    length = min(config.sequence_length, max(_LENGTH, _BLOCKS * block_size))
    noisy = config.noisy_length
    if noisy is not None:
        noisy = min(
            length, math.ceil(length * noisy / config.sequence_length / block_size) * block_size
        )
    sources = [
        write_source(source, home / str(number), length)
        for number, source in enumerate(config.sources, 1)
    ]
    return replace(
        config,
        sources=tuple(sources),
        shards=math.gcd(config.shards, batch_size),
        sequence_length=length,
        noisy_length=noisy,
        batch_size=batch_size,
    )


def _eval(config: EvalConfig, rows: int, block_size: int, home: Path) -> EvalConfig:
    """Benchmarks are left out: a model of seconds answers nothing."""
    data = config.data and _data(config.data, rows, block_size, home)
    best = None if config.best in [name.partition("=")[0] for name in config.tasks] else config.best
    return replace(config, data=data, tasks=(), best=best, every=2, rows=rows)


def _optimizer(config: OptimizerConfig, steps: float | int, left: int) -> OptimizerConfig:
    """Keeps the shares of warm-up and decay in the steps, and one step at least."""

    def scaled(amount: float | int) -> int:
        share = amount if amount < 1 else amount / steps
        return max(1, int(share * left)) if amount else 0

    return replace(config, warmup=scaled(config.warmup), decay=scaled(config.decay))


def _block_sizes(config: TrainConfig, steps: int) -> tuple[tuple[float | int, int], ...]:
    """Keeps the order of the block sizes, about their shares of the steps, and one step of each at least."""
    count = len(config.block_sizes)
    pairs = []
    first = 0
    for i, (start, size) in enumerate(config.block_sizes):
        share = start if start < 1 else start / (config.steps or math.inf)
        begun = max(first, min(int(share * steps), steps - count + i))
        pairs.append((begun, size))
        first = begun + 1
    return tuple(pairs)


def _noise_ramp(config: TrainConfig, steps: int) -> NoiseRampConfig:
    """Keeps the share of the steps that the ramp takes."""
    amount = config.noise_ramp.steps
    if amount is None or amount < 1:
        return config.noise_ramp
    return replace(
        config.noise_ramp, steps=max(1, int(amount / (config.steps or math.inf) * steps))
    )


def _mesh(config: MeshConfig, devices: int) -> MeshConfig:
    """Doubles axes in turn, each up to its size in `config`, while there are devices; `data` takes what is left."""
    sizes = dict.fromkeys(MESH_AXES, 1)

    def can_double(axis: str) -> bool:
        wanted = getattr(config, axis)
        limit = min(math.inf if wanted == -1 else wanted, _AXIS_LIMITS[axis])
        return 2 * sizes[axis] <= limit and devices % (2 * math.prod(sizes.values())) == 0

    while growing := [axis for axis in _AXIS_LIMITS if can_double(axis)]:
        sizes[min(growing, key=lambda axis: sizes[axis])] *= 2
    sizes["data"] *= devices // math.prod(sizes.values())
    return MeshConfig(**sizes)
