"""How recipes scale over devices: collective against compute time from 8 to 4096, weak and strong.

    python -m benchmarks.scaling [CONFIG.yaml ...] [--sizes 8,64,512,4096]

Prints the tables of docs/scaling.md. Nothing is timed. Each recipe's step is compiled once for 64 v5p and once for 64
H200; FLOPs and bytes are counted in those programs. Other numbers of devices, and v5e and v6e, are computed from them:
a micro-batch moves the same weights whatever their number, and each device computes the same rows. Beyond a slice (256
chips of v5e and v6e) `data` splits rows over slices, and each micro-batch adds up gradients between them, in bfloat16
as within a slice.

Weak: as many rows a device as with 64. Strong: the recipe's own batch; fewer micro-batches, then fewer rows at once,
until a device has none.
"""

import argparse
from dataclasses import replace
from typing import NamedTuple

from jax.sharding import Mesh

from sdar_jax import plan
from sdar_jax.chips import CHIPS, topology
from sdar_jax.planning import Compiled, Roofline, compile_step, roofline
from sdar_jax.planning.count import Traffic
from sdar_jax.planning.network import along, links
from sdar_jax.sharding import make_mesh
from sdar_jax.training import read_config

RECIPES = ["configs/study2/8b_cpt.yaml", "configs/study2/30b-a3b_cpt.yaml", "configs/study4/sci_cpt.yaml"]
BASE, COUNTED = 64, {"v5p": "v5p:4x4x4", "h200": "h200:8x8"}
TAKEN_FROM = {"v5p": "v5p", "v5e": "v5p", "v6e": "v5p", "h200": "h200"}
SLICE = 256


class Point(NamedTuple):
    """Seconds of a step on so many devices; useful: FLOPs of a device that `training_flops` counts."""

    devices: int
    compute: float
    memory: float
    collectives: float
    useful: float
    peak: float

    def mfu(self, seconds: float) -> float:
        return self.useful / self.peak / seconds

    @property
    def overlapped(self) -> float:
        return max(self.compute, self.memory, self.collectives)

    @property
    def serial(self) -> float:
        return self.compute + self.memory + self.collectives


def shape(chip: str, devices: int) -> str:
    """A topology of so many devices, or of one slice of them; as near to a cube or square as powers of two are."""
    if chip == "h200":
        return f"h200:{devices}" if devices <= 8 else f"h200:{devices // 8}x8"
    sizes = [1, 1, 1] if chip == "v5p" else [1, 1]
    for i in range(min(devices, SLICE if chip != "v5p" else devices).bit_length() - 1):
        sizes[-1 - i % len(sizes)] *= 2
    return f"{chip}:" + "x".join(map(str, sizes))


def mesh_of(step: Compiled, chip: str, devices: int) -> Mesh:
    """The recipe's mesh on one slice."""
    return make_mesh(replace(step.config.mesh, fsdp=-1), topology(shape(chip, devices)).devices)


def collective_seconds(step: Compiled, roof: Roofline, chip: str, devices: int) -> float:
    """Of the compiled step's micro-batches, on so many devices."""
    mesh = mesh_of(step, chip, devices)
    payload = {Traffic(link.kind, along(link.axes, mesh)): link.payload for link in roof.links}
    within = sum(link.seconds for link in links(payload, mesh, CHIPS[chip]))
    slices = devices // mesh.size
    held = step.memory.weights / 4 * BASE / mesh.size
    micro_batches = step.config.data.batch_size // (step.config.micro_batch_size or step.config.data.batch_size)
    return within + micro_batches * 2 * (slices - 1) / slices * 2 * held / CHIPS[chip].between


def point(step: Compiled, roof: Roofline, chip: str, devices: int, *, strong: bool) -> Point | None:
    """None where a device would have less than a row."""
    config, figures = step.config, CHIPS[chip]
    if strong and config.data.batch_size * step.mesh.shape["context"] * step.mesh.shape["tensor"] < devices:
        return None
    share = BASE / devices if strong else 1.0
    # Weights travel once a micro-batch, of which there is at least one.
    least = (config.micro_batch_size or config.data.batch_size) / config.data.batch_size
    collectives = collective_seconds(step, roof, chip, devices) * max(share, least)
    compute = (roof.matmul_flops + roof.attention_flops) / figures.bf16_flops
    return Point(
        devices,
        compute * share,
        roof.hbm_bytes / figures.bandwidth * share,
        collectives,
        roof.useful_flops * share,
        figures.bf16_flops,
    )


def print_table(step: dict[str, Compiled], roof: dict[str, Roofline], sizes: list[int], *, strong: bool) -> None:
    print(f"\n{'Strong: the same batch' if strong else 'Weak: the same rows a device'}\n")
    print("| chip | devices | compute | memory | collectives | bound | MFU, all overlaps | MFU, nothing does |")
    print("|---|---|---|---|---|---|---|---|")
    for chip, source in _counted(roof):
        for devices in sizes:
            found = point(step[source], roof[source], chip, devices, strong=strong)
            if found is None:
                print(f"| {chip} | {devices} | less than a row a device | | | | | |")
                continue
            times = {"compute": found.compute, "memory": found.memory, "collectives": found.collectives}
            told = " | ".join(f"{seconds:.2f} s" for seconds in times.values())
            bound = max(times, key=lambda name: times[name])
            shares = f"{found.mfu(found.overlapped):.0%} | {found.mfu(found.serial):.0%}"
            print(f"| {chip} | {devices} | {told} | {bound} | {shares} |")


def _counted(roof: dict[str, Roofline]) -> list[tuple[str, str]]:
    """Chips, each with the one that its counts are taken from, where that took the step."""
    return [(chip, source) for chip, source in TAKEN_FROM.items() if source in roof]


def print_limits(step: dict[str, Compiled], roof: dict[str, Roofline]) -> None:
    """Powers of two up to 8192: where strong scaling ends, and what ends it."""
    for chip, source in _counted(roof):
        last, why = 0, "more than 8192 devices"
        for devices in (2**n for n in range(3, 14)):
            found = point(step[source], roof[source], chip, devices, strong=True)
            if found is None:
                why = "a device would have less than a row"
                break
            if found.collectives > max(found.compute, found.memory):
                why = "collectives would take longer than computing"
                break
            last = devices
        print(f"- {chip}: to {last} devices; then {why}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--sizes", default="8,64,512,4096")
    options = parser.parse_args()
    plan.use_compilers()
    for recipe in options.recipes:
        steps = {chip: compile_step(read_config(recipe), name) for chip, name in COUNTED.items()}
        roofs = {chip: roofline(step, step.counts) for chip, step in steps.items() if step.counts is not None}
        print(f"\n**{recipe}**, {step_told(steps['v5p'])}")
        for strong in (False, True):
            print_table(steps, roofs, [int(size) for size in options.sizes.split(",")], strong=strong)
        print("\nStrong scaling holds\n")
        print_limits(steps, roofs)


def step_told(step: Compiled) -> str:
    config = step.config
    micro = (config.micro_batch_size or config.data.batch_size) // step.mesh.size
    mesh = " x ".join(f"{axis} {size}" for axis, size in step.mesh.shape.items() if size > 1)
    return f"{config.data.batch_size} rows of {config.data.sequence_length}, {micro} at once a device; {mesh} of {BASE}"


if __name__ == "__main__":
    main()
