"""`TrainConfig`: all settings of a training run, checked when it is made. A YAML file holds one (`config_io.py`)."""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from sdar_jax.adapters.config import LoraConfig
from sdar_jax.corruption import CorruptionConfig
from sdar_jax.data import DataConfig
from sdar_jax.devices.sharding import MeshConfig
from sdar_jax.errors import ConfigError, is_int, is_number, require
from sdar_jax.evaluation.config import EvalConfig
from sdar_jax.model import Remat
from sdar_jax.model.config import BlockOrigin, ModelConfig, Objective
from sdar_jax.model.conversion import MaskInit
from sdar_jax.objectives import ObjectiveConfig

Schedule = Literal["constant", "cosine", "wsd"]


def whole_steps(amount: float | int, steps: int) -> int:
    """Computes a number of steps: `amount` of them, or that share of `steps` if below 1."""
    return math.ceil(amount * steps) if amount < 1 else int(amount)


def _expand_home(config: object, *names: str) -> None:
    """Replaces a leading ~ in these fields, which no shell expands in a file."""
    for name in names:
        path = getattr(config, name)
        if path is None or not path.startswith("~"):
            continue
        expanded = os.path.expanduser(path)
        require(name, path, expanded != path, "the home directory of someone who has one here")
        object.__setattr__(config, name, expanded)


