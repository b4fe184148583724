"""The least time a decoding forward can take on a chip, and what speed-up over AR follows: predictions, not timings.

    python -m benchmarks.decode_roofline --chip h200 --model sdar-8b
    python -m benchmarks.decode_roofline --chip h200 --slots 4
    python -m benchmarks.decode_roofline --plot FILE.svg
    python -m benchmarks.decode_roofline --chip h200 --compile 1x4 128x64      (batch x S; needs `make compilers`)

A forward of B rows must read the weights once (the embedding's rows apart) and every row's keys and values, bfloat16,
and multiply its positions with the weights: t_f >= max(bytes / bandwidth, FLOPs / peak) with the vendor's figures. With
commit fusion a block of S costs gamma = S / TPF forwards, of which the first also carries the block before: S (1 + 1 /
gamma) = S + TPF positions a row and forward. AR reads one position a row and commits one. So

    TGS = B TPF / t_f        speed-up over AR = TPF t_f(AR) / t_f        break-even TPF = t_f / t_f(AR)

With K slots open all the time a forward reads K S positions a row. `--slots K` prints by how much longer that takes
than the forward of a single block at three tokens (two where S is 4): the gain in TPF from which several blocks pay.

`--compile` compiles the engine's own program (`decoding.buffer.advance`, with the chip's kernels, and prompts read
beside decoding) for one such chip and prints what it holds.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from sdar_jax import DecodingConfig, ModelConfig
from sdar_jax.decoding.block_forward import BufferConfig
from sdar_jax.decoding.buffer import advance
from sdar_jax.decoding.decode_state import DecodeState, SequenceShape, make_sequence
from sdar_jax.devices.chips import CHIPS, Chip, compiling_for, topology
from sdar_jax.model import Model, empty_pages

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
BLOCK_SIZES = (4, 8, 16, 32, 64)
TOKENS_A_FORWARD = (2, 3, 5)
PAPER_SPEEDUP = 2.3  # The paper's Figure 4: S = 64, batch 4, H200.
BYTES = 2  # bfloat16
PAGE = 64


class Work(NamedTuple):
    """Of one forward of the batch."""

    bytes: float
    flops: float

    def seconds(self, chip: Chip) -> float:
        return max(self.bytes / chip.bandwidth, self.flops / chip.bf16_flops)


@cache
def matmul_weights(model: ModelConfig) -> int:
    """Weights that every position is multiplied with: all but the embedding, the head where positions are masked."""
    shapes = jax.eval_shape(partial(Model, model, jax.random.key(0), jnp.bfloat16))
    return sum(x.size for x in jax.tree.leaves(shapes)) - model.vocab_size * model.hidden_size


def forward_work(model: ModelConfig, batch: int, context: int, positions: float) -> Work:
    """`positions` of each of `batch` rows, over `context` cached keys."""
    weights = matmul_weights(model)
    kept = model.num_layers * model.num_kv_heads * model.head_dim * 2 * BYTES
    attention = 4 * model.num_layers * model.num_heads * model.head_dim * (context + positions)
    return Work(
        weights * BYTES + batch * context * kept, batch * positions * (2 * weights + attention)
    )


def autoregressive(model: ModelConfig, chip: Chip, batch: int, context: int) -> float:
    return forward_work(model, batch, context, 1).seconds(chip)


def block_diffusion(
    model: ModelConfig, chip: Chip, batch: int, context: int, size: int, tpf: float
) -> float:
    """t_f with commit fusion; tpf = S / gamma."""
    return forward_work(model, batch, context, size + tpf).seconds(chip)


def needed(
    model: ModelConfig, chip: Chip, batch: int, context: int, size: int, speedup: float
) -> float | None:
    """The tokens a forward from which blocks are `speedup` times as fast as AR; None if not even S is enough."""
    ar = autoregressive(model, chip, batch, context)
    gain = lambda tpf: tpf * ar / block_diffusion(model, chip, batch, context, size, tpf)
    return next(
        (float(tpf) for tpf in np.linspace(1, size, 100 * size) if gain(tpf) >= speedup), None
    )


def print_tables(model: ModelConfig, chip: Chip, context: int) -> None:
    ar = lambda batch: autoregressive(model, chip, batch, context)
    blocks = lambda batch, size, tpf: block_diffusion(model, chip, batch, context, size, tpf)
    print(f"floor of t_f in ms, {context} tokens cached a row; blocks at three tokens a forward")
    milliseconds = lambda batch, size: f"{1e3 * blocks(batch, size, 3):.2f}"
    print_table(milliseconds, lambda batch: f"{1e3 * ar(batch):.2f}")

    def rates(batch: int, size: int) -> str:
        return ", ".join(
            f"{batch * t / blocks(batch, size, t):.0f}" for t in TOKENS_A_FORWARD if t <= size
        )

    print(
        f"\ntokens/s of the batch, predicted; blocks at {', '.join(map(str, TOKENS_A_FORWARD))} tokens a forward"
    )
    print_table(rates, lambda batch: f"{batch / ar(batch):.0f}")
    for speedup in (1.0, PAPER_SPEEDUP):
        print(f"\ntokens a forward for {speedup:g} times the tokens/s of AR")
        print_table(
            lambda batch, size, x=speedup: _or_never(needed(model, chip, batch, context, size, x))
        )


def print_slots(model: ModelConfig, chip: Chip, context: int, slots: int) -> None:
    """The forward of K open blocks beside that of one."""
    print(f"t_f of {slots} open blocks over t_f of one, {context} tokens cached a row, predicted")

    def ratio(batch: int, size: int) -> str:
        single = block_diffusion(model, chip, batch, context, size, min(3, size // 2))
        several = forward_work(model, batch, context, slots * size).seconds(chip)
        return f"{several / single:.2f}"

    print_table(ratio)


def print_table(cell: Callable[[int, int], str], ar: Callable[[int], str] | None = None) -> None:
    first = ["batch"] + (["AR"] if ar else [])
    print("|", " | ".join([*first, *(f"S = {size}" for size in BLOCK_SIZES)]), "|")
    print("|---" * (len(first) + len(BLOCK_SIZES)), "|", sep="")
    for batch in BATCHES:
        row = [str(batch)] + ([ar(batch)] if ar else [])
        print("|", " | ".join([*row, *(cell(batch, size) for size in BLOCK_SIZES)]), "|")


def _or_never(number: float | None) -> str:
    return "never" if number is None else f"{number:.2f}"


def plot(model: ModelConfig, chips: Sequence[str], context: int, path: str) -> None:
    """Predicted tokens/s over the batch: AR, and blocks of each size at three tokens a forward."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(chips), figsize=(5 * len(chips), 3.6), sharey=True, squeeze=False
    )
    for axis, name in zip(axes[0], chips, strict=True):
        chip = CHIPS[name]
        rates = [batch / autoregressive(model, chip, batch, context) for batch in BATCHES]
        axis.plot(BATCHES, rates, color="black", linestyle="--", label="AR")
        for size in BLOCK_SIZES:
            rates = [
                3 * batch / block_diffusion(model, chip, batch, context, size, 3)
                for batch in BATCHES
            ]
            axis.plot(BATCHES, rates, label=f"S = {size}")
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="batch",
            title=f"{name}, {context} tokens cached a row: predicted",
        )
        axis.set_xticks(BATCHES, map(str, BATCHES))
    axes[0, 0].set_ylabel("tokens/s")
    axes[0, -1].legend()
    figure.tight_layout()
    figure.savefig(path)


