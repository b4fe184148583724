"""Checks what a run may change when it resumes, and what it may not."""

import json
import logging
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sdar_jax.devices import processes
from sdar_jax.errors import ConfigError
from sdar_jax.training.checkpoint import HostState
from sdar_jax.training.config import OptimizerConfig, TrainConfig, whole_steps
from sdar_jax.training.config_io import from_values, to_values
from sdar_jax.training.extensions import Extensions
from sdar_jax.training.noise_ramp import noise_schedule
from sdar_jax.training.optimizer import learning_rate
from sdar_jax.training.run_dir import model_path, write_file

log = logging.getLogger(__name__)

# None of these changes what a run has computed, but for rounding (micro_batch_size, remat, mesh). A run that has not
# met a malformed record is the same whatever is done about one, and its place in the data is in any number of epochs.
_FREE = (
    "run_dir",
    "checkpoint.",
    "eval",
    "log_every",
    "tensorboard",
    "peak_flops",
    "micro_batch_size",
    "remat",
    "mesh.",
    "data.num_threads",
    "data.on_error",
    "data.epochs",
    "epochs",
    "export_dtype",
)
# These set the learning rate, the block size and the noise of each step, which `check_schedule` compares.
_SCHEDULE = (
    "steps",
    "block_sizes",
    "noise_ramp.",
    "optimizer.schedule",
    "optimizer.warmup",
    "optimizer.decay",
    "optimizer.final_fraction",
)


def check_unchanged(saved: dict[str, Any], config: TrainConfig) -> None:
    """Raises ConfigError that names each field that differs from the config a checkpoint was made with.

    Those of the schedule are left to `check_schedule`.
    """
    # A field that there was not yet is at its default.
    before = to_values(from_values(TrainConfig, saved))
    differences = _differences(before, config, "was {}, is {}")
    changed = [each for each in differences if not each.startswith(_FREE + _SCHEDULE)]
    if changed:
        raise ConfigError(
            f"{config.run_dir} was started otherwise: {', '.join(changed)}; restore these, or use a new run_dir"
        )


def check_schedule(saved: dict[str, Any], config: TrainConfig, done: int) -> None:
    """Checks that the `done` steps of a run would have had the same learning rates, block sizes and noise under
    `config`, with its steps.

    So a run may be given more steps, or another end of its schedule, as long as nothing in the past would be different.
    It may also end where it is, with `steps` equal to `done`: nothing is left to learn then.

    Raises:
        ConfigError: the fields that would have changed it, and what to do instead.
    """
    before = from_values(TrainConfig, saved)
    steps = config.total_steps
    if steps < done:
        raise ConfigError(
            f"steps is {steps} and {config.run_dir} at step {done}; give {done} to end it there, or more"
        )
    _check_block_sizes(before, config, done)
    _check_noise(before, config, done)
    if _same_rates(before.optimizer, before.total_steps, config.optimizer, steps, done):
        return
    differences = _differences(to_values(before), config, "was {}, is {}")
    changed = ", ".join(each for each in differences if each.startswith(_SCHEDULE))
    if steps == done:
        log.warning(
            "%s ends at step %d, before its schedule does: %s", config.run_dir, done, changed
        )
        return
    warmup = whole_steps(before.optimizer.warmup, before.total_steps)
    kept = replace(config.optimizer, warmup=warmup)
    model = model_path(Path(config.run_dir))
    first = "" if model.exists() else f", once steps {done} has exported it"
    fix = f"or use a new run_dir, with model.init_from {model}{first}"
    if _same_rates(before.optimizer, before.total_steps, kept, steps, done):
        fix = f"or set optimizer.warmup to {warmup}, which it was in steps, or use a new run_dir"
    raise ConfigError(
        f"{config.run_dir} was started otherwise: {changed}, with which its {done} steps would have had other learning "
        f"rates; restore these, {fix}"
    )


def _check_block_sizes(before: TrainConfig, config: TrainConfig, done: int) -> None:
    """Raises ConfigError where the steps done would have had other blocks, or rows another layout."""

    def past(each: TrainConfig) -> list[tuple[int, int]]:
        return [(start, size) for start, size in each.block_size_phases if start < done]

    was, now = ([list(phase) for phase in each.block_size_phases] for each in (before, config))
    if past(before) != past(config):
        raise ConfigError(
            f"{config.run_dir} was started otherwise: block_sizes was {was}, is {now} in steps, with which its {done} "
            "steps would have had other blocks; restore it, as far as these go"
        )
    if before.layout_model.block_size != config.layout_model.block_size:
        raise ConfigError(
            f"{config.run_dir} was started otherwise: block_sizes was {was}, is {now} in steps, and rows are laid out "
            "for the largest; keep that, or use a new run_dir"
        )


