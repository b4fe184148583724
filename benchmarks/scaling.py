"""How recipes scale over devices: collective against compute time from 8 to 4096, weak and strong.

    python -m benchmarks.scaling [CONFIG.yaml ...] [--sizes 8,64,512,4096]

Prints the tables of docs/scaling.md. Nothing is timed. Each recipe's step is compiled once for 64 v5p and once for 64
H200; FLOPs and bytes are counted in those programs. Other numbers of devices, and v5e and v6e, are computed from them:

- A micro-batch moves the same weights whatever their number, and each device computes the same rows. What travels along
  `expert` and `context` alone is tokens, and goes by the rows.
- Beyond a slice (256 chips of v5e and v6e) `data` splits rows over slices, and each micro-batch adds up gradients
  between them, in bfloat16 as within a slice.

Links are taken at their full rate, without the latency of a step of a ring. That a step fits is not asked; only sizes
at which weights, gradients and optimiser alone do not are left out.

Weak: as many rows a device as with 64. Strong: the recipe's own batch; fewer micro-batches, then fewer rows at once,
until a device has none.
"""

import argparse
import math
from dataclasses import replace

from jax.sharding import Mesh

from sdar_jax.cli import plan
from sdar_jax.devices.chips import CHIPS, topology
from sdar_jax.devices.sharding import make_mesh
from sdar_jax.planning import Compiled, Roofline, compile_step, roofline
from sdar_jax.planning.count import Traffic
from sdar_jax.planning.network import along, links
from sdar_jax.training import read_config

RECIPES = [
    "configs/study1/mdlm_pretrain.yaml",
    "configs/study2/8b_cpt.yaml",
    "configs/study2/30b-a3b_cpt.yaml",
    "configs/study4/sci_cpt.yaml",
]
BASE, COUNTED = 64, {"v5p": "v5p:4x4x4", "h200": "h200:8x8"}
TAKEN_FROM = {"v5p": "v5p", "v5e": "v5p", "v6e": "v5p", "h200": "h200"}
SLICE = 256


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


def impossible(step: Compiled, chip: str, devices: int, *, strong: bool) -> str | None:
    """Why a step cannot be shared by so many, or None."""
    together = math.prod(size for axis, size in step.mesh.shape.items() if axis != "fsdp")
    if devices < together:
        return f"the mesh needs {together}"
    if (
        strong
        and step.config.data.batch_size * step.mesh.shape["context"] * step.mesh.shape["tensor"]
        < devices
    ):
        return "less than a row per device"
    memory = step.memory
    held = (
        (2 * memory.weights + memory.optimizer + memory.ema)
        * BASE
        / mesh_of(step, chip, devices).size
    )
    return (
        f"{held / 1e9:.0f} GB of weights, gradients and optimiser"
        if held > CHIPS[chip].memory
        else None
    )


def collective_seconds(
    step: Compiled, roof: Roofline, chip: str, devices: int
) -> tuple[float, float]:
    """Of the compiled step's micro-batches on so many devices: for weights and gradients, and for tokens."""
    mesh, figures = mesh_of(step, chip, devices), CHIPS[chip]
    payload = {Traffic(link.kind, along(link.axes, mesh)): link.payload for link in roof.links}
    found = links(payload, mesh, figures)
    tokens = sum(
        link.seconds for link in found if not {"data", "fsdp"} & set(link.axes.split(" x "))
    )
    slices = devices // mesh.size
    held = step.memory.weights / 4 * BASE / mesh.size
    between = micro_batches(step) * 2 * (slices - 1) / slices * 2 * held / figures.between
    return sum(link.seconds for link in found) - tokens + between, tokens


def micro_batches(step: Compiled) -> int:
    return step.config.data.batch_size // (
        step.config.micro_batch_size or step.config.data.batch_size
    )