def abstract_state(model: ModelConfig, batch: int, size: int, context: int) -> DecodeState:
    """An engine's state for `batch` sequences of up to `context` tokens."""
    pages = -(-(context + size) // PAGE)
    config = DecodingConfig(block_size=size)
    sequence = make_sequence(
        np.zeros(0, np.int32),
        config,
        SequenceShape(pages * PAGE, 8, pages, size, 2),
        rule=(0, config.strategy_for(model).rule),
        origin=0,
        max_new_tokens=1,
        stop_ids=(),
        mask_token_id=0,
        seed=0,
        float_type=np.dtype(np.float32),
    )
    sequences = jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch, *x.shape), x.dtype), sequence)
    return DecodeState(
        sequences, jax.eval_shape(lambda: empty_pages(model, batch * pages, PAGE, jnp.bfloat16))
    )


def compile_for(chip: str, model: ModelConfig, batch: int, size: int, context: int):
    """The engine's program for one chip: jax.stages.Compiled."""
    device = topology(f"{chip}:{1 if CHIPS[chip].platform == 'gpu' else '2x2'}").devices[0]
    one = SingleDeviceSharding(device)
    place = lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), tree
    )
    weights: Any = jax.eval_shape(partial(Model, model, jax.random.key(0), jnp.bfloat16))
    state, steps = abstract_state(model, batch, size, context), jax.ShapeDtypeStruct((), jnp.int32)
    rules = (DecodingConfig().strategy_for(model).rule,)
    config = BufferConfig(
        size, model.with_blocks(size), rules, prefill_sequences=1, prefill_tokens=256
    )
    with compiling_for(device):
        program = jax.jit(partial(advance, config=config), donate_argnums=1)
        return program.lower(place(weights), place(state), place(steps)).compile()


def print_compiled(chip: str, model: ModelConfig, batch: int, size: int, context: int) -> None:
    start = time.perf_counter()
    memory = compile_for(chip, model, batch, size, context).memory_analysis()
    assert memory is not None
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    room = CHIPS[chip].memory
    print(
        f"{chip} batch {batch}, S = {size}, {context} tokens a row: weights and pages "
        f"{memory.argument_size_in_bytes / 1e9:.1f} GB, temporaries {memory.temp_size_in_bytes / 1e9:.2f} GB, "
        f"{'fits' if held < room else 'DOES NOT FIT'} {room / 1e9:.0f} GB; "
        f"compiled in {time.perf_counter() - start:.0f} s",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chip", default="h200", choices=sorted(CHIPS))
    parser.add_argument("--model", default="sdar-8b", help="a preset")
    parser.add_argument("--context", type=int, default=2048, help="tokens cached a row")
    parser.add_argument("--slots", type=int, help="K: several open blocks beside one")
    parser.add_argument("--plot", metavar="FILE", help="draw the curves of H200 and v6e instead")
    parser.add_argument("--compile", nargs="+", metavar="BxS", help="compile these instead")
    arguments = parser.parse_args()
    model = ModelConfig.preset(arguments.model)
    if arguments.plot:
        return plot(model, ("h200", "v6e"), arguments.context, arguments.plot)
    if arguments.slots:
        return print_slots(model, CHIPS[arguments.chip], arguments.context, arguments.slots)
    if not arguments.compile:
        return print_tables(model, CHIPS[arguments.chip], arguments.context)
    for point in arguments.compile:
        batch, size = map(int, point.split("x"))
        print_compiled(arguments.chip, model, batch, size, arguments.context)


if __name__ == "__main__":
    main()
