"""Bounds the time of a compiled step: what computing, memory and links each need, overlapped fully or not at all."""

import re
from typing import NamedTuple

from sdar_jax.planning.compile import Compiled
from sdar_jax.planning.count import Counts
from sdar_jax.planning.network import Link, links
from sdar_jax.planning.work import KERNELS, TEACHER, attention_flops
from sdar_jax.training.flops import training_flops


class Roofline(NamedTuple):
    """The least times of a device in one step.

    Attributes:
        useful_flops: `training_flops`, without what is computed twice.
        matmul_flops: counted in the program.
        attention_flops: of the tiles that the counted kernel calls visit.
        hbm_bytes: counted in the program.
        links: what its collectives take.
        compute: seconds at the chip's full rate.
        memory: seconds at the chip's full rate.
        collectives: seconds at the links' full rates.
    """

    useful_flops: float
    matmul_flops: float
    attention_flops: float
    hbm_bytes: float
    links: list[Link]
    compute: float
    memory: float
    collectives: float

    @property
    def overlapped(self) -> float:
        """Seconds of a step where everything overlaps: no step can be shorter."""
        return max(self.compute, self.memory, self.collectives)

    @property
    def serial(self) -> float:
        """Seconds where nothing overlaps."""
        return self.compute + self.memory + self.collectives

    @property
    def bound(self) -> str:
        """The name of what takes longest."""
        times = {"compute": self.compute, "memory": self.memory, "collectives": self.collectives}
        return max(times, key=lambda name: times[name])

    def mfu(self, seconds: float, peak: float) -> float:
        """Computes the share of `peak` FLOP/s that is useful where a step takes so many seconds."""
        return self.useful_flops / peak / seconds


def roofline(step: Compiled, counts: Counts) -> Roofline:
    """Bounds the step as it was compiled.

    Args:
        counts: its own.
    """
    devices = step.mesh.size
    chip = step.chip
    attention = attention_flops(step.model, step.expected, _calls_per_layer(step, counts)) / devices
    found = links(counts.payload, step.mesh, chip)
    return Roofline(
        useful_flops=training_flops(
            step.model, step.expected.token_counts, frozen=step.config.lora is not None
        )
        / devices,
        matmul_flops=counts.flops,
        attention_flops=attention,
        hbm_bytes=counts.hbm,
        links=found,
        compute=(counts.flops + attention) / chip.bf16_flops,
        memory=counts.hbm / chip.bandwidth,
        collectives=sum(link.seconds for link in found),
    )


def _calls_per_layer(step: Compiled, counts: Counts) -> dict[str, float]:
    """Counts how often each attention kernel runs for a layer and a micro-batch: with remat, the forward twice."""
    batch = step.config.data.batch_size
    runs = step.model.num_layers * (batch // (step.config.micro_batch_size or batch))
    calls: dict[str, float] = {}
    for scope, times in counts.kernels.items():
        for name in KERNELS:
            if f"range_attention_{name}" in scope:
                # The scope is "jvp(teacher)" where gradients of others are taken.
                reader = TEACHER if re.search(rf"\b{TEACHER}\b", scope) else name
                calls[reader] = calls.get(reader, 0) + times / runs
    return calls
