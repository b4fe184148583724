"""Finds the nearest change with which a step fits: candidates are compiled in turn, the least intrusive first."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from sdar_jax.devices.chips import CHIPS
from sdar_jax.errors import ConfigError
from sdar_jax.planning.compile import Compiled, compile_step
from sdar_jax.training import TrainConfig

_LARGEST_SLICE = {"v5e": 256, "v6e": 256, "v5p": 8960}


class Change(NamedTuple):
    """A change of a run; `options` are those of the command line."""

    options: str
    config: TrainConfig
    topology: str


def nearest(
    step: Compiled, *, attempts: int = 6
) -> tuple[Change | None, list[tuple[Change, Compiled]]]:
    """Finds the first change that fits, and all that were compiled, at most `attempts`."""
    tried: list[tuple[Change, Compiled]] = []
    for change in candidates(step):
        if len(tried) == attempts:
            break
        try:
            found = compile_step(change.config, change.topology)
        except ConfigError:
            continue
        tried.append((change, found))
        if found.fits:
            return change, tried
    return None, tried


def candidates(step: Compiled) -> Iterator[Change]:
    """Yields fewer rows at once, then more recomputation, then both; then more devices, where fsdp takes them.

    Devices whose share of weights, gradients and optimiser alone is too much are passed over.
    """
    config = step.config
    held = 2 * step.memory.weights + step.memory.frozen + step.memory.optimizer + step.memory.ema
    if held < step.chip.memory:
        yield from _same_devices(step)
    if config.mesh.fsdp != -1:
        config = replace(config, mesh=replace(config.mesh, fsdp=-1))
    name = step.topology
    shards = step.mesh.size
    while True:
        name = doubled(name)
        shards *= 2
        rows = _rows(step) * shards // step.mesh.size
        most = _LARGEST_SLICE.get(name.partition(":")[0], math.inf)
        if shards > most or config.data.batch_size % rows:
            return
        if held * step.mesh.size / shards > step.chip.memory:
            continue
        fsdp = "" if step.config.mesh.fsdp == -1 else " --mesh.fsdp -1"
        options = f"--topology {name}{fsdp} --remat full --micro_batch_size {rows}"
        yield Change(options, replace(config, remat="full", micro_batch_size=rows), name)


def _same_devices(step: Compiled) -> Iterator[Change]:
    config = step.config
    rows = _rows(step)
    now = config.micro_batch_size or config.data.batch_size
    smaller = [
        micro
        for micro in (now // 2, rows)
        if rows <= micro < now and config.data.batch_size % micro == 0
    ]
    stronger = {"none": ("dots", "full"), "dots": ("full",), "full": ()}[config.remat]
    for micro in dict.fromkeys(smaller):
        yield Change(
            f"--micro_batch_size {micro}", replace(config, micro_batch_size=micro), step.topology
        )
    for remat in stronger:
        yield Change(f"--remat {remat}", replace(config, remat=remat), step.topology)
    if stronger and smaller:
        both = replace(config, remat="full", micro_batch_size=smaller[-1])
        yield Change(f"--remat full --micro_batch_size {smaller[-1]}", both, step.topology)


def doubled(topology: str) -> str:
    """Doubles the devices of a topology: of a TPU's torus the shortest axis, of GPUs the hosts."""
    chip, _, shape = topology.partition(":")
    sizes = [int(size) for size in shape.split("x")]
    if CHIPS[chip].platform == "gpu":
        hosts = sizes[0] if len(sizes) == 2 else 1
        devices = sizes[-1]
        if hosts == 1 and devices < 8:
            return f"{chip}:{devices * 2}"
        return f"{chip}:{hosts * 2}x{devices}"
    at = sizes.index(min(sizes), 0 if len(set(sizes)) > 1 else len(sizes) - 1)
    sizes[at] *= 2
    return f"{chip}:" + "x".join(map(str, sorted(sizes)))


def _rows(step: Compiled) -> int:
    """Counts the fewest rows of which every device has a part."""
    return math.prod(step.mesh.shape[axis] for axis in ("data", "fsdp", "expert"))
