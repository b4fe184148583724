"""What attention costs by count: what the maths needs, what the tiles compute, and the least time both allow.

    python -m benchmarks.kernel_counts

Prints the tables of docs/kernels.md. Nothing is timed: FLOPs are of matmuls, bytes of device memory, bfloat16, and a
floor is the larger of FLOPs over the chip's peak and bytes over its bandwidth.
"""

import argparse
from typing import NamedTuple

import jax.numpy as jnp

from sdar_jax import ModelConfig, visibility
from sdar_jax.attention.tile_sizes import tile_sizes_for
from sdar_jax.attention.tiles import EMPTY, tile_kinds
from sdar_jax.devices.chips import CHIPS
from sdar_jax.training.flops import ReadCounts, TokenCounts, training_flops
from sdar_jax.visibility import Ranges

# Matmuls of [rows, D] by [D, keys] size: what the gradient needs, and what two kernels that each make the scores do.
FORWARD, BACKWARD, BACKWARD_BY_TWO = 2, 5, 7
TPU_KEYS = 128  # A TPU kernel's partial tiles skip sub-blocks of so many keys.


class Heads(NamedTuple):
    name: str
    heads: int
    kv_heads: int
    head_dim: int = 128


HEADS = [Heads("1.7B", 16, 8), Heads("4B, 8B", 32, 8), Heads("30B-A3B", 32, 4)]
LENGTHS = [4096, 20480]
BLOCK_SIZE = 4


def document(length: int):
    return jnp.ones((1, length), jnp.int32)


def pairs(ranges: Ranges) -> float:
    return float((ranges.end - ranges.start).sum())


def tiled_pairs(ranges: Ranges, queries: int, keys: int) -> float:
    """Pairs of all visited tiles of `queries` positions by `keys`."""
    length = ranges.start.shape[1]
    missing = -length % queries
    padded = Ranges(*(jnp.pad(x, ((0, 0), (0, missing), (0, 0))) for x in ranges))
    return float((tile_kinds(padded, queries, keys, length) != EMPTY).sum()) * queries * keys


def flops(count: float, heads: Heads, matmuls: int) -> float:
    return 2.0 * matmuls * count * heads.heads * heads.head_dim


def least_bytes(positions: int, heads: Heads, *, backward: bool) -> float:
    """Each operand read once and each result written once: q, k, v, o; backward also dO, dq, dk, dv."""
    rows = heads.heads * (4 if backward else 2) + heads.kv_heads * (4 if backward else 2)
    return 2.0 * positions * heads.head_dim * rows


def tiled_bytes(positions: int, count: float, queries: int, heads: Heads) -> float:
    """Forward: queries and results once, and the keys and values of every visited tile."""
    once = 2.0 * 2 * positions * heads.heads * heads.head_dim
    return once + 2.0 * 2 * count / queries * heads.kv_heads * heads.head_dim


def floor(chip: str, work: float, moved: float) -> float:
    return max(work / CHIPS[chip].bf16_flops, moved / CHIPS[chip].bandwidth)


def useful_by_tile():
    print("| L | S | documents | tile 32 x 128 | 64 x 64 | 128 x 128 | 256 x 256 | 512 x 512 |")
    print("|---|---|---|---|---|---|---|---|")
    for length in LENGTHS:
        for block_size in (4, 16, 64):
            for size in (length, 1024):
                segments = jnp.arange(length, dtype=jnp.int32)[None] // size + 1
                ranges = visibility.hybrid(segments, block_size)
                tiles = ((32, 128), (64, 64), (128, 128), (256, 256), (512, 512))
                shares = [pairs(ranges) / tiled_pairs(ranges, *tile) for tile in tiles]
                documents = "one" if size == length else f"of {size}"
                print(
                    f"| {length} | {block_size} | {documents} | "
                    + " | ".join(f"{s:.2f}" for s in shares)
                    + " |"
                )


def groups_by_tile():
    """Groups of 4 blocks (MultiTF) beside single blocks, at the recipes' row length."""
    length, size = 2048, 4
    print(
        "| S | blocks | pairs | useful, tile 32 x 128 | 64 x 64 | 128 x 128 | H200 floor, forward, 8B |"
    )
    print("|---|---|---|---|---|---|---|")
    heads = next(each for each in HEADS if "8B" in each.name)
    for block_size in (4, 16, 32):
        starts = jnp.arange(length) // (size * block_size) * (size * block_size)
        for name, group_start in (("single", None), (f"groups of {size}", starts[None])):
            ranges = visibility.hybrid(document(length), block_size, group_start=group_start)
            needed = pairs(ranges)
            shares = [needed / tiled_pairs(ranges, *t) for t in ((32, 128), (64, 64), (128, 128))]
            work = flops(tiled_pairs(ranges, 32, 128), heads, FORWARD)
            seconds = floor("h200", work, least_bytes(2 * length, heads, backward=False))
            print(
                f"| {block_size} | {name} | {needed / 1e6:.2f}M | "
                + " | ".join(f"{share:.2f}" for share in shares)
                + f" | {1e3 * seconds:.3f} ms |"
            )