@dataclass(frozen=True)
class InitConfig:
    """The model that training starts from, and what it is to become."""

    init_from: str | None = None
    """Weights to start from: a Hugging Face directory (of `sdar_jax` too) or hub id. One of these first three."""
    preset: str | None = None
    """A released shape by name, such as "qwen3-0.6b", with random weights."""
    shape: ModelConfig | None = None
    """A shape written out, with random weights: the fields of sdar_jax.ModelConfig."""
    tokenizer: str | None = None
    """Directory or hub id of the tokenizer; None is init_from. It is carried along to the exported model."""
    objective: Objective | None = None
    """What is trained. None keeps the model's own. An autoregressive model is converted for the other two."""
    block_size: int | None = None
    """Tokens per block, for block_diffusion; None keeps the model's own. `block_sizes` of the run changes it on the
    way."""
    block_origin: BlockOrigin | None = None
    """From where blocks are counted, the first token of the sequence or the response; None keeps the model's own."""
    shifted: bool | None = None
    """Whether the position before a token predicts it, as in Dream and Fast-dLLM v2; None keeps the model's own."""
    causal_clean: bool | None = None
    """Whether a clean position sees only what is before it, as in NBDiff; None keeps the model's own."""
    bidirectional_prompt: bool | None = None
    """Whether all of the prompt sees itself, as in D2F; None keeps the model's own."""
    mask_token_id: int | None = None
    """The mask's row of the vocabulary; None is the model's own, the tokenizer's, or the first past its largest id."""
    mask_init: MaskInit = "mean"
    """The mask's first embedding, where an autoregressive model is converted."""

    def __post_init__(self):
        given = [
            name for name in ("init_from", "preset", "shape") if getattr(self, name) is not None
        ]
        if len(given) != 1:
            raise ConfigError(
                f"{' and '.join(given) or 'none'} given; give one of init_from, preset and shape"
            )
        if self.init_from is None and self.tokenizer is None:
            raise ConfigError(
                "tokenizer is None and there is no init_from that has one; give a tokenizer directory"
            )
        _expand_home(self, "init_from", "tokenizer")

    @property
    def paradigm_values(self) -> dict[str, Any]:
        """The given values of the model's `Paradigm` besides the objective; None keeps the model's own."""
        names = ("block_size", "block_origin", "shifted", "causal_clean", "bidirectional_prompt")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101), clipping, and the learning rate over the run. Norms and biases are not decayed."""

    learning_rate: float = 1e-5
    """The highest learning rate."""
    schedule: Schedule = "constant"
    """After the warm-up: "constant"; "cosine" down to the end; "wsd": constant, then a linear decay at the end."""
    warmup: float | int = 0.03
    """Linear warm-up: a share of all steps if below 1, else a number of steps."""
    decay: float | int = 0.1
    """The decay of "wsd": a share of all steps if below 1, else a number of steps."""
    final_fraction: float = 0.0
    """Where "cosine" and "wsd" end, as a share of learning_rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, times the learning rate."""
    clip_norm: float | None = 1.0
    """Gradients of a larger global norm are scaled down to it; None leaves them."""

    def __post_init__(self):
        for name in ("learning_rate", "eps", "clip_norm"):
            value = getattr(self, name)
            require(
                name,
                value,
                value is None or (math.isfinite(value) and value > 0),
                "a finite number above 0",
            )
        require(
            "weight_decay",
            self.weight_decay,
            0 <= self.weight_decay < math.inf,
            "a finite number of at least 0",
        )
        for name in ("beta1", "beta2"):
            require(name, getattr(self, name), 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        require(
            "final_fraction",
            self.final_fraction,
            0 <= self.final_fraction <= 1,
            "a number in [0, 1]",
        )
        for name in ("warmup", "decay"):
            value = getattr(self, name)
            good = 0 <= value < 1 or (math.isfinite(value) and value >= 1 and value == int(value))
            require(name, value, good, "a share of the steps in [0, 1) or a whole number of steps")
        require(
            "schedule",
            self.schedule,
            self.schedule in ("constant", "cosine", "wsd"),
            "constant, cosine or wsd",
        )


@dataclass(frozen=True)
class NoiseRampConfig:
    """A range of noise levels that moves in a straight line: from that of `objective.corruption`, in the first step."""

    t_min: float | None = None
    """Where corruption.t_min ends; None leaves it where it is."""
    t_max: float | None = None
    """Where corruption.t_max ends; None leaves it where it is."""
    steps: float | int | None = None
    """From which step on the range is there: a share of all steps if below 1, else its number. None: the last."""

    def __post_init__(self):
        steps = self.steps
        good = steps is None or (
            is_number(steps) and steps > 0 and (steps < 1 or steps == int(steps))
        )
        require("noise_ramp.steps", steps, good, "a share of the steps in (0, 1) or a whole number")
        if steps is not None and not self.moves:
            raise ConfigError(
                f"noise_ramp.steps is {steps} and nothing moves; give noise_ramp.t_min or t_max, or leave it out"
            )

    @property
    def moves(self) -> bool:
        """Whether there is a ramp."""
        return self.t_min is not None or self.t_max is not None


@dataclass(frozen=True)
class CheckpointConfig:
    """Saved states of the run, from which it resumes by itself."""

    every: int = 500
    """Steps between two; the last step is always saved, and so is one that a signal interrupts."""
    keep: int = 2
    """How many of the newest are kept. With 2 and more, a run survives a damaged newest one."""

    def __post_init__(self):
        require("every", self.every, self.every >= 1, "at least 1")
        require("keep", self.keep, self.keep >= 1, "at least 1")


@dataclass(frozen=True)
class TrainConfig:
    """A training run. Started again with the same config, it resumes from its newest checkpoint.

    Raises:
        ConfigError: a value out of its range, or values that contradict each other.
    """

    run_dir: str
    """Directory of the run: config.yaml, metrics.jsonl, tensorboard/, checkpoints/, and at the end model/."""
    steps: int | None
    """Optimiser steps, each on one batch of data.batch_size rows. Either these or `epochs`."""
    model: InitConfig
    data: DataConfig
    """What is read, and the size of a batch. With batches from Python (`train`), sources is empty."""
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig | None = None
    """Evaluation during training; None is none."""
    epochs: int | None = None
    """Passes over the data, in place of `steps`. Their steps are counted before the first one, by reading the data."""
    block_sizes: tuple[tuple[float | int, int], ...] = ()
    """A schedule of the block size, in place of model.block_size: pairs of the steps before it (a share of all steps
    if below 1) and a block size, as [[0, 4], [0.5, 8], [0.8, 16]]. Rows are laid out for the largest, which the others
    divide."""
    noise_ramp: NoiseRampConfig = NoiseRampConfig()
    """A curriculum of noise: where the range of noise levels moves to over the run; by default it stays."""
    lora: LoraConfig | None = None
    """Train low-rank matrices beside frozen weights; None trains the weights. run_dir/adapter then has them in PEFT's
    files, and run_dir/model the weights with them merged in."""
    mesh: MeshConfig = MeshConfig()
    """How the devices share the work; by default rows, weights and optimiser state are split over all of them."""
    seed: int = 0
    """Of the initial weights and of the corruption (data has its own)."""
    ema_decay: float | None = None
    """Keep a moving average of the weights with this decay, evaluate it and export it; None keeps none."""
    micro_batch_size: int | None = None
    """Rows computed at once, a divisor of data.batch_size: less memory, the same step. None is the full batch."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of activations and matmuls; weights and optimiser are float32. "auto": bfloat16 on GPU and TPU, else float32."""
    remat: Remat = "none"
    """What the backward pass recomputes to save memory: nothing, all but matmul outputs ("dots"), or full layers."""
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights in run_dir/model, which bfloat16 makes half as large."""
    log_every: int = 10
    """Steps that a line of metrics averages over."""
    tensorboard: bool = True
    """Write run_dir/tensorboard as well."""
    peak_flops: float | None = None
    """FLOP/s of the device that MFU is a share of; None looks the device up, and unknown devices have no MFU."""

    def __post_init__(self):
        for name in ("steps", "epochs", "log_every"):
            value = getattr(self, name)
            require(name, value, value is None or value >= 1, "at least 1")
        self._check_length()
        require("seed", self.seed, 0 <= self.seed < 2**32, "a number in [0, 2**32)")
        require("run_dir", self.run_dir, bool(self.run_dir), "a directory")
        local = re.match(r"[A-Za-z][\w+.-]*://", self.run_dir) is None
        require(
            "run_dir",
            self.run_dir,
            local,
            "a directory of this machine, where a bucket may be mounted",
        )
        _expand_home(self, "run_dir")
        ema = self.ema_decay
        peak = self.peak_flops
        micro = self.micro_batch_size
        require("ema_decay", ema, ema is None or 0 < ema < 1, "a number between 0 and 1")
        require("peak_flops", peak, peak is None or 0 < peak < math.inf, "a finite number above 0")
        batch = self.data.batch_size
        divides = micro is None or (micro >= 1 and batch % micro == 0)
        require("micro_batch_size", micro, divides, f"a divisor of data.batch_size, {batch}")
        self._check_block_sizes()
        _ = self.final_corruption
        if self.steps is not None:
            self._check_schedule(self.steps)

    @property
    def total_steps(self) -> int:
        """`steps`. `train` puts them in the place of `epochs` as soon as they are counted."""
        if self.steps is None:
            raise ConfigError(
                f"epochs is {self.epochs}, whose steps only a run counts; give steps, and epochs None"
            )
        return self.steps

    @property
    def block_size_phases(self) -> list[tuple[int, int]]:
        """`block_sizes` in steps: how many come before, and the block size from there on."""
        return [(whole_steps(start, self.total_steps), size) for start, size in self.block_sizes]

    def block_size_at(self, step: int) -> int | None:
        """Returns the block size of a step, counted from 1; None is the model's own."""
        reached = [size for start, size in self.block_size_phases if start < step]
        return reached[-1] if reached else None

    def has_final_blocks(self, step: int) -> bool:
        """Returns whether a step has the block size of the last one."""
        return self.block_size_at(step) == self.block_size_at(self.total_steps)

    @property
    def final_corruption(self) -> CorruptionConfig:
        """`objective.corruption` with the range of noise levels that `noise_ramp` ends at.

        Raises ConfigError where that is none.
        """
        ends = {"t_min": self.noise_ramp.t_min, "t_max": self.noise_ramp.t_max}
        given = {name: value for name, value in ends.items() if value is not None}
        return replace(self.objective.corruption, **given)

    @property
    def layout_model(self) -> InitConfig:
        """`model` with the largest of `block_sizes`, which rows are laid out for."""
        return self._with_block_size(max)

    @property
    def final_model(self) -> InitConfig:
        """`model` with the last of `block_sizes`."""
        return self._with_block_size(lambda sizes: sizes[-1])

    def _with_block_size(self, choose: Callable[[list[int]], int]) -> InitConfig:
        if not self.block_sizes:
            return self.model
        return replace(self.model, block_size=choose([size for _, size in self.block_sizes]))

    def _check_block_sizes(self) -> None:
        if not self.block_sizes:
            return
        starts, sizes = zip(*self.block_sizes, strict=True)
        for start in starts:
            share_or_whole = is_number(start) and start >= 0 and (start < 1 or start == int(start))
            require(
                "block_sizes",
                start,
                share_or_whole,
                "a share of the steps in [0, 1) or a whole number of them",
            )
        for size in sizes:
            require("block_sizes", size, is_int(size) and size >= 1, "a block size of at least 1")
            divides = max(sizes) % size == 0
            require("block_sizes", size, divides, f"a divisor of the largest, {max(sizes)}")
        shown = [list(pair) for pair in self.block_sizes]
        require("block_sizes", shown, starts[0] == 0, "0 steps before the first block size")
        differ = all(a != b for a, b in pairwise(sizes))
        require(
            "block_sizes", shown, differ, "another block size in each pair than in the one before"
        )
        if self.model.block_size is not None:
            raise ConfigError(
                f"model.block_size is {self.model.block_size} and block_sizes {shown}; give one of them, and None or "
                "[] for the other"
            )
        if self.steps is not None:
            rise = all(a < b for (a, _), (b, _) in pairwise(self.block_size_phases))
            require(
                "block_sizes",
                shown,
                rise,
                f"more of the {self.steps} steps before each pair than before the last",
            )

    def _check_length(self) -> None:
        given = [name for name in ("steps", "epochs") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"{' and '.join(given) or 'neither'} given; give one of steps and epochs"
            )
        if self.epochs is not None and self.data.epochs is not None:
            raise ConfigError(
                f"epochs is {self.epochs} and data.epochs {self.data.epochs}; leave data.epochs out"
            )
        if self.epochs is not None and self.data.shards > 1:
            raise ConfigError(
                f"epochs is {self.epochs} and data.shards {self.data.shards}, which end apart; give steps"
            )

    def _check_schedule(self, steps: int) -> None:
        last = whole_steps(self.optimizer.decay, steps) if self.optimizer.schedule == "wsd" else 0
        first = whole_steps(self.optimizer.warmup, steps)
        if first + last > steps:
            raise ConfigError(
                f"optimizer.warmup and optimizer.decay take {first + last} of {steps} steps; shorten them"
            )
