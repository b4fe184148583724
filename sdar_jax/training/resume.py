"""What a run may change when it goes on, and what it may not."""

import json
from pathlib import Path
from typing import Any

import yaml

from sdar_jax import processes
from sdar_jax.errors import ConfigError
from sdar_jax.training.config import TrainConfig
from sdar_jax.training.reading import from_values, to_values

# None of these changes what a run computes, but for rounding (micro_batch_size, remat, mesh).
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
)


def check_unchanged(saved: dict[str, Any], config: TrainConfig) -> None:
    """Raises ConfigError that names each field that differs from the config a checkpoint was made with."""
    # A field that there was not yet is at its default.
    before = to_values(from_values(TrainConfig, saved))
    changed = [told for told in _differences(before, config, "was {}, is {}") if not told.startswith(_FREE)]
    if changed:
        raise ConfigError(
            f"{config.run_dir} was started otherwise: {', '.join(changed)}; restore these, or use a new run_dir"
        )


def check_same_for_all(config: TrainConfig) -> None:
    """Raises ConfigError that names each field that differs from that of the job's first process."""
    first = processes.from_first(lambda: to_values(config))
    if different := _differences(first, config, "{} in process 0, {} here"):
        raise ConfigError(f"the config is not process 0's: {', '.join(different)}; give all processes the same file")


def _differences(values: dict[str, Any], config: TrainConfig, words: str) -> list[str]:
    """Of each field that is not as in `values`: its name, and in words both values."""
    one, other = _flat(values), _flat(to_values(config))
    return [
        f"{name} ({words.format(json.dumps(one.get(name)), json.dumps(other.get(name)))})"
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name)
    ]


def write_config(run_dir: Path, config: TrainConfig) -> None:
    """run_dir/config.yaml: the config in full, which train.py reads."""
    (run_dir / "config.yaml").write_text(yaml.safe_dump(to_values(config), sort_keys=False))


def _flat(values: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings and lists as {"data.sources.0.path": ...}."""
    if isinstance(values, dict | list) and values:
        items = values.items() if isinstance(values, dict) else enumerate(values)
        parts = [_flat(item, f"{path}.{name}" if path else str(name)) for name, item in items]
        return {name: item for part in parts for name, item in part.items()}
    return {path: values}