def point(step: Compiled, roof: Roofline, chip: str, devices: int, *, strong: bool) -> Roofline:
    """A step on so many devices: what was counted on `BASE`, shared and priced anew."""
    figures, share = CHIPS[chip], BASE / devices if strong else 1.0
    weights, tokens = collective_seconds(step, roof, chip, devices)
    return roof._replace(
        useful_flops=roof.useful_flops * share,
        compute=(roof.matmul_flops + roof.attention_flops) / figures.bf16_flops * share,
        memory=roof.hbm_bytes / figures.bandwidth * share,
        # Weights travel once a micro-batch, of which there is at least one.
        collectives=weights * max(share, 1 / micro_batches(step)) + tokens * share,
    )


def print_table(step: dict[str, Compiled], roof: dict[str, Roofline], sizes: list[int]) -> None:
    print(
        "\n| chip | devices | weak: compute, memory, collectives | MFU | strong: the same batch | MFU |"
    )
    print("|---|---|---|---|---|---|")
    for chip, source in _counted(roof):
        for devices in sizes:
            told = [
                _told(step[source], roof[source], chip, devices, strong=strong)
                for strong in (False, True)
            ]
            print(f"| {chip} | {devices} | {' | '.join(told)} |")


def _told(step: Compiled, roof: Roofline, chip: str, devices: int, *, strong: bool) -> str:
    """Seconds, and the MFU where nothing overlaps and where all does."""
    why = impossible(step, chip, devices, strong=strong)
    if why is not None:
        return f"{why} | "
    found = point(step, roof, chip, devices, strong=strong)
    times = ", ".join(
        f"{seconds:.3g}" for seconds in (found.compute, found.memory, found.collectives)
    )
    return f"{times} s | {found.mfu(found.serial, CHIPS[chip].bf16_flops):.0%} to {_mfu(found, chip):.0%}"


def _mfu(found: Roofline, chip: str) -> float:
    return found.mfu(found.overlapped, CHIPS[chip].bf16_flops)


def _counted(roof: dict[str, Roofline]) -> list[tuple[str, str]]:
    """Chips, each with the one that its counts are taken from, where that took the step."""
    return [(chip, source) for chip, source in TAKEN_FROM.items() if source in roof]


def print_limits(step: dict[str, Compiled], roof: dict[str, Roofline]) -> None:
    """Powers of two: where strong scaling ends, and what ends it."""
    for chip, source in _counted(roof):
        print(f"- {chip}: {_limit(step[source], roof[source], chip)}")


def _limit(step: Compiled, roof: Roofline, chip: str) -> str:
    best, last, told = 0.0, 0, ""
    for devices in (2**n for n in range(3, 16)):
        why = impossible(step, chip, devices, strong=True)
        if why is not None and last:
            return f"to {last} devices{told}; then {why}"
        if why is None:
            found = point(step, roof, chip, devices, strong=True)
            best = max(best, _mfu(found, chip))
            if _mfu(found, chip) < best / 2:
                bound = f"bound by {found.bound}"
                return f"to {last} devices{told}; at {devices} the MFU, {bound}, is below half of the best"
            last, told = (
                devices,
                f", collectives {found.collectives / found.compute:.0%} of compute",
            )
    return f"beyond {last} devices" if last else "at no size"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--sizes", default="8,64,512,4096")
    options = parser.parse_args()
    plan.use_compilers()
    for recipe in options.recipes:
        steps = {chip: compile_step(read_config(recipe), name) for chip, name in COUNTED.items()}
        roofs = {
            chip: roofline(step, step.counts)
            for chip, step in steps.items()
            if step.counts is not None
        }
        print(f"\n**{recipe}**, {step_told(steps['v5p'])}")
        print_table(steps, roofs, [int(size) for size in options.sizes.split(",")])
        print("\nStrong scaling holds\n")
        print_limits(steps, roofs)


def step_told(step: Compiled) -> str:
    config, mesh = step.config, step.mesh.shape
    rows = (config.micro_batch_size or config.data.batch_size) / (
        mesh["data"] * mesh["fsdp"] * mesh["expert"]
    )
    named = " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1)
    over = f" over {mesh['context']}" if mesh["context"] > 1 else ""
    return f"{config.data.batch_size} rows of {config.data.sequence_length}, {rows:g} at once a device{over}; {named}"


if __name__ == "__main__":
    main()