def kernels():
    print(
        "| heads, L | kernel | needs TFLOP | GB | tiles | useful | TFLOP done | GB loaded | floor |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for length in LENGTHS:
        ranges = visibility.hybrid(document(length), BLOCK_SIZE)
        needed = pairs(ranges)
        for heads in HEADS:
            for chip, name in (("h200", "mosaic_gpu"), ("v5p", "mosaic_tpu")):
                _kernel_rows(chip, name, heads, length, ranges, needed)


def _kernel_rows(chip: str, name: str, heads: Heads, length: int, ranges: Ranges, needed: float):
    groups = heads.heads // heads.kv_heads
    for title, parts in (("forward", {"forward": FORWARD}), ("backward", {"dq": 3, "dkv": 4})):
        backward = title == "backward"
        needs = flops(needed, heads, BACKWARD if backward else FORWARD)
        least = least_bytes(2 * length, heads, backward=backward)
        done, loaded, tiles, visited = 0.0, 0.0, [], 0.0
        for kernel, matmuls in parts.items():
            tile_sizes = tile_sizes_for(name, kernel, heads.head_dim)
            queries = max(tile_sizes.query_tile // groups, 1)
            keys = TPU_KEYS if name == "mosaic_tpu" else tile_sizes.key_tile
            count = tiled_pairs(ranges, queries, keys)
            visited += count * matmuls
            done += flops(count, heads, matmuls)
            loaded += tiled_bytes(2 * length, count, queries, heads)
            tiles.append(f"{queries} x {keys}")
        useful = needed * sum(parts.values()) / visited
        seconds = floor(chip, done, least)
        print(
            f"| {heads.name}, {length} | {chip} {title} | {needs / 1e12:.2f} | {least / 1e9:.2f} | {', '.join(tiles)} "
            f"| {useful:.2f} | {done / 1e12:.2f} | {loaded / 1e9:.1f} | {1e3 * seconds:.2f} ms |"
        )


def against_others():
    """Pairs a clean token: ours, a block mask over the dense layout, the dense mask itself, and AR's attention."""
    print(
        "| L | what the maths needs | ours, 32 x 128 | block mask, 128 x 128 | dense 2L x 2L | causal, AR |"
    )
    print("|---|---|---|---|---|---|")
    for length in LENGTHS:
        ranges = visibility.hybrid(document(length), BLOCK_SIZE)
        causal = pairs(visibility.causal(document(length)))
        row = [
            pairs(ranges),
            tiled_pairs(ranges, 32, 128),
            tiled_pairs(ranges, 128, 128),
            4.0 * length**2,
            causal,
        ]
        print(
            f"| {length} | "
            + " | ".join(f"{x / length:.0f} ({x / causal:.2f}x)" for x in row)
            + " |"
        )


def price():
    """FLOPs of a training step a clean token, block diffusion (half masked) against AR."""
    print(
        "| model | L | AR, GFLOP a token | block diffusion | ratio | of which attention, AR | block diffusion |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in ("qwen3-1.7b", "qwen3-4b", "qwen3-8b"):
        config = ModelConfig.preset(name)
        for length in LENGTHS:
            causal, hybrid = (
                visibility.causal(document(length)),
                visibility.hybrid(document(length), BLOCK_SIZE),
            )
            noisy = Ranges(hybrid.start[:, :length], hybrid.end[:, :length])
            number = lambda x: jnp.float32(x)
            read = map(number, (length, length, pairs(causal), pairs(causal)))
            ar = TokenCounts(*ReadCounts._make(read), num_loss_tokens=number(length))
            read = map(number, (2 * length, length, pairs(hybrid), pairs(noisy)))
            diffusion = TokenCounts(*ReadCounts._make(read), num_loss_tokens=number(length / 2))
            attention = [
                12 * config.num_heads * config.head_dim * config.num_layers * float(w.pairs)
                for w in (ar, diffusion)
            ]
            per_token = [training_flops(config, w) / length / 1e9 for w in (ar, diffusion)]
            shares = [
                a / length / 1e9 / total for a, total in zip(attention, per_token, strict=True)
            ]
            print(
                f"| {name} | {length} | {per_token[0]:.1f} | {per_token[1]:.1f} | {per_token[1] / per_token[0]:.2f} "
                f"| {shares[0]:.0%} | {shares[1]:.0%} |"
            )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    for title, table in (
        ("Useful fraction of the pairs in visited tiles, hybrid layout", useful_by_tile),
        ("Groups of blocks, hybrid layout, one document of 2048", groups_by_tile),
        (f"The kernels, hybrid layout, one document, S = {BLOCK_SIZE}, bfloat16", kernels),
        (f"Pairs of query and key a clean token, S = {BLOCK_SIZE}, one document", against_others),
        (f"A whole training step, S = {BLOCK_SIZE}, one document", price),
    ):
        print(f"\n**{title}**\n")
        table()


if __name__ == "__main__":
    main()
