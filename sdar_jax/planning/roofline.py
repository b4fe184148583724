"""The least time of a compiled step: what computing, memory and links each need, overlapped wholly or not at all."""

from typing import NamedTuple

from sdar_jax.planning.compile import Compiled
from sdar_jax.planning.count import Counts
from sdar_jax.planning.network import Link, links
from sdar_jax.planning.work import KERNELS, attention_flops
from sdar_jax.training.flops import training_flops


class Roofline(NamedTuple):
    """Of a device in one step. useful_flops: `training_flops`, without what is computed twice.

    matmul_flops, hbm_bytes: counted in the program; attention_flops: of the tiles that the counted kernel calls visit.
    compute, memory, collectives: seconds at the chip's full rates.
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
        """What takes longest."""
        times = {"compute": self.compute, "memory": self.memory, "collectives": self.collectives}
        return max(times, key=lambda name: times[name])

    def mfu(self, seconds: float, peak: float) -> float:
        return self.useful_flops / peak / seconds


def roofline(step: Compiled, counts: Counts) -> Roofline:
    """Of the step as it was compiled. Args: counts: its own."""
    devices, chip = step.mesh.size, step.chip
    attention = attention_flops(step.model, step.expected, _calls_per_layer(step, counts)) / devices
    found = links(counts.payload, step.mesh, chip)
    return Roofline(
        useful_flops=training_flops(step.model, step.expected.token_counts) / devices,
        matmul_flops=counts.flops,
        attention_flops=attention,
        hbm_bytes=counts.hbm,
        links=found,
        compute=(counts.flops + attention) / chip.bf16_flops,
        memory=counts.hbm / chip.bandwidth,
        collectives=sum(link.seconds for link in found),
    )


def _calls_per_layer(step: Compiled, counts: Counts) -> dict[str, float]:
    """How often each attention kernel runs for a layer and a micro-batch: with remat, the forward twice."""
    batch = step.config.data.batch_size
    runs = step.model.num_layers * (batch // (step.config.micro_batch_size or batch))
    called = {
        name: sum(times for scope, times in counts.kernels.items() if f"range_attention_{name}" in scope)
        for name in KERNELS
    }
    return {name: times / runs for name, times in called.items() if times}