def _check_noise(before: TrainConfig, config: TrainConfig, done: int) -> None:
    """Raises ConfigError where the steps done would have had another range of noise levels."""

    def past(each: TrainConfig) -> np.ndarray:
        found = noise_schedule(each)
        steps = np.arange(1, done + 1)
        low, high = each.objective.corruption.range if found is None else found(steps)
        return np.stack([np.broadcast_to(low, done), np.broadcast_to(high, done)])

    if np.allclose(past(before), past(config), rtol=1e-6, atol=0):
        return
    was, now = (to_values(each.noise_ramp) for each in (before, config))
    raise ConfigError(
        f"{config.run_dir} was started otherwise: noise_ramp was {was} over {before.total_steps} steps, is {now} over "
        f"{config.total_steps}, with which its {done} steps would have had other noise; restore these, or use a new "
        "run_dir"
    )


def _same_rates(
    one: OptimizerConfig, one_steps: int, other: OptimizerConfig, other_steps: int, done: int
) -> bool:
    steps = np.arange(1, done + 1)
    one_rates = np.asarray(learning_rate(one, one_steps)(steps))
    other_rates = np.asarray(learning_rate(other, other_steps)(steps))
    return np.allclose(one_rates, other_rates, rtol=1e-6, atol=0)


def check_extensions(config: TrainConfig, extensions: Extensions) -> None:
    """Raises ConfigError where a run has no data, or is given it twice."""
    if extensions.data is None and not config.data.sources:
        raise ConfigError(
            "data.sources is empty and no data is given; name a source, or give train() data"
        )
    if extensions.data is not None and config.data.sources:
        raise ConfigError(
            "data is given and data.sources not empty; give one of them: set data.sources to ()"
        )
    if extensions.objective is not None and config.noise_ramp.moves:
        raise ConfigError(
            "noise_ramp is given and an objective of one's own, which draws its own noise; leave noise_ramp out"
        )
    if extensions.data is not None and config.steps is None:
        raise ConfigError(
            f"epochs is {config.epochs} and data is given, which says nothing of its length; give steps"
        )


def check_same_extensions(
    host_state: HostState, extensions: Extensions, frozen: Collection[str]
) -> None:
    """Raises ConfigError where a run resumes with another objective of the user's, or with other weights frozen."""
    was = host_state.objective
    now = extensions.objective and extensions.objective.name
    if was != now:
        raise ConfigError(
            f"the run was started with the objective {was or 'of its config'}, and goes on with {now or 'that one'}; "
            "give the same, or use a new run_dir"
        )
    if different := sorted(set(host_state.frozen or ()) ^ set(frozen)):
        raise ConfigError(
            f"trainable says of {', '.join(different)} another thing than when the run was started; give the same, or "
            "use a new run_dir"
        )


def check_same_for_all(config: TrainConfig) -> None:
    """Raises ConfigError that names each field that differs from that of the job's first process."""
    first = processes.broadcast(lambda: to_values(config))
    if different := _differences(first, config, "{} in process 0, {} here"):
        raise ConfigError(
            f"the config is not process 0's: {', '.join(different)}; give all processes the same file"
        )


def _differences(values: dict[str, Any], config: TrainConfig, words: str) -> list[str]:
    """Lists each field that is not as in `values`: its name, and in words both values."""
    one = _flat(values)
    other = _flat(to_values(config))
    differences = []
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            both = words.format(json.dumps(one.get(name)), json.dumps(other.get(name)))
            differences.append(f"{name} ({both})")
    return differences


def write_config(run_dir: Path, config: TrainConfig) -> None:
    """Writes run_dir/config.yaml: the config in full, which train.py reads."""
    write_file(run_dir / "config.yaml", yaml.safe_dump(to_values(config), sort_keys=False))


def _flat(values: Any, path: str = "") -> dict[str, Any]:
    """Flattens nested mappings and lists to {"data.sources.0.path": ...}."""
    if not isinstance(values, dict | list) or not values:
        return {path: values}
    items = values.items() if isinstance(values, dict) else enumerate(values)
    flat = {}
    for name, item in items:
        flat |= _flat(item, f"{path}.{name}" if path else str(name))
    return flat
